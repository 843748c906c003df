"""Insert observers on the inputs of linear layers, for calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from micromix_compile.passes.find_linears import Linear
from micromix_compile.passes.shared_inputs import shared_inputs


def observe_linears(
    graph: fx.Graph,
    linears: Sequence[Linear],
    observer: Callable[[list[Linear]], Callable[..., None]],
) -> int:
    """Call `observer(group)(x, *weights)` before each group of layers that read one value x.

    Returns the number of groups. The weights are those that the call runs with: Dynamo may run one graph for
    several equal modules. `graph` is changed in place and keeps its results; the observers are plain functions,
    so it can be run as it is but not compiled.
    """
    groups = shared_inputs(linears)
    for group in groups:
        weights = (linear.weight for linear in group)
        with graph.inserting_before(group[0].node):
            graph.call_function(observer(group), (group[0].input, *weights))
    return len(groups)
