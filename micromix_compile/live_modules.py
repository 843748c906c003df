"""The modules that live in this process: which of them has a tensor, and under which name.

The graphs of a compilation hold parameters, not modules; so modules are looked for among all objects, where nothing
else tells.
"""

from __future__ import annotations

import gc
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch

from micromix_compile import _torch_compat as compat

_Owners = dict[int, list[tuple[torch.nn.Module, str]]]


def live_modules() -> list[torch.nn.Module]:
    """All there are. A gc.freeze is undone: it hides them from get_objects, and to freeze anew would keep garbage for ever."""
    gc.unfreeze()
    # By type: isinstance asks objects for __class__, which some compute.
    return [found for found in gc.get_objects() if issubclass(type(found), torch.nn.Module)]


class Place(NamedTuple):
    """A tensor's name in the outermost module above it that was compiled, and in the outermost of all."""

    name: str
    whole: str


class Places:
    """Where the tensors of all modules are. The modules are looked for at the first question, once."""

    @cached_property
    def _owners(self) -> tuple[_Owners, _Owners]:
        """The modules that have a tensor, and those that have a module, by its id, each with the name it has there."""
        tensors: _Owners = {}
        modules: _Owners = {}
        for module in live_modules():
            own = [module.__dict__.get(what, {}) for what in ("_parameters", "_buffers")]
            for name, tensor in chain.from_iterable(part.items() for part in own):
                tensors.setdefault(id(tensor), []).append((module, name))
            for name, child in module.__dict__.get("_modules", {}).items():
                modules.setdefault(id(child), []).append((module, name))
        return tensors, modules

    def of(self, tensor: torch.Tensor, reader: int | None = None) -> Place | None:
        """The place of a tensor; None where it has none, or more than one below the module that was compiled.

        `reader` is the id of the module that reads it: of those that share a tensor, that one is meant.
        """
        tensors, modules = self._owners
        owners = tensors.get(id(tensor), [])
        if len(owners) > 1:
            owners = [owner for owner in owners if id(owner[0]) == reader]
        names: list[str] = []
        seen: set[int] = set()  # a module may have one that it is in
        compiled = 0  # how many of the names are those within the module that was
        while len(owners) == 1:
            module, name = owners[0]
            names.append(name)
            seen.add(id(module))
            owners, is_compiled = [], compat.is_compiled(module)
            unnamed = [module]
            while unnamed:
                for owner, name in modules.get(id(unnamed.pop()), []):
                    if name == "_orig_mod":  # what torch.compile wraps a module in
                        unnamed.append(owner)
                        is_compiled = True
                    elif id(owner) not in seen:
                        owners.append((owner, name))
            if is_compiled:
                compiled = len(names)
        if not names or (owners and not compiled):
            return None
        return Place(".".join(names[: compiled or None][::-1]), ".".join(names[::-1]))
