"""How others call selection and attention: what goes in, and in which order results come out.

An adapter turns a function of one convention into a function of this project's packed tensors:

    select              (q_idx, k_idx, sequences, config) -> ids [Tq, Hkv, k], in the given order
    sparse_attention    (q, k, v, selection, scale) -> out [Tq, Hq, Dv], lse [Tq, Hq] or None
    attention           (q, k, v, q_idx, k_idx, sequences, config) -> out, lse or None, ids or None

Ids keep the order in which the function gave them: that is for R8 to judge. What travels the other
way is laid out by `packing`: shuffled pages, rows of a batch, rubbish around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from msa.config import MSAConfig
from msa.conformance.messages import BadTarget, check_result
from msa.conformance.packing import from_rows, in_pages, in_rows
from msa.integrations import arrays, layouts
from msa.ir import Array, Output, Selection, Sequences

Function = Callable[..., Any]


def integers(like: Array, values: Any) -> Array:
    """An int32 array of the kind and device of `like`."""
    return arrays.as_int32(arrays.like(like, values))


def borders(like: Array, sequences: Sequences) -> tuple[Array, Array]:
    """cu_seqlens_q and cu_seqlens_k, int32 [batch + 1]."""
    return integers(like, sequences.cu_seqlens_q), integers(like, sequences.cu_seqlens_k)


def lengths(like: Array, sequences: Sequences) -> tuple[Array, Array]:
    """Tokens of each sequence, and how many come before its first query: int32 [batch]."""
    n_k = np.diff(sequences.cu_seqlens_k)
    return integers(like, n_k), integers(like, n_k - np.diff(sequences.cu_seqlens_q))


def head_first(name: str, found: Any, q_idx: Array, config: MSAConfig) -> Array:
    """Ids [Hkv, Tq, k] as [Tq, Hkv, k]."""
    shape = (q_idx.shape[1], q_idx.shape[0], config.top_k)
    check_result(name, found, "Hkv Tq k", shape, "integer")
    return arrays.as_int32(found.swapaxes(0, 1))


def check_out(name: str, out: Any, q: Array, v: Array) -> Array:
    """Packed attention output, each row of which v's heads have shaped."""
    check_result(name, out, "Tq Hq Dv", (*q.shape[:2], v.shape[-1]), "floating")
    return out


def first_of(found: Any) -> tuple[Any, Any]:
    """What is alone, or leads a tuple; and the second of the tuple, or None."""
    if isinstance(found, (tuple, list)):
        return found[0], found[1] if len(found) > 1 else None
    return found, None


def in_order(ids: Array) -> Array:
    """Ids of any order, negative ones anywhere: ascending, then -1; the canonical order (R8)."""
    return layouts.ascending(arrays.where(ids < 0, -1, ids))


# -- msa ------------------------------------------------------------------------------------------
def msa_select(target: Function) -> Function:
    """As msa.select."""

    def ids(q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig) -> Array:
        cu_q, cu_k = borders(q_idx, sequences)
        found = target(q_idx, k_idx, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config)
        found = found.indices if isinstance(found, Selection) else found
        shape = (*q_idx.shape[:2], config.top_k)
        check_result("indices", found, "Tq Hkv k", shape, "integer")
        return found

    return ids


def msa_parts(found: Any, q: Array, v: Array) -> tuple[Array, Array | None, Array | None]:
    """An Output, out alone, or (out, lse): out, lse or None, ids or None."""
    if isinstance(found, Output):
        selection = found.selection
        out, lse, ids = found.out, found.lse, None if selection is None else selection.indices
    else:
        (out, lse), ids = first_of(found), None
    if lse is not None:
        check_result("lse", lse, "Tq Hq", tuple(q.shape[:2]), "floating")
    return check_out("out", out, q, v), lse, ids


def msa_sparse_attention(target: Function) -> Function:
    """As msa.sparse_attention."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, Array | None]:
        return msa_parts(target(q, k, v, selection, softmax_scale=scale), q, v)[:2]

    return attend


def msa_attention(target: Function) -> Function:
    """As msa.attention."""

    def attend(
        q: Array, k: Array, v: Array, q_idx: Array, k_idx: Array,
        sequences: Sequences, config: MSAConfig,
    ) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
        cu_q, cu_k = borders(q, sequences)
        found = target(q, k, v, q_idx, k_idx, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config)
        return msa_parts(found, q, v)

    return attend


# -- transformers ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """Packed sequences as the rows of a batch: padded behind, and by `left` tokens before."""

    sequences: Sequences
    left: int = 0

    def queries(self, tokens: Array) -> Array:
        """[Tq, ...] to [B, T, ...]."""
        return in_rows(tokens, (qs for qs, _ in self.sequences.spans()))

    def keys(self, tokens: Array) -> Array:
        """[Tk, ...] to [B, left + n_k, ...]."""
        return in_rows(tokens, (ks for _, ks in self.sequences.spans()), self.left)

    def packed(self, rows: Array) -> Array:
        """[B, T, ...] to [Tq, ...]."""
        return from_rows(rows, (qs for qs, _ in self.sequences.spans()))

    def positions(self, like: Array) -> Array:
        """position_ids [B, T], counted from a row's first token; padding repeats its last query."""
        starts = arrays.like(like, self.sequences.positions())
        rows = [starts[qs] for qs, _ in self.sequences.spans()]
        longest = max(len(row) for row in rows)
        ends = [row[-1:] if len(row) else starts[:1] * 0 for row in rows]
        filled = [
            arrays.join([row, end.repeat(longest - len(row))], 0) for row, end in zip(rows, ends)
        ]
        return arrays.stack(filled, 0)

    def mask(self, like: Array) -> Array:
        """attention_mask [B, left + n_k]: 1 for a token, 0 for padding."""
        counts = [ks.stop - ks.start for _, ks in self.sequences.spans()]
        places = arrays.like(like, range(-self.left, max(counts)))
        return arrays.stack([(places >= 0) & (places < n) for n in counts], 0).long()


def transformers_select(target: Function) -> Function:
    """As MiniMaxM3VLIndexer after its projections, and with the mask that it is not given."""

    def ids(
        q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig, left_padding: int = 0
    ) -> Array:
        rows = Rows(sequences, left_padding)
        found = target(
            rows.queries(q_idx).swapaxes(1, 2),
            rows.keys(k_idx)[:, None],
            rows.positions(q_idx),
            rows.mask(q_idx),
            block_size=config.block_size,
            topk_blocks=config.top_k,
            local_blocks=config.local_blocks,
        )
        longest = max(qs.stop - qs.start for qs, _ in sequences.spans())
        shape = (sequences.batch, q_idx.shape[1], longest, -1)
        check_result("block_indices", found, "B Hkv T k", shape, "integer")
        if found.shape[-1] > config.top_k:
            raise BadTarget(
                f"block_indices must have at most topk_blocks = {config.top_k} ids for a query, "
                f"got {found.shape[-1]}"
            )
        packed = rows.packed(arrays.as_int32(found.swapaxes(1, 2)))
        return arrays.widen(packed, config.top_k, -1)

    return ids


def transformers_sparse_attention(target: Function) -> Function:
    """As its attention from `block_indices` on: mask and softmax."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, None]:
        rows, block = Rows(selection.sequences), selection.block_size
        width = min(selection.top_k, selection.sequences.max_blocks(block))
        ids = rows.queries(layouts.own_block_first(selection, None)[..., :width])
        for row, (qs, _) in zip(ids, selection.sequences.spans()):
            row[qs.stop - qs.start :] = -1  # padding asks for nothing
        found, _ = first_of(
            target(
                rows.queries(q).swapaxes(1, 2),
                rows.keys(k).swapaxes(1, 2),
                rows.keys(v).swapaxes(1, 2),
                ids.swapaxes(1, 2).long(),
                rows.positions(q),
                block_size=block,
                scaling=scale,
            )
        )
        shape = (selection.sequences.batch, ids.shape[1], q.shape[1], v.shape[-1])
        check_result("out", found, "B T Hq Dv", shape, "floating")
        return rows.packed(found), None

    return attend


# -- vLLM -----------------------------------------------------------------------------------------
def vllm_select(target: Function) -> Function:
    """As minimax_m3_index_score and minimax_m3_index_topk behind one another."""

    def ids(q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig) -> Array:
        pages, table = in_pages(k_idx, sequences, config.block_size)
        seq_lens, prefix_lens = lengths(q_idx, sequences)
        found = target(
            q_idx, pages, table, borders(q_idx, sequences)[0], seq_lens, prefix_lens,
            topk=config.top_k, init_blocks=config.sink_blocks, local_blocks=config.local_blocks,
        )  # fmt: skip
        return head_first("topk_idx", found, q_idx, config)

    return ids


def vllm_sparse_attention(target: Function) -> Function:
    """As minimax_m3_sparse_attn, but for `output`, which is returned."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, None]:
        sequences, width = selection.sequences, max(k.shape[-1], v.shape[-1])
        both = arrays.join([wider(k, width), wider(v, width)], -1)  # K | V share their head size
        pages, table = in_pages(both, sequences, selection.block_size)
        seq_lens, prefix_lens = lengths(q, sequences)
        found, _ = first_of(
            target(
                wider(q, width), pages.swapaxes(1, 2), layouts.to_vllm(selection), table,
                borders(q, sequences)[0], seq_lens, prefix_lens, sm_scale=scale,
            )
        )  # fmt: skip
        check_result("out", found, "Tq Hq D", (*q.shape[:2], width), "floating")
        return found[..., : v.shape[-1]], None

    return attend


def wider(array: Array, width: int) -> Array:
    """Zeros behind the last dim: they change no product, and give columns that are dropped."""
    return arrays.widen(array, width, 0)


# -- official MSA ---------------------------------------------------------------------------------
def official_select(target: Function) -> Function:
    """As the paged prefill indexer: plan and run in one call."""

    def ids(q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig) -> Array:
        pages, table = in_pages(k_idx, sequences, config.block_size)
        cu_q, cu_k = borders(q_idx, sequences)
        found = target(q_idx, pages[:, None], table, cu_q, cu_k, top_k=config.top_k)
        return head_first("indices", found, q_idx, config)

    return ids


def official_sparse_attention(target: Function) -> Function:
    """As the paged sparse prefill: plan and run in one call."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, Array | None]:
        block = selection.block_size
        (k_pages, table), (v_pages, _) = (in_pages(x, selection.sequences, block) for x in (k, v))
        found = target(
            q, k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2), layouts.to_official(selection),
            table, *borders(q, selection.sequences), softmax_scale=scale,
        )  # fmt: skip
        return msa_parts(found, q, v)[:2]

    return attend
