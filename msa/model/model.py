"""The model: embedding, pictures scattered into the text, layers, head; and what it is trained by.

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
from msa.checks import read_borders
from msa.dispatch import BackendName
from msa.model import checks
from msa.model.attention import Attention, Call, Mode, Watch
from msa.model.cache import Cache, LayerCache
from msa.model.config import ModelConfig
from msa.model.experts import MLP, Experts, Router
from msa.model.norm_rope import RMSNorm, text_turns
from msa.model.vision import Pictures, VisionTower

IGNORE = -100
"""The target of a token whose successor is not asked for."""


@dataclass(frozen=True)
class ModelOutput:
    """Logits of each new token's successor, and with align=True the index branches' mean KL."""

    logits: Float[Tensor, "T vocab"]
    kl: Float[Tensor, ""] | None


@dataclass(frozen=True)
class Losses:
    """The parts of the training loss. No part for the experts: see `Router.balance`."""

    language: Float[Tensor, ""]
    """Mean cross-entropy of the targets, in nats."""
    kl: Float[Tensor, ""]
    """Mean over the MSA layers of KL(main branch || index branch); zero if there is none."""


class Layer(nn.Module):
    """Attention, then an MLP or experts, each on a normed copy and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        moe = config.mlp[layer] == "moe"
        self.mlp = Experts(config) if moe else MLP(config, config.mlp_width)

    def forward(
        self, x: Float[Tensor, "T width"], call: Call, cache: LayerCache | None
    ) -> tuple[Float[Tensor, "T width"], Float[Tensor, ""] | None]:
        """The stream behind the layer, and the KL of its index."""
        out, kl = self.attention(self.attention_norm(x), call, cache)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), kl


class Model(nn.Module):
    """A MiniMax-M3 of the given sizes, with random weights.

    Args:
        config: the sizes.
        backend: who computes MSA layers: "reference", "torch", "triton" or "auto".

    >>> from msa.model.presets import PRESETS
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
        tokens: Int[Tensor, " T"],
        cu_seqlens: Sequence[int] | Tensor | None = None,
        *,
        images: Pictures | Tensor | None = None,
        videos: Pictures | Tensor | None = None,
        cache: Cache | None = None,
        slots: Sequence[int] | None = None,
        mode: Mode = "sparse",
        align: bool = False,
        watch: Watch | None = None,
    ) -> ModelOutput:
        """Read packed tokens, new ones of each sequence.

        Args:
            tokens: of all sequences, behind one another.
            cu_seqlens: their borders (R1); None: one sequence.
            images, videos: what stands in the places of image and video tokens, in their order:
                pictures, or what the tower made of them.
            cache: what was read before, to which the new tokens are added.
            slots: where in the cache each sequence lies; None: 0, 1, 2, ...
            mode: "dense" lets MSA layers attend to everything.
            align: also compute the KL of the index; in mode "dense" its warm-up form (R17).
            watch: is shown what each MSA layer attended with, its selection among it.

        Raises:
            TypeError, ValueError: naming the argument, what was wanted and what came.
        """
        checks.check_tokens(tokens, self.config.vocab_size)
        checks.check_mode(mode)
        call = self._read_call(tokens, cu_seqlens, cache, slots, mode, align)
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
        tokens: Int[Tensor, " T"],
        targets: Int[Tensor, " T"],
        cu_seqlens: Sequence[int] | Tensor | None = None,
        *,
        images: Pictures | Tensor | None = None,
        videos: Pictures | Tensor | None = None,
        weights: Float[Tensor, " T"] | None = None,
        mode: Mode = "sparse",
    ) -> Losses:
        """What training minimises, by its parts.

        Args:
            targets: the token that should follow each token, or IGNORE.
            weights: how much each target counts; None: all the same.
            mode: "dense" for the index warm-up, then "sparse".
            Others as in `forward`.
        """
        checks.check_targets(targets, tokens)
        found = self(tokens, cu_seqlens, images=images, videos=videos, mode=mode, align=True)
        each = F.cross_entropy(found.logits.float(), targets, ignore_index=IGNORE, reduction="none")
        counts = (targets != IGNORE).float()
        counts = counts if weights is None else counts * weights
        language = (each * counts).sum() / counts.sum().clamp(min=1e-9)
        return Losses(language, language.new_zeros(()) if found.kl is None else found.kl)

    def routers(self) -> list[Router]:
        """Those of the layers that have experts, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _read_call(
        self, tokens: Tensor, cu_seqlens: Sequence[int] | Tensor | None, cache: Cache | None,
        slots: Sequence[int] | None, mode: Mode, align: bool,
    ) -> Call:  # fmt: skip
        """The borders of new and of all tokens, and each new token's angle."""
        borders = (0, len(tokens)) if cu_seqlens is None else cu_seqlens
        borders = read_borders("cu_seqlens", borders)
        new = msa.Sequences(borders, borders)
        checks.check_total(new, tokens)
        own = list(range(new.batch)) if slots is None else list(slots)
        before = [0] * new.batch
        if cache is not None:
            checks.check_slots(own, new.batch, len(cache.lengths))
            before = [cache.lengths[slot] for slot in own]
        spans = [(past, past + qs.stop - qs.start) for past, (qs, _) in zip(before, new.spans())]
        borders_k = accumulate((stop for _, stop in spans), initial=0)
        sequences = msa.Sequences(borders, tuple(borders_k))
        positions = torch.cat([torch.arange(*span, device=tokens.device) for span in spans])
        turns = text_turns(positions, self.config.rotary_dim, self.config.rope_theta)
        return Call(sequences, turns, own, mode, align, self.backend)

    def _embed(
        self, tokens: Tensor, images: Pictures | Tensor | None, videos: Pictures | Tensor | None
    ) -> Float[Tensor, "T width"]:
        """Token embeddings, and in the places of picture tokens what the tower saw."""
        x = self.embed(tokens)
        config = self.config
        for name, token, pictures in (
            ("image", config.image_token, images),
            ("video", config.video_token, videos),
        ):
            checks.check_pictures(name, pictures, token)
            if token is None or self.vision is None:
                continue
            (places,) = torch.where(tokens == token)
            seen = x.new_zeros(0, config.width) if pictures is None else pictures
            seen = self.vision(seen) if isinstance(seen, Pictures) else seen
            checks.check_places(name, len(places), len(seen))
            x = x.index_put((places,), seen.to(x.dtype))
        return x

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Normal weights, zero biases; norms, mixing and routers' biases stay as they were made."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.init_std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                for weight in (module.router.weight, module.gate_up, module.down):
                    nn.init.normal_(weight, std=self.config.init_std)
