"""The convention of transformers' MiniMax-M3: sequences are the rows of a padded batch."""

from __future__ import annotations

from dataclasses import dataclass

from msa.config import MSAConfig
from msa.conformance.foreign.arguments import first_of
from msa.conformance.foreign.bad_target import BadTarget, check_result
from msa.conformance.foreign.pages_and_rows import from_rows, in_rows
from msa.conformance.foreign.signature import Convention, Function, Signature
from msa.integrations import arrays, layouts
from msa.ir import Array, Selection, Sequences


@dataclass(frozen=True)
class PaddedRows:
    """Packed sequences as rows of a batch: `left` tokens of padding before, the rest behind."""

    sequences: Sequences
    left: int = 0

    def queries(self, tokens: Array) -> Array:
        """Packed [Tq, ...] to rows [B, T, ...]."""
        return in_rows(tokens, (qs for qs, _ in self.sequences.spans()))

    def keys(self, tokens: Array) -> Array:
        """Packed [Tk, ...] to rows [B, left + n_k, ...]."""
        return in_rows(tokens, (ks for _, ks in self.sequences.spans()), self.left)

    def packed(self, rows: Array) -> Array:
        """Rows [B, T, ...] to packed [Tq, ...]."""
        return from_rows(rows, (qs for qs, _ in self.sequences.spans()))

    def positions(self, like: Array) -> Array:
        """position_ids [B, T] from a row's first token on. Padding repeats the last position."""
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
    """Adapt a function like MiniMaxM3VLIndexer after its projections, with a padding mask added."""

    def ids(
        q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig, left_padding: int = 0
    ) -> Array:
        rows = PaddedRows(sequences, left_padding)
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
    """Adapt a function like its attention after `block_indices`: mask and softmax."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, None]:
        rows, block = PaddedRows(selection.sequences), selection.block_size
        width = min(selection.top_k, selection.sequences.max_blocks(block))
        ids = rows.queries(layouts.own_block_first(selection, None)[..., :width])
        for row, (qs, _) in zip(ids, selection.sequences.spans()):
            row[qs.stop - qs.start :] = -1  # padding selects no block
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


TRANSFORMERS = Convention(
    "transformers",
    {
        "select": Signature(
            transformers_select,
            "q_idx [B, Hkv, T, Di], k_idx [B, 1, n_k, Di], position_ids [B, T], "
            "attention_mask [B, n_k], *, block_size, topk_blocks, local_blocks",
            "block_indices [B, Hkv, T, at most k]",
        ),
        "sparse_attention": Signature(
            transformers_sparse_attention,
            "query [B, Hq, T, D], key [B, Hkv, n_k, D], value [B, Hkv, n_k, Dv], "
            "block_indices [B, Hkv, T, min(k, blocks)], position_ids [B, T], *, "
            "block_size, scaling",
            "out [B, T, Hq, Dv], alone or first of a tuple",
        ),
    },
    order="own block first",
    sinks=False,
    left_padding=True,
)
