"""Annotated shapes are checked while tests run, by the hook in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import msa
from msa import reference
from msa.dispatch import load_backend
from msa.ir import BlockScores, Output, Selection, Sequences
from msa.pipeline import lower

ONE = Sequences.one(3, 3)


def test_a_field_of_the_wrong_rank_is_refused():
    with pytest.raises(Exception, match="indices"):
        Selection(np.zeros((3, 1), np.int32), ONE, block_size=2)


def test_a_field_of_the_wrong_dtype_is_refused():
    with pytest.raises(Exception, match="values"):
        BlockScores(np.zeros((3, 1, 2), np.int32), ONE, block_size=2)


def test_fields_whose_sizes_disagree_are_refused():
    with pytest.raises(Exception, match="lse"):
        Output(np.zeros((3, 4, 2)), np.zeros((3, 5)))


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_arguments_whose_sizes_disagree_are_refused(name):
    make = np.zeros if name == "reference" else torch.zeros
    q, k, v = make((3, 1, 4)), make((3, 1, 5)), make((3, 1, 2))  # q and k differ in D
    ids = make((3, 1, 1), dtype=np.int32 if name == "reference" else torch.int32)
    selection = Selection(ids, ONE, block_size=4)
    with pytest.raises(Exception, match="Type-check error"):
        load_backend(name).attend_selection(q, k, v, selection, 1.0)


def test_a_user_pays_nothing():
    """Without the hook nothing is checked, and neither checker is imported."""
    code = (
        "import sys, numpy as np, msa; "
        "msa.Selection(np.zeros((3, 1)), msa.Sequences.one(3, 3), 2); "
        "assert 'beartype' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oracle_is_checked_too():
    with pytest.raises(Exception, match="Type-check error"):
        reference.schedule_chunks(np.zeros(3), 2)
    assert msa.__version__


def test_the_lowering_wants_a_whole_backend_and_shapes_that_agree():
    """A module that lacks one of the fourteen functions is not a Backend."""
    x = np.ones((6, 1, 4))
    args = (x, x, x, x, x[:, 0], Sequences.one(6, 6), msa.MSAConfig(2, 2), 4, 2)
    lower(reference, *args)
    partial = ModuleType("partial")
    vars(partial).update({k: f for k, f in vars(reference).items() if k != "attend_union"})
    with pytest.raises(Exception, match="Backend"):
        lower(partial, *args)
    with pytest.raises(Exception, match="Type-check error"):
        lower(reference, x, x[..., 1:], *args[2:])
