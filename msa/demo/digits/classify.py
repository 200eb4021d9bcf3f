"""The command `msa demo digits`: attention classifies images, dense and sparse, on any backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from msa import files
from msa.checks import check_count, check_seed
from msa.demo.digits import experiment, tables
from msa.demo.digits.experiment import Outcome
from msa.demo.digits.features import load_images, split
from msa.demo.digits.stream import Stream, build_stream
from msa.dispatch import BackendName


@dataclass(frozen=True)
class DigitsOptions:
    """Classify held-out digits by attention to known digits, and compare choices of blocks.

    The defaults of block size and index width were chosen by cross-validation on the known images.
    """

    backend: BackendName = "auto"
    """The backend: reference, torch or triton. auto is reference, for the images are NumPy arrays.
    At a tenth of the keys, all backends that run here are compared."""
    plot: Path | None = None
    """A PNG file for the poster. Without it no poster is drawn."""
    top_k: tuple[int, ...] = (2, 3, 5, 9, 18, 36)
    """Budgets: blocks per query and group, with the own block of the query."""
    block_size: int = 8
    """Images in a block."""
    index_dims: int = 16
    """The number of PCA directions, of 64 pixels, that the index branch reads."""
    held_out: int = 357
    """Images to classify. It may be up to a block more, so that known images fill whole blocks."""
    seed: int = 0
    """Draws the split into known and held-out images."""
    shuffle: bool = True
    """False keeps the order of the data set and holds out its end, which is a harder task."""
    order: Literal["arrival", "album"] = "arrival"
    """The order of the known images: arrival, as in the data set or shuffled; or album, where each
    image is followed by the most similar one (labels are not used)."""


def run(options: DigitsOptions) -> int:
    """Compare, print the tables, draw the poster of the options; 0 if the backends agree."""
    files.check_target("plot", options.plot)
    console = Console()
    stream, outcomes, agreement = compute(options, console)
    tables.show(console, stream, outcomes, agreement)
    if options.plot is not None:
        from msa.demo.digits import poster  # needs matplotlib

        poster.draw(options.plot, stream, outcomes)
        console.print(f"The poster is {options.plot}.", markup=False, soft_wrap=True)
    first = agreement[0].distribution
    return 0 if all(np.allclose(o.distribution, first, atol=1e-4) for o in agreement) else 1


def compute(
    options: DigitsOptions, console: Console | None = None
) -> tuple[Stream, list[Outcome], list[Outcome]]:
    """The stream, each method at each budget, and MSA at a tenth of the keys on each backend."""
    stream = make_stream(options)
    backend: BackendName = "reference" if options.backend == "auto" else options.backend
    jobs = [("dense", stream.sequences.max_blocks(stream.block_size))]
    jobs += [(method, k) for method in ("MSA", "window", "random") for k in sorted(options.top_k)]
    watch = partial(track, console=console, transient=True)
    outcomes = [experiment.measure(m, stream, k, backend) for m, k in watch(jobs, "Attending")]
    agreement = [tenth := tables.at_a_tenth(stream, outcomes)]
    others = [name for name in experiment.usable_backends() if name != backend]
    for name in watch(others, "Comparing backends"):
        agreement.append(experiment.measure("MSA", stream, tenth.top_k, name))
    return stream, outcomes, agreement


def make_stream(options: DigitsOptions) -> Stream:
    """Load the images, split them, and fit everything on the known images."""
    check_seed("seed", options.seed)
    check_count("block_size", options.block_size, 1)
    images, labels = load_images()
    seed = options.seed if options.shuffle else None
    known, held_out = split(len(images), options.held_out, options.block_size, seed)
    most = len(known) // options.block_size + 1
    if not options.top_k or not all(2 <= k <= most for k in options.top_k):
        raise ValueError(
            f"top_k must hold numbers from 2 (the own block and one more) to {most}, "
            f"got {options.top_k}"
        )
    if not 1 <= options.index_dims <= images.shape[1]:
        raise ValueError(f"index_dims must be from 1 to 64, got {options.index_dims}")
    return build_stream(
        images, labels, known, held_out, options.block_size, options.index_dims,
        album=options.order == "album",
    )  # fmt: skip
