"""Packages: a model, quantised and compiled ahead of time by AOTInductor, in one .pt2 file.

The file is torch's own archive with two parts more: the weights once for all graphs, as bytes that are read straight
into memory, and a manifest that says what they are, what the graphs take and give, and what the code was made for.
`micromix_compile.package` loads it; `csrc/runner` runs it without Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optree
import sympy
import torch
from torch import Tensor, fx, nn

from micromix_compile import _torch_compat as compat
from micromix_compile.checkpoint import loaded, pack_layer, plan_to_use
from micromix_compile.errors import ExportError, GradientError
from micromix_compile.files import atomically, check_output
from micromix_compile.ops import ABI, build_id
from micromix_compile.passes.between_layers import rewrite_between_layers
from micromix_compile.passes.find_linears import find_linears
from micromix_compile.passes.lower_linears import Lowering, lower_linears
from micromix_compile.plan import ModelPlan
from micromix_compile.quantized_linear import QuantizedLinear
from micromix_compile.recipe import Recipe

__all__ = ["Entry", "check_path", "export", "quantised", "trace", "write_package"]

FORMAT = 2
_TRIED = 64  # sizes of an argument, in a search for one that its graph is wrong for
ALIGNMENT = 64  # of each weight in the blob: what the kernels want of a placed weight
MANIFEST, WEIGHTS, RUNNER, TOKENIZER = (
    "extra/micromix.json",
    "extra/weights.bin",
    "extra/runner.txt",
    "extra/tokenizer/",
)
TEMPLATES = "additional_chat_templates"  # transformers' name of the folder


def export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    path: str | os.PathLike,
    *,
    plan: ModelPlan | Recipe | None = None,
    dynamic_shapes: Any = None,
) -> None:
    """Compile a model into a package that `micromix_compile.load(path)` calls like the model.

    Args:
        model: in evaluation mode; float, or quantised already.
        args, kwargs: example arguments: tensors, numbers, strings and None, nested in tuples, lists and dicts. All but
            tensors are constants of the package.
        path: where to, ending in ".pt2"; replaced whole, or not at all.
        plan: as for `save_pretrained`.
        dynamic_shapes: as for `torch.export.export`: the sizes that vary.

    Raises ExportError, OutputError, GradientError, PlanMismatchError, QuantizedAlreadyError, UnsavableLayerError,
    HookedLayerError, ReleasedWeightError, and what torch.export raises.
    """
    check_path(path)
    model = compat.original_module(model)
    with quantised(model, plan) as used:
        entry = trace(model, args, kwargs or {}, dynamic_shapes)
    write_package(path, {"model": entry}, used)


@dataclass(eq=False)
class Entry:
    """One compiled graph: its files, the constants it reads, and its manifest."""

    files: list[str]
    constants: dict[str, Tensor]
    manifest: dict[str, Any]


@contextlib.contextmanager
def quantised(model: nn.Module, plan: ModelPlan | Recipe | None) -> Iterator[ModelPlan]:
    """The model with its planned layers packed; they are float again afterwards. Gives the plan."""
    plan = plan_to_use(model, plan)
    floats = {}
    try:
        for name in plan:
            module = model.get_submodule(name)
            if isinstance(module, QuantizedLinear):
                continue
            with loaded(module):
                packed = pack_layer(plan, name, module.weight)
                layer = QuantizedLinear.from_packed(
                    packed, module.bias, plan.shapes[name].transposed
                )
            floats[name] = module
            model.set_submodule(name, layer)
        yield plan
    finally:
        for name, module in floats.items():
            model.set_submodule(name, module)


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
    order = torch.utils._pytree.tree_leaves(numbered)
    paths, leaves, _ = optree.tree_flatten_with_path((args, kwargs))
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    symbols: dict[str, int] = {}
    tensors, constants = [], []
    for number, node in zip((n for n in order if n is not None), placeholders, strict=True):
        path, leaf = [_key(k) for k in paths[number]], leaves[number]
        if isinstance(leaf, Tensor):
            sizes = [_size(size, symbols, ranges) for size in node.meta["val"].shape]
            facts = {"path": path, "dtype": _dtype(leaf.dtype), "device": leaf.device.type}
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
    node = gm.graph.output_node()
    spec = gm._out_spec
    flat = list(node.args[0])
    tensors: dict[fx.Node, int] = {}
    forms = [
        {"tensor": tensors.setdefault(value, len(tensors))}
        if isinstance(value, fx.Node)
        else {"constant": value}
        for value in flat
    ]
    form = _form(torch.utils._pytree.tree_unflatten([_Leaf(f) for f in forms], spec))
    node.args = (tuple(tensors),)
    gm.graph._codegen.pytree_info = gm.graph._codegen.pytree_info._replace(
        out_spec=torch.utils._pytree.tree_structure(tuple(range(len(tensors))))
    )
    gm._out_spec = gm.graph._codegen.pytree_info.out_spec
    gm.recompile()
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


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_package(
    path: str | os.PathLike,
    entries: Mapping[str, Entry],
    plan: ModelPlan,
    decoder: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Write the archive: compiled graphs by name, their weights once, and the manifest. Atomic."""
    path = Path(path)
    blob = _Blob()
    for entry in entries.values():
        entry.manifest["weights"] = {
            name: blob.add(tensor) for name, tensor in sorted(entry.constants.items())
        }
    device = next((w.device for w in blob.tensors), torch.device("cpu"))
    manifest = {
        "format": FORMAT,
        **target(device),
        "plan_digest": plan.digest,
        "recipe": plan.recipe,
        "weight_bytes": blob.bytes,
        "weights": blob.index,
        "entries": {name: entry.manifest for name, entry in entries.items()},
        "decoder": decoder,
    }

    def write(temporary: Path) -> None:
        # torch calls the folder within an archive as the file: one name makes equal packages equal files.
        with tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
            made = Path(folder, "model.pt2")
            compat.write_aoti_archive(str(made), {n: e.files for n, e in entries.items()})
            os.replace(made, temporary)
        with zipfile.ZipFile(temporary, "a", zipfile.ZIP_STORED) as archive:
            root = archive.namelist()[0].split("/")[0]
            digests = {name: _digest(archive, name) for name in archive.namelist()}

            def add(name: str, data: bytes) -> None:
                _write_member(archive, f"{root}/{name}", [data])
                digests[f"{root}/{name}"] = hashlib.sha256(data).hexdigest()

            _write_member(archive, f"{root}/{WEIGHTS}", blob.parts())
            digests[f"{root}/{WEIGHTS}"] = _digest(archive, f"{root}/{WEIGHTS}")
            checksum = _checksum(archive, f"{root}/{WEIGHTS}")
            add(RUNNER, _for_the_runner(manifest, checksum).encode())
            if tokenizer is not None:
                for name, data in _tokenizer_files(tokenizer):
                    add(TOKENIZER + name, data)
            manifest["members"] = digests
            _write_member(archive, f"{root}/{MANIFEST}", [json.dumps(manifest).encode()])

    atomically(path, write)


def check_path(path: str | os.PathLike) -> None:
    """Say what is wrong with the path of a package before minutes of compiling. Raises ExportError and OutputError."""
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(reason=f"{path} does not end in .pt2", mend="Give the path that suffix")
    if not path.parent.is_dir():
        raise ExportError(reason=f"there is no folder {path.parent}", mend="Make it first")
    check_output(path)


def target(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on, of the machine and the software that run now."""
    from micromix_compile import __version__
    from micromix_compile.env import cpu_flags  # here: runpy warns if `python -m` finds it imported

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return {
        "library_version": __version__,
        "abi": ABI,
        "build_id": build_id(),
        "torch": torch.__version__.partition("+")[0],
        "device": device.type,
        "cuda_capability": capability and list(capability),
        "cpu_flags": sorted(cpu_flags()),
    }


class _Blob:
    """The weights of all graphs, one after the other, each once: what Inductor gives may be a copy for each graph."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.index: list[dict[str, Any]] = []
        self.bytes = 0
        self._number: dict[tuple[str, str], int] = {}

    def add(self, tensor: Tensor) -> int:
        facts = {
            "dtype": _dtype(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
        }
        key = (hashlib.sha256(_memory_of(tensor)).hexdigest(), json.dumps(facts))
        if key not in self._number:
            self._number[key] = len(self.index)
            self.tensors.append(tensor)
            self.index.append({**facts, "offset": self.bytes})
            self.bytes += -(-_span(tensor) // ALIGNMENT) * ALIGNMENT
        return self._number[key]

    def parts(self) -> Iterator[Any]:
        for tensor in self.tensors:
            yield _memory_of(tensor)
            yield bytes(-_span(tensor) % ALIGNMENT)


def _memory_of(tensor: Tensor) -> Any:
    """The bytes from a tensor's first element to its last, as a buffer."""
    flat = tensor.as_strided((_span(tensor) // tensor.element_size(),), (1,))
    return flat.cpu().contiguous().view(torch.uint8).numpy()


def _span(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _write_member(archive: zipfile.ZipFile, name: str, parts: Any) -> None:
    info = zipfile.ZipInfo(name)  # of 1980: equal packages are equal files
    with archive.open(info, "w", force_zip64=True) as member:
        for part in parts:
            member.write(part)


def _digest(archive: zipfile.ZipFile, name: str) -> str:
    digest = hashlib.sha256()
    with archive.open(name) as member:
        while block := member.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(archive: zipfile.ZipFile, name: str) -> str:
    """The sum over a member's 8-byte words of word * (2 * index + 1), modulo 2^64: quick for the runner to make again.

    torch's reader of archives does not look at their CRC.
    """
    total, first = 0, 0
    with archive.open(name) as member:
        while block := member.read(1 << 20):
            words = torch.frombuffer(bytearray(block), dtype=torch.int64)
            total += (words * torch.arange(2 * first + 1, 2 * (first + len(words)), 2)).sum().item()
            first += len(words)
    return f"{total % (1 << 64):x}"


def _tokenizer_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        named = Path(folder, TEMPLATES).glob("*.jinja")  # chat templates beside the one by default
        for path in sorted([*Path(folder).iterdir(), *named]):
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def _for_the_runner(manifest: Mapping[str, Any], checksum: str) -> str:
    """The manifest for csrc/runner: one fact a line, words apart by spaces."""
    lines = [f"format {FORMAT}", f"abi {manifest['abi']}", f"torch {manifest['torch']}"]
    lines += [f"device {manifest['device']}", f"bytes {manifest['weight_bytes']}"]
    lines.append(f"checksum {checksum}")
    lines += [f"flag {flag}" for flag in manifest["cpu_flags"]]

    def numbers(values: Sequence[int]) -> str:
        return " ".join(map(str, (len(values), *values)))

    for weight in manifest["weights"]:
        sizes = f"{numbers(weight['shape'])} {numbers(weight['stride'])}"
        lines.append(f"weight {weight['dtype']} {weight['offset']} {sizes}")
    for entry, facts in manifest["entries"].items():
        lines.append(f"entry {entry} {len(facts['inputs'])}")
        for given in facts["inputs"]:
            sizes = [_for_the_runner_size(size) for size in given["shape"]]
            lines.append(f"input {entry} {given['dtype']} {' '.join([str(len(sizes)), *sizes])}")
        lines += [f"constant {entry} {index} {name}" for name, index in facts["weights"].items()]
    if manifest["decoder"]:
        decoder = manifest["decoder"]
        lines.append(
            f"decoder {decoder['batch_size']} {decoder['max_length']} {decoder['vocabulary']}"
        )
        lines += [f"cache {decoder['dtype']} {numbers(shape)}" for shape in decoder["cache"]]
        lines += [f"eos {token}" for token in decoder["eos_token_id"]]
    return "\n".join(lines) + "\n"


def _for_the_runner_size(size: Any) -> str:
    """`= SIZE`, or `SYMBOL smallest largest a b`, largest 0 for no bound: see _size."""
    if isinstance(size, int):
        return f"= {size}"
    number, smallest, largest, factor, constant = size
    return f"{number} {smallest} {largest or 0} {factor} {constant}"
