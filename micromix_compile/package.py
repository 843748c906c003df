"""Loading of packages that `micromix_compile.export` wrote.

A package holds compiled code, which runs with the rights of the process that loads it: the digests in it find damage,
not malice. Load packages from whom you would take a program.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from micromix_compile import _torch_compat as compat
from micromix_compile.errors import PackageError, PackageInputError, PackageMismatchError
from micromix_compile.export import (
    ALIGNMENT,
    FORMAT,
    MANIFEST,
    TEMPLATES,
    TOKENIZER,
    WEIGHTS,
    target,
)
from micromix_compile.plan import ModelPlan

__all__ = ["Output", "Package", "load"]

_HUGE_PAGE = 2 << 20
_MEMBER = re.compile(
    r"(data/aotinductor/[\w-]+/[\w.-]+\.(cpp|so|o|json|cubin)|archive_(format|version)|byteorder|\.data/\w+"
    r"|extra/(weights\.bin|runner\.txt)|extra/tokenizer/[\w.-]+\.(json|txt|model|jinja)"
    rf"|extra/tokenizer/{TEMPLATES}/[\w .-]+\.jinja)"
)


def load(path: str | os.PathLike, *, plan: ModelPlan | None = None) -> Package:
    """The package of a file, checked; nothing of it runs before all checks have passed.

    Every part is compared with its digest; torch, this library, the device and the CPU's instruction sets with what
    the code was made for; the plan's digest with that of `plan`, if one is given. The result is called like the model
    that was exported. A causal language model that `export_decoder` wrote has `generate` too.

    Raises PackageError and PackageMismatchError.
    """
    archive = _Archive(path)
    _check_target(path, archive.manifest, plan)
    try:
        constants = _constants(archive.manifest, archive.weights)
        entries = {
            name: _Entry(name, facts, constants, archive)
            for name, facts in archive.manifest["entries"].items()
        }
        if not entries:
            raise ValueError("there is no graph in it")
        if archive.manifest["decoder"] is not None:
            from micromix_compile.decoder import Decoder

            return Decoder(archive, entries)
        return Package(archive, entries)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, PackageError):
            raise
        reason = f"its manifest is damaged ({type(error).__name__}: {error})"
        raise PackageError(path=path, reason=reason) from error


class Package:
    """A loaded package; call it as the model. `plan_digest` is that of the plan it was made with."""

    def __init__(self, archive: _Archive, entries: dict[str, _Entry]) -> None:
        self.path = archive.path
        self.plan_digest: str = archive.manifest["plan_digest"]
        self.weight_bytes: int = archive.manifest["weight_bytes"]
        self.entries = entries

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result for arguments nested as those of the export. Raises PackageInputError."""
        return self.entries["model"](*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.weight_bytes:,} bytes of weights)"


class Output(dict):
    """A result that was a dict, or an object of named fields: `output["logits"]` or `output.logits`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Entry:
    """One compiled graph with its constants."""

    def __init__(
        self, name: str, facts: dict[str, Any], constants: Sequence[Tensor], archive: _Archive
    ) -> None:
        self.inputs = [
            (tuple(i["path"]), getattr(torch, i["dtype"]), i["device"], _sizes(i["shape"]))
            for i in facts["inputs"]
        ]
        self.constants = {tuple(c["path"]): c["value"] for c in facts["constants"]}
        self.positional = [str(n) for n in facts["positional"]]
        self.output = facts["output"]
        weights = {str(fqn): constants[_index(i)] for fqn, i in facts["weights"].items()}
        self._model = compat.AotiModel(os.fspath(archive.path), name)
        if set(self._model.constant_names()) != weights.keys():
            raise ValueError(f"the code of {name} wants other weights")
        self._model.load_constants(weights)
        self._weights = weights  # the graph reads their memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._model.run(self._flat(args, kwargs))
        return _rebuilt(self.output, flat)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """The tensors of the result for those of the arguments, unchecked; empties the list."""
        return self._model.run(inputs)

    def _flat(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        missing = self.positional[len(args) :]
        if missing and all(name in kwargs for name in missing):
            args = (*args, *(kwargs[name] for name in missing))
            kwargs = {name: value for name, value in kwargs.items() if name not in missing}
        paths, leaves, _ = optree.tree_flatten_with_path((args, kwargs))
        given = dict(zip(map(tuple, paths), leaves))
        expected = {path for path, *_ in self.inputs} | self.constants.keys()
        differences = [f"{_where(p)} is missing" for p in expected - given.keys()]
        differences += [f"{_where(p)} is not among them" for p in given.keys() - expected]
        for path, value in self.constants.items():
            if path in given and (type(given[path]) is not type(value) or given[path] != value):
                differences.append(f"{_where(path)} is {given[path]!r}, and was {value!r}")
        symbols: dict[int, int] = {}
        for path, dtype, device, sizes in self.inputs:
            if path in given:
                differences += _tensor_differences(
                    _where(path), given[path], dtype, device, sizes, symbols
                )
        if differences:
            raise PackageInputError(differences=sorted(differences))
        # The graph reads dense tensors as it was traced with them.
        return [given[path].contiguous() for path, *_ in self.inputs]


def _tensor_differences(
    where: str, value: Any, dtype: torch.dtype, device: str, sizes: list, symbols: dict[int, int]
) -> list[str]:
    if not isinstance(value, Tensor):
        return [f"{where} is a {type(value).__name__}, not a tensor"]
    found = []
    if value.dtype != dtype:
        found.append(f"{where} is {value.dtype}, not {dtype}")
    if value.device.type != device:
        found.append(f"{where} is on {value.device}, not on {device}")
    fits = value.dim() == len(sizes)
    for size, expected in zip(value.shape, sizes):
        if isinstance(expected, int):
            fits &= size == expected
        else:
            number, smallest, largest, factor, constant = expected
            symbol, rest = divmod(size - constant, factor)
            fits &= not rest and smallest <= symbol <= largest
            fits &= symbols.setdefault(number, symbol) == symbol
    if not fits:
        text = [
            str(s)
            if isinstance(s, int)
            else f"{_expression(s)} ({s[1]} to {'any' if s[2] == math.inf else s[2]})"
            for s in sizes
        ]
        found.append(f"{where} is {list(value.shape)}, not [{', '.join(text)}]")
    return found


def _expression(size: tuple) -> str:
    """A size that varies, as a user would write it: `s0`, `2*s0 + 1`; the range beside it is that of `s0`."""
    number, _, _, factor, constant = size
    text = f"s{number}" if factor == 1 else f"{factor}*s{number}"
    return text if not constant else f"{text} {'+' if constant > 0 else '-'} {abs(constant)}"


def _sizes(shape: list) -> list:
    """The sizes of an input, checked: ints, or (symbol, smallest, largest, a, b) for a times the symbol plus b."""
    result = []
    for size in shape:
        if isinstance(size, list):
            # Format 1 has no factor and constant.
            number, smallest, largest, factor, constant = size if len(size) > 3 else [*size, 1, 0]
            if type(constant) is not int or not _index(factor):
                raise ValueError(f"{size!r} is no size")
            largest = math.inf if largest is None else _index(largest)
            result.append((_index(number), _index(smallest), largest, factor, constant))
        else:
            result.append(_index(size))
    return result


def _where(path: tuple) -> str:
    """("args", ...) as the caller wrote it: `argument 0`, `argument mask["x"]`."""
    if len(path) < 2:
        return "the arguments"
    return f"argument {path[1]}" + "".join(f"[{key!r}]" for key in path[2:])


def _rebuilt(form: Mapping[str, Any], flat: Sequence[Tensor]) -> Any:
    ((kind, value),) = form.items()
    if kind == "tensor":
        return flat[value]
    if kind == "constant":
        return value
    if kind == "dict":
        return Output({key: _rebuilt(item, flat) for key, item in value.items()})
    items = [_rebuilt(item, flat) for item in value]
    return items if kind == "list" else tuple(items)


class _Archive:
    """The file: its manifest, and its weights in memory. Every member is there and has its digest."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._read(archive)
        except OSError as error:
            raise PackageError(path=path, reason=error.strerror or str(error)) from error
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            reason = f"it is truncated or damaged, or no archive ({error})"
            raise PackageError(path=path, reason=reason) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, PackageError):
                raise
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
        if int(manifest["format"]) > FORMAT:
            newer = f"its format is {manifest['format']}, and this library reads up to {FORMAT}"
            raise PackageMismatchError(path=self.path, differences=[newer])
        digests = manifest["members"]
        if digests.keys() != set(names) - {f"{root}/{MANIFEST}"}:
            self._refuse("its parts are not those that its manifest names")
        sizes = {member.filename: member.file_size for member in members}
        weights = f"{root}/{WEIGHTS}"
        for name, digest in digests.items():
            if name == weights:
                self.weights = _memory(sizes[name])
                found = _read_into(archive, name, self.weights)
            else:
                found = hashlib.sha256(archive.read(name)).hexdigest()
            if found != digest:
                self._refuse(f"{name} does not match the digest that was saved with it")
        self.manifest: dict[str, Any] = manifest
        self._tokenizer = [name for name in names if name.startswith(f"{root}/{TOKENIZER}")]

    def _refuse(self, reason: str) -> None:
        raise PackageError(path=self.path, reason=reason)

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


def _constants(manifest: Mapping[str, Any], memory: mmap.mmap) -> list[Tensor]:
    """The weights as tensors over the memory that they were read into; on the GPU, copies there."""
    start, size = _aligned_start(memory), _index(manifest["weight_bytes"])
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    if size > len(whole) - _HUGE_PAGE:
        raise ValueError("the weights are shorter than the manifest says")
    result = []
    for weight in manifest["weights"]:
        dtype = getattr(torch, weight["dtype"])
        shape = [_index(n) for n in weight["shape"]]
        stride = [_index(n) for n in weight["stride"]]
        offset = _index(weight["offset"])
        span = 0
        if math.prod(shape):
            span = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
        end = offset + span * dtype.itemsize
        if offset % ALIGNMENT or end > size:
            raise ValueError("a weight lies outside of the weights")
        flat = whole[start + offset : start + end].view(dtype)
        tensor = flat.as_strided(shape, stride)
        result.append(tensor if manifest["device"] == "cpu" else tensor.to(manifest["device"]))
    return result


def _index(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no size")
    return value


def _check_target(
    path: str | os.PathLike, manifest: Mapping[str, Any], plan: ModelPlan | None
) -> None:
    """Raises PackageMismatchError where the code was made for something else than what runs here."""
    try:
        device = torch.device(manifest["device"])
        flags, capability = set(manifest["cpu_flags"]), manifest["cuda_capability"]
        made_with = {key: manifest[key] for key in ("torch", "library_version", "abi")}
        digest = manifest["plan_digest"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PackageError(path=path, reason=f"its manifest is damaged ({error})") from error
    differences = []
    if device.type == "cuda" and not torch.cuda.is_available():
        differences.append("it was made for a CUDA device, and there is none")
    elif device.type not in ("cpu", "cuda"):
        differences.append(f"it was made for the device {device.type}")
    if not differences:
        here = target(device)
        if _minor(made_with["torch"]) != _minor(here["torch"]):
            differences.append(f"torch {made_with['torch']}, and here is {here['torch']}")
        if made_with["abi"] != here["abi"]:
            differences.append(
                f"micromix-compile {made_with['library_version']} (operators {made_with['abi']}), and "
                f"here is {here['library_version']} (operators {here['abi']})"
            )
        lacking = sorted(flags - set(here["cpu_flags"]))
        if lacking:
            differences.append(f"a CPU with {', '.join(lacking)}")
        if capability != here["cuda_capability"]:
            differences.append(
                f"CUDA capability {capability}, and here is {here['cuda_capability']}"
            )
    # A checkpoint holds the weights that a plan rounded, and no record of that: its packages have the layers' digest.
    if plan is not None and digest not in (plan.digest, plan.layers_digest):
        differences.append("another plan than the one given")
    if differences:
        raise PackageMismatchError(path=path, differences=differences)


def _minor(version: Any) -> tuple[str, ...]:
    return tuple(itertools.islice(str(version).split("."), 2))
