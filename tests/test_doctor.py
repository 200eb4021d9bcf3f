"""`msa doctor`: its output on machines on which libraries or devices are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from msa import cli, doctor, doctor_trials
from msa.doctor_trials import Device, Finding

BARE = dict.fromkeys(("torch", "cuda", "driver"))
H100 = Device("cuda:0", "NVIDIA H100", "9.0", 79.6)
A100 = Device("cuda:0", "NVIDIA A100", "8.0", 79.3)


def asked(capsys, *words):
    """Return what the command prints; it must succeed."""
    assert cli.main(["doctor", *words]) == 0
    return capsys.readouterr().out


def test_json_tells_versions_devices_and_parts(capsys):
    found = json.loads(asked(capsys, "--json"))
    assert set(found) == {"versions", "devices", "parts"}
    assert {"msa", "python", "platform", "numpy", "torch", "triton", "cuda", "driver"} <= set(
        found["versions"]
    )
    assert found["devices"][0]["name"] == "cpu"
    parts = {part["part"]: part for part in found["parts"]}
    for name in ("reference", "torch on cpu", "operators (msa.ops)"):
        assert parts[name]["runs"] and not parts[name]["reason"]
    assert all(part["runs"] or part["reason"] for part in parts.values())


def test_tables_say_the_same(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    printed = asked(capsys)
    for word in ("numpy", "capability", "reference", "extra verify", "why not, and what to do"):
        assert word in printed


def test_nothing_is_installed(monkeypatch, capsys):
    """The reference runs, every other part says what to install, and the command succeeds."""
    monkeypatch.setattr(doctor, "import_torch", lambda: None)
    monkeypatch.setattr(doctor, "version", lambda library: None)
    monkeypatch.setattr(doctor_trials.importlib.util, "find_spec", lambda module: None)
    parts = {part["part"]: part for part in json.loads(asked(capsys, "--json"))["parts"]}
    assert parts.pop("reference")["runs"]
    assert len(parts) == 6
    for part in parts.values():
        assert not part["runs"] and part["advice"].startswith("pip install 'msa-stack[")


def test_a_torch_that_cannot_be_loaded_is_told(monkeypatch, capsys):
    import importlib

    real = importlib.import_module

    def broken(name, *rest):
        if name == "torch":
            raise OSError("libcudart.so: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    parts = {part["part"]: part for part in json.loads(asked(capsys, "--json"))["parts"]}
    assert parts["reference"]["runs"] and not parts["torch on cpu"]["runs"]
    assert parts["torch on cpu"]["reason"].startswith("OSError: libcudart.so")
    assert parts["torch on cpu"]["advice"] == doctor_trials.REPORT


def test_only_a_trial_imports_a_library():
    code = (
        "import sys, msa.doctor; heavy = {'torch', 'triton', 'transformers', 'rich', 'tyro'} "
        "& set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("versions", "reason", "advice"), [
    ({}, "torch is not installed", "pip install 'msa-stack[torch,triton]'"),
    ({"torch": "2.13"}, "torch 2.13 has no CUDA", "install a build of torch for CUDA"),
    ({"torch": "2.13", "cuda": "13.0"}, "nvidia-smi finds no driver", "NVIDIA driver"),
    ({"torch": "2.13", "cuda": "13.0", "driver": "580"}, "under driver 580", "CUDA_VISIBLE_DEV"),
])  # fmt: skip
def test_why_there_is_no_gpu(versions, reason, advice):
    found = doctor_trials.no_gpu(BARE | versions)
    assert reason in found.reason and advice in found.advice and not found.runs


def told_of(device, monkeypatch, error=None):
    """The parts of one device; each trial succeeds or raises an error."""

    def trial(*_, **__):
        if error is not None:
            raise error

    monkeypatch.setattr(doctor_trials, "attend", trial)
    monkeypatch.setattr(doctor_trials, "decode_eight_bits", trial)
    monkeypatch.setattr(doctor_trials, "select_on_hopper", trial)
    return {found.part: found for found in doctor_trials.parts_on(device)}


def test_parts_of_a_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert all(found.runs for found in told_of(H100, monkeypatch).values())
    parts = told_of(A100, monkeypatch, RuntimeError("fp8e4nv not supported\nmore"))
    assert parts["triton on cuda:0, pages in 8 bits"] == Finding(
        "triton on cuda:0, pages in 8 bits", False, "RuntimeError: fp8e4nv not supported",
        "it needs compute capability 8.9 or AMD's gfx942",
    )  # fmt: skip
    assert parts["triton on cuda:0, bfloat16"].advice == doctor_trials.REPORT
    hopper = parts["triton on cuda:0, hopper selection"]
    assert hopper.advice == "it needs compute capability 9.x"
    early = parts["dependent launch on cuda:0"]
    assert not early.runs and early.reason == "it needs compute capability 9.0, got 8.0"


def test_the_interpreter_is_not_taken_for_the_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    parts = told_of(H100, monkeypatch)
    assert list(parts) == ["torch on cuda:0", "triton on cuda:0"]
    assert parts["triton on cuda:0"].reason == "TRITON_INTERPRET=1 is set"


def test_devices_are_those_of_torch():
    device = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    cuda = SimpleNamespace(device_count=lambda: 1, get_device_properties=lambda i: device)
    cpu, gpu = doctor.devices_of(SimpleNamespace(cuda=cuda))
    assert cpu.name == "cpu" and gpu == Device("cuda:0", "NVIDIA H100", "9.0", 80.0)
    device.multi_processor_count = 132
    device.shared_memory_per_block_optin, device.L2_cache_size = 232448, 50 * 2**20
    _, gpu = doctor.devices_of(SimpleNamespace(cuda=cuda))
    assert (gpu.multiprocessors, gpu.shared_kib, gpu.l2_mib) == (132, 227.0, 50.0)


def test_a_driver_that_does_not_answer_is_no_error(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")

    def late(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(doctor.subprocess, "run", late)
    assert doctor.driver() is None


@pytest.mark.gpu
def test_every_part_runs_on_a_hopper_gpu():
    import torch

    devices = doctor.devices_of(torch)
    for device in devices[1:]:
        if device.capability.startswith("9."):
            assert all(found.runs for found in doctor_trials.parts_on(device))


def test_the_interpreter_runs_the_kernels_here():
    """Tests set TRITON_INTERPRET=1 where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU")
    doctor_trials.attend("triton", "cpu")
