"""Hugging Face's MiniMax-M3 on these kernels gives what it gives on its own eager attention."""

from __future__ import annotations

import copy
import re
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MiniMaxM3VLConfig, StaticCache
from transformers import MiniMaxM3VLTextConfig as TextConfig
from transformers.models.minimax_m3_vl import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
)

from msa.integrations import layouts
from msa.integrations.transformers import Indexer, enable, register
from msa.ops import kernels
from msa.torch_impl import score_blocks

BOUND = 1e-4
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "dense_intermediate_size": 48, "shared_intermediate_size": 16, "index_n_heads": 2,
    "index_head_dim": 12, "index_block_size": 8, "index_topk_blocks": 3, "pad_token_id": 0,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
WAYS = {
    "msa": lambda model: model.set_attn_implementation("msa"),
    "msa_torch": lambda model: model.set_attn_implementation("msa_torch"),
    "msa_reference": lambda model: model.set_attn_implementation("msa_reference"),
    "enabled": enable,
    "enabled, torch": lambda model: enable(model, "msa_torch"),
    "enabled, reference": lambda model: enable(model, "msa_reference"),
}
register()


def text_config(layers="dmm", **options):
    """One letter per layer: dense or MSA."""
    kinds = {
        "num_hidden_layers": len(layers),
        "layer_types": [{"d": "full_attention", "m": "minimax_m3_sparse"}[a] for a in layers],
        "mlp_layer_types": ["dense", *["sparse"] * (len(layers) - 1)],
    }
    return TextConfig(**SMALL | kinds | options)


def make(config=None, seed=0):
    """Random weights everywhere, norms too."""
    torch.manual_seed(seed)
    model = MiniMaxM3VLForCausalLM(config or text_config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.set_attn_implementation("eager")
    return model.eval()


def in_the_way(model, way):
    changed = copy.deepcopy(model)
    WAYS[way](changed)
    return changed


def words(*shape, seed=1):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() <= BOUND


@st.composite
def configs(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    local = draw(st.sampled_from([1, 2]))
    return text_config(
        draw(st.sampled_from(["m", "dm", "mm", "mdm"])),
        num_key_value_heads=groups,
        index_n_heads=draw(st.sampled_from([h for h in (1, 2, 4) if groups % h == 0])),
        num_attention_heads=4 * draw(st.sampled_from([1, 2])),
        index_block_size=draw(st.sampled_from([1, 4, 8, 16])),
        index_topk_blocks=draw(st.integers(local, 4)),
        index_local_blocks=local,
    )


# -- logits ---------------------------------------------------------------------------------------
@settings(max_examples=30)
@given(configs(), st.lists(st.integers(1, 60), min_size=1, max_size=3), st.data())
def test_logits_of_any_configuration(config, lengths, data):
    """A batch padded on the right."""
    model = make(config)
    ids, mask = words(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths)).long()
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    changed = in_the_way(model, data.draw(st.sampled_from(sorted(WAYS))))
    with torch.no_grad():
        wanted, found = (m(ids, attention_mask=mask).logits for m in (model, changed))
    close(found[mask.bool()], wanted[mask.bool()])


@settings(max_examples=15)
@given(configs(), st.integers(2, 60), st.data())
def test_logits_in_chunks(config, n, data):
    """Behind a cache that grows, or one that has room from the start."""
    model, ids = make(config), words(2, n)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3)) | {0, n})
    changed = in_the_way(model, data.draw(st.sampled_from(sorted(WAYS))))
    for static in (False, True):
        cache = DynamicCache(config=config)
        if static:
            cache = StaticCache(config=config, max_cache_len=n + 5)
        with torch.no_grad():
            parts = [
                changed(ids[:, a:b], past_key_values=cache, use_cache=True).logits
                for a, b in pairwise(cuts)
            ]
            close(torch.cat(parts, 1), model(ids).logits)


@pytest.mark.parametrize("way", ["msa", "enabled"])
def test_index_heads_that_serve_several_groups(way):
    model, ids = make(text_config("dm", num_key_value_heads=4)), words(1, 60)
    assert (model.config.index_n_heads, model.config.num_key_value_heads) == (2, 4)
    with torch.no_grad():
        close(in_the_way(model, way)(ids).logits, model(ids).logits)


def test_a_padded_batch_in_chunks():
    model, ids = make(), words(3, 30)
    mask = (torch.arange(30) < torch.tensor([[30], [12], [21]])).long()
    for way in ("msa", "enabled"):
        changed, cache = in_the_way(model, way), DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                changed(
                    ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True
                ).logits
                for a, b in ((0, 16), (16, 20), (20, 30))
            ]
            wanted = model(ids, attention_mask=mask).logits
        close(torch.cat(parts, 1)[mask.bool()], wanted[mask.bool()])


def test_a_plan_is_not_kept_for_other_masks():
    """The same positions, then other lengths in tensors that may lie where the first ones lay."""
    model, ids, positions = make(), words(1, 20), torch.arange(20)[None]
    changed = in_the_way(model, "enabled")
    with torch.no_grad():
        for n in (5, 12, 20, 7):
            mask = (torch.arange(20) < n).long()[None]
            found = changed(ids, attention_mask=mask, position_ids=positions).logits
            close(found[:, :n], model(ids[:, :n]).logits)
        positions[:, 10:] -= 10  # in place: packed now
        found = changed(ids, position_ids=positions, use_cache=False).logits
        close(found[:, 10:], model(ids[:, 10:]).logits)
    with torch.inference_mode():
        close(changed(ids[:, :10]).logits, model(ids[:, :10]).logits)


def test_packed_sequences():
    """transformers' own indexer mixes them; here each is as if it were alone."""
    model, lengths = make(), (20, 1, 33)
    ids = words(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    changed = in_the_way(model, "enabled")
    with torch.no_grad():
        wanted = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        close(changed(ids, position_ids=positions, use_cache=False).logits, wanted)
        assert (model(ids, position_ids=positions, use_cache=False).logits - wanted).abs().max() > 1


def test_kernels_of_triton(monkeypatch):
    """In the interpreter, at a block size that they have."""
    model, ids = make(text_config("dm", index_block_size=16, index_topk_blocks=2)), words(1, 70)
    changed = in_the_way(model, "enabled")
    with torch.no_grad():
        wanted = model(ids).logits
        monkeypatch.setattr(kernels, "backend_of", lambda tensor: "triton")
        close(changed(ids).logits, wanted)


def test_pictures():
    """The vision tower, of the same implementation, is not causal."""
    tower = {
        "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_channels": 3, "patch_size": 2, "temporal_patch_size": 2,
        "spatial_merge_size": 2, "initializer_range": 0.2,
    }  # fmt: skip
    config = MiniMaxM3VLConfig(
        text_config=text_config("dm"), vision_config=tower, image_token_index=55,
        video_token_index=56, projector_hidden_size=28,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    ids = words(1, 40)
    ids[ids >= 55] = 3
    ids[0, 5:9] = 55
    given_ = {
        "pixel_values": torch.randn(16, 24), "image_grid_thw": torch.tensor([[1, 4, 4]])
    }  # fmt: skip
    with torch.no_grad():
        wanted = model(input_ids=ids, **given_).logits
        for way in ("msa", "enabled"):
            close(in_the_way(model, way)(input_ids=ids, **given_).logits, wanted)


# -- generation -----------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
def test_greedy_generations(way):
    model, ids = make(seed=6), words(2, 29)
    changed = in_the_way(model, way)
    options = {"max_new_tokens": 10, "do_sample": False}
    wanted = model.generate(ids, **options)
    assert len(set(wanted[0, 29:].tolist())) > 2
    for extra in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}):
        again = model.generate(ids, **options, **extra) if "num_beams" in extra else wanted
        assert torch.equal(changed.generate(ids, **options, **extra), again), extra


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
            each.activation_checkpointing_enable()
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
    left = ones.clone()
    left[1, :4] = 0
    with pytest.raises(
        ValueError, match=r"ones and then zeros .* got a zero before a one at row 1"
    ):
        changed(ids, attention_mask=left)
    with pytest.raises(ValueError, match=r"padding_side = 'right'"):
        changed.generate(ids, attention_mask=left, max_new_tokens=2)
    right = ones.clone()
    right[1, 15:] = 0
    with pytest.raises(ValueError, match=r"one length at a time"):
        changed.generate(ids, attention_mask=right, max_new_tokens=2)
    with pytest.raises(ValueError, match=re.escape("None or have shape [B, T]")):
        changed(ids, attention_mask=torch.zeros(2, 1, 20, 20))
    with pytest.raises(ValueError, match=r"position_ids must count up .* got 3 in place of 0"):
        changed(ids, position_ids=torch.arange(3, 23)[None], use_cache=False)
    cache = DynamicCache(config=changed.config)
    changed(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=re.escape("attention_mask must have shape [B, 40]")):
        changed(ids, attention_mask=ones, past_key_values=cache, use_cache=True)


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
