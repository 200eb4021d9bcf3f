"""What GPUs have and lack: families, tiles, refusals, what every launch states."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

import msa
from msa import cache_checks, chips, explain, loop_order
from msa.chips import FAMILIES, KIB, MEASURED, Chip, family_of
from msa.entry import Entry
from msa.triton_impl import block_topk, launch, selection, tuning

KERNELS = Path(msa.__file__).parent / "triton_impl"
A100 = Chip(FAMILIES["8.0"], "NVIDIA A100", 108, 163 * KIB, 40 * 2**20)
MI300 = Chip(FAMILIES["gfx942"], "AMD Instinct MI300X", 304, 64 * KIB, 4 * 2**20)


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)


OnGpu.__module__ = "torch"  # by which msa knows tensors


def on(chip, monkeypatch):
    """Make a chip the current one."""
    monkeypatch.setattr(chips, "current", lambda: chip)
    monkeypatch.setattr(chips, "chip_of", lambda device: chip)


@drawn(st.integers(0, 15), st.integers(0, 9))
def test_a_gpu_belongs_to_a_family_that_is_not_newer(major, minor):
    family = family_of(f"{major}.{minor}")
    oldest = chips.as_numbers("8.0")
    known = [chips.as_numbers(f.name) for f in FAMILIES.values() if not f.is_amd]
    own = chips.as_numbers(family.name)
    newer = [other for other in known if own < other <= (major, minor)]
    assert (major, minor) < oldest or (own <= (major, minor) and not newer)


def test_an_unknown_target_of_amd_has_the_least():
    unknown = family_of("gfx90a")
    assert unknown.is_amd and {what for what, _ in chips.missing(unknown)} == {
        what for what, _ in chips.MISSING.values()
    }


def test_sizes_come_from_the_device(monkeypatch):
    found = SimpleNamespace(
        name="NVIDIA A100", major=8, minor=0, multi_processor_count=108,
        shared_memory_per_block_optin=166912, L2_cache_size=41943040,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert chips.chip_of.__wrapped__(0) == Chip(
        FAMILIES["8.0"], "NVIDIA A100", 108, 166912, 41943040
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found.gcnArchName = "gfx942:sramecc+:xnack-"
    assert chips.chip_of.__wrapped__(0).family == FAMILIES["gfx942"]


# -- tiles ----------------------------------------------------------------------------------------
SHAPES = [(kernel, bytes_dim) for kernel in tuning.TABLE for bytes_dim in tuning.TABLE[kernel]]
DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16}


@pytest.mark.parametrize(("kernel", "shape"), SHAPES)
def test_the_measured_tiles_are_those_of_hopper(kernel, shape, monkeypatch):
    size, dim = shape
    for multiprocessors in (132, 114):
        on(replace(MEASURED, multiprocessors=multiprocessors), monkeypatch)
        found, tile = tuning.choose(kernel, DTYPES[size], dim, 128), tuning.TABLE[kernel][shape]
        assert replace(found, programs=tile.programs) == tile
        assert found.programs == tile.programs * multiprocessors // 132


def test_other_families_take_tiles_that_fit(monkeypatch):
    """They differ from the measured ones only where OTHERS says so, and know every kernel."""
    for family, tiles in tuning.OTHERS.items():
        on(replace(A100, family=FAMILIES[family]), monkeypatch)
        for kernel, (size, dim) in SHAPES:
            wanted = tiles.get(kernel, {}).get((size, dim), tuning.TABLE[kernel][size, dim])
            found = tuning.choose(kernel, DTYPES[size], dim, 128)
            assert found == replace(wanted, programs=wanted.programs * 108 // 132)
        assert set(tiles) <= set(tuning.TABLE)


def test_work_is_cut_for_the_multiprocessors_of_the_device(monkeypatch):
    config, sequences = msa.MSAConfig(block_size=16, top_k=4), msa.Sequences.one(8192, 8192)
    plan = selection.plan_scan._make
    on(MEASURED, monkeypatch)
    many = plan(sequences, config, 128, torch.device("cpu"))
    on(replace(MEASURED, multiprocessors=10), monkeypatch)
    few = plan(sequences, config, 128, torch.device("cpu"))
    assert len(few.items) < len(many.items)


def test_amd_gets_no_more_than_1024_threads(monkeypatch):
    """Its warps have 64 threads; the widest rows would ask for 32 of them."""
    asked = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, num_warps, **__: asked.append(num_warps)

    monkeypatch.setattr(block_topk, "row_topk_kernel", Kernel())
    values, config = torch.zeros(1, 1, 2**15), msa.MSAConfig(block_size=16, top_k=4)
    for chip in (MEASURED, MI300):
        on(chip, monkeypatch)
        block_topk.select_rows(values, torch.zeros(1, dtype=torch.int32), 16, config)
    assert asked == [32, 16]


def test_the_precision_that_amd_knows(monkeypatch):
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert [launch.is_exact(x) for x in (half, single)] == ["tf32", "ieee"]
    on(MI300, monkeypatch)
    assert [launch.is_exact(x) for x in (half, single)] == ["ieee", "ieee"]


def test_no_descriptors_where_there_is_no_copy_engine(monkeypatch):
    x = torch.zeros(64, 128).as_subclass(OnGpu)
    for chip, can in ((MEASURED, True), (A100, False), (MI300, False)):
        on(chip, monkeypatch)
        assert launch.can_describe(x, 128) == can


# -- what is refused ------------------------------------------------------------------------------
def test_eight_bits_are_refused_where_there_are_none(monkeypatch):
    x = torch.zeros(4, 4).as_subclass(OnGpu)
    on(MEASURED, monkeypatch)
    Entry("triton", x, {"index_dtype": "fp8_e4m3"})
    on(A100, monkeypatch)
    Entry("triton", x, {"index_dtype": None})
    with pytest.raises(ValueError, match=r"index_dtype must be None .* which needs compute "
                       r"capability 8\.9 .*, got 'fp8_e4m3' on NVIDIA A100 of 8\.0"):  # fmt: skip
        Entry("triton", x, {"index_dtype": "fp8_e4m3"})


def test_pages_of_eight_bits_are_refused_where_there_are_none(monkeypatch):
    x = torch.zeros(4, 4)
    pages = {name: x.as_subclass(OnGpu) for name in ("k_pages", "v_pages", "k_idx_pages")}
    on(A100, monkeypatch)
    cache_checks.check_chip(SimpleNamespace(**pages))
    pages["k_idx_pages"] = x.to(torch.float8_e4m3fn).as_subclass(OnGpu)
    with pytest.raises(ValueError, match=r"cache\.k_idx_pages must be of 16 or 32 bits"):
        cache_checks.check_chip(SimpleNamespace(**pages))


def test_explain_names_what_is_missing(monkeypatch):
    without_gpu = explain.name_what_is_missing()
    if not torch.cuda.is_available():
        assert without_gpu["chip"] is None and set(without_gpu["missing"]) == set(FAMILIES)
    monkeypatch.setattr(chips, "usual", lambda: A100)
    found = explain.name_what_is_missing()
    assert found["chip"] == {"model": "NVIDIA A100", "family": "8.0"}
    assert any("refused: index_dtype='fp8_e4m3'" in line for line in found["missing"]["8.0"])
    orders = explain.choose_orders(explain.trace_example("reference"))
    assert orders["numbers"] == "counted, not measured" and orders["walk_all"] == 1.39


@drawn(st.floats(50, 600), st.integers(1, 64), st.integers(1, 300))
def test_a_gpu_with_faster_products_walks_longer_unions(rate, top_k, union):
    slow, fast = loop_order.limits(top_k, rate), loop_order.limits(top_k, 1.5 * rate)
    assert top_k <= slow[0] <= slow[1] and slow[0] <= fast[0] and slow[1] <= fast[1]
    least = [loop_order.least_shared(union, top_k, 1000.0, r) for r in (rate, 1.5 * rate)]
    assert least[0] >= least[1]


# -- what every launch states ---------------------------------------------------------------------
def launches():
    """Every launch of a kernel: its file, its name, and the dicts that it is given."""
    for path in sorted(KERNELS.rglob("*.py")):
        tree = ast.parse(path.read_text())
        made = {
            ast.unparse(node.targets[0]): ast.unparse(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = ast.unparse(node.func.value)
                given = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
                if kernel.endswith("_kernel"):
                    yield path.name, kernel, [made.get(name, name) for name in given]


LAUNCHES = list(launches())


@pytest.mark.parametrize(("file", "kernel", "given"), LAUNCHES, ids=[x[1] for x in LAUNCHES])
def test_every_launch_states_whether_products_and_sums_fuse(file, kernel, given):
    """By EVERY_LAUNCH, or by the tile's launch(), which holds it."""
    assert any("EVERY_LAUNCH" in one or "tile.launch()" in one for one in given), (file, kernel)


def test_a_tile_states_it():
    assert tuning.DEFAULTS["union"].launch()["enable_fp_fusion"] is True
