"""The options that `msa demo` and `msa ask` share: the model, its backend, and files to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msa import files
from msa.dispatch import BackendName
from msa.model.checkpoint import WEIGHTS, check_device, check_finite, folder_of, load
from msa.model.model import Model


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """The options that `msa demo` and `msa ask` share."""

    backend: BackendName = "auto"
    """The backend of MSA: reference, torch or triton. auto: triton on a GPU, else torch."""
    model: str = "tiny"
    """tiny, small (needs a checkout of the repository), or a folder that `msa train` wrote."""
    device: str = "cpu"
    """cpu or cuda."""
    html: Path | None = None
    """An HTML file to write. The page shows which blocks were read, and what they contain."""
    png: Path | None = None
    """A PNG file to write. The figure shows which blocks were read."""


def check_files(options: ReadingOptions, **inputs: Path) -> None:
    """The page and the figure can be written, and they are none of the input files.

    Raises:
        ValueError: naming the option.
    """
    files.check_apart("png", options.png, html=options.html, **inputs)
    files.check_apart("html", options.html, **inputs)
    files.check_target("html", options.html)
    files.check_target("png", options.png)


def load_model(options: ReadingOptions) -> Model:
    """The trained model of this name, or the model in this folder.

    Raises:
        ValueError: a model or a device that does not exist, or weights that are not finite.
    """
    check_device(options.device)
    folder = folder_of(options.model)
    model = load(folder, device=options.device, backend=options.backend)
    check_finite(str(folder / WEIGHTS), model.state_dict())
    return model
