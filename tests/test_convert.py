"""Decoders with grouped-query attention, converted to MSA: what stays, what is trained."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import msa
from msa.integrations import convert as c
from msa.integrations import convert_run
from msa.integrations.index_file import load_index, save_index
from msa.recall import CHUNK, measure
from tests.test_transformers import CACHES, GENERATED, behind, keep_activations_out, padded_rows

BOUND = 1e-4
ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {"sliding_window": None}
}  # fmt: skip
CONFIG = msa.MSAConfig(block_size=8, top_k=2)
ALL = msa.MSAConfig(block_size=8, top_k=8)  # more than any text here has
WAYS = "msa", "msa_torch", "msa_reference"


def make(family="Llama", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_attn_implementation("eager")
    return model.eval()


def converted(model, config=CONFIG, **options):
    torch.manual_seed(1)
    return c.convert(copy.deepcopy(model), config, **options).eval()


def words(*shape, seed=1):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() <= BOUND


# -- conversion -----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_all_blocks_give_the_logits_of_before(family, way):
    """With all blocks the logits are dense (R11), with right padding too; else they differ."""
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
    """A cache does not change the tokens. With all blocks they are those of the dense model."""
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
    """Padding changes neither the logits of a text nor the loss of the index."""
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
    """A score depends on the distance alone, so both numbers of a pair turn together."""
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
    """In the warm-up, the outputs and gradients of the model are those of the dense model."""
    model, ids = make(), words(1, 40)
    new = converted(model, implementation=way)
    c.set_phase(new, "warm_up")
    close(new(ids).logits, model(ids).logits)
    c.index_loss(new).backward()
    assert all((p.grad is not None) == (".indexer." in n) for n, p in new.named_parameters())


@pytest.mark.parametrize("phase", ["warm_up", "train"])
@pytest.mark.parametrize("way", ["msa", "msa_torch"])
def test_the_teacher_has_the_scale_of_the_model(way, phase):
    """The loss is 0 if the model attends to all tokens equally and the index does too."""
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
    """The index loss has gradients in the projections only, the model's loss in all others."""
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
    """Copies and pickles contain no tensor of a graph."""
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
    """A process group with one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("phase", ["train", "warm_up"])
@pytest.mark.parametrize("unused", [True, False])
def test_several_processes(one_process, unused, phase):
    """DistributedDataParallel waits for the gradients of the index, on which no output depends."""
    new, ids = converted(make()).train(), words(2, 40)
    alone = copy.deepcopy(new)
    for model in (DistributedDataParallel(new, find_unused_parameters=unused), alone):
        c.set_phase(model, phase)
        for _ in range(2):  # the second step fails if the first one did not finish
            model.zero_grad()
            (model(ids, labels=ids, use_cache=False).loss + c.index_loss(model)).backward()
    for found, wanted in zip(new.parameters(), alone.parameters()):
        assert torch.equal(found.grad, wanted.grad)


def test_shares_of_heads_are_refused(one_process):
    """Tensor parallelism is refused before and after the conversion."""
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


# -- what other libraries do with the model -------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_layers(dtype):
    """The index has the dtype that the model computes in."""
    model = make().bfloat16()
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        layer.self_attn.q_proj.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    index = c.indexes(converted(model))[1]
    assert {p.dtype for p in index.parameters()} == {torch.bfloat16}


def test_layers_without_numbers():
    with pytest.raises(ValueError, match=r"layer 1 on the meta device: load or materialise"):
        c.convert(make().to("meta"))
    narrow = make()
    for p in narrow.parameters():
        p.requires_grad_(False)
        p.data = p.data.to(torch.int8)
    with pytest.raises(ValueError, match=r"a weight in one of torch.float16, .* got torch.int8"):
        c.convert(narrow)


def test_adapters_leave_the_index_alone():
    """LoRA finds layers by nn.Linear and by the ends of their names."""
    model = make()
    new = converted(model)
    for kind in (nn.Linear, nn.Embedding):
        places = [
            {n for n, m in each.named_modules() if isinstance(m, kind)} for each in (model, new)
        ]
        assert places[0] == places[1]
    ends = {name.split(".")[-2] for name in model.state_dict()}
    added = new.state_dict().keys() - model.state_dict().keys()
    assert not ends & {part for name in added for part in name.split("indexer.")[1].split(".")}


class Wrapper(nn.Module):
    """A module like peft's modules_to_save: it trains a copy and forwards all attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.copy = inner, copy.deepcopy(inner)

    def forward(self, *args, **options):
        return self.copy(*args, **options)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.copy, name)


def test_an_index_in_a_wrapper(tmp_path):
    """The copy in use is found, trained and saved."""
    new, ids = converted(make()), words(1, 40)
    wanted = new(ids).logits
    for layer in (1, 2):
        attention = new.model.layers[layer].self_attn
        attention.indexer = Wrapper(attention.indexer)
    assert torch.equal(new(ids).logits, wanted)
    copies = [new.model.layers[layer].self_attn.indexer.copy for layer in (1, 2)]
    assert list(c.indexes(new).values()) == copies
    c.set_phase(new, "train")
    new(ids, use_cache=False)
    c.index_loss(new).backward()
    assert all(p.grad is not None for index in copies for p in index.parameters())
    save_index(new, tmp_path / "index")


def test_adapters_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids, wanted = words(1, 40), ["indexer"]
    for target in (["q_proj", "v_proj"], "all-linear"):
        config = peft.LoraConfig(target_modules=target, r=2, modules_to_save=wanted)
        new = peft.get_peft_model(converted(make()), config).train()
        assert not [n for n, _ in new.named_parameters() if "indexer" in n and "lora" in n]
        c.set_phase(new, "train")
        (new(input_ids=ids, labels=ids, use_cache=False).loss + c.index_loss(new)).backward()
        trained = {n for n, p in new.named_parameters() if p.grad is not None and "indexer" in n}
        assert len(trained) == 8 and all("modules_to_save" in name for name in trained)


# -- recall ---------------------------------------------------------------------------------------
def test_recall_of_the_best_and_of_chance():
    """The recall equals the formula, over several chunks of queries and two sequences."""
    torch.manual_seed(0)
    borders = (0, 30, 30 + CHUNK + 9), (0, 50, 50 + CHUNK + 9)
    sequences, n_q, n_k = msa.Sequences(*borders), borders[0][-1], borders[1][-1]
    q, k = torch.randn(n_q, 4, 8), torch.randn(n_k, 2, 8)
    q_idx, k_idx = torch.randn(n_q, 2, 4), torch.randn(n_k, 4)
    config = msa.MSAConfig(block_size=8, top_k=3)
    names = {"cu_seqlens_q": borders[0], "cu_seqlens_k": borders[1], "config": config}
    selection = msa.select(q_idx, k_idx, **names)
    found, score, total, hits, wanted = [], 0.0, 0.0, 0, 0
    best = selection.indices.clone()
    for queries, keys in sequences.spans():
        n, m = queries.stop - queries.start, keys.stop - keys.start
        for i in range(n):
            p = m - n + i
            for r in range(2):
                logits = q[queries][i, 2 * r : 2 * r + 2] @ k[keys][: p + 1, r].T * 0.5
                mean = logits.double().softmax(-1).mean(0)
                mass = [float(part.sum()) for part in mean.split(8)]
                own = len(mass) - 1
                if len(mass) <= 3:
                    continue
                others = sorted(range(own), key=lambda b: -mass[b])[:2]
                best[queries][i, r] = torch.tensor(sorted([*others, own]))
                chosen = selection.indices[queries][i, r].tolist()
                hits, wanted = hits + len(set(chosen) & set(others)), wanted + 2
                score += sum(mass[b] for b in chosen)
                total += sum(mass[b] for b in (*others, own))
                found.append(p)
    recall = measure(q, k, selection, 0.5)
    assert recall.queries == len(found)
    assert recall.blocks == pytest.approx(hits / wanted)
    assert recall.score == pytest.approx(score / total)
    assert recall.blocks < 0.9
    oracle = measure(q, k, msa.Selection(best, sequences, 8), 0.5)
    assert oracle.blocks == 1.0
    assert oracle.score == pytest.approx(1.0)


def test_recall_where_there_is_no_choice():
    new = converted(make(), ALL)
    recall = c.measure_recall(new, words(1, 40))
    assert {(r.blocks, r.score, r.queries) for r in recall.values()} == {(1.0, 1.0, 0)}


# -- the command and its file ---------------------------------------------------------------------
def test_the_command(tmp_path):
    make("Qwen2", vocab_size=256).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(words(400).tolist()))
    done = subprocess.run(
        [sys.executable, "-m", "msa.cli", "convert", "--model", "model", "--text", "text",
         "--tokens", "bytes",
         "--warmup", "12", "--length", "96", "--block-size", "8", "--top-k", "2",
         "--learning-rate", "0.01", "--layers", "0", "2", "--save", "index"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"KL ([\d.]+), mean of 2 layers", done.stdout)]
    assert losses[-1] < losses[0]
    rows = re.findall(r"^ +(\d) +[\d.]+% +[\d.]+% +[\d.]+% +[\d.]+% *$", done.stdout, re.M)
    assert rows == ["0", "2"]
    fresh = make("Qwen2", vocab_size=256)
    loaded = load_index(copy.deepcopy(fresh), tmp_path / "index").eval()
    assert sorted(c.indexes(loaded)) == [0, 2]
    ids = words(1, 60)
    assert not torch.equal(loaded(ids).logits, fresh(ids).logits)
    again = load_index(copy.deepcopy(fresh), tmp_path / "index").eval()
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_files_with_the_names_of_before(tmp_path):
    """Renames query to q_proj.weight, in index files and in the weights of a whole model."""
    sparse, fresh, ids = converted(make()), make(), words(1, 40)
    save_index(sparse, tmp_path / "index")
    with safe_open(tmp_path / "index", "pt") as file:
        made = file.metadata()
    old = {new: old for old, new in c.IndexProjections.OLD_NAMES.items()}
    weights = {
        f"{layer}.{old[name]}": weight
        for (layer, _, name), weight in (
            (n.partition("."), w) for n, w in load_file(tmp_path / "index").items()
        )
    }
    assert len(weights) == 8
    save_file(weights, tmp_path / "old", made)
    with torch.no_grad():
        wanted = sparse(ids).logits
        assert torch.equal(load_index(fresh, tmp_path / "old")(ids).logits, wanted)
        whole = {
            f"{start}.indexer.{old[end]}" if "indexer" in name else name: weight
            for name, weight in sparse.state_dict().items()
            for start, _, end in [name.partition(".indexer.")]
        }
        other = c.convert(make(), CONFIG)
        other.load_state_dict(whole)
        assert torch.equal(other(ids).logits, wanted)


def test_files_that_do_not_fit(tmp_path):
    sparse = converted(make())
    save_index(sparse, tmp_path / "index")
    wide = make(hidden_size=64)
    with pytest.raises(
        ValueError, match=r"hold (key|query) of layer 1 as floating numbers in shape"
    ):
        load_index(wide, tmp_path / "index")
    assert not c.indexes(wide)
    weights = load_file(tmp_path / "index")
    with safe_open(tmp_path / "index", "pt") as file:
        made = file.metadata()
    save_file({n: w.int() if "key" in n else w for n, w in weights.items()}, tmp_path / "i", made)
    with pytest.raises(ValueError, match=r"floating numbers in shape .* got torch.int32"):
        load_index(make(), tmp_path / "i")
    save_file({n: w for n, w in weights.items() if n != "2.key"}, tmp_path / "less", made)
    with pytest.raises(ValueError, match=r"hold query, key, .* of layer 2, got"):
        load_index(make(), tmp_path / "less")
    c.indexes(sparse)[2].config = ALL
    with pytest.raises(ValueError, match=r"config must be the same in all layers of one file"):
        save_index(sparse, tmp_path / "two")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"path must be a file written by save_index, got .*other"):
        load_index(make(), tmp_path / "other")
    with pytest.raises(TypeError, match="model must have converted layers"):
        save_index(make(), tmp_path / "none")


def test_texts_that_are_too_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("model")
    (tmp_path / "text").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match=r"tokens must be 'model' .* got 'bytes' for one of 61"):
        convert_run.run(convert_run.ConvertOptions("model", tmp_path / "text", "bytes"))
    make(vocab_size=256).save_pretrained("model")
    with pytest.raises(ValueError, match=r"text must have at least 12 tokens: .* got 10"):
        convert_run.run(convert_run.ConvertOptions("model", tmp_path / "text", "bytes", 1, 6))


# -- what is refused ------------------------------------------------------------------------------
def test_twice(tmp_path):
    """A second index would also run and be trained."""
    new = converted(make())
    save_index(new, tmp_path / "index")
    hooks = [len(layer.self_attn._forward_pre_hooks) for layer in new.model.layers]
    wanted = new(words(1, 40)).logits
    for again in (
        lambda: c.convert(new, CONFIG),
        lambda: c.convert(new, CONFIG, layers=[0]),
        lambda: load_index(new, tmp_path / "index"),
    ):
        with pytest.raises(ValueError, match=r"index branch in layers \[1, 2\]: .*remove_index"):
            again()
    assert hooks == [len(layer.self_attn._forward_pre_hooks) for layer in new.model.layers]
    assert torch.equal(new(words(1, 40)).logits, wanted)
    close(c.remove_index(new)(words(1, 40)).logits, make()(words(1, 40)).logits)
    assert new.state_dict().keys() == make().state_dict().keys()
    with pytest.raises(TypeError, match="model must have converted layers"):
        c.remove_index(new)
    torch.manual_seed(1)
    again = c.convert(new, CONFIG, layers=[2])
    assert sorted(c.indexes(again)) == [2]
    assert torch.equal(
        again(words(1, 40)).logits, converted(make(), layers=[2])(words(1, 40)).logits
    )
    assert max(len(layer.self_attn._forward_pre_hooks) for layer in new.model.layers) == 1


def test_several_decoders():
    with pytest.raises(ValueError, match=r"must be one decoder, got .* numbers \[0, 1, 2\]"):
        c.convert(nn.ModuleList([make(), make()]))


def test_refused():
    with pytest.raises(TypeError, match=r"model must have LlamaAttention, .* got torch.nn"):
        c.convert(torch.nn.Linear(2, 2))
    for layers in ([], [3], [1, 1]):
        with pytest.raises(ValueError, match=r"layers must name some of \[0, 1, 2\], each once"):
            c.convert(make(), layers=layers)
    with pytest.raises(ValueError, match="index_dim must be even and at least 2, got 5"):
        c.convert(make(), index_dim=5)
    with pytest.raises(ValueError, match=r"model.config.sliding_window must be None, got 4096"):
        c.convert(make("Mistral", sliding_window=4096))
    with pytest.raises(ValueError, match="implementation must be one of msa"):
        c.convert(make(), implementation="eager")
    new = converted(make())
    with pytest.raises(ValueError, match="phase must be one of sparse, train, warm_up, measure"):
        c.set_phase(new, "dense")
    with pytest.raises(TypeError, match="model must have converted layers"):
        c.set_phase(make(), "sparse")
    with pytest.raises(TypeError, match="had a forward pass in phase train or warm_up"):
        c.index_loss(new)
    cache = transformers.DynamicCache(config=make("Mistral", sliding_window=16).config)
    with pytest.raises(TypeError, match=r"past_key_values must have dynamic or static layers, .*S"):
        new(words(1, 9), **behind(new, cache))
