"""One training run as an object: what a step does, and what of it is kept on disk."""

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

from msa import files
from msa.model import checkpoint, checks
from msa.model.attention import Mode
from msa.model.model import Losses, Model
from msa.model.presets import Preset, Schedule
from msa.model.ranks import Ranks
from msa.model.records import Batch, pack, world, write_document

STATE = "state.pt"


class Trainer:
    """A model on its way through the schedule.

    The documents of a step follow from the seed and the number of the step, the rest from what
    `save` writes: so a run that was cut off goes on with the losses that it would have had.
    The first weights are random, or those of the folder `start`. Of several processes each reads a
    share of a step's documents, and all take the same step: that of one process.
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
        """Dense during the warm-up of the index, then sparse."""
        warm = self.step < self.schedule.warm_up * self.schedule.steps
        return "dense" if warm else "sparse"

    def batch(self, step: int) -> Batch:
        """The documents of a step: the same ones whenever they are asked for."""
        schedule, rng = self.schedule, np.random.default_rng([self.seed, step])
        length = int(rng.choice(schedule.contexts))
        records = schedule.records(length)
        documents = [
            write_document(world("train"), length, records, records, rng)
            for _ in range(max(1, schedule.tokens // length))
        ]
        vision = checks.read_vision(self.preset.model)
        return pack(documents, vision, schedule.answers, self.preset.device)

    def losses(self, batch: Batch, mode: Mode) -> Losses:
        """In bfloat16 where the preset says so."""
        kind = torch.device(self.preset.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.preset.half):
            return self.model.losses(
                batch.tokens, batch.targets, batch.cu_seqlens, images=batch.images,
                weights=batch.weights, mode=mode,
            )  # fmt: skip

    def learn(self, batch: Batch, mode: Mode) -> Losses:
        """Losses, gradients and expert loads of the whole batch, whoever read what of it.

        Both losses are means: of the targets by their weights, and of the queries. A process gives
        its own the share that it has in the batch; then all of them are added up.
        """
        own = batch.part(self.ranks.rank, self.ranks.count)
        language, kl = (torch.zeros((), device=batch.weights.device) for _ in range(2))
        if len(own.tokens):
            losses = self.losses(own, mode)
            language = losses.language * (own.weights.sum() / batch.weights.sum())
            kl = losses.kl * (len(own.tokens) / len(batch.tokens))
            (language + self.schedule.kl * kl).backward()
        told = Losses(language.detach(), kl.detach())
        if self.ranks.count > 1:
            weights = list(self.model.parameters())
            for weight in weights:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            loads = [router.load for router in self.model.routers()]
            self.ranks.add([*gradients, told.language, told.kl, *loads])
        return told

    def take_step(self) -> dict[str, Any]:
        """One step, and what there is to tell of it."""
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
        """Set the number of steps to what fits, judged by the first batch of each context.

        Nothing is learned from it, and nothing is left of it.
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
                    if repeat:  # the first time kernels are compiled
                        spent[mode] += (time.perf_counter() - started) / 2 / len(batches)
        self.optimizer.zero_grad(set_to_none=True)
        for router in self.model.routers():
            router.load.zero_()
        warm = self.schedule.warm_up
        (each,) = self.ranks.most([warm * spent["dense"] + (1 - warm) * spent["sparse"]])
        self.schedule = replace(self.schedule, steps=max(1, int(PLANNED * seconds / each)))

    def save(self, folder: Path) -> None:
        """The model as others load it, and all that is needed to go on."""
        state = {
            "settings": self.settings, "steps": self.schedule.steps, "step": self.step,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        checkpoint.save(self.model, folder, half=self.preset.half)
        content = io.BytesIO()
        torch.save(state, content)
        files.write(folder / STATE, content.getvalue())

    def resume(self, folder: Path) -> None:
        """Go on where `save` was last called.

        Raises:
            ValueError: a file that is no whole state, or was saved under other settings.
        """
        path, broken = folder / STATE, (RuntimeError, ValueError, TypeError, KeyError, IndexError)
        content = io.BytesIO(path.read_bytes())  # in a cut file, torch seeks to where none is
        try:
            state = torch.load(content, map_location=self.preset.device, weights_only=True)
        except (pickle.UnpicklingError, EOFError, AttributeError, *broken):
            raise checks.bad_state(path, "it cannot be read") from None
        checks.check_state(path, state, ("settings", "steps", "step", "model", "optimizer"))
        try:
            settings = dict(json.loads(state["settings"]))
        except broken:
            raise checks.bad_state(path, "its settings cannot be read") from None
        checks.check_settings(str(path), settings, json.loads(self.settings))
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except broken:
            raise checks.bad_state(path, "its weights are not those of the model") from None
        self.schedule = replace(self.schedule, steps=state["steps"])
        self.step = state["step"]

    @property
    def settings(self) -> str:
        """What must not change between two parts of a run. The number of steps may be a plan's."""
        preset = replace(self.preset, schedule=replace(self.preset.schedule, steps=1), device="any")
        return json.dumps(asdict(preset) | {"seed": self.seed, "start": self.start})


PLANNED = 0.85
"""The share of the time that is planned for: the rest is for optimizer, tests and saving."""


def split_parameters(model: Model) -> dict[str, list[Tensor]]:
    """The index branches and everything else. They share no loss, so each is clipped by itself."""
    parts: dict[str, list[Tensor]] = {"backbone": [], "index": []}
    for name, weight in model.named_parameters():
        parts["index" if ".index." in name else "backbone"].append(weight)
    return parts


def share_of_rate(schedule: Schedule, step: int) -> float:
    """A straight line up to 1, then a cosine down to the last rate.

    >>> schedule = Schedule(steps=110, contexts=(64,), tokens=64, record_every=9, rate=1.0,
    ...                     rising=10, last_rate=0.1)
    >>> [round(share_of_rate(schedule, step), 2) for step in (0, 4, 9, 10, 60, 110)]
    [0.1, 0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < schedule.rising:
        return (step + 1) / schedule.rising
    fallen = (step - schedule.rising) / max(1, schedule.steps - schedule.rising)
    return schedule.last_rate + (1 - schedule.last_rate) * (1 + math.cos(math.pi * fallen)) / 2
