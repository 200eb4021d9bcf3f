"""The exercises: each starter fails its check, each solution passes, and the messages help."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.hooks import exercises as listed
from exercises import run
from msa import cli

CHAPTERS = sorted((Path(__file__).parents[1] / "docs" / "chapters").glob("*.md"))
NUMBERS = sorted(run.starters())


def test_every_chapter_has_one():
    assert [int(path.name[:2]) for path in CHAPTERS] == NUMBERS
    assert {p.name for p in run.starters().values()} == {
        p.name for p in (run.FOLDER / "solutions").glob("*.py")
    }


@pytest.mark.parametrize("chapter", NUMBERS)
def test_the_starter_fails_and_the_solution_passes(chapter):
    if chapter == 13:
        pytest.importorskip("matplotlib")
    wrong = run.fault(chapter, run.starters()[chapter])
    assert wrong.startswith(f"exercise {chapter}: ")
    assert "Error" not in wrong, "a starter is wrong, but it runs"
    assert run.fault(chapter, run.solution(chapter)) == ""


def test_the_command_says_what_is_wrong(capsys):
    assert cli.main(["exercise", "4"]) == 1
    assert "query 9 read token 10, which comes after it" in capsys.readouterr().out
    assert cli.main(["exercise", "4", "--file", str(run.solution(4))]) == 0
    assert "exercise 4: right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["99"], "chapter must be one of 1 to 17, got 99"),
        (["4", "--file", "nowhere.py"], "file must be a Python file, got nowhere.py"),
        (["--file", "nowhere.py"], "file must be given with the number of a chapter"),
    ],
)
def test_bad_input_is_refused(words, said, capsys):
    assert cli.main(["exercise", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_error_in_a_readers_code_names_its_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def attend(q, k, v, ids, position, block):\n    return k[undefined]\n")
    wrong = run.fault(4, path)
    assert "NameError" in wrong and "mine.py, line 2: return k[undefined]" in wrong


def test_the_dense_kernel_is_completed_in_three_steps(tmp_path):
    """After each step the message names the next one."""
    path = tmp_path / "mine.py"
    code = run.starters()[8].read_text()
    causal = '        b_s = tl.where(token[None, :] <= query[:, None], b_s, -float("inf"))\n'
    steps = (
        ("        # TODO 1", f"{causal}        # done 1", "(TODO 2)"),
        ("tl.exp(b_s)", "tl.exp(b_s - tl.maximum(top, tl.max(b_s, 1))[:, None])", "(TODO 3)"),
    )
    assert "(TODO 1)" in run.fault(8, run.starters()[8])
    for old, new, said in steps:
        assert code.count(old) == 1
        code = code.replace(old, new)
        path.write_text(code)
        assert said in run.fault(8, path)


def test_the_ring_finds_a_race_and_a_deadlock(tmp_path):
    text = run.solution(12).read_text()
    early = text.replace(
        '        yield "finish product", stage, step\n        yield "signal", "empty", stage\n',
        '        yield "signal", "empty", stage\n        yield "finish product", stage, step\n',
    )
    never = text.replace('        yield "signal", "empty", stage\n', "")
    assert text not in (early, never)
    for code, said in ((early, "a race"), (never, "a deadlock")):
        (tmp_path / "ring.py").write_text(code)
        assert said in run.fault(12, tmp_path / "ring.py")


def test_a_page_shows_task_starter_message_and_folded_solution():
    page = listed.section(4)
    parts = (
        '??? example "Do it: ', "Run `msa exercise 4` after each change", "which comes after it",
        '    ??? success "A solution"',
    )  # fmt: skip
    for part in parts:
        assert part in page
