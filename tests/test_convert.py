"""Decoders with grouped-query attention, turned into MSA: what stays, what is trained."""

from __future__ import annotations

import copy
import pickle
import sys
from itertools import pairwise

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from msa.integrations import convert as c
from tests.converted_models import ALL, FAMILIES, WAYS, close, converted, make, words
from tests.minimax_models import CACHES, GENERATED, behind, keep_activations_out, padded_rows


# -- conversion -----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_all_blocks_give_the_logits_of_before(family, way):
    """R11, with right padding too; and with fewer blocks something else."""
    model, ids = make(family), words(2, 60)
    mask = (torch.arange(60) < torch.tensor([[60], [33]])).long()
    options = {"layers": [0, 2], "implementation": way, "index_dim": 6}
    new, sparse = converted(model, ALL, **options), converted(model, **options)
    with torch.no_grad():
        wanted, found, other = (
            m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, new, sparse)
        )
    close(found, wanted)
    assert (other - wanted).abs().max() > 0.1
    for name, weight in model.state_dict().items():
        assert torch.equal(new.state_dict()[name], weight), name
    added = new.state_dict().keys() - model.state_dict().keys()
    assert {name.split(".self_attn.")[0] for name in added} == {"model.layers.0", "model.layers.2"}
    assert all(".self_attn.indexer." in name for name in added)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_every_cache(family):
    """Sparse: a cache changes nothing. All blocks: what the model wrote before."""
    model, ids = make(family), words(2, 29)
    options = {"max_new_tokens": 8, "do_sample": False}
    whole = converted(model, ALL)
    assert torch.equal(whole.generate(ids, **options), model.generate(ids, **options))
    sparse = converted(model)
    wanted = sparse.generate(ids, **options, use_cache=False)
    assert not torch.equal(wanted, model.generate(ids, **options))
    for extra in ({}, {"cache_implementation": "static"}):
        assert torch.equal(sparse.generate(ids, **options, **extra), wanted), extra


@pytest.mark.parametrize("extra", CACHES)
def test_generations_padded_on_the_left(extra):
    """Each text gets the tokens that it gets alone (R3)."""
    sparse, texts = converted(make()), [words(n, seed=n) for n in (29, 11, 20)]
    ids, mask = padded_rows(texts, [0, 18, 9], 29)
    beams = {"num_beams": CACHES[extra].get("num_beams", 1)}
    wanted = [sparse.generate(t[None], **GENERATED, **beams)[0, len(t) :] for t in texts]
    found = sparse.generate(ids, attention_mask=mask, **GENERATED | CACHES[extra])[:, 29:]
    assert torch.equal(found, torch.stack(wanted))


def test_assisted_generation_padded_on_the_left():
    sparse, text = converted(make()), words(20)
    ids, mask = padded_rows([text], [5], 25)
    wanted = sparse.generate(text[None], **GENERATED)[0, 20:]
    for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make()}):
        found = sparse.generate(ids, attention_mask=mask, **GENERATED, **extra)[0, 25:]
        assert torch.equal(found, wanted), extra


@pytest.mark.parametrize("way", WAYS)
def test_padding_on_either_side(way):
    """Logits of each text, and the loss of the index: padding is no token of either."""
    sparse, texts = converted(make(), implementation=way), [words(30), words(17, seed=2)]
    ids, mask = padded_rows(texts, [2, 9], 34)
    with torch.no_grad():
        wanted = torch.cat([sparse(text[None]).logits[0] for text in texts])
        close(sparse(ids, attention_mask=mask).logits[mask.bool()], wanted)
        if way == "msa_reference":
            return
        c.set_phase(sparse, "train")
        sparse(ids, attention_mask=mask)
        padded, alone = c.index_loss(sparse), []
        for text in texts:
            sparse(text[None])
            alone.append(len(text) * c.index_loss(sparse))
    assert abs(padded - sum(alone) / 47) < 1e-5


def test_chunks():
    sparse, ids = converted(make()), words(1, 50)
    caches = DynamicCache(), StaticCache(config=sparse.config, max_cache_len=60)
    with torch.no_grad():
        wanted = sparse(ids).logits
        for cache in caches:
            parts = [
                sparse(ids[:, a:b], **behind(sparse, cache)).logits
                for a, b in pairwise((0, 20, 21, 50))
            ]
            close(torch.cat(parts, 1), wanted)
    assert [type(cache.layers[1]).__name__ for cache in caches] == [
        "MiniMaxM3VLSparseCacheLayer", "MiniMaxM3VLSparseStaticCacheLayer"
    ]  # fmt: skip


def test_packed_sequences_and_the_way_back():
    model, lengths = make(), (20, 31)
    sparse, ids = converted(model), words(1, 51)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        parts = [sparse(part).logits for part in ids.split(lengths, 1)]
        close(sparse(ids, position_ids=positions, use_cache=False).logits, torch.cat(parts, 1))
        sparse.set_attn_implementation("eager")
        cache = DynamicCache()
        assert torch.equal(sparse(ids, **behind(sparse, cache)).logits, model(ids).logits)
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}


def test_rotary_frequencies_of_narrower_heads():
    """A score must depend on the distance alone: pairs turn together."""
    index = converted(make(), index_dim=6).model.layers[1].self_attn.indexer
    rotary = make().model.rotary_emb
    hidden = words(1, 1, 32).float()
    scores = []
    for start in (0, 5, 31):
        cos, sin = rotary(hidden, torch.tensor([[start, start + 7]]))
        q_idx, k_idx = index(hidden.expand(1, 2, 32), cos, sin)
        scores.append((q_idx[0, 1] * k_idx[0, 0]).sum(-1))
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
    cos, sin = rotary(hidden, torch.tensor([[0, 8]]))
    q_idx, k_idx = index(hidden.expand(1, 2, 32), cos, sin)
    assert not torch.allclose(scores[0], (q_idx[0, 1] * k_idx[0, 0]).sum(-1))


# -- training -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_warm_up_trains_the_projections_alone(family):
    new = converted(make(family))
    before = copy.deepcopy(new.state_dict())
    ids = words(2, 48)
    recalls = [c.measure_recall(new, ids)]
    losses = [sum(loss.values()) for loss in c.warm_up(new, [ids] * 40, learning_rate=1e-2)]
    recalls.append(c.measure_recall(new, ids))
    assert losses[-1] < 0.7 * losses[0]
    assert sorted(recalls[0]) == [1, 2]
    first, last = (sum(r.score for r in recall.values()) for recall in recalls)
    assert last > first
    for name, weight in new.state_dict().items():
        assert torch.equal(weight, before[name]) != (".indexer." in name), name
    assert all(p.requires_grad for p in new.parameters())
    assert {index.phase for index in c.indexes(new).values()} == {"sparse"}


@pytest.mark.parametrize("way", ["msa", "msa_torch"])
def test_the_loss_of_warm_up_is_that_of_dense_attention(way):
    """While it warms up the model is what it was, and so is its gradient."""
    model, ids = make(), words(1, 40)
    new = converted(model, implementation=way)
    c.set_phase(new, "warm_up")
    close(new(ids).logits, model(ids).logits)
    c.index_loss(new).backward()
    assert all((p.grad is not None) == (".indexer." in n) for n, p in new.named_parameters())


@pytest.mark.parametrize("phase", ["warm_up", "train"])
@pytest.mark.parametrize("way", ["msa", "msa_torch"])
def test_the_teacher_has_the_scale_of_the_model(way, phase):
    """A model that looks everywhere alike is no news to an index that does so too."""
    new, ids, losses = converted(make(), implementation=way), words(1, 40), []
    c.set_phase(new, phase)
    for index in c.indexes(new).values():
        torch.nn.init.zeros_(index.query)
    for scale in (0.25, 1e-9):
        for layer in new.model.layers:
            layer.self_attn.scaling = scale
        new(ids)
        losses.append(c.index_loss(new).item())
    assert losses[0] > 1e-3
    assert abs(losses[1]) < 1e-6


@pytest.mark.parametrize("way", ["msa", "msa_torch"])
def test_sparse_continuation(way):
    """The model's own loss reaches everything but the projections, theirs reaches them alone."""
    new, ids = converted(make(), implementation=way).train(), words(2, 40)
    c.set_phase(new, "train")
    loss = new(ids, labels=ids, use_cache=False).loss
    kl = c.index_loss(new)
    names, parameters = zip(*new.named_parameters())
    for part, own in ((loss, False), (kl, True)):
        grads = torch.autograd.grad(part, parameters, allow_unused=True)
        for name, grad in zip(names, grads):
            assert (grad is not None) == ((".indexer." in name) == own), name
    c.set_phase(new, "sparse")
    again = new(ids, labels=ids, use_cache=False).loss
    assert torch.equal(loss, again)
    assert not c.index_losses(new)


@pytest.mark.parametrize("phase", ["train", "warm_up"])
def test_checkpointing_gives_the_same_gradients_or_says_why_not(phase):
    ids, gradients = words(1, 40), []
    for reentrant in (None, False, True):
        new = converted(make()).train()
        c.set_phase(new, phase)
        if reentrant is not None:
            keep_activations_out(new, use_reentrant=reentrant)
        loss = new(ids, labels=ids, use_cache=False).loss
        if reentrant:
            with pytest.raises(
                ValueError, match=r"got none in layers \[1, 2\].*use_reentrant=False"
            ):
                c.index_loss(new)
            with torch.no_grad():
                assert c.index_loss(new) > 0
            return
        (loss + c.index_loss(new)).backward()
        gradients.append([p.grad for p in new.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_copies_after_a_step_of_training():
    """No tensor of a graph goes with them."""
    new, ids = converted(make()).train(), words(1, 40)
    c.set_phase(new, "train")
    (new(ids, labels=ids, use_cache=False).loss + c.index_loss(new)).backward()
    wanted, kl = new(ids, use_cache=False).logits, c.index_loss(new)
    copies = copy.deepcopy(new), AveragedModel(new).module, pickle.loads(pickle.dumps(new))
    for copied in copies:
        assert not c.index_losses(copied)
        assert torch.equal(copied(ids, use_cache=False).logits, wanted)
        assert torch.equal(c.index_loss(copied), kl)


@pytest.fixture
def one_process(tmp_path):
    """A group of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("phase", ["train", "warm_up"])
@pytest.mark.parametrize("unused", [True, False])
def test_several_processes(one_process, unused, phase):
    """DistributedDataParallel waits for the gradients of the index, which no output depends on."""
    new, ids = converted(make()).train(), words(2, 40)
    alone = copy.deepcopy(new)
    for model in (DistributedDataParallel(new, find_unused_parameters=unused), alone):
        c.set_phase(model, phase)
        for _ in range(2):  # the second one finds what the first left unfinished
            model.zero_grad()
            (model(ids, labels=ids, use_cache=False).loss + c.index_loss(model)).backward()
    for found, wanted in zip(new.parameters(), alone.parameters()):
        assert torch.equal(found.grad, wanted.grad)


def test_shares_of_heads_are_refused(one_process):
    """Tensor parallelism, before the conversion and behind it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def part(model):
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        plan = {"model.layers.1.self_attn.k_proj": ColwiseParallel()}
        return parallelize_module(model, mesh, plan)

    with pytest.raises(ValueError, match=r"whole weights, got the DTensor .*tp_plan"):
        c.convert(part(make()))
    new = converted(make())
    index = c.indexes(new)[1]  # as where another process has the other key head
    index.groups, index.query.data = 1, index.query.data[:16]
    with pytest.raises(ValueError, match=r"one head for each of the 2 key heads .* tensor paral"):
        new(words(1, 20))
