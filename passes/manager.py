"""The passes over Inductor's post-grad graph, in one object that Inductor runs and its caches know.

The graph holds everything that a pass decides on: layouts are arguments of the operators, while weights and
channel orders are its inputs. So the cache key of a compiled graph needs only the graph and `uuid`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import fx

from micromix_compile import _torch_compat as compat
from micromix_compile import ops
from micromix_compile.passes import fuse_layer_norm, fuse_pointwise, fuse_rms_norm
from micromix_compile.passes.fuse_quantize import fuse_quantize, number_quantises
from micromix_compile.passes.missed_fusions import missed_fusions

PATTERNS = {
    "fuse_rms_norm": fuse_rms_norm.PATTERNS,
    "fuse_layer_norm": fuse_layer_norm.PATTERNS,
    "fuse_pointwise": fuse_pointwise.PATTERNS,
}
"""The fusions in the order in which they run: a norm is tried before the products that it is made of."""

_COUNTS = "micromix "
_graphs = itertools.count(1)


def pass_manager() -> Any:
    """All passes, in order, as one value of Inductor's `post_grad_custom_pre_pass`.

    What the passes did is counted in Inductor's own counters, which its cache restores; `counted` reads them.
    With the environment variable `MICROMIX_DUMP` set to a directory, the graph before and after each pass is
    written there as Python, with the patterns, and no cache is used.
    """
    return compat.graph_pass(run_passes, uuid)


def run_passes(graph: fx.Graph) -> None:
    """Rewrite a post-grad graph in place."""
    dump = _Dump()
    number_quantises(graph)
    dump.write("before", graph)
    for name, patterns in PATTERNS.items():
        for number, pattern in fuse_quantize(graph, patterns).items():
            compat.count(f"{_COUNTS}fused {number} {pattern}")
        dump.write(name, graph)
    for number, what in missed_fusions(graph).items():
        compat.count(f"{_COUNTS}missed {number} {what}")
    graph.lint()


def uuid() -> str | None:
    """Changes with the source of any pass or operator, and with the kernels; None, for no caching, while dumping."""
    return None if os.environ.get("MICROMIX_DUMP") else f"{_sources()}-{ops.build_id()}"


def counted(run: Callable[[], object]) -> tuple[object, dict[int, str], dict[int, str]]:
    """Run a compilation; returns its result, and by number the quantises fused and those missed.

    Numbers are those of the quantises in graph order. A compilation that Inductor takes from its cache gives what
    was counted when it was made.
    """
    result, counts = compat.counting(run, _COUNTS)
    found: dict[str, dict[int, str]] = {"fused": {}, "missed": {}}
    for key in counts:
        _, kind, number, name = key.split(" ", 3)
        found[kind][int(number)] = name
    return result, found["fused"], found["missed"]


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    package = Path(ops.__file__).parent.parent
    for path in sorted([*(package / "passes").glob("*.py"), *(package / "ops").glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class _Dump:
    """The files of one graph under `MICROMIX_DUMP`."""

    def __init__(self) -> None:
        self.directory = os.environ.get("MICROMIX_DUMP")
        self.steps = itertools.count()
        if self.directory:
            self.graph = next(_graphs)
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            text = "\n".join(str(pattern) for patterns in PATTERNS.values() for pattern in patterns)
            Path(self.directory, "patterns.py").write_text(text)

    def write(self, step: str, graph: fx.Graph) -> None:
        if not self.directory:
            return
        name = f"graph{self.graph}_{next(self.steps)}_{step}.py"
        Path(self.directory, name).write_text(compat.readable(graph))
