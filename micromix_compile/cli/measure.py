"""`micromix eval` and `micromix sweep`: what plans make of a model's predictions."""

from __future__ import annotations

import argparse
import json
import math

from micromix_compile.allocation import uniform_plan
from micromix_compile.attachment import differences
from micromix_compile.cli.inputs import (
    SEQLEN,
    fit_windows,
    is_quantised,
    load_model,
    recipe_of,
    refuse_quantised,
    texts_of,
)
from micromix_compile.cli.outputs import check_apart
from micromix_compile.cli.plans import bits_of, calibrated
from micromix_compile.errors import OptionError, PlanMismatchError, RecipeError
from micromix_compile.files import write_text
from micromix_compile.layers import linear_shapes
from micromix_compile.plan import ModelPlan, load_plan
from micromix_compile.recipe import Recipe
from micromix_compile.reference import reference_model
from micromix_compile.statistics import load_statistics
from micromix_compile.targets import modelled_time

_BUDGETS = {"bits": (4.0, 4.5, 5.0, 6.0), "time": (0.6, 0.7, 0.8, 0.9)}
_UNITS = {"bits": "bits", "time": "of the time of MXFP8"}


def evaluate(arguments: argparse.Namespace) -> None:
    _check_against(arguments)
    if arguments.activations != "match" and not arguments.format:
        raise OptionError(
            option=f"--activations {arguments.activations}",
            reason="is for single formats: a plan has its own",
            valid="beside --format",
        )
    variants = [(str(path), {"plan": load_plan(path)}) for path in arguments.plan]
    for name in arguments.format:
        recipe = Recipe(format=name, activations=arguments.activations)
        label = name if recipe.activations == "match" else f"{name} weights"
        variants.append((label, {"recipe": recipe}))
    if arguments.tasks:
        results = _run_tasks(arguments, variants)
    else:
        results = _measure_texts(arguments, variants)
    if arguments.output:
        write_text(arguments.output, json.dumps(results, indent=1))
        print(f"figures: {arguments.output}")


def _check_against(arguments: argparse.Namespace) -> None:
    if arguments.against == "float":
        return
    if (arguments.plan or arguments.format) and not arguments.tasks:
        return
    raise OptionError(
        option="--against reference",
        reason="compares plans and formats on a text",
        valid="beside --plan or --format, without --tasks",
    )


def _check_variants(model, variants, arguments) -> None:
    """Before the long work: raises OptionError for a model that is quantised, PlanMismatchError for another model's plan.

    What a plan lacks is named by the backend.
    """
    if variants:
        refuse_quantised(arguments, model, "a float model, or neither --plan nor --format")
    for _, options in variants:
        if "plan" in options and (found := differences(options["plan"].shapes, model)):
            raise PlanMismatchError(differences=found)


def _run_tasks(arguments: argparse.Namespace, variants) -> list[dict]:
    from micromix_compile.tasks import evaluate_tasks

    model, tokenizer = load_model(arguments)
    _check_variants(model, variants, arguments)
    rows = []
    label = _as_it_is(model, arguments)
    for row in evaluate_tasks(model, tokenizer, arguments.tasks, variants, label):
        rows.append(row)
        figures = {k: v for k, v in row.items() if k not in ("task", "variant")}
        shown = ", ".join(f"{key.split(',')[0]} {value:.4f}" for key, value in figures.items())
        print(f"{row['task']}, {row['variant']}: {shown}")
    return rows


def _measure_texts(arguments: argparse.Namespace, variants) -> list[dict]:
    from micromix_compile.models import check_windows, token_windows

    check_windows(arguments.seqlen or SEQLEN, arguments.samples, arguments.context)
    texts = texts_of(arguments, half=1 if arguments.against == "float" else None)
    model, tokenizer = load_model(arguments)
    _check_variants(model, variants, arguments)
    fit_windows(arguments, model)
    print(
        "Plans and formats run the lowered graph with the operators of a compiled model, without Inductor."
    )
    rows = []
    for name, text in texts.items():
        windows = token_windows(
            tokenizer, text, arguments.seqlen, arguments.samples, arguments.context
        )
        rows += _measure_text(model, name, windows.to(arguments.device), variants, arguments)
    return rows


def _measure_text(model, text: str, windows, variants, arguments) -> list[dict]:
    """Prints and returns the figures of each variant on one text."""
    scored = windows.shape[1] - max(1, arguments.context)
    print(f"{text}: {len(windows)} windows of {windows.shape[1]} tokens, {scored} scored")
    if len(windows) < 2:
        print("one window: no standard errors; ask for more --samples or a smaller --seqlen")
    rows = []
    if arguments.against == "float":
        rows.append(_float_row(model, text, windows, arguments))
    else:
        print("compared with the reference arithmetic of each plan (standard errors, by window)")
    for name, options in variants:
        base, digits = model, 2
        if arguments.against == "reference":
            base, digits = _reference(model, options), 3
        row = {"text": text, "variant": name, "against": arguments.against} | _compare(
            base, model, options, windows, arguments.context, name
        )
        rows.append(row)
        print(
            f"{name}: {row['perplexity']:.3f}, {_figure(row, 'increase', f'+.{digits}%')}, "
            f"KL {_figure(row, 'kl', '.4f')} nats, same top token {_figure(row, 'top1', '.2%')}"
        )
    return rows


def _float_row(model, text: str, windows, arguments) -> dict:
    from micromix_compile.evaluate import perplexity

    label = _as_it_is(model, arguments)
    found = perplexity(model, windows, arguments.context, label=label)
    error = f" ± {found.standard_error:.3f} (standard errors, by window)"
    print(f"{label}: {found.value:.3f}{error if len(windows) > 1 else ''}")
    return {"text": text, "variant": label, "perplexity": found.value}


def _as_it_is(model, arguments: argparse.Namespace) -> str:
    """What a model without another plan is called: by its dtype, which would say nothing of a quantised one."""
    return "as it is" if is_quantised(model) else arguments.dtype


def _figure(row: dict, name: str, form: str) -> str:
    """A figure and its standard error, which one window has not."""
    value, error = row[name], row[f"{name}_error"]
    return f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def _reference(model, options: dict):
    """The model in the reference arithmetic of a variant."""
    plan = options.get("plan") or uniform_plan(linear_shapes(model), options["recipe"])
    return reference_model(model, plan)


def _compare(base, model, options: dict, windows, context: int, label: str) -> dict:
    """The figures of the model under the backend's options, beside those of `base`."""
    from micromix_compile.evaluate import compare, lowered

    with lowered(model, options) as variant:
        found = compare(base, variant, windows, context, label)
    row = {"perplexity": found.model.value}
    for name, (value, error) in {
        "increase": found.increase, "kl": found.divergence, "top1": found.agreement,
    }.items():  # fmt: skip
        row |= {name: value, f"{name}_error": error}
    return row


def sweep(arguments: argparse.Namespace) -> None:
    from micromix_compile.models import token_windows
    from micromix_compile.sweep import FILES, write_sweep

    method = "bits" if arguments.target is None else "time"
    if (given := getattr(arguments, method)) is not None:
        expected = "left out: --budgets names those that are swept"
        raise RecipeError(option=method, value=given, expected=expected)
    budgets = dict.fromkeys(arguments.budgets or _BUDGETS[method])  # each once
    recipes = {budget: recipe_of(arguments, **{method: budget}) for budget in budgets}
    folder = arguments.output
    paths = {budget: folder / f"{method}-{budget:g}.safetensors" for budget in budgets}
    check_apart(arguments, *paths.values(), *(folder / name for name in FILES))
    texts = texts_of(arguments, half=1)
    statistics = load_statistics(arguments.statistics) if arguments.statistics else None
    folder.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load_model(arguments)
    calibration = calibrated(
        model, tokenizer, arguments, *recipes.values(), gradients=True, statistics=statistics
    )
    count, device = arguments.samples, arguments.device
    windows = {
        name: token_windows(tokenizer, text, arguments.seqlen, count).to(device)
        for name, text in texts.items()
    }
    rows = []
    for budget, recipe in recipes.items():
        plan = calibration.plan(recipe)
        plan.save(paths[budget])
        label = f"{budget:g} {_UNITS[method]}"
        found = {
            name: _compare(model, model, {"plan": plan}, own, 0, f"{label}, {name}")
            for name, own in windows.items()
        }
        rows.append({"budget": budget, **_size(plan, recipe), "texts": found})
        figures = ", ".join(f"{name} {own['increase']:+.2%}" for name, own in found.items())
        print(f"{label} ({bits_of(plan)}): {figures}")
        write_sweep(rows, folder)  # now: the next row may take an hour
    print(f"table and picture: {folder}")


def _size(plan: ModelPlan, recipe: Recipe) -> dict:
    """What a row of a sweep says of a plan: its bits, and its time where the recipe has a target."""
    size = {
        "bits": plan.element_bits,
        "with_scales": plan.weight_bits,
        "activation_bits": plan.activation_element_bits,
    }
    if recipe.target is None:
        return size
    time = modelled_time(plan, recipe.target, recipe.rows).fraction
    return {**size, "time": time, "target": recipe.target, "rows": recipe.rows}
