"""The operators with the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch
from operator_calls import (
    BORDERS,
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

pytestmark = pytest.mark.gpu
CONFIG = msa.MSAConfig(block_size=16, top_k=2)


def on_device(tensors):
    return [x.detach().cuda().requires_grad_(x.requires_grad) for x in tensors]


def paged():
    """decode_args with blocks of 16 tokens, which the kernels support."""
    q, q_idx, c = decode_args()
    pages = (torch.cat([x, x.flip(0)], 1) for x in (c.k_pages, c.v_pages, c.k_idx_pages))
    cache = msa.PagedKV(*(x.cuda() for x in (*pages, c.page_table, c.lengths)))
    return q.cuda(), q_idx.cuda(), cache


def test_opcheck():
    q, k, v, q_idx, k_idx = on_device(make(grad=True))
    ids = OPS.select_blocks(q_idx, k_idx, *BORDERS, *numbers(CONFIG))
    opcheck(OPS.select_blocks, (q_idx, k_idx, *BORDERS, *numbers(CONFIG)))
    opcheck(OPS.sparse_attention, (q, k, v, ids, *BORDERS, 16))
    opcheck(OPS.attention, (q, k, v, q_idx, k_idx, *BORDERS, *numbers(CONFIG)))
    opcheck(OPS.align_index, (q, k, q_idx, k_idx, ids, None, *BORDERS, 16, True))
    q, q_idx, c = paged()
    pages = c.k_pages, c.v_pages, c.k_idx_pages, c.page_table, c.lengths
    opcheck(OPS.decode, (q, q_idx, *pages, 2))


def test_equal_to_the_cpu():
    """The operator on a CPU runs the torch backend, so results differ by rounding."""
    results = []
    for tensors in (make(grad=True), on_device(make(grad=True))):
        out, lse, ids, kl = msa.ops.attention(*tensors, *BORDERS, config=CONFIG, align=True)
        total = out.square().sum() + lse.cos().sum() + 3 * kl
        gradients = torch.autograd.grad(total, tensors)
        results.append(dict(zip(("out", "lse", "kl", *NAMES), (out, lse, kl, *gradients))))
        results[-1]["ids"] = ids
    wanted, found = results
    for name, x in wanted.items():
        assert (found[name].cpu() - x).abs().max() <= 1e-4 * x.abs().max().clamp(min=1), name


def test_compiled_whole():
    layer, x = Layer(CONFIG).cuda(), torch.randn(2, 40, 32, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert_all_close(loss_and_gradients(layer, compiled, x), loss_and_gradients(layer, layer, x))


def test_compiled_into_a_cuda_graph():
    layer = Layer(CONFIG).cuda().eval()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        layer(torch.zeros(2, 40, 32, device="cuda"))  # tables kept between calls are made outside
        for _ in range(4):  # the third call replays
            x = torch.randn(2, 40, 32, device="cuda")
            assert_all_close([t.clone() for t in compiled(x)], layer(x))


def test_checkpointed():
    layer, x = Layer(CONFIG).cuda(), torch.randn(1, 40, 32, device="cuda", requires_grad=True)

    def call(x):
        return checkpoint(layer, x, use_reentrant=False)

    assert_all_close(loss_and_gradients(layer, call, x), loss_and_gradients(layer, layer, x))


def test_autocast():
    layer, x = Layer(CONFIG).cuda(), torch.randn(1, 40, 32, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        narrow, kl = layer(x)
        again, kl_again = compiled(x)
    wide, kl_wide = layer(x)
    assert (narrow - wide).abs().max() < 0.05
    assert (again - narrow).abs().max() < 0.05
    assert abs(kl - kl_wide) < 0.05 and abs(kl_again - kl_wide) < 0.05
    assert not torch.equal(narrow, wide)


def test_exported_program():
    layer, x = Layer(CONFIG).cuda().eval(), torch.randn(1, 24, 32, device="cuda")
    length = torch.export.Dim("length", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: length}})
    for n in (24, 57):
        x = torch.randn(1, n, 32, device="cuda")
        assert_all_close(program.module()(x), layer(x))
