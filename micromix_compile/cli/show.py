"""`micromix report`, `demo` and `env`: what is there, shown."""

from __future__ import annotations

import argparse

import torch

from micromix_compile.env import show as show_facts
from micromix_compile.errors import MissingPackageError, OptionError, StatisticsMismatchError
from micromix_compile.plan import ModelPlan, load_plan
from micromix_compile.statistics import ModelStatistics, load_statistics
from micromix_compile.targets import modelled_time


def report(arguments: argparse.Namespace) -> None:
    from micromix_compile.report import draw_report

    if arguments.rows is not None and arguments.target is None:
        reason = "is of a forward on a device whose time is modelled"
        raise OptionError(option="--rows", reason=reason, valid="beside --target")
    statistics = load_statistics(arguments.statistics) if arguments.statistics else None
    plan = load_plan(arguments.plan)
    if statistics is not None:
        _check_same_layers(plan, statistics)
    target, rows = arguments.target, arguments.rows or 1
    time = modelled_time(plan, target, rows) if target else None
    draw_report(plan, arguments.output, statistics, time)
    if time:
        print(time)
    print(f"report: {arguments.output}")


def _check_same_layers(plan: ModelPlan, statistics: ModelStatistics) -> None:
    """Raises StatisticsMismatchError where the plan has a layer that the statistics lack, or of another shape."""
    known = statistics.layers
    differences = [
        f"{name}: the plan has {shape}, the statistics {known.get(name, 'no such layer')}"
        for name, shape in plan.shapes.items()
        if known.get(name) != shape
    ]
    if differences:
        raise StatisticsMismatchError(differences=differences)


def demo(arguments: argparse.Namespace) -> None:
    try:
        from micromix_compile import demo
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("micromix_compile"):
            raise
        raise MissingPackageError(
            package=error.name, purpose="the demo", install="'micromix-compile[demo]'"
        ) from error
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    demo.run(prompt=arguments.prompt or demo.PROMPT, output=arguments.output, dtype=dtype)


def env(arguments: argparse.Namespace) -> int:
    return show_facts(arguments.json)
