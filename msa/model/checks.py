"""The checks of a model's configuration, inputs and files, in the manner of `msa.checks` (R20)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from msa import checks
from msa.config import MSAConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from msa.ir import Sequences
    from msa.model.config import ModelConfig, VisionConfig
    from msa.model.findings import RunOptions
    from msa.model.generate import Sampling
    from msa.model.train import TrainOptions

KINDS = {"attention": ("dense", "msa"), "mlp": ("dense", "moe")}
MODES = ("sparse", "dense")


# -- configurations -------------------------------------------------------------------------------
def check_vision_config(config: VisionConfig) -> None:
    """Sizes of at least 1; heads that share the width out and have a number to turn per axis."""
    for name in ("width", "layers", "heads", "mlp_width", "projector_width", "channels"):
        checks.check_count(f"vision.{name}", getattr(config, name), 1)
    for name in ("patch", "frames", "merge"):
        checks.check_count(f"vision.{name}", getattr(config, name), 1)
    if config.width % config.heads:
        raise ValueError(
            f"vision.width must be a multiple of vision.heads = {config.heads}, got {config.width}"
        )
    if config.head_dim < 6:
        raise ValueError(
            f"vision.width must be at least 6 per head, a pair for each of three axes, "
            f"got {config.head_dim}"
        )
    checks.check_positive("vision.rope_theta", config.rope_theta)
    checks.check_positive("vision.norm_eps", config.norm_eps)


def check_model_config(config: ModelConfig) -> None:
    """Sizes of at least 1, one kind of attention and of MLP per layer, token ids in range."""
    for name, known in KINDS.items():
        kinds = getattr(config, name)
        if not isinstance(kinds, tuple) or not kinds or any(kind not in known for kind in kinds):
            raise ValueError(f"{name} must be a tuple of {' or '.join(known)}, got {kinds!r}")
    if len(config.mlp) != len(config.attention):
        raise ValueError(
            f"mlp must have an entry for each of the {len(config.attention)} layers that "
            f"attention has, got {len(config.mlp)}"
        )
    for name in (
        "vocab_size", "width", "heads", "groups", "head_dim", "index_dim", "mlp_width", "experts",
        "experts_per_token", "expert_width", "shared_width", "mixed_tokens",
    ):  # fmt: skip
        checks.check_count(name, getattr(config, name), 1)
    if config.heads % config.groups:
        raise ValueError(
            f"heads must be a multiple of groups = {config.groups}, got {config.heads}"
        )
    checks.check_count("rotary_dim", config.rotary_dim, 2)
    least = min(config.head_dim, config.index_dim if "msa" in config.attention else config.head_dim)
    if config.rotary_dim % 2 or config.rotary_dim > least:
        raise ValueError(
            f"rotary_dim must be even and at most {least}, the smaller of head_dim and index_dim, "
            f"got {config.rotary_dim}"
        )
    if config.experts_per_token > config.experts:
        raise ValueError(
            f"experts_per_token must be at most experts = {config.experts}, "
            f"got {config.experts_per_token}"
        )
    for name in (
        "rope_theta",
        "routed_scale",
        "swiglu_alpha",
        "swiglu_limit",
        "norm_eps",
        "init_std",
    ):
        checks.check_positive(name, getattr(config, name))
    checks.check_type("msa", config.msa, MSAConfig)
    checks.check_flag("tied_head", config.tied_head)
    checks.check_flag("index_gradient", config.index_gradient)
    for name in ("image_token", "video_token"):
        token = getattr(config, name)
        if token is not None:
            checks.check_count(name, token, 0)
            if config.vision is None:
                raise ValueError(f"{name} must be None in a model without vision, got {token}")
            if token >= config.vocab_size:
                raise ValueError(
                    f"{name} must be below vocab_size = {config.vocab_size}, got {token}"
                )
    if config.vision is not None and config.image_token is None:
        raise ValueError("image_token must be given in a model with vision, got None")
    if config.image_token is not None and config.image_token == config.video_token:
        raise ValueError(f"video_token must differ from image_token, got {config.video_token}")


def read_fields(name: str, values: Any, cls: type) -> dict[str, Any]:
    """A mapping with every field that `cls` asks for, and none that it does not know."""
    if not isinstance(values, dict):
        raise TypeError(f"{name} must be a dict, got {checks.kind(values)}")
    known = {f.name for f in fields(cls)}
    wanted = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
    if values.keys() - known or wanted - values.keys():
        raise ValueError(
            f"{name} must have the fields of {cls.__name__}, "
            f"got{_differences(wanted - values.keys(), values.keys() - known)}"
        )
    return values


def read_kinds(name: str, kinds: Any) -> tuple[str, ...]:
    """JSON knows lists only."""
    if not isinstance(kinds, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {checks.kind(kinds)}")
    return tuple(kinds)


# -- inputs ---------------------------------------------------------------------------------------
def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Packed token ids."""
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have shape [T], got {list(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex():
        raise TypeError(f"tokens must hold integers, got {tokens.dtype}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"tokens must be from 0 to {vocab_size - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}"
        )


def check_total(sequences: Sequences, tokens: Tensor) -> None:
    """At least one sequence; the last border is the number of tokens."""
    if sequences.batch < 1:
        raise ValueError("cu_seqlens must have at least two borders, got one")
    if sequences.total_q != len(tokens):
        raise ValueError(f"cu_seqlens must end with T = {len(tokens)}, got {sequences.total_q}")


def check_slots(slots: Sequence[int], sequences: int, room: int) -> None:
    """A place in the cache for each sequence, no two alike."""
    if len(slots) != sequences or len(set(slots)) != sequences:
        raise ValueError(
            f"slots must name a different one for each of the {sequences} sequences, "
            f"got {list(slots)}"
        )
    for slot in slots:
        checks.check_count("slots", slot, 0)
        if slot >= room:
            raise ValueError(f"slots must be from 0 to {room - 1}, got {slot}")


def check_mode(mode: Any) -> None:
    """How MSA layers attend."""
    if mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(MODES)}, got {mode!r}")


def check_images(
    name: str, patches: Tensor, grids: Sequence[tuple[int, int, int]], config: VisionConfig
) -> None:
    """As many patches as the grids say, each of the tower's size; sides that can be merged."""
    for grid in grids:
        if len(grid) != 3 or min(grid) < 1 or grid[1] % config.merge or grid[2] % config.merge:
            raise ValueError(
                f"{name}.grids must hold (frames, rows, columns), rows and columns being multiples "
                f"of merge = {config.merge}, got {tuple(grid)}"
            )
    wanted = [sum(t * h * w for t, h, w in grids), config.patch_values]
    if list(patches.shape) != wanted:
        raise ValueError(
            f"{name}.patches must have shape [patches, values] = {wanted}, "
            f"got {list(patches.shape)}"
        )


def check_pictures(name: str, pictures: Any, token: int | None) -> None:
    """Pictures only where a token stands for them."""
    if pictures is not None and token is None:
        raise ValueError(
            f"{name}s must be None in a model whose config has no {name}_token, "
            f"got {checks.kind(pictures)}"
        )


def check_places(name: str, places: int, tokens: int) -> None:
    """One place in the text for every token of the pictures."""
    if places != tokens:
        raise ValueError(
            f"tokens must have {tokens} {name} tokens, one for each token of the pictures, "
            f"got {places}"
        )


def check_targets(targets: Tensor, tokens: Tensor) -> None:
    """One target per token."""
    if targets.shape != tokens.shape:
        raise ValueError(
            f"targets must have the shape of tokens = {list(tokens.shape)}, "
            f"got {list(targets.shape)}"
        )


def check_generation(
    prompts: Sequence[Tensor], new_tokens: Any, images: Sequence[Any] | None, chunk: Any
) -> None:
    """At least one prompt, none of them empty, pictures for all or for none."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"prompts must hold at least one text, of at least one token each, "
            f"got lengths {[len(prompt) for prompt in prompts]}"
        )
    checks.check_count("new_tokens", new_tokens, 1)
    checks.check_count("chunk", chunk, 1)
    if images is not None and len(images) != len(prompts):
        raise ValueError(
            f"images must have an entry for each of the {len(prompts)} prompts, got {len(images)}"
        )


def check_document(
    length: Any, records: Any, questions: Any, record: int, question: int, name: str = "length"
) -> None:
    """No more questions than records, a byte of prose at least; `name` is that of `length`."""
    for what, value in ((name, length), ("records", records), ("questions", questions)):
        checks.check_count(what, value, 1)
    if questions > records:
        raise ValueError(f"questions must be at most records = {records}, got {questions}")
    least = records * record + questions * question + 1
    if length < least:
        raise ValueError(
            f"{name} must be at least {least} for {records} records and {questions} questions, "
            f"got {length}"
        )


def check_supply(
    length: int, records: int, prose: int, most_prose: int, keys: int, name: str = "length"
) -> None:
    """As much prose as there is, and a key for each record."""
    if records > keys:
        raise ValueError(f"records must be at most {keys:,}, the number of keys, got {records}")
    if prose > most_prose:
        raise ValueError(
            f"{name} must be at most {length - prose + most_prose:,}, for there are "
            f"{most_prose:,} bytes of such prose, got {length}"
        )


def check_sampling(sampling: Sampling) -> None:
    """A temperature of 0 or more, an integer as seed."""
    checks.check_seed("seed", sampling.seed)
    if sampling.temperature != 0:
        checks.check_positive("temperature", sampling.temperature)


# -- training -------------------------------------------------------------------------------------
def check_training(options: TrainOptions, presets: tuple[str, ...]) -> None:
    """A known preset, steps or minutes but not both, shares in range."""
    if options.preset not in presets:
        raise ValueError(f"preset must be {' or '.join(presets)}, got {options.preset!r}")
    checks.check_seed("seed", options.seed)
    if options.steps is not None:
        checks.check_count("steps", options.steps, 1)
    if options.minutes is not None:
        checks.check_positive("minutes", options.minutes)
    if options.steps is not None and options.minutes is not None:
        raise ValueError(f"minutes must be None where steps are given, got {options.minutes}")
    if options.attention not in (None, "msa", "dense", "window"):
        raise ValueError(f"attention must be msa, dense or window, got {options.attention!r}")
    if options.attention == "window" and options.local_blocks is not None:
        raise ValueError(
            "local_blocks must be None where attention is window, which sets them, "
            f"got {options.local_blocks}"
        )
    if options.warm_up is not None and not 0 <= options.warm_up <= 1:
        raise ValueError(f"warm_up must be from 0 to 1, got {options.warm_up}")
    if options.kl is not None and not 0 <= options.kl < math.inf:
        raise ValueError(f"kl must be finite and at least 0, got {options.kl}")
    if options.start is not None and options.start.resolve() == options.out.resolve():
        raise ValueError(f"out must be another folder than start, got {options.out} for both")


def check_processes(processes: int, devices: int) -> None:
    """A GPU for each."""
    if processes > devices:
        raise ValueError(
            f"nproc-per-node must be at most {devices}, the number of GPUs, got {processes}"
        )


def check_steps(wanted: int | None, planned: int) -> None:
    """A run is as long as it was planned to be: its learning rates depend on that."""
    if wanted is not None and wanted != planned:
        raise ValueError(f"steps must be {planned}, as in the run that is continued, got {wanted}")


def check_state(where: Path, state: Any, known: Iterable[str]) -> None:
    """A dict with the entries that `Trainer.save` writes, steps being numbers."""
    if not isinstance(state, dict) or state.keys() != set(known):
        raise bad_state(where, "it holds other things")
    for name in ("step", "steps"):
        if not isinstance(state[name], int):
            raise bad_state(where, f"its {name} is no number")


def bad_state(where: Path, reason: str) -> ValueError:
    """What to raise for a file from which no run can go on."""
    return ValueError(
        f"{where} must be the state of a run as msa train writes it, but {reason}: give another "
        f"folder, or remove this one to begin again"
    )


def check_metrics(where: Path, lines: Sequence[bytes], steps: int) -> None:
    """A whole line for each step that the state has behind it, in their order."""
    for number in range(steps):
        line = lines[number] if number < len(lines) else b""
        try:
            step = json.loads(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if step != number:
            raise ValueError(
                f"{where} must have a line for each of the {steps} steps that were taken, got "
                f"{'another' if line else 'none'} in place of step {number}: give another folder, "
                f"or remove this one to begin again"
            )


def check_settings(where: str, found: dict[str, Any], own: dict[str, Any]) -> None:
    """A run goes on under the settings that it began with."""
    differing = [name for name in own if found.get(name) != own[name]]
    if differing:
        raise ValueError(
            f"{where} must be of a run with these settings, got another {', '.join(differing)}: "
            f"give another folder"
        )


def read_vision(config: ModelConfig) -> VisionConfig:
    """The tower's sizes, without which there are no pictures to be read."""
    if config.vision is None:
        raise ValueError("vision must be given in a model that reads documents, got None")
    return config.vision


def check_has_dense(config: ModelConfig) -> None:
    """A layer that can be given an index."""
    if "dense" not in config.attention:
        raise ValueError(f"attention must have a dense layer to convert, got {config.attention}")


def check_findings(options: RunOptions, known: Iterable[str]) -> None:
    """Rows that there are, seeds, and at least one of everything else."""
    for row in options.rows:
        if row not in known:
            raise ValueError(f"rows must be of {', '.join(known)}, got {row!r}")
    for seed in options.seeds:
        checks.check_seed("seeds", seed)
    for name in ("rows", "seeds"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must name at least one, and each once, got {values}")
    for name in ("workers", "steps", "documents"):
        checks.check_count(name, getattr(options, name), 1)
    if options.minutes is not None:
        checks.check_positive("minutes", options.minutes)


def check_same_findings(where: str, found: dict[str, Any], own: dict[str, Any]) -> None:
    """Runs of one file are told the same things."""
    for name, value in own.items():
        if found.get(name) != value:
            raise ValueError(f"{where} must be of {name} {value}, got {found.get(name)}")


NUMBER, MAYBE = (int, float), (int, float, type(None))
JUDGED = {"prose": MAYBE, "answers": MAYBE, "near": MAYBE, "far": MAYBE}
FOUND = {
    "device": str, "torch": str, "date": str, "steps": int, "documents": int,
    "runs": [{
        "row": str, "seed": int, "command": str, "kl": MAYBE, "block_recall": MAYBE,
        "score_recall": MAYBE, "steepest": MAYBE, **JUDGED, "budgets": [{"k": int, **JUDGED}],
        "lengths": [{"tokens": int, "how": str, "answers": MAYBE}],
    }],
}  # fmt: skip
"""What a results file of findings holds, at least."""


def check_found(where: str, found: Any, form: Any = FOUND) -> None:
    """What `msa findings run` wrote: objects, lists and values of the kinds in `form`.

    >>> check_found("a.json", {"steps": "3"}, {"steps": int})
    Traceback (most recent call last):
    ValueError: a.json must be what msa findings run wrote, got another kind of value as steps: '3'
    """
    told = "must be what msa findings run wrote, got"
    if isinstance(form, dict):
        missing = [name for name in form if not isinstance(found, dict) or name not in found]
        if missing:
            raise ValueError(f"{where} {told} a part without {', '.join(missing)}")
        for name, inner in form.items():
            value = found[name]
            if isinstance(inner, list):
                if not isinstance(value, list):
                    raise ValueError(f"{where} {told} {name} that are no list")
                for part in value:
                    check_found(where, part, inner[0])
            elif not isinstance(value, inner) or isinstance(value, bool):
                raise ValueError(f"{where} {told} another kind of value as {name}: {value!r:.40}")


# -- weights --------------------------------------------------------------------------------------
def check_trained(name: str, known: list[str]) -> None:
    """A model that comes with the package."""
    if name not in known:
        raise ValueError(f"name must be {' or '.join(known)}, got {name!r}")


def check_device(device: str) -> None:
    """cpu, or a CUDA device that is there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = {"cpu", *(("cuda",) if count else ()), *(f"cuda:{i}" for i in range(count))}
    if device not in names:
        known = "cpu, for this machine has no CUDA device"
        if count:
            known = f"cpu, cuda or cuda:N with N from 0 to {count - 1}"
        raise ValueError(f"device must be {known}, got {device!r}")


def check_layers(where: str, layers: int, weights: int) -> None:
    """No more layers of the vision tower than the file has weights for."""
    if layers > weights:
        raise ValueError(
            f"{where} must have weights for each of vision.layers = {layers}, got {weights} in all"
        )


def check_weights(where: str, wanted: dict[str, Any], got: dict[str, Any]) -> None:
    """The same names, and the same shape under each; `where` says whose weights they are."""
    missing, unexpected = wanted.keys() - got.keys(), got.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            f"{where} must have the model's weights, got{_differences(missing, unexpected)}"
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


def check_finite(where: str, weights: dict[str, Any]) -> None:
    """No NaN and no infinity, of which every answer would be made."""
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{where} must have finite weights, got NaN or infinity in {name}")


def _differences(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    parts = [
        f" {what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if names[8:] else ''}"
        for what, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)))
        if names
    ]
    return ";".join(parts)
