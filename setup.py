"""Builds csrc/ with CMake into micromix_compile/_C/libmicromix.so; all else is in pyproject.toml.

The library uses the LibTorch stable ABI and no Python API, so one wheel serves every CPython and
every torch from 2.11 on.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libmicromix.so"


def build_id() -> str:
    """A hash of everything that the library is built from."""
    digest = hashlib.sha256()
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")]
    for path in sorted(p for p in sources if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        torch = importlib.util.find_spec("torch")  # found, not imported: seconds saved
        if torch is None or torch.origin is None:
            sys.exit("error: torch is needed to build; pip install torch, or see README.md")
        build = Path(self.build_temp, "cmake").absolute()
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        subprocess.run(
            [
                *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
                f"-DTORCH_ROOT={Path(torch.origin).parent}",
                f"-DMICROMIX_BUILD_ID={build_id()}",
                *os.environ.get("MICROMIX_CMAKE_ARGS", "").split(),
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True)
        replace(build / LIBRARY, target)

    def copy_extensions_to_source(self) -> None:
        """An editable install: the library goes into the checkout."""
        for ext in self.extensions:
            filename = self.get_ext_filename(ext.name)
            replace(Path(self.build_lib, filename), ROOT / filename)


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
    ext_modules=[Extension("micromix_compile._C.micromix", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
