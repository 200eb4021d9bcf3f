"""`msa explain`: the example is drawn from real forms, alike on every backend."""

from __future__ import annotations

import json

import numpy as np
import pytest

from msa import cli, explain, reference


@pytest.fixture(scope="module")
def steps() -> list[explain.Step]:
    return explain.explain(explain.trace_example("reference"))


def test_every_form_is_shown_in_order(steps):
    forms = [step.form for step in steps]
    assert forms == [
        "BlockScores", "Selection", "ReverseIndex", "Schedule", "Partials", "Output", "TileUnion",
    ]  # fmt: skip


def test_each_picture_is_the_dense_mask(steps):
    mask = reference.mask_of(explain.trace_example("reference").selection)
    for step in steps[1:]:
        for r, picture in enumerate(step.pictures):
            read = np.array([[c not in " ·○" for c in row] for row in picture])
            assert (read == mask[:, r]).all(), step.form


def test_the_example_has_a_tie_and_the_lower_block_wins():
    trace = explain.trace_example("reference")
    assert trace.scores.values[9, 1, 0] == trace.scores.values[9, 1, 1]
    assert trace.selection.indices[9, 1].tolist() == [0, 2]


def test_a_changed_mask_is_not_called_unchanged():
    trace = explain.trace_example("reference")
    trace.reverse_index.query_ids[0] = 1  # query 1 twice, query 0 never
    with pytest.raises(ValueError, match="twice"):
        explain.explain(trace)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_json_holds_every_form(backend, capsys):
    assert cli.main(["explain", "--backend", backend, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown["trace"]) == {
        "scores", "selection", "reverse_index", "schedule", "partials", "output", "tile_union",
        "union_output",
    }  # fmt: skip
    assert shown["steps"][3]["facts"] == [
        "12 items for 40 edges; edges per item: [4, 4, 3, 4, 1, 4, 4, 4, 1, 4, 3, 4]"
    ]


def test_the_text_is_the_same_on_both_backends(capsys):
    shown = []
    for backend in ("reference", "torch"):
        assert cli.main(["explain", "--backend", backend]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown.append([line for line in lines if "from the dense" not in line])
    assert shown[0] == shown[1]


@pytest.mark.parametrize("arguments", [["nonsense"], ["demo"], ["demo", "nothing"]])
def test_an_unknown_command_is_an_error(arguments, capsys):
    assert cli.main(arguments) == 2
    assert " ".join(arguments) in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in ("explain", "verify", "demo digits"))
