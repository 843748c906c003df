"""What a command reads and writes: declared where its parser adds the argument, and checked before the long work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from micromix_compile.errors import OutputError
from micromix_compile.files import check_output, is_own


def reads(container, *names: str, **options) -> None:
    """Adds an argument that names a file or directory to read: no result goes there."""
    action = container.add_argument(*names, **options)
    container.set_defaults(reads=(*(container.get_default("reads") or ()), action.dest))


def writes(
    container, *names: str, check: Callable[[Path], object] = check_output, **options
) -> None:
    """Adds an argument that names a result. `check` raises where it cannot be; a `default` may be a function of the arguments."""
    action = container.add_argument(*names, type=Path, **options)
    container.set_defaults(writes={**(container.get_default("writes") or {}), action.dest: check})


def check_outputs(arguments: argparse.Namespace) -> None:
    """No result goes where an input lies, or where nothing can be. Raises OutputError, and what the results' own checks do."""
    checks = getattr(arguments, "writes", {})
    for name in checks:
        if callable(default := getattr(arguments, name)):
            setattr(arguments, name, default(arguments))
    paths = {name: path for name in checks if (path := getattr(arguments, name)) is not None}
    check_apart(arguments, *paths.values())
    for name, path in paths.items():
        checks[name](path)


def check_apart(arguments: argparse.Namespace, *paths: Path) -> None:
    """These results are files apart from each other, from every input, and from the files of the model. Raises OutputError."""
    values = (getattr(arguments, name) for name in getattr(arguments, "reads", ()))
    inputs = (Path(p) for v in values if v is not None for p in (v if isinstance(v, list) else [v]))
    taken = {path.resolve() for path in inputs if path.exists()}
    folder = model_folder(arguments) if paths else None
    read = {path.resolve() for path in folder.iterdir()} if folder else set()
    for path in paths:
        if path.resolve() in taken:
            reason = "another argument of this command is the same file"
        elif path.resolve() in read and not is_own(path):  # which are read is up to transformers
            reason = f"it is one of the files of the model {arguments.model}, or lies among them"
        else:
            taken.add(path.resolve())
            continue
        raise OutputError(path=path, reason=reason, mend="Give another path")


def model_folder(arguments: argparse.Namespace) -> Path | None:
    """Where the files of a command's model lie; None where it has no model, or there is none of that name."""
    if (model := getattr(arguments, "model", None)) is None:
        return None
    if Path(model).is_dir():
        return Path(model)
    from micromix_compile.models import files_of

    return files_of(model)


def check_folder(path: Path) -> None:
    """A folder for results, which the command makes where it is not there. Raises OutputError."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        reason = f"{there} is no directory"
    elif not os.access(there, os.W_OK):
        reason = f"nothing can be written to {there}"
    else:
        return
    raise OutputError(path=path, reason=reason, mend="Give another folder")
