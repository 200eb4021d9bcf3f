"""Gluon kernels are compiled for Hopper without a GPU; they fit into registers and memory.

`pytest --hypothesis-profile=thorough` compiles all that `msa.kernel_choice` can choose, in minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import settings

from msa.kernel_choice import (
    BLOCK_SIZES,
    CHUNK_GROUPS,
    INDEX_DIMS,
    KEY_GROUPS,
    LARGEST_GROUPS,
    LARGEST_PLACES,
    LARGEST_STEP,
    LOSS_GROUPS,
    SMALLEST_GROUP,
)

pytest.importorskip("triton", minversion="3.6")

DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
SCORES = [  # dtype, Di, block size, groups, whether maxima are written, pages, factors of pages
    *product(DTYPES, INDEX_DIMS, BLOCK_SIZES, (4,), (True, False)),
    *product(DTYPES, INDEX_DIMS, BLOCK_SIZES, (1, 5, LARGEST_GROUPS), (True,)),
    *product(DTYPES, INDEX_DIMS, BLOCK_SIZES, (4,), (True, False), (True,)),
    *product(DTYPES[2:], INDEX_DIMS, BLOCK_SIZES, (4,), (True, False), (True,), (True,)),
]
FEW_SCORES = [  # each dtype, size and number of operands in registers once
    ("bfloat16", 128, 128, 4, True),
    ("bfloat16", 128, 64, 4, False),
    ("float16", 64, 128, 5, False),
    ("float8_e4m3fn", 128, 128, 4, True),
    ("float8_e4m3fn", 64, 64, 4, True),
    ("bfloat16", 128, 128, 4, True, True),
    ("float8_e4m3fn", 128, 128, 4, True, True, True),
]
TOPK = [*product((1, 15, 16, 32, LARGEST_PLACES), (True, False))]  # places, maxima first
FEW_TOPK = [(15, True), (15, False), (LARGEST_PLACES, True)]
HEADS = (1, 5, 8, 16, 64)
WALKS = [  # dtype, heads of a group, apart, pages, factors of pages
    *product(("bfloat16", "float16"), HEADS, *[(False, True)] * 2),
    *product(("bfloat16",), HEADS, (False, True), (True,), (True,)),
]
FEW_WALKS = [
    ("bfloat16", 16, False, False),
    ("bfloat16", 16, True, False),
    ("float16", 16, False, False),
    ("bfloat16", 16, False, True),
    ("bfloat16", 16, False, True, True),
]
KEYS = [*product(("bfloat16", "float16"), KEY_GROUPS)]  # dtype, heads of a group
FEW_KEYS = [("bfloat16", 16), ("float16", 64)]
QUERIES = [*product(("bfloat16", "float16"), HEADS)]  # dtype, heads
FEW_QUERIES = [("bfloat16", 16), ("float16", 16)]
CHUNKS = [  # dtype, heads of a group, pages, factors of pages
    *product(("bfloat16", "float16"), CHUNK_GROUPS, (False, True)),
    *product(("bfloat16",), CHUNK_GROUPS, (True,), (True,)),
]
FEW_CHUNKS = [("bfloat16", 16, False), ("bfloat16", 16, True), ("bfloat16", 16, True, True)]

PAGES = [  # dtypes of pages and queries, Di, block size, queries times groups
    *product(
        (("float8_e4m3fn", "bfloat16"), ("float8_e4m3fn", "float16"), ("bfloat16", "bfloat16")),
        INDEX_DIMS, BLOCK_SIZES, (1, 4, 12, LARGEST_STEP),
    ),
]  # fmt: skip
PAGES = [(*dtypes, *sizes) for dtypes, *sizes in PAGES]
FEW_PAGES = [
    ("float8_e4m3fn", "bfloat16", 128, 128, 4), ("float8_e4m3fn", "float16", 64, 64, 12),
    ("bfloat16", "bfloat16", 128, 128, 4), ("float8_e4m3fn", "bfloat16", 128, 128, LARGEST_STEP),
]  # fmt: skip
SHARED_WITH_ATTENTION = 227 - 74
"""KiB of shared memory that a program of `page_attention` leaves."""
LOSSES = [*product(("bfloat16", "float16"), LOSS_GROUPS, (False, True), (False, True))]
FEW_LOSSES = [("bfloat16", 16, False, True), ("bfloat16", 16, False, False)]  # heads, top, gradient


def chosen(few, every):
    """What a run compiles."""
    return every if settings.get_current_profile_name() == "thorough" else few


def compiled(kernels):
    """The facts of some kernels, compiled by a process that has no interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_hopper.py"), json.dumps(kernels)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_score_kernels_fit():
    kernels = chosen(FEW_SCORES, SCORES)
    for options, found in zip(kernels, compiled([("scores", *k) for k in kernels]), strict=True):
        assert found["spilled"] == 0, options
        assert "C7514" not in found["says"], options  # products one after another
        assert found["registers"] * found["threads"] <= 65536, options
        assert found["registers"] <= 168, options  # 12 warps; setmaxnreg then moves registers
        assert found["shared"] <= 227 * 1024, options
        assert found["steps"].count("wgmma.mma_async") >= 4, options
        assert_released_after_reading(found["steps"])


def assert_released_after_reading(steps):
    """A consumer gives its rows back after a product has read them, not when their load begins.

    A load from shared memory may still run when the instruction behind it starts.
    """
    loads = [i for i, step in enumerate(steps) if step == "ldmatrix"]
    assert loads
    for i in loads:
        behind = [step for step in steps[i:] if step in ("wgmma.mma_async", "mbarrier.arrive")]
        assert behind[0] == "wgmma.mma_async"


def test_topk_kernels_stay_in_registers():
    kernels = chosen(FEW_TOPK, TOPK)
    sums = [("sum", fuse) for fuse in (None, True, False)]
    *every, stated, fused, apart = compiled([*(("topk", *k) for k in kernels), *sums])
    assert stated["fused"] == fused["fused"] > apart["fused"] == 0  # what EVERY_LAUNCH states
    for options, found in zip(kernels, every, strict=True):
        assert found["spilled"] == 0, options
        assert found["registers"] <= 255, options
        assert found["shared"] == 0, options
        assert found["steps"] == [], options  # no shuffle, no barrier


def test_walk_kernels_fit():
    kernels = chosen(FEW_WALKS, WALKS)
    for options, found in zip(kernels, compiled([("walk", *k) for k in kernels]), strict=True):
        assert "C75" not in found["says"], options  # products one after another
        assert found["registers"] * found["threads"] <= 65536, options
        assert found["registers"] <= 168, options
        assert found["shared"] <= 227 * 1024, options
        assert found["spilled"] <= (0 if options[1] >= SMALLEST_GROUP else 768), options
        assert found["steps"].count("wgmma.mma_async") >= 4, options


def test_chunk_kernels_fit():
    kernels = chosen(FEW_CHUNKS, CHUNKS)
    for options, found in zip(kernels, compiled([("chunks", *k) for k in kernels]), strict=True):
        assert "C75" not in found["says"], options  # products one after another
        assert found["registers"] * found["threads"] <= 65536, options
        assert found["registers"] <= 168, options
        assert found["shared"] <= 227 * 1024, options
        assert found["spilled"] <= 16, options  # two numbers that the producer loads for an item
        assert found["steps"].count("wgmma.mma_async") == 2 * (8 + 8 + 8), options  # S; halves of o


def test_scores_of_pages_of_a_serving_engine_fit():
    """Rows of the table have names, and queries have 8 bits, as in engines (`msa.serving`)."""
    kernels = [("float8_e4m3fn", q_dtype, 128, 128, 4, named)
               for q_dtype, named in (("float8_e4m3fn", False), ("bfloat16", True))]  # fmt: skip
    for options, found in zip(kernels, compiled([("pages", *k) for k in kernels]), strict=True):
        assert (found["spilled"], found["registers"] <= 80) == (0, True), options
        assert "C75" not in found["says"], options


def test_scores_of_pages_fit():
    """The usual ones beside a program of the next kernel, which is set up at the same time."""
    kernels = chosen(FEW_PAGES, PAGES)
    for options, found in zip(kernels, compiled([("pages", *k) for k in kernels]), strict=True):
        assert found["spilled"] == 0, options
        assert "C75" not in found["says"], options
        eight, rows = options[0] == "float8_e4m3fn", options[-1]
        assert found["registers"] <= (128 if eight and rows > 8 else 80 if eight else 64), options
        assert found["threads"] == 256, options
        assert found["shared"] <= SHARED_WITH_ATTENTION * 1024, options
        assert not found["constants"], options  # see `load_queries`
        *_, dim, block_size, _ = options
        products = block_size // 64 * dim * (1 if eight else 2) // 32
        products *= 2 if eight and rows <= 8 else 1  # two pages at a time
        assert found["steps"].count("wgmma.mma_async") == products, options


def test_loss_kernels_fit():
    kernels = chosen(FEW_LOSSES, LOSSES)
    for options, found in zip(kernels, compiled([("loss", *k) for k in kernels]), strict=True):
        assert "C75" not in found["says"], options  # products one after another
        assert found["registers"] * found["threads"] <= 65536, options
        assert found["registers"] <= 96, options  # 20 warps; setmaxnreg then moves registers
        assert found["shared"] <= 227 * 1024, options
        assert found["spilled"] <= 384, options  # numbers of an item, outside of the inner loops
        assert found["steps"].count("wgmma.mma_async") >= 64 + 16, options
        loads = [i for i, step in enumerate(found["steps"]) if step == "ldmatrix"]
        assert loads
        for i in loads:  # keys are given back after a product has read them
            steps = [s for s in found["steps"][i:] if s in ("wgmma.mma_async", "mbarrier.arrive")]
            assert steps[0] == "wgmma.mma_async"


def test_key_gradient_kernels_fit():
    """Of each consumer: four products, in which a wait of the assembler's own would be C7517."""
    kernels = chosen(FEW_KEYS, KEYS)
    for options, found in zip(kernels, compiled([("keys", *k) for k in kernels]), strict=True):
        assert "C75" not in found["says"], options
        assert found["registers"] * found["threads"] <= 65536, options
        assert found["registers"] <= 168, options
        assert found["shared"] <= 227 * 1024, options
        assert found["spilled"] == 0, options
        assert found["steps"].count("wgmma.mma_async") == 2 * (8 + 8 + 4 + 4), options


def test_query_gradient_kernels_fit():
    kernels = chosen(FEW_QUERIES, QUERIES)
    found = compiled([("queries", *k) for k in kernels])
    for options, facts in zip(kernels, found, strict=True):
        assert "C75" not in facts["says"], options  # products one after another
        assert facts["registers"] * facts["threads"] <= 65536, options
        assert facts["registers"] <= 168, options
        assert facts["shared"] <= 227 * 1024, options
        assert facts["spilled"] <= 512, options  # numbers of an item, outside of the inner loop
        assert facts["steps"].count("wgmma.mma_async") >= 6 * 8, options
