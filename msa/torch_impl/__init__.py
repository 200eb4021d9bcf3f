"""PyTorch: the same steps, vectorised; differentiable; any device.

This is the readable counterpart of the Triton kernels: the same work items in the same order, each
a row of a batched matrix product.
"""

from msa.torch_impl.alignment import align_index, align_index_forward
from msa.torch_impl.attention import (
    attend,
    attend_selection,
    attend_selection_backward,
    attend_selection_forward,
)
from msa.torch_impl.combine import combine_partials
from msa.torch_impl.decode import decode_step
from msa.torch_impl.index_scores import score_blocks
from msa.torch_impl.partials import attend_chunks
from msa.torch_impl.prefill import prefill_chunk
from msa.torch_impl.reverse_index import reverse_selection
from msa.torch_impl.schedule import schedule_chunks
from msa.torch_impl.selection import select_blocks, select_fused
from msa.torch_impl.tile_union import unite_tiles
from msa.torch_impl.union_walk import attend_union

__all__ = [
    "align_index", "align_index_forward", "attend", "attend_chunks", "attend_selection",
    "attend_selection_backward", "attend_selection_forward", "attend_union", "combine_partials",
    "decode_step", "prefill_chunk", "reverse_selection", "schedule_chunks", "score_blocks",
    "select_blocks", "select_fused", "unite_tiles",
]  # fmt: skip
