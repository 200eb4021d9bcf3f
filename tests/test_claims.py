"""What pages say about speed in words, without numbers, holds in the committed results.

If one of these tests fails after a new run, the sentence that it names has to change.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.cases import MILLION, PERSISTENCE
from benchmarks.reading import at, best_dense, million_dense, over_million
from docs.hooks import measured
from docs.hooks.readme import best_name
from docs.hooks.standing import KEEP, gains, prompts
from docs.hooks.standing_steps import sparse
from msa.kernel_choice import LONGEST_WHOLE

PREFILL = measured.read("prefill")
WALK_ENDS = LONGEST_WHOLE * 128
"""Tokens up to which "auto" walks whole unions by the hopper kernel."""
SELECTIONS = [row["select"] for row in (*PREFILL["lengths"], *PREFILL["million"]["chunks"])]


def both_kinds():
    """The attention stages for which portable and hopper kernels were timed."""
    return [
        (row["n"], stage) for row in PREFILL["lengths"] for stage in row["attention"]
        if "portable_union" in stage
    ]  # fmt: skip


def test_hopper_selects_faster_on_every_shape():
    """README, msa/kernel_choice.py, chapter 10."""
    timed = [row for row in SELECTIONS if row.get("kernels") == "hopper"]
    for row in timed:
        for kind in ("bf16", "fp8_e4m3"):
            assert row[kind]["ms"] < row[f"portable_{kind}"]["ms"]
    assert len(timed) in (0, len(SELECTIONS))


def test_auto_is_at_least_as_fast_as_the_portable_kernels_on_short_prompts():
    """msa/kernel_choice.py, README, the ladder: the hopper walk is taken where it is faster."""
    for n, stage in both_kinds():
        if n <= WALK_ENDS:
            assert stage["auto"]["ms"] < stage["portable_auto"]["ms"]


def test_union_is_faster_than_auto_where_neighbours_agree():
    """The ladder, "What is still open"."""
    for row in PREFILL["lengths"]:
        if row["n"] > WALK_ENDS:
            assert at(row, 0.99)["union"]["ms"] < at(row, 0.99)["auto"]["ms"]


def test_the_union_decides_the_speed_of_the_walk_but_not_of_kv_outer():
    """Chapter 9, lowering/7: a short union is fast; KV-outer is alike for every ρ."""
    for row in prompts():
        walks = [at(row, keep)["union"]["tflops"] for keep in sorted(PERSISTENCE)]
        assert walks == sorted(walks)
        flat = [at(row, keep)["kv_outer"]["tflops"] for keep in PERSISTENCE]
        assert max(flat) < 1.1 * min(flat)
        assert at(row, KEEP)["union"]["ms"] < at(row, KEEP)["kv_outer"]["ms"]


def test_the_gain_grows_with_length():
    """The start page, chapter 1: "the ratio to dense attention, which grows with length"."""
    million = PREFILL["million"]
    fine = [gains(row)[0] for row in PREFILL["lengths"]]
    fine.append(million_dense(million) / million["whole_keep_0.95"]["bf16"]["ms"])
    assert all(a < b for a, b in pairwise(fine))
    steps = [
        row["dense"]["ms"] / sparse(row, KEEP)["step"]["ms"]
        for row in measured.read("train")["steps"]
    ]
    assert all(a < b for a, b in pairwise(steps))


def test_msa_is_ahead_from_8k_tokens_on():
    """Chapter 1: "MSA is faster beyond a few thousand tokens, and not below"."""
    assert all(gains(row)[0] > 1 for row in prompts())
    assert gains(PREFILL["lengths"][0])[0] < 1.5


def test_selection_is_most_of_a_million_tokens():
    """Chapters 10 and 13: most of a million tokens goes into selection."""
    million = PREFILL["million"]
    select = over_million(million, lambda chunk: chunk["select"]["bf16"]["ms"])
    assert 0.5 < select / million["whole_keep_0.95"]["bf16"]["ms"] < 1


def test_top_k_is_faster_than_torchs():
    """lowering/2, the ladder."""
    for row in PREFILL["topk"]:
        assert row["ours"]["ms"] < row["torch"]["ms"]
        assert row.get("hopper", row["ours"])["ms"] <= row["ours"]["ms"]


@pytest.mark.parametrize("form", ["bf16", "fp8 index"])
def test_decoding_is_faster_than_dense_and_faster_in_8_bits(form):
    """README, chapter 14. The README names one dense kernel for all shapes."""
    rows = measured.read("decode")["steps"]
    assert {(row["batch"], row["context"]) for row in rows} >= {(1, 2**17), (4, MILLION)}
    for row in rows:
        assert row[form]["step"]["us"] < best_dense(row)
        assert row["fp8 index"]["step"]["us"] < row["bf16"]["step"]["us"]
    assert len({best_name(row["dense"]) for row in rows}) == 1


def test_in_transformers_each_step_saves_time_and_memory():
    """howto/minimax-m3, howto/integrate: enable() before register() before transformers' own."""
    ways = measured.read("integrations")["lengths"]["ways"]
    rows = [{row["n"]: row for row in ways[way]} for way in ("enabled", "msa", "sdpa", "eager")]
    for quick, slow in pairwise(rows):
        both = [n for n in quick if "time" in quick[n] and "time" in slow.get(n, {})]
        assert both
        assert all(quick[n]["time"]["ms"] < slow[n]["time"]["ms"] for n in both)
        assert all(quick[n]["gib"] <= slow[n]["gib"] * 1.01 for n in both)
    assert all("time" in row for row in rows[0].values())
    for row in measured.read("integrations")["operators"]:
        assert row["captured"]["ms"] < row["function"]["ms"]
