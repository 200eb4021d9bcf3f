"""Convert the layouts that a caller may use to the packed layout of the backends, and back (R1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from msa import checks
from msa.ir import Array, Output, Sequences
from msa.sequences import check_totals


@dataclass(frozen=True)
class Layout:
    """The sequences in the tensors of a call, and the leading dims of q: [Tq] or [B, T]."""

    sequences: Sequences
    lead: tuple[int, ...]

    def pack(self, array: Array) -> Array:
        """[B, T, ...] to [B * T, ...]; packed arrays stay as they are."""
        if len(self.lead) == 1:
            return array
        return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])

    def unpack(self, output: Output) -> Output:
        """Give out and lse the layout of q."""
        out, lse = (x.reshape(*self.lead, *x.shape[1:]) for x in (output.out, output.lse))
        return replace(output, out=out, lse=lse)


def read_layout(
    arrays: dict[str, Array], cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    sequences: Sequences | None = None, batched: bool | None = None,
) -> Layout:  # fmt: skip
    """Check the arrays against one another (R20) and find the sequences that they hold.

    Args:
        arrays: what the caller gave for some of q, k, v, q_idx, k_idx and lse.
        cu_seqlens_q, cu_seqlens_k: what the caller gave, or None.
        sequences: those of a Selection; then cu_seqlens must be None.
        batched: False if arrays must be packed, True if they must be batched, None for both.

    Raises:
        TypeError, ValueError: see `msa.checks`.
    """
    for name, array in arrays.items():
        checks.check_array(name, array, checks.LSE_DTYPES if name == "lse" else checks.FLOAT_DTYPES)
    for branch in (("q", "k", "v"), ("q_idx", "k_idx")):
        found = {name: arrays[name] for name in branch if name in arrays}
        if found:
            checks.check_same_dtype(**found)
    checks.check_same_place(**arrays)

    sizes, batched = checks.check_shapes(arrays, batched)
    if "Hq" in sizes:
        checks.check_heads(sizes["Hq"], sizes["Hkv"])

    copies = sizes.get("B", 1)
    n_q, n_k = sizes["Tq"], sizes["Tk"]
    if sequences is not None and not batched:
        reason = "a selection brings its own sequences"
        checks.check_absent("cu_seqlens_q", cu_seqlens_q, reason)
        checks.check_absent("cu_seqlens_k", cu_seqlens_k, reason)
    checks.check_given(batched, cu_seqlens_q, cu_seqlens_k)
    if sequences is not None:
        check_totals(sequences, copies * n_q, copies * n_k, "the selection's ")
    elif cu_seqlens_q is None and cu_seqlens_k is None:
        checks.check_lengths(n_q, n_k)
        sequences = Sequences.uniform(copies, n_q, n_k)
    else:
        read_q = checks.read_borders("cu_seqlens_q", cu_seqlens_q)
        read_k = checks.read_borders("cu_seqlens_k", cu_seqlens_k)
        sequences = Sequences(read_q, read_k)
        check_totals(sequences, n_q, n_k, "")
    return Layout(sequences, (copies, n_q) if batched else (n_q,))
