"""How well the shipped model finds pictures, by the length of a document and their depth in it.

    python -m benchmarks.needle

asks for 8 pictures in each of some unseen documents of every length, by dense attention and by MSA,
and draws both (`--no-measure` draws again what was found before).
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.figures.style import INK, MUTED, STYLE
from benchmarks.plots import source
from msa.ablations.run import cpu_name
from msa.model.attention import Mode
from msa.model.checkpoint import load_trained
from msa.model.model import Model
from msa.training.evaluate import read_documents, unseen_documents

MODES: dict[Mode, str] = {"dense": "Dense attention", "sparse": "MSA"}
RECORDS = 8


@dataclass(frozen=True)
class Needle:
    """Ask the shipped model for pictures at every depth of documents of several lengths."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    """Tokens of the documents; the model was trained on at most 512."""
    depths: int = 8
    """Equal parts of a document."""
    documents: int = 24
    """Of each length; each asks for eight pictures."""
    seed: int = 0
    threads: int = 1
    measure: bool = True
    out: Path = Path("benchmarks/results/needle_cpu.json")
    figure: Path = Path("docs/needle.svg")


def measure(options: Needle, model: Model) -> dict[str, Any]:
    """For each attention and length: right answers and questions, by depth."""
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, list[tuple[int, int]]]] = {mode: {} for mode in MODES}
    for length in options.lengths:
        documents = unseen_documents(length, RECORDS, RECORDS, options.documents, options.seed)
        for mode in MODES:
            reading = read_documents(model, documents, mode=mode, at_once=max(1, 4096 // length))
            found[mode][str(length)] = reading.by_depth(options.depths)
    config = model.config.msa
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "case": asdict(options) | {"out": options.out.name, "figure": options.figure.name},
        "keys": config.block_size * config.top_k,
        "right_of_asked": found,
    }


def draw(found: dict[str, Any]) -> Figure:
    """A map for each kind of attention: a row is a length, a column a depth, a number a share."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 3.7), sharey=True)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.88, bottom=0.23, wspace=0.06)
    lengths = list(found["right_of_asked"]["dense"])
    for axis, (mode, name) in zip(axes, MODES.items()):
        rows = [found["right_of_asked"][mode][length] for length in lengths]
        shares = [
            [right / asked if asked else float("nan") for right, asked in row] for row in rows
        ]
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share == share:
                    colour = "white" if share > 0.55 else INK
                    axis.text(x, y, f"{share:.0%}", ha="center", va="center", color=colour)
        right, asked = (sum(cell[i] for row in rows for cell in row) for i in (0, 1))
        axis.set_title(
            f"{name}: {right / asked:.0%} of all", loc="left", fontweight="bold", fontsize=10
        )
        axis.grid(False)
        axis.spines[:].set_visible(False)
        parts = len(rows[0])
        axis.set_xticks([-0.5, parts / 2 - 0.5, parts - 0.5], ["beginning", "middle", "end"])
        for label, side in zip(axis.get_xticklabels(), ("left", "center", "right")):
            label.set_horizontalalignment(side)
        axis.set_xlabel("where in the document the picture stands")
    axes[0].set_yticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
    axes[0].set_ylabel("tokens")
    case = found["case"]
    figure.text(
        0.085, 0.02, "Right answers of the shipped tiny model, trained on at most 512 tokens; MSA "
        f"reads at most {found['keys']} keys per group. {case['documents']} unseen documents of "
        f"each length,\n{RECORDS} questions each; chance is 10%. Both are the same weights. Seed "
        f"{case['seed']}. Blank: there stand the questions.", fontsize=7.5, color=MUTED,
    )  # fmt: skip
    return figure


def main(options: Needle) -> None:
    """Measure, write, draw."""
    import matplotlib

    matplotlib.use("svg")
    if options.measure:
        found = measure(options, load_trained("tiny", backend="torch"))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(options.out.read_text())
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": options.figure.stem}):
        metadata = {"Date": None, "Source": source(options.out)}
        draw(found).savefig(options.figure, metadata=metadata)
    print(f"Results: {options.out}; figure: {options.figure}")


if __name__ == "__main__":
    main(tyro.cli(Needle))
