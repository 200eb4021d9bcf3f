"""`msa explain`: the example is drawn from the forms of a backend, and is the same on each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from msa import cli, explain, kernel_choice, loop_order, reference
from msa.ir import Selection, Sequences
from msa.triton_impl.tile_union import split_tiles


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


def test_the_loop_order_is_chosen_by_the_measured_rule(capsys):
    assert cli.main(["explain", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["loop_order"]
    assert (shown["walk_all"], shown["walk_pairs"]) == (loop_order.WALK_ALL, loop_order.WALK_PAIRS)
    assert (shown["min_edges"], shown["top_k"]) == (loop_order.MIN_EDGES, 2)
    assert [tile["union"] for tile in shown["tiles"]] == [1, 1, 2, 2, 3, 3]
    assert (shown["mean_union"], shown["readers"]) == (2.0, 8.0)
    assert shown["tiles"][-1] == {
        "queries": [8, 11], "group": 1, "union": 3, "order": "walks its whole union",
    }  # fmt: skip
    assert cli.main(["explain"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "up to 1.75·k walks its whole union up to 3·k walks the blocks of 2 queries" in text
    assert "a mean union is 2.00 blocks = 1.00·k" in text


def test_the_choice_of_kernels_is_told(capsys):
    assert cli.main(["explain", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["kernels"]
    assert shown["chosen"] == kernel_choice.choose("auto", kernel_choice.usual_call())
    assert (shown["chosen"] == "hopper") == (shown["reason"] == "")
    assert shown["rule"][0].startswith("compute capability: 9.x")
    assert "D and Dv: 128" in shown["walk_rule"]
    assert "new queries times groups: at most 32" in shown["page_rule"]
    assert "query heads of a group: 8, 16, 32 or 64" in shown["key_rule"]
    assert "keys and values of the sequences: at most 1 GiB in 16 bits" in shown["wide_rule"]
    assert "D and Di: 128" in shown["loss_rule"]
    assert cli.main(["explain"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert f"here, in bfloat16: {shown['chosen']}" in text and "block_size 64 or 128" in text
    assert "query heads of a group 9 to 64" in text
    assert "keys for each query at most 400" in text
    assert "dtype of q_idx float16 or bfloat16" in text
    assert text.count("query heads of a group 8, 16, 32 or 64") == 2 and "D and Di 128" in text
    if not torch.cuda.is_available():
        assert "q_idx must be on a GPU of compute capability 9.x" in text


@pytest.mark.parametrize("readers", [2.0, 1000.0])
def test_the_rule_in_words_is_that_of_the_kernels(readers):
    """For unions of all lengths, the split leaves the blocks of few queries to KV-outer."""
    top_k, tile, groups, tiles = 4, 4, 1, 24
    random = np.random.default_rng(0)
    wide = [random.choice(16, size=(tile, 2 + t // 2), replace=True) for t in range(tiles)]
    rows = [
        [sorted(set(query.tolist()))[:top_k] + [-1] * top_k for query in blocks] for blocks in wide
    ]
    ids = np.array([[row[:top_k] for row in tile_rows] for tile_rows in rows], np.int32)
    lengths = set()
    sequences = Sequences.one(tile * tiles, 16 * 32)
    chosen = Selection(torch.from_numpy(ids.reshape(-1, groups, top_k)), sequences, 32)
    limits = loop_order.limits(top_k) if readers >= loop_order.MIN_EDGES else None
    remote = split_tiles(chosen, tile, limits).remote
    for t in range(tiles):
        blocks, shared = np.unique(ids[t][ids[t] >= 0], return_counts=True)
        least = loop_order.least_shared(len(blocks), top_k, readers)
        lengths.add(least)
        left = [] if remote is None else remote.indices[t * tile : (t + 1) * tile].unique().tolist()
        assert [b for b in left if b >= 0] == blocks[shared < least].tolist()
    assert lengths == ({1, 2, 3} if readers == 1000.0 else {1})


def test_the_text_is_the_same_on_both_backends(capsys):
    shown = []
    for backend in ("reference", "torch"):
        assert cli.main(["explain", "--backend", backend]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown.append([line for line in lines if "from the dense" not in line])
    assert shown[0] == shown[1]


@pytest.mark.parametrize("arguments", [["nonsense"], ["bench"], ["bench", "nothing"]])
def test_an_unknown_command_is_an_error(arguments, capsys):
    assert cli.main(arguments) == 2
    assert " ".join(arguments) in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)
