"""The calls that `benchmarks.compile_target` turns into compilations: each kernel of the backend.

The shapes are those of MiniMax-M3: 64 heads in 4 groups, blocks of 128 keys, 16 blocks per query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.compile_shapes import SHAPES as NAMED
from msa import triton_impl as impl
from msa.config import MSAConfig
from msa.ir import PagedKV, Selection, Sequences
from msa.triton_impl.attention import LoopOrder, attend_selection
from msa.triton_impl.selection import select_fused

TOKENS, HEADS, GROUPS, BLOCK, TOP_K = 2048, 64, 4, 128, 16
CONFIG = MSAConfig(block_size=BLOCK, top_k=TOP_K)
SEQUENCES = Sequences.one(TOKENS, TOKENS)
EIGHT = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """The data type and head size of a run; the tiles of the tables depend on both."""

    dtype: torch.dtype
    dim: int


SHAPES = {name: Shape(getattr(torch, dtype), dim) for name, (dtype, dim) in NAMED.items()}


@dataclass(frozen=True)
class Case:
    """One call, and what it needs of a GPU."""

    name: str
    call: Callable[[Shape], object]
    eight: bool = False
    """Numbers of 8 bits."""
    once: bool = False
    """Its kernels depend on no tile, so one shape is enough."""


def full(shape: Shape, *sizes: int, grad: bool = False) -> Tensor:
    """A tensor of halves."""
    return torch.full(sizes, 0.5, dtype=shape.dtype).requires_grad_(grad)


def main_branch(shape: Shape, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v."""
    q, k, v = (
        full(shape, TOKENS, heads, shape.dim, grad=grad) for heads in (HEADS, GROUPS, GROUPS)
    )  # fmt: skip
    return q, k, v


def index_branch(shape: Shape, grad: bool = False) -> tuple[Tensor, Tensor]:
    """q_idx, k_idx."""
    q_idx = full(shape, TOKENS, GROUPS, shape.dim, grad=grad)
    return q_idx, full(shape, TOKENS, shape.dim, grad=grad)


def chosen() -> Selection:
    """Each query keeps its own block and the ones before it."""
    own = torch.arange(TOKENS, dtype=torch.int32)[:, None, None] // BLOCK
    ids = own - torch.arange(TOP_K, dtype=torch.int32).flip(0)
    ids = torch.where(ids < 0, 2**30, ids).sort(-1).values
    ids = torch.where(ids == 2**30, -1, ids).int().expand(TOKENS, GROUPS, TOP_K).contiguous()
    return Selection(ids, SEQUENCES, BLOCK)


def select(index_dtype: str | None) -> Callable[[Shape], object]:
    """The fused selection."""
    return lambda x: select_fused(*index_branch(x), SEQUENCES, CONFIG, index_dtype)


def select_in_steps(x: Shape) -> object:
    """Scores of blocks, then their selection."""
    return impl.select_blocks(impl.score_blocks(*index_branch(x), SEQUENCES, CONFIG), CONFIG)


def attend(order: LoopOrder) -> Callable[[Shape], object]:
    """Attention over a selection, in one loop order."""
    return lambda x: attend_selection(*main_branch(x), chosen(), x.dim**-0.5, order)


def differentiate(x: Shape) -> None:
    """Gradients of the attention."""
    q, k, v = main_branch(x, grad=True)
    found = attend_selection(q, k, v, chosen(), x.dim**-0.5, "union")
    (found.out.float().sum() + found.lse.sum()).backward()


def align(x: Shape) -> None:
    """The alignment loss and its gradients."""
    q, k, _ = main_branch(x)
    impl.align_index(
        q, k, *index_branch(x, grad=True), chosen(), SEQUENCES, CONFIG
    ).backward()  # fmt: skip


def cache(x: Shape, batch: int, eight: bool, eight_index: bool) -> PagedKV:
    """A cache of 64 pages, some of them in 8 bits."""
    pages, table = 64, torch.zeros((batch, 1024), dtype=torch.int32)
    kind, kind_index = (EIGHT if e else x.dtype for e in (eight, eight_index))
    k, v = (torch.zeros((pages, BLOCK, GROUPS, x.dim), dtype=kind) for _ in range(2))
    k_idx = torch.zeros((pages, BLOCK, x.dim), dtype=kind_index)
    scale = torch.ones(pages, GROUPS) if eight else None
    index_scale = torch.ones(pages) if eight_index else None
    lengths = torch.full((batch,), 5000, dtype=torch.int32)
    return PagedKV(k, v, k_idx, table, lengths, scale, scale, index_scale)


def decode(
    batch: int, n: int, eight: bool = False, eight_index: bool = False
) -> Callable[[Shape], object]:
    """One step of decoding."""
    return lambda x: impl.decode_step(
        full(x, batch, n, HEADS, x.dim), full(x, batch, n, GROUPS, x.dim),
        cache(x, batch, eight, eight_index), CONFIG,
    )  # fmt: skip


def prefill(eight: bool) -> Callable[[Shape], object]:
    """A chunk of a prompt over pages."""
    chunk = Sequences((0, TOKENS), (0, 5000))
    return lambda x: impl.prefill_chunk(
        full(x, TOKENS, HEADS, x.dim), full(x, TOKENS, GROUPS, x.dim), cache(x, 1, eight, eight),
        chunk, CONFIG, index_dtype="fp8_e4m3" if eight else None,
    )  # fmt: skip


def append(eight: bool) -> Callable[[Shape], object]:
    """Write one new token of each sequence into its pages."""
    return lambda x: impl.append_tokens(
        cache(x, 4, eight, eight), full(x, 4, 1, GROUPS, x.dim), full(x, 4, 1, GROUPS, x.dim),
        full(x, 4, 1, x.dim),
    )  # fmt: skip


CASES = (
    Case("select", select(None)),
    Case("select, 8 bits", select("fp8_e4m3"), eight=True),
    Case("select in steps", select_in_steps),
    Case("attend, auto", attend("auto")),
    Case("attend, kv_outer", attend("kv_outer")),
    Case("gradients", differentiate),
    Case("alignment loss", align),
    Case("decode, 1 sequence", decode(1, 1)),
    Case("decode, 32 sequences", decode(32, 1), once=True),
    Case("decode, 4 new tokens", decode(4, 4), once=True),
    Case("decode, index in 8 bits", decode(1, 1, False, True), eight=True, once=True),
    Case("decode, all in 8 bits", decode(1, 1, True, True), eight=True, once=True),
    Case("prefill", prefill(False)),
    Case("prefill, 8 bits", prefill(True), eight=True, once=True),
    Case("append", append(False), once=True),
    Case("append, 8 bits", append(True), eight=True, once=True),
)
