"""Hugging Face's MiniMax-M3 with the kernels of a GPU under it."""

from __future__ import annotations

import pytest
import torch

from tests import test_transformers as here

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
