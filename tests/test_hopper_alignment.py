"""The alignment loss on Hopper: the definition's loss and gradients, every time (R17, R19, R21).

Without a GPU, the kernel's arithmetic and its barriers run on NumPy (`async_gluon`).
"""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import msa
from benchmarks.cases import make_selection
from msa import kernel_choice, torch_impl
from msa.ir import Sequences
from msa.triton_impl import align_index, alignment

pytest.importorskip("triton", minversion="3.6")

from async_gluon import Descriptor, launch, value

from msa.triton_impl.hopper import index_loss, loss_rows, ring, student, teacher, walk_rows

CANNOT = kernel_choice.obstacle(kernel_choice.usual_call())
CONFIG = msa.MSAConfig()


def on_gpu(test):
    """Marks of a test that needs a Hopper GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))(test))


def packed(*lengths):
    """Sequences from pairs of queries and keys."""
    return Sequences(*((0, *accumulate(n)) for n in zip(*lengths, strict=True)))


SHORT = packed((5, 5), (0, 130), (40, 333), (1, 1))
RAGGED = packed((54, 1042), (0, 300), (233, 1120), (1, 1), (300, 300), (12, 129), (3, 999))
CASES = {  # sequences, groups, heads of a group, chance to keep a block (None: all), lse is known
    "one token": (Sequences.one(1, 1), 1, 16, 0.0, True),
    "short": (SHORT, 2, 16, 0.5, True),
    "lse is computed": (SHORT, 2, 16, 0.5, False),
    "eight heads": (SHORT, 1, 8, 0.5, True),
    "64 heads": (packed((5, 5), (9, 130)), 1, 64, 0.5, False),
    "all blocks": (packed((5, 5), (0, 130), (20, 333)), 1, 32, None, False),
}
LARGER = {
    "ragged": (RAGGED, 4, 16, 0.8, True),
    "ragged, nothing alike": (RAGGED, 4, 16, 0.0, False),
    "one sequence": (Sequences.one(1024, 1024), 4, 16, 0.95, True),
}


def arguments(sequences, groups, group, keep, known, dtype=torch.float32, device="cpu", seed=0):
    """The arguments of `align_index`."""
    random = torch.Generator(device).manual_seed(seed)
    q, k, q_idx, k_idx = (
        torch.randn(*shape, generator=random, device=device).to(dtype)
        for shape in (
            (sequences.total_q, groups * group, 128), (sequences.total_k, groups, 128),
            (sequences.total_q, groups, 128), (sequences.total_k, 128),
        )
    )  # fmt: skip
    chosen = None if keep is None else make_selection(sequences, keep, groups=groups, device=device)
    lse = None
    if known:
        attended = torch_impl.attend_selection(q.double(), k.double(), k.double(), chosen, SCALE)
        lse = attended.lse.float()
    return q, k, q_idx, k_idx, chosen, sequences, CONFIG, lse


SCALE = CONFIG.softmax_scale_for(128)


def definition(q, k, q_idx, k_idx, *others):
    """The loss and both gradients in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q_idx, k_idx)]
    loss = torch_impl.align_index(q.double(), k.double(), *leaves, *others[:-1])
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_close(found, wanted, bound):
    """The loss within 2^13 float32 additions, the gradients up to their dtypes' rounding.

    A query with one key has a gradient of 0, and P_idx - P is within float32's rounding of it.
    """
    queries = found[1].shape[0] * found[1].shape[1]
    assert abs(float(found[0]) - float(wanted[0])) <= 2e-5 * max(1.0, abs(float(wanted[0])))
    for one, two in zip(found[1:], wanted[1:], strict=True):
        assert (
            one.double() - two
        ).norm() <= bound * two.norm() + 1e-6 / queries * two.numel() ** 0.5


# -- without a GPU --------------------------------------------------------------------------------
class OnNumpy:
    """The kernel of a module, run by `async_gluon`."""

    def __init__(self, module):
        self.modules = walk_rows, ring, teacher, student, loss_rows, SimpleNamespace(**vars(module))

    def __getitem__(self, grid):
        def run(*args, num_warps, enable_fp_fusion, **options):
            arrays = [x.numpy() if isinstance(x, torch.Tensor) else x for x in args]
            log2 = {"fast_log2": lambda x: value(np.log2(x))}
            launch(self.modules, "hopper_loss_kernel", *grid, *arrays, others=log2, **options)

        return run


@pytest.fixture
def on_numpy(monkeypatch):
    """Three programs of the kernel on NumPy in the place of the portable kernels."""
    monkeypatch.setattr(index_loss, "hopper_loss_kernel", OnNumpy(index_loss))
    monkeypatch.setattr(index_loss, "describe", lambda x, *shape: Descriptor(x.numpy(), shape))
    monkeypatch.setattr(index_loss, "can_describe", lambda x, dim: x.is_contiguous())
    monkeypatch.setattr(alignment, "choose", lambda kernels, call: "hopper")
    found = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("on_numpy")
def test_the_arithmetic_is_the_definition(name):
    given = arguments(*CASES[name])
    found = alignment.align_index_sums(*given, with_gradient=True)
    assert_close(found, definition(*given), 2e-6)
    loss, *_ = alignment.align_index_sums(*given, with_gradient=False)
    assert torch.equal(loss, found[0])


@pytest.mark.usefixtures("on_numpy")
def test_infinite_and_missing_scores():
    """Scores of +inf share the mass; NaN of another sequence stays there (R4, R17)."""
    q, k, q_idx, k_idx, *others = arguments(*CASES["short"])
    q_idx[30, :, 0], k_idx[:5] = torch.inf, torch.nan
    loss, d_q, _ = alignment.align_index_sums(q, k, q_idx, k_idx, *others, with_gradient=True)
    wanted = definition(q, k, q_idx, k_idx, *others)
    assert loss == wanted[0] == torch.inf
    assert (d_q[5:] - wanted[1][5:]).norm() <= 2e-6 * wanted[1][5:].norm()


# -- on a GPU -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CASES, *LARGER])
@on_gpu
def test_the_loss_and_its_gradients_are_those_of_the_definition(name, dtype):
    given = arguments(*(CASES | LARGER)[name], dtype, "cuda")
    found = alignment.align_index_sums(*given, with_gradient=True, kernels="hopper")
    assert_close(found, definition(*given), 4 * torch.finfo(dtype).eps)


@st.composite
def drawn(draw):
    """Arguments of every kind that the kernel takes."""
    queries = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any))
    lengths = [(n, n + draw(st.integers(0, 300))) for n in queries]
    keep = draw(st.sampled_from([None, 0.0, 0.5, 0.95]))
    group, groups = draw(st.sampled_from(kernel_choice.LOSS_GROUPS)), draw(st.integers(1, 3))
    dtype, seed = draw(st.sampled_from([torch.bfloat16, torch.float16])), draw(st.integers(0, 9))
    known = keep is not None and draw(st.booleans())
    return arguments(packed(*lengths), groups, group, keep, known, dtype, "cuda", seed)


@settings(max_examples=30, deadline=None)
@given(st.data())
@on_gpu
def test_every_loss_is_that_of_the_definition(data):
    some = data.draw(drawn())
    found = alignment.align_index_sums(*some, with_gradient=True, kernels="hopper")
    assert_close(found, definition(*some), 4 * torch.finfo(some[0].dtype).eps)


@pytest.mark.parametrize("name", ["one token", "short", "ragged", "ragged, nothing alike"])
@on_gpu
def test_two_hundred_repetitions_give_the_same_bits(name):
    given = arguments(*(CASES | LARGER)[name], torch.bfloat16, "cuda")
    first = alignment.align_index_sums(*given, with_gradient=True, kernels="hopper")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        again = alignment.align_index_sums(*given, with_gradient=True, kernels="hopper")
        different += sum((one != two).sum() for one, two in zip(first, again, strict=True))
    assert different.item() == 0


@on_gpu
def test_strides_of_every_kind():
    *tensors, chosen, sequences, config, lse = arguments(*LARGER["ragged"], torch.bfloat16, "cuda")
    others = chosen, sequences, config, lse
    wanted = alignment.align_index_sums(*tensors, *others, True, "hopper")
    turned = [x.movedim(0, 1).contiguous().movedim(1, 0) for x in tensors[:3]] + tensors[3:]
    padded = [torch.cat([x, x], -1)[..., :128] for x in tensors]
    for some in (turned, padded):
        found = alignment.align_index_sums(*some, *others, True, "hopper")
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@on_gpu
def test_a_graph_gives_the_same_bits():
    given = arguments(*LARGER["ragged"], torch.bfloat16, "cuda")
    wanted = alignment.align_index_sums(*given, True, "hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = alignment.align_index_sums(*given, True, "hopper")
    for _ in range(5):
        held[1].fill_(7)
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(held, wanted, strict=True))


def test_what_it_cannot_take_is_named():
    q, k, q_idx, k_idx, chosen, sequences, config, lse = arguments(*CASES["one token"])
    with pytest.raises(TypeError, match="q must have dtype float16 or bfloat16 for kernels='hopp"):
        align_index(q, k, q_idx, k_idx, chosen, sequences, config, lse, "hopper")
    half = [x.half() for x in (q, k, q_idx, k_idx)]
    with pytest.raises(ValueError, match="q must have 8, 16, 32 or 64 heads in a group"):
        align_index(half[0][:, :1], *half[1:], chosen, sequences, config, None, "hopper")
