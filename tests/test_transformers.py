"""Hugging Face's MiniMax-M3 gives the same results here as on its own eager attention."""

from __future__ import annotations

import copy
import inspect
import pickle
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

from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM3VLConfig,
    StaticCache,
)
from transformers import MiniMaxM3VLTextConfig as TextConfig
from transformers.models.minimax_m3_vl import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
)

from msa.integrations import calls, layouts, plan
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
PADDED = [way for way in WAYS if way.startswith("enabled")]
GENERATED = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
CACHES = {
    "dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False},
    "beams": {"num_beams": 2}, "static beams": {"num_beams": 3, "cache_implementation": "static"},
}  # fmt: skip
register()


def behind(model, cache):
    """The name of the cache argument in this release of transformers."""
    taken = inspect.signature(type(model).forward).parameters
    return {next(name for name in calls.CACHES if name in taken): cache, "use_cache": True}


def keep_activations_out(model, **options):
    """The option for checkpointing in this release of transformers."""
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    next(getattr(model, name) for name in names if hasattr(model, name))(options or None)


def padded_rows(texts, left, width):
    """Texts as rows with zeros before each: ids and mask [B, width]."""
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (text, start) in enumerate(zip(texts, left)):
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return ids, mask


def text_config(layers="dmm", **options):
    """One letter per layer: dense or MSA."""
    kinds = {
        "num_hidden_layers": len(layers),
        "layer_types": [{"d": "full_attention", "m": "minimax_m3_sparse"}[a] for a in layers],
        "mlp_layer_types": ["dense", *["sparse"] * (len(layers) - 1)],
    }
    return TextConfig(**SMALL | kinds | options)


def make(config=None, seed=0):
    """Random weights, also in the norms."""
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
    """With a cache that grows, or one of fixed size."""
    model, ids = make(config), words(2, n)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3)) | {0, n})
    changed = in_the_way(model, data.draw(st.sampled_from(sorted(WAYS))))
    for static in (False, True):
        cache = DynamicCache(config=config)
        if static:
            cache = StaticCache(config=config, max_cache_len=n + 5)
        with torch.no_grad():
            parts = [
                changed(ids[:, a:b], **behind(changed, cache)).logits for a, b in pairwise(cuts)
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
                changed(ids[:, a:b], attention_mask=mask[:, :b], **behind(changed, cache)).logits
                for a, b in ((0, 16), (16, 20), (20, 30))
            ]
            wanted = model(ids, attention_mask=mask).logits
        close(torch.cat(parts, 1)[mask.bool()], wanted[mask.bool()])


@settings(max_examples=20)
@given(configs(), st.lists(st.integers(1, 30), min_size=1, max_size=3), st.data())
def test_padding_on_either_side_shifts_no_block(config, lengths, data):
    """R3: each text has the same logits as alone, whole or in chunks with each kind of cache."""
    model, texts = make(config), [words(n, seed=n) for n in lengths]
    left = [data.draw(st.integers(0, 20)) for _ in texts]
    longest = max(start + n for start, n in zip(left, lengths))
    width = longest + data.draw(st.integers(0, 5))
    ids, mask = padded_rows(texts, left, width)
    cuts = data.draw(st.sets(st.integers(1, width), max_size=3)) | {0, width}
    changed = in_the_way(model, data.draw(st.sampled_from(PADDED)))
    from_text = data.draw(st.booleans())  # positions of generate(), or those of the row
    positions = (mask.cumsum(1) - 1).clamp(min=0) if from_text else torch.arange(width)[None]
    kind = data.draw(st.sampled_from(["none", "dynamic", "static"]))
    cuts = [0, width] if kind == "none" else sorted(cuts)
    cache = {
        "none": lambda: None, "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=width + 3),
    }[kind]()  # fmt: skip
    options = {"use_cache": False} if cache is None else behind(changed, cache)
    with torch.no_grad():
        parts = [
            changed(
                ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], **options
            ).logits
            for a, b in pairwise(cuts)
        ]
        found = torch.cat(parts, 1)[mask.bool()]
        close(found, torch.cat([model(text[None]).logits[0] for text in texts]))


def test_padding_on_the_left_shifts_the_blocks_of_transformers():
    """With the attention of transformers, the same padded rows have other logits."""
    model, text = make(text_config("m")), words(60)
    ids, mask = padded_rows([text], [3], 63)
    with torch.no_grad():
        wanted, theirs = model(text[None]).logits[0], model(ids, attention_mask=mask).logits[0, 3:]
        found = in_the_way(model, "enabled")(ids, attention_mask=mask).logits[0, 3:]
    close(found, wanted)
    assert (theirs - wanted).abs().max() > 100 * BOUND


def test_a_plan_is_not_kept_for_other_masks():
    """Each mask gets its own plan, even if it has the memory of an earlier one."""
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
    """Each packed text is as if alone; the indexer of transformers would mix them."""
    model, lengths = make(), (20, 1, 33)
    ids = words(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    changed = in_the_way(model, "enabled")
    with torch.no_grad():
        wanted = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        close(changed(ids, position_ids=positions, use_cache=False).logits, wanted)
        assert (model(ids, position_ids=positions, use_cache=False).logits - wanted).abs().max() > 1


def test_kernels_of_triton(monkeypatch):
    """The kernels in the interpreter, with a block size that they support."""
    model, ids = make(text_config("dm", index_block_size=16, index_topk_blocks=2)), words(1, 70)
    changed = in_the_way(model, "enabled")
    with torch.no_grad():
        wanted = model(ids).logits
        monkeypatch.setattr(kernels, "backend_of", lambda tensor: "triton")
        close(changed(ids).logits, wanted)


def test_pictures():
    """The vision tower, which uses the same implementation, is not causal."""
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


@pytest.mark.parametrize(
    ("way", "extra"), [*(("enabled", extra) for extra in CACHES), ("enabled, torch", "dynamic")]
)
def test_generations_padded_on_the_left(way, extra):
    """Each text gets the same new tokens as alone."""
    model, texts = make(seed=6), [words(n, seed=n) for n in (29, 11, 20)]
    ids, mask = padded_rows(texts, [0, 18, 9], 29)
    beams = {"num_beams": CACHES[extra].get("num_beams", 1)}
    wanted = [model.generate(t[None], **GENERATED, **beams)[0, len(t) :] for t in texts]
    assert len({tuple(tokens.tolist()) for tokens in wanted}) == 3
    options = GENERATED | CACHES[extra]
    found = in_the_way(model, way).generate(ids, attention_mask=mask, **options)[:, 29:]
    assert torch.equal(found, torch.stack(wanted))


@pytest.mark.parametrize("left", [0, 5])
def test_assisted_generations(left):
    """Drafts of another model, and from the prompt; rejected tokens are removed from the cache."""
    model, text = make(seed=6), words(20)
    ids, mask = padded_rows([text], [left], 20 + left)
    wanted = model.generate(text[None], **GENERATED)[0, 20:]
    changed, draft = in_the_way(model, "enabled"), make(text_config("d"), seed=3)
    for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        found = changed.generate(ids, attention_mask=mask, **GENERATED, **extra)[0, 20 + left :]
        assert torch.equal(found, wanted), extra


@pytest.mark.parametrize("way", ["msa", "enabled"])
def test_compiled(way):
    """Compile as generate() does for a static cache on a GPU: no code of msa is in the graphs."""
    model, ids = make(text_config("m")), words(1, 29)
    torch.compiler.reset()
    compiled = torch.compile(in_the_way(model, way).model, backend="eager")
    with torch.no_grad():
        close(compiled(ids, use_cache=False)[0], model.model(ids, use_cache=False)[0])


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


# -- the purpose of enable() ----------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor."""

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
    """An indexer is found even if a wrapper is between it and its attention."""

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
    """The message says what is wanted and why."""
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
    """The cache would be ignored, and every token would be read as the first one."""

    def forward(self, hidden_states, memory=None): ...

    with pytest.raises(TypeError, match=r"forward must take its cache as cache or past_key_values"):
        calls.read_call(forward, (), {"hidden_states": None})


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_plans_hold_the_ones_of_a_mask(batch, n_k, data):
    """Checked by hand: packed queries and keys are the tokens of the rows with a query."""
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
