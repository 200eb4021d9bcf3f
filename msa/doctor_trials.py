"""What `msa doctor` tries: one small call for each backend, device and number format.

The result is what happened in the call, and not a guess from version numbers. The messages of msa
itself say
why a call was refused and what to do, so they are shown as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import msa
from msa import chips

EXTRAS = {
    "verify": ("hypothesis",),
    "demo": ("sklearn", "matplotlib"),
    "model": ("torch", "safetensors", "PIL"),
    "transformers": ("torch", "transformers"),
}
"""The optional dependencies that commands ask for, by the modules that they bring."""
REPORT = "please report this with the output of msa doctor"
SIZES = {"q": (32, 2, 16), "k": (32, 1, 16), "v": (32, 1, 16), "q_idx": (32, 1, 16),
         "k_idx": (32, 16)}  # fmt: skip
CONFIG = msa.MSAConfig(block_size=16, top_k=1)
Versions = dict[str, str | None]
OLDEST = (8, 0)
"""The lowest compute capability on which the triton backend is tried."""


@dataclass(frozen=True)
class Device:
    """A device that tensors can be on."""

    name: str
    model: str
    capability: str = ""
    """The compute capability, or AMD's target such as "gfx942"; empty for the CPU."""
    memory_gib: float | None = None
    """None where it is not known, as below."""
    multiprocessors: int | None = None
    shared_kib: float | None = None
    """Shared memory that one program may have."""
    l2_mib: float | None = None

    @property
    def is_old(self) -> bool:
        """Whether the GPU is older than all that Triton compiles these kernels for.

        >>> Device("cuda:0", "Tesla T4", "7.5").is_old, Device("cuda:0", "MI300X", "gfx942").is_old
        (True, False)
        """
        amd = self.capability.startswith("gfx")
        return not amd and chips.as_numbers(self.capability) < OLDEST


@dataclass(frozen=True)
class Finding:
    """Whether one part runs here, and if not, why."""

    part: str
    runs: bool
    reason: str = ""
    """Why the part does not run; empty if it does."""
    advice: str = ""
    """What to do about it; empty where the reason says it."""


def findings(versions: Versions, devices: list[Device]) -> list[Finding]:
    """All parts; those that need the fewest libraries come first."""
    made = [attempt("reference", lambda: msa.attention(**arrays(), config=CONFIG))]
    if versions["torch"] is None:
        made.append(Finding("torch on cpu", False, "torch is not installed", install("torch")))
    else:
        made.append(attempt("torch on cpu", lambda: attend("torch", "cpu")))
        made.append(attempt("operators (msa.ops)", use_operators))
        made.append(in_interpreter(versions))
    made += [finding for device in devices[1:] for finding in parts_on(device)]
    if len(devices) == 1:
        made.append(no_gpu(versions))
    return made + [extra(name) for name in EXTRAS]


def in_interpreter(versions: Versions) -> Finding:
    """Kernels on the CPU, which run only where they are asked for."""
    part = "triton in its interpreter"
    if versions["triton"] is not None and os.environ.get("TRITON_INTERPRET") != "1":
        set_it = "to run kernels on the CPU (slowly), set TRITON_INTERPRET=1 before Python starts"
        return Finding(part, False, "it is switched off", set_it)
    return attempt(part, lambda: attend("triton", "cpu"))


def parts_on(device: Device) -> Iterator[Finding]:
    """Everything that can run on one CUDA or ROCm device."""
    at, family = device.name, chips.family_of(device.capability)
    yield attempt(f"torch on {at}", lambda: attend("torch", at))
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding(f"triton on {at}", False, "TRITON_INTERPRET=1 is set",
                      "unset it before Python starts to run the kernels on the GPU")  # fmt: skip
        return
    trials: tuple[tuple[str, str, Callable[[], Any]], ...] = (
        ("", "", lambda: attend("triton", at, "float16")),
        (", bfloat16", "", lambda: attend("triton", at, "bfloat16")),
        (", index in 8 bits", "e4m3",
         lambda: attend("triton", at, "float16", index_dtype="fp8_e4m3")),
        (", pages in 8 bits", "e4m3", lambda: decode_eight_bits(at)),
        (", hopper selection", "hopper", lambda: select_on_hopper(at)),
    )  # fmt: skip
    for name, feature, call in trials:
        advice = REPORT
        if device.is_old:
            advice = "it needs compute capability {}.{}".format(*OLDEST)
        elif feature and not getattr(family, feature):
            advice = f"it needs {chips.NEEDS[feature]}"
        yield attempt(f"triton on {at}{name}", call, advice)
    for feature in ("descriptors", "dependent_launch"):
        yield has_feature(device, feature)


# -- the trials -----------------------------------------------------------------------------------
def attempt(part: str, call: Callable[[], Any], advice: str = REPORT) -> Finding:
    """Try a part. `advice` is for errors that are not messages of msa about its arguments."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return Finding(part, False, first_line(error))
    except Exception as error:  # a broken library or compiler may raise anything
        return Finding(part, False, f"{type(error).__name__}: {first_line(error)}", advice)
    return Finding(part, True)


def first_line(error: Exception) -> str:
    """The first line of a message, at most 300 characters of it."""
    return (str(error).strip() or "no message").splitlines()[0][:300]


def arrays() -> dict[str, Any]:
    """The inputs of the small call: two blocks of 16 tokens, two heads in one group."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SIZES.items()}


def tensors(device: str, dtype: str) -> dict[str, Any]:
    """The same inputs as torch tensors."""
    torch = importlib.import_module("torch")
    place = {"device": device, "dtype": getattr(torch, dtype)}
    return {name: torch.tensor(array, **place) for name, array in arrays().items()}


def attend(backend: Any, device: str, dtype: str = "float32", **options: Any) -> None:
    """One small call of attention, and the wait for its result."""
    output = msa.attention(**tensors(device, dtype), config=CONFIG, backend=backend, **options)
    output.out.float().sum().item()


def decode_eight_bits(device: str) -> None:
    """One decode step of the triton backend over pages of 8 bits."""
    torch = importlib.import_module("torch")
    x = tensors(device, "float16")
    pages = [torch.zeros(2, 16, *x[name].shape[1:], device=device) for name in ("k", "v", "k_idx")]
    pool = msa.PagePool(*(page.to(torch.float8_e4m3fn) for page in pages), batch=1)
    pool.append(0, x["k"], x["v"], x["k_idx"])
    step = msa.decode(
        x["q"][None, -1:], x["q_idx"][None, -1:], pool.cache, config=CONFIG, backend="triton"
    )
    step.out.float().sum().item()


def select_on_hopper(device: str) -> None:
    """One selection by the hopper kernels: two blocks of 64 tokens."""
    torch = importlib.import_module("torch")
    q_idx = torch.ones(128, 1, 64, device=device, dtype=torch.bfloat16)
    config = msa.MSAConfig(block_size=64, top_k=2)
    options: dict[str, Any] = {"backend": "triton", "kernels": "hopper"}
    msa.select(q_idx, q_idx[:, 0], config=config, **options).indices.sum().item()


def use_operators() -> None:
    """The small call as a torch operator, on the CPU."""
    importlib.import_module("msa.ops").attention(**tensors("cpu", "float32"), config=CONFIG)


# -- facts that need no trial ---------------------------------------------------------------------
def has_feature(device: Device, feature: str) -> Finding:
    """Whether a GPU has a feature that the kernels do without elsewhere."""
    family, (what, instead) = chips.family_of(device.capability), chips.MISSING[feature]
    if getattr(family, feature):
        return Finding(f"{what} on {device.name}", True)
    return Finding(f"{what} on {device.name}", False,
                   f"it needs {chips.NEEDS[feature]}, got {device.capability}",
                   f"none needed; {instead}")  # fmt: skip


def no_gpu(versions: Versions) -> Finding:
    """Why torch sees no CUDA device."""
    torch, cuda, driver = (versions[name] for name in ("torch", "cuda", "driver"))
    if torch is None:
        reason, advice = "torch is not installed", install("torch,triton")
    elif cuda is None:
        reason = f"torch {torch} has no CUDA"
        advice = "to use a GPU, install a build of torch for CUDA"
    elif driver is None:
        reason = "nvidia-smi finds no driver"
        advice = "install the NVIDIA driver, or give the container access to the GPU"
    else:
        reason = f"torch {torch} for CUDA {cuda} sees no device under driver {driver}"
        advice = "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for this CUDA"
    return Finding("triton on a GPU", False, reason, advice)


def extra(name: str) -> Finding:
    """Whether all modules of an extra can be found; none is imported."""
    missing = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
    if not missing:
        return Finding(f"extra {name}", True)
    reason = f"{' and '.join(missing)} not installed"
    return Finding(f"extra {name}", False, reason, install(name))


def install(extras: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'msa-stack[{extras}]'"
