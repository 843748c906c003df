"""`micromix calibrate` and `micromix plan`: from a model to statistics to a plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from micromix_compile.allocation import allocate
from micromix_compile.cli.inputs import load_model, recipe_of, texts_of
from micromix_compile.cli.plans import calibrated, save_plan
from micromix_compile.plan import load_plan
from micromix_compile.statistics import load_statistics


def default_output(arguments: argparse.Namespace) -> Path | None:
    """Where `calibrate` writes its plan; no plan is made where statistics alone are asked for."""
    if arguments.statistics is not None:
        return None
    return Path(f"{Path(arguments.model).resolve().name}.micromix.safetensors")


def calibrate(arguments: argparse.Namespace) -> None:
    recipe = recipe_of(arguments)  # before the long work: a bad recipe is said at once
    before = load_plan(arguments.sequential) if arguments.sequential else None
    texts_of(arguments, half=0)
    model, tokenizer = load_model(arguments)
    gradients = arguments.gradients or (recipe.has_budget and before is None)
    calibration = calibrated(model, tokenizer, arguments, recipe, gradients=gradients, plan=before)
    if arguments.statistics:
        calibration.save(arguments.statistics)
        print(f"statistics: {arguments.statistics}")
    if arguments.output:
        save_plan(calibration.plan(recipe), arguments.output)


def plan(arguments: argparse.Namespace) -> None:
    first, *others = map(load_statistics, arguments.statistics)
    for other in others:
        first.merge(other)
    save_plan(allocate(first, recipe_of(arguments)), arguments.output)
