"""The ladder's rungs in Gluon: each number in their text is that of a results file."""

from __future__ import annotations

import json

import pytest

from benchmarks.reading import RESULTS
from docs.hooks.measured import ROOT

TEXT = " ".join((ROOT / "docs" / "ladder.md").read_text().split())
SELECTION = json.loads((RESULTS / "selection_hopper_h200.json").read_text())
GRADIENTS = json.loads((RESULTS / "gradients_hopper_h200.json").read_text())
WALK = json.loads((RESULTS / "walk_hopper_h200.json").read_text())


def select(shape, index="bf16", kernels="hopper"):
    """Milliseconds of a selection, or of a part of it."""
    rows = SELECTION["select"]
    return next(r for r in rows if (r["shape"], r["index"]) == (shape, index))[kernels]["ms"]


def topk(kernels):
    """Milliseconds of the top-k for the three shapes of the table."""
    shapes = ((65536, 8192), (131072, 1024), (524288, 4096))
    rows = {(r["rows"], r["blocks"]): r for r in SELECTION["topk"] if r["maxima"]}
    return ", ".join(f"{rows[shape][kernels]['ms']:.2f}" for shape in shapes)


def scores(shape, maxima):
    """Milliseconds of the bfloat16 scores of a shape."""
    wanted = shape, "bf16", maxima
    rows = SELECTION["scores"]
    return next(r["ms"] for r in rows if (r["shape"], r["index"], r["maxima"]) == wanted)


def wrong_runs(version):
    """Wrong runs and all runs of the race."""
    rows = [row for row in SELECTION["race"] if row["version"] == version]
    return sum(row["wrong_runs"] for row in rows), sum(row["runs"] for row in rows)


def walk(n, keep):
    """The row of a walk."""
    return next(row for row in WALK["walk"] if (row["n"], row["keep"]) == (n, keep))


def useful(version, keep=0.95):
    """Useful TFLOP/s of 16K queries."""
    return f"{walk(16384, keep)[version]['useful_tflops']:.0f}"


def probe(without, n):
    """The probe of the hopper walk at ρ = 0.95."""
    wanted = without, n, 0.95, "hopper"
    keys = ("without", "n", "keep", "version")
    return next(row for row in WALK["probes"] if tuple(row[key] for key in keys) == wanted)


def saved(without):
    """The share of the time at 128K that a part costs, in percent."""
    return 100 * (1 - probe(without, 131072)["ms"] / walk(131072, 0.95)["hopper"]["ms"])


def whole(n, keep, way):
    """Milliseconds of the whole attention."""
    wanted = n, n, keep
    rows = WALK["whole"]
    return next(row[way] for row in rows if (row["n_q"], row["n_k"], row["keep"]) == wanted)


def ahead(n, keep):
    """By how many percent the hopper walk with its unions is faster than portable "auto"."""
    row = walk(n, keep)
    return 100 * (1 - (row["hopper"]["ms"] + row["union_of_8"]["ms"]) / row["portable_auto"]["ms"])


def above(n, keep, way="hopper", than="portable"):
    """By how many percent one walk takes longer than another."""
    row = walk(n, keep)
    return 100 * (row[way]["ms"] / row[than]["ms"] - 1)


def union_gain(n, keep=0.95):
    """How much whole unions gain over portable "auto", in percent of its time."""
    return 100 * (1 - whole(n, keep, "hopper union") / whole(n, keep, "portable auto"))


def told():
    """The parts of sentences that hold a number, as the results have it."""
    fp8 = "fp8_e4m3"
    differ = [next(r["first_version_different_rows"] for r in SELECTION["select"]
                   if (r["shape"], r["index"]) == (shape, "bf16"))
              for shape in ("128K", "1649 of 136K")]  # fmt: skip
    mended, first = wrong_runs("mended"), wrong_runs("first")
    quantise = [select(shape, fp8, "quantise") for shape in ("8K", "32K", "16K of 1M")]
    shares = [row["share"] for row in SELECTION["scores"] if row["index"] == fp8
              and row["shape"] in ("32K", "128K", "16K of 1M", "16384 of 48K")]  # fmt: skip
    calls = [{row["calls"] for row in SELECTION["repetitions"] if row["index"] == index}
             for index in ("bf16", fp8)]  # fmt: skip
    shapes = {row["shape"] for row in SELECTION["repetitions"]}
    checks = WALK["checks"]
    million = f"{select('16K of 1M', kernels='portable'):.1f} and "
    million += f"{select('16K of 1M', fp8, 'portable'):.1f}"
    yield from (
        f"128K {select('128K', kernels='portable'):.1f} ms, in 8 bits "
        f"{select('128K', fp8, 'portable'):.2f}; 16K queries of 1M keys {million}",
        f"| {topk('first_version')} |",
        f"{select('32K', fp8, 'first_version'):.3f} ms, before "
        f"{select('32K', fp8, 'portable'):.3f}",
        f"{differ[0]} rows of 128K and {differ[1]} rows of 1,649 behind 136K",
        f"{mended[0]} of {mended[1]} runs, before {first[0]} of {first[1]}",
        f"{scores('171 of 55K', True):.3f} in place of {scores('171 of 55K', False):.3f} ms",
        f"| {topk('hopper')} |",
        f"{select('8K', fp8, 'first_version'):.3f} → {select('8K', fp8):.3f} ms",
        f"{quantise[0]:.3f} of these {select('8K', fp8):.3f} ms",
        f"0.050 ms ({select('8K', fp8):.3f}), at 32K in 0.50 ({select('32K', fp8):.2f}) and for "
        f"16K queries of 1M in 15.2 ({select('16K of 1M', fp8):.1f})",
        f"{quantise[0]:.3f}, {quantise[1]:.3f} and {quantise[2]:.3f} ms",
        f"{min(shares):.2f} to {max(shares):.2f} of a plain product in 8 bits",
        f"on {SELECTION['checks']['cases']} shapes with ties",
        f"so were {calls[0].pop()} repetitions on each of five shapes ({calls[1].pop()} in 8 bits)",
        f"two programs on a multiprocessor | {useful('portable')} |",
        f"one block after another | {useful('plain')} |",
        f"{useful('three_consumers')}; at ρ = 0.8 {useful('three_consumers', 0.8)}, rung 1 "
        f"{useful('plain', 0.8)}",
        f"**{useful('hopper')}** | {probe('softmax', 16384)['useful_tflops']:.0f} if the softmax",
        f"64 keys a step | {useful('steps_of_64')} |",
        f"memory costs {saved('memory'):.0f} % and the softmax {saved('softmax'):.0f} %",
        f"it is {ahead(131072, 0.8):.1f} % faster",
        f"ρ = 0 it takes {1 - ahead(131072, 0.0) / 100:.1f} times as long",
        f"{above(131072, 0.8):.0f} % more than the portable walk at ρ = 0.8, and "
        f"{above(131072, 0.0):.0f} % more at ρ = 0",
        f"{checks['cases']} cases against float64 and the portable walk, {checks['reruns']} "
        f"repetitions with the same bits, {checks['short_shapes']} short ragged shapes",
        f"takes {whole(16384, 0.95, 'auto'):.2f} ms at 16K and ρ = 0.95, where the portable "
        f"kernels take {whole(16384, 0.95, 'portable auto'):.2f}, and "
        f"{whole(8192, 0.95, 'auto'):.2f} ms at 8K in place of "
        f"{whole(8192, 0.95, 'portable auto'):.2f}",
        f"gain {union_gain(32768):.0f} % and {union_gain(65536):.0f} % at ρ = 0.95, and lose "
        f"{-union_gain(32768, 0.0):.0f} % and {-union_gain(65536, 0.0):.0f} % at ρ = 0",
    )
    assert len(shapes) == 5


@pytest.mark.parametrize("words", list(told()))
def test_a_number_of_a_rung_is_that_of_its_run(words):
    assert words in TEXT


def test_gradients_did_what_the_ladder_says():
    """dK and dV reach the predicted rate at every length and ρ, three stages gain 1 to 2 %."""
    rates = [row["hopper"]["tflops"] for row in GRADIENTS["keys"]]
    assert min(rates) > 600 and max(rates) - min(rates) < 60
    gains = [
        100 * (1 - row["three_stages"]["ms"] / row["hopper"]["ms"])
        for row in GRADIENTS["keys"] if "three_stages" in row
    ]  # fmt: skip
    assert gains and 0.5 < min(gains) <= max(gains) < 4.5
    queries = {(row["n"], row["keep"]): row for row in GRADIENTS["queries"]}
    assert queries[131072, 0.95]["hopper"]["tflops"] < 560
    for row in queries.values():
        for name in ("one_wait", "stages_2_3", "stages_2_2"):
            assert name not in row or row[name]["ms"] > row["hopper"]["ms"]
    far = queries[131072, 0.0]
    assert far["mean_union_of_8"] / far["mean_union_of_4"] > 1.75
    assert 0.9 < far["portable"]["ms"] / far["hopper"]["ms"] < 1
    assert all(not run["different"] for run in GRADIENTS["checks"]["repeated_runs"])
