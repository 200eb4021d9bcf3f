"""Converted decoders that other libraries quantise, wrap and adapt; the recall of the index."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

from torch import nn

import msa
from msa.integrations import convert as c
from msa.integrations.index_file import save_index
from msa.recall import CHUNK, measure
from tests.converted_models import ALL, converted, make, words


# -- what others do with the model ----------------------------------------------------------------
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
    """LoRA goes by nn.Linear and by the ends of their names."""
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
    """As peft's modules_to_save: a copy that is trained, and everything asked of it handed on."""

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
    """The copy in use is the one that is found, trained and saved."""
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
    """Against the plain formula, over several chunks of queries and two sequences."""
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
