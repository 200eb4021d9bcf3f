"""The convention of the official MSA kernels: packed queries, paged keys and values."""

from __future__ import annotations

from msa.config import MSAConfig
from msa.conformance.foreign.arguments import borders, head_first, output_parts
from msa.conformance.foreign.pages_and_rows import in_pages
from msa.conformance.foreign.signature import Convention, Function, Signature
from msa.integrations import layouts
from msa.ir import Array, Selection, Sequences


def official_select(target: Function) -> Function:
    """Adapt a function like the paged prefill indexer, with plan and run in one call."""

    def ids(q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig) -> Array:
        pages, table = in_pages(k_idx, sequences, config.block_size)
        cu_q, cu_k = borders(q_idx, sequences)
        found = target(q_idx, pages[:, None], table, cu_q, cu_k, top_k=config.top_k)
        return head_first("indices", found, q_idx, config)

    return ids


def official_sparse_attention(target: Function) -> Function:
    """Adapt a function like the paged sparse prefill, with plan and run in one call."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, Array | None]:
        block = selection.block_size
        (k_pages, table), (v_pages, _) = (in_pages(x, selection.sequences, block) for x in (k, v))
        found = target(
            q, k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2), layouts.to_official(selection),
            table, *borders(q, selection.sequences), softmax_scale=scale,
        )  # fmt: skip
        return output_parts(found, q, v)[:2]

    return attend


OFFICIAL = Convention(
    "official",
    {
        "select": Signature(
            official_select,
            "q [Tq, Hkv, Di], paged_k_cache [pages, 1, Bk, Di], page_table [batch, any], "
            "cu_seqlens_q, cu_seqlens_k, *, top_k",
            "indices [Hkv, Tq, k]",
        ),
        "sparse_attention": Signature(
            official_sparse_attention,
            "q [Tq, Hq, D], k_cache [pages, Hkv, Bk, D], v_cache [pages, Hkv, Bk, Dv], "
            "indices [Hkv, Tq, k], page_table, cu_seqlens_q, cu_seqlens_k, *, softmax_scale",
            "out [Tq, Hq, Dv] or (out, lse [Tq, Hq])",
        ),
    },
    order="ascending: the own block is the last id",
    sinks=False,
    more_local=False,
)
