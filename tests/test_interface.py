"""Every backend keeps the contract: the same functions with the same arguments."""

from __future__ import annotations

import inspect

import pytest

from msa.dispatch import load_backend
from msa.interface import Backend

FUNCTIONS = [name for name in vars(Backend) if not name.startswith("_")]


def test_the_contract_has_thirteen_functions():
    assert len(FUNCTIONS) == 13


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_same_name_same_arguments(backend, name):
    wanted = list(inspect.signature(getattr(Backend, name)).parameters)[1:]  # without self
    given = inspect.signature(getattr(load_backend(backend), name))
    assert list(given.parameters)[: len(wanted)] == wanted
    assert all(p.default is not p.empty for p in list(given.parameters.values())[len(wanted) :])
    assert given.return_annotation is not inspect.Signature.empty
