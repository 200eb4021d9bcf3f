"""Hugging Face's MiniMax-M3 with MSA: training, what enable() changes, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from msa.integrations import calls, layouts, plan
from msa.integrations.transformers import Indexer, enable, register
from msa.torch_impl import score_blocks
from tests.minimax_models import (
    behind,
    close,
    in_the_way,
    keep_activations_out,
    make,
    text_config,
    words,
)


# -- training -------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["msa", "enabled", "enabled, torch"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(way, checkpointing):
    model, ids = make(), words(2, 40)
    changed = in_the_way(model, way)
    mask = (torch.arange(40) < torch.tensor([[40], [25]])).long()
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for each in (model, changed):
        each.train()
        if checkpointing and each is changed:
            keep_activations_out(each)
        each(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters()})
    wanted, found = gradients
    for name, gradient in wanted.items():
        if gradient is None:
            assert "indexer" in name and found[name] is None, name
        else:
            assert (found[name] - gradient).abs().max() <= 1e-4 * max(1, gradient.abs().max()), name


def test_autocast():
    model, ids = make(), words(1, 40)
    changed = in_the_way(model, "enabled")
    with torch.autocast("cpu", torch.bfloat16):
        loss = changed(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.item() - model(ids, labels=ids).loss.item()) < 0.1
    assert all(p.grad.isfinite().all() for p in changed.parameters() if p.grad is not None)


# -- what enable() is for -------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_nothing_dense_is_built():
    model, n = make(text_config("m")), 512
    largest = {}
    for way in ("eager", "msa", "enabled"):
        changed = model if way == "eager" else in_the_way(model, way)
        with torch.no_grad(), Largest() as seen:
            changed.model(words(1, n))
        largest[way] = seen.numel
    assert largest["eager"] >= 4 * n * n
    assert largest["msa"] >= 2 * n * n  # transformers' indexer scores every pair
    assert largest["enabled"] <= n * 4 * 48


def test_the_way_back():
    model, ids = make(), words(1, 40)
    changed = in_the_way(model, "enabled")
    assert changed.state_dict().keys() == model.state_dict().keys()
    changed.set_attn_implementation("eager")
    assert torch.equal(changed(ids).logits, model(ids).logits)


def test_twice_is_once():
    model, ids = make(), words(1, 40)
    changed = in_the_way(model, "enabled, reference")
    register()
    enable(enable(changed))
    assert changed.config._attn_implementation == "msa"
    assert not any(m._forward_pre_hooks for m in changed.modules())
    with torch.no_grad():
        close(changed(ids).logits, model(ids).logits)


def test_copies_after_a_step_of_training():
    model, ids = in_the_way(make(), "enabled").train(), words(1, 40)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, model(ids).logits)


def test_an_indexer_that_an_adapter_wraps():
    """Found by itself, whatever stands between it and its attention."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **options):
            return self.inner(*args, **options)

    model, ids = make(text_config("m")), words(1, 40)
    changed = copy.deepcopy(model)
    attention = changed.model.layers[0].self_attn
    attention.indexer = Wrapper(attention.indexer)
    enable(changed)
    assert type(attention.indexer.inner) is Indexer
    with torch.no_grad():
        close(changed(ids).logits, model(ids).logits)


def test_their_order_of_blocks_is_what_layouts_say():
    """Own block first, then by falling score (R8 otherwise)."""
    model, ids = make(text_config("m")), words(2, 40)
    given_, indexer = [], model.model.layers[0].self_attn.indexer
    handle = indexer.register_forward_hook(lambda m, args, out: given_.append((args, out)))
    model(ids, use_cache=False)
    handle.remove()
    args, theirs = given_[0]
    selection = layouts.from_transformers(theirs, 8)
    assert theirs.shape[-1] == 3
    indexer.__class__ = Indexer
    indexer.config._attn_implementation = "msa"
    branch = indexer(args[0], *args[1:])
    scores = score_blocks(
        branch.q_idx.flatten(0, 1), branch.k_idx.flatten(0, 1), selection.sequences, branch.config
    )
    assert torch.equal(layouts.to_transformers(selection, scores).long(), theirs)


# -- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["msa", "enabled"])
def test_refused(way):
    changed, ids = in_the_way(make(), way), words(2, 20)
    ones = torch.ones(2, 20).long()
    left, gap, right = ones.clone(), ones.clone(), ones.clone()
    left[1, :4], gap[1, 8:11], right[1, 15:] = 0, 0, 0
    if way == "msa":
        with pytest.raises(ValueError, match=r"got 4 tokens of padding before row 1.* call msa.in"):
            changed(ids, attention_mask=left)
    with pytest.raises(
        ValueError, match=r"one run of ones .* got a zero between ones at row 1, token 8"
    ):
        changed(ids, attention_mask=gap)
    with pytest.raises(ValueError, match=r"padding_side = 'left'"):
        changed.generate(ids, attention_mask=right, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"position_ids must count up .* got 3 in place of 0"):
        positions = torch.stack([torch.arange(20), torch.arange(20) - 1])
        changed(ids, attention_mask=left, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match=re.escape("None or have shape [B, T]")):
        changed(ids, attention_mask=torch.zeros(2, 1, 20, 20))
    with pytest.raises(ValueError, match=r"position_ids must count up .* got 3 in place of 0"):
        changed(ids, position_ids=torch.arange(3, 23)[None], use_cache=False)
    cache = DynamicCache(config=changed.config)
    changed(ids, **behind(changed, cache))
    with pytest.raises(ValueError, match=re.escape("attention_mask must have shape [B, 40]")):
        changed(ids, attention_mask=ones, **behind(changed, cache))


def test_refused_configurations():
    packed = torch.cat([torch.arange(9), torch.arange(11)])[None]
    model = make()
    with pytest.raises(ValueError, match=r"position_ids must not start again .* call msa.integr"):
        in_the_way(model, "msa")(words(1, 20), position_ids=packed, use_cache=False)
    with pytest.raises(
        TypeError, match=r"model must have MiniMaxM3VLAttention layers, got .*Llama"
    ):
        enable(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=64, hidden_size=16, num_attention_heads=2, num_hidden_layers=1
                )
            )
        )
    with pytest.raises(ValueError, match="implementation must be one of msa, msa_torch, msa_ref"):
        enable(model, "sdpa")
    with pytest.raises(
        ValueError, match="index_n_heads must divide num_key_value_heads = 2, got 4"
    ):
        enable(make(text_config("m", index_n_heads=4)))
    with pytest.raises(ValueError, match="local_blocks must be at least 1, got 0"):
        enable(make(text_config("m", index_local_blocks=0)))
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        in_the_way(make(text_config("m", attention_dropout=0.5)), "enabled").train()(words(1, 9))


@pytest.mark.parametrize("strict", [False, True])
def test_graphs_that_are_refused(strict):
    """With what is wanted and why."""
    model, ids = in_the_way(make(text_config("m")), "enabled"), words(1, 20)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"msa reads the mask .* fullgraph"):
        torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)
    torch.compiler.reset()
    with pytest.raises(
        (ValueError, torch._dynamo.exc.Unsupported),
        match="msa reads the mask" if strict else "must hold numbers .* being exported",
    ):
        torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=strict)


def test_a_cache_under_a_name_that_is_not_known():
    """It would be forgotten, and every token would be the first one."""

    def forward(self, hidden_states, memory=None): ...

    with pytest.raises(TypeError, match=r"forward must take its cache as cache or past_key_values"):
        calls.read_call(forward, (), {"hidden_states": None})


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_plans_hold_the_ones_of_a_mask(batch, n_k, data):
    """By hand: packed queries and keys are the tokens of the rows that have a query."""
    spans = [sorted(data.draw(st.tuples(*[st.integers(0, n_k)] * 2))) for _ in range(batch)]
    mask = torch.zeros(batch, n_k, dtype=torch.bool)
    for row, (first, end) in enumerate(spans):
        mask[row, first:end] = True
    n_q = data.draw(st.integers(1, n_k))
    cached = n_k - n_q
    made = plan.make_plan(torch.arange(cached, n_k)[None], mask, batch, n_k)
    slots = torch.arange(batch * n_k).view(batch, n_k)
    live = mask & mask[:, cached:].any(1, keepdim=True)
    assert made.pack_keys(slots).tolist() == slots[live].tolist()
    assert (
        made.pack_queries(slots[:, cached:]).tolist()
        == slots[:, cached:][mask[:, cached:]].tolist()
    )
    assert [b - a for a, b in pairwise(made.cu_seqlens_k)] == live.sum(1).tolist()
    assert [b - a for a, b in pairwise(made.cu_seqlens_q)] == mask[:, cached:].sum(1).tolist()
