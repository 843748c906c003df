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
    observer: Callable[[list[Linear]], Callable[..., torch.Tensor]],
) -> int:
    """Let each group of layers that read one value x read `observer(group)(x, *weights)` instead, which is to be equal.

    Returns the number of groups. The weights are those that the call runs with: Dynamo may run one graph for
    several equal modules. `graph` is changed in place and keeps its results; the observers are plain functions,
    so it can be run as it is but not compiled. A layer that is quantised already reads x by its quantise, as before.
    """
    groups = shared_inputs(linears)
    for group in groups:
        weights = (linear.weight for linear in group)
        with graph.inserting_before(group[0].node):
            observed = graph.call_function(observer(group), (group[0].input, *weights))
        for linear in group:
            linear.node.replace_input_with(linear.input, observed)
    return len(groups)
