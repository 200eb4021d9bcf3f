"""The model's twins: each differs from MSA in one thing, by an option of `msa train`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_model_train
import torch
import tyro
from test_model import make, words
from test_model_train import MICRO, metrics

import msa
from msa import cli
from msa.model import checkpoint
from msa.model.attention import Mode
from msa.model.dense import attend_densely
from msa.training import train
from msa.training.convert_dense import convert
from msa.training.options import TrainOptions, read_preset
from msa.training.presets import PRESETS
from msa.training.trainer import Trainer

micro = test_model_train.micro


# -- options --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "model", "schedule"),
    [
        ("", {}, {}),
        ("--attention msa", {}, {}),
        ("--attention dense", {"attention": ("dense",) * 2}, {"warm_up": 1.0}),
        (
            "--attention window",
            {"msa": msa.MSAConfig(16, 5, local_blocks=5)},
            {"warm_up": 0.0, "kl": 0.0},
        ),
        (
            "--attention window --sink-blocks 1 --top-k 3 --warm-up 0.5 --kl 2",
            {"msa": msa.MSAConfig(16, 3, sink_blocks=1, local_blocks=2)},
            {"warm_up": 0.5, "kl": 2.0},
        ),
        ("--index-gradient --kl 10", {"index_gradient": True}, {"kl": 10.0}),
        ("--warm-up 0", {}, {"warm_up": 0.0}),
        (
            "--block-size 8 --top-k 10 --sink-blocks 1 --local-blocks 2",
            {"msa": msa.MSAConfig(8, 10, sink_blocks=1, local_blocks=2)},
            {},
        ),
    ],
)
def test_options_reach_the_model_and_the_schedule(line, model, schedule, micro):
    options = tyro.cli(TrainOptions, args=line.split())
    wanted = replace(
        MICRO, model=replace(MICRO.model, **model), schedule=replace(MICRO.schedule, **schedule)
    )
    assert read_preset(options) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "lean"}, "attention must be msa, dense or window, got 'lean'"),
        ({"attention": "window", "local_blocks": 2}, "local_blocks must be None where .* got 2"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"local_blocks": 6}, "top_k"),
        ({"index_gradient": 1}, "index_gradient must be True or False, got 1 of type int"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, as_users_run_it):
    with pytest.raises((TypeError, ValueError), match=message):
        train.train(TrainOptions(out=tmp_path, **options))


def test_a_run_goes_on_as_the_twin_that_it_was(tmp_path):
    train.train(TrainOptions(out=tmp_path, attention="window", steps=1))
    for other in ({}, {"attention": "dense"}, {"attention": "window", "index_gradient": True}):
        with pytest.raises(ValueError, match=r"got another (model|schedule)"):
            train.train(TrainOptions(out=tmp_path, steps=1, **other))
    assert train.train(TrainOptions(out=tmp_path, attention="window", steps=1)) == tmp_path


def test_a_run_that_is_told_to_stop_can_go_on(tmp_path):
    whole = train.train(TrainOptions(out=tmp_path / "whole", steps=4))
    part = TrainOptions(out=tmp_path / "part", steps=4)
    train.train(part, lambda line: line["step"] == 1)
    assert [line["step"] for line in metrics(part.out)] == [0, 1]
    train.train(part)
    assert metrics(part.out) == metrics(whole)


# -- what the twins are ---------------------------------------------------------------------------
def changed_by(model, place, mode: Mode = "sparse"):
    """The tokens of a text of 60 on which the logits of the last token depend, in one layer."""
    text = words(60)
    other = text.clone()
    other[place] = (other[place] + 1) % 40
    with torch.no_grad():
        return not torch.equal(*(model(t, mode=mode).logits[-1] for t in (text, other)))


@pytest.mark.parametrize("sink", [0, 1])
def test_the_window_reads_the_last_blocks_and_no_others(sink):
    """Blocks of 4, k = 3: the last token, 59, sees 48 to 59, or 0 to 3 and 52 to 59."""
    options = TrainOptions(attention="window", block_size=4, top_k=3, sink_blocks=sink)
    config = replace(
        test_model_train.MICRO.model, vocab_size=41, attention=("msa",), mlp=("dense",),
        msa=read_preset(options).model.msa, mixed_tokens=1, vision=None, image_token=None,
    )  # fmt: skip
    model = make(config)
    seen = [place for place in range(60) if changed_by(model, place)]
    assert seen == [*range(4 * sink), *range(48 + 4 * sink, 60)]
    assert all(changed_by(model, place, "dense") for place in (4, 30, 47))


def test_the_dense_twin_has_no_index_and_is_mode_dense():
    """It has the weights of the MSA model without the index, and the logits of its mode dense."""
    config = MICRO.model
    sparse, dense = make(config), make(replace(config, attention=("dense",) * 2))
    assert not [name for name, _ in dense.named_parameters() if ".index." in name]
    kept = {n: w for n, w in sparse.state_dict().items() if ".index." not in n}
    dense.load_state_dict(kept)
    text = words(90)
    wanted = sparse(text, mode="dense").logits
    torch.testing.assert_close(dense(text).logits, wanted, rtol=0, atol=1e-5)
    assert (sparse(text).logits - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_without_the_stop_gradient_the_loss_of_the_index_moves_the_backbone(mode):
    """The option changes the gradients only, not the outputs."""
    found, logits = {}, {}
    for gradient in (False, True):
        model = make(replace(MICRO.model, index_gradient=gradient))
        output = model(words(90), mode=mode, align=True)
        output.kl.backward()
        logits[gradient] = output.logits
        found[gradient] = {
            name for name, w in model.named_parameters() if w.grad is not None and w.grad.any()
        }
    assert torch.equal(logits[False], logits[True])
    assert all(".index." in name for name in found[False])
    assert {"embed.weight", "layers.0.mlp.down.weight"} <= found[True] - found[False]
    # the teacher is still detached: the last layer's q and k get no gradient
    assert not {"layers.1.attention.q.weight", "layers.1.attention.k.weight"} & found[True]


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_autocast_rounds_no_more_than_its_own_products(mode):
    """msa gets queries, keys and index in bfloat16, and the loss is float32."""
    model, text = make(MICRO.model), words(90)
    wanted = model(text, mode=mode, align=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(text, mode=mode, align=True)
    assert found.kl.dtype == torch.float32
    assert found.kl.item() == pytest.approx(wanted.kl.item(), rel=0.05)
    error = (found.logits.float() - wanted.logits).norm() / wanted.logits.norm()
    assert 1e-4 < error < 0.05


def test_the_dense_teacher_is_what_autocast_makes_of_any_attention():
    """Autocast applies as in a dense layer: float32 inputs, bfloat16 outputs."""
    q, k = torch.randn(5, 2, 8), torch.randn(5, 1, 8)
    wanted = attend_densely(q, k, k, msa.Sequences.one(5, 5), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_densely(q, k, k, msa.Sequences.one(5, 5), 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.03)


# -- training that starts from weights ------------------------------------------------------------
def test_a_run_begins_with_the_weights_and_sizes_of_a_folder(tmp_path):
    first = train.train(TrainOptions(out=tmp_path / "first", steps=2, block_size=8, top_k=2))
    options = TrainOptions(out=tmp_path / "second", steps=2, start=first)
    assert read_preset(options).model == checkpoint.read_config(first)
    weights = checkpoint.read_weights(first / checkpoint.WEIGHTS)
    trainer = Trainer(read_preset(options), 0, first)
    assert all(torch.equal(w, weights[n]) for n, w in trainer.model.state_dict().items())
    train.train(options)
    other = train.train(
        replace(options, out=tmp_path / "other", start=None, seed=1, block_size=8, top_k=2)
    )
    with pytest.raises(ValueError, match="got another start"):
        train.train(replace(options, start=other))
    with pytest.raises(ValueError, match="out must be another folder than start, got"):
        train.train(replace(options, start=options.out))
    with pytest.raises(ValueError, match=r"unexpected: layers\.0\.attention\.index"):
        train.train(TrainOptions(out=tmp_path / "third", start=first, attention="dense"))
    with pytest.raises(ValueError, match=r"config\.json must be the configuration of a model"):
        train.train(TrainOptions(out=tmp_path / "third", start=tmp_path / "nowhere"))


# -- conversion (MSA-CPT) -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense twin that was trained for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "HELD_OUT", 2)
        patch.setitem(PRESETS, "tiny", MICRO)
        out = tmp_path_factory.mktemp("dense")
        return train.train(TrainOptions(out=out, attention="dense", steps=2))


def test_a_converted_model_is_the_dense_one_until_it_selects(dense, tmp_path, capsys):
    """R11 holds, the weights stay, and the seed determines the index."""
    out = str(tmp_path / "out")
    assert cli.main(["convert", str(dense), "--out", out, "--top-k", "6"]) == 0
    assert f"is in {out}" in capsys.readouterr().out
    old, new = checkpoint.load(dense), checkpoint.load(out)
    assert new.config == replace(
        old.config, attention=("msa",) * 2, msa=msa.MSAConfig(block_size=16, top_k=6)
    )
    weights = old.state_dict()
    fresh = {n for n, w in new.state_dict().items() if n not in weights}
    assert all(torch.equal(w, new.state_dict()[n]) for n, w in weights.items())
    assert len(fresh) == 8 and all(".index." in name for name in fresh)
    text = words(96)
    wanted = old(text).logits
    torch.testing.assert_close(new(text).logits, wanted, rtol=0, atol=1e-5)
    fewer = convert(old, msa.MSAConfig(block_size=16, top_k=2), seed=0)
    assert (fewer(text).logits - wanted).abs().max() > 1e-3
    drawn = fewer.layers[0].attention.index.q.weight
    assert torch.equal(drawn, new.layers[0].attention.index.q.weight)
    other = convert(old, fewer.config.msa, seed=1).layers[0].attention.index.q.weight
    assert not torch.equal(drawn, other)


def test_the_loss_of_a_converted_model_reaches_the_fresh_projections_alone(dense):
    old = checkpoint.load(dense)
    new = convert(old, old.config.msa)
    for mode in ("dense", "sparse"):
        new.zero_grad(set_to_none=True)
        new(words(96), mode=mode, align=True).kl.backward()
        reached = {n for n, w in new.named_parameters() if w.grad is not None and w.grad.any()}
        assert reached == {n for n in new.state_dict() if n not in old.state_dict()}


def test_a_converted_model_is_trained_on(dense, tmp_path):
    """First the warm-up, then sparse. It starts with the weights and the loss of the dense twin."""
    out = tmp_path / "out"
    assert cli.main(["convert", str(dense), "--out", str(out)]) == 0
    options = TrainOptions(out=tmp_path / "cpt", start=out, steps=3, warm_up=0.3)
    train.train(options)
    assert [line["mode"] for line in metrics(options.out)] == ["dense", "sparse", "sparse"]
    first = Trainer(read_preset(TrainOptions(attention="dense")), 0, dense)
    batch = first.batch(0)
    wanted = first.read(batch, "dense")[0].item()
    assert metrics(options.out)[0]["language"] == pytest.approx(wanted, abs=1e-5)


def test_what_cannot_be_converted_is_named(dense, tmp_path, capsys):
    model = make(MICRO.model)
    with pytest.raises(ValueError, match="attention must have a dense layer to convert, got"):
        convert(model, model.config.msa)
    assert cli.main(["convert", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert "msa: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
