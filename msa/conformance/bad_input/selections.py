"""Bad selections: ids that are not canonical (R8), or that do not fit the tensors."""

from __future__ import annotations

import numpy as np

import msa
from msa.conformance.bad_input import BadInput

SELECTION_CASES = [
    BadInput("descending ids", ValueError, ("selection.indices", "ascending", "got 0", "query 3"),
             lambda kit: kit.spoiled(3, 1, [1, 0])),
    BadInput("an id twice", ValueError, ("selection.indices", "unique", "query 3", "[1, 1]"),
             lambda kit: kit.spoiled(3, 0, [1, 1])),
    BadInput("-1 before an id", ValueError, ("selection.indices", "-1 only after", "query 5"),
             lambda kit: kit.spoiled(5, 0, [-1, 1])),
    BadInput("an id below -1", ValueError, ("selection.indices", "or -1", "got -2", "query 1"),
             lambda kit: kit.spoiled(1, 0, [0, -2])),
    BadInput("a block in the future", ValueError, ("selection.indices", "visible", "got 1",
             "query 0"), lambda kit: kit.spoiled(0, 1, [0, 1])),
    BadInput("own block missing", ValueError, ("selection.indices", "own block", "query 4"),
             lambda kit: kit.spoiled(4, 1, [0, -1])),
    BadInput("no block at all", ValueError, ("selection.indices", "own block", "query 0"),
             lambda kit: kit.spoiled(0, 0, [-1, -1])),
    BadInput("64-bit ids", TypeError, ("selection.indices", "int32", "int64"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=kit.integers(np.zeros((6, 2, 2)), "int64")))),
    BadInput("unsigned ids", TypeError, ("selection.indices", "int32", "uint32"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=kit.integers(np.zeros((6, 2, 2)), "uint32")))),
    BadInput("ids as a list", TypeError, ("selection.indices", "array", "got list"),
             lambda kit: kit.sparse(selection=kit.selection(indices=[[[0, -1]]]))),
    BadInput("ids as a list in align_index", TypeError, ("selection.indices", "array", "list"),
             lambda kit: kit.align(selection=kit.selection(indices=[[[0, -1]]]))),
    BadInput("more ids than the largest k", ValueError,
             ("selection.indices.shape[2]", "LARGEST_TOP_K = 16384", "got 16385"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=kit.integers(np.zeros((6, 2, 16385)))))),
    BadInput("a selection without sequences", TypeError,
             ("selection.sequences", "msa.Sequences", "NoneType"),
             lambda kit: kit.sparse(selection=kit.selection(sequences=None))),
    BadInput("a tuple as sequences", TypeError, ("selection.sequences", "Sequences", "got tuple"),
             lambda kit: kit.align(selection=kit.selection(sequences=((0, 6), (0, 8))))),
    BadInput("fractional block size in a selection", TypeError,
             ("selection.block_size", "integer", "4.0"),
             lambda kit: kit.selection(block_size=4.0)),
    BadInput("more than the largest block size in a selection", ValueError,
             ("selection.block_size", "LARGEST_BLOCK_SIZE = 65536", "got 65537"),
             lambda kit: kit.selection(block_size=65537)),
    BadInput("ids of rank 2", ValueError, ("selection.indices", "[Tq, Hkv, k]", "[6, 2]"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=kit.integers(np.zeros((6, 2)))))),
    BadInput("ids for other queries", ValueError,
             ("selection.indices", "[6, any, any]", "[5, 2, 2]"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=kit.integers(np.zeros((5, 2, 2)))))),
    BadInput("ids for other groups", ValueError, ("selection.indices", "Hkv = 2", "got 1"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=kit.selection().indices[:, :1]))),
    BadInput("block size 0 in a selection", ValueError, ("block_size", "at least 1", "got 0"),
             lambda kit: kit.sparse(selection=kit.selection(block_size=0))),
    BadInput("a selection of other sequences", ValueError, ("cu_seqlens_k", "Tk = 8", "got 9"),
             lambda kit: kit.sparse(selection=kit.selection(sequences=msa.Sequences.one(6, 9)))),
    BadInput("an array as selection", TypeError, ("selection", "Selection", "got"),
             lambda kit: kit.sparse(selection=kit.selection().indices)),
    BadInput("scale of sparse_attention", ValueError, ("softmax_scale", "finite", "nan"),
             lambda kit: kit.sparse(softmax_scale=float("nan"))),
    BadInput("cu_seqlens beside a selection", ValueError, ("cu_seqlens_q", "None", "selection"),
             lambda kit: kit.align(selection=kit.selection(), cu_seqlens_q=[0, 6],
                                   cu_seqlens_k=[0, 8])),
]  # fmt: skip
