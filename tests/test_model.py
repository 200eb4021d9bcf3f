"""Properties of a model with any weights: order, packing, backends, pictures, gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_imports import imported, inside_msa

import msa
from msa.model import IGNORE, Cache, Model, ModelConfig, VisionConfig, cut
from msa.model.experts import Experts

IMAGE = 40
TOWER = VisionConfig(
    width=24, layers=1, heads=2, mlp_width=32, projector_width=20, channels=1, patch=2, frames=1
)
SMALL = ModelConfig(
    vocab_size=41, width=24, attention=("dense", "msa", "msa"), mlp=("dense", "moe", "moe"),
    heads=4, groups=2, head_dim=8, rotary_dim=4, index_dim=6, mlp_width=32, experts=4,
    experts_per_token=2, expert_width=16, shared_width=16, rope_theta=1e4, init_std=0.2,
    msa=msa.MSAConfig(block_size=4, top_k=3), vision=TOWER, image_token=IMAGE, mixed_tokens=3,
)  # fmt: skip
CLOSE = {"rtol": 0, "atol": 2e-5}


def test_the_model_knows_the_public_interface_and_only_the_command_line_knows_the_model():
    package = Path(msa.__file__).parent
    public = {
        "checks",
        "cli",
        "config",
        "dispatch",
        "files",
        "ir",
        "model",
        "moved",
        "parallel",
        "recall",
    }
    public |= set(msa.__all__)
    for path in package.rglob("*.py"):
        known = inside_msa(imported(path))
        room = path.relative_to(package).parts[0]
        if room == "model":
            assert known <= public, path
        elif room not in ("cli.py", "training", "ablations", "demo"):
            assert "model" not in known, path


def make(config=SMALL, **options):
    torch.manual_seed(0)
    model = Model(config, **({"backend": "torch"} | options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "mixing" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def words(n, seed=1):
    return torch.randint(0, IMAGE, (n,), generator=torch.Generator().manual_seed(seed))


def pixels(n=2, seed=3):
    return torch.rand(n, 1, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit():
    model, text = make(), words(40)
    before = model(text).logits
    for place in (39, 23, 8):
        other = text.clone()
        other[place] = (other[place] + 1) % IMAGE
        after = model(other).logits
        assert torch.equal(after[:place], before[:place])
        assert not torch.equal(after[place], before[place])


@torch.no_grad()
def test_texts_of_a_batch_do_not_see_each_other():
    """An empty sequence changes nothing either."""
    model, texts = make(), [words(n, n) for n in (17, 0, 30, 1, 5)]
    borders = torch.tensor([0, *map(len, texts)]).cumsum(0)
    packed = model(torch.cat(texts), borders).logits.split([*map(len, texts)])
    for text, logits in zip(texts, packed):
        if len(text):
            torch.testing.assert_close(logits, model(text).logits, **CLOSE)


@torch.no_grad()
def test_backends_agree():
    text, found = words(50), {}
    for backend in ("reference", "torch"):
        found[backend] = make(backend=backend)(text).logits
    torch.testing.assert_close(found["reference"], found["torch"], **CLOSE)


@torch.no_grad()
def test_mode_dense_reads_everything():
    """The result equals MSA with room for all blocks, and differs from MSA with fewer."""
    text = words(50)
    rich = replace(SMALL, msa=replace(SMALL.msa, top_k=13))
    dense = make()(text, mode="dense").logits
    torch.testing.assert_close(make(rich)(text).logits, dense, **CLOSE)
    assert (make()(text).logits - dense).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_a_cache_changes_nothing(mode):
    """Ragged chunks, then single tokens; a slot is used twice; slots may have any order."""
    model, texts = make(), [words(33, 5), words(21, 6)]
    wanted = [model(text, mode=mode).logits for text in texts]
    cache = Cache(SMALL, batch=3, max_tokens=40)
    model(words(9), cache=cache, slots=[2])
    cache.free(2)
    found, slots = [[], []], [2, 0]
    for stops in ((10, 3), (25, 13), (26, 14), (27, 15), (33, 21)):
        starts = [cache.lengths[slot] for slot in slots]
        new = [text[a:b] for text, a, b in zip(texts, starts, stops)]
        sizes = [len(part) for part in new]
        logits = model(
            torch.cat(new), [0, sizes[0], sum(sizes)], cache=cache, slots=slots, mode=mode
        ).logits
        for parts, part in zip(found, logits.split(sizes)):
            parts.append(part)
    assert cache.lengths == [21, 0, 33]
    for parts, logits in zip(found, wanted):
        torch.testing.assert_close(torch.cat(parts), logits, **CLOSE)


def test_experts_are_the_sum_that_they_stand_for():
    torch.manual_seed(0)
    experts = Experts(SMALL).double()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(7, SMALL.width, dtype=torch.float64)
    ids, weights = experts.router(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))
    found = experts(x)
    for t in range(7):
        want = experts.shared(x[t : t + 1])[0]
        for e, weight in zip(ids[t], weights[t]):
            gate, up = (experts.gate_up[e] @ x[t]).chunk(2)
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            want = want + 2 * weight * experts.down[e] @ (
                gate * (1.702 * gate).sigmoid() * (up + 1)
            )
        torch.testing.assert_close(found[t], want)


def test_the_bias_evens_the_load_and_counts_for_the_choice_alone():
    torch.manual_seed(0)
    router = Experts(SMALL).router
    torch.nn.init.normal_(router.weight)
    x = torch.randn(400, SMALL.width) + 1.0
    ids, weights = router(x)
    assert router.load.sum() == 800
    first = router.load.clone()
    scores = (x @ router.weight.T).sigmoid().gather(-1, ids)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    for _ in range(200):
        router.balance(0.01)
        ids, weights = router(x)
    assert router.load.max() < 1.1 * router.load.float().mean() < first.max() / 1.2
    scores = (x @ router.weight.T).sigmoid().gather(-1, ids)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    router.eval()
    router.load.zero_()
    router(x)
    assert router.load.sum() == 0


def test_the_alignment_loss_reaches_the_index_alone():
    """The language loss reaches all other weights: the tower, the routers and the mixing too."""
    model, text = make(), words(40)
    text[[5, 30]] = IMAGE
    given = {"images": cut(pixels(), TOWER)}
    targets = text.roll(-1)
    index = {name for name, _ in model.named_parameters() if ".index." in name}
    assert len(index) == 8
    for mode in ("sparse", "dense"):
        for part, reached in (
            ("kl", index),
            ("language", set(dict(model.named_parameters())) - index),
        ):
            model.zero_grad(set_to_none=True)
            getattr(model.losses(text, targets, mode=mode, **given), part).backward()
            found = {n for n, w in model.named_parameters() if w.grad is not None and w.grad.any()}
            assert found == reached, (mode, part, found ^ reached)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_the_alignment_loss_is_the_mean_over_msa_layers(mode):
    model, seen = make(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, found: seen.append(found[1]))
    kl = model(words(40), mode=mode, align=True).kl
    assert seen[0] is None
    assert seen[1] > 0
    assert seen[1] != seen[2]
    torch.testing.assert_close(kl, (seen[1] + seen[2]) / 2)
    assert make(replace(SMALL, attention=("dense",) * 3))(words(40), align=True).kl is None


def test_losses_count_what_they_are_told_to():
    model, text = make(), words(20)
    targets = torch.full_like(text, IGNORE)
    targets[[4, 9]] = torch.tensor([1, 2])
    logits = model(text).logits.log_softmax(-1)
    want = -(logits[4, 1] + logits[9, 2]) / 2
    torch.testing.assert_close(model.losses(text, targets).language, want)
    weights = torch.zeros(20)
    weights[4] = 0.1
    torch.testing.assert_close(model.losses(text, targets, weights=weights).language, -logits[4, 1])


@torch.no_grad()
def test_pictures_stand_where_their_tokens_stand():
    model, text = make(), words(30)
    text[[5, 20]] = IMAGE
    both = cut(pixels(), TOWER)
    seen = model.vision(both)
    assert seen.shape == (2, SMALL.width)
    torch.testing.assert_close(model.vision(cut(pixels()[1:], TOWER))[0], seen[1], **CLOSE)
    logits = model(text, images=both).logits
    other = model(text, images=cut(pixels().flip(0), TOWER)).logits
    assert torch.equal(logits[:5], other[:5])
    assert not torch.equal(logits[5], other[5])


@torch.no_grad()
def test_the_alignment_loss_of_the_last_token_counts_cached_keys():
    model, text = make(), words(30)
    cache = Cache(SMALL, batch=1, max_tokens=30)
    model(text[:29], cache=cache)
    last = model(text[29:], cache=cache, align=True)
    torch.testing.assert_close(last.logits[0], model(text).logits[29], **CLOSE)
    assert last.kl > 0


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0], r"slots must name a different one for each of the 2 sequences, got \[0\]"),
        ([1, 1], r"slots must name a different one for each of the 2 sequences, got \[1, 1\]"),
        ([0, -1], "slots must be at least 0, got -1"),
        ([0, 3], "slots must be from 0 to 2, got 3"),
    ],
)
def test_slots_that_are_not_there_are_named(slots, message):
    with pytest.raises(ValueError, match=message):
        make()(words(6), [0, 2, 6], cache=Cache(SMALL, batch=3, max_tokens=9), slots=slots)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 3}, r"tokens must have 3 image tokens, .* got 2"),
        ({"n": 1}, r"tokens must have 1 image tokens, .* got 2"),
        ({"images": None}, r"tokens must have 0 image tokens, .* got 2"),
        ({"videos": cut(pixels(), TOWER)}, "videos must be None in a model whose config has no"),
        ({"tokens": torch.tensor([1, 41])}, r"tokens must be from 0 to 40, got 1 to 41"),
        ({"tokens": torch.zeros(2, 2).long()}, r"tokens must have shape \[T\], got \[2, 2\]"),
        ({"tokens": torch.zeros(2)}, "tokens must hold integers, got torch.float32"),
        ({"cu_seqlens": [0, 7]}, "cu_seqlens must end with T = 30, got 7"),
        ({"cu_seqlens": [0]}, "cu_seqlens must have at least two borders, got one"),
        ({"mode": "warm"}, "mode must be sparse or dense, got 'warm'"),
    ],
)
def test_bad_input_is_named(change, message, as_users_run_it):
    text = words(30)
    text[[5, 20]] = IMAGE
    given = {"tokens": text, "images": cut(pixels(change.pop("n", 2)), TOWER)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        make()(given.pop("tokens"), given.pop("cu_seqlens", None), **given)


def test_patches_that_do_not_fit_the_grids_are_named():
    pictures = cut(pixels(), TOWER)
    for wrong, message in (
        (
            replace(pictures, grids=[(1, 2, 2)]),
            r"shape \[patches, values\] = \[4, 4\], got \[8, 4\]",
        ),
        (replace(pictures, grids=[(1, 1, 8)]), r"multiples of merge = 2, got \(1, 1, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make().vision(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads must be a multiple of groups = 2, got 3"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"rotary_dim": 3}, "rotary_dim must be even and at most 6, .* got 3"),
        ({"rotary_dim": 8}, "rotary_dim must be even and at most 6, .* got 8"),
        ({"experts_per_token": 5}, "experts_per_token must be at most experts = 4, got 5"),
        ({"mlp": ("dense",)}, "mlp must have an entry for each of the 3 layers .* got 1"),
        ({"attention": ("dense", "none", "msa")}, "attention must be a tuple of dense or msa"),
        ({"image_token": 41}, "image_token must be below vocab_size = 41, got 41"),
        ({"image_token": None}, "image_token must be given in a model with vision, got None"),
        ({"video_token": IMAGE}, "video_token must differ from image_token, got 40"),
        ({"vision": None}, "image_token must be None in a model without vision, got 40"),
        ({"norm_eps": 0.0}, "norm_eps must be finite and positive, got 0.0"),
        ({"tied_head": 1}, "tied_head must be True or False, got 1"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_named(change, message, as_users_run_it):
    with pytest.raises((TypeError, ValueError), match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 25}, "vision.width must be a multiple of vision.heads = 2, got 25"),
        ({"heads": 6}, "vision.width must be at least 6 per head, .* got 4"),
        ({"patch": 0}, "vision.patch must be at least 1, got 0"),
    ],
)
def test_sizes_of_a_tower_that_cannot_be_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TOWER, **change)


def test_a_configuration_survives_json():
    values = SMALL.to_dict()
    assert ModelConfig.from_dict(values) == SMALL
    with pytest.raises(ValueError, match="got missing: width; unexpected: depth, size"):
        ModelConfig.from_dict(
            {n: v for n, v in values.items() if n != "width"} | {"depth": 1, "size": 2}
        )
    with pytest.raises(ValueError, match=r"config.msa must have the fields of MSAConfig"):
        ModelConfig.from_dict(values | {"msa": {"blocks": 3}})
