"""Every backend has the functions of the contract, with the same arguments."""

from __future__ import annotations

import inspect

import pytest

from msa.dispatch import load_backend
from msa.interface import Backend, BackendWithGradients

FUNCTIONS = [name for name in vars(Backend) if not name.startswith("_")]
HALVES = [name for name in vars(BackendWithGradients) if not name.startswith("_")]


def test_the_contract_has_fourteen_functions():
    assert len(FUNCTIONS) == 14


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_same_name_same_arguments(backend, name):
    wanted = list(inspect.signature(getattr(Backend, name)).parameters)[1:]  # without self
    given = inspect.signature(getattr(load_backend(backend), name))
    assert list(given.parameters)[: len(wanted)] == wanted
    assert all(p.default is not p.empty for p in list(given.parameters.values())[len(wanted) :])
    assert given.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forward_and_backward_have_the_arguments_of_the_contract(backend, name):
    wanted = list(inspect.signature(getattr(BackendWithGradients, name)).parameters)[1:]
    assert list(inspect.signature(getattr(load_backend(backend), name)).parameters) == wanted


def test_only_backends_with_gradients_have_them():
    assert len(HALVES) == 3
    assert isinstance(load_backend("torch"), BackendWithGradients)
    assert not isinstance(load_backend("reference"), BackendWithGradients)
