"""Profiles, the GPU marker, the order of tests, NaN in new buffers, and the report at the end.

Nothing of msa may be imported here, because jaxtyping's hook must be installed first.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import os
import random
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.internal.conjecture import providers
from jaxtyping import _import_hook

STARTED = time.monotonic()
CUDA = torch.cuda.is_available()
EXAMPLES = 50
LARGE = 2**31  # bytes of a device that a test of a worker may leave allocated
GARBAGE = 101  # the value in a new integer buffer: larger than every index here, and within int8

os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads from a hub
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    if importlib.util.find_spec("triton"):
        importlib.import_module("quick_interpreter").quicken()
if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, also for commands that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# jaxtyping's hook wraps every function of a module. Triton reads a kernel's own source and globals,
# so kernels stay as they are; the functions around them are checked.
is_unchecked = _import_hook._is_no_type_check
_import_hook._is_no_type_check = lambda node: (
    is_unchecked(node) or ast.unparse(node).startswith(("triton.jit", "gluon.jit"))
)

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
settings.register_profile(
    "ci", max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=PHASES
)
settings.register_profile(
    "thorough", max_examples=10 * EXAMPLES, deadline=None, phases=PHASES, print_blob=True
)
settings.load_profile("ci")
# Hypothesis draws numbers from the source of modules that are imported: which these are depends on
# the worker and on the order of the tests, and none of it may change what is drawn.
providers.is_local_module_file = lambda path: False


def pytest_addoption(parser):
    orders = "of the tests: slowest (these first), reversed, shuffled:SEED"
    parser.addoption("--order", default="slowest", metavar="ORDER", help=orders)
    parser.addoption("--record", type=Path, metavar="FILE", help="write down what the run found")
    parser.addoption("--record-commit", default="", help="recorded where git is not")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs by itself where there is a CUDA device")
    config.addinivalue_line("markers", "large: takes much of a device, which others then may not")


def pytest_report_header(config):
    return f"order of the tests: {config.option.order}"


def pytest_collection_modifyitems(config, items):
    if not CUDA:
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    items[:] = in_order(items, config.option.order)


def in_order(items, order):
    """The tests in another order. A shuffle keeps those of a file together: they share data."""
    kind, _, seed = order.partition(":")
    if order == "slowest":  # with Triton's interpreter first, so that no worker ends on it
        return sorted(items, key=lambda item: "-triton" not in item.name)
    if order == "reversed":
        return items[::-1]
    if kind == "shuffled" and seed.isdecimal():
        rng, files = random.Random(int(seed)), defaultdict(list)
        for item in items:
            files[item.path].append(item)
        return [item for file in rng.sample(list(files.values()), len(files))
                for item in rng.sample(file, len(file))]  # fmt: skip
    raise pytest.UsageError(f"--order must be slowest, reversed or shuffled:SEED, got {order!r}")


@pytest.fixture(autouse=True)
def one_large_test_at_a_time(request):
    """Let one worker use the device at a time: two tests that need tens of GB do not fit on it."""
    with ExitStack() as stack:
        if CUDA and request.node.get_closest_marker("large"):
            import fcntl

            path = Path(tempfile.gettempdir()) / "msa-large-tests.lock"
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)  # until it is closed
        yield
        if CUDA and torch.cuda.memory_reserved() > LARGE:
            gc.collect()
            torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def ranks():
    """Processes that are the ranks of a gloo group; see `rank_pool.py`."""
    from rank_pool import MOST, RankPool

    pool = RankPool(MOST)
    yield pool
    pool.close()


@pytest.fixture
def as_users_run_it():
    """Switch off the checks of shapes, so that the messages of the library itself are tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def fresh_buffers_hold_garbage():
    """Fill new tensors of torch.empty and others with NaN or a huge integer."""
    patch = pytest.MonkeyPatch()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        patch.setattr(owner, name, _filling(getattr(owner, name)))
    yield
    patch.undo()


def _filling(make):
    def make_and_fill(*args, **options):
        tensor = make(*args, **options)
        if tensor.is_meta or tensor.dtype == torch.bool:
            return tensor
        with torch.no_grad():
            floating = tensor.is_floating_point() or tensor.is_complex()
            return tensor.fill_(torch.nan if floating else GARBAGE)

    return make_and_fill


def pytest_terminal_summary(terminalreporter, config):
    """Print the number of examples of each property and its closest case; write the record.

    With workers, this runs only in the process that started them.
    """
    if config.option.record:
        kinds = {"passed": "passed", "failed": "failed", "errors": "error", "skipped": "skipped"}
        counts = {name: len(terminalreporter.getreports(kind)) for name, kind in kinds.items()}
        seconds = time.monotonic() - STARTED
        importlib.import_module("recording").record(
            config.option.record, counts, seconds, config.option.record_commit
        )
    seen = defaultdict(list)
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for key, value in report.user_properties:
            if key == "examples":
                name, backend, tried, closest = value
                seen[name].append(f"{backend} {tried}{closest}")
    if seen:
        terminalreporter.section("examples that each property saw (worst error / bound)")
        for name in sorted(seen, key=lambda n: (int(n[1:].partition("_")[0]), n)):
            terminalreporter.write_line(f"{name}: {', '.join(seen[name])}")
