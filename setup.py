"""Builds csrc/ with CMake into micromix_compile/_C/; all else is in pyproject.toml.

libmicromix.so has the operators and the CPU kernels. libmicromix_cuda.so has the CUDA kernels; it is
built where the environment says MICROMIX_CUDA=1, for the architectures MICROMIX_CUDA_ARCHITECTURES
(default: all of cmake/cuda.cmake), with the nvcc that CUDACXX names, that of the package
nvidia-cuda-nvcc, or that of the system. It needs no GPU.

The libraries use the LibTorch stable ABI and no Python API, so one wheel serves every CPython and
every torch from 2.11 on.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
PACKAGES = Path(sysconfig.get_path("purelib"))
RUNNER = "micromix_runner"
CUDA = os.environ.get("MICROMIX_CUDA", "0") not in ("", "0")


def build_id() -> str:
    """A hash of everything that the library is built from."""
    digest = hashlib.sha256()
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").rglob("*"), *(ROOT / "csrc").rglob("*")]
    for path in sorted(p for p in sources if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cuda_arguments() -> list[str]:
    """CMake's arguments for the CUDA library."""
    wanted = os.environ.get("CUDACXX")
    found = shutil.which(wanted) if wanted else None
    if wanted and found is None:
        sys.exit(f"error: CUDACXX={wanted} is no program; set it to nvcc's path, or unset it")
    candidates = (
        found,
        PACKAGES / "nvidia" / "cu13" / "bin" / "nvcc",
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    )
    nvcc = next((Path(c) for c in candidates if c and Path(c).exists()), None)
    if nvcc is None:
        sys.exit(
            "error: MICROMIX_CUDA=1 needs nvcc; run `make cuda`, which installs it, or set CUDACXX"
        )
    architectures = os.environ.get("MICROMIX_CUDA_ARCHITECTURES", "").replace(",", " ").split()
    cutlass = PACKAGES / "cutlass_library" / "source" / "include"
    return [
        "-DMICROMIX_CUDA=ON",
        f"-DNVCC={nvcc}",
        f"-DCUTLASS_INCLUDE={cutlass if cutlass.exists() else ''}",
        # Without a wish the default, and not what an earlier build had.
        f"-DMICROMIX_CUDA_ARCHITECTURES={';'.join(architectures)}"
        if architectures
        else "-UMICROMIX_CUDA_ARCHITECTURES",
    ]


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        *directories, name = fullname.split(".")
        return str(Path(*directories, built(name)))

    def build_extension(self, ext: Extension) -> None:
        torch = importlib.util.find_spec("torch")  # found, not imported: seconds saved
        if torch is None or torch.origin is None:
            sys.exit("error: torch is needed to build; pip install torch, or see README.md")
        name = ext.name.split(".")[-1]
        build = Path(self.build_temp, name).absolute()
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        subprocess.run(
            [
                *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
                f"-DTORCH_ROOT={Path(torch.origin).parent}",
                f"-DMICROMIX_BUILD_ID={build_id()}",
                *(cuda_arguments() if name == "micromix_cuda" else []),
                *os.environ.get("MICROMIX_CMAKE_ARGS", "").split(),
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "--target", name], check=True)
        replace(build / built(name), target)

    def copy_extensions_to_source(self) -> None:
        """An editable install: the library goes into the checkout."""
        for ext in self.extensions:
            filename = self.get_ext_filename(ext.name)
            replace(Path(self.build_lib, filename), ROOT / filename)


def built(name: str) -> str:
    """The file that a CMake target makes: a library, or the one program."""
    return name if name == RUNNER else f"lib{name}.so"


def replace(source: Path, target: Path) -> None:
    """Puts a copy at `target` by renaming: a process that has the old library loaded keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_suffix(".new")
    staged.write_bytes(source.read_bytes())
    staged.chmod(0o755)
    staged.replace(target)


class PlatformWheel(bdist_wheel):
    """A wheel for a platform, for any CPython 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(f"micromix_compile._C.{name}", sources=[])
        for name in ("micromix", RUNNER, *(["micromix_cuda"] if CUDA else []))
    ],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
