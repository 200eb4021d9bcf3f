"""msa.warm_up: compile the kernels of a server's shapes before the first request.

Triton compiles a kernel for each set of compile-time parameters that it meets, one to four seconds
each. Which ones a call needs depends on its batch: in decoding the number of programs that share a
row, in prefill the loop order and the number of candidates. So calls of all these kinds run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msa import api, checks
from msa.config import MSAConfig
from msa.ir import PagedKV

PROMPTS = (
    (1, 0), (17, 0), (700, 0), (700, 2048), (300, 16384), (8192, 0), (8192, 24576),
    (16, 65536), (1500, 65536), (8192, 65536), (16, 131072),
)  # fmt: skip
"""New tokens, and tokens before them: short and long, with few and with many readers of a block."""
EIGHT = ("kv", "k_idx")


@dataclass(frozen=True)
class ServingShapes:
    """The shapes of a server's calls of `msa.decode` and `msa.prefill` over one cache.

    >>> ServingShapes(heads=64, groups=4, most_sequences=64).columns
    8192
    """

    heads: int
    """Query heads on this device."""
    groups: int
    """Heads of keys and values on this device."""
    most_sequences: int
    """Sequences that decode at a time."""
    head_dim: int = 128
    index_dim: int = 128
    dtype: str = "bfloat16"
    """Of queries, and of pages that are not of 8 bits."""
    eight_bits: tuple[str, ...] = ()
    """Which pages are of float8_e4m3fn: "kv", "k_idx" or both."""
    new_tokens: tuple[int, ...] = (1,)
    """New tokens of a sequence that decodes: 1, and 1 + drafts where tokens are speculated."""
    columns: int = 8192
    """Columns of the page table: blocks of the longest sequence."""


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, which is the last.

    >>> powers(6)
    [1, 2, 4, 6]
    """
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def warm_up(shapes: ServingShapes, config: MSAConfig = MSAConfig(), device: Any = "cuda") -> int:
    """Compile every kernel that calls of these shapes need; how many calls were made for that.

    It takes a minute or two the first time, and seconds where Triton's cache on disk has the
    kernels. Arrays are taken to be contiguous: Triton compiles anew for a stride that is no
    multiple of 16, where here it is one. Serving engines with layouts of their own use
    `msa.serving.warm_up_layer`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    check_shapes(shapes)
    checks.check_type("config", config, MSAConfig)
    import torch

    like: dict[str, Any] = {"device": device, "dtype": getattr(torch, shapes.dtype)}
    room, made = shapes.columns * config.block_size, 0
    for batch in powers(shapes.most_sequences):
        cache = zero_cache(shapes, config.block_size, batch, max(shapes.new_tokens), device)
        for n in shapes.new_tokens:
            q = torch.zeros(batch, n, shapes.heads, shapes.head_dim, **like)
            q_idx = torch.zeros(batch, n, shapes.groups, shapes.index_dim, **like)
            api.decode(q, q_idx, cache, config=config, backend="triton")
            made += 1
    for new, before in PROMPTS:
        if new + before <= room:
            q = torch.zeros(new, shapes.heads, shapes.head_dim, **like)
            q_idx = torch.zeros(new, shapes.groups, shapes.index_dim, **like)
            cache = zero_cache(shapes, config.block_size, 1, new + before, device)
            api.prefill(q, q_idx, cache, config=config, backend="triton")
            made += 1
    return made


def zero_cache(shapes: ServingShapes, block: int, batch: int, length: int, device: Any) -> PagedKV:
    """A cache of one page, which all blocks of all sequences share; its numbers are 0."""
    import torch

    def pages(name: str, *dims: int) -> Any:
        made = torch.zeros(1, block, *dims, dtype=getattr(torch, shapes.dtype), device=device)
        return made.to(torch.float8_e4m3fn) if name in shapes.eight_bits else made

    def ones(name: str, *dims: int) -> Any:
        return torch.ones(1, *dims, device=device) if name in shapes.eight_bits else None

    k, v = (pages("kv", shapes.groups, shapes.head_dim) for _ in range(2))
    table = torch.zeros(batch, shapes.columns, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    return PagedKV(
        k, v, pages("k_idx", shapes.index_dim), table, lengths, ones("kv", shapes.groups),
        ones("kv", shapes.groups), ones("k_idx"),
    )  # fmt: skip


def check_shapes(shapes: Any) -> None:
    """Sizes are positive, dtypes and names of pages are known."""
    checks.check_type("shapes", shapes, ServingShapes)
    for name in ("heads", "groups", "most_sequences", "head_dim", "index_dim", "columns"):
        checks.check_count(f"shapes.{name}", getattr(shapes, name), 1)
    for n in shapes.new_tokens:
        checks.check_count("shapes.new_tokens", n, 1)
    checks.check_heads(shapes.heads, shapes.groups)
    if shapes.dtype not in checks.KERNEL_DTYPES:
        wanted = checks.either(checks.KERNEL_DTYPES)
        raise ValueError(f"shapes.dtype must be {wanted}, got {shapes.dtype!r}")
    unknown = [name for name in shapes.eight_bits if name not in EIGHT]
    if unknown:
        raise ValueError(f"shapes.eight_bits must hold {checks.either(EIGHT)}, got {unknown[0]!r}")
