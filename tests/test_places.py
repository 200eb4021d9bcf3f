"""Where a call runs, tested on a CPU: the guards of entries, and the tables between calls.

Tensors that claim to be on a GPU replace CUDA. Other tests are in test_places_gpu.
"""

from __future__ import annotations

import ast
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import msa
from msa import checks, triton_impl
from msa.ir import Selection, Sequences
from msa.triton_impl import places, tables
from msa.triton_impl.places import device_table, on_its_device, tensors_of

PACKAGE = Path(msa.__file__).parent
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
MAKERS = {
    "tensor", "as_tensor", "from_numpy", "empty", "zeros", "ones", "full", "arange", "randn",
    "stack", "cat", "clone", "to", "cuda", "to_device",
}  # fmt: skip


def decorators(function):
    """Names of the decorators, without their arguments."""
    calls = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {d.attr if isinstance(d, ast.Attribute) else d.id for d in calls}


def functions(path):
    """Every function of a file, methods and inner functions too."""
    return [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)]


# -- rules for the source -------------------------------------------------------------------------
def test_no_tensor_is_kept_but_by_device_table():
    """functools caches must not hold tensors, since any stream could get one at any time."""
    kept = 0
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        step = path.name == "step_sequences.py"  # its tables live as long as a step, on one stream
        assert step or "pin_memory" not in text, path
        if path != PACKAGE / "selection.py":  # pageable: CUDA reads it before it returns
            assert step or "non_blocking" not in text, path
        if "cache" not in text and "to_device" not in text:
            continue
        for function in functions(path):
            names = decorators(function)
            called = {
                c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", "")
                for c in ast.walk(function)
                if isinstance(c, ast.Call)
            }
            if "to_device" in called and not step:
                assert "device_table" in names, (path, function.name)
            # a case of the conformance kit, and the stream of the demo, hold NumPy arrays
            numpy_alone = {"conformance", "demo"} & {*path.relative_to(PACKAGE).parts[:-1]}
            if names & {"lru_cache", "cache", "cached_property"} and not numpy_alone:
                kept += 1
                assert not called & MAKERS, (path, function.name, called & MAKERS)
                returns = ast.unparse(function.returns) if function.returns else ""
                assert "Tensor" not in returns, (path, function.name)
    assert kept >= 3


def test_every_entry_has_the_guard():
    """The functions of the backend, and its autograd functions that operators call."""
    guarded = {
        (path.stem, function.name)
        for path in (PACKAGE / "triton_impl").glob("*.py")
        for function in functions(path)
        if "on_its_device" in decorators(function)
    }
    entries = {
        (getattr(triton_impl, name).__module__.rpartition(".")[2], name)
        for name in triton_impl.__all__
    }
    assert entries <= guarded
    for path in (PACKAGE / "triton_impl").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "Function" in ast.unparse(node.bases or node):
                for half in (f for f in node.body if isinstance(f, ast.FunctionDef)):
                    assert "on_its_device" in decorators(half), (path, half.name)


def test_devices_are_asked_for_by_name():
    """The backend never uses the current device in place of a tensor's device."""
    asks = ("get_device_properties", "get_device_capability", "get_device_name", "synchronize")
    for path in (PACKAGE / "triton_impl").glob("*.py"):
        for call in (c for c in ast.walk(ast.parse(path.read_text())) if isinstance(c, ast.Call)):
            if ast.unparse(call.func) in {f"torch.cuda.{name}" for name in asks}:
                assert call.args, (path, ast.unparse(call))


# -- the guard ------------------------------------------------------------------------------------
class OnSecond(torch.Tensor):
    """A tensor that claims to be on the second GPU."""

    is_cuda, device = True, SECOND


class Recorded(torch.Tensor):
    """A tensor that records which streams read it."""

    def record_stream(self, stream):
        self.readers = [*getattr(self, "readers", []), stream.cuda_stream]


@pytest.fixture
def entered(monkeypatch):
    """The devices that were made current, and then left."""
    seen = []

    @contextmanager
    def device(wanted):
        seen.append(wanted)
        yield
        seen.append(None)

    monkeypatch.setattr(torch.cuda, "device", device)
    return seen


def on_second(*shape):
    return torch.zeros(shape, dtype=torch.int32).as_subclass(OnSecond)


def test_the_guard_finds_the_first_tensor(entered):
    run = on_its_device(lambda *args, **options: list(entered))
    chosen = Selection(on_second(1, 1, 1), Sequences.one(1, 1), 16)
    for args, options in (
        ((on_second(1),), {}), ((None, 3, on_second(1)), {}), ((), {"q": on_second(1)}),
        ((chosen,), {}), ((object(), chosen), {}),
    ):  # fmt: skip
        entered.clear()
        assert run(*args, **options) == [SECOND]
        assert entered == [SECOND, None]
    for args in ((torch.ones(1),), (torch.ones(1), on_second(1)), (None, 1), ()):
        entered.clear()
        assert run(*args) == entered == []


def test_a_guard_ends_with_an_error(monkeypatch):
    depth = []

    class Device:
        def __init__(self, wanted):
            depth.append(wanted)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            depth.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)

    @on_its_device
    def fail(x):
        assert depth == [SECOND]
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail(on_second(1))
    assert not depth


def test_capture_is_asked_about_on_the_tensors_device(entered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: entered[-1] == SECOND)
    monkeypatch.setattr(OnSecond, "__module__", "torch")  # which is how a tensor is told
    assert checks.is_captured(on_second(1))
    assert not checks.is_captured(torch.ones(1))


# -- tables ---------------------------------------------------------------------------------------
class Stream:
    """A stream by its number."""

    def __init__(self, number):
        self.cuda_stream = number

    def synchronize(self):
        """A stream on which nothing runs."""


class Device:
    """The answers of torch.cuda, for the current thread."""

    def __init__(self):
        self.capturing, self.stream, self.current = False, Stream(1), 0


@pytest.fixture
def cuda(monkeypatch):
    """The functions of a GPU that tables use."""
    state, main = Device(), threading.get_ident()

    def here():
        return threading.get_ident() == main

    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: state.capturing and here()
    )
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: state.stream if here() else Stream(0)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(places, "copy_stream", lambda device: None)
    monkeypatch.setattr(places, "IN_GRAPHS", {})
    return state


@pytest.fixture
def made():
    """The tables that were made: number, device, and whether inference mode was on."""
    return []


@pytest.fixture
def table(made):
    @device_table
    def numbered(number: int, device: torch.device) -> torch.Tensor:
        made.append((number, device, torch.is_inference_mode_enabled()))
        return torch.full((2,), number).as_subclass(Recorded)

    return numbered


def test_a_table_is_made_once_for_each_device(cuda, made, table):
    first, again, second = table(3, FIRST), table(3, FIRST), table(3, SECOND)
    assert first is again and first is not second
    assert table(3, torch.device("cuda")) is first
    cuda.current = 1
    assert table(3, torch.device("cuda")) is second
    assert [device for _, device, _ in made] == [FIRST, SECOND]
    table.cache_clear()
    assert table(3, FIRST) is not first


def test_each_stream_that_reads_a_table_is_noted_once(cuda, table):
    for number in (5, 5, 7, 5, 7):
        cuda.stream = Stream(number)
        kept = table(1, FIRST)
    assert kept.readers == [5, 7]


def test_no_table_is_made_during_capture(cuda, made, table):
    cuda.capturing = True
    with pytest.raises(ValueError, match=r"cu_seqlens .* before a CUDA graph is captured"):
        table(1, FIRST)
    assert not made
    cuda.capturing = False
    eager = table(1, FIRST)
    cuda.capturing = True
    assert table(1, FIRST) is eager  # and not refused a second time


def test_what_a_graph_reads_is_never_dropped(cuda, table):
    in_graph = table(0, FIRST)
    cuda.capturing = True
    table(0, FIRST)
    cuda.capturing = False
    for number in range(1, places.TABLES + 2):
        table(number, FIRST)
    assert next(iter(places.IN_GRAPHS.values())).thing is in_graph
    assert len(places.IN_GRAPHS) == 1
    assert table(0, FIRST) is not in_graph  # the cache has dropped it


def test_inference_mode_and_pools_do_not_reach_a_table(cuda, made, table):
    with torch.inference_mode():
        kept = table(1, FIRST)
    assert made == [(1, FIRST, False)]
    assert not kept.is_inference()


def test_an_error_of_a_table_reaches_the_caller_and_is_not_kept(cuda):
    tries = []

    @device_table
    def failing(device: torch.device) -> torch.Tensor:
        tries.append(device)
        raise ValueError("no memory")

    for _ in range(2):
        with pytest.raises(ValueError, match="no memory"):
            failing(FIRST)
    assert tries == [FIRST, FIRST]


def test_threads_that_miss_at_once(cuda):
    wait = threading.Barrier(4)

    @device_table
    def slow(number: int, device: torch.device) -> torch.Tensor:
        return torch.full((2,), number).as_subclass(Recorded)

    found, errors = [], []

    def call():
        try:
            wait.wait(10)
            found.append([slow(i, FIRST)[0].item() for i in range(20)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and found == [list(range(20))] * 4


def test_tables_on_the_cpu():
    one, cpu = Sequences.one(3, 5), torch.device("cpu")
    assert tables.query_table(one, 16, cpu) is tables.query_table(Sequences.one(3, 5), 16, cpu)
    assert tables.query_table(one, 16, cpu).tolist() == [[2, 3, 4], [2, 3, 4], [0, 0, 0]]


def test_tensors_of_forms():
    x, ids = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int32)
    found = tensors_of(msa.Output(x, x[0], Selection(ids, Sequences.one(1, 1), 16)))
    assert [t.shape for t in found] == [(1, 1, 1), (1, 1), (1, 1, 1)] and found[2] is ids
    assert tensors_of([x]) == tensors_of(Selection) == []
