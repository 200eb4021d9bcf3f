"""The public functions. Each checks its arguments and calls a backend, through `msa.entry`.

Layouts: packed [T, H, D] with cu_seqlens, packed without (one sequence), or batched [B, T, H, D].
Arrays: NumPy or torch, any strides whose last dim is contiguous; the answer is of the same kind.
They are dense and in memory: no subclasses, and no tensors inside a transform of torch.func (R20).
They keep their dtypes: autocast changes nothing inside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Float, Int

from msa import checks, pipeline
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.entry import enter, enter_append, enter_cache, enter_prefill
from msa.ir import Array, Output, PagedKV, Selection
from msa.kernel_choice import Kernels
from msa.selection import check_ids

LoopOrder = Literal["auto", "kv_outer", "union"]
IndexDtype = Literal["fp8_e4m3"]


def attention(
    q: Float[Array, "*q Hq D"], k: Float[Array, "*k Hkv D"], v: Float[Array, "*k Hkv Dv"],
    q_idx: Float[Array, "*q Hkv Di"], k_idx: Float[Array, "*k Di"],
    *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, config: MSAConfig = MSAConfig(),
    align: bool = False, backend: BackendName = "auto", loop_order: LoopOrder = "auto",
    index_dtype: IndexDtype | None = None, kernels: Kernels = "auto",
) -> Output:  # fmt: skip
    """MiniMax Sparse Attention: each query and group reads its top blocks of keys (eq. 6-8).

    Args:
        q, k, v: the main branch, one dtype: float16, bfloat16, float32 or float64.
        q_idx, k_idx: the index branch, one dtype, not necessarily that of q.
        cu_seqlens_q, cu_seqlens_k: borders of packed sequences, integers [batch + 1] (R1). The
            queries of a sequence are its last tokens (R2). None means one sequence.
        config: block size, blocks kept, forced blocks, scales.
        align: also give kl, the loss that trains the index: `align_index` over this selection.
        backend: "auto" is triton for CUDA tensors, torch for other tensors, reference for arrays.
        loop_order: triton only. "union" walks each tile of queries along the union of its blocks,
            "kv_outer" reads each block once for all that selected it, "auto" decides by the tile.
            The result is the same up to rounding (R16; and NaN where k or v is not finite: R9).
        index_dtype: triton only. "fp8_e4m3" rounds the index branch to 8 bits. This is faster, but
            may select other blocks.
        kernels: triton only. "portable" names the Triton kernels, "hopper" the Gluon kernels for
            GPUs of compute capability 9.x; "auto" chooses (`msa.kernel_choice`). If "hopper" is
            named, the selection has to run on these kernels, and attention runs on them where it
            can. The selection is the same bit for bit where scores are exact, and
            otherwise up to rounding of the scores; out and lse are the same up to rounding.

    Returns:
        out in q's layout and dtype, lse (natural logarithm) in q's layout and float32, and the
        packed Selection. Differentiable in q, k, v on torch and triton, selection fixed (R18).
        kl, else None, is float64 if q or q_idx is, else float32; its gradient reaches q_idx and
        k_idx only (R17).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).

    >>> import numpy as np, msa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((300, heads, 16)) for heads in (4, 2, 2))
    >>> q_idx, k_idx = rng.standard_normal((300, 2, 8)), rng.standard_normal((300, 8))
    >>> output = msa.attention(q, k, v, q_idx, k_idx, config=msa.MSAConfig(block_size=32, top_k=3))
    >>> output.out.shape, output.lse.shape, output.selection.indices[299].tolist()
    ((300, 4, 16), (300, 4), [[0, 1, 9], [1, 8, 9]])
    """
    checks.check_flag("align", align)
    arrays = {"q": q, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx}
    options = {"loop_order": loop_order, "index_dtype": index_dtype, "kernels": kernels}
    entry = enter(arrays, backend, cu_seqlens_q, cu_seqlens_k, config=config, options=options)
    args = (*entry.arrays, entry.sequences, config)
    return entry.run(entry.module.attend, *args, align=align, **entry.options)


def select(
    q_idx: Float[Array, "*q Hkv Di"], k_idx: Float[Array, "*k Di"],
    *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, config: MSAConfig = MSAConfig(),
    backend: BackendName = "auto", index_dtype: IndexDtype | None = None,
    kernels: Kernels = "auto",
) -> Selection:  # fmt: skip
    """The index branch alone: the blocks that each query and group would read (eq. 6-7, R4-R8).

    Arguments and errors are those of `attention`. The Selection is packed, with
    indices int32 [Tq, Hkv, k].

    >>> import numpy as np, msa
    >>> q_idx, k_idx = np.ones((6, 1, 1)), np.array([[0.0], [9], [1], [2], [3], [4]])
    >>> msa.select(q_idx, k_idx, config=msa.MSAConfig(block_size=2, top_k=2)).indices[5]
    array([[0, 2]], dtype=int32)
    """
    arrays = {"q_idx": q_idx, "k_idx": k_idx}
    options = {"index_dtype": index_dtype, "kernels": kernels}
    entry = enter(arrays, backend, cu_seqlens_q, cu_seqlens_k, config=config, options=options)
    args = (*entry.arrays, entry.sequences, config)
    return entry.run(entry.module.select_fused, *args, **entry.options)


def sparse_attention(
    q: Float[Array, "*q Hq D"], k: Float[Array, "*k Hkv D"], v: Float[Array, "*k Hkv Dv"],
    selection: Selection, *, softmax_scale: float | None = None, backend: BackendName = "auto",
    loop_order: LoopOrder = "auto", kernels: Kernels = "auto",
) -> Output:  # fmt: skip
    """The main branch alone, over blocks that were chosen before (eq. 8, R9-R12).

    A Selection holds its sequences and its block size. To make one of your own, call
    `Selection(indices, Sequences(cu_seqlens_q, cu_seqlens_k), block_size)`. Its ids are validated
    (R8); torch ids that this package made are not. kernels says which kernel walks along unions:
    if "hopper" is named, its Gluon kernel has to be able to. All else is as in `attention`.

    >>> import numpy as np, msa
    >>> x = np.arange(4.0).reshape(4, 1, 1)
    >>> own_block = msa.Selection(np.array([[[0]], [[0]], [[1]], [[1]]], np.int32),
    ...                           msa.Sequences.one(4, 4), block_size=2)
    >>> msa.sparse_attention(np.zeros((4, 1, 1)), x, x, own_block).out.ravel()
    array([0. , 0.5, 2. , 2.5])
    """
    checks.check_type("selection", selection, Selection)
    check_ids(selection)
    scale = checks.check_scale("softmax_scale", softmax_scale)
    arrays, options = {"q": q, "k": k, "v": v}, {"loop_order": loop_order, "kernels": kernels}
    entry = enter(arrays, backend, selection=selection, options=options)
    args = (*entry.arrays, entry.selection, q.shape[-1] ** -0.5 if scale is None else scale)
    output = entry.run(entry.module.attend_selection, *args, **entry.options)
    return replace(output, selection=selection)


def align_index(
    q: Float[Array, "*q Hq D"], k: Float[Array, "*k Hkv D"],
    q_idx: Float[Array, "*q Hkv Di"], k_idx: Float[Array, "*k Di"],
    selection: Selection | None = None, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    lse: Float[Array, "*q Hq"] | None = None, config: MSAConfig = MSAConfig(),
    backend: BackendName = "auto", kernels: Kernels = "auto",
) -> Float[Array, ""]:  # fmt: skip
    """KL(main branch || index branch), the loss that trains the index branch (eq. 9-10).

    With a selection both distributions run over its visible tokens; with selection=None, the
    warm-up form, over all visible tokens. The gradient reaches q_idx and k_idx only (R17).

    A selection holds its own sequences, block size and top_k. So cu_seqlens are for the warm-up
    form, and with a selection only the two scales of config are used.

    lse, float32 or float64 in q's layout, is the LSE of an attention of q and k over the same
    tokens: `attention`, `sparse_attention`, or in the warm-up form any causal attention. Without
    it, the LSE is computed here.

    kernels, triton only, says which kernels compute the loss and its gradients; if "hopper" is
    named, its Gluon kernel has to be able to.

    >>> import numpy as np, msa
    >>> x = np.array([[[1.0]], [[2.0]], [[4.0]]])
    >>> round(float(msa.align_index(x, x, x, 0 * x[:, 0])), 4)  # an index that prefers nothing
    0.4744
    >>> output = msa.attention(x, x, x, x, 0 * x[:, 0], align=True)
    >>> round(float(output.kl), 4)
    0.4744
    >>> loss = msa.align_index(x, x, x, 0 * x[:, 0], output.selection, lse=output.lse)
    >>> round(float(loss), 4)
    0.4744
    """
    checks.check_type("config", config, MSAConfig)
    arrays = {"q": q, "k": k, "q_idx": q_idx, "k_idx": k_idx}
    if lse is not None:
        arrays["lse"] = lse
    entry = enter(
        arrays, backend, cu_seqlens_q, cu_seqlens_k, config=config, selection=selection,
        top_k=1 if selection is None else None, options={"kernels": kernels},
    )  # fmt: skip
    q, k, q_idx, k_idx, *known = entry.arrays
    args = (q, k, q_idx, k_idx, entry.selection, entry.sequences, config, *known)
    return entry.run(entry.module.align_index, *args, **entry.options)


def prefill(
    q: Float[Array, "*q Hq D"], q_idx: Float[Array, "*q Hkv Di"], cache: PagedKV,
    *, cu_seqlens_q: Any = None, config: MSAConfig = MSAConfig(), backend: BackendName = "auto",
    loop_order: LoopOrder = "auto", index_dtype: IndexDtype | None = None,
    kernels: Kernels = "auto",
) -> Output:  # fmt: skip
    """MSA for the last tokens of each sequence of a paged cache, which has to hold them (R2).

    This is `attention` over keys, values and index keys in pages, such as a chunk of a long prompt
    behind the chunks before it. The triton backend reads the pages where they lie; the other
    backends copy them first. Nothing is recorded for gradients. Few new tokens of every sequence
    are the task of `decode`.

    Where the pages have scales (see `PagedKV`), the result is that of R4-R12 on page * scale, for
    queries of any dtype, which are not rounded.

    Args:
        q, q_idx: new tokens, packed [Tq, ...], or batched [B, n, ...] with n of each sequence.
        cache: holds the new tokens already; sequence s has `cache.lengths[s]` tokens.
        cu_seqlens_q: borders of packed queries, integers [B + 1]; a sequence may have no queries.
            None means one sequence.
        config, backend: as in `attention`.
        loop_order, kernels: triton only, as in `attention`. Hopper kernels need pages that their
            copy engine can read (docs/howto/serve.md). They take keys and values of 8 bits for
            queries in bfloat16, by pages that are widened to 16 bits (`msa.kernel_choice.widens`).
        index_dtype: triton only. "fp8_e4m3" rounds q_idx to 8 bits, where index keys have 8 bits.

    Returns:
        out in q's layout and dtype, lse in q's layout and float32, and the Selection, whose
        Sequences have one entry for each slot of the batch.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).

    >>> import numpy as np, msa
    >>> pages = np.arange(8.0).reshape(4, 2, 1, 1)  # four pages of two tokens
    >>> cache = msa.PagedKV(pages, pages, pages[..., 0],
    ...                     page_table=np.array([[3, 0], [2, 0]]), lengths=np.array([3, 1]))
    >>> zero = np.zeros((3, 1, 1))  # two tokens of the first sequence, which are 7 and 0; one more
    >>> config = msa.MSAConfig(block_size=2, top_k=2)
    >>> msa.prefill(zero, zero, cache, cu_seqlens_q=(0, 2, 3), config=config).out.ravel()
    array([6.5       , 4.33333333, 4.        ])
    """
    options = {"loop_order": loop_order, "index_dtype": index_dtype, "kernels": kernels}
    entry, args = enter_prefill(q, q_idx, cache, cu_seqlens_q, backend, config, options)
    return entry.run(entry.module.prefill_chunk, *args, config, **entry.options)


def decode(
    q: Float[Array, "B n Hq D"], q_idx: Float[Array, "B n Hkv Di"] | None,
    cache: PagedKV, *, config: MSAConfig = MSAConfig(), backend: BackendName = "auto",
    kernels: Kernels = "auto", selection: Int[Array, "B n Hkv k"] | None = None,
) -> Output:  # fmt: skip
    """MSA for the last n tokens of each sequence of a paged cache, which has to hold them (R2).

    A sequence of length 0 is an empty slot of the batch: out 0, lse -inf. Out and lse have q's
    layout; the Selection covers the live sequences, packed. Nothing is recorded for gradients.

    Where the pages have scales (see `PagedKV`), the result is that of R4-R12 on page * scale, for
    queries of any dtype, which are not rounded.

    The triton backend can be captured in a CUDA graph. No shape depends on a length, and lengths
    and tables are read on the device, so a graph stays right while the sequences grow. During
    capture their contents are not checked (a `PagePool` keeps them legal) and the selection is
    None. kernels says which of its kernels scores the blocks: "portable", the Gluon kernel
    "hopper" for GPUs of compute capability 9.x, or "auto", which takes it where it can run. The
    scores are the same up to rounding.

    selection gives the blocks, for example those of another layer or those that several devices
    chose together. Then q_idx is None, index keys are not read, and of config only the block size
    and the softmax scale count. Each row holds block ids in R8's form: ascending, then -1, the last
    id the query's own block. They are validated, but not during capture, and not for empty slots.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).

    >>> import numpy as np, msa
    >>> pages = np.arange(8.0).reshape(4, 2, 1, 1)  # four pages of two tokens
    >>> cache = msa.PagedKV(pages, pages, pages[..., 0],
    ...                     page_table=np.array([[3, 0], [2, 0]]), lengths=np.array([3, 0]))
    >>> zero = np.zeros((2, 1, 1, 1))  # tokens 6, 7 and 0 lie in pages 3 and 0
    >>> config = msa.MSAConfig(block_size=2, top_k=2)
    >>> msa.decode(zero, zero, cache, config=config).out[:, 0, 0, 0]
    array([4.33333333, 0.        ])
    >>> own_block = np.array([1, -1], np.int32).reshape(2, 1, 1, 1)
    >>> msa.decode(zero, None, cache, config=config, selection=own_block).out[:, 0, 0, 0]
    array([0., 0.])
    """
    entry, args = enter_cache(q, q_idx, cache, backend, config, {"kernels": kernels}, selection)
    q, q_idx, cache, ids = args
    return entry.run(entry.module.decode_step, q, q_idx, cache, config, ids, **entry.options)


def append_tokens(
    cache: PagedKV, k: Float[Array, "B n Hkv D"], v: Float[Array, "B n Hkv Dv"],
    k_idx: Float[Array, "B n Di"],
) -> None:  # fmt: skip
    """Write n more tokens of each sequence into a paged cache, by the device alone (R2).

    This is `PagePool.append` for steps that a CUDA graph captures. `PagePool.reserve` gives the
    pages beforehand. The kernel finds them in the table, quantises where the pages have 8 bits, and
    raises the lengths on the device.

    A sequence whose table has no pages for n more tokens, such as an empty slot of the batch, stays
    as it is, and its tokens are not read. So does a sequence without reserved tokens whose last
    page is shared (`PagePool.fork`). A sequence without reserved tokens whose last page has room
    and is not shared does grow, but the pool does not count these tokens. So reserve for each
    sequence of the batch that has tokens.

    Args:
        cache: torch tensors on a GPU (or anywhere under TRITON_INTERPRET=1). It is changed in
            place; its table and lengths are int32 or int64.
        k, v, k_idx: in the dtype of the pages; for pages of 8 bits float16, bfloat16 or float32.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit the pages; expanded pages,
            scales or lengths, in which entries share a place; pages of 8 bits in Triton's
            interpreter (R20).
    """
    entry = enter_append(cache, {"k": k, "v": v, "k_idx": k_idx})
    kernels: Any = entry.module  # beyond the contract of a backend
    entry.run(kernels.append_tokens, cache, k, v, k_idx)


def lower(
    q: Float[Array, "*q Hq D"], k: Float[Array, "*k Hkv D"], v: Float[Array, "*k Hkv Dv"],
    q_idx: Float[Array, "*q Hkv Di"], k_idx: Float[Array, "*k Di"],
    *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, config: MSAConfig = MSAConfig(),
    chunk_size: int | None = None, tile_size: int = 8, backend: BackendName = "auto",
) -> pipeline.Trace:  # fmt: skip
    """`attention` step by step: every intermediate form of both loop orders, by name.

    chunk_size is the most edges that a work item may have (None means 2 * k * Bk, as in the paper).
    tile_size is how many neighbouring queries share a union walk (1 to 31). All forms are packed.

    >>> import numpy as np, msa
    >>> x = np.ones((6, 1, 4))
    >>> trace = msa.lower(x, x, x, x, x[:, 0], config=msa.MSAConfig(block_size=2, top_k=2))
    >>> trace.selection.indices[5], trace.reverse_index.row_offsets
    (array([[0, 2]], dtype=int32), array([ 0,  6,  8, 10]))
    """
    checks.check_type("config", config, MSAConfig)
    if chunk_size is None:
        chunk_size = 2 * config.top_k * config.block_size
    chunk_size = checks.check_count("chunk_size", chunk_size, 1)
    checks.check_at_most("chunk_size", chunk_size, LARGEST_CHUNK_SIZE=checks.LARGEST_CHUNK_SIZE)
    tile_size = checks.check_tile_size("tile_size", tile_size)
    arrays = {"q": q, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx}
    entry = enter(arrays, backend, cu_seqlens_q, cu_seqlens_k, config=config)
    args = (*entry.arrays, entry.sequences, config, chunk_size, tile_size)
    return entry.run(pipeline.lower, entry.module, *args)
