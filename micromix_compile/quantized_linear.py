"""QuantizedLinear: a linear layer that holds its weight packed, for models that are loaded quantised.

It runs eagerly through the operators. Under `torch.compile(backend="micromix")` the operators in its graph are what
`find_linears` knows a quantised layer by, so that layers which share an input share a quantise, and norms are fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import micromix_compile.ops  # noqa: F401  (registers torch.ops.micromix)
from micromix_compile import _torch_compat as compat
from micromix_compile.errors import GradientError
from micromix_compile.layers import LayerShape
from micromix_compile.mx.layout import WEIGHT_IS_MXFP4
from micromix_compile.packing import PackedWeight
from micromix_compile.plan import LayerPlan

__all__ = ["QuantizedLinear", "refuse_tangents"]


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W packed: x `[..., K]` bf16, f16 or f32 -> `[..., N]` of the same dtype.

    A state dict holds the device-neutral layout of docs/numerics.md: `weight` uint8 `[N, row bytes]`,
    `weight_scales` uint8 `[N, Kp/32]`, `bias` if there is one, and `order` int32 `[Kp]` where `owns_order`: layers
    that read one input have one order, which is saved with the first of them; the others are its `followers`, and get
    the order that is loaded into it. In memory the weight is `placed` (`place()`), in the one layout that the device's
    kernel reads; the neutral one is gone, or in host memory where the device is no CPU.
    """

    def __init__(self, shape: LayerShape, plan: LayerPlan) -> None:
        super().__init__()
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.transposed = shape.transposed
        self._plan = replace(plan, order=None)
        self._host: tuple[Tensor, Tensor] | None = None
        self._counts = (*plan.layout.counts, plan.format_code)
        self.followers: list[QuantizedLinear] = []  # in a list they are no submodules
        sizes = (plan.weight_layout.row_bytes, plan.weight_layout.blocks)
        for name, size in zip(("weight", "weight_scales"), sizes):
            self.register_parameter(name, _bytes(torch.empty(0, size, dtype=torch.uint8)))
        self.register_parameter("bias", None)
        self.set_order(plan.order, plan.order is not None)
        self.register_buffer("placed", None, persistent=False)

    @classmethod
    def empty(
        cls, shape: LayerShape, plan: LayerPlan, bias: Tensor | None, *, owns_order: bool = False
    ) -> QuantizedLinear:
        """A layer for a loader to fill: weight and scales on the meta device.

        `plan` may lack its order; with `owns_order` there is an `order`, on the meta device too. `set_order` is to
        be called when all is loaded.
        """
        result = cls(shape, plan)
        result.order = None
        for name in ("weight", "weight_scales"):
            size = (shape.out_features, getattr(result, name).shape[1])
            setattr(result, name, _bytes(torch.empty(size, dtype=torch.uint8, device="meta")))
        if owns_order:
            order = torch.empty(plan.layout.channels, dtype=torch.int32, device="meta")
            result.set_order(order, True)
        if bias is not None:
            result.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return result

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: Tensor | None, transposed: bool = False
    ) -> QuantizedLinear:
        """The layer of a packed weight `[N, row bytes]`, placed on the device of its data."""
        shape = LayerShape(len(packed.data), packed.plan.in_features, transposed)
        result = cls(shape, packed.plan)
        result.weight, result.weight_scales = _bytes(packed.data), _bytes(packed.scales)
        result.set_order(packed.plan.order, result.owns_order)
        if bias is not None:
            result.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return result.place()

    def set_order(self, order: Tensor | None, owns_order: bool) -> None:
        """Set the channel order int32 `[Kp]`, and whether a state dict holds it under this layer's name.

        Where it does not, the caller adds this layer to the `followers` of the one that owns the order.
        """
        self.owns_order = owns_order
        if order is not None and self.device.type != "meta":
            order = order.to(self.device)
        self.register_buffer("order", order, persistent=owns_order)

    @property
    def plan(self) -> LayerPlan:
        """The layer's plan. Raises InvalidPlanError if the order that was loaded is none."""
        return replace(self._plan, order=None if self.order is None else self.order.detach().cpu())

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.out_features, self.in_features, self.transposed)

    @property
    def device(self) -> torch.device:
        return (self.placed if self.weight is None else self.weight).device

    def place(self) -> QuantizedLinear:
        """Turn the loaded weight into what the device's kernel reads, and drop the loaded one; returns self."""
        if self.placed is None:
            with torch.inference_mode(False):
                self.placed = self._place()
            if self.placed.device.type != "cpu":  # only the CPU's layout is read back
                self._host = (self.weight.detach().cpu(), self.weight_scales.detach().cpu())
            self.weight = self.weight_scales = None
        return self

    def packed(self) -> PackedWeight:
        """The weight in the device-neutral layout; on the CPU where it is placed."""
        data, scales = self._neutral()
        return PackedWeight(data, scales, self.plan)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            # The operators would leave channels out, or pad. A product that cannot be raises as nn.Linear does,
            # when it is traced too; a `raise` would have Dynamo run this layer uncompiled from then on.
            weight = x.new_empty(()).expand(self.out_features, self.in_features)
            return nn.functional.linear(x, weight)
        if torch.is_grad_enabled() and x.requires_grad:
            raise GradientError(
                reason="gradients are enabled and a quantised layer's input has one"
            )
        if not torch.compiler.is_compiling():
            refuse_tangents((x, self.bias))
        # An offloaded weight is placed for the call.
        placed = self._place() if self.placed is None else self.placed
        product = (placed, self.bias, self.out_features, *self._counts, x.dtype)
        if self._plan.weight_only:
            return torch.ops.micromix.weight_only_linear.default(x, self.order, *product)
        data, scales = torch.ops.micromix.quantize.default(
            x, self.order, *self._counts[:3], self._code
        )
        return torch.ops.micromix.linear.default(data, scales, *product)

    def extra_repr(self) -> str:
        k4, k6, k8, _ = self._counts
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, k4={k4}, k6={k6}, k8={k8}"
            + (f", activations={self._plan.activations}" if self._plan.weight_only else "")
        )

    @property
    def _code(self) -> int:
        return self._counts[3] & ~WEIGHT_IS_MXFP4

    def _place(self) -> Tensor:
        return torch.ops.micromix.place_weight(self.weight, self.weight_scales, *self._counts)

    def _unplace(self) -> None:
        self.weight, self.weight_scales = map(_bytes, self._neutral())
        self.placed = self._host = None

    def _neutral(self) -> tuple[Tensor, Tensor]:
        if self.placed is None:
            return self.weight.detach(), self.weight_scales.detach()
        if self._host is not None:
            return self._host
        return torch.ops.micromix.unplace_weight(self.placed, self.out_features, *self._counts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """A placed weight belongs to one kind of device: it travels in the neutral layout."""
        placed = self.placed is not None
        if placed and fn(self.placed[:0]).device == self.placed.device:
            self.placed, kept = None, self.placed
            super()._apply(fn, recurse)
            self.placed = kept
            return self
        if placed:
            self._unplace()
        super()._apply(fn, recurse)
        return self.place() if placed and self.weight.device.type != "meta" else self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        tensors = dict(zip(("weight", "weight_scales"), self._neutral()))
        tensors |= {"bias": self.bias, "order": self.order if self.owns_order else None}
        for name, tensor in tensors.items():
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        placed = self.placed is not None
        if placed and prefix + "weight" in state_dict:
            self._unplace()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if placed:
            self.place()
        if self.followers and prefix + "order" in state_dict and not self.order.is_meta:
            for follower in self.followers:
                follower.set_order(self.order, False)


def refuse_tangents(values: Sequence[object]) -> None:
    """Raise GradientError where forward-mode differentiation, which the operators would drop, goes through a tensor."""
    if compat.has_tangent(values):
        reason = "a tensor has a forward-mode tangent; its forward_ad.unpack_dual(tensor).primal has none"
        raise GradientError(reason=reason)


def _bytes(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
