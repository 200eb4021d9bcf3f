"""Train the index projections of a converted model, and measure their recall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from msa.integrations import messages
from msa.integrations.converted_layers import CONVERTED, indexes
from msa.integrations.index_projections import Phase
from msa.recall import Recall


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Set what the converted layers do from now on.

    "sparse"    selects and attends
    "train"     the same, and computes the loss over the selected tokens
    "warm_up"   attends densely, and computes the loss over all visible tokens
    "measure"   attends densely, and compares its selection with the best blocks

    Raises:
        TypeError, ValueError: the model is not converted, or the phase is unknown.
    """
    messages.check_phase(phase)
    found = indexes(model)
    messages.check_has_layers(len(found), CONVERTED, model)
    for index in found.values():
        index.phase, index.kl, index.recall = phase, None, None


def index_losses(model: nn.Module) -> dict[int, Tensor]:
    """The loss of each converted layer in the last forward pass of "train" or "warm_up"."""
    return {layer: index.kl for layer, index in indexes(model).items() if index.kl is not None}


def index_loss(model: nn.Module) -> Tensor:
    """The mean loss of the converted layers, to add to the model's own loss.

    It has gradients in the index projections only.

    Raises:
        TypeError: there was no forward pass in the phase "train" or "warm_up".
        ValueError: gradients are enabled, but that pass ran under no_grad. Gradient checkpointing
            with use_reentrant=True does this.
    """
    losses = index_losses(model)
    messages.check_has_layers(len(losses), "had a forward pass in phase train or warm_up", model)
    if torch.is_grad_enabled():
        learning = {layer for layer, index in indexes(model).items() if index.query.requires_grad}
        still = [n for n, loss in losses.items() if n in learning and not loss.requires_grad]
        messages.check_loss_has_gradient(still)
    return torch.stack(list(losses.values())).mean()


def warm_up(
    model: nn.Module, batches: Iterable[Tensor], learning_rate: float = 1e-3
) -> Iterator[dict[int, float]]:
    """Train only the index projections, one step per batch of ids [B, T]; yields the losses.

    During training attention is dense, so the model computes what it did before the conversion. Its
    other weights do not change. Afterwards the model is in the phase "sparse".
    """
    kept = {p: p.requires_grad for p in model.parameters()}
    own = [p for index in indexes(model).values() for p in index.parameters()]
    set_phase(model, "warm_up")
    optimizer = torch.optim.AdamW(own, learning_rate, weight_decay=0.0)
    try:
        for p in kept:
            p.requires_grad_(False)
        for p in own:
            p.requires_grad_(True)
        for ids in batches:
            optimizer.zero_grad()
            model(ids, use_cache=False)
            index_loss(model).backward()
            optimizer.step()
            yield {layer: loss.item() for layer, loss in index_losses(model).items()}
    finally:
        for p, wanted in kept.items():
            p.requires_grad_(wanted)
        set_phase(model, "sparse")


@torch.no_grad()
def measure_recall(model: nn.Module, ids: Tensor) -> dict[int, Recall]:
    """The recall of each converted layer on ids [B, T]: the share of the best blocks that it finds.

    During this call attention is dense. Afterwards the model is in the phase "sparse".
    """
    set_phase(model, "measure")
    model(ids, use_cache=False)
    found = {layer: index.recall for layer, index in indexes(model).items()}
    set_phase(model, "sparse")
    return {layer: recall for layer, recall in found.items() if recall is not None}
