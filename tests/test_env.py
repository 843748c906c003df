"""python -m micromix_compile.env."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from micromix_compile import env, ops


def test_json_names_versions_devices_and_kernels(capsys):
    assert env.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"]["cpu"] == ops.kernel_name("cpu")
    assert facts["extension"]["loaded"] == ops.loaded()
    assert facts["extension"]["build_id"] == ops.build_id()
    assert facts["cuda extension"]["loaded"] == bool(ops.cuda_build_info())


def test_table_has_the_same_facts(capsys):
    assert env.main([]) == 0
    text = capsys.readouterr().out
    for fact in (torch.__version__, ops.kernel_name("cpu"), ops.build_id()):
        assert fact in text


@pytest.mark.skipif(not ops.loaded(), reason="the extension was not built")
def test_a_bad_setting_is_one_line_and_an_exit_code():
    result = subprocess.run(
        [sys.executable, "-m", "micromix_compile.env"],
        env={**os.environ, "MICROMIX_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: MICROMIX_CPU_ISA names no instruction set")


@pytest.mark.parametrize(
    "atoms, format, name",
    [
        ("native", 0, "cuda_sm120"),
        ("native", ops.EMULATED, "cuda_sm120"),
        ("emulated", 0, "cuda_decoded"),
        ("emulated", ops.EMULATED, "mx_emulated"),
        ("none", 0, "reference"),
    ],
)
def test_the_kernel_of_a_gpu_has_a_name(monkeypatch, atoms, format, name):
    monkeypatch.setattr(ops._extension, "_cuda_atoms", lambda device: atoms)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert ops.kernel_name("cuda:0", format) == name


def test_why_a_gpu_runs_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device = torch.device("cuda:0")
    monkeypatch.setattr(ops._extension, "_cuda_info", {})
    assert "make cuda" in ops._extension.why_reference(device)
    monkeypatch.setattr(ops._extension, "_cuda_info", {"architectures": "80,90a"})
    reason = ops._extension.why_reference(device)
    assert "80,90a" in reason and "capability 7.5" in reason
