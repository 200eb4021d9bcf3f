"""The rules hold whether a product and a sum become one instruction or two.

Triton's interpreter does not fuse, so only a GPU can show it. `tests/test_hopper_compiled.py` shows
that the compiler obeys, `tests/test_chips.py` that every launch states it.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from msa.conformance import all_properties, subjects
from msa.conformance.search import Tally, search
from msa.triton_impl import tuning

RULES = (
    "r9_the_whole_path_is_the_definition",
    "r10_lse_of_the_whole_path_too",
    "r7_real_scores_differ_only_within_rounding",
    "r18_gradients_in_every_dtype",
    "r19_the_same_call_gives_the_same_bits",
)
PROPERTIES = [p for p in all_properties() if p.name in RULES]
SUBJECTS = [s for s in subjects(("triton",)) if s.device != "cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda p: p.name)
def test_a_rule_holds_with_and_without_fusion(prop, fuse, monkeypatch):
    monkeypatch.setitem(tuning.EVERY_LAUNCH, "enable_fp_fusion", fuse)
    tally = Tally()
    for subject in SUBJECTS:
        search(prop, subject, settings(max_examples=10), tally)
    assert tally.tried


def test_the_rules_exist():
    assert {p.name for p in PROPERTIES} == set(RULES)
