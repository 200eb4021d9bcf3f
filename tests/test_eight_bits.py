"""Index tensors in e4m3: every bit of the rounding, and the selection from rounded tensors.

Triton's interpreter does not round to e4m3 as the hardware does. So the rounding itself is tested
on a GPU; on a CPU the kernels that select run on tensors that torch has rounded.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import msa
from msa import reference
from msa.conformance.cases import round_to_e4m3
from msa.triton_impl import quantize, selection

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
E4M3 = torch.float8_e4m3fn


def all_numbers():
    """The 253 numbers of e4m3 that are not NaN, ascending; one zero."""
    bits = torch.arange(256, dtype=torch.uint8).view(E4M3).double().numpy()
    return np.unique(bits[np.isfinite(bits)])


def nearest(x):
    """The nearest number of e4m3 to each x, half to an even last bit: by search, not by formula."""
    numbers = all_numbers()
    above = np.clip(np.searchsorted(numbers, x), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    even = np.frexp(np.where(x < 0, -low, low))
    last = np.rint(np.abs(low) / np.ldexp(1.0, np.maximum(even[1] - 1, -6) - 3)) % 2
    up = (x - low > high - x) | ((x - low == high - x) & (last == 1))
    return np.where(np.isnan(x), np.nan, np.where(up, high, low))


def samples(dtype):
    """Numbers of any magnitude and sign, halfway points, NaN and infinities."""
    rng = np.random.default_rng(0)
    numbers = all_numbers()
    halves = (numbers[1:] + numbers[:-1]) / 2
    spread = rng.standard_normal(5000) * 2.0 ** rng.integers(-14, 9, 5000)
    x = np.concatenate([numbers, halves, np.nextafter(halves, 1e9), np.clip(spread, -448, 448)])
    x = torch.tensor(np.append(x, [np.nan, np.inf, -np.inf])).to(dtype)
    return x[~(x.double().abs() > 448) | ~x.double().isfinite()]


def test_the_model_of_the_rounding_is_the_search():
    x = samples(torch.float32).double().numpy()
    want = nearest(np.clip(x, -448, 448))
    np.testing.assert_array_equal(round_to_e4m3(x), want)  # the largest is 448: no stretch
    np.testing.assert_array_equal(round_to_e4m3(x * 2.0**-30), want)


def to_fp8(x):
    """A tensor rounded beside another one, of another size and range."""
    one, two = quantize.to_fp8(x, torch.cat([x, x]) / 2)
    three, four = quantize.to_fp8(torch.ones(5000, dtype=x.dtype, device=x.device), x)
    assert torch.equal(one.view(torch.uint8), four.view(torch.uint8))
    assert torch.equal(two[: len(x)].view(torch.uint8), two[len(x) :].view(torch.uint8))
    assert (three.double() == 256).all()
    return one


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("power", [-100, -13, 0, 6])
def test_rounding_bit_by_bit(dtype, power):
    if dtype == torch.float16 and power < -14:
        power = -14
    x = (samples(dtype).double() * 2.0**power).to(dtype).cuda()
    got = to_fp8(x).double().cpu().numpy()
    np.testing.assert_array_equal(got, round_to_e4m3(x.double().cpu().numpy()))


def test_the_stretch_is_the_power_of_two_that_just_fits():
    """Numbers that need no rounding, so that the interpreter does not change them either."""
    for largest, stretched in ((448, 448), (224, 448), (1.75, 448), (1.875, 240), (1, 256)):
        for power in (-30, 0, 5):
            x = torch.tensor([largest, -largest / 2, 0.0], device=DEVICE) * 2.0**power
            got = to_fp8(x).double().tolist()
            assert got == [stretched, -stretched / 2, 0.0], (largest, power)
    for x in (torch.zeros(3), torch.full((3,), 2.0**-130)):  # the largest possible stretch
        assert to_fp8(x.to(DEVICE)).double().tolist() == (x.double() * 2.0**126).tolist()


def test_what_is_not_finite_has_no_say_in_the_stretch():
    x = torch.tensor([1.0, torch.inf, -torch.inf, 0.5], device=DEVICE)
    assert to_fp8(x).double().tolist() == [256, 448, -448, 128]


@pytest.mark.gpu
def test_nan_stays():
    x = torch.tensor([1.0, torch.nan, torch.inf, torch.nan], device=DEVICE)
    got = to_fp8(x).double()
    assert got.isnan().tolist() == [False, True, False, True]
    assert got[::2].tolist() == [256, 448]


def rounded_by_torch(*tensors):
    """to_fp8 without its kernel."""
    rounded = (round_to_e4m3(x.double().cpu().numpy()) for x in tensors)
    return tuple(torch.tensor(x).to(E4M3).to(DEVICE) for x in rounded)


SHAPES = [  # tokens of each sequence, (queries of each), groups, dim, configuration
    pytest.param([130, 0, 33], None, 2, 16, msa.MSAConfig(16, 3), id="ragged"),
    pytest.param([200], [50], 1, 20, msa.MSAConfig(16, 4, sink_blocks=1), id="chunk"),
    pytest.param([97, 64], None, 3, 8, msa.MSAConfig(16, 4, 1, 2), id="forced blocks"),
    pytest.param([150], None, 4, 1, msa.MSAConfig(16, 3), id="ties"),
]


@pytest.mark.parametrize(("tokens", "queries", "groups", "dim", "config"), SHAPES)
def test_the_selection_is_that_of_the_rounded_tensors(
    tokens, queries, groups, dim, config, monkeypatch
):
    """Integers of six bits, which rounding changes. All sums of rounded numbers are exact."""
    rng = np.random.default_rng(7)
    borders = [tuple(np.cumsum([0, *n]).tolist()) for n in (queries or tokens, tokens)]
    sequences = msa.Sequences(*borders)
    q = rng.integers(-33, 34, (sequences.total_q, groups, dim)).astype(float)
    k = rng.integers(-33, 34, (sequences.total_k, dim)).astype(float)
    if dim > 1:
        k[11, 0] = np.inf
    if CUDA:  # the interpreter reads NaN as 480
        q[3, 0, 0], k[40, 0] = np.nan, np.nan
    else:
        monkeypatch.setattr(selection, "to_fp8", rounded_by_torch)
    given = [torch.tensor(x, dtype=torch.float32, device=DEVICE) for x in (q, k)]
    got = selection.select_fused(*given, sequences, config, "fp8_e4m3").indices.cpu().numpy()
    want = reference.select_fused(round_to_e4m3(q), round_to_e4m3(k), sequences, config)
    np.testing.assert_array_equal(got, want.indices)
    plain = reference.select_fused(q, k, sequences, config)
    assert (got != plain.indices).any(), "rounding must matter here, or the test shows nothing"
