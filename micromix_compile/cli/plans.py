"""The plan of a command: given by --plan, or made by the flags of a recipe, kept, and taken again by the next run."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import micromix_compile as micromix
from micromix_compile.attachment import differences
from micromix_compile.checkpoint import files_fingerprint
from micromix_compile.cli.inputs import (
    calibration_windows,
    fit_windows,
    is_quantised,
    recipe_of,
    refuse_quantised,
    texts_of,
)
from micromix_compile.cli.outputs import check_apart, model_folder
from micromix_compile.errors import MicroMixError, OptionError, OutputError, StatisticsMismatchError
from micromix_compile.files import check_output, write_text
from micromix_compile.layers import linear_shapes
from micromix_compile.ops import build_id
from micromix_compile.plan import ModelPlan, load_plan
from micromix_compile.recipe import Recipe
from micromix_compile.statistics import ModelStatistics
from micromix_compile.targets import check_time, modelled_time

_NOTE = "micromix_plan_made_from"
"""The key by which a note is known as one of this file's."""


def wanted(arguments: argparse.Namespace) -> ModelPlan | Recipe:
    """The plan of --plan, or the recipe of the flags; and, before the long work, every check that needs no model.

    Raises OptionError where both are given or flags contradict each other, and RecipeError, PlanFileError, TextError and OutputError.
    """
    recipe = recipe_of(arguments)
    if recipe.rounding == "gptq" and getattr(arguments, "offload", False):
        reason = "leaves the weights on disk, and --rounding gptq needs them in memory"
        raise OptionError(option="--offload", reason=reason, valid="beside --rounding nearest")
    if arguments.plan is not None:
        if recipe != Recipe():
            reason = "cannot be given beside flags of a recipe"
            raise OptionError(option="--plan", reason=reason, valid="a plan file, or a recipe")
        return load_plan(arguments.plan)
    if calibrates(recipe) and not _is_quantised(arguments.model):
        texts_of(arguments, half=0)
        _check_plan_file(arguments)
    return recipe


def calibrates(plan: ModelPlan | Recipe) -> bool:
    """Whether it takes calibration to make a plan of this."""
    return isinstance(plan, Recipe) and (plan.method != "format" or plan.rounding == "gptq")


def settled(
    plan: ModelPlan | Recipe, model, tokenizer, arguments: argparse.Namespace
) -> ModelPlan | Recipe | None:
    """What `wanted` gave, with a plan in the place of a recipe that needs calibration.

    None for a model that is quantised already, and no other plan given: it stays as it is. Raises OptionError for a recipe beside it.
    """
    if isinstance(plan, ModelPlan):
        return plan
    if is_quantised(model):
        if plan != Recipe():
            reason = (
                f"cannot be quantised by flags of a recipe: {arguments.model} is quantised already"
            )
            raise OptionError(option="IN", reason=reason, valid="no such flags, or the float model")
        return None
    return _calibrated(plan, model, tokenizer, arguments) if calibrates(plan) else plan


def calibrated(
    model,
    tokenizer,
    arguments: argparse.Namespace,
    *recipes: Recipe,
    gradients: bool,
    plan: ModelPlan | None = None,
    statistics: ModelStatistics | None = None,
) -> micromix.Calibration:
    """A calibration of the model on windows of the texts, for plans by `recipes`.

    With `statistics`, those of an earlier run: nothing is run before weights are rounded. Raises StatisticsMismatchError where they
    have layers that the model lacks, RecipeError before the long work
    where a budget of time is less than the layers can take, and OptionError for a model that is quantised, or windows too long for it.
    """
    refuse_quantised(arguments, model)
    if statistics is not None and (found := differences(statistics.layers, model, "the file")):
        raise StatisticsMismatchError(differences=found)
    fit_windows(arguments, model)
    shapes = linear_shapes(model)
    for recipe in recipes:
        if recipe.time is not None:
            check_time({n: s for n, s in shapes.items() if not recipe.skips(n)}, recipe)
    windows = calibration_windows(arguments, tokenizer)
    batches = [{"input_ids": window[None]} for window in windows]
    calibration = micromix.calibrate(model, gradients=gradients, plan=plan)
    if statistics is not None:
        calibration.statistics, calibration.batches = statistics, batches
        return calibration
    calibration.run(batches)
    print(f"calibrated on {len(windows)} windows of {windows.shape[1]} tokens")
    return calibration


def save_plan(plan: ModelPlan, path: Path) -> None:
    plan.save(path)
    print(f"plan: {path}, {len(plan)} layers, {bits_of(plan)}")


def bits_of(plan: ModelPlan) -> str:
    """The size of a plan in words, and its time on the target of its recipe."""
    if not len(plan):
        return "nothing planned"
    scales = plan.weight_bits - plan.element_bits
    text = (
        f"{plan.element_bits:.2f} + {scales:.2f} bits per weight (elements + scales and padding), "
        f"{plan.activation_element_bits:.2f} bits per activation, scales not counted"
    )
    if target := plan.recipe.get("target"):
        text += f"; {modelled_time(plan, target, plan.recipe['rows'])}"
    return text


def _is_quantised(model: str) -> bool:
    """Whether a model's files say so; it has its plan then. What is wrong with them is said when it is loaded."""
    from micromix_compile.models import files_of

    try:
        folder = files_of(model)
        config = json.loads(Path(folder, "config.json").read_text()) if folder else {}
    except (OSError, ValueError, MicroMixError):
        return False
    return isinstance(config, dict) and "quantization_config" in config


def _plan_file(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Where the plan that a command makes is kept, and the note of what it was made from."""
    path = arguments.output.with_name(arguments.output.name + ".plan.safetensors")
    return path, path.with_suffix(".json")


def _check_plan_file(arguments: argparse.Namespace) -> None:
    """There is a place for the plan that a command makes, where no other one lies. Raises OutputError."""
    path, note = _plan_file(arguments)
    folder = model_folder(arguments)
    if folder is not None and path.parent.resolve() == folder.resolve():
        reason = f"it would be one of the files of the model {arguments.model}, by which a later run knows it again"
        raise OutputError(path=path, reason=reason, mend="Give an OUT outside of that directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    check_apart(arguments, path, note)
    check_output(path)
    there = [file for file in (path, note) if file.exists()]
    if there and not _is_note(note):
        reason = "it is there, and this command did not make it"
        mend = "Move it away, or give the plan to use with --plan"
        raise OutputError(path=there[0], reason=reason, mend=mend)


def _is_note(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and _NOTE in content


def _calibrated(recipe: Recipe, model, tokenizer, arguments: argparse.Namespace) -> ModelPlan:
    """The plan of a model, from OUT.plan.safetensors where an earlier run was stopped after calibrating."""
    path, note = _plan_file(arguments)
    fit_windows(arguments, model)
    made_from = _made_from(arguments)
    if path.exists() and note.exists() and note.read_text(encoding="utf-8") == made_from:
        plan = load_plan(path)
        if plan.recipe == recipe.to_dict():
            print(f"plan: {path}, from an earlier run; remove it to calibrate again")
            return plan
    gradients = recipe.has_budget
    plan = calibrated(model, tokenizer, arguments, recipe, gradients=gradients).plan(recipe)
    save_plan(plan, path)
    write_text(note, made_from)
    return plan


def _made_from(arguments: argparse.Namespace) -> str:
    """What a plan depends on beside the recipe: the model's files and the flags of calibration."""
    from micromix_compile.models import files_of

    folder = files_of(arguments.model)
    texts = json.dumps(texts_of(arguments, half=0)).encode()
    content = {
        "model": files_fingerprint(folder) if folder else arguments.model,
        "texts": hashlib.sha256(texts).hexdigest(),
        **{name: getattr(arguments, name) for name in ("samples", "seqlen", "dtype")},
        "kernels": build_id(),
    }
    return json.dumps({_NOTE: content}, indent=1)
