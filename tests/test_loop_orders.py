"""Options of the triton backend reach the kernels; drawn cases reach all branches of auto."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import given, settings

import msa
from msa import loop_order, reference
from msa import triton_impl as TRITON
from msa.conformance import subjects
from msa.conformance.strategies import long_unions
from msa.triton_impl import attention, selection

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
    whole, pairs = loop_order.limits(k)
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
    assert all(cases[name] >= 2 for name in ("whole", "pairs", "more")), cases


def arrays(device, *names):
    """40 tokens, two groups of two heads."""
    shapes = {"q": (40, 4, 16), "k": (40, 2, 16), "v": (40, 2, 16), "q_idx": (40, 2, 16)}
    return {n: torch.randn(shapes.get(n, (40, 16)), device=device) for n in names}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("order", ["kv_outer", "union"])
def test_the_loop_order_arrives(subject, order):
    """The option reaches the code that uses it, from each public function that has it."""
    config = msa.MSAConfig(block_size=16, top_k=2)
    given = arrays(subject.device, "q", "k", "v", "q_idx", "k_idx")
    with mock.patch.object(attention, "attend_part", wraps=attention.attend_part) as part:
        options = {"backend": "triton", "loop_order": order}
        output = msa.attention(**given, config=config, **options)
        again = msa.sparse_attention(*(given[n] for n in "qkv"), output.selection, **options)
    assert [call.args[5] for call in part.call_args_list] == [order, order]
    assert torch.equal(output.out, again.out)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_choice_of_kernels_arrives(subject):
    config = msa.MSAConfig(block_size=16, top_k=2)
    given = arrays(subject.device, "q", "k", "v", "q_idx", "k_idx")
    index = {n: given[n] for n in ("q_idx", "k_idx")}
    choose = selection.choose_kernels
    with mock.patch.object(selection, "choose_kernels", wraps=choose) as chosen:
        for options in ({}, {"kernels": "portable"}):
            msa.select(**index, config=config, backend="triton", **options)
            msa.attention(**given, config=config, backend="triton", **options)
    assert [call.args[0] for call in chosen.call_args_list] == ["auto"] * 2 + ["portable"] * 2
    with pytest.raises(TypeError, match=r"q_idx must have dtype .* for kernels='hopper'"):
        TRITON.select_fused(*index.values(), msa.Sequences.one(40, 40), config, kernels="hopper")


@pytest.mark.gpu
def test_the_index_dtype_arrives():
    config = msa.MSAConfig(block_size=16, top_k=2)
    given = arrays("cuda", "q", "k", "v", "q_idx", "k_idx")
    index = {n: given[n] for n in ("q_idx", "k_idx")}
    with mock.patch.object(selection, "to_fp8", wraps=selection.to_fp8) as rounded:
        msa.select(**index, config=config, index_dtype="fp8_e4m3")
        msa.attention(**given, config=config, index_dtype="fp8_e4m3")
        assert rounded.call_count == 2
        msa.attention(**given, config=config)
        assert rounded.call_count == 2
