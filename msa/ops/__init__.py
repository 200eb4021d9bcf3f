"""MSA as torch operators, for `torch.compile`, `torch.export` and checkpointing.

    functional.py   the functions to call, one operator each
    arguments.py    checks of their arguments, layouts, autocast, borders of sequences
    operators.py    torch.ops.msa.*: schema, shapes without data, gradients
    kernels.py      what an operator does: a backend's own functions, triton for CUDA, else torch

They compute the same as `msa.attention` and the other public functions. Their tensor arguments and
results are plain tensors, so that no call breaks a graph. `import msa.ops` registers them.
"""

from msa.ops.functional import (
    Attended,
    align_index,
    attention,
    decode,
    prefill,
    select_blocks,
    sparse_attention,
)

__all__ = [
    "Attended",
    "align_index",
    "attention",
    "decode",
    "prefill",
    "select_blocks",
    "sparse_attention",
]
