"""Every kernel on a few unusual shapes: `make sanitize` runs this under compute-sanitizer.

There are a few fixed cases instead of a search: ragged sequences, a partial last block, heads and
head sizes
that are no powers of two, one block kept. Each goes through the properties that launch the kernels,
so results are compared with the spec as well. A new kernel needs a line in CHECKS, or a test fails.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
import triton

import msa
from msa import kernel_choice, torch_impl, triton_impl
from msa.conformance import all_properties, subjects
from msa.conformance.cases import Case, Fill, PagedCase, Picks, ScoresCase
from msa.conformance.properties.prefill import EightBits
from msa.triton_impl import selection, tile_union

(TRITON,) = subjects(("triton",))
HOPPER = [s for s in subjects() if s.name == "triton-hopper"]
WALK = [s for s in subjects() if s.name == "triton-hopper-walk"]
CUDA = TRITON.device != "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
PROPERTIES = {p.name: p for p in all_properties()}
CHECKS = {  # property: the kernels that it must launch
    "r4_scores_are_scaled_products": {"score_kernel"},
    "r7_integer_scores_select_the_same_everywhere": {"scan_kernel", "finish_kernel"},
    "r7_eight_bits_select_by_the_rounded_tensors": {"largest_kernel", "stretch_kernel"},
    "r9_the_union_walk_is_the_definition": {"walk_kernel"},
    "r9_the_union_of_a_tile_means_the_selection": {"union_kernel"},
    "r9_every_loop_order_is_the_definition": {"union_kernel", "walk_kernel", "chunk_kernel"},
    "r13_the_reverse_index_means_the_selection": {"mark_kernel", "prefix_kernel", "fill_kernel"},
    "r14_the_schedule_means_the_reverse_index": {"items_kernel"},
    "r15_partials_are_softmaxes_over_one_block": {"chunk_kernel"},
    "r16_combining_is_the_definition": {"combine_kernel"},
    "r17_gradients_reach_the_index_branch_only": {
        "block_sums_kernel", "merge_sums_kernel", "teacher_kernel", "index_loss_kernel",
        "sum_slots_kernel", "sum_items_kernel",
    },
    "r18_gradients_in_every_dtype": {
        "query_gradients_kernel", "record_kernel", "key_gradients_kernel", "sum_items_kernel",
    },
}  # fmt: skip
SCORE_CHECKS = {
    "r7_ties_go_to_the_lower_id": {"row_topk_kernel"},
    "r6_local_and_sink_blocks_are_always_in": {"row_topk_kernel"},
}

NORMAL = {name: Fill("normal", seed) for seed, name in enumerate("qkv")}
INTEGERS = {name: Fill("integers", seed) for seed, name in enumerate(("q_idx", "k_idx"), 3)}
RAGGED = Case(  # the last 37 of 50 tokens, none of none, 3 of 16, 17 of 17; groups of three heads
    config=msa.MSAConfig(block_size=16, top_k=3, sink_blocks=1),
    sequences=msa.Sequences((0, 37, 37, 40, 57), (0, 50, 50, 66, 83)),
    groups=2, group=3, dims=(20, 12, 9), dtype="float16", picks=Picks("random", 1),
    **NORMAL, **INTEGERS,
)  # fmt: skip
CASES = {
    "ragged": RAGGED,
    "one block": Case(
        config=msa.MSAConfig(block_size=16, top_k=1), sequences=msa.Sequences.one(20, 45),
        groups=1, group=1, dims=(1, 1, 1), dtype="float32", **NORMAL, **INTEGERS,
    ),
    "long unions": Case(
        config=msa.MSAConfig(block_size=16, top_k=2), sequences=msa.Sequences.one(28, 190),
        groups=1, group=4, dims=(16, 5, 16), dtype="float16", picks=Picks("spread", 2),
        chunk_size=3, tile_size=16, **NORMAL, **INTEGERS,
    ),
    "wide heads": Case(  # blocks in steps of 32 keys
        config=msa.MSAConfig(block_size=64, top_k=2), sequences=msa.Sequences.one(7, 150),
        groups=1, group=2, dims=(130, 130, 33), dtype="float32", picks=Picks("full"),
        **NORMAL, **INTEGERS,
    ),
}  # fmt: skip
TUNED = replace(  # by descriptors, in the measured tiles: too large for the interpreter
    RAGGED, config=msa.MSAConfig(block_size=128, top_k=2), sequences=msa.Sequences.one(140, 270),
    group=16, dims=(128, 128, 128), dtype="bfloat16",
)  # fmt: skip
if CUDA:
    CASES |= {
        "bfloat16 of 128": TUNED,
        "float16 of 64": replace(TUNED, dtype="float16", dims=(64, 64, 64)),
        "blocks of 256": replace(TUNED, config=msa.MSAConfig(block_size=256, top_k=2)),
    }
HOPPER_CHECKS = {
    "r7_integer_scores_select_the_same_everywhere": {"block_scores_kernel", "pick_kernel"},
    "r7_eight_bits_select_by_the_rounded_tensors": {
        "block_scores_kernel", "pick_kernel", "largest_kernel", "stretch_kernel",
    },
}  # fmt: skip
BY_64 = replace(  # a part of a tile, one tile, several; no scored block, some, more than k
    RAGGED, config=msa.MSAConfig(block_size=64, top_k=3, sink_blocks=1), dtype="bfloat16",
    sequences=msa.Sequences((0, 37, 37, 40, 337), (0, 500, 500, 700, 2000)), dims=(64, 64, 64),
)  # fmt: skip
HOPPER_CASES = {
    "ragged": BY_64,
    "one block": replace(BY_64, config=msa.MSAConfig(block_size=64, top_k=1)),
    "five groups": replace(BY_64, groups=5, config=msa.MSAConfig(block_size=128, top_k=2)),
    "float16 of 128": replace(BY_64, dtype="float16", dims=(128, 128, 128)),
    "maxima": replace(BY_64, sequences=msa.Sequences((0, 3, 50), (0, 20_000, 40_000))),
    "all places": replace(BY_64, config=msa.MSAConfig(block_size=64, top_k=65)),
}  # fmt: skip
WALK_CHECKS = {
    "r9_every_loop_order_is_the_definition": {"hopper_walk_kernel", "union_kernel"},
}
CHUNK_KERNEL = "hopper_chunk_kernel"  # KV-outer, for CHUNK_GROUPS only
WALK_BASE = replace(TUNED, dtype="bfloat16", picks=Picks("random", 1))
WALK_CASES = {
    "one sequence": WALK_BASE,
    "ragged": replace(  # a part of a tile, one tile, several; a partial last block
        WALK_BASE, config=msa.MSAConfig(block_size=128, top_k=3),
        sequences=msa.Sequences((0, 37, 37, 40, 140), (0, 500, 500, 700, 2000)),
    ),
    "float16 of three heads": replace(WALK_BASE, dtype="float16", group=3),
    "eight heads": replace(WALK_BASE, dtype="float16", group=8),
    "long unions": replace(
        WALK_BASE, sequences=msa.Sequences.one(60, 3000), picks=Picks("spread", 2)
    ),
}  # fmt: skip
KEY_CHECKS = {
    "r18_gradients_in_every_dtype": {
        "hopper_key_gradients_kernel", "hopper_query_gradients_kernel", "sum_items_kernel",
    },
}  # fmt: skip
KEY_CASES = {
    "one sequence": WALK_BASE,
    "ragged": WALK_CASES["ragged"],
    "float16 of eight heads": replace(WALK_CASES["ragged"], dtype="float16", group=8),
    "64 heads": replace(WALK_BASE, group=64),
}
SCORES = {
    "few": ScoresCase(msa.MSAConfig(16, 3, 1), RAGGED.sequences, 2, Fill("ties", 0)),
    "many": ScoresCase(msa.MSAConfig(16, 5), msa.Sequences.one(3, 9700), 1, Fill("normal", 1)),
}
RUNS = [
    pytest.param(
        name, kernels, case, id=f"{name.partition('_')[0]}-{'+'.join(sorted(kernels))}-{label}"
    )
    for checks, cases in ((CHECKS, CASES), (SCORE_CHECKS, SCORES))
    for name, kernels in checks.items()
    for label, case in cases.items()
    if TRITON.domain.has(*PROPERTIES[name].needs)
]
HOPPER_RUNS = [
    pytest.param(subject, name, case, id=f"hopper-{name.partition('_')[0]}-{label}")
    for tested, checks, cases in (
        (HOPPER, HOPPER_CHECKS, HOPPER_CASES), (WALK, WALK_CHECKS, WALK_CASES),
        (WALK, KEY_CHECKS, KEY_CASES),
    )
    for subject in tested
    for name in checks
    for label, case in cases.items()
]  # fmt: skip
GLUON = not kernel_choice.is_older(triton.__version__, kernel_choice.TRITON)
MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(triton_impl.__path__, "msa.triton_impl.")
    if GLUON or "hopper" not in info.name
]
KERNELS = {name: m for m in MODULES for name in vars(m) if name.endswith("_kernel")}


class Recorder:
    """A kernel that records its launches."""

    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.add(self.name)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched so far."""
    names = set()
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Recorder(vars(module)[name], name, names))
    return names


@pytest.mark.parametrize(("name", "kernels", "case"), RUNS)
def test_kernels(name, kernels, case, launched):
    PROPERTIES[name].check(TRITON, case)
    nothing_to_choose = case.config.forced_blocks == case.config.top_k
    assert kernels - ({"scan_kernel"} if nothing_to_choose else set()) <= launched


@pytest.mark.parametrize(("subject", "name", "case"), HOPPER_RUNS)
def test_hopper_kernels(subject, name, case, launched):
    PROPERTIES[name].check(subject, case)
    nothing_to_choose = case.config.forced_blocks == case.config.top_k
    left_out = {"block_scores_kernel"} if nothing_to_choose else set()
    checks = WALK_CHECKS | KEY_CHECKS if subject in WALK else HOPPER_CHECKS
    in_chunks = name in WALK_CHECKS and case.group in kernel_choice.CHUNK_GROUPS
    assert (checks[name] | ({CHUNK_KERNEL} if in_chunks else set())) - left_out <= launched


def in_pages(case):
    """The pages in use are the last ones, and the table ends with the last block."""
    return PagedCase(case, (True,) * case.sequences.batch, seed=3, spare_pages=0, spare_columns=0)


WIDENING = {"widen_kernel", "mark_pages_kernel"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("eight", [False, True])
def test_prefilling(case, eight, launched):
    if eight:
        rule = "r12_prefilling_8_bits_means_numbers_times_factors"
        PROPERTIES[rule].check(TRITON, EightBits(in_pages(case)))
    else:
        PROPERTIES["r2_prefilling_is_the_same_rule"].check(TRITON, in_pages(case))
    scanned = {"scan_kernel"} if case.config.forced_blocks < case.config.top_k else set()
    assert {"walk_kernel", "chunk_kernel"} | scanned <= launched
    assert ("widen_kernel" in launched) == (eight and case.dtype != "float32")


@pytest.mark.parametrize(
    ("subject", "case"),
    [pytest.param(s, c, id=f"{s.name}-{label}")
     for tested, cases in ((HOPPER, HOPPER_CASES), (WALK, WALK_CASES))
     for s in tested for label, c in cases.items()],
)  # fmt: skip
def test_hopper_prefilling(subject, case, launched):
    PROPERTIES["r2_prefilling_is_the_same_rule"].check(subject, in_pages(case))
    scored = case.config.forced_blocks < case.config.top_k
    wanted = {"block_scores_kernel"} if scored else set()
    if subject in WALK:
        in_chunks = case.group in kernel_choice.CHUNK_GROUPS
        wanted |= {"hopper_walk_kernel"} | ({CHUNK_KERNEL} if in_chunks else set())
    assert wanted <= launched


LOSS_CASES = {  # sequences, groups, heads of a group, float16
    "one sequence": (msa.Sequences.one(150, 150), 1, 16, False),
    "ragged": (msa.Sequences((0, 37, 37, 40, 73), (0, 200, 200, 330, 470)), 2, 8, True),
    "64 heads": (msa.Sequences.one(20, 300), 1, 64, False),
}


@pytest.mark.parametrize("name", LOSS_CASES if HOPPER else [])
@pytest.mark.parametrize("known", [False, True])
def test_hopper_loss(name, known, launched):
    sequences, groups, group, half = LOSS_CASES[name]
    dtype, config = torch.float16 if half else torch.bfloat16, msa.MSAConfig(128, 2)
    q, k, q_idx, k_idx = (
        torch.randn(*shape, 128, device="cuda").to(dtype)
        for shape in ((sequences.total_q, groups * group), (sequences.total_k, groups),
                      (sequences.total_q, groups), (sequences.total_k,))
    )  # fmt: skip
    selection = triton_impl.select_fused(q_idx, k_idx, sequences, config)
    lse = triton_impl.attend_selection(q, k, k, selection, 128**-0.5).lse if known else None
    leaves = [x.requires_grad_() for x in (q_idx, k_idx)]
    given = (q, k, *leaves, selection, sequences, config, lse)
    loss = triton_impl.align_index(*given, kernels="hopper")
    loss.backward()
    wanted = torch_impl.align_index(
        *(x.detach().double() for x in given[:4]), selection, sequences, config
    )
    assert abs(float(loss) - float(wanted)) <= 1e-4 * float(wanted)
    assert "hopper_loss_kernel" in launched


DECODING = {"append_kernel", "page_scores_kernel", "page_attend_kernel"}


@pytest.mark.parametrize("eight", [(), ("k_idx",), ("k", "v", "k_idx")] if CUDA else [()])
@pytest.mark.parametrize(("dims", "block"), [((3, 20, 12, 9), 16), ((16, 128, 128, 128), 128)])
def test_decoding(eight, dims, block, launched):
    """Steps of one and of two tokens over the border of a page, with an empty slot between two
    others.
    The pages in use are the last ones, and the table ends with the last block.
    """
    group, dim, dim_v, dim_i = dims
    dtype = torch.bfloat16 if CUDA else torch.float32
    random = torch.Generator(TRITON.device).manual_seed(0)

    def normal(*shape):
        made = torch.randn(shape, generator=random, device=TRITON.device)
        return made.to(dtype)

    pages = {"k": normal(8, block, 2, dim), "v": normal(8, block, 2, dim_v),
             "k_idx": normal(8, block, dim_i)}  # fmt: skip
    pages |= {name: pages[name].to(torch.float8_e4m3fn) for name in eight}
    pool = msa.PagePool(*pages.values(), batch=3, pages_per_sequence=4)
    new = [normal(2, 3 * block + 5, *x.shape[2:]) for x in pages.values()]
    pool.append([2, 0], *new)
    for n in (1, 2, block - 8):
        pool.reserve([2, 0], n)
        msa.append_tokens(pool.cache, *(normal(3, n, *x.shape[2:]) for x in pages.values()))
        n = min(n, 2)
        q, q_idx = normal(3, n, 2 * group, dim), normal(3, n, 2, dim_i)
        config = msa.MSAConfig(block, top_k=2)
        found, want = (
            msa.decode(q, q_idx, pool.cache, config=config, backend=b) for b in ("triton", "torch")
        )
        torch.testing.assert_close(found.lse, want.lse, rtol=0, atol=2e-3)
        torch.testing.assert_close(found.out, want.out, rtol=0, atol=0.04)
    assert pool.cache.lengths.tolist() == [4 * block, 0, 4 * block] == pool.lengths
    on_hopper = HOPPER and "k_idx" in eight and block == 128
    scores = "hopper_page_scores_kernel" if on_hopper else "page_scores_kernel"
    assert launched >= {"append_kernel", scores, "page_attend_kernel"}


def test_buffers_that_overflow_are_cut_back(monkeypatch, launched):
    """One program scans 80 blocks; the best come last before the cut, none after it."""
    monkeypatch.setattr(selection, "PROGRAMS", 1)
    selection.plan_scan.cache_clear()
    blocks = torch.arange(80.0, device=TRITON.device)
    k_idx = torch.where(blocks < selection.CAPACITY, blocks, 0.0).repeat_interleave(16)[:, None]
    q_idx, sequences = torch.ones(3, 1, 1, device=TRITON.device), msa.Sequences.one(3, len(k_idx))
    got = selection.select_fused(q_idx, k_idx, sequences, msa.MSAConfig(16, 4)).indices
    selection.plan_scan.cache_clear()
    assert got.tolist() == [[[61, 62, 63, 79]]] * 3
    assert "scan_kernel" in launched


def test_long_rows_are_united_by_looking_up(monkeypatch, launched):
    """The kernel for many blocks per query, on rows of few."""
    monkeypatch.setattr(tile_union, "PAIRED", 0)
    for case in CASES.values():
        PROPERTIES["r9_the_union_of_a_tile_means_the_selection"].check(TRITON, case)
    assert "long_union_kernel" in launched


def test_no_kernel_is_left_out():
    named = {"long_union_kernel"}.union(
        *CHECKS.values(), *SCORE_CHECKS.values(), DECODING, WIDENING
    )
    checks = HOPPER_CHECKS | WALK_CHECKS | KEY_CHECKS
    if GLUON:
        named.update(*checks.values())
        named.update({"hopper_loss_kernel", "hopper_page_scores_kernel", CHUNK_KERNEL})
    assert named == set(KERNELS)
