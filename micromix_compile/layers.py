"""The linear layers of a model as modules and by their names: what has which shape, and which weight is whose.

Names are those without torch.compile, which wraps a module, the whole model or a part of it, in one that holds
`_orig_mod`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from micromix_compile import _torch_compat as compat

__all__ = [
    "LayerShape",
    "choose_name",
    "layer_names",
    "linear_shape",
    "linear_shapes",
    "named_modules",
    "named_weights",
    "other_products",
]

# Classes of transformers that spell nn.Linear's forward in their own way.
_SAME_FORWARD = {"FalconLinear"}
# What owns matrices and does not multiply by them, or not as a linear layer.
_NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm)
_NO_PRODUCTS += (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NO_PRODUCTS += (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NO_PRODUCTS += (nn.utils.parametrize.ParametrizationList,)


class LayerShape(NamedTuple):
    """The shape of a linear layer: K inputs, N outputs.

    The weight is [N, K], or [K, N] if ``transposed`` (Conv1D of GPT-2).
    """

    out_features: int
    in_features: int
    transposed: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape of the float weight."""
        n, k = self.out_features, self.in_features
        return (k, n) if self.transposed else (n, k)

    def __str__(self) -> str:
        transposed = ", transposed" if self.transposed else ""
        return f"K={self.in_features}, N={self.out_features}{transposed}"


def linear_shape(module: nn.Module) -> LayerShape | None:
    """The shape of a float linear module: `nn.Linear`, or GPT-2's `Conv1D`; None for any other.

    A subclass of `nn.Linear` counts where its forward is that of `nn.Linear`, or known to be the same: a
    QuantizedLinear computes no other. The output projection of `nn.MultiheadAttention` has it, and is never called.
    """
    if isinstance(module, nn.Linear):
        own = type(module).forward is not nn.Linear.forward
        other = own and type(module).__name__ not in _SAME_FORWARD
        if other or isinstance(module, compat.UncalledLinear):
            return None
        return LayerShape(module.out_features, module.in_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return LayerShape(module.nf, module.weight.shape[0], transposed=True)
    return None


def linear_shapes(model: nn.Module) -> dict[str, LayerShape]:
    """The float linear modules of a model, by name."""
    shapes = ((name, linear_shape(module)) for name, module in named_modules(model))
    return {name: shape for name, shape in shapes if shape is not None}


def other_products(model: nn.Module) -> dict[str, list[str]]:
    """The modules that own a matrix and are none of `linear_shapes`, with the names of their own parameters.

    No QuantizedLinear can replace them: classes derived from `nn.Linear`, fused experts, recurrent layers. Embeddings,
    norms and convolutions are left out, and what is known by its name to be one.
    """
    return {
        name: [weight for weight, _ in module.named_parameters(recurse=False)]
        for name, module in named_modules(model)
        if linear_shape(module) is None and _multiplies(module)
    }


def _multiplies(module: nn.Module) -> bool:
    """Whether a module seems to own a matrix that its input is multiplied by."""
    named = any(word in type(module).__name__ for word in ("Embed", "Norm", "Position"))
    if named or isinstance(module, _NO_PRODUCTS):
        return False
    return isinstance(module, nn.Linear) or any(
        # A size of 1 is there to be broadcast, as in a class token.
        weight.is_floating_point() and weight.dim() - weight.shape.count(1) > 1
        for weight in module.parameters(recurse=False)
    )


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model; what torch.compile wraps a module in comes before it, under the same name."""
    return ((_plain(name), module) for name, module in model.named_modules())


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What may be a layer's weight: parameters, and buffers, as filter banks are; by each of its names."""
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return ((_plain(name), tensor) for name, tensor in tensors)


def layer_names(model: nn.Module) -> Mapping[Tensor, list[str]]:
    """Each parameter and buffer -> the names of the layers it may be the weight of.

    A weight called `x.weight` (`x.placed` in a QuantizedLinear) belongs to layer `x`; any other keeps its own name (`attn.in_proj_weight`). A
    tied or shared parameter has several names. Keyed by identity; holds no parameter alive.
    """
    names: WeakIdKeyDictionary = WeakIdKeyDictionary()
    for name, tensor in named_weights(model):
        layer = name.removesuffix(".weight").removesuffix(".placed")
        names.setdefault(tensor, []).append(layer)
    return names


def choose_name(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that a graph's own `name` for a layer means; None where there is no candidate.

    A graph that starts inside the model (after a graph break, or where only a part is compiled) knows a layer by
    the end of its name, hence the longest common ending, in whole parts.
    """
    parts = name.split(".")[::-1]

    def common(candidate: str) -> int:
        count = 0
        for mine, theirs in zip(parts, candidate.split(".")[::-1]):
            if mine != theirs:
                break
            count += 1
        return count

    return max(candidates, key=common, default=None)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
