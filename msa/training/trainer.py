"""One training run as an object: its steps, and its state on disk."""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msa import files
from msa.model import checkpoint
from msa.model.attention import Mode
from msa.model.model import Losses, Model
from msa.training.documents import Batch, pack, vision_of, world, write_document
from msa.training.presets import Preset, Schedule
from msa.training.ranks import Ranks

STATE = "state.pt"
ENTRIES = ("settings", "steps", "step", "model", "optimizer")
"""The entries of the state that `Trainer.save` writes."""
PLANNED = 0.85
"""The share of the time that `Trainer.plan` fills with steps. The rest is for optimizer, tests and
saving."""


class Reading(nn.Module):
    """The losses of a batch as a module, for DistributedDataParallel."""

    def __init__(self, model: Model, preset: Preset, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.half, self.group = model, preset.half, ranks.context_group
        self.kind = torch.device(preset.device).type

    def forward(self, batch: Batch, mode: Mode) -> tuple[Tensor, Tensor]:
        """The language loss and the KL, computed in bfloat16 if the preset says so."""
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.half):
            losses = self.model.losses(
                batch.tokens, batch.targets, batch.cu_seqlens, weights=batch.weights, mode=mode,
                images=batch.images if len(batch.images.grids) else None, group=self.group,
            )  # fmt: skip
        return losses.language, losses.kl


class Trainer:
    """Trains a model by a schedule.

    The documents of a step depend on the seed and the number of the step alone, and `save` writes
    everything else. So a run that was interrupted continues with the same losses. The first weights
    are random, or those in the folder `start`. With several processes, each reads a share of the
    documents of a step, and all take the same step that one process would take.
    """

    def __init__(
        self, preset: Preset, seed: int, start: Path | None = None, ranks: Ranks | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.ranks = Ranks(device=preset.device) if ranks is None else ranks
        self.preset, self.seed, self.schedule = preset, seed, preset.schedule
        model = Model(preset.model, backend=preset.backend)
        self.start = None if start is None else checkpoint.load_weights(model, start)
        self.model = model.to(preset.device).train()
        self.block = preset.model.msa.block_size
        self.read: nn.Module = Reading(self.model, preset, self.ranks)
        if self.ranks.count > 1:  # a rank without a picture has no gradient of the vision tower
            self.read = DistributedDataParallel(
                self.read, broadcast_buffers=False, find_unused_parameters=True
            )
        self.parts = split_parameters(self.model)
        matrices = [w for w in self.model.parameters() if w.ndim >= 2]
        vectors = [w for w in self.model.parameters() if w.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": preset.schedule.decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )
        self.step = 0

    @property
    def mode(self) -> Mode:
        """Dense in the warm-up of the index, then sparse."""
        warm = self.step < self.schedule.warm_up * self.schedule.steps
        return "dense" if warm else "sparse"

    def batch(self, step: int) -> Batch:
        """The documents of a step. They are the same in every call."""
        schedule, rng = self.schedule, np.random.default_rng([self.seed, step])
        length = int(rng.choice(schedule.contexts))
        records = schedule.records(length)
        documents = [
            write_document(world("train"), length, records, records, rng)
            for _ in range(max(1, schedule.tokens // length))
        ]
        vision = vision_of(self.preset.model)
        return pack(documents, vision, schedule.answers, self.preset.device)

    def learn(self, batch: Batch, mode: Mode) -> Losses:
        """Compute the losses, gradients and expert loads of the whole batch, over all processes.

        The language loss is a mean over the targets by their weights, the KL a mean over the
        queries. Each process scales its means by its share of the batch; the sum over all processes
        is the mean of the batch. DistributedDataParallel takes the mean of the gradients of all
        processes, so the loss is multiplied by their number.
        """
        ranks = self.ranks
        own = batch.part(*ranks.share)
        empty = not len(own.tokens)  # fewer documents than shares
        if empty:  # take part in all messages, with a loss of weight 0
            own = batch.part(ranks.share[1] - 1, ranks.share[1])  # the last one is never empty
        queries = 0.0 if empty else len(own.tokens) / len(batch.tokens)
        own = own if ranks.context_group is None else own.sharded(ranks.context_group, self.block)
        targets = 0.0 if empty else float(own.weights.sum() / batch.weights.sum())
        language, kl = self.read(own, mode)
        language, kl = language * targets, kl * queries
        (ranks.count * (language + self.schedule.kl * kl)).backward()
        told = Losses(language.detach(), kl.detach() / ranks.context)
        loads = [router.load for router in self.model.routers()]
        for load in loads if empty else ():
            load.zero_()
        ranks.add([told.language, told.kl, *loads])
        return told

    def take_step(self) -> dict[str, Any]:
        """Take one step. Returns its line of the metrics."""
        started, schedule, mode = time.perf_counter(), self.schedule, self.mode
        rate = schedule.rate * share_of_rate(schedule, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batch(self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.learn(batch, mode)
        norms = {
            f"{name}_gradient": float(nn.utils.clip_grad_norm_(part, schedule.clip))
            for name, part in self.parts.items()
        }
        self.optimizer.step()
        for router in self.model.routers():
            router.balance(schedule.balance)
        told = {"step": self.step, "steps": schedule.steps, "mode": mode}
        told |= {"context": batch.cu_seqlens[1], "rate": rate}
        told |= {"language": losses.language.item(), "kl": losses.kl.item(), **norms}
        self.step += 1
        return told | {"seconds": time.perf_counter() - started}

    def plan(self, seconds: float) -> None:
        """Set the number of steps that fit into the time, by timing a batch of each length.

        The timed batches change no weight.
        """
        spent = {"dense": 0.0, "sparse": 0.0}
        batches = {self.batch(step).cu_seqlens[1]: step for step in range(50)}
        for step in batches.values():
            batch = self.batch(step)
            for mode in ("dense", "sparse"):
                for repeat in range(3):
                    started = time.perf_counter()
                    self.optimizer.zero_grad(set_to_none=True)
                    self.learn(batch, mode).kl.item()
                    if repeat:  # the first time includes the compilation of kernels
                        spent[mode] += (time.perf_counter() - started) / 2 / len(batches)
        self.optimizer.zero_grad(set_to_none=True)
        for router in self.model.routers():
            router.load.zero_()
        warm = self.schedule.warm_up
        (each,) = self.ranks.most([warm * spent["dense"] + (1 - warm) * spent["sparse"]])
        self.schedule = replace(self.schedule, steps=max(1, int(PLANNED * seconds / each)))

    def save(self, folder: Path) -> None:
        """Write the model by `checkpoint.save`, and the state from which `resume` continues."""
        state = {
            "settings": self.settings, "steps": self.schedule.steps, "step": self.step,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        checkpoint.save(self.model, folder, half=self.preset.half)
        content = io.BytesIO()
        torch.save(state, content)
        files.write(folder / STATE, content.getvalue())

    def resume(self, folder: Path) -> None:
        """Continue from the last call of `save`.

        Raises:
            ValueError: a file that is not a whole state, or a state with other settings.
        """
        path, broken = folder / STATE, (RuntimeError, ValueError, TypeError, KeyError, IndexError)
        content = io.BytesIO(path.read_bytes())  # torch seeks beyond the end of a file that was cut
        try:
            state = torch.load(content, map_location=self.preset.device, weights_only=True)
        except (pickle.UnpicklingError, EOFError, AttributeError, *broken):
            raise bad_state(path, "it cannot be read") from None
        check_state(path, state)
        try:
            settings = dict(json.loads(state["settings"]))
        except broken:
            raise bad_state(path, "its settings cannot be read") from None
        check_settings(str(path), settings, json.loads(self.settings))
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except broken:
            raise bad_state(path, "its weights are not those of the model") from None
        self.schedule = replace(self.schedule, steps=state["steps"])
        self.step = state["step"]

    @property
    def settings(self) -> str:
        """The settings that must not change within a run, as JSON. `plan` may change the steps."""
        preset = replace(self.preset, schedule=replace(self.preset.schedule, steps=1), device="any")
        return json.dumps(asdict(preset) | {"seed": self.seed, "start": self.start})


def split_parameters(model: Model) -> dict[str, list[Tensor]]:
    """The weights of the index branches and the other weights.

    The two parts share no loss, so their gradients are clipped separately.
    """
    parts: dict[str, list[Tensor]] = {"backbone": [], "index": []}
    for name, weight in model.named_parameters():
        parts["index" if ".index." in name else "backbone"].append(weight)
    return parts


def share_of_rate(schedule: Schedule, step: int) -> float:
    """The learning rate as a share of the highest: a line up to 1, then a cosine down.

    >>> schedule = Schedule(steps=110, contexts=(64,), tokens=64, record_every=9, rate=1.0,
    ...                     rising=10, last_rate=0.1)
    >>> [round(share_of_rate(schedule, step), 2) for step in (0, 4, 9, 10, 60, 110)]
    [0.1, 0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < schedule.rising:
        return (step + 1) / schedule.rising
    fallen = (step - schedule.rising) / max(1, schedule.steps - schedule.rising)
    return schedule.last_rate + (1 - schedule.last_rate) * (1 + math.cos(math.pi * fallen)) / 2


# -- checks ---------------------------------------------------------------------------------------
def check_state(where: Path, state: Any) -> None:
    """The state is a dict with the entries of `Trainer.save`, and its steps are numbers."""
    if not isinstance(state, dict) or state.keys() != set(ENTRIES):
        raise bad_state(where, "it holds other things")
    for name in ("step", "steps"):
        if not isinstance(state[name], int):
            raise bad_state(where, f"its {name} is not a number")


def bad_state(where: Path, reason: str) -> ValueError:
    """The error for a file from which no run can continue."""
    return ValueError(
        f"{where} must be the state of a run as msa train writes it, but {reason}: give another "
        f"folder, or remove this one to start again"
    )


def check_settings(where: str, found: dict[str, Any], own: dict[str, Any]) -> None:
    """A run continues with the settings that it started with."""
    differing = [name for name in own if found.get(name) != own[name]]
    if differing:
        raise ValueError(
            f"{where} must be of a run with these settings, got another {', '.join(differing)}: "
            f"give another folder"
        )
