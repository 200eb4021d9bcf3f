"""`msa demo digits`: real images classified by attention, dense and sparse, on any backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msa import checks, files
from msa.dispatch import BackendName

if TYPE_CHECKING:
    from msa.demo.experiment import Outcome
    from msa.demo.stream import Stream


@dataclass(frozen=True)
class DigitsOptions:
    """Classify held-out handwritten digits by attention to known ones, and compare block choices.

    Block size and index width were judged by cross-validation within the known images.
    """

    backend: BackendName = "auto"
    """Who computes: reference, torch or triton. auto is reference, for the images are NumPy arrays.
    All backends that can run here are compared at a tenth of the keys in any case."""
    plot: Path | None = None
    """Where to write the poster, a PNG; none is drawn without it."""
    top_k: tuple[int, ...] = (2, 3, 5, 9, 18, 36)
    """Budgets: blocks per query and group, the query's own block included."""
    block_size: int = 8
    """Images in a block."""
    index_dims: int = 16
    """PCA directions that the index branch sees, of 64 pixels."""
    held_out: int = 357
    """How many images to classify; up to a block more, so that the known ones fill whole blocks."""
    seed: int = 0
    """Draws the split into known and held-out images."""
    shuffle: bool = True
    """False keeps the data set's own order and holds out its end, which is a harder task."""
    order: Literal["arrival", "album"] = "arrival"
    """How the known images lie in the stream: as they came, or as an album, in which each is
    followed by the one most like it (labels play no part). Blocks of an album agree more."""


def run(options: DigitsOptions) -> int:
    """Run everything, print the tables, draw the poster if asked; 0 if the backends agree."""
    import numpy as np
    from rich.console import Console

    from msa.demo import report

    files.check_target("plot", options.plot)
    console = Console()
    stream, outcomes, agreement = compute(options, console)
    report.show(console, stream, outcomes, agreement)
    if options.plot is not None:
        from msa.demo import poster

        poster.draw(options.plot, stream, outcomes)
        console.print(f"The poster lies in {options.plot}.", markup=False, soft_wrap=True)
    first = agreement[0].distribution
    return 0 if all(np.allclose(o.distribution, first, atol=1e-4) for o in agreement) else 1


def compute(
    options: DigitsOptions, console: Any = None
) -> tuple[Stream, list[Outcome], list[Outcome]]:
    """The stream, every method at every budget, and MSA at a tenth of the keys on every backend."""
    from rich.progress import track

    from msa.demo.experiment import measure, usable_backends
    from msa.demo.report import at_a_tenth

    stream = make_stream(options)
    backend: BackendName = "reference" if options.backend == "auto" else options.backend
    jobs = [("dense", stream.sequences.max_blocks(stream.block_size))]
    jobs += [(method, k) for method in ("MSA", "window", "random") for k in sorted(options.top_k)]
    watch = partial(track, console=console, transient=True)
    outcomes = [measure(m, stream, k, backend) for m, k in watch(jobs, "Attending")]
    agreement = [tenth := at_a_tenth(stream, outcomes)]
    others = [name for name in usable_backends() if name != backend]
    for name in watch(others, "Comparing backends"):
        agreement.append(measure("MSA", stream, tenth.top_k, name))
    return stream, outcomes, agreement


def make_stream(options: DigitsOptions) -> Stream:
    """Load, split, and fit everything on the known images."""
    from msa.demo.features import load_images, split
    from msa.demo.stream import build_stream

    checks.check_seed("seed", options.seed)
    checks.check_count("block_size", options.block_size, 1)
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
