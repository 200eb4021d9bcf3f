"""`msa ask`: texts and pictures from files are changed to the form of the training data."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msa import cli
from msa.demo import demo_html
from msa.demo.ask import AskOptions, compose, compute
from msa.demo.pictures import read_picture
from msa.demo.present import half_blocks
from msa.model.checkpoint import load_trained
from msa.training.documents import IMAGE_TOKEN, world
from msa.training.evaluate import read_documents, unseen_documents

TEXT = bytes(world("test").prose[3000:3600].astype(np.uint8)).replace(b"right", b"other")
"""The page, without the words that only a page with known answers has."""


def grey(picture):
    """A picture with light ink."""
    return np.rint((picture + 1) * 127.5).astype(np.uint8)


def photo(picture, side=96, margin=(30, 12, 5, 50)):
    """The picture enlarged and smooth, dark on light, somewhere on a page."""
    large = Image.fromarray(grey(picture)).resize((side, side), Image.Resampling.BICUBIC)
    top, bottom, left, right = margin
    return 255 - np.pad(np.asarray(large), ((top, bottom), (left, right)))


@pytest.fixture
def files(tmp_path):
    """The text, and a picture of each digit as a file, light on dark or the reverse."""
    test = world("test")
    (tmp_path / "text.txt").write_bytes(TEXT)
    for digit in range(10):
        pixels = photo(test.images[np.flatnonzero(test.labels == digit)[0]])
        Image.fromarray(255 - pixels if digit % 2 else pixels).save(tmp_path / f"{digit}.png")
    return tmp_path


def words(files, **images):
    given = [f"{key}={files / name}" for key, name in images.items()]
    return ["ask", "--document", str(files / "text.txt"), "--image", *given, "--backend", "torch"]


# -- pictures -------------------------------------------------------------------------------------
def test_a_picture_is_read_in_any_form(tmp_path):
    """Place, size, colours and format of a picture do not change its 64 numbers."""
    picture = world("test").images[3]
    plain = photo(picture)
    forms = {
        "plain.png": Image.fromarray(plain),
        "light.png": Image.fromarray(255 - plain),
        "moved.png": Image.fromarray(photo(picture, margin=(3, 40, 60, 0))),
        "faint.png": Image.fromarray((200 - (255 - plain.astype(int)) // 4).astype(np.uint8)),
        "colour.png": Image.fromarray(plain).convert("RGB"),
        "palette.gif": Image.fromarray(plain),
        "deep.tif": Image.fromarray(plain.astype(np.uint16) * 257),
    }
    for white in (0, 255):
        layers = np.stack([np.full_like(plain, white), 255 - plain], -1)
        forms[f"transparent{white}.png"] = Image.fromarray(layers)
    wanted = read_picture(save(tmp_path / "wanted.png", Image.fromarray(plain)))
    assert wanted.shape == (8, 8)
    assert wanted.dtype == np.float32
    assert wanted.min() == -1
    assert wanted.max() == 1
    assert set(np.unique((wanted + 1) * 8)) <= set(range(17))
    assert np.abs(wanted - picture).mean() < 0.25
    for name, image in forms.items():
        assert np.abs(read_picture(save(tmp_path / name, image)) - wanted).max() <= 0.125, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_may_have_been_held_otherwise(orientation, tmp_path):
    """The stored picture is turned or mirrored, and EXIF says how to show it."""
    upright = Image.fromarray(photo(world("test").images[5]))
    back = Image.Transpose
    turns = [None, back.FLIP_LEFT_RIGHT, back.ROTATE_180, back.FLIP_TOP_BOTTOM, back.TRANSPOSE,
             back.ROTATE_90, back.TRANSVERSE, back.ROTATE_270]  # fmt: skip
    turn, exif = turns[orientation - 1], Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    (upright if turn is None else upright.transpose(turn)).save(path, exif=exif)
    wanted = read_picture(save(tmp_path / "upright.png", upright))
    assert np.array_equal(read_picture(path), wanted)


def save(path, image):
    image.save(path)
    return path


def test_the_shape_is_kept_and_stands_in_the_middle(tmp_path):
    pixels = np.zeros((60, 80), np.uint8)
    pixels[5:55, 60:66] = 255  # a high and thin stroke
    high = read_picture(save(tmp_path / "high.png", Image.fromarray(pixels)))
    flat = read_picture(save(tmp_path / "flat.png", Image.fromarray(pixels.T.copy())))
    assert (high[:, 3:5] == 1).all()
    assert (high[:, [0, 1, 2, 5, 6, 7]] == -1).all()
    assert np.array_equal(flat, high.T)


def test_pictures_from_files_are_answered_nearly_as_well(tmp_path):
    """The pictures of some unseen documents are written to files and read again."""
    model, documents = load_trained(backend="torch"), unseen_documents(256, 8, 8, 8, seed=5)
    right = read_documents(model, documents).right
    for document in documents:
        for i, picture in enumerate(document.images):
            path = save(tmp_path / "x.png", Image.fromarray(photo(picture)))
            document.images[i] = read_picture(path)
    again = read_documents(model, documents).right
    assert len(right) == 64
    assert int(again.sum()) >= int(right.sum()) - 4


# -- texts ----------------------------------------------------------------------------------------
@given(st.lists(st.binary(max_size=12), min_size=1, max_size=5), st.data())
def test_nothing_of_a_text_is_lost(parts, data):
    """A composed text without its records equals the text without its marks."""
    keys = [f"A{chr(ord('B') + i)}C" for i in range(len(parts))]
    marked = data.draw(st.lists(st.sampled_from(keys), unique=True))
    marks = {key: f"[{key}]".encode() for key in marked}
    text = b" ".join(marks.get(key, b"") + part for key, part in zip(keys, parts))
    composed = compose(text, keys)
    assert composed.marked == set(marked)
    assert list(composed.records.values()) == sorted(composed.records.values())
    tokens = composed.tokens.tolist()
    for key, place in reversed(composed.records.items()):
        assert tokens[place - 4 : place + 2] == [*f"[{key}".encode(), IMAGE_TOKEN, ord("]")]
        del tokens[place - 4 : place + 2]
    assert bytes(tokens) == b" ".join(parts)


def test_records_without_a_mark_stand_before_words_and_far_apart():
    composed = compose(TEXT, ["QKZ", "BEM", "XUT"])
    places = list(composed.records.values())
    assert list(composed.records) == ["QKZ", "BEM", "XUT"]
    for place in places:
        assert composed.tokens[place - 5] in b" \n"
    assert np.diff([0, *places, len(composed.tokens)]).min() > len(TEXT) / 5
    cut = compose("héé".encode(), ["QKZ"])  # no word begins there: at the end, no letter is cut
    assert bytes(cut.tokens[:5].tolist()) == "héé".encode()


def test_control_characters_are_shown_by_their_symbols():
    """HTML allows only tab and newline; a text may contain any control character."""
    shown = demo_html.draw_text(
        np.array([*range(1, 32), 127, *"\x85\x9f".encode(), 0xFF, *b"a\0b"]), 0
    )
    assert [c for c in shown if c < " " or "\x7f" <= c <= "\x9f"] == ["\t", "\n"]
    assert shown.startswith("␁␂") and "␛" in shown and shown.endswith("␡���a␀b")


# -- the command ----------------------------------------------------------------------------------
def test_pictures_are_found_behind_their_keys(files):
    """Pictures with marks and without them; every question is asked separately."""
    marked = TEXT[:100] + b"[QKZ]" + TEXT[100:400] + b"[BEM]" + TEXT[400:]
    (files / "text.txt").write_bytes(marked)
    options = AskOptions(
        document=files / "text.txt", backend="torch",
        image=tuple(f"{key}={files}/{n}.png" for key, n in (("QKZ", 3), ("XUT", 7), ("BEM", 5))),
    )  # fmt: skip
    text, shown = compute(options)
    assert list(text.records) == ["QKZ", "XUT", "BEM"]
    assert text.marked == {"QKZ", "BEM"}
    assert [question.key for question in shown.questions] == ["QKZ", "XUT", "BEM"]
    assert [answer.digit for answer in shown.sparse] == [3, 7, 5]
    for question in shown.questions:
        tail = bytes(question.tokens[-6:].tolist())
        assert tail == TEXT[-1:] + f"?{question.key}=".encode()
        assert question.place == len(question.tokens) - 1 == len(text.tokens) + 4
        assert np.array_equal(
            shown.images[question.picture],
            read_picture(files / f"{dict(QKZ=3, XUT=7, BEM=5)[question.key]}.png"),
        )
    alone = compute(AskOptions(**{**vars(options), "question": ("BEM",)}))[1]
    assert [question.key for question in alone.questions] == ["BEM"]
    assert alone.sparse[0].chance == pytest.approx(shown.sparse[2].chance, rel=1e-5)
    assert torch.equal(alone.sparse[0].opened, shown.sparse[2].opened)


def test_the_command_prints_and_draws(files, capsys):
    page, picture = files / "deep" / "a.html", files / "deep" / "a.png"
    drawn = ["--html", str(page), "--png", str(picture)]
    assert cli.main([*words(files, QKZ="3.png", BEM="7.png"), "--question", "BEM", *drawn]) == 0
    told = capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "The text has no mark [BEM]: its picture is token" in told
    assert "?BEM=" in told
    assert "?QKZ=" not in told
    for line in half_blocks(read_picture(files / "7.png")).splitlines():
        assert line.rstrip() in told
    assert re.search(r"7 +\d+% +7 +\d+%", told)  # dense and MSA, without a known right answer
    assert "MSA answers as dense attention does to 1" in " ".join(told.split())
    assert "1 question to a document of" in text
    assert "trained on" not in text
    assert "right" not in re.sub("<[^>]*>", "", text)
    assert Image.open(picture).width == 1200


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        (["QKZ"], [], "image must be KEY=FILE, got 'QKZ'"),
        (["QKZ="], [], "image must be KEY=FILE, got 'QKZ='"),
        (["qkz=3.png"], [], "image must have a key of three capital letters A-Z, got 'qkz'"),
        (["ÄBC=3.png"], [], "image must have a key of three capital letters A-Z, got 'ÄBC'"),
        (["QKZ=3.png", "QKZ=5.png"], [], "image must name a key once, got QKZ twice"),
        (["QKZ=3.png"], ["--image", "BEM=5.png"], "--image must be given once, its values behind"),
        (["QKZ=no.png"], [], "no.png must be a picture, got one that cannot be read: no such file"),
        (["QKZ=text.txt"], [], "text.txt must be a picture, got one that cannot be read: cannot"),
        (["QKZ=."], [], ". must be a picture, got one that cannot be read:"),
        (["QKZ=half.png"], [], "half.png must be a picture, got one that cannot be read:"),
        (["QKZ=blank.png"], [], "blank.png must show a digit, in ink that differs"),
        (["QKZ=3.png"], ["--question", "BEM"], "question must be a key that has an image, QKZ"),
        (["QKZ=3.png"], ["--question", "B"], "question must have a key of three capital letters"),
        (["QKZ=3.png"], ["--document", "no.txt"], "document must be a readable file, got no.txt"),
        (["QKZ=3.png"], ["--document", "empty.txt"], "document must have at least one byte"),
        (["QKZ=3.png"], ["--document", "twice.txt"], "the mark [QKZ] at most once, got it 2 times"),
        (["QKZ=3.png"], ["--model", "nowhere"], "config.json must be the configuration of a model"),
    ],
)
def test_what_cannot_be_asked_is_said(images, more, message, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    Image.fromarray(np.full((20, 20), 90, np.uint8)).save("blank.png")
    (files / "half.png").write_bytes((files / "3.png").read_bytes()[:200])
    (files / "empty.txt").write_bytes(b"")
    (files / "twice.txt").write_bytes(b"[QKZ] and [QKZ]")
    document = [] if "--document" in more else ["--document", "text.txt"]
    assert cli.main(["ask", *document, "--image", *images, *more, "--backend", "torch"]) == 2
    assert message in capsys.readouterr().err
