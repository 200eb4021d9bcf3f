"""Every branch of loop_order="auto" is reached by the cases that the properties draw."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from msa import reference
from msa.conformance import subjects
from msa.conformance.strategies import long_unions
from msa.triton_impl import attention, tuning

SUBJECTS = [
    pytest.param(s, id=s.label, marks=[pytest.mark.gpu] * (s.device != "cpu"))
    for s in subjects(("triton",))
]


def branches(case):
    """For each tile and group: how "auto" treats its union, by its length."""
    if attention.choose_order(case.selection, case.group) == "union":
        return ["union"]
    k = case.config.top_k
    union = reference.unite_tiles(case.selection, attention.positions_of(case.group))
    lengths = (union.block_ids >= 0).sum(-1).ravel().tolist()
    whole, pairs = int(tuning.WALK_ALL * k), int(tuning.WALK_PAIRS * k)
    return ["whole" if n <= whole else "pairs" if n <= pairs else "more" for n in lengths]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_drawn_cases_reach_every_branch(subject):
    cases = Counter()

    @settings(max_examples=max(1, settings().max_examples // subject.domain.cost))
    @given(long_unions(subject.domain))
    def draw(case):
        cases.update(set(branches(case)))

    draw()
    print(dict(cases))
    assert all(cases[name] >= 3 for name in ("whole", "pairs", "more")), cases
