"""The model: embedding, pictures in their places in the text, layers, head; and its losses.

tokens ─ embed ─┬─ [norm ─ attention ─ +] ─ [norm ─ MLP or experts ─ +] ─ ... ─ norm ─ head
pictures ─ tower ┘ (in the places of image tokens)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import msa
from msa.checks import check_count, kind, read_borders
from msa.dispatch import BackendName
from msa.model.attention import MODES, Attention, LayerCall, Mode, Watch
from msa.model.cache import Cache, LayerCache
from msa.model.config import ModelConfig
from msa.model.context import Context
from msa.model.experts import MLP, Experts, Router
from msa.model.norm_rope import RMSNorm, text_turns
from msa.model.vision import Pictures, VisionTower
from msa.parallel.agreement import agree
from msa.parallel.groups import Group

IGNORE = -100
"""The target of a token that has no loss."""


@dataclass(frozen=True)
class ModelOutput:
    """What `Model.forward` returns."""

    logits: Float[Tensor, "T vocab"]
    """For each new token, the logits of the token after it."""
    kl: Float[Tensor, ""] | None
    """With align=True the mean KL of the index branches, else None."""


@dataclass(frozen=True)
class Losses:
    """The parts of the training loss. The experts have none: `Router.balance` balances them."""

    language: Float[Tensor, ""]
    """Mean cross-entropy of the targets, in nats."""
    kl: Float[Tensor, ""]
    """Mean over the MSA layers of KL(main branch || index branch); zero without MSA layers."""


class Layer(nn.Module):
    """Attention, then an MLP or experts. Each reads the normed stream and is added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        moe = config.mlp[layer] == "moe"
        self.mlp = Experts(config) if moe else MLP(config, config.mlp_width)

    def forward(
        self, x: Float[Tensor, "T width"], call: LayerCall, cache: LayerCache | None
    ) -> tuple[Float[Tensor, "T width"], Float[Tensor, ""] | None]:
        """The stream after the layer, and the KL of its index."""
        out, kl = self.attention(self.attention_norm(x), call, cache)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), kl


class Model(nn.Module):
    """A MiniMax-M3 of the given sizes, with random weights.

    Args:
        config: the sizes.
        backend: the backend of the MSA layers: "reference", "torch", "triton" or "auto".

    >>> from msa.training.presets import PRESETS
    >>> model = Model(PRESETS["tiny"].model)
    >>> tokens = torch.tensor([7, 8, 9, 10, 11])
    >>> model(tokens, [0, 2, 5]).logits.shape  # two texts, of two and of three tokens
    torch.Size([5, 257])
    """

    def __init__(self, config: ModelConfig, *, backend: BackendName = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.embed = nn.Embedding(config.vocab_size, config.width)
        vision = config.vision
        self.vision = None if vision is None else VisionTower(vision, config.width)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        self.head = head
        self._draw_weights()

    def forward(
        self,
        tokens: Int[Tensor, " T"], cu_seqlens: Sequence[int] | Tensor | None = None, *,
        images: Pictures | Tensor | None = None, videos: Pictures | Tensor | None = None,
        cache: Cache | None = None, slots: Sequence[int] | None = None, mode: Mode = "sparse",
        align: bool = False, watch: Watch | None = None, group: Group | None = None,
    ) -> ModelOutput:  # fmt: skip
        """Read packed tokens: the new tokens of each sequence.

        Args:
            tokens: the token ids of all sequences, one sequence after the other.
            cu_seqlens: their borders (R1); None: one sequence.
            images, videos: for the image and video tokens, in their order: pictures, or the output
                of the vision tower for them.
            cache: the tokens before the new ones. The new tokens are added to it.
            slots: the slot of each sequence in the cache; None: 0, 1, 2, ...
            mode: with "dense", MSA layers attend to all tokens.
            align: also compute the KL of the index; in mode "dense" its warm-up form (R17).
            watch: a function that gets what each MSA layer attended with; see `Seen`.
            group: the processes that read these sequences together (`msa.parallel`). Then tokens
                are this process's rows, cu_seqlens the borders of the whole sequences, images those
                of this process's image tokens, and the KL that of all tokens.

        Raises:
            TypeError, ValueError: naming the argument, what was wanted and what came.
        """
        _check_tokens(tokens, self.config.vocab_size)
        if mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(MODES)}, got {mode!r}")
        if group is None:
            call = self._read_call(tokens, cu_seqlens, cache, slots, mode, align)
        else:
            check_absent_with_group(cache=cache, slots=slots, watch=watch)
            call = self._read_shards(tokens, cu_seqlens, group, mode, align)
        call = call if watch is None else replace(call, watch=watch)
        x = self._embed(tokens, images, videos)
        kls: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, kl = layer(x, call, None if cache is None else cache.layers[i])
            kls += [] if kl is None else [kl]
        x = self.norm(x)
        logits = F.linear(x, self.embed.weight) if self.head is None else self.head(x)
        return ModelOutput(logits, torch.stack(kls).mean() if kls else None)

    def losses(
        self,
        tokens: Int[Tensor, " T"], targets: Int[Tensor, " T"],
        cu_seqlens: Sequence[int] | Tensor | None = None, *,
        images: Pictures | Tensor | None = None, videos: Pictures | Tensor | None = None,
        weights: Float[Tensor, " T"] | None = None, mode: Mode = "sparse",
        group: Group | None = None,
    ) -> Losses:  # fmt: skip
        """The parts of the training loss. The other arguments are those of `forward`.

        Args:
            targets: the token that should follow each token, or IGNORE.
            weights: the weight of each target; None: all targets weigh the same.
            mode: "dense" for the index warm-up, then "sparse".
            group: as in `forward`. The language loss is that of this process's targets.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens = {list(tokens.shape)}, "
                f"got {list(targets.shape)}"
            )
        found = self(
            tokens, cu_seqlens, images=images, videos=videos, mode=mode, align=True, group=group
        )
        each = F.cross_entropy(found.logits.float(), targets, ignore_index=IGNORE, reduction="none")
        counts = (targets != IGNORE).float()
        counts = counts if weights is None else counts * weights
        language = (each * counts).sum() / counts.sum().clamp(min=1e-9)
        return Losses(language, language.new_zeros(()) if found.kl is None else found.kl)

    def routers(self) -> list[Router]:
        """The routers of the layers that have experts, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _read_call(
        self, tokens: Tensor, cu_seqlens: Sequence[int] | Tensor | None, cache: Cache | None,
        slots: Sequence[int] | None, mode: Mode, align: bool,
    ) -> LayerCall:  # fmt: skip
        """What the layers are given: the sequences, the angle of each new token, the options."""
        borders = (0, len(tokens)) if cu_seqlens is None else cu_seqlens
        borders = read_borders("cu_seqlens", borders)
        new = msa.Sequences(borders, borders)
        _check_borders(new, tokens)
        own = list(range(new.batch)) if slots is None else list(slots)
        before = [0] * new.batch
        if cache is not None:
            _check_slots(own, new.batch, len(cache.lengths))
            before = [cache.lengths[slot] for slot in own]
        spans = [(past, past + qs.stop - qs.start) for past, (qs, _) in zip(before, new.spans())]
        borders_k = accumulate((stop for _, stop in spans), initial=0)
        sequences = msa.Sequences(borders, tuple(borders_k))
        positions = torch.cat([torch.arange(*span, device=tokens.device) for span in spans])
        turns = text_turns(positions, self.config.rotary_dim, self.config.rope_theta)
        return LayerCall(sequences, turns, own, mode, align, self.backend)

    def _read_shards(
        self, tokens: Tensor, cu_seqlens: Sequence[int] | Tensor | None, group: Group, mode: Mode,
        align: bool,
    ) -> LayerCall:  # fmt: skip
        """What the layers are given if several processes read the sequences."""
        block_size = self.config.msa.block_size
        shards = agree(group, {"tokens": tokens}, cu_seqlens, block_size)
        context = Context(group, shards)
        spans = [torch.arange(*span, device=tokens.device) for span in context.spans]
        turns = text_turns(torch.cat(spans), self.config.rotary_dim, self.config.rope_theta)
        sequences = msa.Sequences(shards.cu_seqlens, shards.cu_seqlens)
        return LayerCall(sequences, turns, [], mode, align, self.backend, context=context)

    def _embed(
        self, tokens: Tensor, images: Pictures | Tensor | None, videos: Pictures | Tensor | None
    ) -> Float[Tensor, "T width"]:
        """The embedding of each token; for picture tokens the output of the vision tower."""
        x = self.embed(tokens)
        config = self.config
        for name, token, pictures in (
            ("image", config.image_token, images),
            ("video", config.video_token, videos),
        ):
            if pictures is not None and token is None:
                raise ValueError(
                    f"{name}s must be None in a model whose config has no {name}_token, "
                    f"got {kind(pictures)}"
                )
            if token is None or self.vision is None:
                continue
            (places,) = torch.where(tokens == token)
            seen = x.new_zeros(0, config.width) if pictures is None else pictures
            seen = self.vision(seen) if isinstance(seen, Pictures) else seen
            check_places(name, len(places), len(seen))
            x = x.index_put((places,), seen.to(x.dtype))
        return x

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Draw normal weights and set biases to zero. Norms, mixing and router biases are kept."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.init_std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                for weight in (module.router.weight, module.gate_up, module.down):
                    nn.init.normal_(weight, std=self.config.init_std)


# -- checks ---------------------------------------------------------------------------------------
def _check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Token ids are packed integers of the vocabulary."""
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have shape [T], got {list(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex():
        raise TypeError(f"tokens must hold integers, got {tokens.dtype}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"tokens must be from 0 to {vocab_size - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}"
        )


def check_absent_with_group(**others: object) -> None:
    """What reads the tokens of one process alone is not given where several read them."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} must be None where a group is given, got {kind(value)}")


def _check_borders(sequences: msa.Sequences, tokens: Tensor) -> None:
    """There is at least one sequence, and the last border is the number of tokens."""
    if sequences.batch < 1:
        raise ValueError("cu_seqlens must have at least two borders, got one")
    if sequences.total_q != len(tokens):
        raise ValueError(f"cu_seqlens must end with T = {len(tokens)}, got {sequences.total_q}")


def _check_slots(slots: Sequence[int], sequences: int, room: int) -> None:
    """Each sequence has a slot of the cache, and no two have the same."""
    if len(slots) != sequences or len(set(slots)) != sequences:
        raise ValueError(
            f"slots must name a different one for each of the {sequences} sequences, "
            f"got {list(slots)}"
        )
    for slot in slots:
        check_count("slots", slot, 0)
        if slot >= room:
            raise ValueError(f"slots must be from 0 to {room - 1}, got {slot}")


def check_places(name: str, places: int, tokens: int) -> None:
    """The text has one picture token for every token that the vision tower made."""
    if places != tokens:
        raise ValueError(
            f"tokens must have {tokens} {name} tokens, one for each token of the pictures, "
            f"got {places}"
        )
