"""PagedKV: keys, values and index keys in pages, for `decode`, and its checks (R2, R20)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8

from msa import checks
from msa.checks.arrays import Array
from msa.sequences import Sequences

PAGE_DIMS = {
    "k_pages": "pages Bk Hkv D",
    "v_pages": "pages Bk Hkv Dv",
    "k_idx_pages": "pages Bk Di",
}
CACHE_DIMS = PAGE_DIMS | {"page_table": "B table", "lengths": "B"}
SCALE_DIMS = {"k": "pages Hkv", "v": "pages Hkv", "k_idx": "pages"}
TOKEN_DIMS = {"k": "n Hkv D", "v": "n Hkv Dv", "k_idx": "n Di"}
PAGE_DTYPES = (*checks.FLOAT_DTYPES, checks.EIGHT_BITS)


@dataclass(frozen=True)
class PagedKV:
    """Keys, values and index keys in pages of one block each, in any physical order (R2, R20).

    Block b of sequence s lies in page `page_table[s, b]`; the first `lengths[s]` tokens are valid.
    Entries of the table beyond a sequence's last block are not read. Table and lengths hold
    integers of any dtype, int32 or int64 where `append_tokens` is to write them. A `PagePool` makes
    a cache and fills it.

    Pages of torch.float8_e4m3fn have scales, finite and positive, one for each page and head (for
    index keys, each page): a stored number stands for itself times the scale, in float32. k and v
    have 8 bits together or not at all, index keys independently of them.

    >>> import numpy as np
    >>> pages = np.arange(6.0).reshape(3, 2, 1, 1)  # three pages of two tokens
    >>> table, lengths = np.array([[2, 0], [-1, -1]]), np.array([3, 0])
    >>> cache = PagedKV(pages, pages, pages[..., 0], table, lengths)
    """

    k_pages: Float[Array, "pages Bk Hkv D"]
    v_pages: Float[Array, "pages Bk Hkv Dv"]
    k_idx_pages: Float[Array, "pages Bk Di"]
    page_table: Integer[Array, "B table"]
    lengths: Integer[Array, " B"]
    k_scales: Float32[Array, "pages Hkv"] | None = None
    v_scales: Float32[Array, "pages Hkv"] | None = None
    k_idx_scales: Float32[Array, " pages"] | None = None
    shared: UInt8[Array, " pages"] | None = None
    """1 for a page that several sequences hold: `append_tokens` writes to none of these."""

    def read(self, name: Literal["k", "v", "k_idx"], where: Any) -> Float[Array, "*where dim"]:
        """The numbers at an index into the pages of that name, times their scales if there are any.

        The index leaves the last dim whole: page ids, or page ids and offsets, or these and heads.
        Nothing else is read. With scales the answer is float32.

        >>> import torch
        >>> small = torch.tensor([[1.5, 2.0], [7.0, 0.0]])[..., None].to(torch.float8_e4m3fn)
        >>> wide, scales = small.float()[..., None], torch.tensor([4.0, 0.5])
        >>> cache_8 = PagedKV(wide, wide, small, table, lengths, k_idx_scales=scales)
        >>> cache_8.read("k_idx", (torch.tensor([1, 0]), torch.tensor([0, 1]))).flatten()
        tensor([3.5000, 8.0000])
        """
        pages, scales = getattr(self, f"{name}_pages"), getattr(self, f"{name}_scales")
        if scales is None:
            return pages[where]
        scales = scales.reshape(len(scales), 1, *scales.shape[1:], 1)  # beside each token of a page
        every = (*pages.shape[:-1], 1)
        if not checks.is_torch(pages):
            return pages[where] * np.broadcast_to(scales, every)[where]
        import torch

        bits = pages.view(torch.uint8)  # not every release indexes 8-bit floats on a GPU
        return bits[where].view(pages.dtype).float() * scales.expand(every)[where]

    def live(self, n: int) -> tuple[list[int], Sequences]:
        """The slots of the batch that hold a sequence, and their last n tokens as Sequences.

        Reads the lengths back from the device.

        >>> cache.live(2)
        ([0], Sequences(cu_seqlens_q=(0, 2), cu_seqlens_k=(0, 3)))
        """
        lengths = self.lengths.tolist()
        slots = [s for s, length in enumerate(lengths) if length > 0]
        cu_k = accumulate((lengths[s] for s in slots), initial=0)
        return slots, Sequences(tuple(n * i for i in range(len(slots) + 1)), tuple(cu_k))

    def flat(
        self, sequence: int
    ) -> tuple[Float[Array, "Tk Hkv D"], Float[Array, "Tk Hkv Dv"], Float[Array, "Tk Di"]]:
        """Copy out k, v and k_idx of one sequence, as `attention` takes them for chunked prefill.

        Pages of 8 bits are given in float32, which is exact; convert them to q's dtype for
        `attention`.

        Raises:
            TypeError, ValueError: no such sequence, a table without its pages, pages of 8 bits
                without scales, or with scales that are not finite and positive (R20).

        >>> cache.flat(0)[0].ravel()
        array([4., 5., 0.])
        """
        sizes: dict[str, int] = {}
        check_arrays(self, sizes)  # the reference has 8-bit pages in float32
        sequence = check_sequence(sequence, sizes["B"])
        length, row = int(self.lengths[sequence]), checks.to_numpy(self.page_table[sequence])
        own = check_row(row, length, sequence, sizes)
        for name in ("k", "v", "k_idx"):
            check_scaled(self, name)
        check_own_scales(self, own, sequence)
        own = checks.beside(self.k_pages, own)
        k, v, k_idx = (
            numbers.reshape(-1, *numbers.shape[2:])[:length]
            for numbers in (self.read(name, own) for name in ("k", "v", "k_idx"))
        )
        return k, v, k_idx


# -- checks (R20) ---------------------------------------------------------------------------------
def check_arrays(
    cache: PagedKV, sizes: dict[str, int], counted_in: tuple[str, ...] = checks.INTEGER_DTYPES
) -> None:
    """Page shapes agree; the sizes found are added to `sizes`.

    `counted_in` are the dtypes that the table and the lengths may have.
    """
    for name, dims in CACHE_DIMS.items():
        array = getattr(cache, name)
        if name in PAGE_DIMS:
            checks.check_array(f"cache.{name}", array, PAGE_DTYPES)
        else:
            checks.check_integers(f"cache.{name}", array, counted_in)
        checks.check_shape(f"cache.{name}", array, dims, sizes)


def check_scaled(cache: PagedKV, name: str) -> None:
    """The pages of this name have scales if they are of 8 bits."""
    pages, scales = getattr(cache, f"{name}_pages"), getattr(cache, f"{name}_scales")
    if checks.is_eight_bits(pages) and scales is None:
        raise ValueError(
            f"cache.{name}_scales must be given where cache.{name}_pages has dtype {pages.dtype}, "
            "got None"
        )


def check_sequence(sequence: Any, batch: int) -> int:
    """Return a sequence of the batch, 0 to batch - 1."""
    number = checks.check_count("sequence", sequence, 0)
    if number >= batch:
        raise ValueError(f"sequence must be 0 to {batch - 1}, got {number}")
    return number


def check_row(row: np.ndarray, length: int, sequence: int, sizes: dict[str, int]) -> np.ndarray:
    """Return the pages of one sequence, in int64; `sizes` holds Bk and pages."""
    if length < 0:
        raise ValueError(f"cache.lengths must be at least 0, got {length} in sequence {sequence}")
    needed = -(-length // sizes["Bk"])
    check_width(len(row), needed, length, sequence)
    own = row[:needed]
    bad = np.flatnonzero((own < 0) | (own >= sizes["pages"]))
    if len(bad):
        raise ValueError(
            f"cache.page_table must hold pages 0 to {sizes['pages'] - 1}, got {own[bad[0]]} "
            f"for block {bad[0]} of sequence {sequence}"
        )
    return own.astype(np.int64)


def check_width(width: int, needed: int, length: int, sequence: int) -> None:
    """A row of the table has an entry for each block of its sequence."""
    if needed > width:
        raise ValueError(
            f"cache.page_table must have {needed} entries for the {length} tokens of "
            f"sequence {sequence}, got {width}"
        )


def check_own_scales(cache: PagedKV, own: np.ndarray, sequence: int) -> None:
    """The scales of the pages of one sequence are finite and positive; `own` are its pages."""
    for name in SCALE_DIMS:
        scales = getattr(cache, f"{name}_scales")
        if scales is None or not len(own):
            continue
        checks.check_plain(f"cache.{name}_scales", scales)
        found = checks.to_numpy(scales[checks.beside(scales, own)])
        bad = ~((found > 0) & (found < np.inf))
        if bad.any():
            block = int(np.argwhere(bad)[0, 0])
            raise ValueError(
                f"cache.{name}_scales must be finite and positive, got {found[bad][0]} "
                f"in page {own[block]}, block {block} of sequence {sequence}"
            )
