"""One compiled graph for equal parts of a model.

Dynamo guards the shapes of parameters, not the parameters themselves, so that one compilation of a decoder layer
serves all layers that are compiled one by one, or that stand between graph breaks. The packed weights are then
those of the parameters that a call brings. What the graph has as constants (the split of the channels, which layers
share a plan) is guarded, by the structure that `ModelPlan.attach` writes on each weight.
"""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from micromix_compile import _torch_compat as compat
from micromix_compile import attachment
from micromix_compile.errors import OtherPlanError
from micromix_compile.explain import GraphReport, LayerReport, record
from micromix_compile.options import Options
from micromix_compile.packing import (
    AUTO,
    OrderedBias,
    PlacedWeight,
    is_released,
    one_packs,
    owners,
    placed_weight,
    refuse_released,
    states,
)
from micromix_compile.passes.fold_order import Folds
from micromix_compile.passes.lower_linears import Lowering
from micromix_compile.plan import LayerPlan, RoundedWeight


@dataclass(frozen=True)
class Slot:
    """A lowered layer of a graph: what it needs of the float parameters among the graph's arguments.

    `weight` and `bias` are their positions; `bias` is None where the graph reads it as it is. `plan` is that of the
    layer the graph was compiled for, `rounded` that layer's rounded weight. `consumer` is the slot whose channel order is the order of this one's rows.
    """

    name: str
    plan: LayerPlan
    transposed: bool
    weight: int
    bias: int | None = None
    consumer: int | None = None
    released: bool = False
    kernel: str = AUTO
    rounded: RoundedWeight | None = None


@dataclass(eq=False)
class Placed:
    """The packed form of one set of parameters: `tensors` as the graph takes them, `held` what they are made of.

    `seen` is the state of the parameters that `held` was last known to be made of.
    """

    parameters: list[weakref.ref]
    held: list[PlacedWeight | OrderedBias]
    tensors: list[torch.Tensor]
    changes: int = field(default_factory=attachment.changes)
    seen: tuple[list[int], list[int]] | None = None

    def belongs_to(self, parameters: Sequence[torch.Tensor]) -> bool:
        mine = [ref() for ref in self.parameters]
        return len(mine) == len(parameters) and all(map(operator.is_, mine, parameters))

    def refresh(self, parameters: Sequence[torch.Tensor]) -> None:
        """Pack again what was changed in place."""
        if states(parameters) == self.seen:
            return
        with one_packs:
            for held, parameter in zip(self.held, parameters):
                held.refresh(parameter)
            self.seen = states(parameters)


class Region:
    """The packed tensors of a graph, for whichever parameters a call brings.

    Args:
        slots: the lowered layers whose weights are arguments.
        kinds: what each packed tensor is: ("weight", slot), ("bias", slot) or ("order", slot).
        first: the packed form of the parameters that the graph was compiled for.
        shared: whether other parameters may come; otherwise guards see to it that none do.
        follows: whether the plans are those attached to the parameters, and not the slots'.
    """

    def __init__(
        self,
        slots: Sequence[Slot] = (),
        kinds: Sequence[tuple[str, int]] = (),
        first: Placed | None = None,
        shared: bool = False,
        follows: bool = False,
    ) -> None:
        self.slots = list(slots)
        self.kinds = list(kinds)
        self.positions = _positions(self.slots)
        first = first or Placed([], [], [])
        self.shared = shared
        self.follows = follows
        self.rows: dict[str, LayerReport] = {}
        self.marks = self._marks([ref() for ref in first.parameters])
        # Dynamo keeps a graph for longer than its models: packed tensors live as long as their parameters.
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.last = weakref.ref(first)
        self.kept = None
        if shared and first.parameters:
            self.known[first.parameters[0]()] = first
        else:
            self.kept = first

    def tensors(self, arguments: Sequence[Any], report: GraphReport) -> list[torch.Tensor]:
        """The packed tensors of the parameters among `arguments`, packed at their first call and when they change."""
        parameters = [arguments[i] for i in self.positions]
        placed = self.last()  # another thread may call for other parameters meanwhile
        if self.shared and (placed is None or not self._is_of(placed, parameters)):
            with one_packs:
                placed = self._find(parameters, arguments, report)
            self.last = weakref.ref(placed)
        elif self.follows and placed.changes != attachment.changes():
            self._check_plans(parameters)
            placed.changes = attachment.changes()
        placed.refresh(parameters)
        return placed.tensors

    def _is_of(self, placed: Placed, parameters: Sequence[torch.Tensor]) -> bool:
        current = not self.follows or placed.changes == attachment.changes()
        return current and placed.belongs_to(parameters)

    def _find(
        self, parameters: list[torch.Tensor], arguments: Sequence[Any], report: GraphReport
    ) -> Placed:
        placed = self.known.get(parameters[0])
        if placed is None or not self._is_of(placed, parameters):
            placed = self.known[parameters[0]] = self._place(arguments, report)
        return placed

    def _place(self, arguments: Sequence[Any], report: GraphReport) -> Placed:
        weights = [arguments[slot.weight] for slot in self.slots]
        self._check_plans(weights)
        marks = [attachment.attached(weight) if self.follows else None for weight in weights]
        plans = [s.plan if m is None else m[0][m[1]] for s, m in zip(self.slots, marks)]
        names = [s.name if m is None else m[1] for s, m in zip(self.slots, marks)]
        rounded = [
            s.rounded if m is None else m[0].rounded.get(m[1]) for s, m in zip(self.slots, marks)
        ]
        owned = owners() if any(slot.released for slot in self.slots) else Counter()
        held: dict[tuple[str, int], PlacedWeight | OrderedBias] = {}
        for i, slot in enumerate(self.slots):
            rows = None
            if slot.consumer is not None:
                out_features = weights[i].shape[1 if slot.transposed else 0]
                rows = plans[slot.consumer].row_order(out_features)
            placed = placed_weight(
                names[i], weights[i], plans[i], slot.transposed, rows, slot.kernel, rounded[i]
            )
            held["weight", i] = placed
            if slot.bias is not None:
                held["bias", i] = OrderedBias(arguments[slot.bias], rows)
        layers = Counter(slot.weight for slot in self.slots)
        for i, slot in enumerate(self.slots):
            if slot.released:
                parameter = weights[i]
                held["weight", i].release(parameter, layers[slot.weight], owned[id(parameter)])
        refuse_released()
        tensors = [
            plans[i].order_on(weights[i].device) if kind == "order" else held[kind, i].buffer
            for kind, i in self.kinds
        ]
        self._report(report, dict(zip((slot.name for slot in self.slots), names)), weights)
        # By those of this part that are left alone, too.
        record(report, [*weights, *(x for x in arguments if isinstance(x, torch.nn.Parameter))])
        return Placed(
            [weakref.ref(arguments[i]) for i in self.positions],
            [held["weight", i] for i in range(len(self.slots))]
            + [held["bias", i] for i, slot in enumerate(self.slots) if slot.bias is not None],
            tensors,
        )

    def _marks(self, parameters: Sequence[torch.Tensor]) -> list[str | None]:
        """What is constant in the graph of the plans attached to the weights, which come first."""
        mark = attachment.STRUCTURE if self.shared else attachment.DIGEST
        return [getattr(weight, mark, None) for weight in parameters[: len(self.slots)]]

    def _check_plans(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raise OtherPlanError where other plans are attached: guards see to it, but `aot_compile` keeps none on them."""
        if self.follows and (marks := self._marks(parameters)) != self.marks:
            pairs = zip(self.slots, marks, self.marks, strict=True)
            raise OtherPlanError(layers=[slot.name for slot, new, old in pairs if new != old])

    def _report(self, report: GraphReport, names: dict[str, str], weights) -> None:
        """Let `explain` show these layers as it shows those that the graph was compiled for."""
        self.rows = self.rows or {row.name: row for row in report.layers}  # of the first layers
        report.layers[:] = [row for row in report.layers if not row.is_gone]
        known = {id(row.parameter) for row in report.layers}

        def renamed(old: list[str]) -> list[str]:
            return [names.get(name, name) for name in old]

        for slot, weight in zip(self.slots, weights):
            row = self.rows.get(slot.name)
            if row is not None and id(weight) not in known:
                report.layers.append(
                    replace(
                        row,
                        name=names[slot.name],
                        merged_with=renamed(row.merged_with),
                        folded_into=renamed(row.folded_into),
                        weight=weakref.ref(weight),
                        released=is_released(weight),
                    )
                )


def region_of(
    lowerings: Sequence[Lowering],
    folds: Folds,
    options: Options,
    placeholders: Sequence[fx.Node],
    values: Sequence[Any],
    packed: Sequence[torch.Tensor],
) -> Region:
    """The region of a graph that is lowered; the graph gets the guards that it needs.

    `values` are what the `placeholders` of Dynamo's graph stand for, `packed` the tensors that take the weights' place.
    """
    position = {node: i for i, node in enumerate(placeholders)}
    own = [x for x in lowerings if x.weight is not None and x.linear.weight in position]
    number = {lowering.linear: i for i, lowering in enumerate(own)}
    slots = [
        Slot(
            lowering.name,
            lowering.plan,
            lowering.linear.transposed,
            position[lowering.linear.weight],
            None if lowering.bias is None else position[lowering.linear.bias],
            number.get(folds.consumers.get(lowering.linear)),
            lowering.weight.released,
            lowering.weight.kernel,
            lowering.weight.rounded,
        )
        for lowering in own
    ]
    kinds: dict[int, tuple[str, int]] = {}  # by the packed tensor's identity
    for i, lowering in enumerate(own):
        kinds.setdefault(id(lowering.weight.buffer), ("weight", i))
        if lowering.bias is not None:
            kinds.setdefault(id(lowering.bias.buffer), ("bias", i))
        if lowering.order is not None:
            kinds.setdefault(id(lowering.order), ("order", i))
    found = [kinds.get(id(tensor)) for tensor in packed]
    held = [lowering.weight for lowering in own]
    held += [lowering.bias for lowering in own if lowering.bias is not None]
    # A plan given as an option knows layers by name, which a call does not bring; the addresses of a
    # CUDA graph's tensors are fixed.
    shared = bool(own) and options.plan is None and None not in found
    shared = shared and not options.uses_cuda_graphs
    follows = options.plan is None and options.recipe is None
    positions = _positions(slots)
    parameters = [values[i] for i in positions]
    for i, parameter in zip(positions, parameters) if not shared else ():
        compat.guard_identity(placeholders[i])
        if follows:
            compat.guard_attribute(placeholders[i], parameter, attachment.DIGEST)
    first = Placed(list(map(weakref.ref, parameters)), held, list(packed))
    return Region(slots, found, first, shared, follows)


def _positions(slots: Sequence[Slot]) -> list[int]:
    """Where the weights, and then the biases, are among the graph's arguments."""
    return [slot.weight for slot in slots] + [s.bias for s in slots if s.bias is not None]
