"""The parts of `msa bench integrations`.

operators: one layer's attention, its training step and a decode step, by the public function, by
    the operator, by the operator in a module compiled whole, and in a CUDA graph. A captured graph
    is replayed on inputs that it was not captured with.
lengths: a model of four layers with the attention of MiniMax-M3 and small MLPs, in bfloat16, by
    transformers' eager and sdpa, by "msa" and by enable(); time and memory of one forward pass,
    until it does not fit. Before that, in float32, all four give the same hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import msa
import msa.ops
from benchmarks.cases import CONFIG, make_inputs
from benchmarks.checks import Wrong
from benchmarks.decode_stages import make_cache
from benchmarks.timing import one_run, timed
from msa.ir import Sequences

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
CHECKED = 4096
BOUND = 1e-3
"""Largest error of a hidden state in float32, relative to the largest entry of all."""
FLIPPED = 0.02
"""The share of tokens that may be off by more: where a score is nearly tied, rounding decides, and
later layers read what it decided."""
TOKENS = 8192
Call = Callable[..., tuple[Tensor, ...]]


# -- operators ------------------------------------------------------------------------------------
def operators() -> list[dict[str, Any]]:
    """Time three calls, each in four ways."""
    x = make_inputs(Sequences.one(TOKENS, TOKENS))
    tensors = (x.q, x.k, x.v, x.q_idx, x.k_idx)
    torch.manual_seed(0)
    others = tuple(torch.randn_like(t) for t in tensors)
    cache = make_cache(8, 131072, seed=0)
    q, q_idx = (torch.randn(8, 1, h, 128, device="cuda").bfloat16() for h in (64, 4))
    others_q = tuple(torch.randn_like(t) for t in (q, q_idx))

    def decode(q: Tensor, q_idx: Tensor) -> tuple[Tensor, ...]:
        output = msa.decode(q, q_idx, cache, config=CONFIG)
        return output.out, output.lse

    def decode_operator(q: Tensor, q_idx: Tensor) -> tuple[Tensor, ...]:
        return msa.ops.decode(q, q_idx, cache, CONFIG)

    rows = [
        in_four_ways("attention, 8K tokens", attention, attention_operator, tensors, others),
        in_four_ways(
            "training step, 8K tokens",
            with_loss,
            with_loss_operator,
            tensors,
            others,
            training_step,
        ),
        in_four_ways("decode, 8 x 128K tokens", decode, decode_operator, (q, q_idx), others_q),
    ]
    captured, static = capture(decode_operator, (q, q_idx))
    cache.lengths.sub_(1000)  # in place: a graph reads lengths when it is replayed
    check_equal("decode, captured, other lengths", captured(), decode(*static))
    return rows


def attention(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Call the public function."""
    output = msa.attention(*tensors, config=CONFIG)
    assert output.selection is not None
    return output.out, output.lse, output.selection.indices


def attention_operator(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Call the operator."""
    return msa.ops.attention(*tensors, config=CONFIG)[:3]


def with_loss(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute output and alignment loss with the public function."""
    output = msa.attention(*tensors, config=CONFIG, align=True)
    assert output.kl is not None
    return output.out, output.kl


def with_loss_operator(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute the same with operators."""
    out, _, _, kl = msa.ops.attention(*tensors, config=CONFIG, align=True)
    assert kl is not None
    return out, kl


def training_step(forward: Call) -> Call:
    """Compute all five gradients after a forward that gives output and loss."""

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, kl = forward(*leaves)
        return torch.autograd.grad([out, kl], leaves, [out.detach(), torch.ones_like(kl)])

    return step


def in_four_ways(
    name: str, function: Call, operator: Call, tensors: tuple[Tensor, ...],
    others: tuple[Tensor, ...], around: Callable[[Call], Call] = lambda call: call,
) -> dict[str, Any]:  # fmt: skip
    """Each as it is, without the help of graphs, and captured; results equal to the bit.

    `around` is put around the function, the operator, and the operator compiled.
    """
    compiled = torch.compile(operator, fullgraph=True)
    calls = {"function": function, "operator": operator, "compiled": compiled}
    calls = {way: around(call) for way, call in calls.items()}
    wanted = calls["function"](*tensors)
    for way, call in calls.items():
        check_equal(f"{name}, {way}", call(*tensors), wanted)
    captured, static = capture(calls["operator"], tensors)
    for into, other in zip(static, others):
        into.copy_(other)
    check_equal(f"{name}, captured", captured(), calls["function"](*others))
    times = {w: timed(lambda call=call: call(*tensors), graph=False) for w, call in calls.items()}
    return {"name": name, **times, "captured": timed(captured, graph=False)}


def capture(operator: Call, tensors: tuple[Tensor, ...]) -> tuple[Call, tuple[Tensor, ...]]:
    """Capture a call; return a function that replays it, and the tensors that the graph reads."""
    static = tuple(t.clone() for t in tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up: tables are made, kernels compiled
        for _ in range(2):
            operator(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = operator(*static)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay, static


def check_equal(name: str, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Compare results bit for bit: the kernels and their order are the same (R19)."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if not torch.equal(a, b):
            off = (a.double() - b.double()).abs().max().item()
            raise Wrong(f"{name}: result {i} is off by {off:.2g}")


# -- Hugging Face ---------------------------------------------------------------------------------
def make_model(dtype: torch.dtype, device: str = "cuda", **sizes: Any) -> Any:
    """Build four layers with MiniMax-M3's attention: 64 heads of 128, 4 groups, k = 16."""
    from transformers import MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "dense_intermediate_size": 2048,
        "layer_types": ["minimax_m3_sparse"] * 4, "mlp_layer_types": ["dense"] * 4,
        "rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2**20,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**shape | sizes))
    return model.to(dtype).eval()


def set_eager(model: Any) -> None:
    """Use transformers' eager attention, which builds all scores, masks and probabilities."""
    model.set_attn_implementation("eager")


def set_sdpa(model: Any) -> None:
    """Use transformers' sdpa: a full mask, and torch's attention."""
    model.set_attn_implementation("sdpa")


def set_msa(model: Any) -> None:
    """Use `register`: transformers selects, and this project attends."""
    from msa.integrations.transformers import register

    register()
    model.set_attn_implementation("msa")


def set_enabled(model: Any) -> None:
    """Use `enable`: this project selects and attends."""
    from msa.integrations.transformers import enable

    enable(model)


WAYS: dict[str, Callable[[Any], None]] = {
    "eager": set_eager,
    "sdpa": set_sdpa,
    "msa": set_msa,
    "enabled": set_enabled,  # last: it stays until another implementation is set
}


def lengths() -> dict[str, Any]:
    """Check all ways, then run each way from length to length until it no longer fits."""
    model = make_model(torch.float32)
    found = {"errors": check_ways(model, make_ids(CHECKED)), "ways": {}}
    del model
    torch.cuda.empty_cache()
    model = make_model(torch.bfloat16)
    for name, change in WAYS.items():
        change(model)
        found["ways"][name] = walk(model, LENGTHS)
    return found


def make_ids(n: int, device: str = "cuda") -> Tensor:
    """Draw random tokens [1, n]."""
    random = torch.Generator().manual_seed(n)
    return torch.randint(3, 1024, (1, n), generator=random).to(device)


@torch.no_grad()
def check_ways(model: Any, ids: Tensor) -> dict[str, Any]:
    """Compare the hidden states of all ways with those of eager attention."""
    set_eager(model)
    wanted = model.model(ids, use_cache=False).last_hidden_state
    errors = {}
    for name, change in WAYS.items():
        change(model)
        found = model.model(ids, use_cache=False).last_hidden_state
        off = (found - wanted).abs().amax(-1) / wanted.abs().max()
        flipped = (off > BOUND).double().mean().item()
        if not flipped <= FLIPPED or not bool(found.isfinite().all()):
            raise Wrong(f"{name}: {flipped:.1%} of the tokens are off by more than {BOUND:g}")
        errors[name] = {"median": off.median().item(), "flipped": flipped}
    return errors


@torch.no_grad()
def walk(model: Any, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure time and peak memory (beside the model) by length, until a pass no longer fits."""
    rows: list[dict[str, Any]] = []
    for n in lengths:
        try:
            rows.append({"n": n} | forward_pass(model, n))
        except torch.cuda.OutOfMemoryError:
            rows.append({"n": n, "ends": "out of memory"})
            torch.cuda.empty_cache()
            break
    return rows


def forward_pass(model: Any, n: int) -> dict[str, Any]:
    """Time a forward pass of n tokens that gives the logits of the last one; no cache."""
    ids = make_ids(n)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()

    def call() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    one_run(call)  # kernels compiled, tables made
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    return {"time": timed(call, graph=False), "gib": peak / 2**30}


PARTS: dict[str, Callable[[], Any]] = {"operators": operators, "lengths": lengths}
