"""Selection: the blocks that each query and group reads, and the check of its form (R8)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Int

from msa import checks
from msa.checks.arrays import Array
from msa.sequences import Sequences


@dataclass(frozen=True)
class Selection:
    """For every query and group the blocks it reads: ascending, unique, then -1 (R8).

    Block ids count from the start of the query's own sequence; the last valid id is its own block.

    Raises:
        TypeError, ValueError: sequences that are no Sequences, a block size that is not 1 to
            LARGEST_BLOCK_SIZE (R20). The ids are validated where they are used, or by `validate`.

    >>> import numpy as np
    >>> chosen = np.array([[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [1, 2]], np.int32)
    >>> selection = Selection(chosen[:, None], Sequences.one(6, 6), block_size=2)
    >>> selection.indices[5, 0]   # token 5 reads blocks 1 and 2
    array([1, 2], dtype=int32)
    >>> selection.counts[:, 0]
    array([1, 1, 2, 2, 2, 2])
    """

    indices: Int[Array, "Tq Hkv k"]
    sequences: Sequences
    block_size: int

    def __post_init__(self) -> None:
        checks.check_type("selection.sequences", self.sequences, Sequences)
        number = checks.check_block_size("selection.block_size", self.block_size)
        object.__setattr__(self, "block_size", number)

    @property
    def top_k(self) -> int:
        """k: the most blocks that a query may have."""
        return int(self.indices.shape[-1])

    @property
    def counts(self) -> Int[Array, "Tq Hkv"]:
        """How many blocks each query has."""
        return (self.indices >= 0).sum(-1)

    def validate(self) -> None:
        """Check the canonical form.

        Raises:
            TypeError, ValueError: naming the first entry that breaks R8.
        """
        check_ids(self)
        check_canonical(self)

    def __getstate__(self) -> dict[str, Any]:
        """The fields, for a copy or a pickle; without the mark of `mark_canonical`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# -- which selections are validated ---------------------------------------------------------------
def mark_canonical(selection: Selection) -> None:
    """Mark a Selection that msa made, so that calls with it do not validate it again.

    The mark is for this object and for its fields as they are now. `dataclasses.replace` makes
    another object, without a mark. On a GPU torch counts the writes to the ids, except those
    through `.data`, DLPack or a kernel of the caller's own: do not write to ids in these ways. In
    the memory of the host others write too, such as NumPy through `.numpy()`, and validation takes
    little time beside the attention there. So a Selection of host ids is validated in each call,
    and so is one of inference mode, where torch counts nothing.
    """
    object.__setattr__(selection, "_canonical_state", _state(selection))


def is_marked(selection: Selection) -> bool:
    """Whether msa made this Selection, and its ids have not been written to since."""
    marked = getattr(selection, "_canonical_state", None)
    return marked is not None and marked == _state(selection)


def _state(selection: Selection) -> tuple[int, ...] | None:
    """The fields, and how often the ids were written to; None where that is not counted."""
    ids = selection.indices
    if not counts_writes(ids):
        return None
    return id(ids), ids.data_ptr(), ids._version, id(selection.sequences), selection.block_size


def counts_writes(ids: Array) -> bool:
    """Whether torch counts the writes to these ids: those in the memory of a GPU."""
    return checks.is_torch(ids) and ids.device.type != "cpu" and not ids.is_inference()


# -- checks (R20) ---------------------------------------------------------------------------------
def check_selection_for(selection: Selection, q: Array, k: Array) -> None:
    """Check that a Selection has the groups of k, the kind and the device of q, and R8's form.

    The form is not checked where msa made the Selection, nor while a CUDA graph is captured: that
    would read the ids.
    """
    check_ids(selection)
    groups = k.shape[-2]
    if selection.indices.shape[1] != groups:
        raise ValueError(
            f"selection.indices must have Hkv = {groups} groups as k has, "
            f"got {selection.indices.shape[1]}"
        )
    checks.check_same_place(q=q, **{"selection.indices": selection.indices})
    if not is_marked(selection) and not checks.is_captured(q):
        check_canonical(selection)


def check_ids(selection: Selection) -> None:
    """Check the kind, dtype and shape of the ids, without reading them."""
    ids, total = selection.indices, selection.sequences.total_q
    checks.check_plain("selection.indices", ids)
    if checks.dtype_name(ids) != "int32":
        raise TypeError(f"selection.indices must have dtype int32, got {ids.dtype}")
    if ids.ndim != 3 or ids.shape[0] != total or 0 in ids.shape[1:]:
        raise ValueError(
            f"selection.indices must have shape [Tq, Hkv, k] = [{total}, any, any], "
            f"got {list(ids.shape)}"
        )
    checks.check_at_most(
        "selection.indices.shape[2]", ids.shape[2], LARGEST_TOP_K=checks.LARGEST_TOP_K
    )


def check_canonical(selection: Selection, name: str = "selection.indices") -> None:
    """Check the canonical form (R8), with one wait for the device if the ids lie on one.

    Messages call the ids `name`.

    The largest id of each row is the own block. Each id behind the first is -1, or larger than the
    id before it, which is not -1. These two conditions are R8. The first bad entry is searched for
    only if one of them fails.
    """
    ids, own = selection.indices, own_blocks(selection)[:, None]
    largest = ids.amax(-1) if checks.is_torch(ids) else ids.max(-1)
    before, after = ids[..., :-1], ids[..., 1:]
    disordered = (after != -1) & ((before < 0) | (after <= before))
    if (largest != own).any() | disordered.any():
        refuse(selection, own, name)


def refuse(selection: Selection, own: Int[Array, "Tq 1"], name: str) -> None:
    """Name the first entry of the ids that breaks R8."""
    ids = checks.to_numpy(selection.indices)
    own = checks.to_numpy(own)
    valid, before, after = ids >= 0, ids[..., :-1], ids[..., 1:]
    rules = (
        ("hold block ids or -1", ids < -1, ids),
        ("have -1 only after the last id", valid[..., 1:] & ~valid[..., :-1], after),
        ("be ascending and unique", valid[..., 1:] & (after <= before), after),
        ("hold visible blocks only", ids > own[..., None], ids),
        ("hold each query's own block", ~(ids == own[..., None]).any(-1), ids[..., 0]),
    )
    wanted, bad, shown = next(rule for rule in rules if rule[1].any())
    where = np.argwhere(bad)[0].tolist()
    raise ValueError(
        f"{name} must {wanted} (R8), got {int(shown[tuple(where)])} "
        f"at query {where[0]}, group {where[1]}, own block {int(own[where[0], 0])}: "
        f"{ids[where[0], where[1]].tolist()}"
    )


def own_blocks(selection: Selection) -> Int[Array, " Tq"]:
    """For each query its own block (R3), on the device of the ids."""
    cu_q, cu_k = selection.sequences.cu_seqlens_q, selection.sequences.cu_seqlens_k
    counts, total = np.diff(np.array(cu_q)), cu_q[-1]
    shift = np.diff(np.array(cu_k)) - np.array(cu_q[1:], np.int64)  # from place to position (R2)
    if not checks.is_torch(selection.indices):
        return (np.arange(total) + np.repeat(shift, counts)) // selection.block_size
    import torch

    device = selection.indices.device
    both = torch.from_numpy(np.stack([counts, shift]))
    counts, shift = both.to(device, non_blocking=True)  # else it would wait for the device
    shift = torch.repeat_interleave(shift, counts, output_size=total)
    return (torch.arange(total, device=device) + shift) // selection.block_size
