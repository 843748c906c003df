"""One exception class per kind of failure, one warning class per kind of notice.

A class holds the template of its message; a caller gives the facts that fill it, by keyword::

    raise NonFiniteCalibrationError(layer="model.layers.0.mlp.down_proj")

A fact that is a list becomes indented lines, the first few of them, but where the template asks for
its repr (``{value!r}``). All facts stay in ``error.facts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

__all__ = [
    "CalibrationGradientError",
    "CheckpointClassError",
    "CheckpointError",
    "CheckpointExistsError",
    "EmptyCalibrationError",
    "EvaluationError",
    "ExportError",
    "ExtensionError",
    "FileVersionError",
    "GenerationSettingsWarning",
    "GradientError",
    "HookedLayerError",
    "InvalidPlanError",
    "LeftAloneWarning",
    "MicroMixError",
    "MicroMixWarning",
    "MissingPackageError",
    "ModelLoadError",
    "NoPlanWarning",
    "NonFiniteCalibrationError",
    "NotRoundedWarning",
    "OptionError",
    "OtherPlanError",
    "OutputError",
    "PackageError",
    "PackageInputError",
    "PackageMismatchError",
    "PlanFileError",
    "PlanMismatchError",
    "QuantizedAlreadyError",
    "RecipeError",
    "RecompileLimitError",
    "ReferenceKernelWarning",
    "ReleasedWeightError",
    "RoundedWeightError",
    "SensitivityError",
    "StatisticsFileError",
    "StatisticsMismatchError",
    "StrictError",
    "TextError",
    "TiedLayersWarning",
    "UncapturedStepWarning",
    "UnmatchedPatternWarning",
    "UnplannedLayersWarning",
    "UnsavableLayerError",
]

_LISTED = 8


def _listed(lines: Sequence[object]) -> str:
    shown = [f"\n  {line}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"\n  ... and {len(lines) - _LISTED} more")
    return "".join(shown)


class _Message(Exception):
    """Fills the template of its class with facts; survives pickling and copying."""

    template: ClassVar[str]

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        texts = {
            name: _listed(fact)
            if isinstance(fact, (list, tuple)) and f"{{{name}!r}}" not in self.template
            else fact
            for name, fact in facts.items()
        }
        super().__init__(self.template.format(**texts))

    def __reduce__(self):
        return partial(type(self), **self.facts), ()


class MicroMixError(_Message):
    """The base of all errors of this package; never raised itself."""


class RecipeError(MicroMixError, ValueError):
    """A Recipe was given a bad value, or an option it does not have.
    Facts: option, value, expected."""

    template = "Recipe: {option} = {value!r} does not work; it must be {expected}."


class OptionError(MicroMixError, ValueError):
    """An option of the backend, or of another call, does not exist or has a bad value.
    Facts: option, reason, valid (a string that lists the options)."""

    template = "Option {option!r} {reason}. Valid: {valid}."


class InvalidPlanError(MicroMixError, ValueError):
    """A LayerPlan or ModelPlan contradicts itself. Facts: reason."""

    template = (
        "This is not a valid plan: {reason}. Plans are made by calibration.plan(recipe); "
        "make it again instead of editing it."
    )


class PlanMismatchError(MicroMixError):
    """A plan names layers that the model lacks, or has other shapes.
    Facts: differences (a list)."""

    template = (
        "The plan was made for another model:{differences}\n"
        "Calibrate this model and make a plan from it, or load the model that the plan belongs to."
    )


class QuantizedAlreadyError(PlanMismatchError):
    """A model that is quantised was given another plan or recipe than its own, or calibrated. Facts: reason."""

    template = (
        "The model is quantised already, {reason}. To quantise it anew, load the float model."
    )


class OtherPlanError(PlanMismatchError):
    """A precompiled function is called for layers whose attached plan it was not compiled for. Facts: layers (a list)."""

    template = (
        "These layers have another plan attached than the function was compiled for, or none any more:{layers}\n"
        "Formats and the split of the channels are constants of its graph (with CUDA graphs the whole plan is). Attach "
        "that plan again, or compile anew (aot_compile); what torch.compile returns does so by itself."
    )


class FileVersionError(MicroMixError, ValueError):
    """A plan, statistics, a checkpoint or a package has a newer format than this library reads.
    Facts: path, kind (such as "plan file"), version, supported."""

    template = (
        "{path} is a {kind} of version {version}; this micromix-compile reads up to {supported}. "
        "Upgrade micromix-compile, or make it again with this version."
    )


class PlanFileError(MicroMixError, ValueError):
    """A plan file is missing, truncated, damaged, or not a plan. Facts: path, reason."""

    template = (
        "{path} cannot be read as a plan: {reason}. Give a file written by plan.save(), "
        "or make it again with `micromix plan`."
    )


class StatisticsFileError(MicroMixError, ValueError):
    """A statistics file is missing, truncated, damaged, or foreign. Facts: path, reason."""

    template = (
        "{path} cannot be read as calibration statistics: {reason}. Give a file written by "
        "calibration.save(), or make it again with `micromix calibrate`."
    )


class StatisticsMismatchError(MicroMixError):
    """Statistics of different models, or those of one and a plan or the model of another, were put together.
    Or activations of another width were.
    Facts: differences (a list)."""

    template = (
        "These statistics do not belong to the same model:{differences}\n"
        "Put together only what comes from one model with the same layers."
    )


class EmptyCalibrationError(MicroMixError):
    """Some or all layers saw no token during calibration. Facts: layers (a list; may be empty)."""

    template = (
        "The calibration saw no token in:{layers}\nRun the model on some text, as model(...) itself inside "
        "`with micromix.calibrate(model)`, or name layers that never run in Recipe(skip=...)."
    )

    def __init__(self, layers: Sequence[str] = ()) -> None:
        super().__init__(layers=list(layers) or ["any linear layer that the compiler takes"])


class NonFiniteCalibrationError(MicroMixError):
    """An input of a layer held NaN or Inf during calibration. Facts: layer."""

    template = (
        "The input of {layer} holds NaN or Inf, so no channel order can be made from it. "
        "Look for an overflow before this layer (float16 models: try bfloat16), "
        "or for bad values in the calibration batch."
    )


class CalibrationGradientError(MicroMixError):
    """Gradients were asked for, and there is nothing to differentiate. Facts: reason."""

    template = (
        "Calibration with gradients cannot go on: {reason}. Give run(batches, loss=lambda output, batch: ...), call "
        "loss.backward() inside the context without torch.no_grad(), or calibrate(model, gradients=False)."
    )


class SensitivityError(MicroMixError):
    """Statistics lack what a budget is spent by. Facts: reason."""

    template = (
        "A budget of bits or time cannot be spent: {reason}. Calibrate again, with calibrate(model, gradients=True) or "
        "`micromix calibrate --gradients`."
    )


class RoundedWeightError(MicroMixError):
    """A plan holds rounded weights of other values than the model's. Facts: layer."""

    template = (
        "The plan holds the weight of {layer} rounded from other values than the model's. Round the weights again "
        "(Recipe(rounding='gptq')), load the model that they came from, or take plan.without_rounding()."
    )


class ReleasedWeightError(MicroMixError):
    """A float weight is needed that was released after packing. Facts: layer."""

    template = (
        "The float weight of {layer} was released after packing (release_weights=True) and is "
        "needed again. micromix.restore(model, checkpoint) brings it back."
    )


class GradientError(MicroMixError):
    """A compiled model would have to give gradients, which quantised layers do not have.
    Facts: reason."""

    template = (
        "micromix runs inference only: {reason}. Call model.eval(), and run the model under "
        "torch.no_grad() or torch.inference_mode()."
    )


class RecompileLimitError(MicroMixError):
    """A function was compiled as often as torch allows, which would run it in float from now on. Facts: function."""

    template = (
        "{function} was compiled as often as torch allows, and the float model would run for these arguments. "
        "TORCH_LOGS=recompiles shows what changes from call to call. torch.compiler.reset() forgets all graphs, and "
        "torch._dynamo.config.accumulated_recompile_limit (or torch.compile's own recompile_limit) allows more."
    )


class StrictError(MicroMixError):
    """Under strict, a layer was left alone, or not fused with what comes before it. Facts: layers (a list of
    "name: reason"), released (a sentence; where fusions are known, float weights may be gone)."""

    template = (
        "strict=True, and these layers were left alone, or not fused with what comes before them:{layers}\n"
        "Mend the reasons, name the layers in Recipe(skip=...), or compile without strict.{released}"
    )

    def __init__(self, layers: Sequence[str], released: str | Sequence[str] = "") -> None:
        super().__init__(layers=layers, released=released)


class CheckpointError(MicroMixError, ValueError):
    """A quantised checkpoint is incomplete, damaged, or belongs to another model. Facts: path, reason."""

    template = (
        "The checkpoint {path} cannot be used: {reason}. Nothing was loaded from it. Copy it again from "
        "where it came from, or make it again with `micromix quantize` or micromix.save_pretrained."
    )


class CheckpointClassError(CheckpointError):
    """A quantised checkpoint is loaded with a class that lacks some of its layers.
    Facts: path, saved (the class it was saved from), given, layer."""

    template = (
        "{path} was saved from {saved} and is loaded as {given}, which has no layer {layer}. "
        "Load it with the class that it was saved from, or AutoModelForCausalLM."
    )


class CheckpointExistsError(MicroMixError, FileExistsError):
    """A checkpoint would be written over something. Facts: path, expected (what may be there)."""

    template = (
        "{path} exists and is not {expected}; a checkpoint is never written over anything. "
        "Give another directory, or remove this one first."
    )


class UnsavableLayerError(MicroMixError):
    """The plan names layers that a quantised checkpoint has no place for. Facts: layers (a list)."""

    template = (
        "These layers cannot be saved quantised:{layers}\n"
        "Only nn.Linear and Conv1D modules can, and classes derived from them that have their forward; name the others "
        "in Recipe(skip=...), and plan again."
    )


class HookedLayerError(MicroMixError):
    """Layers have hooks, or a forward of their own, which a quantised layer would not run. Facts: layers (a list)."""

    template = (
        "These layers have hooks, or a forward set on the module, which a quantised layer would not run:{layers}\n"
        "Remove them, or name the layers in Recipe(skip=...), and plan again."
    )


class OutputError(MicroMixError, OSError):
    """A result cannot be written where it was asked for. Facts: path, reason, mend."""

    template = "{path} cannot be written: {reason}. {mend}."


class ExportError(MicroMixError):
    """A model cannot be exported. Facts: reason, mend."""

    template = "The model cannot be exported: {reason}. {mend}."


class PackageError(MicroMixError, ValueError):
    """A .pt2 package is missing, damaged, or not one of this library. Facts: path, reason."""

    template = (
        "{path} cannot be used as a package: {reason}. Nothing of it was run. Copy it again from where "
        "it came from, or make it again with `micromix export` or micromix.export."
    )


class PackageMismatchError(MicroMixError):
    """A .pt2 package was made for another machine, torch or library. Facts: path, differences (a list)."""

    template = (
        "{path} was exported for something else than what runs here:{differences}\n"
        "Compiled code does not carry over; export the model again here, or use what it was made for."
    )


class PackageInputError(MicroMixError, TypeError):
    """A package was called with arguments that it was not exported for. Facts: differences (a list), mend."""

    template = "These arguments are not what the package was exported for:{differences}\n{mend}."


class ExtensionError(MicroMixError):
    """The compiled extension is incompatible, stale, or cannot be loaded. Facts: path, reason."""

    template = (
        "The micromix extension {path} cannot be used: {reason}. Rebuild it: `make install` in the "
        "checkout, or there `pip install --no-build-isolation --force-reinstall --no-deps .`."
    )


class MicroMixWarning(_Message, UserWarning):
    """The base of all warnings of this package; never issued itself."""


class ReferenceKernelWarning(MicroMixWarning):
    """Layers run on the slow pure-torch reference, because a kernel is missing.
    Facts: device, reason."""

    template = (
        "micromix runs its pure-torch reference on {device}, which is slow: {reason}. "
        "`make install` builds the CPU's kernels, `make cuda` (or MICROMIX_CUDA=1, see README.md) a GPU's; "
        "`python -m micromix_compile.env` shows what is there."
    )


class NotRoundedWarning(MicroMixWarning):
    """GPTQ left layers alone, whose weights are rounded to nearest. Facts: layers (a list)."""

    template = (
        "GPTQ rounds linear modules that run once for each batch. Rounded to nearest:{layers}"
    )


class LeftAloneWarning(MicroMixWarning):
    """Modules that multiply by a weight, and are no linear layers, stay float. Facts: layers (a list)."""

    template = (
        "These modules have weights and are no nn.Linear or Conv1D, or run other code than its forward, so they stay "
        "float:{layers}\n"
        "torch.compile(model, backend='micromix') quantises those products in them that it knows (explain says which). "
        "Recipe(skip=...) leaves them out without this warning."
    )


class UncapturedStepWarning(MicroMixWarning):
    """A package on a GPU decodes without a CUDA graph. Facts: path, reason."""

    template = (
        "The decode step of {path} cannot be captured as a CUDA graph ({reason}). Its kernels are launched one by one for "
        "each token, which is slower; the tokens are the same."
    )


class UnmatchedPatternWarning(MicroMixWarning):
    """Patterns of a recipe match no layer that calibration saw. Facts: patterns (a list)."""

    template = (
        "These patterns of the recipe match none of the layers that were calibrated:{patterns}\n"
        "Layers are named as in model.named_modules(); list(calibration.statistics.layers) has them."
    )


class UnplannedLayersWarning(MicroMixWarning):
    """A plan is attached to, or given for, a model that has more layers than it. Facts: layers (a list)."""

    template = (
        "The plan neither has these layers nor does its recipe skip them, so they stay float:{layers}\n"
        "They did not run in calibration, or the compiler leaves them alone (explain says why). Calibrate the model on "
        "what makes them run, or name them in Recipe(skip=...), and plan again."
    )


class TiedLayersWarning(MicroMixWarning):
    """Layers that share one weight have different plans, of which one is used. Facts: layers (a list)."""

    template = (
        "These layers have one weight and different plans, and all of them run by the first one's:{layers}\n"
        "Give them one plan with Recipe(format=...), or name them in Recipe(skip=...)."
    )


class GenerationSettingsWarning(MicroMixWarning):
    """A package leaves out what the model's generation_config asks for. Facts: settings (a list)."""

    template = (
        "The package generates without these settings of the model's generation_config:{settings}\n"
        "It takes the likeliest token, or samples by temperature alone. Use the checkpoint where they matter."
    )


class NoPlanWarning(MicroMixWarning):
    """Layers were compiled or saved without a plan, so they are MXFP8. Facts: layers (a number)."""

    template = (
        "Linear layers of this model ({layers}) have no plan attached and run in MXFP8. For 4- and 6-bit channels: "
        "calibrate, then calibration.plan(micromix.Recipe()).attach(model). A plan that was attached is lost where "
        "parameters are replaced, as by copy.deepcopy(model) or load_state_dict(assign=True): attach it again."
    )


class ModelLoadError(MicroMixError):
    """A model or its tokenizer cannot be loaded. Facts: model, reason, mend."""

    template = "The model {model} cannot be loaded: {reason}. {mend}."


class TextError(MicroMixError, ValueError):
    """A text cannot be read, or is shorter than a window of tokens. Facts: text, reason, mend."""

    template = "The text {text} cannot be used: {reason}. {mend}."


class EvaluationError(MicroMixError, ValueError):
    """A measurement cannot be made, or its result means nothing. Facts: reason, mend."""

    template = "No result: {reason}. {mend}."


class MissingPackageError(MicroMixError, ImportError):
    """An optional package is needed. Facts: package, purpose, install (what to give to pip)."""

    template = "{package} is not installed, and {purpose} needs it. Run: pip install {install}"
