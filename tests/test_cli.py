"""Wrong command lines: exit code 2 and one sentence, before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msa import cli, files
from msa.ablations import results, run
from msa.demo import ask, demo
from msa.model import checkpoint
from msa.model.config import ModelConfig
from msa.model.model import Model
from msa.training import train
from msa.training.convert_dense import convert
from msa.training.presets import TINY

ROOT = Path(__file__).parent.parent
HUGE = "99999999999999999999999"


@pytest.fixture(scope="module")
def files_of_all_kinds(tmp_path_factory):
    """FILE, DIR and other paths of the wrong kind."""
    place = tmp_path_factory.mktemp("place")
    (place / "DIR").mkdir()
    (place / "FILE").write_text("a text, which is all that it is")
    (place / "latin").write_bytes("für".encode("latin-1"))
    (place / "binary").write_bytes(b"\x7fELF\0\1")
    (place / "object.json").write_text("{}")
    (place / "findings_x.json").write_text("{}")
    (place / "list.json").write_text("[]")
    (place / "cut.json").write_text('{"runs": [')
    (place / "deep.json").write_text("[" * 100_000)
    (place / "kinds.json").write_text(json.dumps(dict.fromkeys(
        ("device", "torch", "date", "steps", "documents"), 3) | {"runs": [{}]}))  # fmt: skip
    torch.manual_seed(0)
    sizes = ModelConfig(**(vars(TINY.model) | {"width": 32, "attention": ("msa", "dense", "msa")}))
    checkpoint.save(Model(sizes), place / "model")
    checkpoint.save(convert(Model(sizes), sizes.msa), place / "sparse")
    return place


@pytest.fixture
def place(files_of_all_kinds, monkeypatch):
    """The contents of a file that no command may change."""

    def listing():
        return {p: p.stat().st_size for p in files_of_all_kinds.rglob("*")}

    monkeypatch.chdir(files_of_all_kinds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = listing()
    yield files_of_all_kinds
    assert listing() == before


def refusal(command, capsys):
    """The one sentence on stderr."""
    assert cli.main(command if isinstance(command, list) else command.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("msa: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.out
    return said.err


ASK = "ask --document FILE --image=QKZ=FILE"
CONVERT = "convert --model DIR --text FILE"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        # numbers
        ("verify --examples 0", "examples must be at least 1, got 0"),
        ("verify --examples -3", "examples must be at least 1, got -3"),
        ("demo --seed -1", "seed must be at least 0, got -1"),
        (f"demo --seed {HUGE}", f"seed must be below 2**63, got {HUGE}"),
        ("demo --tokens 1000000", "bytes of such prose, got 1000000"),
        ("demo --records 4000", "tokens must be at least 48001 for 4000 records"),
        ("demo --tokens 60000 --records 4000", "records must be at most 3,515, the number of keys"),
        ("demo digits --seed -1", "seed must be at least 0, got -1"),
        ("demo digits --block-size 0", "block_size must be at least 1, got 0"),
        (f"train --seed {2**63}", "seed must be below 2**63"),
        ("train --kl inf", "kl must be finite and at least 0, got inf"),
        ("train --kl nan", "kl must be finite and at least 0, got nan"),
        ("train --warm-up nan", "warm_up must be from 0 to 1, got nan"),
        ("train --minutes inf", "minutes must be finite and positive, got inf"),
        (f"{CONVERT} --warmup -1", "warmup must be at least 0, got -1"),
        (f"{CONVERT} --length 0", "length must be at least 1, got 0"),
        (f"{CONVERT} --length -4", "length must be at least 1, got -4"),
        (f"{CONVERT} --seed {HUGE}", "seed must be below 2**63"),
        (f"{CONVERT} --learning-rate nan", "learning_rate must be finite and positive, got nan"),
        (f"convert model --out new --seed {HUGE}", "seed must be below 2**63"),
        (f"findings run --seeds {HUGE}", "seeds must be below 2**63"),
        ("findings run --seeds 1 1", "seeds must name at least one, and each once, got (1, 1)"),
        # options of several values
        ("verify --rule", "--rule must have at least one value behind it, got none"),
        ("verify --rule --examples 3", "--rule must have at least one value behind it, got none"),
        ("verify --rule R7 --rule R8", "--rule must be given once, its values behind it, got it"),
        ("demo digits --top-k 2 --top-k=3", "--top-k must be given once"),
        (f"{ASK} --image=BEM=FILE", "--image must be given once, its values behind it, got it"),
        (f"{ASK} --question=QKZ --question=QKZ", "--question must be given once"),
        (f"{ASK} --question QKZ QKZ", "question must name a key once, got QKZ twice"),
        # devices
        ("train --device cuda", "device must be cpu, for this machine has no CUDA device, got 'cu"),
        ("train --device nope", "device must be cpu, for this machine has no CUDA device, got 'no"),
        ("train --preset small", "device must be cpu, for this machine has no CUDA device"),
        # files to be written
        ("demo --html DIR", "html must be a file, got the folder DIR"),
        ("demo --png DIR", "png must be a file, got the folder DIR"),
        ("demo --html FILE/x", "html must be a file to be written, got FILE/x: Not a directory"),
        ("demo --html FILE/x/y", "html must be a file to be written, got FILE/x/y: Not a director"),
        ("demo --png /proc/x.png", "png must be a file to be written, got /proc/x.png: No such"),
        ("demo --html new.html --png new.html", "png must be another place than html"),
        (f"{ASK} --html ./FILE", "html must be another place than document, got FILE for both"),
        (["demo", "--html", "x" * 300], "xxx: File name too long"),
        ("demo digits --plot DIR", "plot must be a file, got the folder DIR"),
        ("train --out FILE", "out must be a folder to be written to, got FILE: Not a directory"),
        ("train --out FILE/x", "out must be a folder to be written to, got FILE/x: Not a director"),
        ("train --out /proc/x", "out must be a folder to be written to, got /proc/x: No such file"),
        ("train --out /proc", "out must be a folder to be written to, got /proc: "),
        ("train --backend reference --out new", "backend must be one with gradients, torch or"),
        ("train --start model --out model", "out must be another folder than start"),
        (f"{CONVERT} --save DIR", "save must be a file, got the folder DIR"),
        (f"{CONVERT} --save FILE/x", "save must be a file to be written, got FILE/x: Not a"),
        (f"{CONVERT} --save FILE", "save must be another place than text, got FILE for both"),
        ("convert model --out FILE", "out must be a folder to be written to, got FILE: Not a dir"),
        ("convert model --out DIR/../model", "out must be another place than folder"),
        ("findings run --out FILE", "out must be a folder to be written to, got FILE: Not a dir"),
        # files to be read
        ("train --start FILE", "FILE/config.json must be the configuration of a model, got no rea"),
        ("train --start DIR", "DIR/config.json must be the configuration of a model, got no such"),
        ("convert FILE --out new", "FILE/config.json must be the configuration of a model, got no"),
        ("convert DIR --out new", "DIR/config.json must be the configuration of a model, got no"),
        ("convert sparse --out new", "attention must have a dense layer to convert"),
        ("convert --model DIR --text no", "text must be a readable file, got no: No such file"),
        ("convert --model DIR --text DIR", "text must be a readable file, got DIR: Is a directory"),
        ("convert --model DIR --text latin", "text must be UTF-8, got latin: 'utf-8' codec"),
        ("ask --document DIR --image QKZ=FILE", "document must be a readable file, got DIR: Is a"),
        ("ask --document binary --image QKZ=FILE", "must be a text, in UTF-8 or the like, got a z"),
        ("ask --document /dev/zero --image QKZ=FILE", "document must have at most 16,777,216 byte"),
        (ASK, "FILE must be a picture, got one that cannot be read"),
        ("findings --results no", "results must be a file, got no"),
        ("findings --results DIR", "results must be a file, got DIR"),
        ("findings --results FILE", "results must be a JSON file, got FILE: Expecting value"),
        ("findings --results binary", "results must be a JSON file, got binary: "),
        ("findings --results cut.json", "results must be a JSON file, got cut.json: Expecting"),
        ("findings --results deep.json", "results must be a JSON file, got deep.json: "),
        ("findings --results object.json", "object.json must be what msa findings run wrote, got "),
        ("findings --results list.json", "list.json must be what msa findings run wrote, got a pa"),
        ("findings --results kinds.json", "got another kind of value as device: 3"),
        ("bench plots --results DIR", "results must be a file, got DIR"),
        ("bench plots --results cut.json", "results must be a JSON file, got cut.json: Expecting"),
        ("bench plots --results list.json", "results must hold one JSON object, got another value"),
        ("bench plots --results object.json --to DIR", "object.json: the results have no "),
        ("bench plots --results findings_x.json --to DIR", "of which no figure can be made: KeyEr"),
        ("bench plots --results object.json --to FILE", "to must be a folder to be written to"),
    ],
)  # fmt: skip
def test_one_sentence_before_any_work(command, message, place, capsys, monkeypatch):
    def work(*_):
        raise AssertionError("work has begun")

    for module, name in (
        (demo, "load_model"), (ask, "load_model"), (train, "_train"), (run, "outcomes"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr("msa.demo.digits.experiment.measure", work)
    monkeypatch.setattr("msa.conformance.results.try_one", work)
    monkeypatch.setattr("msa.integrations.convert_run.load", work)
    assert message in refusal(command, capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain --backend triton", "use backend='torch'"),
        ("demo --device cuda:7", "device must be cpu, for this machine has no CUDA device"),
        ("demo --device nope", "device must be cpu, for this machine has no CUDA device, got 'nop"),
        ("verify --backend nobody", "backend must be one of reference, torch, triton"),
        ("verify --target FILE", "target must be package.module:function, got 'FILE'"),
        ("demo --model FILE", "FILE/config.json must be the configuration of a model, got no read"),
        ("demo --model DIR", "DIR/config.json must be the configuration of a model, got no such"),
        ("demo --tokens 99 --records 1 --html /dev/full", "msa: /dev/full: No space left on dev"),
        ("demo --tokens 99 --records 1 --png /dev/full", "msa: /dev/full: No space left on dev"),
        ("convert --model gpt2 --text FILE", "model must be a folder or a name that AutoModelForC"),
        ("convert --model DIR --text FILE", "model must be a folder or a name that AutoModelForCa"),
        ("convert --model FILE --text FILE", "model must be a folder or a name that AutoModelForC"),
    ],
)  # fmt: skip
def test_one_sentence(command, message, place, capsys):
    if "--model" in command and command.startswith("convert"):
        pytest.importorskip("transformers")
    assert message in refusal(command, capsys)


def test_what_is_written_has_any_name(tmp_path, monkeypatch, capsys):
    """Brackets are not markup, suffixes have no meaning, links are followed, folders are made."""
    monkeypatch.chdir(tmp_path)
    page, picture = Path("[/red] deep") / "[/] page", Path("picture")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    words = ["demo", "--tokens", "99", "--records", "1", "--backend", "torch"]
    assert cli.main([*words, "--html", str(page), "--png", str(picture)]) == 0
    said = capsys.readouterr().out
    assert f"opened: {page}\n" in said and f"picture: {picture}\n" in said
    assert page.read_text().startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*words, "--html", "link"]) == 0
    assert Path("link").is_symlink() and Path("target").read_text() == page.read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"[", "picture", "link", "target"}


# -- how a command ends ---------------------------------------------------------------------------
@pytest.mark.parametrize("error", [
    KeyError("k"), RuntimeError("r"), AssertionError(), ZeroDivisionError(),
])  # fmt: skip
def test_other_errors_keep_their_traceback(error):
    def slip():
        raise error

    with pytest.raises(type(error)):
        cli.guarded(slip)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench"], "no such command: bench; behind bench must be prefill, train, decode, servi"),
        (["bench", "nothing"], "no such command: bench nothing; behind bench must be prefill"),
        ([""], "no such command: ''; msa --help lists all commands"),
        (["pretrain", "--out", "x"], "no such command: pretrain; msa --help lists all commands"),
        (["findings", "--results", "two\nlines"], r"results must be a file, got two\nlines"),
    ],
)  # fmt: skip
def test_one_sentence_about_words(command, message, capsys):
    assert message in refusal(command, capsys)


def test_a_slip_is_no_refusal():
    for slip in (lambda: 1 + None, lambda: int("x"), lambda: json.loads("{")):
        with pytest.raises((TypeError, ValueError)):
            cli.guarded(slip)


def test_the_operating_system_is_quoted(tmp_path, capsys):
    assert cli.guarded(lambda: len((tmp_path / "no").read_text())) == 2
    assert capsys.readouterr().err == f"msa: {tmp_path / 'no'}: No such file or directory\n"


def test_ctrl_c_is_one_line(capsys):
    def interrupt(*words):
        raise KeyboardInterrupt(*words)

    assert cli.guarded(interrupt) == 130
    assert cli.guarded(lambda: interrupt("go on")) == 130
    assert capsys.readouterr().err == "msa: stopped by Ctrl-C\nmsa: go on\n"


def start(words, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "msa.cli", *words], stderr=subprocess.PIPE, text=True,
        env=environment, **options,
    )  # fmt: skip


def test_nobody_reads_the_output():
    reading, writing = os.pipe()
    os.close(reading)
    process = start(["--help"], stdout=writing)
    os.close(writing)
    assert process.communicate() == (None, "")
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_the_output_is_full():
    with open("/dev/full", "w") as full:
        process = start(["--help"], stdout=full)
    assert process.communicate()[1] == "msa: No space left on device\n"
    assert process.returncode == 2


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("msa-stack ")


@pytest.mark.parametrize(("command", "missing", "message"), [
    ("verify --help", "hypothesis", "msa verify needs hypothesis; pip install 'msa-stack[verify]'"),
    ("demo", "sklearn", "msa demo needs sklearn; pip install 'msa-stack[model,demo]' brings it"),
    ("demo digits", "sklearn", "msa demo digits needs sklearn; pip install 'msa-stack[demo]'"),
    ("findings run", "torch", "msa findings run needs torch; pip install 'msa-stack[model,demo]'"),
    ("convert --model x", "transformers", "needs transformers; pip install 'msa-stack[transformer"),
    ("bench plots", "benchmarks.plots", "runs from a checkout"),
    ("exercise 1", "exercises", "runs from a checkout, which has the folder exercises"),
])  # fmt: skip
def test_a_missing_library_is_named_with_its_extra(command, missing, message, monkeypatch, capsys):
    def lack(module):
        raise ModuleNotFoundError(name=missing)

    monkeypatch.setattr(cli.importlib, "import_module", lack)
    assert message in refusal(command, capsys)


def test_every_extra_is_one():
    text = (ROOT / "pyproject.toml").read_text()
    extras = {extra for *_, names in cli.COMMANDS.values() for extra in names.split(",")}
    assert all(f"\n{extra} = [" in text for extra in extras)


def test_verify_leaves_nothing_in_the_folder(tmp_path, monkeypatch):
    """This needs a new process, because Hypothesis reads the folder when it is imported."""
    monkeypatch.delenv("HYPOTHESIS_STORAGE_DIRECTORY", raising=False)
    words = ["verify", "--rule", "R7", "--backend", "reference", "--examples", "5"]
    process = start(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert process.communicate() == (None, "") and process.returncode == 0
    assert list(tmp_path.iterdir()) == []


# -- results that come with the package -----------------------------------------------------------
def test_findings_are_shown_and_their_results_are_in_the_package(capsys):
    assert cli.main(["findings"]) == 0
    assert "MSA from scratch" in capsys.readouterr().out
    assert results.SHIPPED == ROOT / "msa" / "ablations" / results.RESULTS
    assert results.SHIPPED.is_file()


def test_findings_need_no_torch():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'sklearn', 'matplotlib')); "
        "from msa.ablations.tables import FindingsOptions, run; sys.exit(run(FindingsOptions()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "MSA from scratch" in done.stdout, done.stderr


def test_a_trained_model_that_is_not_installed_is_said_to_be_in_the_repository(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(checkpoint.TRAINED, "small", tmp_path / "no")
    wanted = "the repository has it in trained/small"
    assert wanted in refusal("demo --model small", capsys)
    with pytest.raises(ValueError, match=wanted):
        checkpoint.load_trained("small")


# -- files ----------------------------------------------------------------------------------------
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write(path, b"before")
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        files.write(path, b"after, and longer")
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_locked_while_somebody_is_at_work(tmp_path):
    (tmp_path / files.LOCK).write_text("4194305")  # left by a process that was killed
    with files.locked("out", tmp_path):
        with (
            pytest.raises(ValueError, match=f"got {tmp_path}, where process {os.getpid()} is at"),
            files.locked("out", tmp_path),
        ):
            pass
        assert (tmp_path / files.LOCK).read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
    with files.locked("out", tmp_path):
        pass
