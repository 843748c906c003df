"""The extension as it is built, installed and loaded; and what happens where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from micromix_compile import ops
from micromix_compile.errors import ExtensionError
from micromix_compile.ops import _extension
from micromix_compile.ops._schemas import SCHEMAS

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(not ops.loaded(), reason="the extension was not built")

# Quantises and multiplies; prints the kernel, the passes package, and a checksum of the result.
PROGRAM = """
    import warnings, torch
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as caught:
        from micromix_compile import ops, passes
        from micromix_compile.mx import MixedLayout
        layout = MixedLayout(64, 32, 32)
        counts = (64, 32, 32, layout.code)
        x = torch.arange(5 * 128.0).view(5, 128).sin()
        data, scales = torch.ops.micromix.quantize(x, None, *counts)
        placed = torch.ops.micromix.place_weight(data, scales, *counts)
        assert placed.numel() == ops.placed_bytes(5, *counts)
        for _ in range(2):
            y = torch.ops.micromix.linear(
                data, scales, placed, None, 5, *counts, torch.float32)
    assert torch.allclose(y, x @ x.T, atol=4), y
    print(ops.kernel_name("cpu"), len(caught), *{str(w.message) for w in caught})
"""


def run_program(directory: Path, path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs PROGRAM in a directory, with the package found on a path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_of_package(target: Path) -> Path:
    """A copy of the package, without the extension and with the passes as a folder."""
    ignored = shutil.ignore_patterns("_C", "__pycache__")
    shutil.copytree(ROOT / "micromix_compile", target / "micromix_compile", ignore=ignored)
    return target


@needs_extension
def test_python_and_cpp_schemas_are_equal():
    for name, schema in SCHEMAS.items():
        operator, _, overload = name.partition(".")
        built = getattr(getattr(torch.ops.micromix, operator), overload or "default")._schema
        assert built == torch._C.parse_schema(f"micromix::{name}{schema}"), name


@needs_extension
def test_python_and_cpp_agree_on_the_abi():
    header = (ROOT / "csrc" / "abi.h").read_text()
    assert f"#define MICROMIX_ABI {_extension.ABI}\n" in header
    assert ops.build_info()["abi"] == str(_extension.ABI)


@needs_extension
def test_another_abi_is_refused(monkeypatch):
    monkeypatch.setattr(_extension, "ABI", _extension.ABI + 1)
    message = (
        f"libmicromix.so .* build {ops.build_info()['build_id']} with ABI version .*Rebuild it"
    )
    with pytest.raises(ExtensionError, match=message):
        _extension._checked_info(_extension.LIBRARY, "build_info")


@needs_extension
def test_another_schema_is_refused(monkeypatch):
    monkeypatch.setitem(_extension.SCHEMAS, "place_weight", "(Tensor data) -> Tensor")
    with pytest.raises(ExtensionError, match="the operator is micromix::place_weight"):
        _extension._check_schemas()


def test_a_broken_library_is_a_clear_error(tmp_path):
    copy_of_package(tmp_path)
    (tmp_path / "micromix_compile" / "_C").mkdir()
    (tmp_path / "micromix_compile" / "_C" / "libmicromix.so").write_bytes(
        b"\x7fELF, but not really"
    )
    result = run_program(tmp_path, tmp_path)
    assert result.returncode == 1
    assert "ExtensionError" in result.stderr and "does not load into torch" in result.stderr
    assert "Rebuild it" in result.stderr


def test_without_the_extension_the_reference_runs_and_one_warning_says_so(tmp_path):
    result = run_program(tmp_path, copy_of_package(tmp_path))
    assert result.returncode == 0, result.stderr
    kernel, warnings, message = result.stdout.split(maxsplit=2)
    assert (kernel, warnings) == ("reference", "1")
    assert "the extension was not built" in message and "make install" in message


@needs_extension
def test_an_instruction_set_that_is_not_there_is_a_clear_error():
    result = run_program(ROOT, ROOT, MICROMIX_CPU_ISA="avx1024")
    assert result.returncode == 1
    assert "MICROMIX_CPU_ISA names no instruction set" in result.stderr
    assert "use portable, avx2, avx512, avx512_bf16 or amx" in result.stderr
    result = run_program(ROOT, ROOT, MICROMIX_CPU_ISA="portable")
    assert result.stdout.split()[:2] == ["cpu_portable", "0"], result.stderr


@needs_extension
def test_the_library_uses_neither_python_nor_unstable_torch():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    command = [nm, "-D", "--undefined-only", str(_extension.LIBRARY)]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert any(s.startswith("aoti_torch_") for s in symbols)
    assert not [s for s in symbols if s.startswith(("Py", "_Py")) or "c10" in s or "2at" in s]


@needs_extension
def test_a_wheel_works_away_from_the_checkout(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are sources")
    source = tmp_path / "source"
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.exists() and not name.startswith(("tests/", "docs/", "examples/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    build = ["wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(source)]
    # Optimising takes most of the time, and is no part of what is tested here.
    settings = f"{os.environ.get('MICROMIX_CMAKE_ARGS', '')} -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    environment = {**os.environ, "MICROMIX_CMAKE_ARGS": settings}
    subprocess.run([*pip, *build], env=environment, check=True)
    (wheel,) = wheels.iterdir()
    assert wheel.name.startswith("micromix_compile-") and "-py3-none-" in wheel.name
    install = ["install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True)
    assert (target / "micromix_compile" / "passes" / "__init__.py").exists()
    result = run_program(tmp_path, target)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [ops.kernel_name("cpu"), "0"]
