"""The quantisation method "micromix" of transformers: `from_pretrained` of quantised checkpoints, and of float ones.

Importing this module, which `import micromix_compile` does, makes the method known to transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from micromix_compile.allocation import uniform_plan
from micromix_compile.attachment import skips_of, warn_of_unplanned
from micromix_compile.checkpoint import METHOD, Description, read_tensor, verify_files
from micromix_compile.errors import CheckpointClassError, CheckpointError, OptionError
from micromix_compile.layers import linear_shape, linear_shapes
from micromix_compile.plan import ModelPlan
from micromix_compile.planned import AnyPlan, as_plan, pack_layer, warn_of_others
from micromix_compile.quantized_linear import QuantizedLinear
from micromix_compile.recipe import Recipe

__all__ = ["MicroMixConfig", "MicroMixQuantizer"]


@register_quantization_config(METHOD)
class MicroMixConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=)` takes to quantise a float checkpoint while it is loaded.

    Args:
        plan: a ModelPlan, the path of a saved one, or a Recipe that needs no calibration; MXFP8 by default.
        facts: what config.json of a quantised checkpoint holds; not for users.

    Raises PlanFileError and FileVersionError for a file, and OptionError for what is no plan, and other options.
    """

    def __init__(self, plan: AnyPlan | None = None, **facts: Any) -> None:
        self.quant_method = METHOD
        facts.pop("quant_method", None)
        self.description = None
        if facts and not facts.keys() & {"version", "groups", "layers", "owners", "plan_digest"}:
            valid = "plan, a ModelPlan, the path of a saved one, or a Recipe, as in Recipe(format='mxfp4')"
            raise OptionError(option=next(iter(facts)), reason="is not known", valid=valid)
        if facts:
            recipe = facts.get("recipe") or {}
            self.description = Description.from_dict({**facts, "recipe": recipe})
            return
        self.plan = Recipe(format="mxfp8") if plan is None else as_plan(plan)

    def to_dict(self) -> dict[str, Any]:
        if self.description is not None:
            return self.description.to_dict()
        return {"quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def plan_for(self, model: nn.Module) -> ModelPlan:
        """The plan of a float model. Raises PlanMismatchError or RecipeError."""
        shapes = linear_shapes(model)
        if isinstance(self.plan, Recipe):
            warn_of_others(model, self.plan.skips)
            return uniform_plan(shapes, self.plan)
        self.plan.check(shapes)
        warn_of_unplanned(self.plan, model, stacklevel=4)
        warn_of_others(model, skips_of(self.plan))
        return self.plan


@register_quantizer(METHOD)
class MicroMixQuantizer(HfQuantizer):
    """Puts QuantizedLinear modules into a model on the meta device, and fills them as the files are read."""

    requires_calibration = False

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict):
            _refuse_disk(device_map)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            self.plan = config.plan_for(model)
            self.packed: set[str] = set()
            for name, layer in self.plan.items():
                module = model.get_submodule(name)
                shape = self.plan.shapes[name]
                empty = QuantizedLinear.empty(shape, layer, module.bias)
                # Until it is packed: transformers before 5.23 casts what it reads to the type that it finds here.
                empty.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
                model.set_submodule(name, empty)
            self.tied = _untie(model, self.plan)
            return
        description = config.description
        self.path = model.config.name_or_path
        self.holder = verify_files(description, checkpoint_files or [])
        for name, (group, shape) in description.layers.items():
            module = _submodule(model, name)
            found = None if module is None else linear_shape(module)
            saved = ", ".join(model.config.architectures or ())
            if found is None and saved and type(model).__name__ not in saved.split(", "):
                raise CheckpointClassError(
                    path=self.path, saved=saved, given=type(model).__name__, layer=name
                )
            if found != shape:
                has = "no such linear layer" if found is None else str(found)
                reason = f"it has a layer {name} with {shape}, the model has {has}"
                raise CheckpointError(path=self.path, reason=reason)
            empty = QuantizedLinear.empty(
                shape,
                description.groups[group],
                module.bias,
                owns_order=description.owns_order(name),
            )
            model.set_submodule(name, empty)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        if self.pre_quantized:
            orders = {o: model.get_submodule(o).order for o in config.description.owners if o}
            self.plan = config.description.plan(orders, self.path)
        else:
            _refuse_disk(getattr(model, "hf_device_map", None) or {})
            self._pack_the_rest(model)
            config.description = Description.of(self.plan, self.plan)
        for name, layer in self.plan.items():
            module = model.get_submodule(name)
            owner = config.description.owner(name)
            module.set_order(layer.order, owner == name)
            if owner not in (None, name):
                model.get_submodule(owner).followers.append(module)
            if module.weight.device.type == "cpu" and self.pre_quantized:
                for tensor in ("weight", "weight_scales"):
                    key = f"{name}.{tensor}"
                    getattr(module, tensor).data = read_tensor(self.holder[key], key)
            if module.weight.device.type != "meta":  # else accelerate keeps it on disk
                module.place()
        model.requires_grad_(False)
        self.plan.attach_rest(model)
        return model

    def _pack_the_rest(self, model: nn.Module) -> None:
        """Planned layers that the files have no weight for: those tied to another parameter. Raises CheckpointError."""
        for name in self.plan.keys() - self.packed:
            source = self.tied.get(f"{name}.weight")
            if source is None:
                reason = f"{name}.weight is missing, which the plan has"
                raise CheckpointError(path=model.config.name_or_path, reason=reason)
            packed = pack_layer(self.plan, name, model.get_parameter(source))
            module = model.get_submodule(name)
            module.weight = nn.Parameter(packed.data, requires_grad=False)
            module.weight_scales.data = packed.scales
        if self.tied:
            model.config.tie_word_embeddings = False  # the head has a weight of its own now

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        name, _, tensor = param_name.rpartition(".")
        module = _submodule(model, name)
        return not self.pre_quantized and isinstance(module, QuantizedLinear) and tensor == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.plan, self.packed)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        # transformers is about to write files of its own, whose digests nobody knows yet.
        self.quantization_config.description.files = {}
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """One float weight, as it comes from the file, into the packed weight of its layer."""

    def __init__(self, plan: ModelPlan, packed: set[str]) -> None:
        self.plan, self.packed = plan, packed

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        ((key, weight),) = input_dict.items()
        weight = weight[0] if isinstance(weight, list) else weight
        name = key.removesuffix(".weight")
        packed = pack_layer(self.plan, name, weight)
        self.packed.add(name)
        return {key: packed.data, f"{name}.weight_scales": packed.scales}


def _untie(model: nn.Module, plan: ModelPlan) -> dict[str, str]:
    """A planned output head that was tied to the embedding has a weight of its own; returns what it was tied to."""
    tied = [n for n in model.all_tied_weights_keys if n.removesuffix(".weight") in plan]
    return {name: model.all_tied_weights_keys.pop(name) for name in tied}


def _refuse_disk(device_map: dict[str, Any]) -> None:
    """accelerate reads what is on disk from the float files, not what was made of it. Raises OptionError."""
    if "disk" in device_map.values():
        raise OptionError(
            option="device_map",
            reason='cannot have "disk" for a model that is quantised while it is loaded',
            valid="the device of a model in memory, or first: micromix quantize --offload",
        )


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
