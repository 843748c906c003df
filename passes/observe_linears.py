"""Insert observers on the inputs of linear layers, for calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from micromix_compile.passes.find_linears import Linear
from micromix_compile.passes.shared_inputs import shared_inputs


def observe_linears(
    graph: fx.Graph,
    linears: Sequence[Linear],
    observer: Callable[[list[Linear]], Callable[[torch.Tensor], None]],
) -> int:
    """Call `observer(group)(x)` before each group of layers that read one value x; returns the number of groups.

    `graph` is changed in place and keeps its results. The observers are plain functions, so the graph can be
    run as it is but not compiled.
    """
    groups = shared_inputs(graph, linears)
    for group in groups:
        with graph.inserting_before(group[0].node):
            graph.call_function(observer(group), (group[0].input,))
    return len(groups)
