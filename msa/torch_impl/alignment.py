"""Training: how far the index branch is from the main branch (eq. 9-10, R17)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from msa.autograd import align_with_gradients
from msa.config import MSAConfig
from msa.ir import Selection, Sequences
from msa.torch_impl.alignment_tiles import dense_losses, sparse_losses
from msa.torch_impl.numerics import rounds_coarsely, working_dtype


def align_index(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"],
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    selection: Selection | None, sequences: Sequences, config: MSAConfig,
    lse: Float[Tensor, "Tq Hq"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """KL(teacher || student), mean over queries and groups (eq. 9-10, R17); 0 if Tq = 0.

    selection=None is the warm-up form: both distributions run over all visible tokens. lse is the
    LSE of the main branch over the same tokens; it is computed here if it is None, or so large that
    its rounding matters. The gradient reaches q_idx and k_idx only. The loss is float32, or float64
    for float64 inputs.

    >>> x = torch.zeros(3, 1, 2)
    >>> q_idx = torch.zeros(3, 1, 2, requires_grad=True)
    >>> config = MSAConfig(block_size=2, top_k=1)
    >>> align_index(x, x, q_idx, x[:, 0], None, Sequences.one(3, 3), config).item()  # both uniform
    0.0
    """
    args = (q, k, q_idx, k_idx, selection, sequences, config, lse)
    return align_with_gradients(align_index_forward, *args)


@torch.no_grad()
def align_index_forward(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"],
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    selection: Selection | None, sequences: Sequences, config: MSAConfig,
    lse: Float[Tensor, "Tq Hq"] | None, with_gradient: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "Tq Hkv Di"], Float[Tensor, "Tk Di"]]:  # fmt: skip
    """The loss, and its gradients in the working precision: the tiles, added up in order (R19)."""
    dtype = torch.promote_types(
        working_dtype(q, k, config.softmax_scale_for(q.shape[-1])),
        working_dtype(q_idx, k_idx, config.index_scale_for(q_idx.shape[-1])),
    )
    tensors = tuple(x.to(dtype) for x in (q, k, q_idx, k_idx))
    known = None if lse is None or rounds_coarsely(lse) else lse.to(dtype)
    loss = torch.zeros((), dtype=torch.float64, device=q.device)
    d_queries, d_keys = torch.zeros_like(tensors[2]), torch.zeros_like(tensors[3])
    if selection is None:
        losses = dense_losses(tensors, known, sequences, config, with_gradient)
    else:
        losses = sparse_losses(tensors, known, selection, config, with_gradient)
    for part in losses:
        loss += part.loss
        d_queries[part.queries] = part.d_queries
        d_keys[part.keys] += part.d_keys
    count = max(1, q_idx.shape[0] * q_idx.shape[1])
    wide = torch.float64 in (q.dtype, q_idx.dtype)
    loss = (loss / count).to(torch.float64 if wide else torch.float32)
    return loss, d_queries / count, d_keys / count
