"""The file of a package: torch's own archive of compiled graphs, with two parts more.

The weights lie in it once for all graphs, as bytes that are read straight into memory; a manifest says what they are,
what the graphs take and give, and what the code was made for. `csrc/runner`, which reads no JSON, has it as lines.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from micromix_compile import _torch_compat as compat
from micromix_compile.errors import FileVersionError, MicroMixError, PackageError
from micromix_compile.files import atomically
from micromix_compile.ops import ABI, build_id
from micromix_compile.plan import ModelPlan

__all__ = [
    "MANIFEST",
    "Archive",
    "Entry",
    "as_size",
    "dtype_name",
    "this_machine",
    "write_package",
]

FORMAT = 2
ALIGNMENT = 64  # of each weight in the blob: what the kernels want of a placed weight
MANIFEST, WEIGHTS, RUNNER, TOKENIZER = (
    "extra/micromix.json",
    "extra/weights.bin",
    "extra/runner.txt",
    "extra/tokenizer/",
)
TEMPLATES = "additional_chat_templates"  # transformers' name of the folder
_HUGE_PAGE = 2 << 20
_MEMBER = re.compile(
    r"(data/aotinductor/[\w-]+/[\w.-]+\.(cpp|so|o|json|cubin)|archive_(format|version)|byteorder|\.data/\w+"
    r"|extra/(weights\.bin|runner\.txt)|extra/tokenizer/[\w.-]+\.(json|txt|model|jinja)"
    rf"|extra/tokenizer/{TEMPLATES}/[\w .-]+\.jinja)"
)


@dataclass(eq=False)
class Entry:
    """One compiled graph: its files, the constants it reads, and its manifest."""

    files: list[str]
    constants: dict[str, Tensor]
    manifest: dict[str, Any]


def write_package(
    path: str | os.PathLike,
    entries: Mapping[str, Entry],
    plan: ModelPlan,
    decoder: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Write the archive: compiled graphs by name, their weights once, and the manifest. Atomic.

    `decoder`: what DecoderPackage reads; None for other models. `tokenizer`: one of transformers. Raises OSError.
    """
    path = Path(path)
    blob = _Blob()
    for entry in entries.values():
        entry.manifest["weights"] = {
            name: blob.add(tensor) for name, tensor in sorted(entry.constants.items())
        }
    device = next((w.device for w in blob.tensors), torch.device("cpu"))
    manifest = {
        "format": FORMAT,
        **this_machine(device),
        "plan_digest": plan.digest,
        "recipe": plan.recipe,
        "weight_bytes": blob.bytes,
        "weights": blob.index,
        "entries": {name: entry.manifest for name, entry in entries.items()},
        "decoder": decoder,
    }

    def write(temporary: Path) -> None:
        # torch calls the folder within an archive as the file: one name makes equal packages equal files.
        with tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
            made = Path(folder, "model.pt2")
            compat.write_aoti_archive(str(made), {n: e.files for n, e in entries.items()})
            os.replace(made, temporary)
        with zipfile.ZipFile(temporary, "a", zipfile.ZIP_STORED) as archive:
            root = archive.namelist()[0].split("/")[0]
            digests = {name: _digest(archive, name) for name in archive.namelist()}

            def add(name: str, data: bytes) -> None:
                _write_member(archive, f"{root}/{name}", [data])
                digests[f"{root}/{name}"] = hashlib.sha256(data).hexdigest()

            _write_member(archive, f"{root}/{WEIGHTS}", blob.parts())
            digests[f"{root}/{WEIGHTS}"] = _digest(archive, f"{root}/{WEIGHTS}")
            checksum = _checksum(archive, f"{root}/{WEIGHTS}")
            add(RUNNER, _for_the_runner(manifest, checksum).encode())
            if tokenizer is not None:
                for name, data in _tokenizer_files(tokenizer):
                    add(TOKENIZER + name, data)
            manifest["members"] = digests
            _write_member(archive, f"{root}/{MANIFEST}", [json.dumps(manifest).encode()])

    atomically(path, write)


def this_machine(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on, of the machine and the software that run now."""
    from micromix_compile import __version__
    from micromix_compile.env import cpu_flags  # here: runpy warns if `python -m` finds it imported

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return {
        "library_version": __version__,
        "abi": ABI,
        "build_id": build_id(),
        "torch": torch.__version__.partition("+")[0],
        "device": device.type,
        "cuda_capability": capability and list(capability),
        "cpu_flags": sorted(cpu_flags()),
    }


class _Blob:
    """The weights of all graphs, one after the other, each once: what Inductor gives may be a copy for each graph."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.index: list[dict[str, Any]] = []
        self.bytes = 0
        self._number: dict[tuple[str, str], int] = {}

    def add(self, tensor: Tensor) -> int:
        facts = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
        }
        key = (hashlib.sha256(_memory_of(tensor)).hexdigest(), json.dumps(facts))
        if key not in self._number:
            self._number[key] = len(self.index)
            self.tensors.append(tensor)
            self.index.append({**facts, "offset": self.bytes})
            self.bytes += -(-_span(tensor) // ALIGNMENT) * ALIGNMENT
        return self._number[key]

    def parts(self) -> Iterator[Any]:
        for tensor in self.tensors:
            yield _memory_of(tensor)
            yield bytes(-_span(tensor) % ALIGNMENT)


def _memory_of(tensor: Tensor) -> Any:
    """The bytes from a tensor's first element to its last, as a buffer."""
    flat = tensor.as_strided((_span(tensor) // tensor.element_size(),), (1,))
    return flat.cpu().contiguous().view(torch.uint8).numpy()


def _span(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _write_member(archive: zipfile.ZipFile, name: str, parts: Any) -> None:
    info = zipfile.ZipInfo(name)  # of 1980: equal packages are equal files
    with archive.open(info, "w", force_zip64=True) as member:
        for part in parts:
            member.write(part)


def _digest(archive: zipfile.ZipFile, name: str) -> str:
    digest = hashlib.sha256()
    with archive.open(name) as member:
        while block := member.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(archive: zipfile.ZipFile, name: str) -> str:
    """The sum over a member's 8-byte words of word * (2 * index + 1), modulo 2^64: quick for the runner to make again.

    torch's reader of archives does not look at their CRC.
    """
    total, first = 0, 0
    with archive.open(name) as member:
        while block := member.read(1 << 20):
            words = torch.frombuffer(bytearray(block), dtype=torch.int64)
            total += (words * torch.arange(2 * first + 1, 2 * (first + len(words)), 2)).sum().item()
            first += len(words)
    return f"{total % (1 << 64):x}"


def _tokenizer_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        named = Path(folder, TEMPLATES).glob("*.jinja")  # chat templates beside the one by default
        for path in sorted([*Path(folder).iterdir(), *named]):
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def _for_the_runner(manifest: Mapping[str, Any], checksum: str) -> str:
    """The manifest for csrc/runner: one fact a line, words apart by spaces."""
    lines = [f"format {FORMAT}", f"abi {manifest['abi']}", f"torch {manifest['torch']}"]
    lines += [f"device {manifest['device']}", f"bytes {manifest['weight_bytes']}"]
    lines.append(f"checksum {checksum}")
    lines += [f"flag {flag}" for flag in manifest["cpu_flags"]]

    def numbers(values: Sequence[int]) -> str:
        return " ".join(map(str, (len(values), *values)))

    for weight in manifest["weights"]:
        sizes = f"{numbers(weight['shape'])} {numbers(weight['stride'])}"
        lines.append(f"weight {weight['dtype']} {weight['offset']} {sizes}")
    for entry, facts in manifest["entries"].items():
        lines.append(f"entry {entry} {len(facts['inputs'])}")
        for given in facts["inputs"]:
            sizes = [_for_the_runner_size(size) for size in given["shape"]]
            lines.append(f"input {entry} {given['dtype']} {' '.join([str(len(sizes)), *sizes])}")
        lines += [f"constant {entry} {index} {name}" for name, index in facts["weights"].items()]
    if manifest["decoder"]:
        decoder = manifest["decoder"]
        lines.append(
            f"decoder {decoder['batch_size']} {decoder['max_length']} {decoder['vocabulary']}"
        )
        lines += [f"cache {decoder['dtype']} {numbers(shape)}" for shape in decoder["cache"]]
        lines += [f"eos {token}" for token in decoder["eos_token_id"]]
    return "\n".join(lines) + "\n"


def _for_the_runner_size(size: Any) -> str:
    """`= SIZE`, or `SYMBOL smallest largest a b`, largest 0 for no bound: see `export._size`."""
    if isinstance(size, int):
        return f"= {size}"
    number, smallest, largest, factor, constant = size
    return f"{number} {smallest} {largest or 0} {factor} {constant}"


class Archive:
    """The file: its manifest, and its weights in memory. Every member is there and has its digest.

    Raises PackageError and FileVersionError.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._read(archive)
        except MicroMixError:
            raise
        except OSError as error:
            raise PackageError(path=path, reason=error.strerror or str(error)) from error
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            reason = f"it is truncated or damaged, or no archive ({error})"
            raise PackageError(path=path, reason=reason) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"its manifest is damaged ({type(error).__name__}: {error})"
            raise PackageError(path=path, reason=reason) from error

    def _read(self, archive: zipfile.ZipFile) -> None:
        members = archive.infolist()
        names = [member.filename for member in members]
        root = names[0].split("/")[0] if names else ""
        if f"{root}/{MANIFEST}" not in names:
            self._refuse("it was not written by micromix_compile.export")
        size = self.path.stat().st_size
        for member in members:
            inner = member.filename.removeprefix(f"{root}/")
            if inner != MANIFEST and not _MEMBER.fullmatch(inner):
                self._refuse(f"it holds {member.filename!r}, which no package has")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                self._refuse(f"{member.filename} is not stored as it is")
        if len(set(names)) != len(names):
            self._refuse("it holds a part twice")
        manifest = json.loads(archive.read(f"{root}/{MANIFEST}"))
        if as_size(manifest["format"]) > FORMAT:
            raise FileVersionError(
                path=self.path, kind="package", version=manifest["format"], supported=FORMAT
            )
        digests = manifest["members"]
        if digests.keys() != set(names) - {f"{root}/{MANIFEST}"}:
            self._refuse("its parts are not those that its manifest names")
        sizes = {member.filename: member.file_size for member in members}
        weights = f"{root}/{WEIGHTS}"
        for name, digest in digests.items():
            if name == weights:
                self._weights = _memory(sizes[name])
                found = _read_into(archive, name, self._weights)
            else:
                found = hashlib.sha256(archive.read(name)).hexdigest()
            if found != digest:
                self._refuse(f"{name} does not match the digest that was saved with it")
        self.manifest: dict[str, Any] = manifest
        self._tokenizer = [name for name in names if name.startswith(f"{root}/{TOKENIZER}")]

    def _refuse(self, reason: str) -> None:
        raise PackageError(path=self.path, reason=reason)

    def constants(self, device: torch.device) -> list[Tensor]:
        """The weights as tensors over the memory that they were read into; on a GPU copies there, and that memory goes.

        To be called once. Raises ValueError where the manifest contradicts itself.
        """
        manifest, memory = self.manifest, self._weights
        del self._weights
        start, size = _aligned_start(memory), as_size(manifest["weight_bytes"])
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        if size > len(whole) - _HUGE_PAGE:
            raise ValueError("the weights are shorter than the manifest says")
        result = []
        for weight in manifest["weights"]:
            dtype = getattr(torch, weight["dtype"])
            shape = [as_size(n) for n in weight["shape"]]
            stride = [as_size(n) for n in weight["stride"]]
            offset = as_size(weight["offset"])
            span = 0
            if math.prod(shape):
                span = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
            end = offset + span * dtype.itemsize
            if offset % ALIGNMENT or end > size:
                raise ValueError("a weight lies outside of the weights")
            flat = whole[start + offset : start + end].view(dtype)
            tensor = flat.as_strided(shape, stride)
            result.append(tensor.to(device))
        return result

    def tokenizer(self) -> Any:
        """The tokenizer that was saved in the package. Raises PackageError if there is none."""
        if not self._tokenizer:
            self._refuse("there is no tokenizer in it; export it with one")
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(self.path) as archive:
            for name in self._tokenizer:
                file = Path(folder, name.partition(TOKENIZER)[2])
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(archive.read(name))
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _memory(size: int) -> mmap.mmap:
    """Memory for the weights, in huge pages where the system has them: decoding streams all of it for every token.

    A mapping of the file itself would have small pages, and its members are not aligned as kernels want them.
    """
    memory = mmap.mmap(-1, max(1, size) + _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a refusal costs speed only
    return memory


def _read_into(archive: zipfile.ZipFile, name: str, memory: mmap.mmap) -> str:
    """Read a member into memory; returns its digest."""
    digest, start = hashlib.sha256(), _aligned_start(memory)
    view = memoryview(memory)
    with archive.open(name) as member:
        while block := member.read(4 << 20):
            view[start : start + len(block)] = block
            digest.update(block)
            start += len(block)
    return digest.hexdigest()


def _aligned_start(memory: mmap.mmap) -> int:
    """Where the first huge page of some memory begins."""
    return -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE


def as_size(value: Any) -> int:
    """The value, if it is a size or a place that a manifest may name. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no size")
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
