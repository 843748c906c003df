"""tools/check_sass.py refuses what it must: with made-up machine code, so without a CUDA compiler."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = (
    "_ZN8micromix9blackwell9mx_linearINS0_4TileILi16ELi64ELi1ELi2ELi4ELi128ELi8EEE"
    "NS0_7FormatsILNS0_7ElementE{six}ELb{mxfp4}EEEEEvNS0_15LinearArgumentsE"
)
TILE = (16, 64, 1, 2, 4, 128, 8)


@pytest.fixture
def check_sass(monkeypatch, tmp_path):
    """The tool, over a library of the four kernels of one tile; `check_sass.kernels` changes them."""
    spec = importlib.util.spec_from_file_location("check_sass", ROOT / "tools" / "check_sass.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_sass", tool)  # dataclasses looks there
    spec.loader.exec_module(tool)
    tool.kernels = {
        architecture: [
            tool.Kernel(NAME.format(six=six, mxfp4=mxfp4), 100, 0, 0, Counter(instructions))
            for six, mxfp4 in ((1, 0), (1, 1), (2, 0), (2, 1))
            for instructions in [tool.expected_instructions(tool.ELEMENTS[six], bool(mxfp4))]
        ]
        for architecture in tool.NATIVE
    }
    library = tmp_path / "libmicromix_cuda.so"
    library.touch()
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "LIBRARY", library)
    monkeypatch.setattr(tool, "PAGE", tmp_path / "sass.md")
    monkeypatch.setattr(tool, "architectures", lambda: list(tool.kernels))
    monkeypatch.setattr(tool, "kernels_of", lambda architecture: tool.kernels[architecture])
    monkeypatch.setattr(tool, "shared_bytes", lambda: {TILE: 88064})
    monkeypatch.setattr(tool, "tool", lambda name: name)
    monkeypatch.setattr(tool, "output_of", lambda *_, **__: "release 13.0, V13.0.88")
    return tool


def run(tool, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["check_sass", *arguments])
    return tool.main()


def test_a_page_is_written_and_then_holds(check_sass, monkeypatch):
    assert run(check_sass, monkeypatch, "--write") == 0
    assert "| 16 x 64 | E3M2 | mxfp4 | 100 | 88064 | 1 | 2 |" in check_sass.PAGE.read_text()
    assert run(check_sass, monkeypatch) == 0


def test_other_registers_than_the_page_says_are_an_error(check_sass, monkeypatch, capsys):
    run(check_sass, monkeypatch, "--write")
    check_sass.kernels["sm_121a"][0].registers = 101
    assert run(check_sass, monkeypatch) == 1
    captured = capsys.readouterr()
    assert "| 100 / 101 |" in captured.out and "make check-sass WRITE=1" in captured.err


def a_spill(kernels):
    kernels["sm_120a"][1].local_accesses = 2


def a_stack(kernels):
    kernels["sm_90a"] = [kernels["sm_120a"][0].__class__("mx_quantize", 40, local_bytes=16)]


def an_early_load(kernels):
    kernel = kernels["sm_120a"][0].__class__("rows_kernel", 40)
    kernel.waits, kernel.early_accesses = True, 1
    kernels["sm_90a"] = [kernel]


def a_lost_wait(kernels):
    kernels["sm_90a"] = [kernels["sm_120a"][0].__class__("rows_kernel", 40, early_accesses=3)]


def registers_that_are_not_there(kernels):
    kernels["sm_90a"] = [kernels["sm_120a"][0].__class__("rows_kernel", 80, kept=24, got=112)]


def no_instructions(kernels):
    kernels["sm_120a"][2].matrix.clear()


def another_instruction(kernels):
    kernels["sm_121a"][3].matrix["HMMA.16816.F32"] = 1


def a_missing_kernel(kernels):
    kernels["sm_121a"].pop()


def no_native_code(kernels):
    kernels["sm_90a"] = []
    del kernels["sm_120a"], kernels["sm_121a"]


@pytest.mark.parametrize(
    "plant, message",
    [
        (a_spill, "2 accesses"),
        (a_stack, "mx_quantize: 16 bytes of local memory"),
        (an_early_load, "rows_kernel: 1 accesses to global memory before the wait"),
        (a_lost_wait, "rows_kernel: 3 accesses to global memory before a wait"),
        (registers_that_are_not_there, "rows_kernel: waits for registers for ever"),
        (no_instructions, r"has \[\], not"),
        (another_instruction, "HMMA"),
        (a_missing_kernel, "sm_121a: 1 linear kernels are missing"),
        (no_native_code, "no code for sm_120a or sm_121a"),
    ],
)
def test_a_fault_is_an_error(check_sass, plant, message):
    plant(check_sass.kernels)
    with pytest.raises(check_sass.CheckError, match=message):
        check_sass.check()


def test_accesses_before_the_wait_are_found(check_sass):
    """Shared memory is no such access, nor is a line that is only asked for."""
    kernels = {name: check_sass.Kernel(name) for name in ("late", "early", "alone", "stores")}
    lines = (
        "Function : late", "ACQBULK ;", "@!P1 LDG.E.128 R12, desc[UR10][R2.64] ;", "STL [R1], R0 ;",
        "Function : early", "LDG.E.128.CONSTANT R4, desc[UR10][R2.64] ;", "ACQBULK ;", "LDG.E R0 ;",
        "Function : alone", "LDG.E.128 R4, desc[UR10][R2.64] ;", "HMMA.1688.F32.BF16 R8, R4, R5 ;",
        "Function : stores", "STS [R1], R0 ;", "LDS R1, [R0] ;", "CCTL.E.PF2 [R2.64] ;", "UBLKCP.S.G [UR8], [UR4], UR6 ;",
        "@P0 STG.E desc[UR4][R2.64], R0 ;", "ST.E desc[UR4][R2.64], R0 ;", "ACQBULK ;", "RED.E.ADD [R2.64], R0 ;",
    )  # fmt: skip
    check_sass.read_machine_code("\n".join(lines), kernels)
    late, early, alone, stores = kernels.values()
    assert (late.waits, late.early_accesses, late.local_accesses) == (True, 0, 1)
    assert (early.waits, early.early_accesses) == (True, 1)
    assert (alone.waits, alone.early_accesses) == (False, 1)
    assert alone.matrix == Counter({"HMMA.1688.F32.BF16": 1})
    assert (stores.waits, stores.early_accesses) == (True, 3)


def test_registers_that_change_hands_are_found(check_sass):
    kernels = {"copies": check_sass.Kernel("copies", 80)}
    lines = (
        "Function : copies",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x68 ;",
        "USETMAXREG.DEALLOC.CTAPOOL 0x18 ;",
    )
    check_sass.read_machine_code("\n".join(lines), kernels)
    assert (kernels["copies"].kept, kernels["copies"].got) == (24, 104)


def test_no_library_is_a_clear_error(check_sass, monkeypatch, capsys):
    check_sass.LIBRARY.unlink()
    assert run(check_sass, monkeypatch) == 1
    assert "run make cuda" in capsys.readouterr().err
