"""Hugging Face's MiniMax-M3 on these kernels gives what it gives on its own eager attention."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

from transformers import (
    DynamicCache,
    MiniMaxM3VLConfig,
    StaticCache,
)
from transformers.models.minimax_m3_vl import (
    MiniMaxM3SparseForConditionalGeneration,
)

from msa.ops import kernels
from tests.minimax_models import (
    BOUND,
    CACHES,
    GENERATED,
    PADDED,
    WAYS,
    behind,
    close,
    configs,
    in_the_way,
    make,
    padded_rows,
    text_config,
    words,
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
    """R3: each text has the logits that it has alone, whole or in chunks behind every cache."""
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
    """What is departed from: on its own attention the same rows have other logits."""
    model, text = make(text_config("m")), words(60)
    ids, mask = padded_rows([text], [3], 63)
    with torch.no_grad():
        wanted, theirs = model(text[None]).logits[0], model(ids, attention_mask=mask).logits[0, 3:]
        found = in_the_way(model, "enabled")(ids, attention_mask=mask).logits[0, 3:]
    close(found, wanted)
    assert (theirs - wanted).abs().max() > 100 * BOUND


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


@pytest.mark.parametrize(
    ("way", "extra"), [*(("enabled", extra) for extra in CACHES), ("enabled, torch", "dynamic")]
)
def test_generations_padded_on_the_left(way, extra):
    """Each text gets the tokens that it gets alone."""
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
    """Drafts of another model, and of the prompt itself; what is rejected leaves the cache."""
    model, text = make(seed=6), words(20)
    ids, mask = padded_rows([text], [left], 20 + left)
    wanted = model.generate(text[None], **GENERATED)[0, 20:]
    changed, draft = in_the_way(model, "enabled"), make(text_config("d"), seed=3)
    for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        found = changed.generate(ids, attention_mask=mask, **GENERATED, **extra)[0, 20 + left :]
        assert torch.equal(found, wanted), extra


@pytest.mark.parametrize("way", ["msa", "enabled"])
def test_compiled(way):
    """As generate() does by itself for a static cache on a GPU: nothing of msa is in the graphs."""
    model, ids = make(text_config("m")), words(1, 29)
    torch.compiler.reset()
    compiled = torch.compile(in_the_way(model, way).model, backend="eager")
    with torch.no_grad():
        close(compiled(ids, use_cache=False)[0], model.model(ids, use_cache=False)[0])
