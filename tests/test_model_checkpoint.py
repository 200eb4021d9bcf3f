"""Saving and loading models, and the messages for bad files."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from msa.demo.demo import DemoOptions
from msa.demo.options import load_model
from msa.model import Model
from msa.model.checkpoint import CONFIG, WEIGHTS, load, load_weights, save
from msa.training.presets import PRESETS

TINY = PRESETS["tiny"].model


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Model(TINY, backend="torch")
    model.routers()[0].bias.add_(torch.randn(TINY.experts))
    save(model, tmp_path)
    return model, tmp_path


@torch.no_grad()
def test_a_model_comes_back_whole(saved):
    model, folder = saved
    other = load(folder, backend="torch")
    assert other.config == TINY
    assert not other.training
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    text = torch.arange(90)
    assert torch.equal(model.eval()(text).logits, other(text).logits)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_missing_and_unexpected_weights_are_named(saved):
    _, folder = saved
    weights = load_file(folder / WEIGHTS)
    gone = weights.pop("layers.1.attention.index.q.weight")
    save_file(weights | {"sink": gone}, folder / WEIGHTS)
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors must have the model's weights, got missing: "
        r"layers\.1\.attention\.index\.q\.weight; unexpected: sink",
    ):
        load(folder)
    weights["layers.1.attention.index.q.weight"] = gone[1:]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"index\.q\.weight of shape \[64, 128\], got \[63, 128\]"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64])
def test_weights_are_floating_point_numbers(saved, dtype):
    _, folder = saved
    weights = load_file(folder / WEIGHTS)
    weights["embed.weight"] = weights["embed.weight"].to(dtype)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=f"must have embed.weight in a floating point dtype, got {dtype}"
    ):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_read(saved, dtype):
    model, folder = saved
    save_file({n: w.to(dtype) for n, w in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    found = load(folder).embed.weight
    assert found.dtype == torch.float32
    assert torch.equal(found, model.embed.weight.to(dtype).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_asked(saved, value):
    """A model with NaN can be loaded, but neither asked nor trained further."""
    _, folder = saved
    weights = load_file(folder / WEIGHTS)
    weights["norm.weight"][3] = value
    save_file(weights, folder / WEIGHTS)
    load(folder)
    message = r"model\.safetensors must have finite weights, got NaN or infinity in norm\.weight"
    with pytest.raises(ValueError, match=message):
        load_model(DemoOptions(model=str(folder)))
    with pytest.raises(ValueError, match=message):
        load_weights(Model(TINY), folder)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 10**9}, r"embed\.weight of shape \[1000000000, 128\], got \[257, 128\]"),
        ({"vocab_size": 2**62}, "must have the sizes of .*, got far larger ones"),
        ({"vocab_size": 10**30}, "must have the sizes of .*, got far larger ones"),
        ({"experts": 10**8}, r"of shape \[100000000, "),
        ({"mixed_tokens": 10**9}, r"of shape \["),
        ({"attention": ["msa"] * 4, "mlp": ["dense"] + ["moe"] * 3}, r"missing: layers\.3\."),
    ],
)
def test_sizes_are_compared_before_memory_is_taken(
    saved, sizes, message, as_users_run_it, monkeypatch
):  # fmt: skip
    _, folder = saved
    known = torch.utils._device._device_constructors() | {torch._C._VariableFunctions.empty}
    monkeypatch.setattr(torch.utils._device, "_device_constructors", lambda: known)  # see conftest
    (folder / CONFIG).write_text(json.dumps(TINY.to_dict() | sizes))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_layers_of_vision_are_counted_first(saved):
    _, folder = saved
    sizes = TINY.to_dict()
    sizes["vision"]["layers"] = 10**9
    (folder / CONFIG).write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match=r"weights for each of vision\.layers = 1000000000"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [(CONFIG, r"must be the configuration of a model, got no readable file: Is a directory"),
     (WEIGHTS, r"must be a safetensors file, got no readable file: ")],
)  # fmt: skip
def test_a_folder_is_no_file(saved, name, message):
    _, folder = saved
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} {message}"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_no_model(saved, kept):
    _, folder = saved
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file: "):
        load(folder)


def test_foreign_and_absent_files_are_no_model(saved):
    _, folder = saved
    torch.save({"weight": torch.ones(3)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="must be a safetensors file, got no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json must be the configuration of a model: Expecting value"),
        ("[1]", "config must be a dict, got list"),
        ('{"architectures": ["X"]}', r"missing: attention, .* 6 more; unexpected: architectures"),
        (
            json.dumps(TINY.to_dict() | {"heads": 3}),
            "heads must be a multiple of groups = 2, got 3",
        ),
        (json.dumps(TINY.to_dict() | {"attention": "msa"}), "attention must be a list, got str"),
    ],
)
def test_a_foreign_configuration_is_no_model(saved, text, message, as_users_run_it):
    _, folder = saved
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(
        ValueError, match=r"config\.json must be the configuration of a model, got no"
    ):
        load(folder)


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    model, folder = saved
    before = (folder / WEIGHTS).read_bytes()

    def cut_short(file):
        if os.fstat(file).st_size > 100_000:
            raise KeyboardInterrupt

    monkeypatch.setattr("msa.files.os.fsync", cut_short)
    with torch.no_grad():
        model.embed.weight.add_(1)
    with pytest.raises(KeyboardInterrupt):
        save(model, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_half_as_large(saved):
    """Parameters are rounded to bfloat16 once; the biases of routers are not rounded."""
    model, folder = saved
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("router.bias")]
    for bias in biases:
        bias.fill_(1.001)  # which bfloat16 does not hold
    save(model, folder / "half", half=True)
    sizes = [(place / WEIGHTS).stat().st_size for place in (folder / "half", folder)]
    assert sizes[0] < 0.6 * sizes[1]
    other = load(folder / "half").state_dict()
    parameters = dict(model.named_parameters())
    for name, weight in model.state_dict().items():
        wanted = weight.bfloat16().float() if name in parameters else weight
        assert torch.equal(other[name], wanted), name
    assert len(biases) == 2
    for bias in biases:
        bias.zero_()
