"""Training: how far the index branch is from the main branch (eq. 9-10, R17).

    for each super-tile of queries, and the blocks that they read (selected, or all visible ones):
        top, log_total      of the main branch, where the caller does not have its lse
        top, log_total      of the index scores
        teacher             mean of the heads' probabilities, in the slots of the edges
        loss, gradients     KL, d_q_idx, d_k_idx

The warm-up form is the same with a Selection of all visible blocks. Because of the super-tiles,
memory grows with the length of the sequences, not with its square.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa.autograd import align_with_gradients
from msa.config import MSAConfig
from msa.ir import Array, Selection, Sequences
from msa.kernel_choice import Kernels, choose, loss_call_of
from msa.triton_impl import tuning
from msa.triton_impl.index_loss import index_loss
from msa.triton_impl.launch import positions_of, require_kernels
from msa.triton_impl.places import on_its_device
from msa.triton_impl.reverse_index import mark_bytes, reverse_edges
from msa.triton_impl.schedule import schedule_edges
from msa.triton_impl.softmax_sums import softmax_sums
from msa.triton_impl.tables import query_table
from msa.triton_impl.teacher import teacher_probabilities
from msa.triton_impl.tile_reverse_index import reverse_union, unite_all
from msa.triton_impl.tile_union import split_tiles


@on_its_device
def align_index(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"],
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    selection: Selection | None, sequences: Sequences, config: MSAConfig,
    lse: Float[Array, "Tq Hq"] | None = None, kernels: Kernels = "auto",
) -> Float[Array, ""]:  # fmt: skip
    """KL(teacher || student), mean over queries and groups (eq. 9-10, R17); 0 if Tq = 0.

    selection=None is the warm-up form: both distributions run over all visible tokens. The gradient
    reaches q_idx and k_idx only; the loss is float32.

    Args:
        lse: the main branch's log-sum-exp over the same tokens; None computes it.
        kernels: "portable", "hopper", or "auto", which chooses by `msa.kernel_choice`.

    Raises:
        TypeError, ValueError: see `require_kernels`.
    """
    block_size = config.block_size if selection is None else selection.block_size
    top_k = 1 if selection is None else selection.top_k
    require_kernels(block_size, top_k, q=q, k=k, q_idx=q_idx, k_idx=k_idx)
    return align(q, k, q_idx, k_idx, selection, sequences, config, lse, kernels)


def align(
    q: Tensor, k: Tensor, q_idx: Tensor, k_idx: Tensor, selection: Selection | None,
    sequences: Sequences, config: MSAConfig, lse: Tensor | None, kernels: Kernels = "auto",
) -> Tensor:  # fmt: skip
    """The same for arguments that are checked."""
    args = (q, k, q_idx, k_idx, selection, sequences, config, lse)
    return align_with_gradients(partial(align_index_sums, kernels=kernels), *args)


def all_blocks(sequences: Sequences, block_size: int, groups: int, device: Any) -> Selection:
    """Every visible block of every query, ascending (R8)."""
    width = sequences.max_blocks(block_size)
    own = query_table(sequences, block_size, device)[1] // block_size
    ids: Int[Tensor, "Tq NB"] = torch.arange(width, dtype=torch.int32, device=device).repeat(
        len(own), 1
    )
    ids = torch.where(ids <= own[:, None], ids, -1)
    return Selection(ids[:, None].repeat(1, groups, 1), sequences, block_size)


@on_its_device
@torch.no_grad()
def align_index_forward(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"],
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    selection: Selection | None, sequences: Sequences, config: MSAConfig,
    lse: Float[Tensor, "Tq Hq"] | None, with_gradient: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "Tq Hkv Di"], Float[Tensor, "Tk Di"]]:  # fmt: skip
    """The loss and its gradients in float32, both for callers with an autograd of their own.

    Raises:
        TypeError, ValueError: see `require_kernels`.
    """
    block_size = config.block_size if selection is None else selection.block_size
    top_k = 1 if selection is None else selection.top_k
    require_kernels(block_size, top_k, q=q, k=k, q_idx=q_idx, k_idx=k_idx)
    return align_index_sums(q, k, q_idx, k_idx, selection, sequences, config, lse, with_gradient)


def align_index_sums(
    q: Tensor, k: Tensor, q_idx: Tensor, k_idx: Tensor, selection: Selection | None,
    sequences: Sequences, config: MSAConfig, lse: Tensor | None, with_gradient: bool,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The super-tiles, added up in order (R19): the loss and, with_gradient, its gradients."""
    n_q, groups, dim = q_idx.shape
    block, top_k = config.block_size, sequences.max_blocks(config.block_size)
    if selection is not None:
        block, top_k = selection.block_size, selection.top_k
    device = q.device
    chosen_kernels = choose(kernels, loss_call_of(q, k, q_idx, k_idx, block))
    kept = dim if chosen_kernels == "hopper" else block + dim
    per_query = 4 * groups * max(1, top_k) * kept + mark_bytes(sequences, block, groups)
    size = max(1, tuning.TRAINING_BYTES // per_query)
    positions = positions_of(q.shape[1] // groups)
    scale, index_scale = config.softmax_scale_for(q.shape[-1]), config.index_scale_for(dim)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    d_q = torch.empty(q_idx.shape, dtype=torch.float32, device=device)
    d_k = torch.zeros(k_idx.shape, dtype=torch.float32, device=device)
    for queries, keys, part in sequences.tiles(size):
        if selection is None:
            chosen = all_blocks(part, block, groups, device)
        else:
            chosen = Selection(selection.indices[queries].contiguous(), part, block)
        schedule = schedule_edges(reverse_edges(chosen), tuning.LOSS_EDGES)
        qs, ks, qs_idx, ks_idx = q[queries], k[keys], q_idx[queries], k_idx[keys]
        if lse is None:
            sums = softmax_sums(qs, ks, schedule, scale, is_index=False)
        else:
            sums = None, lse[queries].float().contiguous()
        shared = ks_idx[:, None].expand(-1, groups, -1)
        student = softmax_sums(qs_idx, shared, schedule, index_scale, is_index=True)
        gradients = (d_q[queries], d_k[keys]) if with_gradient else None
        if chosen_kernels == "hopper":
            # imported here, because older releases of triton have no Gluon
            from msa.triton_impl.hopper.index_loss import index_loss as hopper_loss

            tensors = qs, ks, qs_idx, ks_idx
            scales = scale, index_scale
            loss += hopper_loss(*tensors, sums, student, schedule, *scales, gradients)
            continue
        if selection is None:
            union = unite_all(part, block, positions, groups, device)
        else:
            union = split_tiles(chosen, positions)
        edges = reverse_union(union, chosen, tuning.TEACHER_TILES)
        teacher = teacher_probabilities(
            qs, ks, sums, chosen.indices, edges, scale, dense=selection is None
        )
        loss += index_loss(qs_idx, ks_idx, teacher, *student, schedule, index_scale, gradients)
    count = max(1, n_q * groups)
    if with_gradient:
        d_q /= count
        d_k /= count
    return (loss / count).float(), d_q, d_k
