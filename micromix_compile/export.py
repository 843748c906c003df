"""Export: a model, quantised, traced and compiled ahead of time by AOTInductor, into a package: one .pt2 file.

`archive.py` is the file, `package.py` loads it, `csrc/runner` runs it without Python.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optree
import sympy
import torch
from torch import Tensor, fx, nn

from micromix_compile import _torch_compat as compat
from micromix_compile.archive import Entry, dtype_name, write_package
from micromix_compile.errors import ExportError, GradientError, OptionError
from micromix_compile.files import as_path, check_output
from micromix_compile.layers import linear_shape
from micromix_compile.passes.between_layers import rewrite_between_layers
from micromix_compile.passes.find_linears import find_linears
from micromix_compile.passes.lower_linears import Lowering, lower_linears
from micromix_compile.planned import AnyPlan, quantised

__all__ = ["check_path", "export", "trace"]

_TRIED = 64  # sizes of an argument, in a search for one that its graph is wrong for


def export(
    model: nn.Module,
    path: str | os.PathLike,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    plan: AnyPlan | None = None,
    dynamic_shapes: Any = None,
) -> None:
    """Compile a model into a package that `micromix_compile.load_package(path)` calls like the model.

    Args:
        model: in evaluation mode; float, or quantised already.
        path: where to, ending in ".pt2"; replaced whole, or not at all.
        args, kwargs: example arguments: tensors of any dtype and shape, numbers, strings and None, nested in tuples,
            lists and dicts. All but tensors are constants of the package.
        plan: as for `save_pretrained`.
        dynamic_shapes: as for `torch.export.export`: the sizes that vary.

    Raises ExportError, OutputError, GradientError, OptionError for a path or arguments that are none, what
    `save_pretrained` raises for a plan and its layers, and what torch.export raises.
    """
    path = as_path(
        path, "path", "export(model, path, args, kwargs=None, *, plan=, dynamic_shapes=)"
    )
    if not isinstance(args, (tuple, list)):
        reason = f"cannot be a {type(args).__name__}"
        raise OptionError(option="args", reason=reason, valid="a tuple of the arguments, as (x,)")
    check_path(path)
    model = compat.original_module(model)
    if linear_shape(model) is not None:
        reason = "it is a linear layer itself, which nothing holds in whose place a quantised one could be"
        raise ExportError(reason=reason, mend="Put it into a module, as nn.Sequential(layer)")
    with quantised(model, plan) as used:
        entry = trace(model, args, kwargs or {}, dynamic_shapes)
    write_package(path, {"model": entry}, used)


def check_path(path: str | os.PathLike) -> None:
    """Say what is wrong with the path of a package before minutes of compiling. Raises ExportError and OutputError."""
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(reason=f"{path} does not end in .pt2", mend="Give the path that suffix")
    if not path.parent.is_dir():
        raise ExportError(reason=f"there is no folder {path.parent}", mend="Make it first")
    check_output(path)


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    tracing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Entry:
    """Export, within `tracing()`, lower and compile one graph of a model whose layers are packed."""
    from micromix_compile.passes.manager import pass_manager  # imports Inductor

    if not compat.runs_packages():
        reason = f"AOTInductor of torch {torch.__version__} calls operators that take a dtype with a wrong one"
        raise ExportError(reason=reason, mend="Use torch 2.12 or newer, or a quantised checkpoint")
    if model.training:
        raise GradientError(reason="the model is in training mode")
    args, kwargs = tuple(args), dict(kwargs)
    leaves, structure = optree.tree_flatten((args, kwargs))
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, int, float, str, bool)):
            raise ExportError(
                reason=f"an example argument holds a {type(leaf).__name__}",
                mend="Wrap the model in a module that takes tensors, in tuples, lists and dicts",
            )
    # The code is for the strides of its examples, and a package gives it contiguous tensors.
    args, kwargs = optree.tree_map(
        lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )
    with torch.no_grad(), tracing():
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    gm = program.module(check_guards=False)
    _check_relations(gm, program.range_constraints)
    _lower(gm)
    inputs = _inputs(gm, args, kwargs, structure, program.range_constraints)
    output = _flatten_output(gm)
    files, constants = compat.aot_compile(
        gm, args, kwargs, {"post_grad_custom_pre_pass": pass_manager()}
    )
    _check_linking(files)
    names = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return Entry(
        files,
        {name: tensor.detach() for name, tensor in constants.items()},
        {**inputs, "positional": names[: len(args)], "output": output},
    )


def _check_linking(files: Sequence[str]) -> None:
    """Raises ExportError for code that holds libstdc++ itself: where torch loads it, its locales meet torch's and it crashes."""
    for file in files:
        if file.endswith(".so") and b"libstdc++.so" not in Path(file).read_bytes():
            raise ExportError(
                reason="the C++ compiler links libstdc++ statically, and torch crashes on such code when it loads it",
                mend="Set CXX to one that does not, as /usr/bin/g++",
            )


def _lower(gm: fx.GraphModule) -> None:
    """What torch.compile does to Dynamo's graph: rewrite what stands between the packed layers, merge those that share an
    input."""
    lowerings = [
        Lowering(linear.name, linear, linear.quantised.plan, None, linear.quantised.plan.order)
        for linear in find_linears(gm)
        if linear.quantised is not None
    ]

    def add_constant(name: str, tensor: Tensor) -> fx.Node:
        raise AssertionError(f"{name}: every layer is packed before it is exported")

    rewrite_between_layers(gm.graph, [lowering.linear.node for lowering in lowerings])
    lower_linears(gm.graph, lowerings, add_constant)
    gm.graph.lint()
    gm.recompile()


def _inputs(
    gm: fx.GraphModule,
    args: tuple,
    kwargs: dict[str, Any],
    structure: optree.PyTreeSpec,
    ranges: Mapping[Any, Any],
) -> dict[str, Any]:
    """The tensors and the constants among the arguments, by their paths, tensors in the order of the graph."""
    numbered = optree.tree_unflatten(structure, range(structure.num_leaves))
    order = compat.leaves_in_order(numbered)
    paths, leaves, _ = optree.tree_flatten_with_path((args, kwargs))
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    symbols: dict[str, int] = {}
    tensors, constants = [], []
    for number, node in zip((n for n in order if n is not None), placeholders, strict=True):
        path, leaf = [_key(k) for k in paths[number]], leaves[number]
        if isinstance(leaf, Tensor):
            sizes = [_size(size, symbols, ranges) for size in node.meta["val"].shape]
            facts = {"path": path, "dtype": dtype_name(leaf.dtype), "device": leaf.device.type}
            tensors.append(facts | {"shape": sizes})
        else:
            constants.append({"path": path, "value": leaf})
    return {"inputs": tensors, "constants": constants}


def _size(size: Any, symbols: dict[str, int], ranges: Mapping[Any, Any]) -> Any:
    """An int; or [number of the symbol, smallest, largest, a, b] for a times the symbol plus b.

    `largest` is None for no bound; the bounds are those of the symbol. Raises ExportError for any other expression.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    found = list(expression.free_symbols)
    constant = expression.subs(dict.fromkeys(found, 0))
    factor = expression.subs(dict.fromkeys(found, 1)) - constant
    if len(found) != 1 or factor < 1 or factor * found[0] + constant != expression:
        reason = f"the size {expression} of an argument is no multiple of another one plus a number"
        raise ExportError(reason=reason, mend="Give that size as it is, or leave it fixed")
    smallest, largest = _bounds(found[0], ranges)
    number = symbols.setdefault(str(found[0]), len(symbols))
    return [number, smallest, largest, int(factor), int(constant)]


def _bounds(symbol: Any, ranges: Mapping[Any, Any]) -> tuple[int, int | None]:
    bounds = ranges.get(symbol)
    if bounds is None:
        return 0, None
    return int(bounds.lower), None if compat.is_infinite(bounds.upper) else int(bounds.upper)


def _check_relations(gm: fx.GraphModule, ranges: Mapping[Any, Any]) -> None:
    """Raises ExportError where the graph is right for some of the sizes only that a package will take.

    What torch assumed of sizes beyond their ranges, such as that one is even, is tried on many of them: a package
    compares sizes with ranges and with one another, and has no Python to look at more. Inequations are left out; they
    say that a size is not 1.
    """
    sizes = [s for node in gm.graph.find_nodes(op="placeholder") for s in _symbolic_sizes(node)]
    if not sizes:
        return
    chance = random.Random(0)
    for relation in compat.assumed_relations(sizes[0]):
        if isinstance(relation, sympy.Ne):
            continue
        symbols = sorted(relation.free_symbols, key=str)
        for i in range(_TRIED if symbols else 0):
            values = {}
            for symbol in symbols:
                smallest, largest = _bounds(symbol, ranges)
                smallest = max(2, smallest)
                most = smallest + _TRIED if largest is None else max(smallest, largest)
                values[symbol] = (
                    min(most, smallest + i) if i < 8 else chance.randint(smallest, most)
                )
            if relation.subs(values) == sympy.false:
                where = ", ".join(f"{symbol} = {value}" for symbol, value in values.items())
                raise ExportError(
                    reason=f"its graph needs {relation}, which sizes in the ranges given do not keep to ({where})",
                    mend="Fix that size, or give it in dynamic_shapes as what it is: 2 * torch.export.Dim('half')",
                )


def _symbolic_sizes(node: fx.Node) -> list[torch.SymInt]:
    value = node.meta.get("val")
    return (
        [s for s in value.shape if isinstance(s, torch.SymInt)] if isinstance(value, Tensor) else []
    )


def _key(key: Any) -> int | str:
    if not isinstance(key, (int, str)):
        raise ExportError(
            reason=f"an argument is in a dict under the key {key!r}", mend="Use strings as keys"
        )
    return key


def _flatten_output(gm: fx.GraphModule) -> Any:
    """Make the graph return its tensors only, each once; returns the form of the output around them.

    The form is nested {"tuple": [...]}, {"list": [...]}, {"dict": {...}}, {"constant": value}, {"tensor": i}.
    """
    tensors: dict[fx.Node, int] = {}
    forms = [
        {"tensor": tensors.setdefault(value, len(tensors))}
        if isinstance(value, fx.Node)
        else {"constant": value}
        for value in gm.graph.output_node().args[0]
    ]
    form = _form(compat.output_of(gm, [_Leaf(f) for f in forms]))
    compat.return_flat(gm, list(tensors))
    return form


@dataclass
class _Leaf:
    form: dict[str, Any]


def _form(value: Any) -> dict[str, Any]:
    if isinstance(value, _Leaf):
        return value.form
    if isinstance(value, Mapping):
        return {"dict": {_key(key): _form(item) for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__ if type(value) is list else "tuple": [*map(_form, value)]}
    raise ExportError(
        reason=f"its result holds a {type(value).__name__}",
        mend="Wrap the model in a module that returns tensors, in tuples, lists and dicts",
    )
