"""Old import paths of moved modules: the same objects, with a warning that names the new path."""

from __future__ import annotations

import importlib
import sys

import pytest

import msa.files
import msa.recall
from msa import moved
from msa.model import checkpoint
from msa.training import documents


@pytest.fixture
def table(monkeypatch):
    """Two modules that never existed; no module of the table is imported before."""
    rows = {
        "msa.old_files": "msa.files",
        "msa.old_files:find": "msa.recall:measure",
        "msa.model.old_recall": "msa.recall",
    }
    monkeypatch.setattr(moved, "MOVED", rows)
    yield rows
    for name in rows:
        sys.modules.pop(name, None)


def test_an_old_path_gives_the_new_objects(table):
    with pytest.warns(
        DeprecationWarning, match=r"msa\.old_files has moved: import msa\.files"
    ) as w:
        from msa.old_files import find, write
    assert w[0].filename == __file__
    assert write is msa.files.write and find is msa.recall.measure
    with pytest.warns(DeprecationWarning):
        old = importlib.import_module("msa.model.old_recall")
    assert old.Recall is msa.recall.Recall
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from msa.old_files import nothing  # noqa: F401


def test_a_star_and_dir_give_the_names_of_the_new_module(table):
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning):
        exec("from msa.old_files import *", names)
    assert names["write"] is msa.files.write and names["find"] is msa.recall.measure
    assert {"find", "write"} <= set(dir(sys.modules["msa.old_files"]))


def test_a_star_of_a_module_of_the_table():
    sys.modules.pop("msa.model.records", None)
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="msa.training.documents"):
        exec("from msa.model.records import *", names)
    assert names["Document"] is documents.Document


def test_the_function_that_a_table_replaced():
    with pytest.warns(DeprecationWarning, match="replaced by TRAINED"):
        assert checkpoint.shipped()["tiny"] == checkpoint.TRAINED["tiny"]


@pytest.mark.parametrize("old", moved.MOVED_NAMES)
def test_a_name_that_left_its_module(old):
    module, _, name = old.partition(":")
    new = moved.MOVED_NAMES[old]
    importlib.import_module(module)
    with pytest.warns(
        DeprecationWarning, match=f"{name} has moved: import {new.split(':')[0]}"
    ) as w:
        found = getattr(sys.modules[module], name)
    assert w[0].filename == __file__
    assert found is moved.find(new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sys.modules[module].nothing  # noqa: B018


def test_other_modules_are_not_found(table):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("msa.never")


def test_the_finder_is_installed_once_by_the_package():
    moved.install()
    assert sum(isinstance(finder, moved.Finder) for finder in sys.meta_path) == 1


@pytest.mark.parametrize("entry", moved.MOVED.items(), ids=moved.MOVED)
def test_every_new_path_is_there(entry):
    old, new = ((*path.partition(":")[::2],) for path in entry)
    assert old[0] in moved.MOVED
    assert bool(old[1]) == bool(new[1])
    found = importlib.import_module(new[0])
    assert not new[1] or hasattr(found, new[1])
    sys.modules.pop(old[0], None)
    with pytest.warns(DeprecationWarning, match="has moved"):
        again = importlib.import_module(old[0])
    assert not new[1] or getattr(again, old[1]) is getattr(found, new[1])
