"""Checks of the means of the gradient properties, and tests that are too large for them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import msa
from msa.conformance import Domain, subjects
from msa.conformance.cases import Case
from msa.conformance.gradients import (
    directions,
    moved,
    slope,
    spec_alignment,
    spec_attention,
)
from msa.conformance.properties.alignment import alignment_yardstick
from msa.conformance.properties.training import upstream
from msa.conformance.strategies import MILD, cases, double
from msa.conformance.tolerances import PRECISIONS, compare
from msa.conformance.yardstick import Attention, block_mask
from msa.conformance.yardstick_training import Gradients

(REFERENCE,) = subjects(("reference",))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LEARNERS = [
    pytest.param(s, id=s.label, marks=[pytest.mark.gpu] * (s.device != "cpu"))
    for s in subjects()
    if s.domain.has("attend", "attend_selection", "align_index", "backward")
]
HALVES = [
    pytest.param(s.values[0], name, id=f"{s.id}-{name}", marks=s.marks)
    for s in LEARNERS
    for name in ("float16", "bfloat16")
    if s.values[0].domain.has(name)
]


@given(double(REFERENCE.domain))
def test_the_yardstick_has_the_slopes_of_the_spec(case: Case):
    """The analytic gradients, which are the yardstick for every dtype, equal finite differences."""
    inputs, (d_out, d_lse) = case.inputs, upstream(case)
    mask = block_mask(case.selection.indices, case.sequences, case.config.block_size)
    grads = Gradients(Attention(*inputs.main, mask, inputs.scale), d_out, d_lse).values()
    for which, step in enumerate(directions(inputs.main, seed=1)):
        want = slope(
            lambda t, w=which, d=step: spec_attention(
                inputs, case.selection, moved(inputs.main, w, t * d), d_out, d_lse
            )
        )
        assert float((grads["qkv"[which]] * step).sum()) == pytest.approx(want, abs=1e-9, rel=1e-9)


@given(double(REFERENCE.domain))
def test_the_yardstick_has_the_slopes_of_the_loss(case: Case):
    inputs = case.inputs
    for selection in (case.selection, None):
        grads = alignment_yardstick(inputs, selection, case.groups).gradients()
        for which, step in enumerate(directions(inputs.index, seed=1)):
            want = slope(
                lambda t, s=selection, w=which, d=step: spec_alignment(
                    inputs, s, moved(inputs.index, w, t * d)
                )
            )
            got = float((grads[("q_idx", "k_idx")[which]] * step).sum())
            assert got == pytest.approx(want, abs=1e-9, rel=1e-9)


def test_finite_differences_see_a_wrong_gradient():
    """The five-point rule is precise enough to distinguish 2 from 2 + 1e-9."""
    assert slope(lambda t: np.sin(2 * t)) == pytest.approx(2, abs=1e-10)
    assert slope(lambda t: np.sin(2 * t)) != pytest.approx(2 + 1e-9, abs=1e-10)


def tensors(tokens: int, device: str, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, 4, 16), (tokens, 2, 16), (tokens, 2, 16), (tokens, 2, 8), (tokens, 8)]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_long_sequence_repeat_to_the_bit(device):
    """Enough tokens for several tiles and threads; no sum may depend on their order in time."""
    config = msa.MSAConfig(block_size=32, top_k=4)

    def once():
        q, k, v, q_idx, k_idx = tensors(1500, device)
        borders = [0, 900, 900, 1500]
        kept = {"cu_seqlens_q": borders, "cu_seqlens_k": borders, "config": config}
        output = msa.attention(q, k, v, q_idx, k_idx, backend="torch", **kept)
        loss = msa.align_index(q, k, q_idx, k_idx, output.selection, config=config, backend="torch")
        warm_up = msa.align_index(q, k, q_idx, k_idx, backend="torch", **kept)
        (output.out.square().sum() + output.lse.sum() + loss + warm_up).backward()
        return [output.out, output.lse, loss, warm_up, *(x.grad for x in (q, k, v, q_idx, k_idx))]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for first, second in zip(once(), once()):
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(threads)


def test_autograd_agrees_with_itself():
    """torch.autograd.gradcheck compares every entry of every Jacobian."""
    made = tensors(7, "cpu", torch.float64)
    main, index = made[:3], made[3:]
    main = [x.detach()[..., :2].contiguous().requires_grad_() for x in main]
    index = [x.detach()[..., :2].contiguous().requires_grad_() for x in index]
    config = msa.MSAConfig(block_size=2, top_k=2)
    fixed = [x.detach() for x in (*main, *index)]
    output = msa.attention(*fixed, config=config)
    dense = msa.attention(*fixed, config=msa.MSAConfig(block_size=2, top_k=4))

    def attend(q, k, v):
        return msa.sparse_attention(q, k, v, output.selection).out

    def align(q_idx, k_idx, selection, lse):
        args = (*fixed[:2], q_idx, k_idx, selection)
        return msa.align_index(*args, lse=lse, config=config)

    def in_one_call(q_idx, k_idx):
        return msa.attention(*fixed[:3], q_idx, k_idx, config=config, align=True).kl

    assert torch.autograd.gradcheck(attend, main)
    assert torch.autograd.gradcheck(in_one_call, index)
    for selection, lse in ((output.selection, output.lse), (None, dense.lse)):
        for known in (None, lse):
            check = partial(align, selection=selection, lse=known)
            assert torch.autograd.gradcheck(check, index)


@pytest.mark.parametrize("subject", LEARNERS)
def test_the_alignment_loss_stops_at_the_hidden_state(subject):
    """The loss trains the index projections, not their input or the main branch (eq. 11, R17)."""
    generator = torch.Generator().manual_seed(0)
    widths = {"q": (4, 16), "k": (2, 16), "v": (2, 16), "q_idx": (2, 16), "k_idx": (1, 16)}
    hidden = torch.randn(50, 24, generator=generator).to(subject.device).requires_grad_()
    weights = {
        name: torch.randn(24, *shape, generator=generator).to(subject.device).requires_grad_()
        for name, shape in widths.items()
    }
    project = partial(torch.einsum, "te,ehd->thd")
    q, k, v = (project(hidden, weights[name]) for name in "qkv")
    q_idx, k_idx = (project(hidden.detach(), weights[name]) for name in ("q_idx", "k_idx"))
    config = msa.MSAConfig(block_size=16, top_k=2)
    args = (q, k, v, q_idx, k_idx[:, 0])
    output = msa.attention(*args, config=config, align=True, backend=subject.name)
    output.kl.backward()
    for still in (hidden, weights["q"], weights["k"], weights["v"]):
        assert still.grad is None or not still.grad.any()
    for taught in (weights["q_idx"], weights["k_idx"]):
        assert taught.grad.abs().max() > 0


SIZES = {  # tokens, heads, groups, head sizes, configuration, largest ratio
    "cpu": (70, 4, 2, (16,), msa.MSAConfig(block_size=16, top_k=2), 2.0),
    "cuda": (1500, 16, 2, (64, 128), msa.MSAConfig(block_size=64, top_k=6), 1.5),
}


@pytest.mark.parametrize(("subject", "name"), HALVES)
def test_half_precision_costs_little_more_than_its_last_rounding(subject, name):
    """Errors over whole tensors: at most 1.5 times those of a gradient that is rounded once.

    That is what the torch backend gives, which computes in float32. Rounding dS for its products as
    well is an independent error of the same size, together sqrt(2) times as long. The rounding of
    out and P reaches dS through delta, one error for all keys of a query, which their directions
    average away where there are hundreds; with the 32 keys that the interpreter has time for it
    counts in full, and twice as long is four roundings.
    """
    dtype = getattr(torch, name)
    tokens, heads, groups, dims, config, most = SIZES[subject.device]
    for dim in dims:
        shapes = [(tokens, heads, dim), *[(tokens, groups, dim)] * 3, (tokens, dim)]
        generator = torch.Generator().manual_seed(dim)
        made = [torch.randn(s, generator=generator).to(subject.device, dtype) for s in shapes]
        d_out = torch.randn(shapes[0], generator=generator).to(subject.device, dtype)
        d_lse = torch.randn(shapes[0][:2], generator=generator).to(subject.device)
        selection = msa.select(*(x.double() for x in made[3:]), config=config, backend="torch")

        def gradients(backend, wanted, made=made, d_out=d_out, d_lse=d_lse, chosen=selection):
            q, k, v, q_idx, k_idx = (x.to(wanted, copy=True).requires_grad_() for x in made)
            output = msa.sparse_attention(q, k, v, chosen, backend=backend)
            args = (q, k, q_idx, k_idx, chosen)
            loss = msa.align_index(*args, lse=output.lse, config=config, backend=backend)
            upstream = [d_out.to(wanted), d_lse, loss.new_full((), float(d_lse.numel()))]
            torch.autograd.backward([output.out, output.lse, loss], upstream)
            return [x.grad.double() for x in (q, k, v, q_idx, k_idx)]

        exact = gradients("torch", torch.float64)
        once = gradients("torch", dtype)
        own = gradients(subject.name, dtype)
        for name, want, good, got in zip(("q", "k", "v", "q_idx", "k_idx"), exact, once, own):
            best, error = ((x - want).norm() / want.norm() for x in (good, got))
            print(f"{subject.label} {dtype} D={dim} d{name}: {error:.2e}, rounded once {best:.2e}")
            assert best <= torch.finfo(dtype).eps / 2, name
            assert error <= most * best, f"d{name} is off by {error:.2e}, {error / best:.2f} times"


def rounding_backward(case: Case) -> dict[str, np.ndarray]:
    """A backward pass like that of kernels: lse in float32; out, P and dS in the case's dtype."""
    inputs, (d_out, d_lse) = case.inputs, upstream(case)
    mask = block_mask(case.selection.indices, case.sequences, case.config.block_size)

    def stored(x):
        return x.to(getattr(torch, case.dtype)).float()

    def of_groups(x):
        return x.reshape(len(x), case.groups, case.group, x.shape[2]).sum(2)

    q, k, v, g, d_lse = (torch.tensor(x).float() for x in (*inputs.main, d_out, d_lse))
    k, v = (x.repeat_interleave(case.group, 1) for x in (k, v))
    support = torch.tensor(mask).repeat_interleave(case.group, 1)
    s = torch.einsum("ihd,jhd->ihj", q, k) * inputs.scale
    s = s.masked_fill(~support, -torch.inf)
    p = (s - s.logsumexp(-1)[..., None]).exp()
    out = stored(torch.einsum("ihj,jhe->ihe", stored(p), v))
    delta = (g * out).sum(-1) - d_lse
    d_s = stored(p * (torch.einsum("ihe,jhe->ihj", g, v) - delta[..., None]))
    d_q = torch.einsum("ihj,jhd->ihd", d_s, k) * inputs.scale
    d_k = of_groups(torch.einsum("ihj,ihd->jhd", d_s, q)) * inputs.scale
    d_v = of_groups(torch.einsum("ihj,ihe->jhe", stored(p), g))
    return {name: stored(x).numpy() for name, x in zip("qkv", (d_q, d_k, d_v))}


@given(cases(Domain(dtypes=("float16", "bfloat16")), MILD))
def test_the_budget_has_room_for_what_kernels_round(case: Case):
    """The bounds are not much too large: some errors are half of their bound."""
    inputs, (d_out, d_lse) = case.inputs, upstream(case)
    mask = block_mask(case.selection.indices, case.sequences, case.config.block_size)
    attention = Attention(*inputs.main, mask, inputs.scale, parts=case.config.top_k)
    want = Gradients(attention, d_out, d_lse)
    values, bounds = want.values(), want.bounds(PRECISIONS[case.dtype])
    for name, got in rounding_backward(case).items():
        compare(f"d{name}", got, values[name], bounds[name])


def test_tokens_that_nobody_reads_get_no_gradient():
    q, k, v, _, _ = tensors(8, "cpu")
    ids = torch.tensor([[0, -1]] * 4 + [[1, -1]] * 4, dtype=torch.int32)[:, None].repeat(1, 2, 1)
    own = msa.Selection(ids[4:], msa.Sequences.one(4, 8), block_size=4)  # only the second block
    msa.sparse_attention(q[4:].detach().requires_grad_(), k, v, own).out.sum().backward()
    assert (k.grad[:4] == 0).all() and (v.grad[:4] == 0).all()
    assert (v.grad[4:] != 0).any()


@settings(max_examples=5)
@given(double(REFERENCE.domain))
def test_no_graph_is_kept_without_need(case: Case):
    """Inputs that need no gradient give outputs that need none."""
    (subject, *_) = subjects(("torch",))
    given_ = [subject.give(x, case.dtype) for x in (*case.inputs.main, *case.inputs.index)]
    output = subject.module.attend(*given_, case.sequences, case.config)
    assert not output.out.requires_grad and not output.lse.requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["out", "kl"])
def test_a_second_derivative_is_refused_and_not_left_out(backend, name):
    """An error is raised only for a second derivative, not for create_graph=True alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = (20, 2, 16), (20, 1, 16), (20, 1, 16), (20, 1, 16), (20, 16)
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    config = msa.MSAConfig(block_size=16, top_k=1)
    output = msa.attention(*inputs, config=config, align=True, backend=backend)
    first = torch.autograd.grad(
        getattr(output, name).sum(), inputs, create_graph=True, allow_unused=True
    )
    known = [gradient for gradient in first if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in known)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        known[0].square().sum().backward()
