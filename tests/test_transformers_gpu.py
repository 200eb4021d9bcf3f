"""Hugging Face's MiniMax-M3 with the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch

from tests import minimax_models as here

pytestmark = pytest.mark.gpu
WAYS = [way for way in here.WAYS if "reference" not in way]


@pytest.mark.parametrize("way", WAYS)
def test_logits_and_generations(way):
    model = here.make(here.text_config("dmm", index_block_size=16), seed=6).cuda()
    changed, ids = here.in_the_way(model, way), here.words(2, 90).cuda()
    with torch.no_grad():
        here.close(changed(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 10, "do_sample": False}
    wanted = model.generate(ids, **options)
    # transformers compiles the model for a static cache, and torch.empty is filled in tests
    static = {"cache_implementation": "static", "disable_compile": "torch" in way}
    for extra in ({}, static, {"use_cache": False}):
        assert torch.equal(changed.generate(ids, **options, **extra), wanted), extra


@pytest.mark.parametrize("extra", here.CACHES)
def test_generations_padded_on_the_left(extra):
    """Each text gets the same tokens as alone; transformers compiles for a static cache."""
    model = here.make(here.text_config("dmm", index_block_size=16), seed=6).cuda()
    texts = [here.words(n, seed=n).cuda() for n in (70, 11, 40)]
    ids, mask = (x.cuda() for x in here.padded_rows(texts, [0, 59, 30], 70))
    options, beams = here.GENERATED, {"num_beams": here.CACHES[extra].get("num_beams", 1)}
    wanted = [model.generate(t[None], **options, **beams)[0, len(t) :] for t in texts]
    changed = here.in_the_way(model, "enabled")
    found = changed.generate(ids, attention_mask=mask, **options | here.CACHES[extra])[:, 70:]
    assert torch.equal(found, torch.stack(wanted))


def test_gradients_of_hugging_face():
    model = here.make(here.text_config("dmm", index_block_size=16)).cuda()
    changed, ids = here.in_the_way(model, "enabled"), here.words(2, 60).cuda()
    for each in (model, changed):
        each.train()(ids, labels=ids, use_cache=False).loss.backward()
    found = dict(changed.named_parameters())
    for name, wanted in model.named_parameters():
        if wanted.grad is not None:
            off = (found[name].grad - wanted.grad).abs().max()
            assert off <= 1e-4 * wanted.grad.abs().max().clamp(min=1), name
