"""`msa bench prefill` checks and times prefill on a GPU.

Every case is checked on sampled queries before it is timed; a wrong result ends the run. The same
without tyro: python -m benchmarks.prefill [--out results.json] [--parts lengths million ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from benchmarks import report

Part = Literal["ceilings", "lengths", "million", "production", "topk"]


@dataclass(frozen=True)
class PrefillOptions(report.Options):
    """Check, then time selection and attention on this GPU against dense attention.

    Takes about two minutes on a Hopper GPU. Neighbouring queries' selections agree to a known
    degree, rho: the chance that a query keeps each remote block of its predecessor.
    """

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure: the device's own ceilings, prompts of 4K to 128K tokens, a million tokens in
    chunks, production shapes, the stand-alone top-k."""
    plots: Path | None = None
    """A folder for the figures; none are drawn without it (see `msa bench plots`)."""


def run(options: PrefillOptions) -> int:
    """Measure, write, print the tables. Exit codes: 2 without a GPU, 1 for wrong results."""
    from benchmarks import prefill_table

    code, out = report.measure("prefill", options, "benchmarks.stages", prefill_table.show)
    if code == 0 and options.plots is not None:
        from benchmarks import plots

        return plots.run(plots.PlotsOptions(out, options.plots))
    return code


if __name__ == "__main__":
    sys.exit(report.main(PrefillOptions, run))
