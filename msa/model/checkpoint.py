"""A model on disk: the weights in `model.safetensors`, the sizes in `config.json` beside them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from msa import files
from msa.dispatch import BackendName
from msa.model.config import ModelConfig, differences
from msa.model.model import Model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PACKAGE = Path(__file__).parents[1]
TRAINED = {
    "tiny": PACKAGE / "model" / "trained" / "tiny",
    "small": PACKAGE.parent / "trained" / "small",
}
"""The trained models and their folders, which `msa train` wrote. The package contains the tiny one;
the small one (20 MB) is in the repository only."""


def save(model: Model, folder: Path | str, half: bool = False) -> None:
    """Write both files. A file is written as a whole or not at all: see `files.write`.

    With half, parameters are rounded to bfloat16, as a model that computes in bfloat16 rounds them
    anyway. Buffers are not rounded: another bias of a router would choose other experts.

    >>> import tempfile
    >>> from msa.training.presets import PRESETS
    >>> model = Model(PRESETS["tiny"].model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder)
    ...     same = load(folder)
    >>> same.config == model.config, bool((same.embed.weight == model.embed.weight).all())
    (True, True)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    if half:
        weights |= {name: weights[name].bfloat16() for name, _ in model.named_parameters()}
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    files.write(folder / CONFIG, text.encode())
    files.write(folder / WEIGHTS, to_bytes(weights))


def load(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    backend: BackendName = "auto",
) -> Model:
    """The model that `save` wrote, in evaluation mode.

    Raises:
        ValueError: a file that does not exist, is cut short or is of another kind; weights that are
            missing, unknown, of another shape or not floating point, each by its name.
    """
    folder = Path(folder)
    config, weights = read_config(folder), read_weights(folder / WEIGHTS)
    check_sizes(folder, config, weights)
    model = Model(config, backend=backend)
    model.load_state_dict(weights)
    return model.to(device).eval()


def load_trained(
    name: str = "tiny", *, device: torch.device | str = "cpu", backend: BackendName = "auto"
) -> Model:
    """A model of TRAINED: the result of `msa train --preset name`.

    Raises:
        ValueError: an unknown name, or a model that this installation does not contain.

    >>> load_trained("tiny").config.layers
    3
    """
    if name not in TRAINED:
        raise ValueError(f"name must be {' or '.join(sorted(TRAINED))}, got {name!r}")
    return load(folder_of(name), device=device, backend=backend)


def folder_of(name: str) -> Path:
    """The folder of a trained model by its name; any other name is itself a folder.

    Raises:
        ValueError: a model of TRAINED that this installation does not contain.
    """
    folder = TRAINED.get(name, Path(name))
    if name in TRAINED and not folder.exists():
        raise ValueError(
            f"the model {name} must be given as its folder, for the installed package does not "
            f"contain it: the repository has it in trained/{name}"
        )
    return folder


def shipped() -> dict[str, Path]:
    """The trained models that this installation contains, and their folders; use TRAINED."""
    warnings.warn("shipped() is replaced by TRAINED", DeprecationWarning, stacklevel=2)
    return {name: folder for name, folder in TRAINED.items() if folder.exists()}


def read_config(folder: Path) -> ModelConfig:
    """The sizes that `save` wrote beside the weights."""
    path = folder / CONFIG
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return ModelConfig.from_dict(values)
    except OSError as error:
        raise ValueError(f"{path} must be the configuration of a model, {reason(error)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the configuration of a model: {error}") from error


def check_sizes(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Compare the weights with the sizes, before a model of these sizes takes memory."""
    path, vision = folder / WEIGHTS, config.vision
    layers = 0 if vision is None else vision.layers
    if layers > len(weights):
        raise ValueError(
            f"{path} must have weights for each of vision.layers = {layers}, "
            f"got {len(weights)} in all"
        )
    try:
        with torch.device("meta"):
            wanted = Model(config, backend="torch").state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # more bytes than torch can count
        raise ValueError(
            f"{folder / CONFIG} must have the sizes of {path}, got far larger ones"
        ) from error
    check_weights(str(path), wanted, weights)


def load_weights(model: Model, folder: Path) -> str:
    """Load the weights of a folder into a model. Returns the SHA-256 of their file.

    Raises:
        ValueError: as in `load`; or weights that are not finite.
    """
    path = folder / WEIGHTS
    weights = read_weights(path)
    check_weights(str(path), model.state_dict(), weights)
    check_finite(str(path), weights)
    model.load_state_dict(weights)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by their names."""
    try:
        return load_file(path)
    except OSError as error:
        raise ValueError(f"{path} must be a safetensors file, {reason(error)}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error


def reason(error: OSError) -> str:
    """The end of a message about a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "got no such file"
    return f"got no readable file: {files.why(error)}"


# -- checks ---------------------------------------------------------------------------------------
def check_device(device: str) -> None:
    """The device is cpu or an existing CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = {"cpu", *(("cuda",) if count else ()), *(f"cuda:{i}" for i in range(count))}
    if device not in names:
        known = "cpu, for this machine has no CUDA device"
        if count:
            known = f"cpu, cuda or cuda:N with N from 0 to {count - 1}"
        raise ValueError(f"device must be {known}, got {device!r}")


def check_weights(where: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Both have the same names with the same shapes. Messages begin with `where`."""
    missing, unexpected = wanted.keys() - got.keys(), got.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            f"{where} must have the model's weights, got{differences(missing, unexpected)}"
        )
    for name, weight in wanted.items():
        if list(weight.shape) != list(got[name].shape):
            raise ValueError(
                f"{where} must have {name} of shape {list(weight.shape)}, "
                f"got {list(got[name].shape)}"
            )
        if weight.is_floating_point() and not got[name].is_floating_point():
            raise ValueError(
                f"{where} must have {name} in a floating point dtype, got {got[name].dtype}"
            )


def check_finite(where: str, weights: Mapping[str, Tensor]) -> None:
    """No weight is NaN or infinite."""
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{where} must have finite weights, got NaN or infinity in {name}")
