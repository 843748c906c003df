"""Rounding of weights that looks at what the layers are given: GPTQ (arXiv 2210.17323) in the MX grids.

A weight is rounded column by column, in the order of its layout, and the error of each column is made up for by
the columns that are left, across formats and rotations. What the layer should give is measured on the float
model, what it is given on the model as far as it is quantised (activations too): the weights are first moved
towards making up for that drift (the least squares of GPTAQ, arXiv 2504.02692, damped and taken in part, since the
whole of it fits the calibration text and not the next one).

Memory is that of one block of the model: the inputs of its layers, and one K x K matrix or two.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import micromix_compile.ops  # noqa: F401  (registers torch.ops.micromix)
from micromix_compile.batches import call, evaluating, first_device, on_device
from micromix_compile.errors import EmptyCalibrationError, NotRoundedWarning, RecipeError
from micromix_compile.layers import linear_shape, named_modules
from micromix_compile.mx import (
    BLOCK,
    MixedLayout,
    decode,
    dequantize,
    encode,
    inverse_scale_values,
    pack_codes,
    rearrange,
    scale_bytes,
    scale_values,
)
from micromix_compile.packing import PackedWeight
from micromix_compile.plan import LayerPlan, ModelPlan, RoundedWeight, fingerprint
from micromix_compile.quantized_linear import QuantizedLinear

__all__ = ["compensate", "gptq", "round_weights"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


_DAMPING = 0.01  # a part of the Hessian's mean diagonal
_DRIFT = 0.25  # the part of the drift that weights make up for, and its damping
_DRIFT_DAMPING = 0.1


def round_weights(model: nn.Module, plan: ModelPlan, batches: Sequence[Any]) -> ModelPlan:
    """The plan with the weights of its layers rounded by GPTQ, on what `batches` (as for `Calibration.run`) bring.

    Blocks of a decoder (the entries of the `ModuleList` that holds most of the planned weights, where each reads
    what the one before it gives) are taken one after the other, each with those before it quantised; a model without
    such a list is one block. Layers outside of the blocks, an output head, come last: what they should be given is
    measured behind the quantised blocks, so that nothing of the blocks' drift is made up for there. Layers in a float
    linear module are rounded, all others stay with nearest.
    The model is changed while this runs and left as it was; it runs uncompiled. What blocks hand on beside their first
    value (a residual of its own) is that of the float model.

    Layers that are no float linear module, or do not run once for each batch (experts), keep nearest rounding: a
    NotRoundedWarning names them. Raises EmptyCalibrationError if there are no batches, and RecipeError if a weight is
    offloaded.
    """
    if not len(batches):
        raise EmptyCalibrationError()
    layers = {name: model.get_submodule(name) for name in plan if _is_linear(model, name)}
    if any(module.weight.device.type == "meta" for module in layers.values()):
        expected = "'nearest' for a model that is offloaded: GPTQ needs the weights in memory"
        raise RecipeError(option="rounding", value="gptq", expected=expected)
    rounded: dict[str, RoundedWeight] = {}
    with (
        _inference(model),
        _tensors_with_versions(model),
        torch.no_grad(),
        contextlib.ExitStack() as replaced,
    ):
        stages = list(_stages(model, layers, plan, batches))
        total = sum(len(groups) for _, groups in stages)
        progress = tqdm(total=total, desc="rounding weights", unit="input", disable=None)
        exact = actual = stages[0][0].inputs if stages else []
        for stage, groups in stages:
            if isinstance(
                stage, _Model
            ):  # what lies outside of the blocks reads the quantised blocks
                exact = actual = stage.inputs
            given, after = _float_run(stage, groups, layers, exact)
            for names in groups:
                progress.update()
                layer = plan[names[0]]
                statistics = _drift(stage, layers[names[0]], layer, given.pop(names[0]), actual)
                if statistics is None:
                    continue
                moved = statistics.movement()
                for name in names:
                    weight = _matrix(layers[name])
                    ordered = _ordered(weight, layer)
                    ordered = ordered + _DRIFT * (ordered @ moved)
                    data, scales = gptq(ordered, statistics.hessian, layer.weight_layout)
                    rounded[name] = RoundedWeight(
                        data.cpu(), scales.cpu(), fingerprint(layers[name].weight)
                    )
                    replaced.enter_context(_quantised(layers[name], layer, data, scales))
            actual = [stage.whole(i, batch) for i, batch in enumerate(actual)]
            exact = after
        progress.close()
    if missed := [name for name in plan if name not in rounded]:
        warnings.warn(NotRoundedWarning(layers=missed), stacklevel=2)
    return plan.with_rounded({name: rounded[name] for name in plan if name in rounded})


def gptq(
    weight: Tensor, hessian: Tensor, layout: MixedLayout, damping: float = _DAMPING
) -> tuple[Tensor, Tensor]:
    """Rounds a weight `[N, Kp]`, float32, in the layout's order and rotation; returns packed `data` and `scales`.

    `hessian` `[Kp, Kp]` is Σ x xᵀ of the activations, of any scale. A block's scale follows the layout's rule, from
    the weights as they are when the block's turn comes.
    """
    weight = weight.clone()
    upper = _inverse_factor(hessian, damping).to(weight.device)
    data = torch.empty(len(weight), layout.row_bytes, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), layout.blocks, dtype=torch.uint8, device=weight.device)
    for segment in layout.segments():
        codes = []
        for start in range(segment.start, segment.stop, BLOCK):
            stop = start + BLOCK
            block, own = weight[:, start:stop], upper[start:stop, start:stop]
            scale = scale_bytes(block.abs().amax(dim=1), segment.fmt, segment.rule)
            shrink, grow = inverse_scale_values(scale), scale_values(scale)
            scales[:, start // BLOCK] = scale
            errors = torch.empty_like(block)
            for i in range(BLOCK):
                column = block[:, i]
                codes.append(encode(column * shrink, segment.fmt))
                error = (column - decode(codes[-1], segment.fmt) * grow) / own[i, i]
                errors[:, i] = error
                block[:, i + 1 :] -= torch.outer(error, own[i, i + 1 :])
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
        packed = pack_codes(torch.stack(codes, dim=1), segment.fmt.bits)
        data[:, segment.byte_start : segment.byte_stop] = packed
    return data, scales


def compensate(hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The matrix M `[K, K]` by which W (1 + M) on the actual inputs x comes closest to W on the exact inputs z.

    `hessian` is Σ x xᵀ, `cross` Σ x (z - x)ᵀ; `damping` is a part of the mean of the hessian's diagonal.
    """
    return torch.linalg.solve(_damped(hessian, damping), cross.double()).t().float()


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(hessian, damping)))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _damped(hessian: Tensor, damping: float) -> Tensor:
    result = hessian.to(torch.float64, copy=True)
    diagonal = result.diagonal()
    diagonal += damping * diagonal.mean() + torch.finfo(torch.float32).tiny
    return result


class _Drift:
    """Second moments of a layer's actual inputs, quantised, and of what they lack of the exact ones."""

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.hessian: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, x: Tensor, exact: Tensor) -> None:
        rows = _given(x, self.plan).view(-1, self.plan.layout.channels)
        lack = _ordered(exact.reshape(-1, exact.shape[-1]), self.plan) - rows
        moments = rows.t() @ rows, rows.t() @ lack
        if self.hessian is None:
            self.hessian, self.cross = moments
        else:
            self.hessian += moments[0]
            self.cross += moments[1]

    def movement(self) -> Tensor:
        return compensate(self.hessian, self.cross, _DRIFT_DAMPING)


def _drift(
    stage: _Stage, module: nn.Module, plan: LayerPlan, given: list[Tensor], actual: list[Any]
) -> _Drift | None:
    """What a layer is given on the quantised model; None where those are other rows than on the float model."""
    statistics = _Drift(plan)
    for i, batch in enumerate(actual):
        x = stage.until(module, i, batch)
        if x is None or x.shape != given[i].shape:  # of an expert: a router has chosen again
            return None
        statistics.add(x, given[i])
    return statistics


def _given(x: Tensor, plan: LayerPlan) -> Tensor:
    """float32 `[..., Kp]`: what the product reads of activations `[..., K]`, in the order and the rotation of the layout."""
    if plan.weight_only:
        return _ordered(x, plan).to(torch.bfloat16).float()
    layout, order = plan.layout, plan.order_on(x.device)
    packed = torch.ops.micromix.quantize(x, order, *layout.counts, layout.code)
    return dequantize(*packed, layout)


def _ordered(values: Tensor, plan: LayerPlan) -> Tensor:
    """float32 `[..., Kp]` of float `[..., K]`, in the order and the rotation of the layout."""
    return rearrange(values, plan.layout, plan.order_on(values.device))


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return linear_shape(module) is not None and module.weight.dtype in _DTYPES


def _matrix(module: nn.Module) -> Tensor:
    return module.weight.t() if linear_shape(module).transposed else module.weight


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """The model uncompiled, without dropout, and without a cache, which would keep every block's keys.

    Parts of a model have configurations of their own: that of the text in a model of images.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None)]
    kept = [config.use_cache for config in caching]
    try:
        for config in caching:
            config.use_cache = False
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config, cached in zip(caching, kept, strict=True):
            config.use_cache = cached


def _tensors_with_versions(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Without inference mode, whose tensors do not tell whether they were written to, if the model has none of these."""
    own = (*model.parameters(), *model.buffers())
    return torch.inference_mode(
        torch.is_inference_mode_enabled() and any(map(torch.is_inference, own))
    )


@contextlib.contextmanager
def _quantised(module: nn.Module, plan: LayerPlan, data: Tensor, scales: Tensor) -> Iterator[None]:
    """The module with a quantised weight, and activations as the compiled model gives them to the product."""
    if data.device.type == "cpu":
        packed = PackedWeight(data, scales, plan)
        run = QuantizedLinear.from_packed(packed, module.bias).forward
    else:
        weight = dequantize(data, scales, plan.weight_layout).to(module.weight.dtype)

        def run(x: Tensor) -> Tensor:
            return F.linear(_given(x, plan).to(x.dtype), weight, module.bias)

    own = vars(module).get("forward")  # accelerate puts its hooks there
    module.forward = lambda *args, **kwargs: run(_input(args, kwargs))
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The one argument of a linear module's forward, given by its place or by its name."""
    return next(iter((*args, *kwargs.values())))


class _Reached(Exception):
    """The layer whose input was wanted has been reached: the rest of the run is not needed."""


class _Stage:
    """A block of the model: runs on what the blocks before it give, batch by batch."""

    def __init__(self, block: nn.Module, calls: list[tuple[tuple, dict]]) -> None:
        self.block, self.calls = block, calls
        self.inputs = [args[0] for args, _ in calls]  # None but for the first block

    def whole(self, i: int, x: Any) -> Any:
        args, kwargs = self.calls[i]
        # A copy: a block may write to its input, which is read again.
        return _first(self.block(x.clone(), *args[1:], **kwargs))

    def until(self, module: nn.Module, i: int, x: Any) -> Tensor | None:
        """The input of a module of this block; None if it is not reached."""
        found: list[Tensor] = []

        def stop(own: Tensor) -> None:
            found.append(own)
            raise _Reached

        with _hooked(module, stop), contextlib.suppress(_Reached):
            self.whole(i, x)
        return found[0] if found else None


class _Model(_Stage):
    """The whole model as one block; a batch is its own input."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.block, self.inputs = model, list(batches)

    def whole(self, i: int, x: Any) -> Any:
        batch = on_device(x, first_device(self.block))
        if hasattr(batch, "keys") and "use_cache" in batch:
            batch["use_cache"] = False
        call(self.block, batch)
        return x


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[[Tensor], None]) -> Iterator[None]:
    """`hook` gets the input of a linear module whenever it runs."""
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: hook(_input(args, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _stages(
    model: nn.Module, layers: dict[str, nn.Module], plan: ModelPlan, batches: Sequence[Any]
) -> Iterator[tuple[_Stage, list[list[str]]]]:
    """The blocks in the order they run, and the layers of each by the input that they read."""
    whole = _Model(model, batches)
    name, blocks = _decoder(model, layers)
    calls, chained, once = _calls(whole, blocks, layers)
    groups = _groups(whole, {n: layers[n] for n in once}, plan)
    for i, block in enumerate(blocks if chained else ()):
        # Of a tensor that several blocks read, an encoder's result, each rounds its own layers: those of blocks to come
        # must be float while these are measured.
        own = f"{name}.{i}."
        inside = [[n for n in names if n.startswith(own)] for names in groups]
        groups = [[n for n in names if not n.startswith(own)] for names in groups]
        yield _Stage(block, calls[i]), list(filter(None, inside))
    if groups := list(filter(None, groups)):
        yield whole, groups


def _decoder(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[str, list[nn.Module]]:
    """The ModuleList with most of the weights, and its name; among equals the outermost."""
    best, most = ("", []), 0
    for name, module in named_modules(model):
        if isinstance(module, nn.ModuleList):
            size = sum(m.weight.numel() for n, m in layers.items() if n.startswith(f"{name}."))
            if size > most:
                best, most = (name, list(module)), size
    return best


def _calls(
    whole: _Model, blocks: list[nn.Module], layers: dict[str, nn.Module]
) -> tuple[list[list[tuple[tuple, dict]]], bool, list[str]]:
    """What each block is called with besides its input, whether each reads what the one before it gives, and the
    layers that run once for each batch.

    Blocks that are called with a cache are not run apart: it would grow with every run.
    """
    calls: list[list[tuple[tuple, dict]]] = [[] for _ in blocks]
    state: dict[str, Any] = {"before": None, "chained": True}
    ran: Counter[str] = Counter()
    once = list(layers)

    def entered(i: int, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else None
        state["chained"] &= isinstance(x, Tensor) and (i == 0 or x is state["before"])
        others = (*args[1:], *kwargs.values())
        state["chained"] &= not any(type(other).__name__.endswith("Cache") for other in others)
        kept = x.clone() if i == 0 and isinstance(x, Tensor) else None
        calls[i].append(((kept, *args[1:]), kwargs))

    with contextlib.ExitStack() as hooks:
        for name, module in layers.items():
            hooks.enter_context(_hooked(module, lambda _, name=name: ran.update([name])))
        for i, block in enumerate(blocks):
            handles = (
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, i=i: entered(i, args, kwargs), with_kwargs=True
                ),
                block.register_forward_hook(
                    lambda _, args, output: state.update(before=_first(output))
                ),
            )
            for handle in handles:
                hooks.callback(handle.remove)
        for i, batch in enumerate(whole.inputs):
            whole.whole(i, batch)
            once = [name for name in once if ran[name] == i + 1]
    chained = state["chained"] and all(len(own) == len(whole.inputs) for own in calls)
    return calls, chained, once


def _groups(whole: _Model, layers: dict[str, nn.Module], plan: ModelPlan) -> list[list[str]]:
    """The layers in the order they run, those together that read one tensor, as it is then, by one plan."""
    groups: list[list[str]] = []
    tensors: list[tuple[Tensor, int | None]] = []

    def seen(name: str, x: Tensor) -> None:
        version = None if x.is_inference() else x._version
        for (known, before), group in zip(tensors, groups, strict=True):
            if (
                known is x
                and version is not None
                and before == version
                and plan[name] == plan[group[0]]
            ):
                group.append(name)
                return
        tensors.append((x, version))
        groups.append([name])

    with contextlib.ExitStack() as hooks:
        for name, module in layers.items():
            hooks.enter_context(_hooked(module, lambda x, name=name: seen(name, x)))
        whole.whole(0, whole.inputs[0])
    return groups


def _float_run(
    stage: _Stage, groups: list[list[str]], layers: dict[str, nn.Module], exact: list[Any]
) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """The exact inputs of each group, and what the block gives, batch by batch."""
    given: dict[str, list[Tensor]] = {names[0]: [] for names in groups}
    with contextlib.ExitStack() as hooks:
        for names in groups:
            keep = given[names[0]].append
            # Copies: the model may write to an input once it is read.
            hooks.enter_context(_hooked(layers[names[0]], lambda x, keep=keep: keep(x.clone())))
        after = [stage.whole(i, batch) for i, batch in enumerate(exact)]
    return given, after
