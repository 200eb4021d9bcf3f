"""The contract of the backends: what each function of a backend takes and returns.

A backend is a module of plain functions (`msa.reference`, `msa.torch_impl`, `msa.triton_impl`).
Arguments are already checked (by `msa.entry`) and packed (R1), and arrays are of the backend's
library.
The triton backend checks the limits of its kernels again, for callers without `msa.entry`.
Letters are explained in `msa.ir`. Rules R1-R21 are those of docs/spec.md.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int

from msa.config import MSAConfig
from msa.ir import (
    Array,
    BlockScores,
    Output,
    PagedKV,
    Partials,
    ReverseIndex,
    Schedule,
    Selection,
    Sequences,
    TileUnion,
)


@runtime_checkable
class Backend(Protocol):
    """Fourteen functions, in the order of the lowering."""

    # -- the whole path ---------------------------------------------------------------------------
    def attend(
        self, q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
        q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
        sequences: Sequences, config: MSAConfig, align: bool = False,
    ) -> Output:  # fmt: skip
        """Select, then attend: MSA itself (eq. 6-8, R4-R12). out in q's dtype, lse in float32.

        With align=True, kl is `align_index` over the selection, else None; the other results have
        the same bits. The loss can use the LSE of the attention.
        """
        ...

    def attend_selection(
        self, q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
        selection: Selection, softmax_scale: float,
    ) -> Output:  # fmt: skip
        """Softmax attention over the visible tokens of the selected blocks (eq. 8, R9-R12)."""
        ...

    # -- the index branch -------------------------------------------------------------------------
    def score_blocks(
        self,
        q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
        sequences: Sequences, config: MSAConfig,
    ) -> BlockScores:  # fmt: skip
        """For every query, group and block the highest visible token score (eq. 6, R4-R5).

        NaN counts as -inf; -inf where no token of the block is visible.
        """
        ...

    def select_blocks(self, scores: BlockScores, config: MSAConfig) -> Selection:
        """The forced blocks, then the best of the others; ties to the lower id (eq. 7, R6-R8)."""
        ...

    def select_fused(
        self,
        q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
        sequences: Sequences, config: MSAConfig,
    ) -> Selection:  # fmt: skip
        """select_blocks(score_blocks(...)) in memory that grows with Tq * k, not Tq * NB."""
        ...

    # -- the lowering -----------------------------------------------------------------------------
    def reverse_selection(self, selection: Selection) -> ReverseIndex:
        """The same edges sorted by group and block, queries ascending within each (R13)."""
        ...

    def schedule_chunks(self, reverse_index: ReverseIndex, chunk_size: int) -> Schedule:
        """Cut every row into items of at most chunk_size edges: ceil(row / chunk_size) items (R14).

        Items are in row order, all but a row's last one full; an empty row has none.
        """
        ...

    def attend_chunks(
        self, q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
        schedule: Schedule, softmax_scale: float,
    ) -> Partials:  # fmt: skip
        """For every edge and head the block-local softmax output and its LSE, in its slot (R15)."""
        ...

    def combine_partials(self, partials: Partials, dtype: Any = None) -> Output:
        """Weigh each slot by exp(its LSE - the total LSE) and add up (R16).

        `dtype` is that of `out` (None: that of the partials); lse is the total LSE in float32.
        """
        ...

    # -- the other loop order ---------------------------------------------------------------------
    def unite_tiles(self, selection: Selection, tile_size: int) -> TileUnion:
        """The union of the blocks of tile_size (1 to 31) neighbouring queries, with row masks (R9).

        Tiles start at each sequence's first query; U is the width of the widest union.
        """
        ...

    def attend_union(
        self, q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
        tile_union: TileUnion, softmax_scale: float,
    ) -> Output:  # fmt: skip
        """Attention by a running softmax along each tile's union (R9, R10)."""
        ...

    # -- training and serving ---------------------------------------------------------------------
    def align_index(
        self, q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"],
        q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
        selection: Selection | None, sequences: Sequences, config: MSAConfig,
        lse: Float[Array, "Tq Hq"] | None = None,
    ) -> Float[Array, ""]:  # fmt: skip
        """KL(teacher || student), mean over queries and groups (eq. 9-10, R17); 0 if Tq = 0.

        selection=None is the warm-up form: both distributions run over all visible tokens.
        lse is the LSE of the main branch over the same support (R10), in float32 or float64; then
        the teacher's probabilities are exp(logits - lse), else their sum is found here.
        The loss is float64 if q or q_idx is, else float32. Gradient reaches q_idx and k_idx only.
        """
        ...

    def prefill_chunk(
        self, q: Float[Array, "Tq Hq D"], q_idx: Float[Array, "Tq Hkv Di"],
        cache: PagedKV, sequences: Sequences, config: MSAConfig,
    ) -> Output:  # fmt: skip
        """MSA for the last tokens of each cached sequence (R2), which the cache holds already.

        sequences has one entry for each slot of the batch; its keys are those that the lengths of
        the cache count, and it may have no queries. The result is that of `attend` over the same
        keys in packed tensors. If pages have scales, the numbers are number * scale (R12).
        """
        ...

    def decode_step(
        self, q: Float[Array, "B n Hq D"], q_idx: Float[Array, "B n Hkv Di"] | None,
        cache: PagedKV, config: MSAConfig, ids: Int[Array, "B n Hkv k"] | None = None,
    ) -> Output:  # fmt: skip
        """MSA for the last n tokens of each cached sequence (R2), which the cache holds already.

        The blocks are those of `ids`, in R8's form, or else they are selected by q_idx. A sequence
        of length 0 is an empty slot of the batch: zeros, LSE -inf, no selected block, and its ids
        are not read. The returned selection covers the live sequences, packed. If pages have
        scales, the numbers are number * scale (R12).
        """
        ...


@runtime_checkable
class BackendWithGradients(Backend, Protocol):
    """What torch and triton have in addition: forward and backward as separate functions.

    `attend_selection` and `align_index` of these backends call them from a torch.autograd.Function.
    A caller with an autograd of its own, such as the operators of `msa.ops`, calls them itself.
    Autograd records none of them.
    """

    def attend_selection_forward(
        self, q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
        selection: Selection, softmax_scale: float,
    ) -> tuple[Float[Array, "Tq Hq Dv"], Float[Array, "Tq Hq"]]:  # fmt: skip
        """out and lse of `attend_selection`, for a caller who rounds out to q's dtype (R9-R12).

        lse is in the precision in which the backend works (float32 or float64), and out in that
        precision or in q's dtype.
        """
        ...

    def attend_selection_backward(
        self,
        d_out: Float[Array, "Tq Hq Dv"], d_lse: Float[Array, "Tq Hq"],
        q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
        out: Float[Array, "Tq Hq Dv"], lse: Float[Array, "Tq Hq"],
        selection: Selection, softmax_scale: float,
    ) -> tuple[
        Float[Array, "Tq Hq D"], Float[Array, "Tk Hkv D"], Float[Array, "Tk Hkv Dv"]
    ]:  # fmt: skip
        """Gradients for q, k and v, in their dtypes, with the selection held fixed (R18).

        out and lse are those of the forward; out may have been rounded to q's dtype since.
        """
        ...

    def align_index_forward(
        self, q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"],
        q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
        selection: Selection | None, sequences: Sequences, config: MSAConfig,
        lse: Float[Array, "Tq Hq"] | None, with_gradient: bool,
    ) -> tuple[Float[Array, ""], Float[Array, "Tq Hkv Di"], Float[Array, "Tk Di"]]:  # fmt: skip
        """The loss of `align_index`, and with_gradient its gradients for q_idx and k_idx (R17).

        The gradients are in the precision in which the backend works; without with_gradient they
        hold anything. A backward is a product of them with the gradient of the loss.
        """
        ...
