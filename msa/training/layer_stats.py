"""Statistics of each layer while a model reads: how good its index is, which experts it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import msa
from msa.model.attention import Attention, Seen
from msa.model.experts import Router
from msa.model.model import Model
from msa.recall import Recall, measure
from msa.training.documents import Document, pack, vision_of

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerStats:
    """Numbers of each layer, in order. Only layers with an index have numbers of an index."""

    kl: tuple[float, ...]
    """KL(main branch || index branch) over the selected blocks (R17)."""
    block_recall: Rows
    """`Recall.blocks` of each layer and group."""
    score_recall: Rows
    """`Recall.score` of each layer and group."""
    expert_load: Rows
    """For each layer with experts, the share of choices of each expert. The shares sum to 1."""

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return asdict(self)


@torch.no_grad()
def measure_layers(
    model: Model, documents: Sequence[Document], *, half: bool = False
) -> LayerStats:
    """Let a model read all documents at once, by MSA. Its training mode is left as it was.

    >>> from msa.model.checkpoint import load_trained
    >>> from msa.training.evaluate import unseen_documents
    >>> documents = unseen_documents(300, 2, 2, 1)
    >>> found = measure_layers(load_trained("tiny", backend="torch"), documents)
    >>> len(found.kl), [len(groups) for groups in found.block_recall]  # three layers, two groups
    (3, [2, 2, 2])
    >>> [round(sum(shares), 6) for shares in found.expert_load]  # two layers have experts
    [1.0, 1.0]
    """
    device, was_training = model.embed.weight.device, model.training
    batch = pack(list(documents), vision_of(model.config), device=device)
    recalls: list[list[Recall]] = []
    kls: list[float] = []
    loads: list[tuple[float, ...]] = []

    def see_attention(_module: Any, _given: Any, gave: tuple[Tensor, Tensor | None]) -> None:
        kls.extend([] if gave[1] is None else [gave[1].item()])

    def see_router(router: Router, _given: Any, gave: tuple[Tensor, Tensor]) -> None:
        counts = torch.bincount(gave[0].flatten(), minlength=len(router.bias))
        loads.append(tuple((counts / counts.sum()).tolist()))

    modules = list(model.modules())
    hooks = [m.register_forward_hook(see_attention) for m in modules if isinstance(m, Attention)]
    hooks += [m.register_forward_hook(see_router) for m in modules if isinstance(m, Router)]
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            model(
                batch.tokens, batch.cu_seqlens, images=batch.images, align=True,
                watch=lambda seen: recalls.append(recall_of_groups(seen)),
            )  # fmt: skip
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return LayerStats(
        tuple(kls), tuple(tuple(r.blocks for r in groups) for groups in recalls),
        tuple(tuple(r.score for r in groups) for groups in recalls), tuple(loads),
    )  # fmt: skip


def recall_of_groups(seen: Seen) -> list[Recall]:
    """The recall of each group by itself."""
    chosen, groups = seen.selection, seen.k.shape[1]
    return [
        measure(
            q, seen.k[:, g : g + 1],
            msa.Selection(chosen.indices[:, g : g + 1], chosen.sequences, chosen.block_size),
            seen.softmax_scale,
        )
        for g, q in enumerate(seen.q.chunk(groups, dim=1))
    ]  # fmt: skip
