"""Selections in the neighbours' orders, and back into the canonical one (R8).

They agree that unused places hold -1 and come last, and differ in the rest:

    here             [Tq, Hkv, k]      ascending, so the own block is the last valid id
    official MSA     [Hkv, Tq, k]      own block last, the others in any order
    vLLM             [Hkv, Tq, k]      own block first, then by falling score
    transformers     [B, Hkv, T, k']   the same; k' = min(k, blocks); one length for the whole batch

Taking one in sorts it and checks it (R8): an id that is doubled, invisible or not there is named.

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
    """`block_indices` as MiniMaxM3VLIndexer gives them, as wide as min(k, blocks).

    Args:
        scores: what the others are ordered by; None leaves them ascending. No attention minds.

    Raises:
        ValueError: sequences of different lengths, which one tensor cannot hold.

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
    block_indices: Int[Array, "B Hkv T k"],
    block_size: int,
    n_k: int | None = None,
    top_k: int | None = None,
) -> Selection:
    """A Selection from what MiniMaxM3VLIndexer gave, without the padding of any sequence.

    Args:
        n_k: keys of each sequence, where there are more than queries (R2).
        top_k: width of the result; None: that of block_indices.

    Raises:
        ValueError: not a selection of visible blocks with the own one among them (R8).

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
    """Top-k ids as vLLM's indexer writes them: heads first, own block first.

    >>> to_vllm(selection, scores)[0, 4:]
    array([[2, 1, 0],
           [2, 1, 0]], dtype=int32)
    """
    return own_block_first(selection, scores).swapaxes(0, 1)


def from_vllm(
    topk_indices: Int[Array, "Hkv Tq k"], sequences: Sequences, block_size: int
) -> Selection:
    """A Selection from vLLM's ids. Its attention reads as many as are visible; the rest is -1 here.

    Raises:
        ValueError: as `from_transformers`; so -1 among the visible ones, which vLLM would read.

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
    """Ids as the official kernels take them; ascending order has the own block last, as they want.

    >>> to_official(selection)[0, :3]
    array([[ 0, -1, -1],
           [ 0, -1, -1],
           [ 0,  1, -1]], dtype=int32)
    """
    return selection.indices.swapaxes(0, 1)


def from_official(
    indices: Int[Array, "Hkv Tq k"], sequences: Sequences, block_size: int
) -> Selection:
    """A Selection from ids in any order, the own block last or not.

    Raises:
        ValueError: as `from_transformers`.

    >>> from_official(np.array([[[0, -1], [0, 1]]], np.int32), Sequences.one(2, 2), 1).indices[1]
    array([[0, 1]], dtype=int32)
    """
    messages.check_rank("indices", indices, "Hkv Tq k")
    return canonical(indices.swapaxes(0, 1), sequences, block_size)


# -- what they share ------------------------------------------------------------------------------
def canonical(
    ids: Int[Array, "Tq Hkv k"], sequences: Sequences, block_size: int, top_k: int | None = None
) -> Selection:
    """Ids in any order and integer dtype, -1 anywhere, as a checked Selection of width top_k.

    >>> canonical(np.array([[[-1, 1, 0]]]), Sequences.one(1, 4), 2, top_k=4).indices
    array([[[ 0,  1, -1, -1]]], dtype=int32)
    """
    width = ids.shape[-1] if top_k is None else top_k
    messages.check_width(ids.shape[-1], width)
    selection = Selection(arrays.widen(ascending(ids), width, -1), sequences, block_size)
    selection.validate()
    return selection


def ascending(ids: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Sorted along the last dim, int32, every -1 behind the others.

    >>> ascending(np.array([[4, -1, 2, 0]]))
    array([[ 0,  2,  4, -1]], dtype=int32)
    """
    last = 2**31 - 1
    ids = arrays.sort(arrays.where(ids == -1, last, ids))
    return arrays.as_int32(arrays.where(ids == last, -1, ids))


def own_block_first(selection: Selection, scores: BlockScores | None) -> Int[Array, "Tq Hkv k"]:
    """The own block, then the others by falling score (equal ones and no scores: ascending), -1."""
    ids = selection.indices
    valid = ids >= 0
    own = valid & (arrays.like(ids, range(ids.shape[-1])) == valid.sum(-1)[..., None] - 1)
    if scores is not None:
        values = arrays.take(scores.values, arrays.where(valid, ids, 0))
        order = arrays.argsort(-values)
        ids, valid, own = (arrays.take(x, order) for x in (ids, valid, own))
    order = arrays.argsort(arrays.where(own, 0, arrays.where(valid, 1, 2)))
    return arrays.take(ids, order)
