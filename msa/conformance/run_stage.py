"""Two steps of most properties: call a stage on given inputs, and compare its output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from msa.conformance.backends import REFERENCE, Subject
from msa.conformance.cases import Inputs
from msa.conformance.tolerances import Measure, compare, worst
from msa.conformance.yardstick import Attention, block_mask
from msa.ir import Array, BlockScores, Output, Selection


def attend(subject: Subject, inputs: Inputs, **options: Any) -> Output:
    """The whole path: selection, then attention."""
    args = (*inputs.main, *inputs.index, inputs.sequences, inputs.config)
    return subject.run("attend", *args, cast=inputs.dtype, **options)


def attend_selection(
    subject: Subject, inputs: Inputs, selection: Selection, **options: str
) -> Output:
    """The main branch over a given selection."""
    args = (*inputs.main, selection, inputs.scale)
    return subject.run("attend_selection", *args, cast=inputs.dtype, **options)


def score_blocks(subject: Subject, inputs: Inputs) -> BlockScores:
    """The scores of the index branch, its first step."""
    args = (*inputs.index, inputs.sequences, inputs.config)
    return subject.run("score_blocks", *args, cast=inputs.dtype)


def select_fused(subject: Subject, inputs: Inputs, **options: str | int) -> Selection:
    """The whole index branch: scores, then selection."""
    args = (*inputs.index, inputs.sequences, inputs.config)
    return subject.run("select_fused", *args, cast=inputs.dtype, **options)


def selected(output: Output) -> Array:
    """The block ids that an attention used."""
    assert output.selection is not None
    return output.selection.indices


def dense(inputs: Inputs, indices: Array) -> Attention:
    """The yardstick: attention over the visible tokens of the given blocks (eq. 8)."""
    mask = block_mask(indices, inputs.sequences, inputs.config.block_size)
    return Attention(*inputs.main, mask, inputs.scale, parts=indices.shape[-1])


def compare_output(
    subject: Subject, inputs: Inputs, output: Output, want: Attention,
    rows: Array | slice = slice(None),
) -> Measure:  # fmt: skip
    """Check that each entry of out, and of lse if it is claimed, lies within its error bound.

    Args:
        rows: the queries, or queries and heads, to compare; all by default.
    """
    precision = subject.domain.precision(inputs.dtype)
    pairs = [("out", output.out, want.out, want.out_bound(precision))]
    if subject.domain.has("lse"):
        pairs.append(("lse", output.lse, want.lse, want.lse_bound(precision)))
    return worst(
        *(
            compare(name, *(x[rows] for x in (got, wanted, bound)))
            for name, got, wanted, bound in pairs
        )
    )


def spec(subject: Subject) -> Subject:
    """The reference with the domain of this subject, whose own functions may be missing."""
    return replace(
        subject, name="reference", module=REFERENCE, kind="numpy", device="cpu", kernels=""
    )
