"""`msa bench plots` draws the figures of a results file as SVG.

The same file always gives the same figures. The metadata of a figure have the name and the SHA-256
of its results file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reading import committed
from msa import files


@dataclass(frozen=True)
class PlotsOptions:
    """Draw the figures of a results file; no GPU is needed."""

    results: Path | None = None
    """What `msa bench prefill`, `decode` or `integrations` wrote, or `msa findings run`; None is
    the committed file of prefill."""
    to: Path = Path("docs")
    """The folder to draw to; figures are named after the results file."""


def source(results: Path) -> str:
    """Return the name and the digest of a results file."""
    return f"{results.name} sha256 {hashlib.sha256(results.read_bytes()).hexdigest()}"


def draw(results: Path, folder: Path) -> dict[Path, str]:
    """Draw every figure for which the results hold the numbers.

    Returns:
        for each figure's path an empty string, or the reason why it was not drawn.

    Raises:
        ValueError: results that cannot be read or are of another form, a place where nothing can be
            written.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    from benchmarks.figures import decode, findings, integrations, prefill, roofline, style

    of_prefill = (
        ("", prefill.latency_and_gain),
        ("_roofline", roofline.roofline),
        ("_union", prefill.loop_orders),
    )
    kinds = {
        "decode": (("", decode.steps),),
        "findings": (("", findings.findings),),
        "integrations": (("", integrations.lengths),),
    }
    found = files.read_json("results", results)
    if not isinstance(found, dict):
        raise ValueError(f"results must hold one JSON object, got another value in {results}")
    made: dict[Path, str] = {}
    files.check_folder("to", folder)
    for suffix, figure_of in kinds.get(results.stem.partition("_")[0], of_prefill):
        path = folder / f"{results.stem}{suffix}.svg"
        with pyplot.rc_context(style.STYLE | {"svg.hashsalt": path.stem}):
            try:
                figure = figure_of(found)
            except style.MissingResults as error:
                made[path] = str(error)
                continue
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"results must be what msa bench or msa findings run wrote, got {results}, of "
                    f"which no figure can be made: {type(error).__name__} {error}"
                ) from error
            figure.savefig(path, metadata={"Date": None, "Source": source(results)})
            pyplot.close(figure)
        made[path] = ""
    return made


def run(options: PlotsOptions) -> int:
    """Draw, and print for each figure where it is, or why it was not drawn.

    Raises:
        ValueError: see `draw`; also results of which no figure can be drawn.
    """
    results = options.results or committed("prefill")
    made = draw(results, options.to)
    if all(made.values()):
        reasons = "; ".join(dict.fromkeys(made.values()))
        raise ValueError(
            f"results must hold the numbers of at least one figure, got {results}: {reasons}"
        )
    for path, reason in made.items():
        print(f"{path}: not drawn, {reason}" if reason else f"{path}: drawn")
    return 0
