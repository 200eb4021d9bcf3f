"""The convention of this project: functions with the arguments of msa.select and others."""

from __future__ import annotations

from msa.config import MSAConfig
from msa.conformance.foreign.arguments import borders, output_parts
from msa.conformance.foreign.bad_target import check_result
from msa.conformance.foreign.signature import Convention, Function, Signature
from msa.ir import Array, Selection, Sequences


def msa_select(target: Function) -> Function:
    """Adapt a function like msa.select."""

    def ids(q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig) -> Array:
        cu_q, cu_k = borders(q_idx, sequences)
        found = target(q_idx, k_idx, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config)
        found = found.indices if isinstance(found, Selection) else found
        shape = (*q_idx.shape[:2], config.top_k)
        check_result("indices", found, "Tq Hkv k", shape, "integer")
        return found

    return ids


def msa_sparse_attention(target: Function) -> Function:
    """Adapt a function like msa.sparse_attention."""

    def attend(
        q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> tuple[Array, Array | None]:
        return output_parts(target(q, k, v, selection, softmax_scale=scale), q, v)[:2]

    return attend


def msa_attention(target: Function) -> Function:
    """Adapt a function like msa.attention."""

    def attend(
        q: Array, k: Array, v: Array, q_idx: Array, k_idx: Array,
        sequences: Sequences, config: MSAConfig,
    ) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
        cu_q, cu_k = borders(q, sequences)
        found = target(q, k, v, q_idx, k_idx, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config)
        return output_parts(found, q, v)

    return attend


MSA = Convention(
    "msa",
    {
        "select": Signature(
            msa_select,
            "q_idx [Tq, Hkv, Di], k_idx [Tk, Di], *, cu_seqlens_q, cu_seqlens_k, config",
            "ids [Tq, Hkv, k], or a Selection",
        ),
        "sparse_attention": Signature(
            msa_sparse_attention,
            "q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], selection, *, softmax_scale",
            "out [Tq, Hq, Dv], (out, lse [Tq, Hq]) or an Output",
        ),
        "attention": Signature(
            msa_attention,
            "q, k, v, q_idx, k_idx, *, cu_seqlens_q, cu_seqlens_k, config",
            "out, (out, lse) or an Output",
        ),
    },
    order="ascending",
)
