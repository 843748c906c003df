"""`micromix eval --tasks`: lm-evaluation-harness on a model and on what plans make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from micromix_compile.errors import EvaluationError, MissingPackageError
from micromix_compile.evaluate import lowered

__all__ = ["evaluate_tasks"]


def evaluate_tasks(
    model: torch.nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    variants: Sequence[tuple[str, dict[str, Any]]],
    label: str = "float",
) -> Iterator[dict[str, Any]]:
    """Runs `tasks`, names of the harness or YAML files, on the model and on each variant; gives each row once it is known.

    A variant is (name, options of the backend). A row has `task`, `variant` and the task's metrics with their standard
    errors. Raises MissingPackageError without lm-eval, EvaluationError for a task that is not known.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            package=error.name, purpose="eval --tasks", install="'micromix-compile[eval]'"
        ) from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    if missing := [file for file in files if not file.is_file()]:
        raise EvaluationError(reason=f"{missing[0]} is no file", mend="Give a task's YAML file")
    manager = TaskManager(include_path=[str(file.parent.resolve()) for file in files] or None)
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise EvaluationError(
            reason=f"lm-eval knows no task {unknown[0]!r}",
            mend="Name one of `lm-eval --tasks list`, or a YAML file whose `task:` is its name",
        )
    for name, options in [(label, None), *variants]:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        compiled = nullcontext(model) if options is None else lowered(model, options, dynamic=True)
        with compiled as own, torch.no_grad():
            harness._model = own  # HFLM takes a compiled model for its own class of models only
            found = simple_evaluate(model=harness, tasks=list(names), task_manager=manager)
        for task, metrics in found["results"].items():
            figures = {k: v for k, v in metrics.items() if isinstance(v, float)}
            yield {"task": task, "variant": name} | figures
