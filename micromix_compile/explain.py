"""What the compiler did with each linear layer, and why it left one alone."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from micromix_compile import _torch_compat as compat
from micromix_compile.layers import layer_names, named_modules
from micromix_compile.plan import LayerPlan

_reports: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass
class LayerReport:
    """One linear layer, as the last graph that holds it treats it.

    `bits` counts elements and scales of a weight; `bytes_before` and `bytes_after` are those of the weight.
    `activations` are "match", quantised as the weight's channels are, or "bfloat16", whatever the model's dtype.
    `fused_with` is what its input's quantise was fused with, `merged_with` are the layers computed in one product
    with it, `folded_into` those whose rows took its channel order, `gathered` why its input is put in order when it
    runs instead (empty where the order is the model's own). `reason` is empty for a layer that was lowered.
    """

    name: str
    K: int
    N: int
    k4: int = 0
    k6: int = 0
    k8: int = 0
    format6: str = ""
    bits: float = 0.0
    activations: str = "match"
    bytes_before: int = 0
    bytes_after: int = 0
    kernel: str = ""
    fused_with: str = ""
    merged_with: list[str] = field(default_factory=list)
    folded_into: list[str] = field(default_factory=list)
    gathered: str = ""
    reason: str = ""
    released: bool = False
    weight: weakref.ref | None = field(default=None, repr=False, compare=False)
    """Of the weight: by it `explain` knows the layer's name in the whole model."""

    @property
    def parameter(self) -> torch.Tensor | None:
        """The weight, while it lives; None of one that is computed."""
        return None if self.weight is None else self.weight()

    @property
    def is_gone(self) -> bool:
        """Whether the weight does not live any more."""
        return self.weight is not None and self.weight() is None

    def lowered(self, plan: LayerPlan, placed: torch.Tensor, kernel: str) -> None:
        """Write down what the layer runs as: its plan, its placed weight, the name of its kernel."""
        layout = plan.layout
        (self.k4, self.k6, self.k8), self.format6 = layout.counts, layout.format6
        self.bits, self.activations = plan.weight_layout.total_bits, plan.activations
        self.bytes_after, self.kernel = placed.nbytes, kernel

    def within(self, names: Iterable[str]) -> LayerReport:
        """The same with the names of the whole model, of which `names` are the weight's.

        A graph of a part knows its layers by the ends of their names only, where no plan says more.
        """
        longer = [name for name in names if name.endswith("." + self.name)]
        start = longer[0].removesuffix(self.name) if longer else ""
        return replace(
            self,
            name=start + self.name,
            merged_with=[start + name for name in self.merged_with],
            folded_into=[start + name for name in self.folded_into],
            weight=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "weight"}


@dataclass(eq=False)
class GraphReport:
    """One compiled graph: its layers, and how often each pass matched. `number` counts up in a process.

    `given` are the arguments of the backend that it was compiled with: calls of `torch.compile` with equal ones share it.
    `passes` counts the layers `lowered`, the quantises and products they share, weight-only products, and the
    quantises that were fused with what comes before them, by its name.
    """

    number: int = field(default_factory=itertools.count(1).__next__)
    layers: list[LayerReport] = field(default_factory=list)
    passes: Counter[str] = field(default_factory=Counter)
    readers: dict[int, list[str]] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)

    def add_products(self, quantise: int | None, products: list[list[str]]) -> None:
        """A quantise, by its number, and the names of the layers that read it, those of one product together.

        None for weight-only products, which read no quantise.
        """
        readers = [name for product in products for name in product]
        self.passes["lowered"] += len(readers)
        if quantise is None:
            self.passes["micromix::weight_only_linear"] += len(products)
        else:
            self.readers[quantise] = readers
            self.passes["micromix::quantize"] += 1
            self.passes["micromix::linear"] += len(products)
        for product in products:
            for row in self._rows(product):
                row.merged_with = [name for name in product if name != row.name]

    def add_fusions(self, fused: Mapping[int, str]) -> None:
        """What each quantise was fused with, by its number."""
        for quantise, what in fused.items():
            self.passes[what] += 1
            for row in self._rows(self.readers.get(quantise, ())):
                row.fused_with = what

    def _rows(self, names: Iterable[str]) -> list[LayerReport]:
        wanted = set(names)
        return [row for row in self.layers if row.name in wanted]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: `layers` by name, the number of `graphs`, matches of each pass in all of them."""

    layers: dict[str, LayerReport]
    graphs: int
    passes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "graphs": self.graphs,
            "passes": dict(self.passes),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    def __str__(self) -> str:
        if not self.graphs:
            return (
                "Nothing was compiled. torch.compile(model).generate(...) runs the uncompiled model: use "
                'model.compile(backend="micromix"), and call the model at least once before explain.'
            )
        return f"{_table(self.layers.values())}\n{self._summary()}"

    def _summary(self) -> str:
        lowered = [layer for layer in self.layers.values() if not layer.reason]
        before = sum(layer.bytes_before for layer in lowered)
        after = sum(layer.bytes_after for layer in lowered)
        lines = [
            f"{len(lowered)} of {len(self.layers)} linear layers lowered, in {self.graphs} graph(s)."
        ]
        if before:
            lines.append(f"Their weights: {before:,} -> {after:,} bytes ({after / before:.1%}).")
        if self.passes:
            lines.append(
                "Passes: " + ", ".join(f"{name} {n}" for name, n in sorted(self.passes.items()))
            )
        return "\n".join(lines)


def record(report: GraphReport, parameters: Iterable[torch.Tensor]) -> None:
    """Let `explain` find the report of a graph by the parameters of its layers, while both live.

    The compiled function owns its report: after `torch.compiler.reset()` there is nothing to explain.
    """
    for parameter in parameters:
        _reports.setdefault(parameter, weakref.WeakSet()).add(report)


def explain(compiled: Any) -> Explanation:
    """What was done with the linear layers of a model that was compiled with `backend="micromix"`.

    Args:
        compiled: the result of `torch.compile`, of which the graphs that it runs are shown and no others; or a module,
            after `module.compile()` or as it is, of which all graphs are shown that hold its parameters.

    Layers are known once their graph was compiled, that is after the first call.
    """
    module = compat.original_module(compiled)
    if not isinstance(module, torch.nn.Module):
        module = getattr(compiled, "__self__", None) or getattr(
            getattr(compiled, "_torchdynamo_orig_callable", None), "__self__", None
        )
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"explain wants a torch.nn.Module, compiled or not, or one of its methods, not {type(compiled).__name__}"
        )
    gc.collect()  # graphs that nothing holds any more, as after torch.compiler.reset(), are not counted
    tensors = [*module.parameters(), *module.buffers()]
    found = {report for tensor in tensors for report in _reports.get(tensor, ())}
    given = compat.given_options(compiled)
    if given is not None:
        found = {report for report in found if report.given == given}
    graphs = sorted(found, key=lambda report: report.number)
    names = layer_names(module)
    layers = {}
    for row in (row for report in graphs for row in report.layers):
        if not row.is_gone:
            parameter = row.parameter
            row = row.within(() if parameter is None else names.get(parameter, ()))
            layers[row.name] = row
    if graphs:
        layers |= _in_no_graph(module, layers, found)
    passes: Counter[str] = Counter()
    for report in graphs:
        passes.update(report.passes)
    return Explanation(layers, len(graphs), dict(passes))


def _in_no_graph(
    module: torch.nn.Module, known: Mapping[str, LayerReport], graphs: set[GraphReport]
) -> dict[str, LayerReport]:
    """The linear layers of a module whose weights are in none of its compiled graphs."""
    rows = {}
    for name, part in named_modules(module):
        # Not the attribute: a parametrization would compute it.
        weight = part._parameters.get("weight") if isinstance(part, torch.nn.Linear) else None
        if weight is not None and name not in known and graphs.isdisjoint(_reports.get(weight, ())):
            reason = "no compiled graph names it: it did not run, ran uncompiled, or shares the graph of an equal part that is left alone"
            rows[name] = LayerReport(
                name, part.in_features, part.out_features, bytes_before=weight.nbytes, reason=reason
            )
    return rows


def _note(row: LayerReport) -> str:
    def last_parts(names: list[str]) -> str:
        return ", ".join(name.rpartition(".")[2] for name in names)

    notes = [row.fused_with]
    if row.activations != "match":
        notes.append(f"activations {row.activations}")
    if row.merged_with:
        notes.append(f"merged with {last_parts(row.merged_with)}")
    if row.folded_into:
        notes.append(f"order folded into {last_parts(row.folded_into)}")
    return "; ".join(filter(None, notes))


def _table(layers: Iterable[LayerReport]) -> str:
    header = (
        "layer",
        "K",
        "N",
        "k4",
        "k6",
        "k8",
        "bits",
        "bytes before",
        "after",
        "kernel",
        "fused with / reason",
    )
    rows = [header]
    for r in layers:
        split = ("", "", "", "") if r.reason else (str(r.k4), str(r.k6), str(r.k8), f"{r.bits:.2f}")
        after = "" if r.reason else f"{r.bytes_after:,}"
        note = f"left alone: {r.reason}" if r.reason else _note(r)
        rows.append(
            (r.name, str(r.K), str(r.N), *split, f"{r.bytes_before:,}", after, r.kernel, note)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    left = {0, 9, 10}
    lines = [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
