"""The options of `torch.compile(model, backend="micromix", options={...})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from micromix_compile import _torch_compat as compat
from micromix_compile.errors import OptionError
from micromix_compile.packing import AUTO, KERNELS
from micromix_compile.plan import ModelPlan, load_plan
from micromix_compile.recipe import Recipe

VALID = (
    "plan, recipe, strict, release_weights, kernel, mode, inductor, and every setting of Inductor"
)


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="micromix", options={...})` takes.

    Attributes:
        plan: a ModelPlan, or the path of a saved one; without it, the plan attached to the model.
        recipe: for a model without a plan: a Recipe that needs no calibration (one format for all).
        strict: raise StrictError where a layer is left alone that the recipe does not skip, or a fusion that should
            match did not.
        release_weights: free the float storage of each weight once it is packed.
        kernel: "auto", the device's own kernel, or "mx_emulated", the Blackwell kernel in software on an older GPU:
            slow, for its numbers. It runs only where it is asked for.
        mode: as in `torch.compile(mode=...)`, which refuses to be given beside options.
        inductor: False runs the lowered graph as it is, without Inductor: quick to compile, for evaluation.
        settings: every other option: settings of Inductor, as for its own backend.
    """

    plan: ModelPlan | None = None
    recipe: Recipe | None = None
    strict: bool = False
    release_weights: bool = False
    kernel: str = AUTO
    mode: str = "default"
    inductor: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inductor_settings(self) -> dict[str, Any]:
        """Settings of Inductor: those of the mode, and those that were given."""
        return {**compat.inductor_mode_options(self.mode), **self.settings}

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether Inductor records CUDA graphs, whose tensors have fixed addresses."""
        return bool(self.inductor_settings.get("triton.cudagraphs"))

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Check the options of one `torch.compile` call. Raises OptionError."""
        given = dict(options or {})
        own = {
            name: given.pop(name)
            for name in list(given)
            if name in cls.__annotations__ and name != "settings"
        }
        for name in given:
            if not compat.is_inductor_option(name):
                raise OptionError(option=name, reason="is not known", valid=VALID)
        if isinstance(own.get("plan"), str) or hasattr(own.get("plan"), "__fspath__"):
            own["plan"] = load_plan(own["plan"])
        if mode is not None:
            own["mode"] = mode
        switch = (bool, "True or False")
        kinds = {
            "plan": ((ModelPlan, type(None)), "a ModelPlan, or the path of a saved one"),
            "recipe": ((Recipe, type(None)), "a micromix.Recipe, as in Recipe(format='mxfp4')"),
            "strict": switch,
            "release_weights": switch,
            "kernel": (str, " or ".join(map(repr, KERNELS))),
            "mode": (str, "the name of a mode of torch.compile"),
            "inductor": switch,
        }
        for name, value in own.items():
            kind, valid = kinds[name]
            if not isinstance(value, kind):
                raise OptionError(option=name, reason=f"cannot be {value!r}", valid=valid)
        if own.get("kernel", AUTO) not in KERNELS:
            reason = f"cannot be {own['kernel']!r}; the kernels are {', '.join(KERNELS)}"
            raise OptionError(option="kernel", reason=reason, valid=VALID)
        if own.get("plan") is not None and own.get("recipe") is not None:
            raise OptionError(option="recipe", reason="cannot be given beside a plan", valid=VALID)
        try:
            compat.inductor_mode_options(own.get("mode", "default"))
        except ValueError as error:
            raise OptionError(
                option="mode", reason=f"cannot be used: {error}", valid=VALID
            ) from None
        settings = {name.replace("-", "_"): value for name, value in given.items()}
        return cls(**own, settings=settings)
