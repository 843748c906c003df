"""Patterns: what a rewrite looks for, written as the plain torch function that a model would contain.

A pattern is traced with Inductor's own decompositions, so it has the form that the same code of a model has in
Inductor's graph, in whatever torch version runs. Matching is by structure: additions and products commute,
reduced dimensions count from the end, and floats that differ from model to model (ε) are bound like inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from micromix_compile import _torch_compat as compat

aten = torch.ops.aten

EPS = 0.0234375
"""The example of a float that a pattern binds: a value that no model's code contains."""

_CHANNELS = 64
_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)
# A number is an operand like any other; a decomposition may write in place where AOTAutograd's graph does not.
_SAME_AS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.add_.Scalar: aten.add.Tensor,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
}
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.var_mean.correction)


@dataclass(frozen=True)
class Call:
    """A fused operator without its quantise: `op(*arguments, keep, order, k4, k6, k8, format)`.

    `takes_residual` says that `arguments[1]` may be a tensor that is added to `arguments[0]`; then the sum is
    the operator's first result.
    """

    op: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    takes_residual: bool = False


@dataclass(frozen=True)
class Pattern:
    """One form of a value that may come before `micromix::quantize`.

    `pattern` is a function of the inputs that `examples(dtype)` names: a tensor of three dimensions matches a
    value with channels, one of one dimension a vector over channels, EPS any float. All values with
    channels must have the same sizes. `replacement(inputs, dtype)` is the operator that computes and quantises
    it; `dtype` is the value's.
    """

    name: str
    pattern: Callable[..., torch.Tensor]
    replacement: Callable[[Mapping[str, Any], torch.dtype], Call]
    examples: Callable[[torch.dtype], Mapping[str, Any]]

    def match(self, node: fx.Node) -> dict[str, Any] | None:
        """The inputs by name if `node` is this pattern, else None."""
        dtype = node.meta["val"].dtype
        # A float32 weight makes a float32 value of narrower channels.
        narrow = (torch.bfloat16, torch.float16) if dtype == torch.float32 else ()
        for channels_dtype in (dtype, *narrow):
            examples = dict(self.examples(channels_dtype))
            traced = _traced(self.pattern, tuple(examples.items()))
            for bound in _unify(traced.result, node, {}, examples, traced.names):
                if _sizes_fit(bound, examples):
                    return bound
        return None

    def __str__(self) -> str:
        graph = _traced(self.pattern, tuple(self.examples(torch.bfloat16).items())).graph
        return f"# {self.name}\n{graph.python_code('self').src}"


def channels(dtype: torch.dtype) -> torch.Tensor:
    """The example of a value with channels."""
    return torch.zeros(2, 3, _CHANNELS, dtype=dtype)


def vector(dtype: torch.dtype) -> torch.Tensor:
    """The example of a vector over channels: a norm's weight."""
    return torch.zeros(_CHANNELS, dtype=dtype)


@dataclass(frozen=True)
class _Traced:
    graph: fx.Graph
    result: fx.Node
    names: dict[fx.Node, str]


_cache: dict[Any, _Traced] = {}


def _traced(
    function: Callable[..., torch.Tensor], examples: tuple[tuple[str, Any], ...]
) -> _Traced:
    kinds = tuple((v.dtype, v.dim()) if isinstance(v, torch.Tensor) else v for _, v in examples)
    if (function, kinds) not in _cache:
        tensors = {name: v for name, v in examples if isinstance(v, torch.Tensor)}
        floats = {name: v for name, v in examples if name not in tensors}
        call = functools.partial(function, **floats)
        graph = compat.trace_inference(
            lambda *args: call(**dict(zip(tensors, args))), tuple(tensors.values())
        ).graph
        names = dict(zip(graph.find_nodes(op="placeholder"), tensors))
        _cache[function, kinds] = _Traced(graph, graph.output_node().args[0], names)
    return _cache[function, kinds]


def _unify(
    pattern: Any, value: Any, bound: dict[str, Any], examples: Mapping[str, Any], names
) -> Iterator[dict[str, Any]]:
    """Every way to extend `bound` so that `value` is an instance of `pattern`."""
    if isinstance(pattern, fx.Node):
        if not isinstance(value, fx.Node):
            return
        if pattern.op == "placeholder":
            name = names[pattern]
            if name in bound:
                if bound[name] is value:
                    yield bound
            elif _fits(value, examples[name]):
                yield {**bound, name: value}
            return
        target = _SAME_AS.get(pattern.target, pattern.target)
        if value.op != "call_function" or _SAME_AS.get(value.target, value.target) is not target:
            return
        ours, theirs = _arguments(pattern), _arguments(value)
        if len(ours) != len(theirs):
            return
        yield from _unify_all(ours, theirs, bound, examples, names)
        if target in _COMMUTATIVE:
            yield from _unify_all(ours, [theirs[1], theirs[0], *theirs[2:]], bound, examples, names)
    elif isinstance(pattern, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _unify_all(pattern, value, bound, examples, names)
    elif isinstance(pattern, float) and pattern == EPS:
        name = next(n for n, v in examples.items() if isinstance(v, float) and v == EPS)
        if isinstance(value, (int, float)) and bound.get(name, value) == value:
            yield {**bound, name: float(value)}
    elif not isinstance(value, fx.Node) and _same_constant(pattern, value):
        yield bound


def _unify_all(patterns, values, bound, examples, names) -> Iterator[dict[str, Any]]:
    if not patterns:
        yield bound
        return
    for extended in _unify(patterns[0], values[0], bound, examples, names):
        yield from _unify_all(patterns[1:], values[1:], extended, examples, names)


def _arguments(node: fx.Node) -> list[Any]:
    """Positional arguments, then keyword ones by name; reduced dimensions counted from the end."""
    arguments = list(node.args)
    if node.target in _REDUCTIONS and len(arguments) > 1 and arguments[1] is not None:
        rank = node.args[0].meta["val"].dim()
        arguments[1] = [d - rank if d >= 0 else d for d in arguments[1]]
    return arguments + [node.kwargs[name] for name in sorted(node.kwargs)]


def _same_constant(pattern: Any, value: Any) -> bool:
    if isinstance(pattern, float) and isinstance(value, (int, float)):
        return abs(pattern - value) <= 1e-7 * abs(pattern)  # √(2/π), printed in float32 or float64
    return pattern == value


def _fits(value: fx.Node, example: torch.Tensor) -> bool:
    tensor = value.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != example.dtype:
        return False
    return tensor.dim() == 1 if example.dim() == 1 else tensor.dim() >= 1


def _sizes_fit(bound: Mapping[str, Any], examples: Mapping[str, Any]) -> bool:
    """Whether values with channels have equal sizes, and vectors one entry for each channel."""
    whole = [bound[name].meta["val"].shape for name, v in examples.items() if _rank(v) == 3]
    vectors = [bound[name].meta["val"].shape for name, v in examples.items() if _rank(v) == 1]
    return all(same_sizes(shape, whole[0]) for shape in whole) and all(
        same_sizes(shape, whole[0][-1:]) for shape in vectors
    )


def _rank(example: Any) -> int:
    return example.dim() if isinstance(example, torch.Tensor) else 0


def same_sizes(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes are the same expressions; never adds a guard on a dynamic size."""
    return len(a) == len(b) and all(str(m) == str(n) for m, n in zip(a, b))
