"""The site's pages and the functions of their code. `make docs` runs the pages themselves."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import yaml

from docs.hooks import (
    bugs,
    claims,
    curves,
    diagrams,
    heads,
    links,
    little,
    measured,
    pictures,
    sources,
)
from msa import reference
from msa.demo import demo, demo_html
from msa.training import evaluate

DOCS = Path(__file__).parents[1] / "docs"
CHAPTERS = sorted((DOCS / "chapters").glob("*.md"))
ARROWS = sorted((DOCS / "lowering").glob("[0-9]*.md"))
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if "hooks" not in p.parts]
COMMITTED = ("prefill", "train", "decode", "integrations", "crossing", "findings")
EXECUTED = '```python exec="1"'
HOOKS = sorted(p.stem for p in (DOCS / "hooks").glob("[a-z]*.py"))
NEEDED = {"doctests": ["griffe"], "look": ["playwright"], "look_widgets": ["playwright"]}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_has_all_its_parts(path):
    text = path.read_text()
    order = [
        text.index(part)
        for part in ('class="question"', "## What breaks if", "## Exercises", "## Takeaways")
    ]
    assert order == sorted(order)
    assert "figure" in text or "measured.show" in text
    assert f"exercises.section({int(path.stem[:2])})" in text
    assert f'notebooks.links("{path.stem}")' in text
    head = " ".join(text[text.index('<p class="head"') : order[1]].partition("</p>")[0].split())
    for part in ("**You will be able to**", "**Needs**", "**Time**"):
        assert part in head
    assert heads.renewed(text) == text, "python -m docs.hooks.heads writes the minutes anew"
    assert "sources.links(" in text[order[-1] :]
    questions = re.split(r"^\?\?\? question ", text, flags=re.M)[1:]
    assert len(questions) >= 3
    for question in questions:
        assert EXECUTED in question.partition("\n## ")[0], question[:60]


@pytest.mark.parametrize("path", ARROWS, ids=lambda p: p.stem)
def test_an_arrow_says_before_after_property_and_cost(path):
    text = path.read_text()
    for part in ("**Before**", "**After**", "**Property**", "**Cost**", EXECUTED, "sources.links("):
        assert part in text, part


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_all_python_of_a_page_is_executed(path):
    if path.name in ("model.md", "integrations.md"):
        pytest.fail("not a page of code") if EXECUTED in path.read_text() else None
        return
    for line in re.findall(r"^ *```py.*$", path.read_text(), re.M):
        assert line.strip().startswith(EXECUTED), line


def test_every_page_is_in_the_navigation_once():
    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [leaf for value in values for leaf in leaves(value)]

    text = (DOCS.parent / "mkdocs.yml").read_text()
    named = leaves(yaml.safe_load(text)["nav"])
    assert sorted(named) == sorted(str(p.relative_to(DOCS)) for p in PAGES)


def test_there_are_forty_exercises_and_ten_bugs():
    exercises = re.findall(r"^\?\?\? question", "\n".join(p.read_text() for p in PAGES), re.M)
    bugs = re.findall(
        r"^(?:### |\?\?\? bug)", (DOCS / "chapters" / "15-testing.md").read_text(), re.M
    )
    assert len(exercises) >= 40 and len(bugs) >= 10


@pytest.mark.parametrize("name", HOOKS)
def test_examples_in_the_hooks(name):
    for library in NEEDED.get(name, ()):
        pytest.importorskip(library, reason="make install brings it, make test does not")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    assert doctest.testmod(importlib.import_module(f"docs.hooks.{name}"), optionflags=flags)[0] == 0


def test_results_of_a_wrong_form_are_refused():
    for name in (
        *COMMITTED,
        "selection_hopper_h200",
        "walk_hopper_h200",
        "gradients_hopper_h200",
        "orders_hopper_h200",
        "steps_hopper_h200",
        "loss_hopper_h200",
        *measured.older(),
    ):
        found, schema = measured.read(name), measured.SCHEMAS[measured.kind_of(name)]
        for part in schema:
            rest = {key: value for key, value in found.items() if key != part}
            with pytest.raises(measured.BadResults, match=part):
                measured.check(rest, schema, name)


@pytest.mark.parametrize(
    ("measured_at", "changed_at", "old"),
    [
        ("2026-11-23T06:00:00+00:00", "2026-11-23T09:00:00+00:00", True),
        ("2026-11-23T09:00:00+00:00", "2026-11-23T06:00:00+00:00", False),
        ("2026-11-23T09:00:00+02:00", "2026-11-23T08:00:00+00:00", True),
    ],
)
def test_a_result_older_than_its_kernels_says_so(measured_at, changed_at, old):
    for differs in (True, False):
        moments = iter((measured_at, changed_at))
        with (
            mock.patch("docs.hooks.measured.last_change", lambda *p, m=moments: next(m)),
            mock.patch("docs.hooks.measured.code_differs", lambda name, d=differs: d),
        ):
            assert ("changed since" in measured.age("prefill")) == (old and differs)
    with mock.patch("docs.hooks.measured.last_change", lambda *paths: measured_at):
        assert "changed since" not in measured.age(measured.older()[0])
    with mock.patch("docs.hooks.measured.last_change", lambda *paths: ""):
        assert "age is not known" in measured.age("prefill")


def test_code_differs_only_if_a_machine_reads_it_otherwise(tmp_path):
    files = {
        "a": "def f(x):\n    return x\n",
        "b": 'def f(x):\n    """Say it."""\n    return x  # it\n',
    }
    assert measured.meaning(files["a"]) == measured.meaning(files["b"])
    assert measured.meaning(files["a"]) != measured.meaning("def f(x):\n    return -x\n")
    with mock.patch("docs.hooks.measured.read_at", lambda commit, path: path.read_text()):
        assert not measured.code_differs("prefill")
    with mock.patch("docs.hooks.measured.read_at", lambda commit, path: ""):
        assert measured.code_differs("prefill")


def test_the_files_that_results_speak_of_exist():
    for name in COMMITTED:
        assert all((DOCS.parent / path).exists() for path in measured.code_of(name))


def test_results_know_every_file_with_kernels():
    """Else a page would not say that its numbers are older than a kernel."""
    folder = DOCS.parent / "msa" / "triton_impl"
    named = {f"{part}.py" for parts in measured.KERNELS.values() for part in parts}
    kernels = {
        str(path.relative_to(folder)) for path in folder.rglob("*.py")
        if re.search(r"^@(?:triton|gluon)\.jit", path.read_text(), re.M)
    }  # fmt: skip
    kernels -= {"index_scores.py"}  # for `msa.lower` alone: no benchmark times it
    assert len(kernels) > 20 and kernels <= named, kernels - named


def test_drawings_take_their_colours_from_the_theme():
    drawn = [curves.decode_figure(), curves.crossing_figure(), diagrams.cost_figure()]
    drawn += [pictures.step_figure(n, "") for n in (2, 3, 4, 5, 7)]
    drawn += [
        little.architecture_figure(),
        little.training_figure("tiny", ""),
        little.load_figure([[0.5, 0.5]]),
    ]
    for drawing in drawn:
        assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{3,6}", drawing)
    assert "var(--remote)" in drawn[0] and "d-remote" in drawn[3]


def findings(folder, **rows):
    """Write a results file with a run for each row and each of its shares of far answers."""
    other = dict.fromkeys(("kl", "block_recall", "score_recall", "steepest", "near"))
    runs = [
        {"row": row, "seed": seed, "command": f"msa train {row}", "steps": 9, "seconds": 1.0,
         "prose": 2.0, "answers": far, "far": far, "budgets": [], "lengths": [], **other}
        for row, shares in rows.items() for seed, far in enumerate(shares)
    ]  # fmt: skip
    made = {"device": "none", "torch": "2", "python": "3", "date": "2026-11-23", "steps": 9}
    text = json.dumps(made | {"documents": 1, "runs": runs})
    (folder / "findings_tiny.json").write_text(text)


def test_a_claim_is_judged_by_the_ranges_of_its_seeds(tmp_path):
    with mock.patch("docs.hooks.measured.FINDINGS", tmp_path):
        findings(tmp_path, **{"base": (0.8, 0.9), "no-kl": (0.2, 0.3)})
        far, _, prose, gradient = claims.table().splitlines()[2:6]
        assert far.endswith("| no-kl: 25% (20–30%) | base: 85% (80–90%) | yes: lower |")
        assert prose.endswith("| base: 2.00 (2.00–2.00) | cannot tell |")
        assert gradient.endswith("| gradient: not run | base: 2.00 (2.00–2.00) | not known |")
        findings(tmp_path, **{"base": (0.8, 0.9), "no-kl": (0.2, 0.85)})
        assert "| cannot tell |" in claims.table().splitlines()[2]
        findings(tmp_path, **{"base": (0.8, 0.9), "no-kl": (0.2,)})
        assert "| not known |" in claims.table().splitlines()[2]


def test_a_claim_that_does_not_hold_fails_the_build():
    claims.hold("one is less than two", 1 < 2)
    with pytest.raises(claims.NotSo, match="two is less than one"):
        claims.hold("two is less than one", 2 < 1)


def test_the_dense_twin_stands_beside_msa():
    lines = claims.twins().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["512", "1,024"]
    assert all(line.count("%)") == 3 for line in lines[2:])


def test_two_figures_of_one_page_keep_their_pictures_apart():
    (document,) = evaluate.unseen_documents(100, records=2, questions=1, count=1)
    drawn = little.document_figure(document)
    ids, uses = (re.findall(rf'{place}"#?([\w-]+)"', drawn) for place in ("id=", "href="))
    assert ids == uses == ["document-p0", "document-p1"]


def test_opened_blocks_hold_the_picture_that_is_asked_for():
    found = demo.compute(demo.DemoOptions(tokens=400, records=2, backend="torch"))
    for i, question in enumerate(found.questions):
        drawn = little.opened_figure(found, i)
        where = question.record // found.block_size
        hits = demo_html.opened_by(found.sparse[i])[..., where].sum()
        own = question.place // found.block_size == where
        assert drawn.count('class="d-own"') == (0 if own else hits)
        assert f"?{question.key}=, {question.distance} tokens behind" in drawn


def test_links_to_lines_lead_to_the_definition():
    first, last = sources.lines_of("msa/reference/selection.py", "choose_row")
    lines = (DOCS.parent / "msa/reference/selection.py").read_text().splitlines()
    assert lines[first - 1].startswith("def choose_row") and lines[last - 1].startswith(
        "    return"
    )
    assert f"#selection-{first}" in sources.link("msa/reference/selection.py", "choose_row")
    with pytest.raises(LookupError, match="has no nothing"):
        sources.lines_of("msa/reference/selection.py", "nothing")


def test_a_planted_bug_that_is_not_found_fails_the_page():
    with pytest.raises(bugs.NotFound, match="select_blocks"):
        bugs.hunt("r7_ties_go_to_the_lower_id", 5, select_blocks=reference.select_blocks)


def test_dead_links_and_false_outputs_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"></p><a href="b.html#there">b</a>')
    (tmp_path / "b.html").write_text('<a href="a.html#here">a</a><a href="c.html">c</a>')
    printed = '<div><pre>code</pre></div>\n<div class="language-text highlight">equal: False</div>'
    (tmp_path / "d.html").write_text(printed)
    assert links.faults(tmp_path) == [
        "a.html: b.html#there has no such place",
        "b.html: c.html leads nowhere",
        "d.html: an output says False",
    ]
