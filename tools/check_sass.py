"""``make check-sass``: what nvcc made of the CUDA kernels, asserted without a GPU.

Disassembles libmicromix_cuda.so and checks that every linear kernel for sm_120a and sm_121a has the
block-scaled matrix instructions of its formats and no other matrix instruction, that no kernel of any
architecture uses local memory (a spill, or an array in memory), that from sm_90 on, where kernels start
before the one before them in the stream ends, each waits for that one before it touches global memory
(those of csrc/cutlass are launched without), and that warpgroups' matrix instructions do not wait for each other, which ptxas does where it sees
something else touch their sums.
Registers, shared memory and counts must be those of docs/sass.md; ``--write`` writes that page.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "micromix_compile" / "_C" / "libmicromix_cuda.so"
PAGE = ROOT / "docs" / "sass.md"
NATIVE = ("sm_120a", "sm_121a")
DISASSEMBLED = ("sm_90a", *NATIVE)
ELEMENTS = ("E2M1", "E2M3", "E3M2", "E4M3")  # by Element of csrc/cutlass/elements.h
PACKED, BYTES = "OMMA.SF.16864.F32.{}.{}.E8", "QMMA.SF.16832.F32.{}.{}.E8"

BLACKWELL = re.compile(r"9blackwell.*mx_")  # not launched early
LINEAR = re.compile(
    r"mx_linear.*TileILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E.*ElementE(\d)ELb(\d)"
)
HEAD = """\
# Machine code

What nvcc {nvcc} makes of the linear kernels for {architectures}, as `make check-sass` finds it in the library
and compares it with this page. No kernel of any architecture uses local memory. OMMA is the block-scaled matrix
instruction of 4-bit codes (16 x 8 x 64), QMMA that of codes in bytes (16 x 8 x 32); shared memory is what a launch asks for.

| rows x columns | MXFP6 | weights | registers | shared memory | OMMA | QMMA |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Kernel:
    name: str
    registers: int = 0
    local_bytes: int = 0
    local_accesses: int = 0
    matrix: Counter = field(default_factory=Counter)
    waits: bool = False  # for the kernel before
    early_accesses: int = 0  # to global memory, before the first wait
    closings: int = 0  # of groups of a warpgroup's matrix instructions
    # What a thread keeps or gets while the kernel runs: of a warpgroup that copies, and of two.
    kept: int = 0
    got: int = 0


class CheckError(Exception):
    pass


def tool(name: str) -> str:
    packaged = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", name)
    found = str(packaged) if packaged.exists() else shutil.which(name)
    if found is None:
        raise CheckError(f"{name} is missing; pip install -r requirements/cuda.txt")
    return found


def output_of(*command: str, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def architectures() -> list[str]:
    listed = output_of(tool("cuobjdump"), "-lelf", str(LIBRARY))
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", listed)))


def kernels_of(architecture: str) -> list[Kernel]:
    """The kernels of one architecture. The disassembly is read only for some."""
    command = (tool("cuobjdump"), "-arch", architecture)
    kernels: dict[str, Kernel] = {}
    usage = output_of(*command, "-res-usage", str(LIBRARY))
    for name, text in re.findall(r"Function (\S+):\n(.*)", usage):
        values = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        kernels[name] = Kernel(name, values["REG"], values["STACK"] + values["LOCAL"])
    if architecture in DISASSEMBLED:
        path = Path(tool("nvdisasm")).parent
        read_machine_code(
            output_of(*command, "-sass", str(LIBRARY), env={"PATH": f"{path}:/usr/bin:/bin"}),
            kernels,
        )
    return list(kernels.values())


def read_machine_code(sass: str, kernels: dict[str, Kernel]) -> None:
    instructions = re.compile(
        r"\b([A-Z]*MMA[.A-Z0-9]*|LDL|STL|LDG|STG|LD|ST|RED|REDG|ATOM|ATOMG|LDGSTS|UBLKCP|ACQBULK|USETMAXREG)\b"
    )
    kernel = None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = kernels[match[1]]
        elif kernel and (match := instructions.search(line)):
            if match[1] in ("LDL", "STL"):
                kernel.local_accesses += 1
            elif match[1] == "ACQBULK":  # griddepcontrol.wait
                kernel.waits = True
            elif match[1] == "USETMAXREG":
                count = int(re.search(r"0x([0-9a-f]+)", line[match.end() :])[1], 16)
                if "DEALLOC" in line:
                    kernel.kept = count
                else:
                    kernel.got = count
            elif "MMA" in match[1]:
                kernel.matrix[match[1]] += 1
                kernel.closings += "gsb0" in line
            else:
                kernel.early_accesses += not kernel.waits


def expected_instructions(six: str, mxfp4: bool) -> set[str]:
    return {PACKED.format("E2M1", "E2M1")} | {
        BYTES.format(a, "E2M1" if mxfp4 else a) for a in (six, "E4M3")
    }


def shared_bytes() -> dict[tuple[int, ...], int]:
    """What each tile asks for, as tiles.h says."""
    program = """
        #include <cstdio>
        #include "cutlass/heuristic.h"
        using namespace micromix::blackwell;
        int main() {
          for (int i = 0; i < kTileCount; ++i)
            with_tile(static_cast<TileId>(i), [](auto t) {
              using T = decltype(t);
              std::printf("%d %d %d %d %d %d %d %d\\n", T::kM, T::kN, T::kWarpsM, T::kWarpsN,
                          T::kWarpsK, T::kRowBytes, T::kStages, T::kSharedBytes);
            });
        }"""
    binary = ROOT / "build" / "shared_bytes"
    binary.parent.mkdir(exist_ok=True)
    flags = ("-std=c++20", "-I", str(ROOT / "csrc"), "-x", "c++", "-", "-o", str(binary))
    output_of(shutil.which("c++") or "g++", *flags, input=program)
    rows = [tuple(map(int, line.split())) for line in output_of(str(binary)).splitlines()]
    return {row[:-1]: row[-1] for row in rows}


def check() -> str:
    """The page, once everything holds. Raises CheckError if something does not."""
    if not LIBRARY.exists():
        raise CheckError(f"{LIBRARY.relative_to(ROOT)} is missing; run make cuda")
    faults: list[str] = []
    rows: dict[tuple, dict[str, Kernel]] = {}
    built = architectures()
    hopper = 0  # kernels with warpgroups' matrix instructions
    for architecture in built:
        for kernel in kernels_of(architecture):
            if kernel.local_bytes or kernel.local_accesses:
                faults.append(
                    f"{architecture} {kernel.name}: {kernel.local_bytes} bytes of local memory, "
                    f"{kernel.local_accesses} accesses"
                )
            if kernel.early_accesses and not BLACKWELL.search(kernel.name):
                faults.append(
                    f"{architecture} {kernel.name}: {kernel.early_accesses} accesses to global memory "
                    f"before {'the' if kernel.waits else 'a'} wait for the kernel before"
                )
            warpgroups = sum(n for i, n in kernel.matrix.items() if i.startswith("HGMMA"))
            hopper += warpgroups > 0
            if 2 * kernel.closings > warpgroups:
                faults.append(f"{architecture} {kernel.name}: matrix instructions are serialized")
            if kernel.kept + 2 * kernel.got > 3 * kernel.registers:
                faults.append(
                    f"{architecture} {kernel.name}: waits for registers for ever: "
                    f"{kernel.kept} and twice {kernel.got} of three times {kernel.registers}"
                )
            match = LINEAR.search(kernel.name)
            if not match or architecture not in NATIVE:
                continue
            *tile, six, mxfp4 = map(int, match.groups())
            wanted = expected_instructions(ELEMENTS[six], bool(mxfp4))
            if set(kernel.matrix) != wanted:
                faults.append(
                    f"{architecture} {kernel.name}: has {sorted(kernel.matrix)}, not {sorted(wanted)}"
                )
            rows.setdefault((*tile, six, mxfp4), {})[architecture] = kernel
    shared = shared_bytes()
    for architecture in NATIVE:
        missing = 4 * len(shared) - sum(architecture in row for row in rows.values())
        if architecture in built and missing:
            faults.append(f"{architecture}: {missing} linear kernels are missing")
    if "sm_90a" in built and not hopper:
        faults.append("sm_90a: no kernel has warpgroups' matrix instructions")
    if not rows:
        faults.append(f"the library has no code for {' or '.join(NATIVE)}, only for {built}")
    if faults:
        raise CheckError("\n".join(faults))

    release = re.search(r"V([\d.]+)", output_of(tool("nvcc"), "--version"))
    page = HEAD.format(nvcc=release[1], architectures=" and ".join(NATIVE))
    for key, found in sorted(rows.items()):
        *tile, six, mxfp4 = key
        columns = (
            [kernel.registers for kernel in found.values()],
            [sum(n for i, n in k.matrix.items() if i.startswith("OMMA")) for k in found.values()],
            [sum(n for i, n in k.matrix.items() if i.startswith("QMMA")) for k in found.values()],
        )
        registers, omma, qmma = (" / ".join(map(str, dict.fromkeys(c))) for c in columns)
        page += (
            f"| {tile[0]} x {tile[1]} | {ELEMENTS[six]} | {'mxfp4' if mxfp4 else 'match'} | {registers} "
            f"| {shared[tuple(tile)]} | {omma} | {qmma} |\n"
        )
    return page


def main() -> int:
    parser = argparse.ArgumentParser(prog="make check-sass", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/sass.md")
    arguments = parser.parse_args()
    try:
        page = check()
        if arguments.write:
            PAGE.write_text(page)
        elif PAGE.read_text() != page:
            sys.stdout.write(page)
            raise CheckError(
                "the machine code is not what docs/sass.md says; if that is as it should be: "
                "make check-sass WRITE=1, and commit the page"
            )
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
