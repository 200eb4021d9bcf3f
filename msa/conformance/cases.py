"""What Hypothesis draws: small descriptions of tensors, not the tensors themselves.

A description prints as one line of Python, and that line makes the same tensors again. So a shrunk
counterexample can be read, and can be kept as a seed in a test.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np

from msa.config import MSAConfig
from msa.ir import Array, BlockScores, PagedKV, Selection, Sequences

Kind = Literal["zeros", "ones", "ties", "integers", "normal", "tiny", "large", "enormous"]
Rows = slice | list[int]
INTEGER_KINDS: tuple[Kind, ...] = ("zeros", "ties", "integers")
MILD_KINDS: tuple[Kind, ...] = (*INTEGER_KINDS, "normal")
WILD_KINDS: tuple[Kind, ...] = (*MILD_KINDS, "tiny", "large", "enormous")
LARGEST = {"float16": 6e4}
"""The largest magnitude that is drawn, for dtypes of short range. All others hold every value."""


class Brief:
    """Prints as the call that makes it, without arguments that have their default value."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Fill(Brief):
    """How one tensor is filled.

    >>> Fill("ties", seed=3, planted=((1, np.inf),)).make((4,), "float32")
    array([ 1., inf, -1., -1.])
    """

    kind: Kind = "zeros"
    seed: int = 0
    planted: tuple[tuple[int, float], ...] = ()
    """Pairs (flat position, value), written last. Positions wrap around."""

    def make(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A float64 array whose values are all exact in `dtype`."""
        rng = np.random.default_rng(self.seed)
        match self.kind:
            case "zeros":
                values = np.zeros(shape)
            case "ones":
                values = np.ones(shape)
            case "ties":
                values = rng.integers(-1, 2, shape).astype(float)
            case "integers":
                values = rng.integers(-4, 5, shape).astype(float)
            case "normal":
                values = rng.standard_normal(shape)
            case "tiny":
                values = rng.standard_normal(shape) * 2.0**-20
            case "large":
                values = rng.standard_normal(shape) * 2.0**12
            case "enormous":
                values = rng.standard_normal(shape) * 2.0**50
        limit = LARGEST.get(dtype, np.inf)
        values = np.clip(values, -limit, limit)
        for place, value in self.planted:
            if values.size:
                values.flat[place % values.size] = value
        return round_to(values, dtype)


def round_to(values: Array, dtype: str) -> Array:
    """Each value rounded to the nearest one of `dtype`, as float64.

    >>> round_to(np.array([1 / 3, np.inf]), "bfloat16")
    array([0.33398438,        inf])
    """
    if dtype != "bfloat16":
        return values.astype(dtype).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32)  # bfloat16 is the upper half of float32
    even = (bits >> 16) & 1
    rounded = (bits + 0x7FFF + even) & np.uint32(0xFFFF0000)
    finite = np.isfinite(values)
    return np.where(finite, rounded.view(np.float32).astype(np.float64), values)


def round_to_e4m3(values: Array) -> Array:
    """Values scaled by a power of two and rounded to float8 e4m3, half to even.

    The factor is the largest power of two, at most 2^126, with which all finite values stay within
    448. NaN stays NaN; infinities become 448. e4m3 has four significant bits from 2^-6 on, and
    steps of 2^-9 below.

    >>> round_to_e4m3(np.array([7.0, -0.3, 17.5 / 64, np.inf]))
    array([448., -20.,  18., 448.])
    """
    largest = np.max(np.abs(values), where=np.isfinite(values), initial=0.0)
    fraction, exponent = np.frexp(largest)  # 448 = 0.875 * 2^9
    stretched = np.ldexp(values, min(126, 9 - exponent - (fraction > 0.875)))
    stretched = np.clip(stretched, -448.0, 448.0)
    step = np.ldexp(1.0, np.maximum(np.frexp(stretched)[1] - 1, -6) - 3)
    return np.rint(stretched / step) * step


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call: float64 arrays whose values are exact in `dtype`."""

    main: tuple[Array, Array, Array]
    """q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv]."""
    index: tuple[Array, Array]
    """q_idx [Tq, Hkv, Di], k_idx [Tk, Di]."""
    sequences: Sequences
    config: MSAConfig
    dtype: str

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return self.config.softmax_scale_for(self.main[0].shape[-1])

    @property
    def index_scale(self) -> float:
        """The scale of the index branch."""
        return self.config.index_scale_for(self.index[0].shape[-1])

    def take(self, queries: Rows, keys: Rows, sequences: Sequences) -> Inputs:
        """The same call with some of the tokens, packed as `sequences` says."""
        (q, k, v), (q_idx, k_idx) = self.main, self.index
        main = (q[queries], k[keys], v[keys])
        return replace(self, main=main, index=(q_idx[queries], k_idx[keys]), sequences=sequences)

    def change(self, queries: slice, keys: slice, value: float) -> Inputs:
        """The same call with every number of some tokens set to `value`."""
        arrays = [x.copy() for x in (*self.main, *self.index)]
        for array, span in zip(arrays, (queries, keys, keys, queries, keys)):
            array[span] = value
        q, k, v, q_idx, k_idx = arrays
        return replace(self, main=(q, k, v), index=(q_idx, k_idx))


@dataclass(frozen=True, repr=False)
class Case(Brief):
    """One call: its configuration, sequences, sizes and dtype, and how each tensor is filled."""

    config: MSAConfig
    sequences: Sequences
    groups: int
    """Hkv."""
    group: int
    """G: query heads per group."""
    dims: tuple[int, int, int]
    """D, Dv, Di."""
    dtype: str
    q: Fill = Fill()
    k: Fill = Fill()
    v: Fill = Fill()
    q_idx: Fill = Fill()
    k_idx: Fill = Fill()
    picks: Picks | None = None
    """A Selection that is drawn directly, for properties that take any canonical one."""
    chunk_size: int = 4
    tile_size: int = 4

    @cached_property
    def inputs(self) -> Inputs:
        """The tensors."""
        n_q, n_k = self.sequences.total_q, self.sequences.total_k
        dim, width, index_dim = self.dims
        main = (
            self.q.make((n_q, self.groups * self.group, dim), self.dtype),
            self.k.make((n_k, self.groups, dim), self.dtype),
            self.v.make((n_k, self.groups, width), self.dtype),
        )
        index = (
            self.q_idx.make((n_q, self.groups, index_dim), self.dtype),
            self.k_idx.make((n_k, index_dim), self.dtype),
        )
        return Inputs(main, index, self.sequences, self.config, self.dtype)

    @cached_property
    def selection(self) -> Selection:
        """The Selection that `picks` describes."""
        picks = self.picks or Picks()
        return picks.make(self.sequences, self.groups, self.config)


@dataclass(frozen=True, repr=False)
class Picks(Brief):
    """A canonical Selection (R8). No scores need to give it."""

    kind: Literal["own", "sink", "random", "spread", "full"] = "own"
    seed: int = 0

    def make(self, sequences: Sequences, groups: int, config: MSAConfig) -> Selection:
        """Select each query's own block and, as `kind` says, up to k - 1 others."""
        rng = np.random.default_rng(self.seed)
        indices = np.full((sequences.total_q, groups, config.top_k), -1, np.int32)
        for i, p in enumerate(sequences.positions()):
            own = p // config.block_size
            for r in range(groups):
                room = min(config.top_k - 1, own)
                others = self._others(rng, own, room)
                chosen = sorted({*others, own})
                indices[i, r, : len(chosen)] = chosen
        return Selection(indices, sequences, config.block_size)

    def _others(self, rng: np.random.Generator, own: int, room: int) -> list[int]:
        match self.kind:
            case "own":
                return []
            case "sink":  # every query reads block 0: one long row of the reverse index
                return [0][:room]
            case "spread":
                return rng.choice(own, room, replace=False).tolist() if room else []
            case "full":
                return list(range(own - room, own))
            case "random":
                count = int(rng.integers(0, room + 1))
                return rng.choice(own, count, replace=False).tolist() if count else []


@dataclass(frozen=True, repr=False)
class ScoresCase(Brief):
    """Block scores that are drawn directly; -inf where a block is not visible."""

    config: MSAConfig
    sequences: Sequences
    groups: int
    fill: Fill

    @cached_property
    def scores(self) -> BlockScores:
        """The scores [Tq, Hkv, NB], each exact in float32."""
        block = self.config.block_size
        blocks = self.sequences.max_blocks(block)
        values = self.fill.make((self.sequences.total_q, self.groups, blocks), "float32")
        own = np.array(self.sequences.positions(), int) // block
        visible = np.arange(blocks) <= own[:, None]
        values = np.where(visible[:, None], np.where(np.isnan(values), -np.inf, values), -np.inf)
        return BlockScores(values, self.sequences, block)


@dataclass(frozen=True, repr=False)
class PagedCase(Brief):
    """A decoding step: the tokens of `case` in shuffled pages, and rubbish around them."""

    case: Case
    live: tuple[bool, ...]
    """True for each slot of the batch that holds a sequence of `case`; other slots are empty."""
    seed: int
    spare_pages: int
    spare_columns: int

    @property
    def n(self) -> int:
        """The number of queries per sequence."""
        sequences = self.case.sequences
        return sequences.total_q // sequences.batch if sequences.batch else 1

    @cached_property
    def queries(self) -> tuple[Array, Array]:
        """q [B, n, Hq, D] and q_idx [B, n, Hkv, Di], with zeros in the empty slots."""
        return self._spread(self.case.inputs.main[0]), self._spread(self.case.inputs.index[0])

    def _spread(self, packed: Array) -> Array:
        batched = np.zeros((len(self.live), self.n, *packed.shape[1:]))
        batched[np.array(self.live, bool)] = packed.reshape(-1, self.n, *packed.shape[1:])
        return batched

    @cached_property
    def cache(self) -> PagedKV:
        """Pages in random order. Unused places hold NaN in pages, and -7 in the table."""
        case, block = self.case, self.case.config.block_size
        rng = np.random.default_rng(self.seed)
        cu_blocks = case.sequences.cu_blocks(block)
        total = cu_blocks[-1] + self.spare_pages
        order = rng.permutation(total)
        width = case.sequences.max_blocks(block) + self.spare_columns
        table = np.full((len(self.live), width), -7, np.int32)
        lengths = np.zeros(len(self.live), np.int32)
        packed = (*case.inputs.main[1:], case.inputs.index[1])
        pages = [np.full((total, block, *x.shape[1:]), np.nan) for x in packed]
        slots = [slot for slot, live in enumerate(self.live) if live]
        for s, (slot, (_, keys)) in enumerate(zip(slots, case.sequences.spans())):
            own = order[cu_blocks[s] : cu_blocks[s + 1]]
            table[slot, : len(own)] = own
            lengths[slot] = keys.stop - keys.start
            for j in range(keys.stop - keys.start):
                for page, tokens in zip(pages, packed):
                    page[own[j // block], j % block] = tokens[keys.start + j]
        return PagedKV(*pages, page_table=table, lengths=lengths)
