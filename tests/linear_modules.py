"""The linear modules of a model, found independently of any graph."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def linears_that_run(model: torch.nn.Module, **kwargs) -> list[str]:
    """The names of the linear modules that one forward runs, found by hooks."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    with torch.no_grad():
        model(**kwargs)
    for handle in handles:
        handle.remove()
    return sorted(set(ran))
