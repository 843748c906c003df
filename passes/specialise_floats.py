"""Turn floats of modules and global variables, ε and π say, back into the constants that they are.

Under `dynamic=True` Dynamo makes an input of every float it meets, so that a new value needs no new graph. A
norm's ε then hides from every pass that looks for norms, and π from those that look for GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from micromix_compile._torch_compat import source_name


def specialise_floats(
    graph: fx.Graph, example_inputs: Sequence[Any], guard: Callable[[fx.Node], None]
) -> list[fx.Node]:
    """Rewrite Dynamo's graph in place; returns the placeholders that nothing reads any more.

    Floats that the caller passes stay inputs. `guard(placeholder)` is to see to it that another value of the
    float compiles anew.
    """
    unread = []
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs):
        if not _is_float(value) or not source_name(node).startswith(("L['self']", "G[")):
            continue
        reads = [u for u in node.users if u.op == "call_method" and u.target == "item"]
        if len(reads) != len(node.users):
            continue
        for read in reads:
            read.replace_all_uses_with(float(value))
            graph.erase_node(read)
        guard(node)
        unread.append(node)
    return unread


def _is_float(value: Any) -> bool:
    """Whether an input is the tensor that Dynamo makes of a float."""
    return (
        type(value) is torch.Tensor
        and value.dim() == 0
        and value.dtype == torch.float64
        and value.device.type == "cpu"
    )
