"""One step of a serving engine: some sequences decode, others prefill (R2).

    once for a step      decode = DecodePart(table, lengths, n)
                         prefill = PrefillPart.of(table, lengths, borders, bounds)
    for each layer       scores    = score(q_idx, index pages, decode)
                         out, ids  = attend_scored(q, pages, decode, scores)
                         selection = select(q_idx, index pages, prefill)
                         out       = attend_selected(q, pages, prefill, selection)

Nothing here waits for the device or reads it. The parts of a decode have no shape that depends on a
length, so its two calls can be captured in a CUDA graph, which stays right while sequences grow.

Not checked, because that would read the device: entries of tables are pages, lengths count the new
tokens, scales are finite and positive. Entries behind a sequence's end may be stale, but those up
to its bound have to be pages. Memory behind a sequence's last token may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa import kernel_choice
from msa.config import MSAConfig
from msa.ir import PagedKV, Selection
from msa.kernel_choice import Kernels
from msa.triton_impl import paged_keys
from msa.triton_impl.decode import counters, score_call, score_step
from msa.triton_impl.page_attention import attend_pages
from msa.triton_impl.places import on_its_device
from msa.triton_impl.prefill import attend_pages as attend_prefill
from msa.triton_impl.selection import select_portable
from msa.triton_impl.step_sequences import StepSequences


# -- what a layer has -----------------------------------------------------------------------------
@dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer, in any strides whose last dim is contiguous.

    Pages of 8 bits (e4m3 or e5m2) hold number / scale. A scale is one number on the device, in
    float32. Both are None where they are 1.

    Raises:
        ValueError: one scale is given, and the other is not.
    """

    k: Float[Tensor, "pages Bk Hkv D"]
    v: Float[Tensor, "pages Bk Hkv Dv"]
    k_scale: Float[Tensor, "..."] | None = None
    v_scale: Float[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        if (self.k_scale is None) != (self.v_scale is None):
            raise ValueError(
                "k_scale and v_scale must be given together, got only one of them: "
                "give a scale of 1 for the other"
            )

    def scales(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A factor for each page and head, all in one place of memory; None where all are 1."""
        if self.k_scale is None or self.v_scale is None:
            return None, None
        shape = self.k.shape[0], self.k.shape[2]
        return self.k_scale.reshape(()).expand(shape), self.v_scale.reshape(()).expand(shape)


@dataclass(frozen=True)
class IndexPages:
    """Index keys of one layer. In 8 bits (e4m3) they have no scales."""

    k_idx: Float[Tensor, "pages Bk Di"]


# -- what a step has ------------------------------------------------------------------------------
@dataclass(frozen=True)
class DecodePart:
    """Sequences with n new tokens each; a length of 0 is an empty slot of the batch."""

    table: Int[Tensor, "rows columns"]
    """A sequence's pages in order, int32 or int64, in any strides."""
    lengths: Int[Tensor, " B"]
    """Tokens of each sequence with the new ones, int32 or int64."""
    n: int
    rows: Int[Tensor, " B"] | None = None
    """The row of the table of each sequence. None: row s is that of sequence s."""

    def cache(self, keys: Tensor, values: Tensor, k_idx: Tensor) -> PagedKV:
        """The form that the kernels take. With `rows` its table is only where the rows begin."""
        return PagedKV(keys, values, k_idx, self.table[: len(self.lengths)], self.lengths)


@dataclass(frozen=True)
class PrefillPart:
    """Sequences with any number of new tokens."""

    table: Int[Tensor, "B columns"]
    sequences: StepSequences

    @classmethod
    def of(
        cls, table: Int[Tensor, "B columns"], lengths: Int[Tensor, " B"],
        cu_seqlens_q: Sequence[int], bounds: Sequence[int],
    ) -> PrefillPart:  # fmt: skip
        """The part of a step for these queries.

        Args:
            table: as in `DecodePart`; row s is that of sequence s.
            lengths: tokens of each sequence with the new ones, on the device.
            cu_seqlens_q: borders of the new tokens.
            bounds: at least the length of each sequence, on the host.
        """
        return cls(table, StepSequences.of(cu_seqlens_q, bounds, lengths))

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.sequences.total_q


def sequences_of(
    cu_seqlens_q: Sequence[int], bounds: Sequence[int], lengths: Int[Tensor, " B"]
) -> StepSequences:
    """The sequences of a `PrefillPart`, for engines whose layers have several tables.

    Arguments are those of `PrefillPart.of`.
    """
    return StepSequences.of(cu_seqlens_q, bounds, lengths)


@dataclass(frozen=True)
class Scores:
    """What `score` gives to `attend_scored`."""

    values: Float[Tensor, "B n Hkv width"]
    arrivals: Int[Tensor, "B programs"]


# -- decoding -------------------------------------------------------------------------------------
@on_its_device
@torch.no_grad()
def score(
    q_idx: Float[Tensor, "B n Hkv Di"], pages: IndexPages, part: DecodePart, config: MSAConfig,
    heads: int, kernels: Kernels = "auto",
) -> Scores:  # fmt: skip
    """The scores of the blocks that are not forced (R4, R5), by one launch.

    Args:
        q_idx: in the dtype of the pages, or in 16 bits for pages of e4m3.
        heads: query heads that `attend_scored` will have.
        kernels: as in `msa.decode`.

    Raises:
        TypeError, ValueError: "hopper" is named, and that kernel cannot take the call (R20).
    """
    batch, n, groups, _ = q_idx.shape
    arrivals = counters(q_idx.new_empty((batch, n, heads, 0)), groups)
    cache = part.cache(pages.k_idx[:, :, None], pages.k_idx[:, :, None], pages.k_idx)
    call = score_call(q_idx, cache)
    if q_idx.dtype.itemsize == 1:  # a product of two tensors of 8 bits
        call = replace(call, q_dtype="bfloat16")
    chosen = kernel_choice.choose(kernels, call)
    return Scores(score_step(q_idx, cache, config, arrivals, chosen, part.rows), arrivals)


@on_its_device
@torch.no_grad()
def attend_scored(
    q: Float[Tensor, "B n Hq D"], pages: KVPages, part: DecodePart, config: MSAConfig,
    scores: Scores, out: Float[Tensor, "B n Hq Dv"] | None = None,
    ids: Int[Tensor, "B n Hkv k"] | None = None,
) -> tuple[Float[Tensor, "B n Hq Dv"], Int[Tensor, "B n Hkv k"]]:  # fmt: skip
    """Select from scores and attend to what was selected (R6-R10), by one launch.

    Args:
        out, ids: contiguous memory for the results; None makes it. An empty slot gets 0 and -1.
    """
    cache = _with_scales(part.cache(pages.k, pages.v, pages.k[:, :, 0]), pages)
    made, _, ids = attend_pages(
        q, cache, config, scores.values, scores.arrivals, out=out, ids=ids, rows=part.rows
    )
    return made, ids


@on_its_device
@torch.no_grad()
def attend_given(
    q: Float[Tensor, "B n Hq D"], pages: KVPages, part: DecodePart, config: MSAConfig,
    ids: Int[Tensor, "B n Hkv k"], out: Float[Tensor, "B n Hq Dv"] | None = None,
) -> Float[Tensor, "B n Hq Dv"]:  # fmt: skip
    """Attend to given blocks, such as those of another layer, by one launch.

    Args:
        ids: blocks of each query's own sequence, visible ones, in any order; -1 for no block.
        out: contiguous memory for the result; None makes it. An empty slot gets 0.
    """
    cache = _with_scales(part.cache(pages.k, pages.v, pages.k[:, :, 0]), pages)
    arrivals = counters(q, pages.k.shape[2]).zero_()
    return attend_pages(
        q, cache, config, None, arrivals, given=ids.contiguous(), out=out, rows=part.rows
    )[0]


def _with_scales(cache: PagedKV, pages: KVPages) -> PagedKV:
    k_scales, v_scales = pages.scales()
    return cache if k_scales is None else replace(cache, k_scales=k_scales, v_scales=v_scales)


# -- prefill --------------------------------------------------------------------------------------
@on_its_device
@torch.no_grad()
def select(
    q_idx: Float[Tensor, "Tq Hkv Di"], pages: IndexPages, part: PrefillPart, config: MSAConfig,
    ids: Int[Tensor, "Tq Hkv k"] | None = None, kernels: Kernels = "auto",
) -> Selection:  # fmt: skip
    """The selected blocks (R4-R8).

    Args:
        q_idx: in the dtype of the pages, or in 16 bits for pages of e4m3.
        ids: contiguous memory for them; None makes it.
        kernels: as in `msa.prefill`.

    Raises:
        TypeError, ValueError: "hopper" is named, and these kernels cannot take the call (R20).
    """
    keys, table = pages.k_idx, paged_keys.IndexPages(part.table, None)
    readable = paged_keys.page_matrix(keys) is not None
    call = replace(kernel_choice.call_of(q_idx, keys, config), readable=readable)
    if q_idx.dtype == keys.dtype and keys.dtype.itemsize == 1:
        call = replace(call, q_dtype="bfloat16", k_dtype="bfloat16")
    if kernel_choice.choose(kernels, call) == "hopper":
        # imported here, because older releases of triton have no Gluon
        from msa.triton_impl.hopper.selection import select_on_hopper

        return select_on_hopper(q_idx, keys, part.sequences, config, pages=table, out=ids)
    return select_portable(q_idx, keys, part.sequences, config, pages=table, out=ids)


def given(ids: Int[Tensor, "Tq Hkv k"], part: PrefillPart, config: MSAConfig) -> Selection:
    """A selection of given blocks, such as those of another layer, for `attend_selected`.

    Args:
        ids: ascending, then -1 (R8), visible ones.
    """
    return Selection(ids.contiguous(), part.sequences, config.block_size)


@on_its_device
@torch.no_grad()
def attend_selected(
    q: Float[Tensor, "Tq Hq D"], pages: KVPages, part: PrefillPart, selection: Selection,
    scale: float, out: Float[Tensor, "Tq Hq Dv"] | None = None, kernels: Kernels = "auto",
) -> Float[Tensor, "Tq Hq Dv"]:  # fmt: skip
    """Attend to the selected blocks (R9-R12).

    Args:
        selection: from `select`, over the same part.
        scale: the softmax scale.
        out: contiguous memory for the result; None makes it.
        kernels: as in `msa.prefill`.

    Raises:
        TypeError, ValueError: "hopper" is named, and these kernels cannot take the call (R20).
    """
    if pages.k_scale is None and pages.k.dtype == torch.float8_e4m3fn:
        one = part.sequences.table(unit_scale)  # pages of 8 bits are widened, with their scales
        pages = replace(pages, k_scale=one, v_scale=one)
    # lengths are in the sequences: those of the cache are not read
    cache = PagedKV(pages.k, pages.v, pages.k[:, :, 0], part.table, part.sequences.shortfall)
    return attend_prefill(
        q, _with_scales(cache, pages), selection, scale, kernels=kernels, out=out
    )[0]


def unit_scale(sequences: StepSequences) -> Float[Tensor, ""]:
    """A scale of 1, made once for a step."""
    return torch.ones((), device=sequences.shortfall.device)
