"""The part `sglang` of `msa bench serving`: SGLang's functions with and without our hooks.

SGLang's files run behind stubs (`sglang_files.py`). Its top-k of a decode, which another library
compiles, is replaced by its own top-k in Triton, so its times of decodes are not its best.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import engine_files, sglang_files
from benchmarks.checks import BOUND, Wrong
from benchmarks.sglang_files import PAGE, Engine, Slots
from benchmarks.timing import timed

HEADS, GROUPS, DIM, TOP_K = 64, 4, 128, 16


@contextmanager
def sglang() -> Iterator[Engine]:
    """SGLang's files from the folder of the environment variable."""
    with tempfile.TemporaryDirectory() as into:
        folder = os.environ[engine_files.VARIABLE]
        os.environ["MSA_WARM_UP"] = "0"  # each step is run before it is timed
        unpacked = engine_files.unpack("sglang", folder, Path(into))
        with sglang_files.loaded(unpacked, TOP_K) as engine:
            yield engine


def make_slots(lengths: list[int], eight: bool, seed: int = 0) -> Slots:
    """Slots in pages of random order for these requests, whose rows are not in order."""
    random = torch.Generator("cuda").manual_seed(seed)
    like: dict[str, Any] = {"device": "cuda", "generator": random}
    blocks = [-(-n // PAGE) for n in lengths]
    pages = sum(blocks) + 1
    order = (torch.randperm(pages - 1, **like) + 1).int() * PAGE
    width = PAGE * (max(blocks) + 2)
    req_to_token = torch.full((len(lengths) + 3, width), PAGE, dtype=torch.int32, device="cuda")
    rows = torch.randperm(len(lengths) + 3, **like)[: len(lengths)]
    place, first = torch.arange(PAGE, dtype=torch.int32, device="cuda"), 0
    for row, count in zip(rows.tolist(), blocks):
        own = order[first : first + count]
        req_to_token[row, : count * PAGE] = (own[:, None] + place).flatten()
        first += count

    def normal(*shape: int) -> Tensor:
        made = torch.randn(shape, dtype=torch.bfloat16, **like)
        return made.to(torch.float8_e4m3fn) if eight else made

    k, v = (normal(pages * PAGE, GROUPS, DIM) for _ in range(2))
    return Slots(k, v, normal(pages * PAGE, 1, DIM), req_to_token, rows, lengths)


def queries(tokens: int) -> tuple[Tensor, Tensor]:
    """Queries and index queries in bfloat16."""
    random = torch.Generator("cuda").manual_seed(5)
    made = [
        torch.randn(tokens, heads, DIM, device="cuda", generator=random)
        for heads in (HEADS, GROUPS)
    ]
    return made[0].bfloat16(), made[1].bfloat16()


@contextmanager
def hooks(engine: Engine) -> Iterator[None]:
    """SGLang's functions wrapped as its registry wraps them."""
    from msa.integrations import sglang, sglang_layers

    before = {name: getattr(engine.functions, name) for name in sglang.WRAPPED}
    for name, ours in sglang.WRAPPED.items():
        hook, original = getattr(sglang_layers, ours), before[name]
        setattr(engine.functions, name, wrapped(hook, original))
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(engine.functions, name, original)


def wrapped(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A hook around a function."""
    return partial(hook, original)


def compare(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Outputs where both selected the same blocks, and how often they did; ids [T, Hkv, k]."""
    same = (ours[1].sort(-1).values == theirs[1].sort(-1).values).all(-1)  # [T, Hkv]
    out, want = (x[0].float().unflatten(1, (GROUPS, -1)) for x in (ours, theirs))
    error = (out - want).flatten(2).norm(dim=-1) / want.flatten(2).norm(dim=-1)
    worst, share = float(error[same].max()), float(same.float().mean())
    if not (worst < BOUND and share > 0.99):
        raise Wrong(f"{share:.2%} of the selections equal, outputs off by {worst:.3f}")
    return {"same": share, "error": worst}


def race_decode(engine: Engine, lengths: list[int], eight: bool) -> dict[str, Any]:
    """Decodes: compared, captured with hooks and replayed with grown lengths, timed in turns."""
    slots, (q, q_idx) = make_slots(lengths, eight), queries(len(lengths))
    ids = torch.empty(GROUPS, len(lengths), TOP_K, dtype=torch.int32, device="cuda")
    now = torch.tensor([n - 1 for n in lengths], device="cuda")  # int64, as in SGLang

    def call() -> tuple[Tensor, Tensor]:
        out = engine.decode(slots, q, q_idx, topk_out=ids, seq_lens=now, longest=max(lengths))
        return out, ids.transpose(0, 1)

    def copied() -> tuple[Tensor, Tensor]:
        out, chosen = call()
        return out.clone(), chosen.clone()

    theirs = copied()
    with hooks(engine):
        found: dict[str, Any] = compare(copied(), theirs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        now += 1
        graph.replay()
        replayed = captured[0].clone()
        if not torch.equal(replayed, copied()[0]):
            raise Wrong("a replayed graph differs from a call")
    for _ in range(2):
        found["sglang"] = faster(found.get("sglang"), timed(call))
        with hooks(engine):
            found["msa"] = faster(found.get("msa"), timed(call))
    return found | {"times": found["sglang"]["ms"] / found["msa"]["ms"]}


def race_prefill(engine: Engine, lengths: list[int], new: list[int], eight: bool) -> dict[str, Any]:
    """Prefills: compared, then timed in turns, without a graph."""
    slots, (q, q_idx) = make_slots(lengths, eight), queries(sum(new))

    def call() -> tuple[Tensor, Tensor]:
        out, ids = engine.prefill(slots, new, q, q_idx)
        return out, ids.transpose(0, 1)

    theirs = call()
    with hooks(engine):
        found: dict[str, Any] = compare(call(), theirs)
    for _ in range(2):
        found["sglang"] = faster(found.get("sglang"), timed(call, graph=False))
        with hooks(engine):
            found["msa"] = faster(found.get("msa"), timed(call, graph=False))
    return found | {"times": found["sglang"]["ms"] / found["msa"]["ms"]}


def faster(known: dict[str, float] | None, new: dict[str, float]) -> dict[str, float]:
    """The better of two times."""
    return new if known is None or new["ms"] < known["ms"] else known


RUNS: dict[str, Callable[[Engine], dict[str, Any]]] = {
    "decode 8 x 128K, bf16": lambda e: race_decode(e, [131072] * 8, False),
    "decode 32 x 32K, bf16": lambda e: race_decode(e, [32768] * 32, False),
    "decode 32 x 32K, fp8": lambda e: race_decode(e, [32768] * 32, True),
    "chunks 8K of 32K and 1K of 70K, bf16": lambda e: race_prefill(
        e, [32768, 70000], [8192, 1024], False),
    "chunks 8K of 32K and 1K of 70K, fp8": lambda e: race_prefill(
        e, [32768, 70000], [8192, 1024], True),
    "drafts of 3 tokens, 8 x 32K, bf16": lambda e: race_prefill(e, [32768] * 8, [3] * 8, False),
}  # fmt: skip
SHORT = {name: run for name, run in RUNS.items() if "fp8" not in name or "decode" in name}


def measure() -> dict[str, Any]:
    """All runs."""
    with sglang() as engine:
        return {name: run(engine) for name, run in RUNS.items()}
