"""Reading and writing of files: every file is written atomically.

The package's own are safetensors with a JSON document, versioned.

The safetensors metadata holds ``{kind: version, "content": JSON text}``, where ``kind`` says what
the file is ("micromix_plan"). Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from micromix_compile.errors import FileVersionError, MicroMixError, OptionError, OutputError

__all__ = [
    "as_path",
    "atomically",
    "check_output",
    "file_digest",
    "is_own",
    "read_file",
    "write_file",
    "write_tensors",
    "write_text",
]


def write_file(
    path: str | os.PathLike, kind: str, version: int, content: Any, tensors: dict[str, Tensor]
) -> None:
    """Writes a file so that ``path`` holds either what it held before or the whole new file.

    Raises OSError if the file cannot be written, which is an OutputError where that is known before.
    """
    check_output(path)
    write_tensors(path, tensors, {kind: str(version), "content": json.dumps(content)})


def as_path(value: str | os.PathLike, option: str, call: str) -> Path:
    """The path that a call was given. Raises OptionError, which shows the order of `call`, for what is no path."""
    if not isinstance(value, (str, os.PathLike)):
        raise OptionError(option=option, reason=f"cannot be a {type(value).__name__}", valid=call)
    return Path(value)


def check_output(path: str | os.PathLike) -> None:
    """Say before any work that a file cannot be written there. Raises OutputError."""
    path, mend = Path(path), "Give another path"
    folder = _target(path).parent
    if not folder.is_dir():
        reason, mend = f"{os.strerror(errno.ENOENT)}: {folder}", "Make that folder first"
    elif path.is_dir():
        reason = "it is a directory"
    elif path.exists() and not path.is_file():  # it would be replaced: /dev/null, for one
        reason = "it is no ordinary file"
    elif not os.access(folder, os.W_OK):
        reason = f"{os.strerror(errno.EACCES)}: {folder}"
    else:
        return
    raise OutputError(path=path, reason=reason, mend=mend)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file atomically, as write_file does. Raises OSError."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    memory: set[int] = set()
    for name, tensor in on_cpu.items():
        if tensor.untyped_storage().data_ptr() in memory:  # safetensors takes no shared memory
            on_cpu[name] = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())

    def write(temporary: Path) -> None:
        temporary.touch()  # the errors of the file system, and its permissions for a new file
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(on_cpu, temporary, dict(metadata))
        except safetensors.SafetensorError as error:  # what it makes of an OSError
            raise OSError(f"{path} cannot be written: {error}") from error
        temporary.chmod(mode)

    atomically(Path(path), write)


def is_own(path: Path) -> bool:
    """Whether a file is a package, or one that write_file wrote: no model is read from it."""
    if path.suffix == ".pt2":
        return True
    try:
        with safetensors.safe_open(path, "pt") as file:
            return any(kind.startswith("micromix_") for kind in file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically. Raises OSError."""
    atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a file: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file under another name with the same suffix, which then becomes `path`; gone if anything fails."""
    path = _target(path)
    # In the same folder: renaming is atomic only within one file system.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _target(path: Path) -> Path:
    """The file that a link leads to, which is written in its place: the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def read_file(
    path: str | os.PathLike,
    kind: str,
    version: int,
    file_error: type[MicroMixError],
) -> tuple[Any, dict[str, Tensor]]:
    """The content and the tensors of a file of this kind, on the CPU.

    Raises ``file_error(path=, reason=)`` if the file is missing, truncated or of another kind, and FileVersionError
    if its version is above ``version``.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise file_error(path=path, reason="it is a directory")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if kind not in metadata:
                raise file_error(path=path, reason=f"it is a safetensors file without {kind!r}")
            if int(metadata[kind]) > version:
                raise FileVersionError(
                    path=path,
                    kind=f"{kind.removeprefix('micromix_')} file",
                    version=metadata[kind],
                    supported=version,
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return json.loads(metadata["content"]), tensors
    except MicroMixError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise file_error(path=path, reason=reason) from error
    except safetensors.SafetensorError as error:
        reason = f"it is truncated, or not a safetensors file ({error})"
        raise file_error(path=path, reason=reason) from error
    except (KeyError, ValueError, RecursionError) as error:
        raise file_error(path=path, reason=f"its metadata is damaged ({error})") from error
