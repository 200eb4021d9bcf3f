"""The executable spec: NumPy, float64, loops where they are clearer than arrays.

Read it next to the paper, in the order of the imports below. It imports no other backend and no
torch, because the other backends are tested against it.
"""

from msa.reference.alignment import align_index
from msa.reference.attention import attend, attend_selection
from msa.reference.combine import combine_partials
from msa.reference.decode import decode_step
from msa.reference.denote import mask_of
from msa.reference.index_scores import score_blocks
from msa.reference.partials import attend_chunks
from msa.reference.prefill import prefill_chunk
from msa.reference.reverse_index import reverse_selection
from msa.reference.schedule import schedule_chunks
from msa.reference.selection import select_blocks, select_fused
from msa.reference.tile_union import unite_tiles
from msa.reference.union_walk import attend_union

__all__ = [
    "align_index", "attend", "attend_chunks", "attend_selection", "attend_union",
    "combine_partials", "decode_step", "mask_of", "prefill_chunk", "reverse_selection",
    "schedule_chunks", "score_blocks", "select_blocks", "select_fused", "unite_tiles",
]  # fmt: skip
