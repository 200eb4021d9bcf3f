"""Tokens in pages of 8 bits: the scale of a page, and how new tokens change it (R2).

A page (and head, for keys and values) has one scale, a power of two, and holds numbers y of e4m3
that stand for y * scale. Each time tokens are written, for every page and head that gets some:

    largest = max |x| over the finite x of its new tokens, 0 if there are none
    scale'  = max(scale, 1 / stretch), where stretch is the greatest power of two,
              at most 2^126, with largest * stretch <= 448
    y       = y * (scale / scale')                    for each older token of the page, rounded
    y       = x / scale', limited to -448 ... 448     for each new token, rounded

all in float32, rounded to the nearest e4m3, ties to even. If the first token of a page (offset 0)
is among the new ones, the old scale counts as 2^-126, the least scale. So the scale follows the
largest number among the tokens so far, and never falls while the page fills. A change by a power of
two rounds nothing by itself: older numbers keep their values, except those below 2^-6 * scale', the
least normal number of e4m3, whose steps become 2^-9 * scale'.
Truncated tokens leave the scale as it is, unless the page's first token is truncated too. A copy of
a page has the same scale. Numbers behind the last token are neither read nor written.

Nothing here waits for the device, so no tensor is refused for its numbers (R20 asks for checks of
shapes and kinds). NaN stays NaN (of either sign), and an infinity becomes -448 or 448 times the
scale; neither changes the scale. A page without finite numbers, or of zeros, has the scale 2^-126.
Numbers are read back in float32, so those from 1.9375 * 2^127 on come back as infinities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from msa.checks.arrays import Array

LEAST_SCALE = 2.0**-126
LARGEST = 448.0  # = 1.75 * 2^8


@dataclass(frozen=True)
class Places:
    """The places of t new tokens in T pages, and of the o older tokens of these pages.

    >>> places = Places.of(np.array([5, 5, 2]), np.array([2, 3, 0]))  # two tokens of four, then one
    >>> places.touched, places.owner, places.fresh
    (array([2, 5]), array([1, 1, 0]), array([ True, False]))
    >>> places.older_page, places.older_offset
    (array([5, 5]), array([0, 1]))
    """

    page: Int[Array, " t"]
    offset: Int[Array, " t"]
    owner: Int[Array, " t"]
    """Which of the touched pages gets the token."""
    touched: Int[Array, " T"]
    fresh: Array
    """Bool [T]: the page's first token is a new one."""
    older_page: Int[Array, " o"]
    older_offset: Int[Array, " o"]
    older_owner: Int[Array, " o"]

    @classmethod
    def of(cls, page: Int[Array, " t"], offset: Int[Array, " t"]) -> Places:
        """From NumPy arrays on the host; in each page the new tokens follow its older ones."""
        touched, owner = np.unique(page, return_inverse=True)
        older = np.full(len(touched), np.iinfo(np.int64).max)
        np.minimum.at(older, owner, offset)
        runs = [np.arange(0), *(np.arange(count) for count in older)]
        older_owner = np.repeat(np.arange(len(touched)), older)
        return cls(
            page, offset, owner, touched, older == 0,
            touched[older_owner], np.concatenate(runs), older_owner,
        )  # fmt: skip


def write_tokens(
    pages: Float[Array, "pages Bk *heads dim"], scales: Float32[Array, "pages *heads"],
    tokens: Float[Array, "t *heads dim"], places: Places,
) -> None:  # fmt: skip
    """Write new tokens, and older ones again where their page's scale has grown (see above).

    All are torch tensors on one device, tokens in float16, bfloat16 or float32.

    >>> import torch
    >>> pages, scales = torch.zeros(1, 4, 1).to(torch.float8_e4m3fn), torch.ones(1)
    >>> for number, offset in ((0.5, 0), (448.0, 1), (449.0, 2)):
    ...     places = Places.of(np.array([0]), np.array([offset]))
    ...     places = Places(*(torch.from_numpy(x) for x in vars(places).values()))
    ...     write_tokens(pages, scales, torch.tensor([[number]]), places)
    ...     print(pages.float().flatten().tolist(), scales.item())
    [256.0, 0.0, 0.0, 0.0] 0.001953125
    [0.5, 448.0, 0.0, 0.0] 1.0
    [0.25, 224.0, 224.0, 0.0] 2.0
    """
    import torch

    bits = pages.view(torch.uint8)  # not every release indexes 8-bit floats on a GPU
    tokens, owner = tokens.detach().float(), places.owner
    heads = [1] * (scales.ndim - 1)
    new = _largest_finite(tokens)
    largest = new.new_zeros(len(places.touched), *new.shape[1:])
    largest.scatter_reduce_(0, owner.view(-1, *heads).expand_as(new), new, "amax")
    known = scales[places.touched].masked_fill(places.fresh.view(-1, *heads), LEAST_SCALE)
    grown = torch.maximum(known, scale_for(largest))
    scales[places.touched] = grown

    older, ratio = (places.older_page, places.older_offset), (known / grown)[places.older_owner]
    numbers = bits[older].view(pages.dtype).float() * ratio[..., None]
    bits[older] = _rounded(numbers).view(torch.uint8)
    numbers = tokens / grown[owner][..., None]
    bits[places.page, places.offset] = _rounded(numbers).view(torch.uint8)


def scale_for(largest: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The scale of finite numbers up to `largest`, at least 0: read from the bits of float32.

    >>> import torch
    >>> scale_for(torch.tensor([448.0, 449.0, 7.0])).tolist()
    [1.0, 2.0, 0.015625]
    >>> scale_for(torch.tensor([0.0])).item() == LEAST_SCALE
    True
    """
    import torch

    bits = largest.view(torch.int32)
    above = (bits & 0x7FFFFF) > 0x600000  # the fraction of 1.75
    exponent = (bits >> 23) + above - 8  # biased by 127, as that of the scale
    return (exponent.clamp(min=1) << 23).view(torch.float32)


def _largest_finite(tokens: Float32[Array, "*shape dim"]) -> Float32[Array, "*shape"]:
    """The greatest finite magnitude of each row."""
    sizes = tokens.abs()
    return sizes.masked_fill(~(sizes < float("inf")), 0.0).amax(-1)  # NaN is not less than anything


def _rounded(numbers: Float32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Round to the nearest e4m3, ties to even, as torch does; e4m3 has no infinities."""
    import torch

    return numbers.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
