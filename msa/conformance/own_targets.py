"""The backends of this project as targets of `msa verify --target`, in the convention `msa`.

    msa verify --target msa.conformance.own_targets:torch_select --tensors cpu
    msa verify --target msa.conformance.own_targets:torch_sparse_attention --kind sparse_attention

The targets for transformers' MiniMax-M3 are in `msa.integrations.targets`. The Triton kernels need
--tensors cuda (or Triton's interpreter) and --block-sizes from 16 to 256.

>>> import numpy as np
>>> from msa.config import MSAConfig
>>> keys = np.array([[3.0], [0], [9], [0], [1], [0]])
>>> torch_select(np.ones((6, 1, 1)), keys, config=MSAConfig(block_size=2, top_k=2)).indices[5]
array([[1, 2]], dtype=int32)
"""

from __future__ import annotations

from functools import partial

import msa

reference_select = partial(msa.select, backend="reference")
reference_sparse_attention = partial(msa.sparse_attention, backend="reference")
reference_attention = partial(msa.attention, backend="reference")
torch_select = partial(msa.select, backend="torch")
torch_sparse_attention = partial(msa.sparse_attention, backend="torch")
torch_attention = partial(msa.attention, backend="torch")
triton_select = partial(msa.select, backend="triton")
triton_sparse_attention = partial(msa.sparse_attention, backend="triton")
triton_attention = partial(msa.attention, backend="triton")
