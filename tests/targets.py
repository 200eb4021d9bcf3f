"""Functions of other conventions for test_verify_target: correct ones, and ones with a bug."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

import msa
from msa import reference
from msa.integrations import layouts
from msa.ir import Output, Sequences


# -- correct: convert pages or rows to packed tokens, call the spec, convert the result -----------
def packed_from_pages(pages, table, lengths):
    """The tokens of all sequences, one sequence after the other."""
    rows = [
        pages[row.long()].flatten(0, 1)[:n] for row, n in zip(table, lengths.tolist(), strict=True)
    ]
    return torch.cat(rows)


def borders(lengths):
    return tuple(np.concatenate([[0], np.cumsum(lengths.tolist())]).tolist())


def vllm_select(
    idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens, *,
    topk, init_blocks, local_blocks,
):  # fmt: skip
    assert (prefix_lens == seq_lens - cu_seqlens_q.diff()).all()
    config = msa.MSAConfig(index_kv_cache.shape[1], topk, init_blocks, local_blocks)
    k_idx = packed_from_pages(index_kv_cache, block_table, seq_lens)
    selection = msa.select(
        idx_q, k_idx, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=borders(seq_lens), config=config
    )
    return layouts.to_vllm(selection)


def vllm_sparse_attention(
    q, kv_cache, topk_idx, block_table, cu_seqlens_q, seq_lens, prefix_lens, *, sm_scale
):
    tokens = packed_from_pages(kv_cache.swapaxes(1, 2), block_table, seq_lens)
    k, v = tokens.chunk(2, -1)
    sequences = Sequences(tuple(cu_seqlens_q.tolist()), borders(seq_lens))
    selection = layouts.from_vllm(topk_idx, sequences, kv_cache.shape[2])
    return msa.sparse_attention(q, k, v, selection, softmax_scale=sm_scale).out


def official_select(q, paged_k_cache, page_table, cu_seqlens_q, cu_seqlens_k, *, top_k):
    k_idx = packed_from_pages(paged_k_cache[:, 0], page_table, cu_seqlens_k.diff())
    config = msa.MSAConfig(paged_k_cache.shape[2], top_k)
    selection = msa.select(
        q, k_idx, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, config=config
    )
    return layouts.to_official(selection)


def official_sparse_attention(
    q, k_cache, v_cache, indices, page_table, cu_seqlens_q, cu_seqlens_k, *, softmax_scale
):
    k, v = (
        packed_from_pages(x.swapaxes(1, 2), page_table, cu_seqlens_k.diff())
        for x in (k_cache, v_cache)
    )
    sequences = Sequences(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()))
    selection = layouts.from_official(indices, sequences, k_cache.shape[2])
    output = msa.sparse_attention(q, k, v, selection, softmax_scale=softmax_scale)
    return output.out, output.lse


def transformers_select(
    q_idx, k_idx, position_ids, attention_mask, *, block_size, topk_blocks, local_blocks
):
    """The content of each row: from its first token to its last query."""
    config = msa.MSAConfig(block_size, topk_blocks, local_blocks=local_blocks)
    found = q_idx.new_full((*q_idx.shape[:3], topk_blocks), -1, dtype=torch.int64)
    for b, row in enumerate(k_idx[:, 0]):
        keys = row[attention_mask[b].bool()]
        real = position_ids[b].diff(append=position_ids[b, -1:]) > 0
        n = int(real.sum()) + 1  # padding repeats the last position
        if len(keys):
            one = msa.select(q_idx[b, :, :n].swapaxes(0, 1), keys, config=config)
            found[b, :, :n] = one.indices.swapaxes(0, 1)
    return found


def wrong_shape(q_idx, k_idx, **_):
    return np.zeros((q_idx.shape[1], q_idx.shape[0], 2), np.int32)


def wrong_dtype(q, k, v, selection, *, softmax_scale):
    return selection.indices[..., 0]


not_a_function = 3


# -- bugs in selection, convention msa ------------------------------------------------------------
def scored(q_idx, k_idx, cu_seqlens_q, cu_seqlens_k, config):
    sequences = Sequences(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()))
    return reference.score_blocks(q_idx, k_idx, sequences, config)


def ties_to_the_higher_id(q_idx, k_idx, *, config, **borders):
    scores = scored(q_idx, k_idx, **borders, config=config)
    nudge = np.arange(scores.values.shape[-1]) * 1e-9
    return reference.select_blocks(replace(scores, values=scores.values + nudge), config)


def nan_sorts_first(q_idx, k_idx, *, config, **borders):
    scores = scored(q_idx, k_idx, **borders, config=config)
    values = scores.values.copy()
    for b in range(values.shape[-1]):
        if np.isnan(k_idx[b * config.block_size : (b + 1) * config.block_size]).any():
            values[..., b] = np.inf
    return reference.select_blocks(replace(scores, values=values), config)


def best_score_first(q_idx, k_idx, *, config, **borders):
    scores = scored(q_idx, k_idx, **borders, config=config)
    selection = reference.select_blocks(scores, config)
    return layouts.own_block_first(selection, scores)


def groups_and_queries_swapped(q_idx, k_idx, *, config, **borders):
    """A buffer that is written head by head is read token by token."""
    ids = msa.select(q_idx, k_idx, config=config, **borders).indices
    return np.ascontiguousarray(ids.swapaxes(0, 1)).reshape(ids.shape)


def new_blocks_not_scored(q_idx, k_idx, *, cu_seqlens_q, cu_seqlens_k, config):
    """Uses the scores up to the length of the step before."""
    k_idx = k_idx.copy()
    sequences = Sequences(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()))
    for queries, keys in sequences.spans():
        k_idx[keys.stop - (queries.stop - queries.start) : keys.stop] = -np.inf
    return msa.select(
        q_idx, k_idx, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, config=config
    )


def local_blocks_forgotten(q_idx, k_idx, *, config, **borders):
    """Forces only the own block."""
    return msa.select(q_idx, k_idx, config=replace(config, local_blocks=1), **borders)


def blocks_of_slots(
    q_idx, k_idx, position_ids, attention_mask, *, block_size, topk_blocks, local_blocks
):
    """Counts blocks from the first place of a row, padding included."""
    seen = torch.ones_like(attention_mask)
    sizes = {"block_size": block_size, "topk_blocks": topk_blocks, "local_blocks": local_blocks}
    return transformers_select(q_idx, k_idx, position_ids, seen, **sizes)


# -- bugs in attention, convention msa ------------------------------------------------------------
def attend(q, k, v, selection, scale, tokens_of, head_of=lambda h, group: h // group):
    """Softmax over the tokens that `tokens_of(ids, position, keys)` lists, with repetition."""
    sequences, group = selection.sequences, q.shape[1] // k.shape[1]
    out, lse = np.zeros((*q.shape[:2], v.shape[-1])), np.zeros(q.shape[:2])
    for queries, keys in sequences.spans():
        for i in range(queries.start, queries.stop):
            p = keys.stop - keys.start - (queries.stop - i)
            for h in range(q.shape[1]):
                ids = selection.indices[i, h // group].tolist()
                read = [keys.start + j for j in tokens_of(ids, p, keys.stop - keys.start)]
                read = [j for j in read if j < len(k)]
                r = head_of(h, group) % k.shape[1]
                logits = scale * k[read, r].astype(float) @ q[i, h].astype(float)
                weights = np.exp(logits - logits.max())
                lse[i, h] = logits.max() + np.log(weights.sum())
                out[i, h] = weights / weights.sum() @ v[read, r].astype(float)
    return Output(out.astype(q.dtype), lse.astype(np.float32), selection)


def tokens(block, ids, stop):
    """The tokens before `stop` of these blocks, one after another."""
    return [j for b in ids for j in range(b * block, min((b + 1) * block, stop))]


def honest(q, k, v, selection, *, softmax_scale):
    block = selection.block_size
    return attend(
        q, k, v, selection, softmax_scale,
        lambda ids, p, n: tokens(block, [b for b in ids if b >= 0], p + 1),
    )  # fmt: skip


def padding_is_block_0(q, k, v, selection, *, softmax_scale):
    block = selection.block_size
    return attend(
        q, k, v, selection, softmax_scale,
        lambda ids, p, n: tokens(block, [max(b, 0) for b in ids], p + 1),
    )  # fmt: skip


def first_id_is_masked(q, k, v, selection, *, softmax_scale):
    """Takes the first id as the own block, and masks no token of the others."""
    block = selection.block_size

    def read(ids, p, n):
        first, *rest = [b for b in ids if b >= 0]
        return tokens(block, [first], p + 1) + tokens(block, rest, n)

    return attend(q, k, v, selection, softmax_scale, read)


def heads_interleaved(q, k, v, selection, *, softmax_scale):
    """Query head h reads key head h % Hkv."""
    block = selection.block_size
    return attend(
        q, k, v, selection, softmax_scale,
        lambda ids, p, n: tokens(block, [b for b in ids if b >= 0], p + 1), lambda h, group: h,
    )  # fmt: skip


def newest_token_missing(q, k, v, selection, *, softmax_scale):
    """Uses the length of the step before."""
    block = selection.block_size
    return attend(
        q, k, v, selection, softmax_scale,
        lambda ids, p, n: tokens(block, [b for b in ids if b >= 0], min(p + 1, n - 1)) or [p],
    )  # fmt: skip


def tail_read_in_full(q, k, v, selection, *, softmax_scale):
    """Reads the block of a sequence's last token to its end, with the tokens behind it."""
    block = selection.block_size

    def read(ids, p, n):
        valid = [b for b in ids if b >= 0]
        return tokens(block, valid, p + 1 if p + 1 < n else (p // block + 1) * block)

    return attend(q, k, v, selection, softmax_scale, read)
