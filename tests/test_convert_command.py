"""`msa convert`: the command, its file of index projections, and models that are refused."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from msa.integrations import convert as c
from msa.integrations import convert_run
from msa.integrations.index_file import load_index, save_index
from tests.converted_models import ALL, CONFIG, ROOT, close, converted, make, words
from tests.minimax_models import behind


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
    """q_proj.weight for query: index files, and weights of a whole model."""
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
    """A second index beside the first would run, and be trained, as well."""
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
