"""Whose functions can be tried: what they are given, what they give, and the table of it.

>>> CONVENTIONS["vllm"].order
'own block first'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from msa.conformance import adapters
from msa.conformance.adapters import Function

Kind = Literal["select", "sparse_attention", "attention"]


@dataclass(frozen=True)
class Call:
    """What one function is given by keyword and position, and what it gives."""

    adapter: Callable[[Function], Function]
    takes: str
    gives: str

    @property
    def signature(self) -> str:
        """On one line."""
        return f"f({self.takes}) -> {self.gives}"


@dataclass(frozen=True)
class Convention:
    """What a project's functions look like, and what can be said in their words."""

    name: str
    calls: dict[Kind, Call]
    order: str
    """Of the ids that go into its attention."""
    sinks: bool = True
    """Whether first blocks can be asked for."""
    more_local: bool = True
    """Whether more than the own block can be asked for."""
    full_rows: bool = False
    """Whether its attention takes an id at each of the first min(k, visible blocks) places."""
    left_padding: bool = False
    """Whether rows may start with padding."""


MSA = Convention(
    "msa",
    {
        "select": Call(
            adapters.msa_select,
            "q_idx [Tq, Hkv, Di], k_idx [Tk, Di], *, cu_seqlens_q, cu_seqlens_k, config",
            "ids [Tq, Hkv, k], or a Selection",
        ),
        "sparse_attention": Call(
            adapters.msa_sparse_attention,
            "q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], selection, *, softmax_scale",
            "out [Tq, Hq, Dv], (out, lse [Tq, Hq]) or an Output",
        ),
        "attention": Call(
            adapters.msa_attention,
            "q, k, v, q_idx, k_idx, *, cu_seqlens_q, cu_seqlens_k, config",
            "out, (out, lse) or an Output",
        ),
    },
    order="ascending",
)
TRANSFORMERS = Convention(
    "transformers",
    {
        "select": Call(
            adapters.transformers_select,
            "q_idx [B, Hkv, T, Di], k_idx [B, 1, n_k, Di], position_ids [B, T], "
            "attention_mask [B, n_k], *, block_size, topk_blocks, local_blocks",
            "block_indices [B, Hkv, T, at most k]",
        ),
        "sparse_attention": Call(
            adapters.transformers_sparse_attention,
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
VLLM = Convention(
    "vllm",
    {
        "select": Call(
            adapters.vllm_select,
            "idx_q [Tq, Hkv, Di], index_kv_cache [pages, Bk, Di], block_table [batch, any], "
            "cu_seqlens_q, seq_lens [batch], prefix_lens [batch], *, "
            "topk, init_blocks, local_blocks",
            "topk_idx [Hkv, Tq, k]",
        ),
        "sparse_attention": Call(
            adapters.vllm_sparse_attention,
            "q [Tq, Hq, D], kv_cache [pages, Hkv, Bk, 2 D], topk_idx [Hkv, Tq, k], block_table, "
            "cu_seqlens_q, seq_lens, prefix_lens, *, sm_scale",
            "out [Tq, Hq, D]",
        ),
    },
    order="own block first",
    full_rows=True,
)
OFFICIAL = Convention(
    "official",
    {
        "select": Call(
            adapters.official_select,
            "q [Tq, Hkv, Di], paged_k_cache [pages, 1, Bk, Di], page_table [batch, any], "
            "cu_seqlens_q, cu_seqlens_k, *, top_k",
            "indices [Hkv, Tq, k]",
        ),
        "sparse_attention": Call(
            adapters.official_sparse_attention,
            "q [Tq, Hq, D], k_cache [pages, Hkv, Bk, D], v_cache [pages, Hkv, Bk, Dv], "
            "indices [Hkv, Tq, k], page_table, cu_seqlens_q, cu_seqlens_k, *, softmax_scale",
            "out [Tq, Hq, Dv] or (out, lse [Tq, Hq])",
        ),
    },
    order="ascending: the own block is the last id",
    sinks=False,
    more_local=False,
)
CONVENTIONS = {c.name: c for c in (MSA, TRANSFORMERS, VLLM, OFFICIAL)}


def table() -> str:
    """All conventions in Markdown: a row for each function.

    >>> print(table().partition(" | it")[0])
    | convention | kind
    """
    lines = ["| convention | kind | it is given | it gives | ids |", "|---|---|---|---|---|"]
    for convention in CONVENTIONS.values():
        for kind, call in convention.calls.items():
            order = "any order" if kind == "select" else convention.order
            cells = f"`{call.takes}` | `{call.gives}` | {order}"
            lines.append(f"| `{convention.name}` | `{kind}` | {cells} |")
    return "\n".join(lines)
