"""The convention of vLLM's MiniMax-M3 kernels: packed queries, paged keys and values."""

from __future__ import annotations

from msa.config import MSAConfig
from msa.conformance.foreign.arguments import borders, first_of, head_first, lengths
from msa.conformance.foreign.bad_target import check_result
from msa.conformance.foreign.pages_and_rows import in_pages
from msa.conformance.foreign.signature import Convention, Function, Signature
from msa.integrations import arrays, layouts
from msa.ir import Array, Selection, Sequences


def vllm_select(target: Function) -> Function:
    """Adapt a function that does minimax_m3_index_score, then minimax_m3_index_topk."""

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
    """Adapt a function like minimax_m3_sparse_attn that returns `output`."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, None]:
        sequences, width = selection.sequences, max(k.shape[-1], v.shape[-1])
        # K and V share a page, so they need one head size
        both = arrays.join([wider(k, width), wider(v, width)], -1)
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
    """Fill the last dim up with zeros. They change no product; their columns are dropped."""
    return arrays.widen(array, width, 0)


VLLM = Convention(
    "vllm",
    {
        "select": Signature(
            vllm_select,
            "idx_q [Tq, Hkv, Di], index_kv_cache [pages, Bk, Di], block_table [batch, any], "
            "cu_seqlens_q, seq_lens [batch], prefix_lens [batch], *, "
            "topk, init_blocks, local_blocks",
            "topk_idx [Hkv, Tq, k]",
        ),
        "sparse_attention": Signature(
            vllm_sparse_attention,
            "q [Tq, Hq, D], kv_cache [pages, Hkv, Bk, 2 D], topk_idx [Hkv, Tq, k], block_table, "
            "cu_seqlens_q, seq_lens, prefix_lens, *, sm_scale",
            "out [Tq, Hq, D]",
        ),
    },
    order="own block first",
    full_rows=True,
)
