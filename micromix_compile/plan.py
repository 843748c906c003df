"""LayerPlan and ModelPlan: which channel of which layer gets which format.

A plan is pure data. It is made by :mod:`micromix_compile.allocation`, saved as safetensors, and
found by the backend through the model's own parameters (:mod:`micromix_compile.attachment`).
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import attachment
from .errors import InvalidPlanError, PlanFileError, PlanMismatchError
from .files import read_file, write_file
from .layers import LayerShape
from .mx.layout import WEIGHT_IS_MXFP4, WEIGHT_ONLY, MixedLayout
from .recipe import ACTIVATIONS, WEIGHTS

__all__ = [
    "LayerPlan",
    "ModelPlan",
    "RoundedWeight",
    "fingerprint",
    "load_plan",
]

_KIND = "micromix_plan"
_VERSION = 3


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The channel formats of one input, shared by all layers that read it; equal by digest.

    ``order`` int32 ``[Kp]`` maps positions to channels of the input, -1 for a padding channel;
    None means the channels as they are, then padding. ``Kp = layout.channels``. ``layout`` is
    that of the activations, with their scale rules; ``weight_rules`` are those of the weight,
    None for the same. ``weights`` is "match" (a weight has the format of its channel) or "mxfp4".
    ``activations`` is "match" or "bfloat16": then they are not quantised (their order and rotation stay), and
    formats and rules are those of the weight.
    ``group`` names the input; it has no effect on numbers and is not part of the digest. Raises
    InvalidPlanError.
    """

    in_features: int
    layout: MixedLayout
    order: Tensor | None = None
    weights: str = "match"
    weight_rules: tuple[str, str, str] | None = None
    group: str = ""
    activations: str = "match"

    def __post_init__(self) -> None:
        for what, valid in (("activations", ACTIVATIONS), ("weights", WEIGHTS)):
            if (value := getattr(self, what)) not in valid:
                expected = " or ".join(map(repr, valid))
                raise InvalidPlanError(reason=f"{what} are {value!r}, not {expected}")
        if self.in_features < 1 or self.layout.channels < self.in_features:
            raise InvalidPlanError(
                reason=f"{self.layout.channels} planned channels for K = {self.in_features}"
            )
        rules = self.layout.rules if self.weight_rules is None else tuple(self.weight_rules)
        object.__setattr__(self, "weight_rules", rules)
        try:
            self.weight_layout  # noqa: B018  the rules are checked by the layout
        except ValueError as error:
            raise InvalidPlanError(reason=f"weight_rules: {error}") from error
        if self.weights == "mxfp4" and self.layout.rotates_any and not self.layout.rotates_all:
            raise InvalidPlanError(
                reason="weights are 'mxfp4', and only some segments of the activations are rotated"
            )
        if self.order is not None:
            self._check_order()

    def _check_order(self) -> None:
        order, channels = self.order, self.layout.channels
        if order.dtype != torch.int32 or order.shape != (channels,):
            raise InvalidPlanError(
                reason=f"order is {order.dtype} {list(order.shape)}, not int32 [{channels}]"
            )
        real = order[order != -1].sort().values.cpu()
        if not torch.equal(real, torch.arange(self.in_features, dtype=torch.int32, device="cpu")):
            raise InvalidPlanError(
                reason=f"order does not hold each of 0 to {self.in_features - 1} once, and -1"
            )

    @cached_property
    def weight_layout(self) -> MixedLayout:
        """The layout of a packed weight row."""
        layout = replace(self.layout, rules=self.weight_rules)
        return layout.as_mxfp4() if self.weights == "mxfp4" else layout

    @property
    def format_code(self) -> int:
        """The ``format`` argument of the operators."""
        weight = WEIGHT_IS_MXFP4 if self.weights == "mxfp4" else 0
        return self.layout.code | weight | (WEIGHT_ONLY if self.weight_only else 0)

    @property
    def weight_only(self) -> bool:
        """Whether the activations stay in bfloat16."""
        return self.activations == "bfloat16"

    def order_on(self, device: torch.device | str) -> Tensor | None:
        """The order on a device, as the operators take it; None for the channels as they are."""
        return None if self.order is None else self.order.to(device)

    def row_order(self, out_features: int) -> Tensor:
        """The order int64 ``[out_features]`` of the rows of a weight whose results are these channels, once or more.

        For a plan with an order that has no padding between its channels.
        """
        order = self.order[: self.in_features].to(torch.int64)
        parts = out_features // self.in_features
        return torch.cat([order + part * self.in_features for part in range(parts)])

    def to_dict(self) -> dict[str, Any]:
        """Every field but the order, as values that JSON can hold."""
        layout = self.layout
        return {
            "in_features": self.in_features,
            "counts": list(layout.counts),
            "format6": layout.format6,
            "rules": list(layout.rules),
            "hadamard": list(layout.hadamard),
            "weights": self.weights,
            "weight_rules": list(self.weight_rules),
            "group": self.group,
            "activations": self.activations,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any], order: Tensor | None = None) -> LayerPlan:
        """The inverse of :meth:`to_dict`. Raises KeyError, TypeError or ValueError for damaged facts."""
        layout = MixedLayout(
            *map(operator.index, facts["counts"]),
            facts["format6"],
            tuple(facts["rules"]),
            tuple(facts.get("hadamard", ())),  # files of version 1 have none
        )
        return cls(
            in_features=operator.index(facts["in_features"]),
            layout=layout,
            order=order,
            weights=facts["weights"],
            weight_rules=tuple(facts["weight_rules"]),
            group=facts["group"],
            activations=facts.get("activations", "match"),  # those of version 2 neither
        )

    @cached_property
    def digest(self) -> str:
        """A hash of all that changes a number, the same in every process: 64 hexadecimal digits."""
        facts = self.to_dict()
        del facts["group"]
        if not facts["hadamard"]:
            del facts["hadamard"]  # as plans of version 1 were hashed
        if not self.weight_only:
            del facts["activations"]  # as plans of version 2 were hashed
        facts["order"] = None if self.order is None else self.order.tolist()
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight rounded ahead: ``data`` uint8 ``[N, row_bytes]``, ``scales`` uint8 ``[N, Kp/32]`` of the layer's
    ``weight_layout``, rows in their own order; ``source`` is :func:`fingerprint` of the float weight."""

    data: Tensor
    scales: Tensor
    source: int

    @cached_property
    def digest(self) -> str:
        """A hash of all three: 64 hexadecimal digits."""
        digest = hashlib.sha256(str(self.source).encode())
        for tensor in (self.data, self.scales):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def fingerprint(weight: Tensor) -> int:
    """A number that changes when a value or the shape of a weight ``[N, K]`` does, whatever its float dtype is."""
    columns = torch.arange(weight.shape[1], device=weight.device) * 2654435761 + 1
    sums = [
        (rows.detach().float().view(torch.int32).long() * columns).sum(dim=1)
        for rows in weight.split(max(1, (1 << 22) // max(1, weight.shape[1])))
    ]
    rows = torch.arange(weight.shape[0], device=weight.device) * 2246822519 + 1
    return int((torch.cat(sums) * rows).sum()) if sums else 0


class ModelPlan(Mapping[str, LayerPlan]):
    """The plans of a model's layers: a mapping from layer name to LayerPlan; equal by digest.

    ``layers``: name -> LayerPlan, layers with the same input sharing one object. ``shapes``: name
    -> LayerShape of the same layers. ``recipe``: the recipe as a dict (Recipe.to_dict), which changes no
    number: it says which other layers are left alone by choice. A layer's name is that of its module, as in ``model.named_modules()``. ``rounded``: name -> RoundedWeight,
    of the layers whose weight is packed as it lies there, not rounded to nearest. Raises InvalidPlanError
    if layers, shapes and rounded weights contradict each other.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerPlan],
        shapes: Mapping[str, LayerShape],
        recipe: Mapping[str, Any] | None = None,
        rounded: Mapping[str, RoundedWeight] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.rounded = dict(rounded or {})
        self.shapes = {name: LayerShape(*shape) for name, shape in shapes.items()}
        self.recipe = dict(recipe or {})
        if self._layers.keys() != self.shapes.keys():
            raise InvalidPlanError(reason="plans and shapes name different layers")
        for name, layer in self._layers.items():
            if layer.in_features != self.shapes[name].in_features:
                raise InvalidPlanError(
                    reason=f"{name} has {self.shapes[name]}, its plan K={layer.in_features}"
                )
        for name, weight in self.rounded.items():
            self._check_rounded(name, weight)

    def _check_rounded(self, name: str, weight: RoundedWeight) -> None:
        if name not in self._layers:
            raise InvalidPlanError(reason=f"a weight of {name} is there, and no plan of it")
        layout, n = self[name].weight_layout, self.shapes[name].out_features
        if weight.data.shape != (n, layout.row_bytes) or weight.scales.shape != (n, layout.blocks):
            raise InvalidPlanError(reason=f"the rounded weight of {name} does not fit its layout")

    def __getitem__(self, name: str) -> LayerPlan:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"ModelPlan({len(self)} layers, {self.weight_bits:.2f} bits per weight)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def layers_digest(self) -> str:
        """A hash of layers and shapes, rounded weights left out: 64 hexadecimal digits."""
        facts = [(name, self.shapes[name], self[name].digest) for name in sorted(self)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def digest(self) -> str:
        """A hash of all that changes a number, the same in every process: 64 hexadecimal digits."""
        if not self.rounded:
            return self.layers_digest
        facts = [(name, self.rounded[name].digest) for name in sorted(self.rounded)]
        return hashlib.sha256(json.dumps([self.layers_digest, facts]).encode()).hexdigest()

    def with_rounded(self, rounded: Mapping[str, RoundedWeight]) -> ModelPlan:
        """The same plan with these rounded weights. Raises InvalidPlanError if they do not fit it."""
        return ModelPlan(self._layers, self.shapes, self.recipe, rounded)

    def without_rounding(self) -> ModelPlan:
        """The same plan, weights rounded to nearest when they are packed."""
        return self.with_rounded({})

    @property
    def element_bits(self) -> float:
        """Bits per weight over all layers, scales (0.25 bit) not counted; 0 if there are no layers."""
        return self._mean_bits(lambda layer: layer.weight_layout.element_bits)

    @property
    def activation_element_bits(self) -> float:
        """Bits per element of the activations, each input weighted by the weights that it meets."""
        return self._mean_bits(
            lambda layer: 16.0 if layer.weight_only else layer.layout.element_bits
        )

    def _mean_bits(self, bits: Callable[[LayerPlan], float]) -> float:
        sizes = {n: self.shapes[n].out_features * self[n].layout.channels for n in self}
        total = sum(sizes.values())
        return sum(size * bits(self[n]) for n, size in sizes.items()) / total if total else 0.0

    @property
    def weight_bits(self) -> float:
        """Bits per weight element over all layers, scales and padding counted; 0 if none."""
        rows = self.summary()
        elements = sum(row["N"] * row["K"] for row in rows)
        return 8 * sum(row["weight_bytes"] for row in rows) / elements if elements else 0.0

    def summary(self) -> list[dict[str, Any]]:
        """One row a layer: layer, K, N, k4, k6, k8, weight_bytes (scales and padding counted)."""
        rows = []
        for name, layer in self.items():
            weight, shape = layer.weight_layout, self.shapes[name]
            row = {"layer": name, "K": shape.in_features, "N": shape.out_features}
            row |= zip(("k4", "k6", "k8"), layer.layout.counts)
            weight_bytes = shape.out_features * (weight.row_bytes + weight.blocks)
            rows.append(row | {"weight_bytes": weight_bytes})
        return rows

    def check(self, model_layers: Mapping[str, LayerShape]) -> None:
        """Raises PlanMismatchError if a planned layer is not among these, or its shape differs."""
        differences = []
        for name, shape in self.shapes.items():
            if name not in model_layers:
                differences.append(f"{name}: the model has no such layer")
            elif LayerShape(*model_layers[name]) != shape:
                found = LayerShape(*model_layers[name])
                differences.append(f"{name}: the plan has {shape}, the model {found}")
        if differences:
            raise PlanMismatchError(differences=differences)

    def attach(self, model: nn.Module) -> ModelPlan:
        """Marks the model's parameters, for the backend to find the plan; returns self.

        A plan attached before is taken off. A planned layer's weight is marked with its name, all
        else with None: the backend leaves that alone. A weight shared by several layers is marked
        with the first. The marks are lost where a parameter is replaced (`copy.deepcopy(model)`,
        `load_state_dict(assign=True)`). An UnplannedLayersWarning names linear modules that the plan lacks and
        its recipe does not skip, a TiedLayersWarning layers of one weight that have different plans. Raises
        PlanMismatchError, before anything is changed, if a planned layer is missing or its weight has another
        shape.
        """
        attachment.attach(self, model)
        return self

    def attach_rest(self, model: nn.Module) -> ModelPlan:
        """Marks every parameter that has no mark yet as none of the planned layers'; returns self.

        For a model that was loaded quantised, whose planned layers have no float weight.
        """
        attachment.attach_rest(self, model)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as safetensors, atomically. Raises OSError, or OutputError, if that fails."""
        groups = list({id(layer): layer for layer in self.values()}.values())
        number = {id(layer): i for i, layer in enumerate(groups)}
        layers = {name: [number[id(self[name])], *self.shapes[name]] for name in self}
        content = {
            "digest": self.digest,
            "groups": [group.to_dict() for group in groups],
            "layers": layers,
            "recipe": self.recipe,
            "rounded": {name: weight.source for name, weight in self.rounded.items()},
        }
        orders = {f"order.{i}": g.order for i, g in enumerate(groups) if g.order is not None}
        weights = {f"rounded.data.{name}": weight.data for name, weight in self.rounded.items()}
        weights |= {f"rounded.scales.{n}": weight.scales for n, weight in self.rounded.items()}
        write_file(path, _KIND, _VERSION, content, orders | weights)


def load_plan(path: str | os.PathLike) -> ModelPlan:
    """Reads a plan that :meth:`ModelPlan.save` wrote.

    Raises PlanFileError if the file is missing, truncated, damaged or not a plan, and
    FileVersionError if a newer version wrote it.
    """
    content, tensors = read_file(path, _KIND, _VERSION, PlanFileError)
    try:
        groups = [
            LayerPlan.from_dict(facts, tensors.get(f"order.{i}"))
            for i, facts in enumerate(content["groups"])
        ]
        layers = {name: groups[i] for name, (i, *_) in content["layers"].items()}
        shapes = {name: LayerShape(*shape) for name, (_, *shape) in content["layers"].items()}
        rounded = {
            name: RoundedWeight(
                tensors[f"rounded.data.{name}"], tensors[f"rounded.scales.{name}"], source
            )
            for name, source in content.get("rounded", {}).items()
        }
        plan = ModelPlan(layers, shapes, content["recipe"], rounded)
        whole = plan.digest == content["digest"]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"its content is damaged ({error})"
        raise PlanFileError(path=os.fspath(path), reason=reason) from error
    if not whole:
        raise PlanFileError(path=os.fspath(path), reason="its content does not match its digest")
    return plan
