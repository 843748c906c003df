"""The rewrites of what stands between the linear layers, for torch.compile and for packages alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from micromix_compile.passes.group_queries import group_queries
from micromix_compile.passes.lower_attention import lower_attention
from micromix_compile.passes.materialize_shared import materialize_shared

ATTENTION = (lower_attention, group_queries)


def rewrite_between_layers(
    graph: fx.Graph, layers: Sequence[fx.Node], inductor: bool = True
) -> dict[str, int]:
    """How often each pass matched, those that did. Without Inductor numbers stay those of the uncompiled model."""
    counts = {
        rewrite.__name__: rewrite(graph)
        for rewrite in (ATTENTION if inductor else (group_queries,))
    }
    if inductor:
        counts["materialize_shared"] = materialize_shared(graph, layers)
    return {name: count for name, count in counts.items() if count}
