"""torch.ops.msa: correct operators, equal to the public functions, one call in compiled graphs."""

from __future__ import annotations

import pytest
import torch
from operator_calls import (
    BORDERS,
    CONFIG,
    NAMES,
    OPS,
    Layer,
    assert_all_close,
    decode_args,
    loss_and_gradients,
    make,
    numbers,
)
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import msa
import msa.ops
from msa.ops import kernels

ON_THE_CPU = ["torch"] if torch.cuda.is_available() else ["torch", "triton"]
"""With a GPU, kernels are not interpreted; test_ops_gpu.py tests triton there."""


def permuted(x):
    """The same numbers with another order in memory: [H, T, D] read as [T, H, D]."""
    return x.detach().transpose(0, -2).contiguous().transpose(0, -2).requires_grad_(x.requires_grad)


# -- correct as operators -------------------------------------------------------------------------
@pytest.mark.parametrize("change", [lambda x: x, permuted], ids=["packed", "permuted"])
def test_opcheck(change):
    q, k, v, q_idx, k_idx = (change(x) for x in make(grad=True))
    ids = OPS.select_blocks(q_idx, k_idx, *BORDERS, *numbers())
    opcheck(OPS.select_blocks, (q_idx, k_idx, *BORDERS, *numbers()))
    opcheck(OPS.sparse_attention, (q, k, v, ids, *BORDERS, 8))
    opcheck(OPS.attention, (q, k, v, q_idx, k_idx, *BORDERS, *numbers()))
    main = (q, k, q_idx, k_idx)
    opcheck(OPS.align_index, (*main, ids, None, *BORDERS, 8, True))


def test_opcheck_without_gradients():
    q, k, v, q_idx, k_idx = make()
    out, lse, ids = OPS.attention(q, k, v, q_idx, k_idx, *BORDERS, *numbers())
    saved = q, k, v, out, lse, ids
    opcheck(OPS.sparse_attention_backward, (out, lse, *saved, *BORDERS, 8, 0.25))
    opcheck(OPS.align_index, (q, k, q_idx, k_idx, None, None, *BORDERS, 8, False))
    opcheck(OPS.align_index, (q, k, q_idx, k_idx, ids, lse, *BORDERS, 8, True))
    q, q_idx, c = decode_args()
    pages = c.k_pages, c.v_pages, c.k_idx_pages, c.page_table, c.lengths
    opcheck(OPS.decode, (q, q_idx, *pages, 2))
    opcheck(OPS.prefill, (q[:, 0], q_idx[:, 0], *pages, [0, 2, 2, 3], 2))


def test_gradcheck():
    tensors = make(torch.float64, 9, 9, grad=True)
    *_, ids = OPS.attention(*tensors, (0, 9), (0, 9), 2, 2)

    def sparse(q, k, v):
        return OPS.sparse_attention(q, k, v, ids, (0, 9), (0, 9), 2)

    def loss(q_idx, k_idx):
        args = (tensors[0].detach(), tensors[1].detach(), q_idx, k_idx, ids, None)
        return OPS.align_index(*args, (0, 9), (0, 9), 2, True)[0]

    assert torch.autograd.gradcheck(sparse, tensors[:3], fast_mode=True)
    assert torch.autograd.gradcheck(loss, tensors[3:], fast_mode=True)


# -- equal to the public functions ----------------------------------------------------------------
@pytest.mark.parametrize("backend", ON_THE_CPU)
@pytest.mark.parametrize("align", [False, True])
def test_attention_is_that_of_the_package(backend, align, monkeypatch):
    monkeypatch.setattr(kernels, "backend_of", lambda tensor: backend)
    config = msa.MSAConfig(block_size=16, top_k=2, index_scale=0.7, softmax_scale=0.3)
    tensors = make(grad=True)
    borders = dict(cu_seqlens_q=BORDERS[0], cu_seqlens_k=BORDERS[1])
    mine = msa.ops.attention(*tensors, **borders, config=config, align=align)
    theirs = msa.attention(*tensors, **borders, config=config, align=align, backend=backend)
    assert torch.equal(mine.indices, theirs.selection.indices)
    assert torch.equal(mine.out, theirs.out)
    assert torch.equal(mine.lse, theirs.lse)
    assert mine.kl is None if not align else torch.equal(mine.kl, theirs.kl)
    gradients = []
    for output in (mine, theirs):
        total = output.out.square().sum() + output.lse.cos().sum()
        total = total + 3 * output.kl if align else total
        gradients.append(torch.autograd.grad(total, tensors, materialize_grads=True))
    for name, a, b in zip(NAMES, *gradients):
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-6, atol=1e-9), name
        assert bool(a.any()) or (name in ("q_idx", "k_idx") and not align)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_the_other_functions_are_those_of_the_package(backend, monkeypatch):
    monkeypatch.setattr(kernels, "backend_of", lambda tensor: backend)
    config = msa.MSAConfig(block_size=16, top_k=2)
    q, k, v, q_idx, k_idx = make(lead=(2,), n_q=20, n_k=20)
    ids = msa.ops.select_blocks(q_idx, k_idx, config=config)
    chosen_by = msa.select(q_idx, k_idx, config=config, backend=backend)
    assert torch.equal(ids, chosen_by.indices)
    out, lse = msa.ops.sparse_attention(q, k, v, ids, block_size=16)
    output = msa.sparse_attention(q, k, v, chosen_by, backend=backend)
    assert torch.equal(out, output.out)
    assert torch.equal(lse, output.lse)
    for chosen, known in ((None, None), (ids, None), (ids, lse)):
        given = chosen_by if chosen is not None else None
        mine = msa.ops.align_index(q, k, q_idx, k_idx, chosen, lse=known, config=config)
        theirs = msa.align_index(
            q, k, q_idx, k_idx, given, lse=known, config=config, backend=backend
        )
        assert torch.equal(mine, theirs)


def test_decode_is_that_of_the_package():
    q, q_idx, cache = decode_args()
    out, lse = msa.ops.decode(q, q_idx, cache, CONFIG)
    output = msa.decode(q, q_idx, cache, config=CONFIG)
    assert torch.equal(out, output.out)
    assert torch.equal(lse, output.lse)


@pytest.mark.parametrize("borders", [None, (0, 1, 1, 3), torch.tensor([0, 2, 2, 3])])
def test_prefill_is_that_of_the_package(borders):
    q, q_idx, cache = decode_args()
    q, q_idx = (x[[0, 2, 2]] if borders is None else x[:, 0] for x in (q, q_idx))
    cache = msa.PagedKV(
        *(getattr(cache, f"{name}_pages") for name in ("k", "v", "k_idx")), cache.page_table,
        torch.tensor([20, 9, 13]) if borders is None else cache.lengths,
    )  # fmt: skip
    out, lse = msa.ops.prefill(q, q_idx, cache, borders, CONFIG)
    output = msa.prefill(q, q_idx, cache, cu_seqlens_q=borders, config=CONFIG)
    assert torch.equal(out, output.out) and out.shape == (*q.shape[:-1], 12)
    assert torch.equal(lse, output.lse)


def test_pages_of_8_bits():
    q, q_idx, cache = decode_args()
    small = [x.to(torch.float8_e4m3fn) for x in (cache.k_pages, cache.v_pages, cache.k_idx_pages)]
    scales = torch.full((6, 2), 0.5), torch.full((6, 2), 2.0), torch.full((6,), 3.0)
    cache = msa.PagedKV(*small, cache.page_table, cache.lengths, *scales)
    out, _ = msa.ops.decode(q, q_idx, cache, CONFIG)
    assert torch.equal(out, msa.decode(q, q_idx, cache, config=CONFIG).out)
    q, q_idx, borders = q[:, 0], q_idx[:, 0], [0, 2, 2, 3]
    out, _ = msa.ops.prefill(q, q_idx, cache, borders, CONFIG)
    assert torch.equal(out, msa.prefill(q, q_idx, cache, cu_seqlens_q=borders, config=CONFIG).out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype):
    tensors = make(dtype)
    out, lse, _, kl = msa.ops.attention(*tensors, *BORDERS, config=CONFIG, align=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.dtype, lse.dtype, kl.dtype) == (dtype, wide, wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_narrow_inputs(dtype):
    """They differ by a few roundings, because the operator keeps out in q's dtype."""
    tensors = make(dtype, grad=True)
    mine = msa.ops.attention(*tensors, *BORDERS, config=CONFIG).out
    theirs = msa.attention(
        *tensors, cu_seqlens_q=BORDERS[0], cu_seqlens_k=BORDERS[1], config=CONFIG
    ).out
    weight, bound = torch.randn(mine.shape), 4 * torch.finfo(dtype).eps
    for a, b in zip(*(torch.autograd.grad((x.float() * weight).sum(), tensors[:3])
                      for x in (mine, theirs)), strict=True):  # fmt: skip
        assert a.dtype == dtype
        assert (a.float() - b.float()).abs().max() <= bound * b.float().abs().max()


def test_two_losses_may_go_back_one_after_the_other():
    """The index branch is not in the graph of out (R18)."""
    tensors = make(grad=True)
    given = [*tensors[:3], *(x.square() for x in tensors[3:])]  # whose graph keeps something
    output = msa.ops.attention(*given, *BORDERS, config=CONFIG, align=True)
    output.out.sum().backward()
    assert tensors[3].grad is None
    output.kl.backward()
    assert tensors[3].grad.any()


# -- in compiled graphs ---------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(backend, monkeypatch):
    # No vectors: to find those that the compiler knows, inductor compiles programs for longer than
    # all that this test is about. The number keeps its cache apart from that of other calls.
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    layer = Layer()
    x = torch.randn(2, 24, 32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        found = loss_and_gradients(layer, compiled, x)
    assert_all_close(found, loss_and_gradients(layer, layer, x))


def test_one_graph_for_all_lengths():
    layer = Layer()
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        for n in (24, 31, 50):
            x = torch.randn(2, n, 32)
            assert_all_close(compiled(x), layer(x))
    assert len(graphs) == 1


def test_compiled_decode():
    q, q_idx, cache = decode_args()
    compiled = torch.compile(msa.ops.decode, fullgraph=True, backend="aot_eager")
    wanted = msa.ops.decode(q, q_idx, cache, CONFIG)
    for mine, theirs in zip(compiled(q, q_idx, cache, CONFIG), wanted):
        assert torch.equal(mine, theirs)


def test_compiled_prefill():
    q, q_idx, cache = decode_args()
    compiled = torch.compile(msa.ops.prefill, fullgraph=True, backend="aot_eager")
    args = q[:, 0], q_idx[:, 0], cache, (0, 1, 1, 3), CONFIG
    for mine, theirs in zip(compiled(*args), msa.ops.prefill(*args)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant):
    layer, x = Layer(), torch.randn(1, 24, 32, requires_grad=True)

    def call(x):
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    assert_all_close(loss_and_gradients(layer, call, x), loss_and_gradients(layer, layer, x))


def test_checkpointed_and_compiled():
    layer, x = Layer(), torch.randn(1, 24, 32)
    torch.compiler.reset()
    call = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    assert_all_close(loss_and_gradients(layer, call, x), loss_and_gradients(layer, layer, x))


def test_autocast():
    layer, x = Layer(), torch.randn(1, 24, 32)
    q, k, v, q_idx, k_idx = make()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, *_ = msa.ops.attention(q, k.bfloat16(), v, q_idx, k_idx.bfloat16(), *BORDERS, CONFIG)
        narrow, kl = layer(x)
        assert_all_close(compiled(x), (narrow, kl))
    wanted = msa.ops.attention(*(x.bfloat16() for x in (q, k, v, q_idx, k_idx)), *BORDERS, CONFIG)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted.out)
    assert not torch.equal(narrow, layer(x)[0])


def test_functional_call():
    layer, other, x = Layer(), Layer(), torch.randn(1, 24, 32)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    called = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert_all_close(called, other(x))
    assert not torch.allclose(called[0], layer(x)[0])


def test_exported_program():
    layer, x = Layer().eval(), torch.randn(1, 24, 32)
    length = torch.export.Dim("length", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: length}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"msa.attention.default", "msa.align_index.default"} <= targets
    for n in (24, 57):
        x = torch.randn(1, n, 32)
        assert_all_close(program.module()(x), layer(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_of_the_loss_is_refused(compiled):
    """A second derivative is an error; create_graph=True alone is not."""
    q, k, _, q_idx, k_idx = make(grad=True)
    call = torch.compile(msa.ops.align_index, backend="eager") if compiled else msa.ops.align_index
    loss = call(q, k, q_idx, k_idx, None, *BORDERS, config=CONFIG)
    first = torch.autograd.grad(loss, (q_idx, k_idx), create_graph=True)
    assert all(gradient.isfinite().all() for gradient in first)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first[0].square().sum().backward()
