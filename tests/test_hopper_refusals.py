"""The choice of kernels: what hopper kernels cannot take is refused if named, else portable."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import msa
from msa import kernel_choice
from msa.checks import is_interpreted
from msa.kernel_choice import (
    BackwardCall,
    Call,
    PageCall,
    WalkCall,
    choose,
    obstacle,
    order_on_hopper,
    runs_on_hopper,
    usual_call,
)

GOOD = Call(
    q_dtype="bfloat16", k_dtype="bfloat16", index_dim=128, groups=4, block_size=128, places=15,
    device="cuda:0", capability=(9, 0), triton="3.6.0", interpreted=False,
)  # fmt: skip
BAD = [
    ({"q_dtype": "float32"}, TypeError,
     "q_idx must have dtype float16 or bfloat16 for kernels='hopper', got float32: "),
    ({"k_dtype": "float32"}, TypeError, "k_idx must have dtype float16 or bfloat16 "),
    ({"k_dtype": "float16"}, TypeError, "k_idx must have dtype bfloat16 as q_idx has "),
    ({"index_dim": 32}, ValueError,
     "q_idx must have Di = 64 or 128 for kernels='hopper', got 32: "),
    ({"block_size": 32}, ValueError,
     "block_size must be 64 or 128 for kernels='hopper', got 32: "),
    ({"readable": False}, ValueError,
     "cache.k_idx_pages must start each token at a multiple of 16 bytes, and each page "),
    ({"groups": 257}, ValueError,
     "q_idx must have at most 256 groups for kernels='hopper', got 257: "),
    ({"places": 65}, ValueError, "top_k must be at most 64 more than sink_blocks + local_blocks "),
    ({"capability": (8, 9)}, ValueError, "q_idx must be on a GPU of compute capability 9.x for "
     "kernels='hopper', got cuda:0 of 8.9: "),
    ({"capability": (10, 0)}, ValueError, "got cuda:0 of 10.0: "),
    ({"capability": None, "device": "cpu"}, ValueError, "got cpu: "),
    ({"interpreted": True}, ValueError,
     "TRITON_INTERPRET must not be set for kernels='hopper', got '1': unset it before Python"),
    ({"triton": "3.5.1"}, ValueError,
     "the version of triton must be 3.6 or newer for kernels='hopper', got 3.5.1: "),
    ({"triton": None}, ValueError, "got None: "),
]  # fmt: skip


WALK = WalkCall(
    q_dtype="bfloat16", k_dtype="bfloat16", v_dtype="bfloat16", dim=128, dim_v=128, group=16,
    block_size=128, loop_order="auto", rows=2**20, blocks=128, scale=0.1, device="cuda:0",
    capability=(9, 0), triton="3.6.0", interpreted=False,
)  # fmt: skip
BAD_WALKS = [
    ({"q_dtype": "float32"}, TypeError, "q must have dtype float16 or bfloat16 for kernels="),
    ({"k_dtype": "float16"}, TypeError, "k must have dtype bfloat16 as q has "),
    ({"v_dtype": "float32"}, TypeError, "v must have dtype float16 or bfloat16 "),
    ({"dim": 64}, ValueError, "q must have D = 128 for kernels='hopper', got 64: "),
    ({"dim_v": 192}, ValueError, "v must have Dv = 128 for kernels='hopper', got 192: "),
    ({"group": 65}, ValueError, "q must have at most 64 heads in a group for kernels="),
    ({"readable": False}, ValueError,
     "cache.k_pages and cache.v_pages must start each token at a multiple of 16 bytes, and "),
    ({"block_size": 64}, ValueError, "block_size must be 128 for kernels='hopper', got 64: "),
    ({"scaled": True} | {f"{x}_dtype": "float16" for x in "qkv"}, TypeError,
     "q must have dtype bfloat16 where pages have 8 bits for kernels='hopper', got float16: "),
    ({"loop_order": "kv_outer"}, ValueError, "loop_order must be 'auto' or 'union' for kernels="),
    *((changes, error, message.replace("q_idx", "q"))
      for changes, error, message in BAD
      if changes.keys() <= {"capability", "device", "interpreted", "triton"}),
]  # fmt: skip

KEYS = BackwardCall(
    half="keys",
    **{f.name: getattr(WALK, f.name) for f in fields(WalkCall) if f.name != "loop_order"},
)
BAD_KEYS = [
    *(bad for bad in BAD_WALKS if "loop_order" not in bad[0]),
    ({"group": 9}, ValueError, "q must have 8, 16, 32 or 64 heads in a group for kernels="),
    ({"group": 4}, ValueError, "q must have 8, 16, 32 or 64 heads in a group for kernels="),
    ({"scale": 1e-30}, ValueError, "softmax_scale must be at least 5.42101e-20 for kernels="),
    ({"scale": 0.0}, ValueError, "softmax_scale must be at least 5.42101e-20 for kernels="),
    ({"scale": -1.0}, ValueError, "softmax_scale must be at least 5.42101e-20 for kernels="),
]  # fmt: skip


PAGES = PageCall(
    q_dtype="bfloat16", k_dtype="float8_e4m3fn", index_dim=128, rows=4, block_size=128,
    device="cuda:0", capability=(9, 0), triton="3.6.0", interpreted=False,
)  # fmt: skip
BAD_PAGES = [
    ({"q_dtype": "float32"}, TypeError, "q_idx must have dtype float16 or bfloat16 for kernels="),
    ({"k_dtype": "float16"}, TypeError, "cache.k_idx_pages must have dtype bfloat16 as q_idx has, "
     "or float8_e4m3fn for kernels='hopper', got float16: "),
    ({"index_dim": 96}, ValueError, "q_idx must have Di = 64 or 128 for kernels='hopper', got 96"),
    ({"block_size": 32}, ValueError, "block_size must be 64 or 128 for kernels='hopper', got 32"),
    ({"rows": 33}, ValueError, "q_idx must have at most 32 new queries times groups for kernels="),
    ({"readable": False}, ValueError, "cache.k_idx_pages must start each token at a multiple of "),
    *(bad for bad in BAD if bad[0].keys() <= {"capability", "device", "interpreted", "triton"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("good", "changes", "error", "message"),
    [(good, *bad)
     for good, every in ((GOOD, BAD), (WALK, BAD_WALKS), (KEYS, BAD_KEYS), (PAGES, BAD_PAGES))
     for bad in every],
)  # fmt: skip
def test_what_hopper_kernels_cannot_take(good, changes, error, message):
    """Named, they are refused; left to the rule, the portable kernels do it."""
    call = replace(good, **changes)
    with pytest.raises(error) as caught:
        choose("hopper", call)
    assert message in str(caught.value)
    assert str(caught.value).endswith("use kernels='portable'")
    assert choose("auto", call) == choose("portable", call) == "portable"


@pytest.mark.parametrize(("changes", "auto"), [
    ({}, "hopper"), ({"blocks": 129}, "portable"), ({"group": 9}, "hopper"),
    ({"blocks": 129, "loop_order": "union"}, "hopper"), ({"group": 8}, "portable"),
    ({"rows": 2**15}, "hopper"), ({"rows": 2**15 - 1, "loop_order": "union"}, "portable"),
    ({"scale": 0.5}, "hopper"), ({"scale": 0.51}, "portable"),
])  # fmt: skip
def test_auto_takes_the_walk_where_it_is_faster(changes, auto):
    """Named, it is taken wherever it runs."""
    call = replace(WALK, **changes)
    assert choose("auto", call) == auto
    assert choose("hopper", call) == "hopper" and choose("portable", call) == "portable"


@pytest.mark.parametrize(("changes", "auto"), [
    ({}, True), ({"group": 8}, True), ({"group": 64}, True), ({"blocks": 8192}, True),
    ({"rows": 16}, True), ({"scale": 0.5}, True), ({"scale": 0.51}, False),
])  # fmt: skip
def test_auto_takes_the_kernel_of_keys_where_it_is_faster(changes, auto):
    call = replace(KEYS, **changes)
    assert runs_on_hopper("auto", call) == auto
    assert runs_on_hopper("hopper", call) and not runs_on_hopper("portable", call)


def test_gradients_of_a_named_walk_run_on_hopper_where_they_can():
    """The name is that of the walk, so nothing is refused here."""
    assert not runs_on_hopper("hopper", replace(KEYS, group=5))


def test_the_halves_of_gradients_are_read_from_the_arguments():
    q, k = (np.ones((300, heads, 128), "f2") for heads in (32, 2))
    chosen = msa.Selection(np.zeros((300, 2, 1), np.int32), msa.Sequences.one(300, 300), 128)
    call = kernel_choice.backward_call_of(q, k, k, chosen, 0.3, "keys")
    assert call.half == "keys" and call.rows == 9600 and call.group == 16 and call.scale == 0.3


def test_every_fact_of_a_walk_counts():
    refuse = {name for changes, *_ in BAD_WALKS for name in changes}
    assert refuse | {"rows", "blocks", "scale"} == {f.name for f in fields(WalkCall)}


def test_short_sequences_are_walked_whole():
    assert order_on_hopper(WALK) == "union"
    assert order_on_hopper(replace(WALK, blocks=129)) == "auto"


@pytest.mark.parametrize(("call", "bad"), [(Call, BAD), (PageCall, BAD_PAGES)])
def test_every_fact_can_refuse(call, bad):
    assert {name for changes, *_ in bad for name in changes} == {f.name for f in fields(call)}


@pytest.mark.parametrize(("changes", "auto"), [
    ({}, "hopper"), ({"k_dtype": "bfloat16"}, "portable"), ({"q_dtype": "float16"}, "hopper"),
    ({"index_dim": 64}, "hopper"), ({"rows": 32}, "hopper"), ({"block_size": 64}, "hopper"),
])  # fmt: skip
def test_auto_takes_the_scores_of_pages_where_they_are_faster(changes, auto):
    call = replace(PAGES, **changes)
    assert choose("auto", call) == auto
    assert choose("hopper", call) == "hopper" and choose("portable", call) == "portable"


def test_a_step_of_decoding_is_read_from_the_arguments():
    pages = torch.ones(3, 64, 128, dtype=torch.float16)
    table, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cache = msa.PagedKV(pages[:, :, None], pages[:, :, None], pages, table, lengths)
    call = kernel_choice.page_call_of(torch.ones(2, 3, 5, 128), cache)
    assert call == PageCall(
        q_dtype="float32", k_dtype="float16", index_dim=128, block_size=64, rows=15,
        device="cpu", capability=None, triton=call.triton, interpreted=is_interpreted(),
    )  # fmt: skip


def test_what_they_take():
    for changes in ({}, {"q_dtype": "float16", "k_dtype": "float16"}, {"index_dim": 64},
                    {"groups": 256}, {"places": 0}, {"places": 64}, {"triton": "3.10.0+git1"},
                    {"block_size": 64}):  # fmt: skip
        call = replace(GOOD, **changes)
        assert obstacle(call) is None
        assert choose("auto", call) == choose("hopper", call) == "hopper"
        assert choose("portable", call) == "portable"


@pytest.mark.parametrize("batched", [False, True])
def test_the_call_is_read_from_the_arguments(batched):
    lead = (3, 7) if batched else (7,)
    q_idx, k_idx = np.ones((*lead, 5, 64), "f2"), np.ones((*lead, 64), "f4")
    call = kernel_choice.call_of(q_idx, k_idx, msa.MSAConfig(64, 20, 3, 2))
    assert call == Call(
        q_dtype="float16", k_dtype="float32", index_dim=64, groups=5, block_size=64, places=15,
        device="the CPU", capability=None, triton=call.triton, interpreted=is_interpreted(),
    )  # fmt: skip
    tensor = torch.ones(*lead, 5, 64)
    assert kernel_choice.call_of(tensor, tensor, msa.MSAConfig()).device == "cpu"


def test_the_rule_names_its_own_numbers():
    told = dict(kernel_choice.rule())
    assert told["triton"] == "3.6 or newer" and told["groups"] == "at most 256"
    assert len(told) == 7
    told = dict(kernel_choice.walk_rule())
    assert told["D and Dv"] == told["block_size"] == "128"
    assert told["query heads of a group"] == "9 to 64" and len(told) == 8
    told = dict(kernel_choice.wide_rule())
    assert told["dtype of q"] == "float16 or bfloat16" and len(told) == 4
    told = dict(kernel_choice.page_rule())
    assert told["new queries times groups"] == "at most 32" and len(told) == 4
    told = dict(kernel_choice.key_rule())
    assert told["query heads of a group"] == "8, 16, 32 or 64" and len(told) == 3
    told = dict(kernel_choice.loss_rule())
    assert told["query heads of a group"] == "8, 16, 32 or 64" and told["D and Di"] == "128"


@pytest.mark.parametrize("batched", [False, True])
def test_a_walk_is_read_from_the_arguments(batched):
    lead = (1, 300) if batched else (300,)
    q, k, v = (np.ones((*lead, heads, dim), "f2") for heads, dim in ((6, 64), (2, 64), (2, 32)))
    chosen = msa.Selection(np.zeros((300, 2, 1), np.int32), msa.Sequences.one(300, 300), 128)
    call = kernel_choice.walk_call_of(q, k, v, chosen, 0.3, "union")
    assert call == WalkCall(
        q_dtype="float16", k_dtype="float16", v_dtype="float16", dim=64, dim_v=32, group=3,
        block_size=128, rows=1800, blocks=3, scale=0.3, loop_order="union",
        device="the CPU", capability=None, triton=call.triton, interpreted=is_interpreted(),
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU may run the hopper kernels")
def test_a_machine_without_a_gpu_uses_portable_kernels():
    assert choose("auto", usual_call()) == "portable"


@pytest.mark.gpu
def test_this_gpu():
    call, found = usual_call(), torch.cuda.get_device_capability()
    assert call.capability == found
    if found[0] == 9 and not kernel_choice.is_older(call.triton or "0.0", (3, 6)):
        assert choose("auto", call) == "hopper"
    else:
        assert choose("auto", call) == "portable"
