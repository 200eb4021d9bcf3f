"""Selections in the layouts of other projects, and back to canonical selections (R8).

In all layouts unused places hold -1 and come last. They differ in shape and in the order of ids:

    here             [Tq, Hkv, k]      ascending, so the own block is the last valid id
    official MSA     [Hkv, Tq, k]      own block last, the others in any order
    vLLM             [Hkv, Tq, k]      own block first, then by falling score
    transformers     [B, Hkv, T, k']   as vLLM; k' = min(k, blocks); one length for the whole batch

The `from_` functions sort the ids and check them (R8). The error message names an id that is there
twice, that is not visible, or that is missing.

>>> import numpy as np
>>> from msa import MSAConfig, Sequences, reference
>>> sequences, config = Sequences.one(6, 6), MSAConfig(block_size=2, top_k=3)
>>> k_idx = np.array([[0.0], [1], [5], [3], [2], [2]])
>>> scores = reference.score_blocks(np.ones((6, 1, 1)), k_idx, sequences, config)
>>> selection = reference.select_blocks(scores, config)
>>> selection.indices[5, 0], scores.values[5, 0]
(array([0, 1, 2], dtype=int32), array([1., 5., 2.]))
"""

from __future__ import annotations

from jaxtyping import Int

from msa.integrations import arrays, messages
from msa.ir import Array, BlockScores, Selection, Sequences


# -- transformers ---------------------------------------------------------------------------------
def to_transformers(
    selection: Selection, scores: BlockScores | None = None
) -> Int[Array, "B Hkv T k"]:
    """The `block_indices` that MiniMaxM3VLIndexer returns: min(k, blocks) ids per query.

    Args:
        scores: sort the ids after the own block by falling score. With None they ascend. The result
            of attention does not depend on their order.

    Raises:
        ValueError: the sequences have different lengths, which one tensor cannot hold.

    >>> to_transformers(selection)[0, 0, 5], to_transformers(selection, scores)[0, 0, 5]
    (array([2, 0, 1], dtype=int32), array([2, 1, 0], dtype=int32))
    """
    sequences = selection.sequences
    messages.check_uniform(sequences)
    ids = own_block_first(selection, scores)
    ids = ids[..., : max(1, sequences.max_blocks(selection.block_size))]
    n_q = sequences.total_q // max(1, sequences.batch)
    return ids.reshape(sequences.batch, n_q, *ids.shape[1:]).swapaxes(1, 2)


def from_transformers(
    block_indices: Int[Array, "B Hkv T k"], block_size: int, n_k: int | None = None,
    top_k: int | None = None,
) -> Selection:  # fmt: skip
    """A Selection from the block_indices of MiniMaxM3VLIndexer, for sequences without padding.

    Args:
        n_k: the keys of each sequence, if there are more keys than queries (R2).
        top_k: the width of the result; None means that of block_indices.

    Raises:
        ValueError: an id is not a visible block, or an own block is missing (R8).

    >>> ids = to_transformers(selection)
    >>> bool((from_transformers(ids, block_size=2).indices == selection.indices).all())
    True
    """
    messages.check_rank("block_indices", block_indices, "B Hkv T k")
    batch, groups, n_q, width = block_indices.shape
    sequences = Sequences.uniform(batch, n_q, n_q if n_k is None else n_k)
    ids = block_indices.swapaxes(1, 2).reshape(batch * n_q, groups, width)
    return canonical(ids, sequences, block_size, top_k)


# -- vLLM -----------------------------------------------------------------------------------------
def to_vllm(selection: Selection, scores: BlockScores | None = None) -> Int[Array, "Hkv Tq k"]:
    """Ids as the indexer of vLLM writes them: heads are the first dim, own blocks come first.

    >>> to_vllm(selection, scores)[0, 4:]
    array([[2, 1, 0],
           [2, 1, 0]], dtype=int32)
    """
    return own_block_first(selection, scores).swapaxes(0, 1)


def from_vllm(
    topk_indices: Int[Array, "Hkv Tq k"], sequences: Sequences, block_size: int
) -> Selection:
    """A Selection from the ids of vLLM.

    The attention of vLLM reads as many ids as blocks are visible. All later ids become -1.

    Raises:
        ValueError: as `from_transformers`; also a -1 in a place that vLLM would read.

    >>> ids = to_vllm(selection, scores)
    >>> bool((from_vllm(ids, sequences, block_size=2).indices == selection.indices).all())
    True
    """
    messages.check_rank("topk_indices", topk_indices, "Hkv Tq k")
    ids = topk_indices.swapaxes(0, 1)
    own = arrays.like(ids, sequences.positions()) // block_size
    visible = arrays.like(ids, range(ids.shape[-1])) <= own[:, None, None]
    messages.check_no_gaps("topk_indices", ids, visible)
    return canonical(arrays.where(visible, ids, -1), sequences, block_size)


# -- official MSA ---------------------------------------------------------------------------------
def to_official(selection: Selection) -> Int[Array, "Hkv Tq k"]:
    """Ids as the official kernels take them: ascending, so the own block comes last.

    >>> to_official(selection)[0, :3]
    array([[ 0, -1, -1],
           [ 0, -1, -1],
           [ 0,  1, -1]], dtype=int32)
    """
    return selection.indices.swapaxes(0, 1)


def from_official(
    indices: Int[Array, "Hkv Tq k"], sequences: Sequences, block_size: int
) -> Selection:
    """A Selection from ids in any order.

    Raises:
        ValueError: as `from_transformers`.

    >>> from_official(np.array([[[0, -1], [0, 1]]], np.int32), Sequences.one(2, 2), 1).indices[1]
    array([[0, 1]], dtype=int32)
    """
    messages.check_rank("indices", indices, "Hkv Tq k")
    return canonical(indices.swapaxes(0, 1), sequences, block_size)


# -- shared by all layouts ------------------------------------------------------------------------
def canonical(
    ids: Int[Array, "Tq Hkv k"], sequences: Sequences, block_size: int, top_k: int | None = None
) -> Selection:
    """A checked Selection of width top_k, from ids in any order and integer dtype, -1 anywhere.

    >>> canonical(np.array([[[-1, 1, 0]]]), Sequences.one(1, 4), 2, top_k=4).indices
    array([[[ 0,  1, -1, -1]]], dtype=int32)
    """
    width = ids.shape[-1] if top_k is None else top_k
    messages.check_width(ids.shape[-1], width)
    selection = Selection(arrays.widen(ascending(ids), width, -1), sequences, block_size)
    selection.validate()
    return selection


def ascending(ids: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Ids sorted along the last dim, as int32, with every -1 at the end.

    >>> ascending(np.array([[4, -1, 2, 0]]))
    array([[ 0,  2,  4, -1]], dtype=int32)
    """
    last = 2**31 - 1
    ids = arrays.sort(arrays.where(ids == -1, last, ids))
    return arrays.as_int32(arrays.where(ids == last, -1, ids))


def own_block_first(selection: Selection, scores: BlockScores | None) -> Int[Array, "Tq Hkv k"]:
    """Each row in the order: own block, other ids by falling score, -1.

    Ids with equal scores, and all ids without scores, ascend.
    """
    ids = selection.indices
    valid = ids >= 0
    own = valid & (arrays.like(ids, range(ids.shape[-1])) == valid.sum(-1)[..., None] - 1)
    if scores is not None:
        values = arrays.take(scores.values, arrays.where(valid, ids, 0))
        order = arrays.argsort(-values)
        ids, valid, own = (arrays.take(x, order) for x in (ids, valid, own))
    order = arrays.argsort(arrays.where(own, 0, arrays.where(valid, 1, 2)))
    return arrays.take(ids, order)
