"""Thin adapters to other libraries, each importable without the others.

`register` makes the quantisation method known to transformers. transformers reads its registry only where a model is
loaded, and importing it takes seconds where torchao is installed: so this waits until somebody else imports it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers"
_ADAPTER = "micromix_compile.integrations.transformers"


def register() -> None:
    """Import the transformers adapter now if transformers' registry is there already, and else after it."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_ADAPTER)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the others find the registry, and imports the adapter when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                if self in sys.meta_path:  # only now: who merely asks for the spec imports nothing
                    sys.meta_path.remove(self)
                run(module)
                importlib.import_module(_ADAPTER)

            spec.loader.exec_module = exec_module
        return spec
