"""Every kind of bad input that R20 lists: what is wrong, which error, what its message must say."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

import msa
from msa.conformance.bad_input import SHAPES, Arguments, BadInput, Kit, attention
from msa.conformance.bad_input_backends import BACKEND_CASES


def config(name: str, error: type[Exception], says: tuple[str, ...], **values: Any) -> BadInput:
    """An MSAConfig that must not come to be."""
    return BadInput(name, error, says, lambda kit: msa.MSAConfig(**values))


def borders(q: Any, k: Any) -> Callable[[Kit], Arguments]:
    """cu_seqlens."""
    return lambda kit: {"cu_seqlens_q": q, "cu_seqlens_k": k}


CONFIGS = [
    config("k < 1", ValueError, ("top_k", "at least 1", "got 0"), top_k=0),
    config("Bk < 1", ValueError, ("block_size", "at least 1", "got 0"), block_size=0),
    config("local < 1", ValueError, ("local_blocks", "at least 1", "got 0"), local_blocks=0),
    config("sink < 0", ValueError, ("sink_blocks", "at least 0", "got -1"), sink_blocks=-1),
    config(
        "sink + local > k", ValueError, ("sink_blocks + local_blocks", "top_k = 3", "2 + 2"),
        top_k=3, sink_blocks=2, local_blocks=2,
    ),
    config("fractional k", TypeError, ("top_k", "integer", "2.5"), top_k=2.5),
    config("boolean Bk", TypeError, ("block_size", "integer", "True"), block_size=True),
    config("infinite scale", ValueError, ("softmax_scale", "finite", "inf"),
           softmax_scale=float("inf")),
    config("NaN scale", ValueError, ("index_scale", "finite", "nan"), index_scale=float("nan")),
    config("negative scale", ValueError, ("softmax_scale", "positive", "-1"), softmax_scale=-1.0),
    config("zero scale", ValueError, ("index_scale", "positive", "0"), index_scale=0.0),
    config("scale in words", TypeError, ("softmax_scale", "number", "'1'"), softmax_scale="1"),
    config("boolean scale", TypeError, ("index_scale", "number", "True"), index_scale=True),
    config("boolean k of NumPy", TypeError, ("top_k", "integer", "bool"), top_k=np.bool_(True)),
    config("more than the largest k", ValueError, ("top_k", "LARGEST_TOP_K = 16384", "got 16385"),
           top_k=16385),
    config("k beyond int32", ValueError, ("top_k", "LARGEST_TOP_K", "got 2147483648"),
           top_k=np.int64(2**31)),
    config("more than the largest Bk", ValueError,
           ("block_size", "LARGEST_BLOCK_SIZE = 65536", "got 1099511627776"), block_size=2**40),
    config("a scale beyond float32", ValueError,
           ("softmax_scale", "LARGEST_SCALE = 2^127", "float32", "got 1e+39"), softmax_scale=1e39),
    config("a scale beyond float32 after log2(e)", ValueError,
           ("softmax_scale", "LARGEST_SCALE", "got 3e+38"), softmax_scale=3e38),
    config("a scale below float32", ValueError,
           ("index_scale", "LEAST_SCALE = 2^-126", "got 1e-46"), index_scale=1e-46),
    config("a scale that float32 holds in part", ValueError, ("softmax_scale", "got 1e-38"),
           softmax_scale=Fraction(1, 10**38)),
    config("an integer scale beyond float64", ValueError, ("index_scale", "finite", "got inf"),
           index_scale=10**400),
]  # fmt: skip

SHAPE_CASES = [
    attention("q of rank 2", ValueError, ("q", "[Tq, Hq, D]", "[6, 4]"),
              lambda kit: {"q": kit.array(6, 4)}),
    attention("k of rank 2", ValueError, ("k", "[Tk, Hkv, D]", "[8, 4]"),
              lambda kit: {"k": kit.array(8, 4)}),
    attention("batched k beside packed q", ValueError, ("k", "[Tk, Hkv, D]", "[1, 8, 2, 4]"),
              lambda kit: {"k": kit.array(1, 8, 2, 4)}),
    attention("k_idx with heads", ValueError, ("k_idx", "[Tk, Di]", "[8, 2, 2]"),
              lambda kit: {"k_idx": kit.array(8, 2, 2)}),
    attention("other head dim of k", ValueError, ("k", "[Tk, Hkv, D] = [any, any, 4]", "[8, 2, 5]"),
              lambda kit: {"k": kit.array(8, 2, 5)}),
    attention("other heads of v", ValueError, ("v", "[Tk, Hkv, Dv] = [8, 2, any]", "[8, 1, 3]"),
              lambda kit: {"v": kit.array(8, 1, 3)}),
    attention("fewer tokens in v", ValueError, ("v", "[8, 2, any]", "[7, 2, 3]"),
              lambda kit: {"v": kit.array(7, 2, 3)}),
    attention("other groups of q_idx", ValueError, ("q_idx", "[Tq, Hkv, Di]", "[6, 2, any]",
              "[6, 4, 2]"), lambda kit: {"q_idx": kit.array(6, 4, 2)}),
    attention("other dim of k_idx", ValueError, ("k_idx", "[8, 2]", "[8, 3]"),
              lambda kit: {"k_idx": kit.array(8, 3)}),
    attention("Hq not a multiple of Hkv", ValueError, ("q", "multiple of Hkv = 2", "got 3"),
              lambda kit: {"q": kit.array(6, 3, 4)}),
    attention("no head at all", ValueError, ("q", "[Tq, Hq, D]", "[6, 0, 4]"),
              lambda kit: {"q": kit.array(6, 0, 4)}),
    attention("n_q > n_k", ValueError, ("q", "at most", "k = 8", "got 9"),
              lambda kit: {"q": kit.array(9, 4, 4), "q_idx": kit.array(9, 2, 2)}),
    BadInput("other dim of k_idx in select", ValueError, ("k_idx", "[any, 2]", "[8, 3]"),
             lambda kit: kit.select(k_idx=kit.array(8, 3))),
    BadInput("other groups of q_idx in align_index", ValueError, ("q_idx", "[6, 2, any]"),
             lambda kit: kit.align(q_idx=kit.array(6, 3, 2))),
    BadInput("lse of other heads", ValueError, ("lse", "[Tq, Hq] = [6, 4]", "got [6, 2]"),
             lambda kit: kit.align(lse=kit.array(6, 2))),
    BadInput("lse with heads first", ValueError, ("lse", "[Tq, Hq] = [6, 4]", "got [4, 6]"),
             lambda kit: kit.align(lse=kit.array(4, 6))),
    BadInput("batched lse beside packed q", ValueError, ("lse", "[Tq, Hq]", "got [1, 6, 4]"),
             lambda kit: kit.align(lse=kit.array(1, 6, 4))),
]  # fmt: skip

BORDER_CASES = [
    attention("decreasing cu_seqlens", ValueError, ("cu_seqlens_q", "not decrease", "4 then 2"),
              borders([0, 4, 2, 6], [0, 4, 6, 8])),
    attention("cu_seqlens_k ends early", ValueError, ("cu_seqlens_k", "end with Tk = 8", "got 7"),
              borders([0, 6], [0, 7])),
    attention("cu_seqlens_q ends late", ValueError, ("cu_seqlens_q", "end with Tq = 6", "got 7"),
              borders([0, 7], [0, 8])),
    attention("cu_seqlens not from 0", ValueError, ("cu_seqlens_q", "start with 0", "(1, 6)"),
              borders([1, 6], [0, 8])),
    attention("empty cu_seqlens", ValueError, ("cu_seqlens_k", "0", "()"),
              borders([0, 6], np.zeros(0, np.int32))),
    attention("one sequence longer in q", ValueError, ("cu_seqlens_q", "at most", "5 queries",
              "4 keys"), borders([0, 5, 6], [0, 4, 8])),
    attention("batches of different size", ValueError, ("cu_seqlens_k", "as many", "2", "got 3"),
              borders([0, 6], [0, 4, 8])),
    attention("only one of the cu_seqlens", ValueError, ("cu_seqlens_k", "None"),
              borders([0, 6], None)),
    attention("fractional cu_seqlens", TypeError, ("cu_seqlens_q", "integer", "float"),
              borders([0.0, 6.0], [0, 8])),
    attention("cu_seqlens of rank 2", ValueError, ("cu_seqlens_q", "[batch + 1]", "list inside"),
              borders([[0, 6]], [0, 8])),
    attention("an array of cu_seqlens of rank 2", ValueError,
              ("cu_seqlens_k", "[batch + 1]", "[1, 2]"), borders([0, 6], np.array([[0, 8]]))),
    attention("ragged cu_seqlens", ValueError, ("cu_seqlens_k", "[batch + 1]", "list inside"),
              borders([0, 6], [[0], [0, 8]])),
    attention("boolean cu_seqlens", TypeError, ("cu_seqlens_q", "integers", "bool"),
              lambda kit: {"cu_seqlens_q": kit.integers([0, 1], "bool"), "cu_seqlens_k": [0, 8]}),
    attention("a boolean among cu_seqlens", TypeError, ("cu_seqlens_q[1]", "integer", "True"),
              borders([0, True], [0, 8])),
    attention("cu_seqlens in words", TypeError, ("cu_seqlens_q", "array", "str"),
              borders("06", [0, 8])),
    attention("cu_seqlens beyond int64", ValueError,
              ("cu_seqlens_k[1]", "LARGEST_BORDER", "got 18446744073709551615"),
              borders([0, 6], np.array([0, 2**64 - 1], np.uint64))),
    BadInput("sequences of a list", TypeError, ("cu_seqlens_q", "tuple of integers", "list"),
             lambda kit: msa.Sequences([0, 6], (0, 8))),  # type: ignore[arg-type]
    BadInput("fractional borders of sequences", TypeError, ("cu_seqlens_k[1]", "integer", "8.0"),
             lambda kit: msa.Sequences((0, 6), (0, 8.0))),  # type: ignore[arg-type]
    attention("cu_seqlens with batched tensors", ValueError, ("cu_seqlens_q", "None", "batched"),
              lambda kit: {**{n: kit.array(1, *s) for n, s in SHAPES.items()},
                           "cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 8]}),
]  # fmt: skip

KIND_CASES = [
    attention("mixed dtype", TypeError, ("k", "dtype of q", "float32", "float16"),
              lambda kit: {"k": kit.array(8, 2, 4, dtype="float16")}),
    attention("mixed dtype in the index branch", TypeError, ("k_idx", "dtype of q_idx", "float64"),
              lambda kit: {"k_idx": kit.array(8, 2, dtype="float64")}),
    attention("integer values", TypeError, ("v", "float16 or bfloat16 or float32", "int32"),
              lambda kit: {"v": kit.integers(np.ones((8, 2, 3)))}),
    attention("a list", TypeError, ("q", "array", "list"), lambda kit: {"q": [[[1.0]]]}),
    attention("last dim not contiguous", ValueError, ("k", "contiguous", "strides"),
              lambda kit: {"k": kit.array(8, 2, 8)[..., ::2]}),
    attention("transposed last dim", ValueError, ("v", "contiguous", "strides"),
              lambda kit: {"v": kit.array(3, 2, 8).T if kit.subject.kind == "numpy"
                           else kit.array(3, 2, 8).permute(2, 1, 0)}),
    attention("a dictionary as config", TypeError, ("config", "MSAConfig", "dict"),
              lambda kit: {"config": {}}),
    attention("align in words", TypeError, ("align", "True or False", "'yes'"),
              lambda kit: {"align": "yes"}),
    BadInput("lse in half precision", TypeError, ("lse", "float32 or float64", "float16"),
             lambda kit: kit.align(lse=kit.array(6, 4, dtype="float16"))),
    BadInput("lse of another kind", TypeError, ("lse", "array", "float"),
             lambda kit: kit.align(lse=1.0)),
]  # fmt: skip

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

CACHE_CASES = [
    BadInput("page table too short", ValueError, ("cache.page_table", "2 entries", "got 1"),
             lambda kit: kit.decode({"page_table": kit.integers([[0], [1]])})),
    BadInput("page out of range", ValueError, ("cache.page_table", "0 to 2", "got 3"),
             lambda kit: kit.decode({"page_table": kit.integers([[0, 3], [1, 0]])})),
    BadInput("page -1", ValueError, ("cache.page_table", "0 to 2", "got -1"),
             lambda kit: kit.decode({"page_table": kit.integers([[-1, 2], [1, 0]])})),
    BadInput("length below the queries", ValueError, ("cache.lengths", "at least the 2", "got 1"),
             lambda kit: kit.decode({"lengths": kit.integers([7, 1])}, q=kit.array(2, 2, 4, 4),
                                    q_idx=kit.array(2, 2, 2, 2))),
    BadInput("negative length", ValueError, ("cache.lengths", "0", "got -1"),
             lambda kit: kit.decode({"lengths": kit.integers([7, -1])})),
    BadInput("pages of another block size", ValueError, ("cache.k_pages", "4", "[3, 5, 2, 4]"),
             lambda kit: kit.decode({"k_pages": kit.array(3, 5, 2, 4)})),
    BadInput("fewer value pages", ValueError, ("cache.v_pages", "[3, 4, 2, any]", "[2, 4, 2, 3]"),
             lambda kit: kit.decode({"v_pages": kit.array(2, 4, 2, 3)})),
    BadInput("fractional lengths", TypeError, ("cache.lengths", "integers"),
             lambda kit: kit.decode({"lengths": kit.array(2)})),
    BadInput("boolean lengths", TypeError, ("cache.lengths", "integers", "bool"),
             lambda kit: kit.decode({"lengths": kit.integers([True, True], "bool")})),
    BadInput("a list as page table", TypeError, ("cache.page_table", "array", "list"),
             lambda kit: kit.decode({"page_table": [[0, 2], [1, 0]]})),
    BadInput("flat of a list as lengths", TypeError, ("cache.lengths", "array", "list"),
             lambda kit: kit.cache(lengths=[7, 3]).flat(0)),
    BadInput("flat of a negative length", ValueError, ("cache.lengths", "at least 0", "got -3"),
             lambda kit: kit.cache(lengths=kit.integers([7, -3])).flat(1)),
    BadInput("a length beyond int64", ValueError, ("cache.", "got"),
             lambda kit: kit.decode({"lengths": kit.integers([7, 2**64 - 3], "uint64")})),
    BadInput("other batch in the table", ValueError, ("cache.page_table", "[2, any]", "[3, 2]"),
             lambda kit: kit.decode({"page_table": kit.integers([[0, 1]] * 3)})),
    BadInput("mixed dtype in the cache", TypeError, ("cache.v_pages", "dtype of q", "float16"),
             lambda kit: kit.decode({"v_pages": kit.array(3, 4, 2, 3, dtype="float16")})),
    BadInput("q of rank 3 in decode", ValueError, ("q", "[B, n, Hq, D]", "[2, 4, 4]"),
             lambda kit: kit.decode(q=kit.array(2, 4, 4))),
    BadInput("other heads of q in decode", ValueError, ("q", "multiple of Hkv = 2", "got 3"),
             lambda kit: kit.decode(q=kit.array(2, 1, 3, 4))),
    BadInput("scales beside pages of 32 bits", ValueError,
             ("cache.v_scales", "None where cache.v_pages has dtype", "float32", "got"),
             lambda kit: kit.decode({"v_scales": kit.array(3, 2)})),
    BadInput("a dictionary as cache", TypeError, ("cache", "PagedKV", "dict"),
             lambda kit: kit.decode(cache={})),
]  # fmt: skip

POOL_CASES = [
    BadInput("pages of rank 3", ValueError, ("k_pages", "[pages, Bk, Hkv, D]", "got [3, 4, 2]"),
             lambda kit: kit.pool(k_pages=kit.array(3, 4, 2))),
    BadInput("fewer index pages", ValueError, ("k_idx_pages", "[3, 4, any]", "got [2, 4, 2]"),
             lambda kit: kit.pool(k_idx_pages=kit.array(2, 4, 2))),
    BadInput("pages of integers", TypeError, ("v_pages", "float16", "int32"),
             lambda kit: kit.pool(v_pages=kit.integers(np.ones((3, 4, 2, 3))))),
    BadInput("mixed dtype in a pool", TypeError, ("v_pages", "dtype of k_pages", "float64"),
             lambda kit: kit.pool(v_pages=kit.array(3, 4, 2, 3, dtype="float64"))),
    BadInput("a pool for nobody", ValueError, ("batch", "at least 1", "got 0"),
             lambda kit: kit.pool(batch=0)),
    BadInput("no page for a sequence", ValueError, ("pages_per_sequence", "at least 1", "got 0"),
             lambda kit: kit.pool(pages_per_sequence=0)),
    BadInput("a sequence beyond the batch", ValueError, ("sequence", "0 to 1", "got 2"),
             lambda kit: kit.append(2, 1)),
    BadInput("one of several beyond the batch", ValueError, ("sequence", "0 to 1", "got 3"),
             lambda kit: kit.append([0, 3], 2, 1)),
    BadInput("reserving beyond the batch", ValueError, ("sequence", "0 to 1", "got 2"),
             lambda kit: kit.reserve(2, 1)),
    BadInput("reserving less than nothing", ValueError, ("n", "at least 0", "got -1"),
             lambda kit: kit.reserve(0, -1)),
    BadInput("reserving half a token", TypeError, ("n", "integer", "0.5"),
             lambda kit: kit.reserve(0, 0.5)),
    BadInput("reserving more than the table has room for", ValueError,
             ("cache.page_table", "3 entries", "9 tokens", "sequence 1", "got 2"),
             lambda kit: kit.reserve(1, 9)),
    BadInput("reserving a full pool", ValueError, ("k_pages", "4 free pages", "[1, 0]", "got 3"),
             lambda kit: kit.reserve([1, 0], 5)),
    BadInput("a sequence below 0", ValueError, ("sequence", "at least 0", "got -1"),
             lambda kit: kit.append(-1, 1)),
    BadInput("fractional sequence", TypeError, ("sequence", "integer", "1.0"),
             lambda kit: kit.append(1.0, 1)),
    BadInput("a sequence twice", ValueError, ("sequence", "once", "got 1 twice"),
             lambda kit: kit.append([1, 0, 1], 3, 1)),
    BadInput("freeing beyond the batch", ValueError, ("sequence", "0 to 1", "got 2"),
             lambda kit: kit.pool().free(2)),
    BadInput("flat beyond the batch", ValueError, ("sequence", "0 to 1", "got 2"),
             lambda kit: kit.cache().flat(2)),
    BadInput("flat with a page out of range", ValueError, ("cache.page_table", "0 to 2", "got -1"),
             lambda kit: kit.cache(page_table=kit.integers([[0, -1], [1, 0]])).flat(0)),
    BadInput("flat with a table too short", ValueError, ("cache.page_table", "2 entries", "got 1"),
             lambda kit: kit.cache(page_table=kit.integers([[0], [1]])).flat(0)),
    BadInput("more tokens than the table has room for", ValueError,
             ("cache.page_table", "3 entries", "9 tokens", "sequence 1", "got 2"),
             lambda kit: kit.append(1, 6)),
    BadInput("a full pool", ValueError, ("k_pages", "3 free pages", "5 more", "[0, 1]", "got 2"),
             lambda kit: kit.append([0, 1], 2, 5)),
    BadInput("new keys of other heads", ValueError, ("k", "[any, 2, 4]", "got [1, 3, 4]"),
             lambda kit: kit.append(0, 1, k=kit.array(1, 3, 4))),
    BadInput("fewer new values than keys", ValueError, ("v", "[2, 2, 3]", "got [1, 2, 3]"),
             lambda kit: kit.append(0, 2, v=kit.array(1, 2, 3))),
    BadInput("packed tokens for several sequences", ValueError,
             ("k", "[S, n, Hkv, D] = [2, any, 2, 4]", "got [2, 2, 4]"),
             lambda kit: kit.append([0, 1], 2)),
    BadInput("tokens for more sequences than named", ValueError, ("k", "[1, any, 2, 4]",
             "got [2, 1, 2, 4]"), lambda kit: kit.append([0], 2, 1)),
    BadInput("new index keys of another dtype", TypeError,
             ("k_idx", "dtype of cache.k_idx_pages", "float64"),
             lambda kit: kit.append(0, 1, k_idx=kit.array(1, 2, dtype="float64"))),
    BadInput("a list of new values", TypeError, ("v", "array", "list"),
             lambda kit: kit.append(0, 1, v=[[[1.0] * 3] * 2])),
]  # fmt: skip


def masked(name: str, call: Callable[[Kit, Any], Any], *shape: int, dtype: str = "f4") -> BadInput:
    """An argument with a mask, which no backend would look at: each comes in by the same door."""
    says = name.partition(" ")[0], "numpy.ndarray itself", "MaskedArray", "filled"
    array = np.ma.masked_array(np.ones(shape, dtype), mask=True)
    return BadInput(f"a mask on {name}", TypeError, says, lambda kit: call(kit, array))


QUERIES = {"q": (2, 1, 4, 4), "q_idx": (2, 1, 2, 2)}
PAGES = {f"{name}_pages": (3, 4, *SHAPES[name][1:]) for name in ("k", "v", "k_idx")}
DOOR_CASES = [
    *(masked(f"{n} of attention", lambda kit, x, n=n: kit.attention(**{n: x}), *SHAPES[n])
      for n in SHAPES),
    *(masked(f"{n} of lower", lambda kit, x, n=n: kit.lower(**{n: x}), *SHAPES[n])
      for n in SHAPES),
    *(masked(f"{n} of select", lambda kit, x, n=n: kit.select(**{n: x}), *SHAPES[n])
      for n in ("q_idx", "k_idx")),
    *(masked(f"{n} of sparse_attention", lambda kit, x, n=n: kit.sparse(**{n: x}), *SHAPES[n])
      for n in ("q", "k", "v")),
    *(masked(f"{n} of align_index", lambda kit, x, n=n: kit.align(**{n: x}), *SHAPES[n])
      for n in ("q", "k", "q_idx", "k_idx")),
    masked("lse of align_index", lambda kit, x: kit.align(lse=x), 6, 4),
    masked("selection.indices", lambda kit, x: kit.sparse(selection=kit.selection(indices=x)),
           6, 2, 2, dtype="i4"),
    masked("selection.indices of align_index",
           lambda kit, x: kit.align(selection=kit.selection(indices=x)), 6, 2, 2, dtype="i4"),
    masked("selection.indices to be validated",
           lambda kit, x: kit.selection(indices=x).validate(), 6, 2, 2, dtype="i4"),
    *(masked(f"cu_seqlens_{n}", lambda kit, x, n=n: kit.attention(
        **{"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 8], f"cu_seqlens_{n}": x}), 2, dtype="i4")
      for n in "qk"),
    *(masked(f"{n} of decode", lambda kit, x, n=n: kit.decode(**{n: x}), *shape)
      for n, shape in QUERIES.items()),
    *(masked(f"cache.{n}", lambda kit, x, n=n: kit.decode({n: x}), *shape)
      for n, shape in PAGES.items()),
    masked("cache.page_table", lambda kit, x: kit.decode({"page_table": x}), 2, 2, dtype="i4"),
    masked("cache.lengths", lambda kit, x: kit.decode({"lengths": x}), 2, dtype="i4"),
    masked("cache.page_table of flat", lambda kit, x: kit.cache(page_table=x).flat(0), 2, 2,
           dtype="i4"),
    *(masked(f"{n} of a pool", lambda kit, x, n=n: kit.pool(**{n: x}), *shape)
      for n, shape in PAGES.items()),
    *(masked(f"{n} of append", lambda kit, x, n=n: kit.append(0, 1, **{n: x}), 1, *SHAPES[n][1:])
      for n in ("k", "v", "k_idx")),
    attention("a matrix", TypeError, ("q", "numpy.ndarray itself", "matrix", "numpy.asarray"),
              lambda kit: {"q": np.ones((6, 4)).view(np.matrix)}),
    attention("an array of objects", TypeError, ("k", "float16", "got object"),
              lambda kit: {"k": np.ones(SHAPES["k"], object)}),
    attention("the other order of bytes", TypeError, ("q", "float16", "got >f4"),
              lambda kit: {"q": np.ones(SHAPES["q"], ">f4")}),
]  # fmt: skip

BAD_INPUTS: tuple[BadInput, ...] = (
    *CONFIGS,
    *SHAPE_CASES,
    *BORDER_CASES,
    *KIND_CASES,
    *SELECTION_CASES,
    *CACHE_CASES,
    *POOL_CASES,
    *DOOR_CASES,
    *BACKEND_CASES,
)
"""The whole of R20, case by case."""
