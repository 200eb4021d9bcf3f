"""The rows of the ablations: each row is one way to train the tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One ablation: a run of `msa train` for each seed."""

    name: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The options of `msa train` that differ from their defaults, besides steps, seed and out."""
    after: str | None = None
    """The row whose model, converted to MSA, is the start of this one."""
    share: float = 1.0
    """The steps of this row as a share of the steps of the other rows."""

    def command(self, steps: int, seed: int) -> str:
        """The command that repeats one run of this row.

        >>> ROWS["no-kl"].command(300, 1)
        'msa train --kl 0 --steps 300 --seed 1'
        >>> ROWS["gradient"].command(300, 1)
        'msa train --index-gradient --steps 300 --seed 1'
        """
        words = [_option(name, value) for name, value in self.overrides.items()]
        words += [f"--steps {self.steps(steps)}", f"--seed {seed}"]
        if self.after is None:
            return " ".join(["msa train", *words])
        convert = f"msa convert TRAINED --seed {seed} --out START"
        return " ".join([convert, "&& msa train --start START", *words])

    def steps(self, whole: int) -> int:
        """The steps of this row, if the other rows have `whole` steps."""
        return max(1, round(self.share * whole))


def _option(name: str, value: Any) -> str:
    """An option on the command line; for True it has no value."""
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return option
    return f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}"


ROWS = {
    row.name: row
    for row in (
        Row("base", "MSA from scratch (MSA-PT)"),
        Row("no-kl", "no alignment loss", {"kl": 0.0}),
        Row("kl-10", "λ = 10", {"kl": 10.0}),
        Row("gradient", "no stop-gradient", {"index_gradient": True}),
        Row("gradient-10", "no stop-gradient, λ = 10", {"index_gradient": True, "kl": 10.0}),
        Row("no-warm-up", "no warm-up of the index", {"warm_up": 0.0}),
        Row("forced", "first and two local blocks forced", {"sink_blocks": 1, "local_blocks": 2}),
        Row("blocks-8", "10 blocks of 8", {"block_size": 8, "top_k": 10}),
        Row("blocks-40", "2 blocks of 40", {"block_size": 40, "top_k": 2}),
        Row("window", "the last 5 blocks alone", {"attention": "window"}),
        Row("dense", "dense attention", {"attention": "dense"}),
        Row("cpt", "dense, then MSA (MSA-CPT)", {"warm_up": 0.3}, after="dense", share=1 / 3),
    )
}
"""All rows by their names. A query reads at most 80 keys, 5 blocks of 16 unless the row says
otherwise. In dense attention it reads all keys."""
LINES = {
    ("base", "dense"): "dense",
    ("base", "msa"): "MSA",
    ("base", "window"): "window",
    ("dense", "dense"): "dense twin",
}
"""The readings of longer documents: the row of the model and the way of attending, with a name."""
