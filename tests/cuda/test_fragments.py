"""Which lane holds what: the simulated atoms against CuTe's traits of the native instructions.

This ties the simulator's proof to the machine: what the kernel puts where is where CuTe, which runs on
silicon, has it. Compiled by g++; needs CuTe's headers, which make cuda installs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from .simulator import SOURCES

PACKAGES = Path(sysconfig.get_path("purelib"))
HEADERS = [
    PACKAGES / "cutlass_library" / "source" / "include",
    PACKAGES / "nvidia" / "cu13" / "include",
    PACKAGES / "nvidia" / "cu13" / "include" / "cccl",
]
pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in HEADERS), reason="needs requirements/cuda.txt"
)


def compare(sources: Path, program: Path) -> subprocess.CompletedProcess:
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-w", "-DMICROMIX_SIMULATOR"]
    command += [f"-I{sources}", *(f"-isystem{path}" for path in HEADERS)]
    source = Path(__file__).with_name("fragments.cpp")
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


def test_atoms_take_their_operands_from_where_cute_has_them(tmp_path):
    result = compare(SOURCES, tmp_path / "fragments")
    assert result.returncode == 0 and result.stdout == "0 mismatches\n", result.stdout[:1000]


@pytest.mark.parametrize(
    "before, after",
    [
        ("lanes[(m % 8 * 4 + q) * 8 + half * 2", "lanes[(m % 8 * 4 + 3 - q) * 8 + half * 2"),
        ("(m % 8 * 4 + m / 8) * 8 + 6", "(m % 8 * 4) * 8 + 6"),
        ("code << 2 : code) << (8 * i)", "code : code) << (8 * i)"),
    ],
)
def test_another_arrangement_is_found_out(tmp_path, before, after):
    shutil.copytree(SOURCES, tmp_path / "csrc")
    atoms = tmp_path / "csrc" / "cutlass" / "atoms_simulated.h"
    source = atoms.read_text()
    assert source.count(before) == 1
    atoms.write_text(source.replace(before, after))
    result = compare(tmp_path / "csrc", tmp_path / "fragments")
    assert result.returncode == 1 and result.stdout
