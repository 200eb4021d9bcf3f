"""Cases that are tried before all others: kinds of bugs that users of sparse attention reported.

Each case shows its kind of bug with a few tokens. The cases are made for a domain, since a kernel
may support a single block size; so all lengths below are given in blocks.

>>> from msa.conformance import Domain
>>> for seed in seeds(Domain())[:2]:
...     print(seed.bug, "-", seed.case.sequences.cu_seqlens_k)
tied scores - (0, 35)
NaN scores - (0, 11)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msa.config import MSAConfig
from msa.conformance.backends import Domain
from msa.conformance.cases import Case, Fill, Picks
from msa.conformance.properties import Property
from msa.ir import Sequences

NAN = float("nan")
CHOOSE = ("r7_integer_scores_select_the_same_everywhere",)
READ = ("r9_attention_over_a_selection_is_the_definition", "r9_the_whole_path_is_the_definition")


@dataclass(frozen=True)
class Seed:
    """A case, the kind of bug that it shows, and the properties that find the bug with it."""

    bug: str
    case: Case
    properties: tuple[str, ...]


def seeds(domain: Domain) -> tuple[Seed, ...]:
    """One or more seeds for each kind of bug. Sizes and dtype are those of the domain."""
    block, dim = min(domain.block_sizes or (4,)), min(domain.dims or (2,))

    def case(n_q: int, n_k: int, top_k: int = 2, **more: Any) -> Case:
        """A call for the last n_q of n_k tokens, or for `sequences`. All index queries are 1."""
        groups, group = more.pop("groups", 1), more.pop("group", 1)
        borders = more.pop("sequences", Sequences.one(n_q, n_k))
        first = tuple((place * dim, 1.0) for place in range(borders.total_q * groups))
        filled: dict[str, Any] = {name: Fill("normal", s) for s, name in enumerate("qkv")}
        filled |= {"q_idx": Fill(planted=first), "picks": Picks("full")} | more
        return Case(
            MSAConfig(block, top_k), borders, groups, group, (dim, dim, dim), domain.dtypes[0],
            **filled,
        )  # fmt: skip

    def scores(*per_block: float, token: int = 0) -> Fill:
        """Index keys: one token of block b has the b-th number as its score, all others have 0."""
        places = (((b * block + token) * dim, x) for b, x in enumerate(per_block))
        return Fill(planted=tuple(places))

    three = 2 * block + block // 2 + 1  # this number of tokens ends inside the third block
    five = three + 2 * block
    two_texts = Sequences((0, block + 1, 2 * block + 2), (0, block + 1, 2 * block + 2))
    for_one, for_the_other = scores(1, 2), scores(-2, -1, token=1)
    both = Fill(planted=for_one.planted + for_the_other.planted)
    poisoned = Fill(planted=scores(NAN, 1).planted + scores(2, token=1).planted)
    opposite = Fill(planted=tuple((place * dim, (-1.0) ** place) for place in range(4)))
    return (
        Seed("tied scores", case(1, five + 4 * block, 4), CHOOSE),
        Seed(
            "NaN scores",
            case(1, three, k_idx=scores(NAN, 1)),
            ("r4_a_nan_score_is_never_preferred",),
        ),
        Seed(
            "NaN scores",
            case(1, three, k_idx=poisoned),
            ("r4_a_nan_score_is_never_preferred",),
        ),
        Seed(
            "NaN scores",
            case(1, three, 1, k_idx=scores(NAN, 1)),
            ("r6_nothing_outranks_a_forced_block",),
        ),
        Seed(
            "index order",
            case(1, five, 4, k_idx=scores(1, 2, 4, 3)),
            ("r8_a_selection_is_canonical",),
        ),
        Seed("index order", case(three, three), READ),
        Seed("-1 dereferenced", case(three, three, 3), READ),
        Seed("layout aliasing", case(2, three, groups=2, q_idx=opposite, k_idx=both), CHOOSE),
        Seed("layout aliasing", case(2, three, groups=2, group=2), READ),
        Seed("stale lengths", case(3 * block + 1, five, k_idx=scores(2, 1, 3, 4, 5)), CHOOSE),
        Seed("stale lengths", case(1, three), READ),
        Seed("tail-block garbage", case(0, 0, sequences=two_texts), READ),
        Seed(
            "left padding",
            case(1, three, k_idx=scores(1, 2), chunk_size=1),
            ("r3_padding_on_the_left_shifts_no_block",),
        ),
    )


def seeds_of(prop: Property, domain: Domain) -> tuple[Any, ...]:
    """The cases that a property is tried on first: its own seeds that fit the domain, then these.

    >>> from msa.conformance import all_properties
    >>> (ties,) = (p for p in all_properties() if p.name.startswith("r7_integer"))
    >>> len(seeds_of(ties, Domain()))
    3
    """
    known = tuple(s.case for s in seeds(domain) if prop.name in s.properties)
    return (*(seed for seed in prop.seeds if fits(seed, domain)), *known)


def bug_of(case: Any, domain: Domain) -> str:
    """The kind of bug of a case that is a seed; "" for every other case.

    >>> bug_of(seeds(Domain())[1].case, Domain())
    'NaN scores'
    """
    return next((s.bug for s in seeds(domain) if repr(s.case) == repr(case)), "")


def fits(case: Any, domain: Domain) -> bool:
    """Whether the domain supports the block size, head sizes and dtype of a case.

    A case of pages holds a Case. Objects that hold none always fit.
    """
    while not isinstance(case, Case) and hasattr(case, "case"):
        case = case.case
    if not isinstance(case, Case):
        return True
    return (
        case.config.block_size in (domain.block_sizes or (case.config.block_size,))
        and set(case.dims) <= set(domain.dims or case.dims)
        and case.dtype in domain.dtypes
    )
