"""The stages as Triton kernels, for NVIDIA GPUs, and for any CPU under TRITON_INTERPRET=1.

The files of `msa.reference`, with one or two kernels in each: pseudocode first, then a numbered
list of what the fast form changes. Integer-valued results are equal to the spec's bit for bit.

`attend` does more than `msa.lower` shows. It uses two forms that only this backend has, so neither
`msa.ir` nor `msa.pipeline` names them:

    SplitUnion (tile_union.py)          a TileUnion without the blocks that few queries of the tile
                                        share; those are a Selection of their own
    TileEdges (tile_reverse_index.py)   a ReverseIndex and its Schedule with tiles of queries in the
                                        place of queries, for gradients and the alignment loss

`attention.py` says when they are used. What several kernels share is in launch.py, tables.py,
tile_verbs.py, tile_walk.py, topk.py and bits.py. `hopper/` has kernels for Hopper GPUs alone.
"""

from msa.triton_impl.alignment import align_index, align_index_forward
from msa.triton_impl.append import append_tokens
from msa.triton_impl.attention import (
    attend,
    attend_selection,
    attend_selection_backward,
    attend_selection_forward,
)
from msa.triton_impl.combine import combine_partials
from msa.triton_impl.decode import decode_step
from msa.triton_impl.index_scores import score_blocks
from msa.triton_impl.partials import attend_chunks
from msa.triton_impl.prefill import prefill_chunk
from msa.triton_impl.reverse_index import reverse_selection
from msa.triton_impl.schedule import schedule_chunks
from msa.triton_impl.selection import select_blocks, select_fused
from msa.triton_impl.tile_union import unite_tiles
from msa.triton_impl.union_walk import attend_union

__all__ = [
    "align_index", "align_index_forward", "append_tokens", "attend", "attend_chunks",
    "attend_selection", "attend_selection_backward", "attend_selection_forward", "attend_union",
    "combine_partials", "decode_step", "prefill_chunk", "reverse_selection", "schedule_chunks",
    "score_blocks", "select_blocks", "select_fused", "unite_tiles",
]  # fmt: skip
