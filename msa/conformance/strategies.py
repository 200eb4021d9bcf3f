"""Hypothesis strategies for small cases of every shape and value that the rules allow.

Everything is drawn from a backend's `Domain`, so no case has to be skipped. The simplest choice
always comes first, so that a counterexample shrinks to a case that a reader can check by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from msa.config import MSAConfig
from msa.conformance.backends import Domain
from msa.conformance.cases import (
    INTEGER_KINDS,
    MILD_KINDS,
    WILD_KINDS,
    Case,
    Fill,
    Kind,
    PagedCase,
    Picks,
    ScoresCase,
)
from msa.ir import Sequences

BLOCK_SIZES = (1, 2, 3, 4, 5, 7, 8, 16)
DIMS = (1, 2, 3, 4, 5, 7, 8, 16)
GROUPS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (2, 4), (1, 5), (1, 8), (1, 16))
MANY_HEADS = ((3, 2), (5, 1), (6, 1), (7, 2), (3, 5), (2, 7), (5, 3), (9, 1), (1, 24))
"""Pairs (Hkv, G). In each pair at least one number is no power of two."""
MANY_PLACES = (31, 32, 33, 64, 100, 127, 128, 255, 256, 257, 300, 512, 1000, 4096)
"""Values of k. The largest k of the backend is drawn as well."""
SCALES = (None, 1.0, 0.25, 1.7)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
Shape = Literal["prefill", "chunk", "decode"]


@dataclass(frozen=True)
class Want:
    """What the cases of a property must look like."""

    main: tuple[Kind, ...] = MILD_KINDS
    """The kinds of numbers in q and k."""
    values: tuple[Kind, ...] = MILD_KINDS
    """The kinds of numbers in v."""
    index: tuple[Kind, ...] = INTEGER_KINDS
    """The kinds of numbers in q_idx and k_idx. With integers every score is exact."""
    planted: bool = True
    """Whether NaN and infinities may be planted in q_idx and k_idx."""
    shapes: tuple[Shape, ...] = ("prefill", "chunk", "decode")
    batch: tuple[int, int] = (1, 4)
    dtypes: tuple[str, ...] | None = None
    """Draw only these of the backend's dtypes."""
    tokens: int = 32
    """Roughly the total number of keys, if blocks are small."""


EXACT_INDEX = Want()
REAL_INDEX = Want(index=("normal", "tiny", "large"), planted=False)
WILD = Want(main=WILD_KINDS, values=WILD_KINDS)
REAL: tuple[Kind, ...] = ("zeros", "ties", "normal")
MILD = Want(main=REAL, values=REAL, index=REAL, planted=False)
"""For gradients: logits of moderate size, all values finite."""
DOUBLE = replace(MILD, dtypes=("float64",), tokens=16)
"""For finite differences: float64, few tokens."""


# Hypothesis takes longer to make a strategy than to draw from it, so each is made once.
among = cache(st.sampled_from)
"""One of a few values, which are given as a tuple."""
number = cache(st.integers)
SEEDS = st.integers(0, 9999)


def once(make: Callable[..., SearchStrategy[Any]]) -> Callable[..., SearchStrategy[Any]]:
    """The same strategy for the same arguments. The first one is a domain, which has no hash."""
    kept: dict[Any, tuple[Any, SearchStrategy[Any]]] = {}

    def get(first: Any, *more: Any, **options: Any) -> SearchStrategy[Any]:
        key = (id(first), *more, *options.items())
        if key not in kept:
            kept[key] = first, make(first, *more, **options)
        return kept[key][1]

    get.__doc__ = make.__doc__
    return get


@cache
def fills(kinds: tuple[Kind, ...], planted: bool = False) -> SearchStrategy[Fill]:
    """How a tensor is filled; if planted, with up to three NaN or infinities in it."""
    places = st.tuples(number(0, 255), among(NOT_FINITE))
    plants = st.lists(places, max_size=3).map(tuple) if planted else st.just(())
    return st.builds(Fill, among(kinds), SEEDS, plants)


@cache
def lengths_of(block_size: int, limit: int) -> SearchStrategy[int]:
    """The length of one sequence; often it ends at or beside the border of a block."""
    near_border = tuple(m * block_size + d for m in (1, 2, 3) for d in (-1, 0, 1))
    near_border = tuple(n for n in near_border if n <= limit)
    return st.one_of(number(0, limit), among(near_border or (0,)))


@cache
@st.composite
def sequences(draw: DrawFn, block_size: int, want: Want) -> Sequences:
    """Sequences of different lengths: some are 0, some end at the border of a block (R1-R3)."""
    batch = draw(number(*want.batch))
    lengths = lengths_of(block_size, max(1, max(want.tokens, 3 * block_size) // max(1, batch)))
    shape: Shape = draw(among(want.shapes))
    cu_q, cu_k = [0], [0]
    for _ in range(batch):
        n_k = draw(lengths)
        match shape:
            case "prefill":
                n_q = n_k
            case "chunk":
                n_q = draw(number(0, n_k))
            case "decode":
                n_q = min(n_k, draw(number(1, 3)))
        cu_q.append(cu_q[-1] + n_q)
        cu_k.append(cu_k[-1] + n_k)
    return Sequences(tuple(cu_q), tuple(cu_k))


@once
@st.composite
def configs(draw: DrawFn, domain: Domain) -> MSAConfig:
    """k from 1 to more than the number of blocks; forced blocks fill some or all places."""
    top_k = draw(number(1, 6))
    sink = min(draw(among((0, 0, 0, 1, 2))), top_k - 1)
    local = min(draw(among((1, 1, 1, 2, 6))), top_k - sink)
    return MSAConfig(
        block_size=draw(among(domain.block_sizes or BLOCK_SIZES)),
        top_k=top_k,
        sink_blocks=sink if domain.sinks else 0,
        local_blocks=local if domain.more_local else 1,
        softmax_scale=draw(among(SCALES)),
        index_scale=draw(among(SCALES)),
    )


@once
@st.composite
def cases(draw: DrawFn, domain: Domain, want: Want = EXACT_INDEX) -> Case:
    """One call of attention."""
    config = draw(configs(domain))
    groups, group = draw(among(GROUPS))
    dims = among(domain.dims or DIMS)
    dtypes = tuple(d for d in domain.dtypes if want.dtypes is None or d in want.dtypes)
    dtype = draw(among(dtypes))
    return Case(
        config=config,
        sequences=draw(sequences(config.block_size, want)),
        groups=groups,
        group=group,
        dims=(draw(dims), draw(dims), draw(dims)),
        dtype=dtype,
        q=draw(fills(_for(dtype, want.main))),
        k=draw(fills(_for(dtype, want.main))),
        v=draw(fills(_for(dtype, want.values))),
        q_idx=draw(fills(_for(dtype, want.index), want.planted)),
        k_idx=draw(fills(_for(dtype, want.index), want.planted)),
        picks=draw(picks(domain)),
        chunk_size=draw(among((1, 2, 3, 4, 7, 64))),
        tile_size=draw(among((1, 2, 3, 4, 8, 31))),
    )


@once
@st.composite
def long_unions(draw: DrawFn, domain: Domain, want: Want = WILD) -> Case:
    """Enough queries to fill a tile; neighbours share all, some or none of their blocks.

    The loop orders differ here: the union of a tile's blocks is k blocks or several times more.
    """
    case = draw(cases(domain, want))
    block, top_k = min(domain.block_sizes or (4,)), draw(among((2, 3)))
    n_k = block * draw(among((12, 6, 2))) + draw(among((0, -1, 3)))
    n_q, short = min(n_k, draw(among((28, 33)))), draw(number(0, 3))
    return replace(
        case,
        config=replace(case.config, block_size=block, top_k=top_k, sink_blocks=0, local_blocks=1),
        sequences=Sequences((0, n_q, n_q + short), (0, n_k, n_k + short)),
        picks=draw(st.builds(Picks, among(("spread", "random", "sink")), SEEDS)),
    )


@once
@st.composite
def large_cases(draw: DrawFn, domain: Domain, want: Want = EXACT_INDEX) -> Case:
    """One size is large and the others are small.

    The large one is k (up to the largest, with fewer or more blocks than k), the number of heads
    (no power of two), the number of sequences (more than 16) or the number of blocks (hundreds).
    """
    case = draw(cases(domain, replace(want, tokens=12, batch=(1, 2))))
    block, n_q = min(domain.block_sizes or (1,)), draw(number(1, 3))
    places = [k for k in MANY_PLACES if k < domain.largest_top_k]
    most = max(40, min(300, 2400 // block))
    config = replace(case.config, block_size=block)
    match draw(among(("heads", "sequences", "k", "k and blocks", "blocks"))):
        case "heads":
            groups, group = draw(among(MANY_HEADS))
            return replace(case, groups=groups, group=group)
        case "sequences":
            lengths = draw(st.lists(number(0, 3), min_size=17, max_size=40))
            borders = tuple(sum(lengths[:s]) for s in range(len(lengths) + 1))
            return replace(case, sequences=Sequences(borders, borders))
        case "k":
            top_k = draw(among((*places, domain.largest_top_k)))
            return replace(case, config=replace(case.config, top_k=top_k))
        case "k and blocks":
            config = replace(config, top_k=draw(among(tuple(k for k in places if k < most))))
            blocks = config.top_k + draw(number(1, 9))
        case _:
            blocks = draw(number(most // 3, most))
    return replace(case, config=config, sequences=Sequences.one(n_q, blocks * block))


def mild(domain: Domain) -> SearchStrategy[Case]:
    """Cases for gradients."""
    return cases(domain, MILD)


def double(domain: Domain) -> SearchStrategy[Case]:
    """Cases for finite differences."""
    return cases(domain, DOUBLE)


def _for(dtype: str, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The kinds that suit a dtype. float16 ends at 65504, so all enormous values would be equal."""
    return tuple(k for k in kinds if not (dtype == "float16" and k == "enormous"))


@once
def picks(domain: Domain) -> SearchStrategy[Picks]:
    """A canonical Selection (R8)."""
    full = ("full", "spread")  # these fill every place for which a block is visible
    kinds = among(full if domain.full_rows else ("own", "sink", "random", "full"))
    return st.builds(Picks, kinds, SEEDS)


@once
@st.composite
def scores_cases(draw: DrawFn, domain: Domain) -> ScoresCase:
    """Block scores with many ties, infinities and NaN, often for more blocks than k."""
    config = draw(configs(domain))
    want = Want(tokens=12 * config.block_size, batch=(1, 2))
    return ScoresCase(
        config=config,
        sequences=draw(sequences(config.block_size, want)),
        groups=draw(number(1, 3)),
        fill=draw(fills(("zeros", "ties", "integers", "normal", "enormous"), planted=True)),
    )


@once
@st.composite
def paged_cases(draw: DrawFn, domain: Domain) -> PagedCase:
    """A decoding step: 1 to 3 queries per live sequence, pages in any order."""
    n = draw(number(1, 3))
    live = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=4)))
    case = draw(cases(domain, Want(batch=(sum(live), sum(live)), shapes=("decode",))))
    block = case.config.block_size
    lengths = [draw(number(n, n + 2 * block + 1)) for _ in range(sum(live))]
    cu_k = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    borders = Sequences(tuple(n * s for s in range(len(lengths) + 1)), tuple(cu_k))
    return PagedCase(
        case=replace(case, sequences=borders),
        live=live,
        seed=draw(SEEDS),
        spare_pages=draw(number(0, 2)),
        spare_columns=draw(number(0, 2)),
    )
