"""`micromix eval --tasks`: lm-evaluation-harness on a task that is made of local files."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_llama import save_tiny

from micromix_compile import models
from micromix_compile.cli import main

TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [(f"{a} plus {b} is", [str(a + b), str(a + b + 1)]) for a in range(4) for b in range(4)]


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    rows = [{"question": q, "choices": c, "label": 0} for q, c in QUESTIONS]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(TASK.format(path=tmp_path / "sums.jsonl"))
    return tmp_path / "sums.yaml"


def likelihood(model, tokenizer, question: str, answer: str) -> float:
    """The log-probability of an answer after a question, as the harness defines it, worked out apart."""
    start = len(tokenizer(question).input_ids)
    ids = tokenizer(f"{question} {answer}", return_tensors="pt").input_ids
    with torch.no_grad():
        chances = model(ids).logits.float().log_softmax(-1)
    return sum(float(chances[0, i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def test_a_task_of_local_files(task, tmp_path, capsys):
    source = save_tiny(tmp_path / "model")
    model, tokenizer = models.load(source)
    chosen = [
        likelihood(model, tokenizer, q, right) > likelihood(model, tokenizer, q, wrong)
        for q, (right, wrong) in QUESTIONS
    ]
    assert main(["eval", "--model", str(source), "--tasks", str(task), "--format", "mxfp8"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("sums, ")]
    assert [line.split(": ")[0] for line in lines] == ["sums, bfloat16", "sums, mxfp8"]
    assert f"acc {sum(chosen) / len(chosen):.4f}" in lines[0]
    assert "acc_stderr" in lines[1]


@pytest.mark.parametrize("name", ["no_such_task", "missing.yaml"])
def test_a_task_that_does_not_exist(name, tmp_path, capsys):
    assert main(["eval", "--model", str(save_tiny(tmp_path)), "--tasks", name]) == 1
    assert name in capsys.readouterr().err
