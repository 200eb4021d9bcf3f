"""Generation with a cache against generation without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_model
import torch
from test_model import IMAGE, TOWER

import msa
from msa.model import Model, Pictures, cut
from msa.model.generate import Sampling, generate, stream

SMALL = replace(test_model.SMALL, init_std=0.5)
NEW = 7


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model(SMALL, backend="torch").eval()


def prompts():
    """Two prompts with pictures of two and of one token; the first picture ends a chunk."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, IMAGE, (n,), generator=generator) for n in (19, 1, 26, 4)]
    texts[0][7:9], texts[2][[3, 20]] = IMAGE, IMAGE
    pixels = torch.rand(2, 1, 1, 4, 8, generator=generator)
    wide, two = cut(pixels[:1], TOWER), cut(pixels[:, :, :, :, :4].contiguous(), TOWER)
    return texts, [wide, None, two, None]


@torch.no_grad()
def without_cache(model, prompt, images, sampling, row):
    draw, text = sampling.draws(row + 1)[row], prompt
    for _ in range(NEW):
        logits = model(text, images=images).logits[-1]
        logits[IMAGE] = -torch.inf
        token = sampling.choose(logits, draw)
        text = torch.cat([text, torch.tensor([token])])
        if token == sampling.stop:
            break
    return text[len(prompt) :].tolist()


@pytest.mark.parametrize("chunk", [8, 100])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, seed=3), Sampling(2.0, 4, stop=9)])
def test_a_cache_changes_no_token(model, sampling, chunk):
    texts, images = prompts()
    wanted = [
        without_cache(model, text, seen, sampling, row)
        for row, (text, seen) in enumerate(zip(texts, images))
    ]
    found = generate(model, texts, NEW, images=images, sampling=sampling, chunk=chunk)
    assert found == wanted
    assert len({tuple(answer) for answer in found}) > 1


def test_texts_end_by_themselves_and_the_others_go_on(model):
    texts, images = prompts()
    whole = generate(model, texts, NEW, images=images, sampling=Sampling(2.0))
    stop = next(answer[2] for answer in whole if answer[2] not in answer[:2])
    ended = generate(model, texts, NEW, images=images, sampling=Sampling(2.0, stop=stop))
    lengths = set()
    for short, long in zip(ended, whole):
        wanted = long[: long.index(stop) + 1] if stop in long else long
        assert short == wanted
        lengths.add(len(short))
    assert len(lengths) > 1


def test_tokens_stream_as_they_come(model, monkeypatch):
    calls = []
    monkeypatch.setattr(Model, "_embed", lambda *a, true=Model._embed: calls.append(0) or true(*a))
    steps = stream(model, [torch.tensor([1, 2, 3])], 5)
    seen = []
    for step in steps:
        seen.append((len(step), len(calls)))
    assert seen == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]


def test_chance_depends_on_the_seed_alone(model):
    texts, images = prompts()
    first, again, other = (
        generate(model, texts, NEW, images=images, sampling=Sampling(3.0, seed=s))
        for s in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, r"prompts must hold at least one text, .* got lengths \[\]"),
        ({"prompts": [torch.tensor([1]), torch.tensor([]).long()]}, r"got lengths \[1, 0\]"),
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"images": []}, "images must have an entry for each of the 4 prompts, got 0"),
        ({"images": [None] * 4}, r"tokens must have 0 image tokens, .* got 4"),
    ],
)
def test_bad_input_is_named(model, change, message):
    texts, images = prompts()
    given = {"prompts": texts, "new_tokens": 2, "images": images} | change
    with pytest.raises(ValueError, match=message):
        generate(model, given.pop("prompts"), given.pop("new_tokens"), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and positive, got -1.0"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    ],
)
def test_bad_sampling_is_named(change, message, as_users_run_it):
    with pytest.raises((TypeError, ValueError), match=message):
        Sampling(**change)


def test_more_pictures_than_places_are_named(model):
    texts, images = prompts()
    more = Pictures(images[0].patches.repeat(2, 1), list(images[0].grids) * 2)
    with pytest.raises(ValueError, match=r"tokens must have 4 image tokens, .* got 2"):
        generate(model, texts, 2, images=[more, *images[1:]])


@torch.no_grad()
def test_a_cache_of_half_precision_serves_a_model_under_autocast(model):
    texts, images = prompts()
    wanted = model(texts[3]).logits[-1]
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(model, texts, NEW, images=images, dtype=torch.bfloat16)
    assert [len(answer) for answer in found] == [NEW] * 4
    assert found[3][0] in wanted[:IMAGE].topk(3).indices


def test_decoding_runs_on_the_models_backend(model, monkeypatch):
    other = Model(SMALL, backend="reference").eval()
    other.load_state_dict(model.state_dict())
    decode, backends = msa.decode, []

    def note(*args, **options):
        backends.append(options["backend"])
        return decode(*args, **options)

    monkeypatch.setattr(msa, "decode", note)
    texts, images = prompts()
    found = generate(other, texts, NEW, images=images)
    assert set(backends) == {"reference"}
    assert found == generate(model, texts, NEW, images=images)
    assert set(backends) == {"reference", "torch"}
