"""`msa verify --target`: it reports the rules that hold and finds those that do not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import targets
import torch

import msa
from msa.conformance import Domain, all_properties, make_target, seeds, verify_target
from msa.conformance.cases import Case
from msa.conformance.foreign import like_msa, like_official, like_transformers, like_vllm
from msa.conformance.foreign.bad_target import BadTarget, find_target
from msa.conformance.foreign.conventions import CONVENTIONS
from msa.conformance.foreign.target import TargetOptions
from msa.conformance.properties import RULES
from msa.conformance.tolerances import Disagreement
from msa.integrations import layouts

EVERY = {f"R{n}" for n in range(1, 22)}
SELECTION = {"R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R19"}
ATTENTION = {"R1", "R2", "R3", "R9", "R10", "R11", "R12", "R19"}
RULES_OF = {"select": SELECTION, "sparse_attention": ATTENTION, "attention": SELECTION | ATTENTION}
HERE = "msa.conformance.own_targets"
THERE = "msa.integrations.targets"


def tried(function, examples=3, rules=(), **options):
    """Results of a target, by function or by name."""
    found = find_target(function) if isinstance(function, str) else function
    return verify_target(make_target(found, TargetOptions(**options)), rules, examples)


def verdicts(results):
    """The rules that hold, and those that fail; the other rules are not tested."""
    assert {r.rule for r in results} == EVERY
    asked = {r.rule for r in results if r.claimed}
    failing = {r.rule for r in results if not r.passed}
    assert all(r.tried > 0 for r in results if r.claimed)
    return asked - failing, failing


# -- the project's own ----------------------------------------------------------------------------
OWN = [
    *((f"reference_{kind}", kind, {}) for kind in RULES_OF),
    *((f"torch_{kind}", kind, {"tensors": "cpu"}) for kind in RULES_OF),
]


@pytest.mark.parametrize(("name", "kind", "options"), OWN, ids=[name for name, _, _ in OWN])
def test_own_backends_hold(name, kind, options):
    results = tried(f"{HERE}:{name}", 2, kind=kind, **options)
    assert verdicts(results) == (RULES_OF[kind], set()), [r.error for r in results if r.error]


def test_kernels_hold_at_the_block_sizes_that_they_know():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"kind": "attention", "tensors": device, "block_sizes": (16,)}
    results = tried(f"{HERE}:triton_attention", 1, ("R8", "R10"), **options)
    assert [(r.claimed, r.error) for r in results] == [(True, "")] * 2


# -- transformers ---------------------------------------------------------------------------------
def test_what_holds_of_transformers_indexer():
    """NaN and ties as in torch.topk, +inf for the own block, blocks of slots, own block first."""
    pytest.importorskip("transformers")
    results = tried(f"{THERE}:transformers_select", convention="transformers")
    holds, fails = verdicts(results)
    assert holds - {"R1"} == {"R2", "R5", "R19"}  # in a pack it may choose otherwise among ties
    assert fails - {"R1"} == {"R3", "R4", "R6", "R7", "R8"}
    found_by_seeds = {r.name: r.bug for r in results if r.bug}
    assert found_by_seeds == {
        "r3_padding_on_the_left_shifts_no_block": "left padding",
        "r4_a_nan_score_is_never_preferred": "NaN scores",
        "r6_nothing_outranks_a_forced_block": "NaN scores",
        "r7_integer_scores_select_the_same_everywhere": "tied scores",
        "r8_a_selection_is_canonical": "index order",
    }


def test_what_holds_of_transformers_attention():
    pytest.importorskip("transformers")
    options = {"convention": "transformers", "kind": "sparse_attention"}
    results = tried(f"{THERE}:transformers_sparse_attention", **options)
    assert verdicts(results) == (ATTENTION - {"R10"}, set())  # it has no lse


# -- other conventions ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("function", "convention", "unordered"),
    [
        (targets.vllm_select, "vllm", True),
        (targets.official_select, "official", False),
        (targets.transformers_select, "transformers", False),
    ],
)
def test_an_honest_selection_holds_in_every_convention(function, convention, unordered):
    results = tried(function, 3, convention=convention)
    order = {"R8"} if unordered else set()
    assert verdicts(results) == (SELECTION - order, order), [r.error for r in results if r.error]


@pytest.mark.parametrize(
    ("function", "convention", "lse"),
    [
        (targets.vllm_sparse_attention, "vllm", set()),
        (targets.official_sparse_attention, "official", {"R10"}),
    ],
)
def test_an_honest_attention_holds_in_every_convention(function, convention, lse):
    results = tried(function, 3, convention=convention, kind="sparse_attention")
    found = verdicts(results)
    assert found == (ATTENTION - {"R10"} | lse, set()), [r.error for r in results if r.error]


def test_ids_go_in_as_the_convention_has_them(monkeypatch):
    """vLLM's attention counts ids by position, so it must never get an empty place."""
    seen = []
    monkeypatch.setattr(layouts, "to_vllm", lambda s, to=layouts.to_vllm: seen.append(s) or to(s))
    tried(targets.vllm_sparse_attention, 12, ("R9",), convention="vllm", kind="sparse_attention")
    assert len(seen) > 12
    for selection in seen:
        block = selection.block_size
        for p, row in zip(selection.sequences.positions(), selection.indices):
            assert ((row >= 0).sum(-1) == min(selection.top_k, p // block + 1)).all()


# -- seeds ----------------------------------------------------------------------------------------
PLANTED = [
    ("tied scores", targets.ties_to_the_higher_id, {}),
    ("NaN scores", targets.nan_sorts_first, {}),
    ("index order", targets.best_score_first, {}),
    ("layout aliasing", targets.groups_and_queries_swapped, {}),
    ("stale lengths", targets.new_blocks_not_scored, {}),
    ("left padding", targets.blocks_of_slots, {"convention": "transformers"}),
    ("-1 dereferenced", targets.padding_is_block_0, {"kind": "sparse_attention"}),
    ("index order", targets.first_id_is_masked, {"kind": "sparse_attention"}),
    ("layout aliasing", targets.heads_interleaved, {"kind": "sparse_attention"}),
    ("stale lengths", targets.newest_token_missing, {"kind": "sparse_attention"}),
    ("tail-block garbage", targets.tail_read_in_full, {"kind": "sparse_attention"}),
]


@pytest.mark.parametrize(("bug", "function", "options"), PLANTED,
                         ids=[function.__name__ for _, function, _ in PLANTED])  # fmt: skip
@pytest.mark.parametrize("sizes", [{}, {"block_sizes": (128,), "head_sizes": (64,)}],
                         ids=["any", "128"])  # fmt: skip
def test_a_known_kind_of_bug_is_found_by_its_seed(bug, function, options, sizes):
    target = make_target(function, TargetOptions(**options, **sizes))
    domain = target.subject.domain
    found = []
    for prop in target.asked(list(all_properties())):
        for case in seeds.seeds_of(prop, domain):
            if seeds.bug_of(case, domain) == bug:
                try:
                    prop.check(target.tried_for(prop.rule), case)
                except AssertionError:
                    found.append(prop.name)
    assert found, f"the seeds let {function.__name__} pass"


def test_what_is_honest_passes_all_seeds():
    attention, selection = {"kind": "sparse_attention"}, {"convention": "transformers"}
    pairs = (targets.honest, attention), (targets.transformers_select, selection)
    for function, options in pairs:
        target = make_target(function, TargetOptions(**options))
        count = 0
        for prop in target.asked(list(all_properties())):
            for case in seeds.seeds_of(prop, target.subject.domain):
                prop.check(target.tried_for(prop.rule), case)
                count += 1
        assert count >= 5


def test_seeds_come_first_and_name_the_bug():
    results = tried(targets.ties_to_the_higher_id, 1, ("R7",))
    failed = next(r for r in results if not r.passed)
    assert failed.bug == "tied scores"
    assert failed.tried <= len(seeds.seeds(Domain()))


def test_every_seed_has_a_property_and_a_planted_bug():
    known = {p.name for p in all_properties()}
    for seed in seeds.seeds(Domain()):
        assert set(seed.properties) <= known
    assert {s.bug for s in seeds.seeds(Domain())} == {bug for bug, _, _ in PLANTED}


# -- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing:f"], "must name a module that can be imported, got 'nothing'"),
        (["targets:nothing"], "must name an attribute of targets, got 'nothing'"),
        (["targets"], "must be package.module:function, got 'targets'"),
        (["targets:not_a_function"], "must name something callable, got targets:not_a_function"),
        (["targets:wrong_shape"],
         "indices must have shape [Tq, Hkv, k] = [33, 2, 2], got [2, 33, 2]"),
        (["targets:wrong_dtype", "--kind", "sparse_attention"],
         "out must have shape [Tq, Hq, Dv] = [33, 4, 16], got [33, 2]"),
        (["targets:honest"], "target must take the call f(q_idx [Tq, Hkv, Di], k_idx"),
        (["targets:honest", "--convention", "vllm", "--kind", "attention"],
         "kind of convention vllm must be one of select, sparse_attention, got 'attention'"),
        (["targets:vllm_select", "--convention", "vllm", "--tensors", "numpy"],
         "tensors of convention vllm must be one of cpu, cuda, got 'numpy'"),
        (["targets:honest", "--backend", "torch"], "backend must not come with --target"),
        (["targets:honest", "--dtypes", "int8"], "dtype must be one of float64, float32"),
        (["targets:honest", "--rule", "R99"], "rule must be one of R1 to R21, got R99"),
        (["targets:honest", "--convention", "jax"], "jax"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_says_why(arguments, said, capsys):
    from msa.cli import main

    try:
        code = main(["verify", "--target", *arguments])
    except SystemExit as stop:  # tyro's own message
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert said in re.sub(r"\s+", " ", printed.out + printed.err)


def test_options_of_a_target_need_one(capsys):
    from msa.cli import main

    assert main(["verify", "--convention", "vllm"]) == 2
    assert "convention must come with --target" in capsys.readouterr().err


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadTarget, match="needs no_such_library, which is not installed"):
        find_target("needy:f")


def test_exit_codes_and_the_report_of_a_file_in_this_folder(tmp_path):
    """The target is in a file of the current folder, as a user has it."""
    (tmp_path / "mine.py").write_text(
        "import msa\n"
        "def right(q_idx, k_idx, **more):\n    return msa.select(q_idx, k_idx, **more)\n"
        "def wrong(q_idx, k_idx, **more):\n    return right(-q_idx, k_idx, **more)\n"
    )
    command = (  # as a console script, whose own folder stands in place of this one
        "import sys; sys.path.remove(''); from msa.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for name, code in (("right", 0), ("wrong", 1)):
        done = subprocess.run(
            [sys.executable, "-c", command, "verify", "--target", f"mine:{name}",
             "--rule", "R5", "R13"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "not asked: R13" in done.stdout
        assert ("fail:      R5" in done.stdout) == (name == "wrong")


# -- the table ------------------------------------------------------------------------------------
def test_every_adapter_is_in_the_table():
    named = {
        name
        for module in (like_msa, like_transformers, like_vllm, like_official)
        for name in vars(module)
        if re.match("(msa|transformers|vllm|official)_(sel|sp|att)", name)
    }
    used = {c.adapter.__name__ for conv in CONVENTIONS.values() for c in conv.signatures.values()}
    assert named == used


def test_rules_have_the_names_of_the_spec():
    spec = (Path(__file__).parent.parent / "docs" / "spec.md").read_text()
    assert dict(re.findall(r"^- \*\*(R\d+) ([\w\s-]+)[.*]", spec, re.M)) == RULES


def test_where_all_blocks_are_forced_another_one_is_no_rounding():
    """There is no score of a k-th block to compare with; the message is that of the rule."""
    (prop,) = (
        p for p in all_properties() if p.name == "r7_real_scores_differ_only_within_rounding"
    )
    config = msa.MSAConfig(block_size=2, top_k=2, local_blocks=2)
    case = Case(config, msa.Sequences.one(1, 8), 1, 1, (2, 2, 2), "float32")
    found = make_target(targets.local_blocks_forgotten, TargetOptions())
    with pytest.raises(Disagreement, match=r"must have \[2, 3\] up to rounding, got \[0, 3\]"):
        prop.check(found.subject, case)
