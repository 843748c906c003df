"""Float weights into packed ones: quantised by a layer's plan, placed for its device, and kept.

A weight is packed once for each plan, however many graphs use it. It is kept while one of them does; what was packed
last, as long as the parameter.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from micromix_compile.errors import ReleasedWeightError, RoundedWeightError
from micromix_compile.live_modules import live_modules
from micromix_compile.ops import EMULATED
from micromix_compile.plan import LayerPlan, RoundedWeight, fingerprint

AUTO, MX_EMULATED = "auto", "mx_emulated"
KERNELS = (AUTO, MX_EMULATED)
"""The kernels that a user may ask for: the device's own, and the Blackwell kernel in software."""

one_packs = threading.RLock()
"""Held while weights are packed, compared or released: graphs and threads share them. Nothing under it compiles."""

_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> weak values
# What was packed last is what is left of a released weight, and what Dynamo asks for again when it restarts.
_last: WeakIdKeyDictionary = WeakIdKeyDictionary()
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of released parameters, for messages
_unguarded: list[weakref.ref] = []
_packings = 0


def format_code(plan: LayerPlan, kernel: str = AUTO) -> int:
    """The `format` argument of place_weight, linear and linears for a layer and a kernel of KERNELS."""
    return plan.format_code | (EMULATED if kernel == MX_EMULATED else 0)


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight in the device-neutral layout, as it is saved and sharded.

    `data` uint8 `[N, row_bytes]` and `scales` uint8 `[N, Kp/32]` of `plan.weight_layout`.
    """

    data: torch.Tensor
    scales: torch.Tensor
    plan: LayerPlan

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same bytes on another device: a weight is packed anywhere, and placed where it is used."""
        return PackedWeight(self.data.to(device), self.scales.to(device), self.plan)

    def place(self, kernel: str = AUTO) -> torch.Tensor:
        """The flat uint8 buffer that `micromix::linear` of the data's device, or of a kernel by name, reads."""
        counts, code = self.plan.layout.counts, format_code(self.plan, kernel)
        return torch.ops.micromix.place_weight(self.data, self.scales, *counts, code)


class PlacedWeight:
    """A packed weight on its device, and what is needed to notice that its parameter has changed.

    Attributes:
        buffer: flat uint8, in the layout of the device's kernel. Its address never changes.
        out_features: N.
        format_code: what `micromix::linear` is given as `format` beside the buffer.
        name: the layer's name, for messages.
        released: whether the float storage of the parameter was given back.
    """

    def __init__(
        self,
        name: str,
        parameter: torch.Tensor,
        plan: LayerPlan,
        transposed: bool,
        rows: torch.Tensor | None = None,
        kernel: str = AUTO,
        rounded: RoundedWeight | None = None,
    ) -> None:
        self.rounded = rounded
        self.name = name
        self.plan = plan
        self.kernel = kernel
        self.format_code = format_code(plan, kernel)
        self.transposed = transposed
        self.rows = rows
        self.released = False
        self.out_features = parameter.shape[1 if transposed else 0]
        self.buffer = self._pack(parameter)
        self.state = state(parameter)
        self.sample = _sample(parameter)

    def _pack(self, parameter: torch.Tensor) -> torch.Tensor:
        global _packings
        _packings += 1
        # A buffer made under inference_mode could not be packed again outside of it.
        with torch.inference_mode(False):
            packed = pack_weight(
                parameter, self.plan, self.transposed, self.rows, self.rounded, self.name
            )
            return packed.place(self.kernel)

    def refresh(self, parameter: torch.Tensor, look: bool = False) -> None:
        """Pack again if the parameter was changed in place since; the buffer keeps its address.

        `look`: at some of its values too. What is written through `parameter.data`, as adapters are merged, changes
        nothing else; so each compilation looks.
        """
        changed = state(parameter) != self.state
        if not changed and look and not self.released:
            changed = not torch.equal(_sample(parameter), self.sample)
        if changed:
            self.buffer.copy_(self._pack(parameter))
            self.state, self.sample = state(parameter), _sample(parameter)
            self.released = False

    def release(self, parameter: torch.Tensor, layers: int, modules: int) -> None:
        """Give back the parameter's float storage, unless something else needs it.

        That is another module: as many `layers` as read this weight instead, and no more, may be the `modules` that
        have the parameter (`owners`; a tied embedding may run in a graph of its own). Or it is what the parameter is a
        view of. torch checks such a storage in some operations only, and reads from address 0 in others; so copies of
        the parameter are refused from now on, and `refuse_released`, to be called soon after, does so for its modules.
        """
        storage = parameter.untyped_storage()
        if self.released or modules > layers or storage.nbytes() != parameter.nbytes:
            return
        if not storage.resizable():  # of a mapped file, say: leave it to whoever else holds it
            storage = torch.UntypedStorage(parameter.nbytes, device=parameter.device)
            with torch.no_grad():
                parameter.set_(storage, 0, parameter.shape, parameter.stride())
        storage.resize_(0)
        _names[parameter] = self.name
        for method in _COPYING:
            setattr(parameter, method, _Refusal(weakref.ref(parameter), method))
        _unguarded.append(weakref.ref(parameter))
        self.released = True
        self.state = state(parameter)


_COPYING = ("__deepcopy__", "__reduce_ex__")  # what `copy` and `pickle` ask an object itself for


@dataclass(frozen=True)
class _Refusal:
    """Stands on a released parameter in the place of a method, and goes once the weight is there again."""

    parameter: weakref.ref
    method: str

    def __call__(self, argument: Any) -> Any:
        parameter = self.parameter()
        if is_released(parameter):
            raise ReleasedWeightError(layer=_names[parameter])
        for method in _COPYING:
            delattr(parameter, method)
        return getattr(parameter, self.method)(argument)


def owners() -> Counter[int]:
    """How many modules of this process have a parameter, by its id.

    An embedding counts twice: its weight may be a layer's without a module that says so.
    """
    count: Counter[int] = Counter()
    for module in live_modules():
        times = 2 if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) else 1
        for parameter in module.__dict__.get("_parameters", {}).values():
            if parameter is not None:
                count[id(parameter)] += times
    return count


def is_released(parameter: torch.Tensor) -> bool:
    """Whether a float weight's storage was given back."""
    return parameter.untyped_storage().nbytes() == 0 and parameter.numel() > 0


def refuse_released() -> None:
    """Make the modules whose weights were released since the last call raise ReleasedWeightError.

    They do so when they run eagerly, and when their state is asked for, which could be saved without the weights.
    """
    if not _unguarded:
        return
    released = {id(parameter) for ref in _unguarded if (parameter := ref()) is not None}
    _unguarded.clear()
    for module in live_modules():
        own = module.__dict__.get("_parameters", {}).values()
        if any(id(parameter) in released for parameter in own):
            module.register_forward_pre_hook(refuse)
            module.register_state_dict_pre_hook(refuse)


def refuse(module: torch.nn.Module, *_: Any) -> None:
    """The hook that refuse_released registers; it lets a module go on once its weight is restored."""
    if torch.compiler.is_compiling():  # the compiled model has no use for the float weight
        return
    for parameter in module._parameters.values():
        if parameter is not None and is_released(parameter):
            raise ReleasedWeightError(layer=_names.get(parameter, type(module).__name__))


def state(parameter: torch.Tensor) -> tuple[int, int]:
    """What changes when a parameter's values change: its version counter and its address.

    A write through `parameter.data` moves neither; torch itself does not see such a write before
    `torch.autograd.graph.increment_version`. Inference tensors have no version counter.
    """
    return (0 if parameter.is_inference() else parameter._version, parameter.data_ptr())


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of up to 64 x 64 of a weight's values, spread over it, as bytes: NaN is equal to itself then."""
    if is_released(parameter):
        return torch.empty(0, dtype=torch.uint8)
    with torch.inference_mode(False), torch.no_grad():
        steps = [slice(None, None, max(1, -(-size // 64))) for size in parameter.shape]
        return parameter.detach()[tuple(steps)].contiguous().clone().view(torch.uint8)


def _count_step(optimizer: torch.optim.Optimizer, *_) -> None:
    """A fused optimizer changes its parameters and not their versions."""
    if len(_cache):
        for group in optimizer.param_groups:
            changed = [p for p in group["params"] if p in _cache and p.grad is not None]
            torch.autograd.graph.increment_version(changed)


register_optimizer_step_post_hook(_count_step)

_version = operator.attrgetter("_version")


def states(parameters: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """What `state` is of each, all versions and all addresses: at a tenth of the time, as every call asks for it."""
    try:
        versions = list(map(_version, parameters))
    except RuntimeError:  # an inference tensor is among them
        versions = [state(parameter)[0] for parameter in parameters]
    return versions, list(map(torch.Tensor.data_ptr, parameters))


class OrderedBias:
    """A copy of a bias in the row order of its layer's weight; changes with its parameter as a PlacedWeight does."""

    def __init__(self, parameter: torch.Tensor, rows: torch.Tensor) -> None:
        self.rows = rows.to(parameter.device)
        self.buffer = self._ordered(parameter)
        self.state = state(parameter)

    def _ordered(self, parameter: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return parameter.detach()[self.rows]

    def refresh(self, parameter: torch.Tensor) -> None:
        """Order it again if the parameter was changed in place since; the buffer keeps its address."""
        if state(parameter) != self.state:
            self.buffer.copy_(self._ordered(parameter))
            self.state = state(parameter)


def pack_weight(
    weight: torch.Tensor,
    plan: LayerPlan,
    transposed: bool = False,
    rows: torch.Tensor | None = None,
    rounded: RoundedWeight | None = None,
    name: str = "a layer",
) -> PackedWeight:
    """Quantise a weight `[N, K]` (`[K, N]` where `transposed`), bf16, f16 or f32, by `plan`.

    `rows` int64 `[N]`: packed row i is row `rows[i]` of the weight. With `rounded`, the plan's rounded weight, that
    is what is packed; raises RoundedWeightError, with the layer's `name`, if it was rounded from other values.
    Raises ReleasedWeightError where the weight's storage was given back.
    """
    if is_released(weight):
        raise ReleasedWeightError(layer=name)
    layout = plan.weight_layout
    if rounded is not None:
        if fingerprint(weight) != rounded.source:
            raise RoundedWeightError(layer=name)
        with torch.inference_mode(False):
            data, scales = (
                t if rows is None else t[rows.cpu()] for t in (rounded.data, rounded.scales)
            )
            return PackedWeight(data.to(weight.device), scales.to(weight.device), plan)
    with torch.inference_mode(False), torch.no_grad():
        matrix = weight.detach().t() if transposed else weight.detach()
        if rows is not None:
            matrix = matrix[rows.to(matrix.device)]
        order = plan.order_on(matrix.device)
        data, scales = torch.ops.micromix.quantize(matrix, order, *layout.counts, layout.code)
    return PackedWeight(data, scales, plan)


def placed_weight(
    name: str,
    parameter: torch.Tensor,
    plan: LayerPlan,
    transposed: bool = False,
    rows: torch.Tensor | None = None,
    kernel: str = AUTO,
    rounded: RoundedWeight | None = None,
) -> PlacedWeight:
    """The placed form of a parameter under `plan`, packed at the first call and shared while someone holds it.

    `rows` and `rounded` are as in `pack_weight`, `kernel` one of KERNELS; another of any is another placed weight.
    """
    placed = _cache.setdefault(parameter, weakref.WeakValueDictionary())
    key = (
        plan.digest,
        transposed,
        parameter.device,
        tuple(parameter.shape),
        None if rows is None else tuple(rows.tolist()),
        kernel,
        None if rounded is None else rounded.digest,
    )
    weight = placed.get(key)
    if weight is None:
        weight = PlacedWeight(name, parameter, plan, transposed, rows, kernel, rounded)
        placed[key] = weight
    else:
        weight.refresh(parameter, look=True)
    _last[parameter] = weight
    return weight


def packings() -> int:
    """How many weights this process has packed; a weight packed twice counts twice."""
    return _packings
