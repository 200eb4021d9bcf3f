"""The tables of the ladder that show the hopper kernels, from the runs in which they were made."""

from __future__ import annotations

from docs.hooks.curves import table
from docs.hooks.measured import read, record

RESULTS = "selection_hopper_h200"
WALK = "walk_hopper_h200"
GRADIENTS = "gradients_hopper_h200"
ORDERS = "orders_hopper_h200"
STEPS = "steps_hopper_h200"
LOSS = "loss_hopper_h200"
VERSIONS = {
    "portable": "portable", "hopper": "**hopper**", "plain": "not overlapped",
    "three_consumers": "three consumers, 64 keys", "steps_of_64": "overlapped, 64 keys",
}  # fmt: skip
INDEX = {"bf16": "bf16", "fp8_e4m3": "8 bits"}


def selection() -> str:
    """Milliseconds of a selection by the portable kernels and by both versions for Hopper."""
    found = read(RESULTS)
    rows = [
        (row["shape"], INDEX[row["index"]], ms(row["portable"]), ms(row["first_version"]),
         f"**{ms(row['hopper'])}**", f"{row['portable']['ms'] / row['hopper']['ms']:.2f}×")
        for row in found["select"]
    ]  # fmt: skip
    columns = ("queries of keys", "index", "portable", "first version", "hopper", "gain")
    return f"{table(columns, rows)}\n\n{record(RESULTS)}"


def scores() -> str:
    """The rate of the score kernel, and its share of a plain product in the same run."""
    rows = [
        (row["shape"], INDEX[row["index"]], "written" if row["maxima"] else "not written",
         f"{row['tflops']:.0f}", f"{row['share']:.2f}")
        for row in read(RESULTS)["scores"]
    ]  # fmt: skip
    columns = ("queries of keys", "index", "maxima of pieces", "TFLOP/s", "share of a product")
    return table(columns, rows)


def topk() -> str:
    """Milliseconds of the top-k alone, over scores that are there."""
    rows = [
        (f"{row['rows']:,}", f"{row['blocks']:,}", row["k"], ms(row["first_version"]),
         f"**{ms(row['hopper'])}**")
        for row in read(RESULTS)["topk"] if "first_version" in row
    ]  # fmt: skip
    return table(("rows", "scores each", "k", "first version", "hopper"), rows)


def race() -> str:
    """How many of the repeated runs of the score kernel had a wrong score, by version."""
    found = read(RESULTS)["race"]
    shapes = list(dict.fromkeys(row["shape"] for row in found))
    wrong = {(row["shape"], row["version"]): row for row in found}
    rows = [
        (shape, *(f"{wrong[shape, version]['wrong_runs']} of {wrong[shape, version]['runs']}"
                  for version in ("first", "mended")))
        for shape in shapes
    ]  # fmt: skip
    return table(("queries of keys", "first version, wrong runs", "mended"), rows)


def walk() -> str:
    """Useful TFLOP/s of the walk, and milliseconds of the whole attention in two ways."""
    found = read(WALK)
    rows = [
        (f"{row['n'] // 1024}K", f"{row['keep']:g}",
         *(f"{row[name]['useful_tflops']:.0f}" for name in VERSIONS),
         f"{row['hopper']['raw_tflops']:.0f}", ms(row["portable_auto"]),
         f"{row['hopper']['ms'] + row['union_of_8']['ms']:.3g}")
        for row in found["walk"]
    ]  # fmt: skip
    columns = ("tokens", "ρ", *VERSIONS.values(), "hopper, raw", "auto of portable kernels, ms",
               "unions and hopper walk, ms")  # fmt: skip
    return f"{table(columns, rows)}\n\n{record(WALK)}"


def whole() -> str:
    """Milliseconds of the whole attention over a selection, by loop order and kernels."""
    ways = ("portable auto", "portable union", "hopper union", "hopper fold", "auto")
    rows = [
        (f"{row['n_q'] // 1024}K", f"{row['keep']:g}", *(ms({"ms": row[way]}) for way in ways))
        for row in read(WALK)["whole"] if row["n_q"] == row["n_k"] and row["n_q"] >= 4096
    ]  # fmt: skip
    return table(("tokens", "ρ", *ways), sorted(rows, key=lambda row: int(row[0][:-1])))


def probes() -> str:
    """Useful TFLOP/s of the hopper walk with a part left out, at ρ = 0.95."""
    found = read(WALK)
    left_out = {
        (row["n"], row["without"]): row["useful_tflops"]
        for row in found["probes"] if row["version"] == "hopper" and row["keep"] == 0.95
    }  # fmt: skip
    rows = [
        (f"{row['n'] // 1024}K", f"{row['hopper']['useful_tflops']:.0f}",
         *(f"{left_out[row['n'], name]:.0f}" for name in ("softmax", "memory")))
        for row in found["walk"] if row["keep"] == 0.95
    ]  # fmt: skip
    return table(("tokens", "hopper", "without softmax", "all keys from the L2 cache"), rows)


def orders() -> str:
    """Useful TFLOP/s of the whole attention by loop order, and of the portable kernels."""
    ways = ("portable_auto", "auto", "union", "kv_outer")
    rows = [
        (f"{row['n'] // 1024}K", f"{row['keep']:g}", *(rate(row[way]) for way in ways))
        for row in read(ORDERS)["attention"]
    ]  # fmt: skip
    columns = ("tokens", "ρ", "auto of portable kernels", "**auto**", "union", "KV-outer")
    return f"{table(columns, rows)}\n\n{record(ORDERS)}"


def integers() -> str:
    """Milliseconds of scores in 8 bits, by floats and by integers."""
    ways = ("before", "hopper", "integers", "integers_all_negative")
    rows = [
        (row["shape"], *(ms(row[way]) for way in ways),
         f"{row['hopper']['tflops'] / row['plain']['tflops']:.2f}")
        for row in read(ORDERS)["scores"]
    ]  # fmt: skip
    columns = ("queries of keys", "before", "**limits once per piece**", "integer maxima",
               "integer maxima, all scores negative", "share of a product")  # fmt: skip
    return table(columns, rows)


def steps() -> str:
    """A training step with all hopper kernels: milliseconds, and how many times dense."""
    stages = ("select", "forward", "align", "queries", "keys")
    rows = [
        (f"{row['n'] // 1024}K", ms(row["dense"]), ms(row["step"]), f"**{row['times']:.1f}×**",
         *(ms(row["stages"][stage]) for stage in stages))
        for row in read(STEPS)["steps"]
    ]  # fmt: skip
    columns = ("tokens", "dense", "MSA", "gain", "selection", "forward", "loss", "dQ", "dK, dV")
    return f"{table(columns, rows)}\n\n{record(STEPS)}"


def keys() -> str:
    """dK and dV: milliseconds and useful TFLOP/s by the portable kernel and by the one for Hopper."""
    rows = [
        (f"{row['n'] // 1024}K", f"{row['keep']:g}",
         *(f(row[name]) for f in (ms, rate) for name in ("portable", "hopper")),
         f"{row['portable']['ms'] / row['hopper']['ms']:.1f}×")
        for row in read(GRADIENTS)["keys"]
    ]  # fmt: skip
    columns = ("tokens", "ρ", "portable, ms", "hopper, ms", "portable, TFLOP/s",
               "hopper, TFLOP/s", "gain")  # fmt: skip
    return f"{table(columns, rows)}\n\n{record(GRADIENTS)}"


def queries() -> str:
    """dQ: useful TFLOP/s by the portable kernel, by the one for Hopper and by its variants."""
    names = ("portable", "hopper", "one_wait", "stages_2_3", "stages_2_2")
    rows = [
        (f"{row['n'] // 1024}K", f"{row['keep']:g}",
         *(rate(row[name]) if name in row else "" for name in names),
         ms(row["union_of_4"]), ms(row["union_of_8"]))
        for row in read(GRADIENTS)["queries"]
    ]  # fmt: skip
    columns = ("tokens", "ρ", "portable", "**hopper**", "one wait for S and dQ",
               "2 stages of K, 3 of V", "2 and 2", "unions of 4, ms", "unions of 8, ms")  # fmt: skip
    return table(columns, rows)


def rate(time: dict[str, float]) -> str:
    """Useful TFLOP/s."""
    return f"{time['tflops']:.0f}"


def loss() -> str:
    """Milliseconds of the whole alignment loss with its gradients."""
    rows = [
        (f"{row['n'] // 1024}K", f"{row['keep']:g}", ms(row["portable"]), f"**{ms(row['hopper'])}**",
         f"{row['portable']['ms'] / row['hopper']['ms']:.2f}×")
        for row in read(LOSS)["loss"]
    ]  # fmt: skip
    return f"{table(('tokens', 'ρ', 'portable', 'hopper', 'gain'), rows)}\n\n{record(LOSS)}"


def loss_stages() -> str:
    """Milliseconds of the parts of the loss for the last 32K queries, or all, at ρ = 0.95."""
    names = ("schedule", "student_sums", "kernel", "sum_slots", "sum_items", "loss_alone")
    rows = []
    for row in read(LOSS)["stages"]:
        sums = row["sum_slots"]["ms"] + row["sum_items"]["ms"]
        kernel = {"kernel": {"ms": row["kernel_with_sums"]["ms"] - sums}}
        times = (ms((row | kernel)[name]) for name in names)
        rows.append((f"{row['queries'] // 1024}K of {row['n'] // 1024}K", *times))
    columns = ("queries", "edges", "sums of the index branch", "kernel", "sum over slots",
               "sum over items", "kernel without gradients")  # fmt: skip
    return table(columns, rows)


def ms(time: dict[str, float]) -> str:
    """A time with three digits.

    >>> [ms({"ms": x}) for x in (0.0452, 0.739, 11.165, 23.671)]
    ['0.045', '0.739', '11.2', '23.7']
    """
    return f"{time['ms']:.3f}" if time["ms"] < 1 else f"{time['ms']:.3g}"
