"""Measured figures: read from `benchmarks/results` or `msa/ablations`, checked, dated, drawn."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks import reading
from benchmarks.figures.style import BLUE, GREEN, GRID, INK, MUTED, ORANGE, QUIET, SKY, STYLE

ROOT = Path(__file__).parents[2]
RESULTS = reading.RESULTS
FINDINGS = ROOT / "msa" / "ablations"
"""The folder of the ablations' results, which are part of the package."""
SHARED = ("tile_verbs", "launch", "tables", "tuning", "bits")
HOPPER = ("hopper/selection", "hopper/index_scores", "hopper/block_topk", "hopper/plan",
          "hopper/ring", "hopper/union_walk", "hopper/walk_rows", "hopper/page_rows",
          "hopper/partials")  # fmt: skip
KERNELS = {
    "prefill": ("union_walk", "tile_walk", "partials", "combine", "selection", "block_topk", "topk",
                "quantize", "tile_union", "reverse_index", "schedule", "paged_keys", "wide_pages",
                *SHARED, *HOPPER),
    "train": ("key_gradients", "query_gradients", "item_sums", "tile_reverse_index", "alignment",
              "index_loss", "teacher", "softmax_sums", "union_walk", "tile_walk", "hopper/key_gradients",
              "hopper/query_gradients", "hopper/edge_rows", "hopper/edge_shares", "hopper/index_loss",
              "hopper/teacher", "hopper/student", "hopper/loss_rows", *SHARED, *HOPPER),
    "serving": ("prefill", "decode", "page_scores", "page_attention", "selection", "union_walk",
                "step_sequences", "hopper/page_scores", *SHARED, *HOPPER),
    "decode": ("decode", "page_scores", "page_attention", "page_topk", "dependent_launch", "append",
               "hopper/page_scores", "hopper/page_queries", "hopper/page_shares", "hopper/ring", *SHARED),
}  # fmt: skip
"""The files of `msa/triton_impl` whose speed each kind of results measures."""
MODEL = ("model/model", "model/attention", "model/experts", "model/vision", "training/trainer",
         "training/presets", "training/documents")  # fmt: skip
"""The files of `msa` that decide the results of a training."""

NUMBER = (int, float)
SHARE = (int, float, type(None))
TIME = {"ms": NUMBER, "min": NUMBER, "max": NUMBER}
MEDIAN = {"ms": NUMBER}
RATE = {"ms": NUMBER, "tflops": NUMBER}
MICROS = {"us": NUMBER, "min": NUMBER, "max": NUMBER}
MACHINE = {"device": str, "multiprocessors": int, "torch": str, "triton": str, "date": str}
STEP = {"step": MICROS, "layer": MICROS, "scores": MICROS}
RACES = {"by_calls": NUMBER, "shapes": [{"query_len": int, "kv_len": int, "times": NUMBER}]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "prefill": {
        **MACHINE,
        "ceilings": {"copy_tbps": NUMBER, "bf16_tflops": NUMBER, "fp8_tflops": NUMBER},
        "lengths": [{
            "n": int, "cudnn": TIME, "select": {"bf16": TIME, "fp8_e4m3": TIME},
            "attention": [{"keep": NUMBER, "mean_union_of_4": NUMBER, "whole": TIME,
                           "whole_fp8": TIME, "auto": TIME, "kv_outer": TIME, "union": TIME}],
        }],
        "topk": [{"rows": int, "blocks": int, "k": int, "torch": TIME, "ours": TIME}],
        "million": {"chunks": [{"prefix": int, "cudnn": TIME}], "whole_keep_0.95": dict},
        "production": {"cases": [{"n_q": int, "n_k": int, "calls": int, **TIME}],
                       "weighted_ms": NUMBER},
    },
    "selection": {
        "device": str, "torch": str, "triton": str, "date": str, "commit": str,
        "plain_products": {"bf16_tflops": NUMBER, "fp8_tflops": NUMBER},
        "select": [{"shape": str, "index": str, "hopper": MEDIAN, "portable": MEDIAN,
                    "first_version": MEDIAN}],
        "scores": [{"shape": str, "index": str, "maxima": bool, "tflops": NUMBER,
                    "share": NUMBER}],
        "topk": [{"rows": int, "blocks": int, "k": int, "hopper": MEDIAN}],
        "race": [{"shape": str, "version": str, "runs": int, "wrong_runs": int}],
    },
    "walk": {
        "device": str, "torch": str, "triton": str, "date": str, "commit": str, "checks": dict,
        "walk": [{"n": int, "keep": NUMBER, "hopper": TIME, "portable": TIME,
                  "portable_auto": TIME, "union_of_8": TIME}],
        "probes": [{"without": str, "n": int, "keep": NUMBER, "version": str, "ms": NUMBER}],
    },
    "orders": {
        "device": str, "torch": str, "triton": str, "date": str, "commit": str,
        "attention": [{"n": int, "keep": NUMBER, "portable_auto": RATE, "auto": RATE,
                       "union": RATE, "kv_outer": RATE}],
        "scores": [{"shape": str, "plain": dict, "before": RATE, "hopper": RATE}],
    },
    "steps": {
        "device": str, "torch": str, "triton": str, "date": str, "commit": str,
        "steps": [{"n": int, "keep": NUMBER, "dense": MEDIAN, "step": MEDIAN, "times": NUMBER,
                   "stages": dict}],
    },
    "gradients": {
        "device": str, "torch": str, "triton": str, "date": str, "commit": str, "checks": dict,
        "keys": [{"n": int, "keep": NUMBER, "portable": RATE, "hopper": RATE}],
        "queries": [{"n": int, "keep": NUMBER, "portable": RATE, "hopper": RATE,
                     "union_of_4": MEDIAN, "union_of_8": MEDIAN}],
    },
    "loss": {
        "device": str, "torch": str, "triton": str, "date": str, "commit": str,
        "checks": {"cases": int, "reruns": int, "different_numbers": int},
        "loss": [{"n": int, "keep": NUMBER, "portable": TIME, "hopper": TIME}],
        "stages": [{"n": int, "queries": int, "schedule": TIME, "student_sums": TIME,
                    "kernel_with_sums": TIME, "loss_alone": TIME, "sum_slots": TIME,
                    "sum_items": TIME}],
    },
    "train": {
        **MACHINE,
        "steps": [{"n": int, "dense": TIME, "sparse": [{"keep": NUMBER, "step": TIME, "stages": dict,
                                                     "extra_gib": NUMBER}]}],
        "warm_up": {"n": int, "dense": TIME, "both": TIME},
    },
    "decode": {
        **MACHINE,
        "steps": [{"batch": int, "context": int, "dense": dict, "bf16": STEP, "fp8 index": STEP,
                   "fp8 all": STEP}],
        "quality": dict,
    },
    "serving": {**MACHINE, "checks": dict, "prefill": {"bf16": RACES, "fp8": RACES},
                "mixed": dict, "decode": dict, "sglang": dict},
    "integrations": {
        **MACHINE,
        "operators": [{"name": str, "function": TIME, "operator": TIME, "compiled": TIME,
                       "captured": TIME}],
        "lengths": {"errors": dict, "ways": {
            way: [{"n": int}] for way in ("eager", "sdpa", "msa", "enabled")
        }},
    },
    "crossing": {
        "device": str, "cores": int, "date": str, "case": dict, "crossing_tokens": NUMBER,
        "seconds": dict,
    },
    "findings": {
        "device": str, "torch": str, "python": str, "date": str, "steps": int, "documents": int,
        "runs": [{"row": str, "seed": int, "command": str, "steps": int, "seconds": NUMBER,
                  "prose": SHARE, "answers": SHARE, "near": SHARE, "far": SHARE, "kl": SHARE,
                  "block_recall": SHARE, "score_recall": SHARE, "steepest": SHARE,
                  "budgets": list, "lengths": list}],
    },
    "tests": {
        "device": str, "driver": str, "python": str, "torch": str, "triton": str, "commit": str,
        "date": str, "seconds": NUMBER, "passed": int, "failed": int, "errors": int, "skipped": int,
    },
}  # fmt: skip
"""What each kind of results file must hold. A file may hold more, but not less."""


class BadResults(Exception):
    """A results file is not of the form that its figures need."""


def check(found: Any, schema: Any, where: str) -> None:
    """Compare results with a schema; `where` names the place in messages.

    Raises:
        BadResults: naming the first place that differs, what was wanted and what came.

    >>> check({"n": 4}, {"n": int}, "results")
    >>> check({"rows": [{"n": "4"}]}, {"rows": [{"n": int}]}, "results")
    Traceback (most recent call last):
    ...
    docs.hooks.measured.BadResults: results.rows[0].n must be int, got '4'
    """
    if isinstance(schema, dict):
        if not isinstance(found, dict):
            raise BadResults(f"{where} must be an object, got {found!r:.40}")
        for name, inner in schema.items():
            if name not in found:
                raise BadResults(f"{where} must have {name!r}, got {sorted(found)}")
            check(found[name], inner, f"{where}.{name}")
    elif isinstance(schema, list):
        if not isinstance(found, list) or not found:
            raise BadResults(f"{where} must be a list with entries, got {found!r:.40}")
        for i, entry in enumerate(found):
            check(entry, schema[0], f"{where}[{i}]")
    elif not isinstance(found, schema) or (isinstance(found, bool) and schema is not bool):
        kinds = schema if isinstance(schema, tuple) else (schema,)
        names = " or ".join(kind.__name__ for kind in kinds)
        raise BadResults(f"{where} must be {names}, got {found!r:.40}")


def path_of(name: str) -> Path:
    """The path of results: of a benchmark such as "prefill", or of a file "history/prefill_h100".

    >>> [path_of(name).name for name in ("crossing", "findings", "walk_hopper_h200")]
    ['crossing_cpu.json', 'findings_tiny.json', 'walk_hopper_h200.json']
    """
    folder = FINDINGS if name.startswith("findings") else RESULTS
    if "_" not in name:
        return reading.committed(name, folder)
    return folder / f"{name}.json"


def kind_of(name: str) -> str:
    """The benchmark that a name belongs to.

    >>> [kind_of(name) for name in ("prefill", "history/train_h100")]
    ['prefill', 'train']
    """
    return name.rpartition("/")[2].partition("_")[0]


def read(name: str) -> dict[str, Any]:
    """The results of a name (see `path_of`), checked.

    Raises:
        BadResults: if it is not of its form.
        FileNotFoundError: if there is none.
    """
    found = json.loads(path_of(name).read_text())
    check(found, SCHEMAS[kind_of(name)], name)
    return found


def device(name: str) -> str:
    """The short name of the GPU of a results file, such as "H200"."""
    return reading.device(read(name))


def older() -> list[str]:
    """The names of the results that newer ones have replaced."""
    return [f"history/{path.stem}" for path in sorted((RESULTS / "history").glob("*.json"))]


def last_change(*paths: str) -> str:
    """When one of the paths was last committed, as ISO 8601; empty if there is no history."""
    command = ["git", "log", "-1", "--format=%cI", "--", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def code_of(name: str) -> list[str]:
    """The files whose speed a results file measures."""
    kind = kind_of(name)
    if kind == "findings":
        return [f"msa/{part}.py" for part in MODEL]
    if kind == "integrations":
        return ["msa/ops", "msa/integrations/transformers.py", "msa/integrations/plan.py"]
    kernels = KERNELS.get(kind)
    return [f"msa/triton_impl/{k}.py" for k in kernels] if kernels else ["msa/torch_impl"]


def code_differs(name: str) -> bool:
    """Whether the measured code computes something else than when its results were committed.

    Comments, docstrings and layout do not count.
    """
    command = ["git", "log", "-1", "--format=%H", "--", str(path_of(name))]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return any(
        meaning(read_at(commit, path)) != meaning(path.read_text()) for path in files_of(name)
    )


def files_of(name: str) -> list[Path]:
    """The Python files of `code_of`, those of folders included."""
    paths = [ROOT / path for path in code_of(name)]
    return [
        file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])
    ]


def read_at(commit: str, path: Path) -> str:
    """A file as it was at a commit; empty if it was not there."""
    command = ["git", "show", f"{commit}:{path.relative_to(ROOT)}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def meaning(code: str) -> str:
    """Code without what a machine does not read: layout, comments, docstrings.

    >>> meaning("x = 1  # one") == meaning('x = (\\n    1\\n)')
    True
    """
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            node.body = [
                line for line in node.body
                if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]  # fmt: skip
    return ast.dump(tree)


def source(name: str) -> str:
    """One sentence: where a result comes from."""
    path = path_of(name)
    found, digest = read(name), hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    versions = found.get("versions", found)
    commit = f", commit {found['commit']}" if "commit" in found else ""
    return (
        f"Drawn from <code>{path.relative_to(ROOT)}</code> (sha256 {digest}…): "
        f"{escape(found['device'])}, torch {escape(versions['torch'])}, {found['date'][:10]}{commit}."
    )


def record(name: str) -> str:
    """The same as a paragraph, for results that tell what was at that time, not what is."""
    return f'<p class="age">{source(name)}</p>'


def age(name: str) -> str:
    """One paragraph: where a result comes from, and whether its kernels have changed since.

    Results that newer ones have replaced are a record.
    """
    if name.startswith("history/"):
        return record(name)
    measured, changed = last_change(str(path_of(name))), last_change(*code_of(name))
    words = source(name)
    if not measured or not changed:
        return f'<p class="age">{words} This build has no Git history, so its age is not known.</p>'
    if as_utc(measured) < as_utc(changed) and code_differs(name):
        note = (
            f"The measured code has changed since, at {changed[:16].replace('T', ' ')}: "
            "these numbers are those of the older code."
        )
        return f'<p class="age old">{words} {note}</p>'
    return f'<p class="age">{words}</p>'


def tests() -> str:
    """One sentence: what the last recorded run of the tests on a GPU found, and where."""
    if not (RESULTS / "tests_gpu.json").exists():
        return "No run of the tests on a GPU is recorded."
    found = read("tests_gpu")
    bad = found["failed"] + found["errors"]
    return (
        f"{found['date']}, commit {found['commit']}: {found['passed']} tests passed, {bad} failed "
        f"and {found['skipped']} were skipped in {found['seconds'] / 60:.0f} minutes on "
        f"{found['device']}, driver {found['driver']}, torch {found['torch']}, triton "
        f"{found['triton']}."
    )


def as_utc(moment: str) -> Any:
    """A point in time that can be compared."""
    from datetime import datetime

    return datetime.fromisoformat(moment)


COLORS = {
    INK: "ink", MUTED: "muted", QUIET: "muted", GRID: "faint", BLUE: "remote", SKY: "sky",
    ORANGE: "red", GREEN: "green", "#ffffff": "paper", "#000000": "ink",
}  # fmt: skip


def inline(figure: Figure, name: str, caption: str, alt: str) -> str:
    """A matplotlib figure as HTML whose colours are those of the theme."""
    file = io.StringIO()
    with pyplot.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    pyplot.close(figure)
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    drawing = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", drawing)
    drawing = re.sub(r"<svg [^>]*?viewBox", f'<svg role="img" aria-label="{escape(alt)}" viewBox',
                     drawing, count=1, flags=re.S)  # fmt: skip
    drawing = drawing.replace("font-family: 'DejaVu Sans'", "font-family: system-ui, sans-serif")
    for color, variable in COLORS.items():
        drawing = drawing.replace(color, f"var(--{variable})")
    drawing = re.sub(r"\n\s*", " ", drawing)
    return f'<figure class="drawn wide">{drawing}<figcaption>{caption}</figcaption></figure>'


def show(name: str, draw: Any, caption: str, alt: str) -> str:
    """The figure that `draw(results)` makes, and where its numbers come from."""
    found = read(name)
    with pyplot.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure = draw(found)
        return inline(figure, f"{name}-{draw.__name__}", caption, alt) + age(name)


def outline(schema: Any, depth: int = 0) -> str:
    """A schema as indented lines.

    >>> print(outline({"n": int, "rows": [{"ms": NUMBER}]}))
    n: int
    rows: list of
      ms: int or float
    """
    lines: list[str] = []
    for name, inner in schema.items():
        if isinstance(inner, dict | list):
            entries = inner[0] if isinstance(inner, list) else inner
            lines.append(f"{'  ' * depth}{name}:{' list of' if isinstance(inner, list) else ''}")
            lines.append(outline(entries, depth + 1))
        else:
            kinds = inner if isinstance(inner, tuple) else (inner,)
            names = " or ".join("object" if kind is dict else kind.__name__ for kind in kinds)
            lines.append(f"{'  ' * depth}{name}: {names}")
    return "\n".join(lines)
