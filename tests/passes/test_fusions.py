"""Whole models: how often each pass matches, what is left in the graph, and the numbers."""

from __future__ import annotations

import collections
import re

import pytest
import torch
from architectures import build, inputs

from micromix_compile import Recipe, calibrate, explain
from micromix_compile.ops import cpu_isa
from micromix_compile.passes import manager

LAYERS = 2  # of every tiny model
RECIPE = Recipe(split=(0.5, 0.25, 0.25))


def _pre_norm(norm: str, activation: str, first: str = "") -> dict[str, int]:
    """A decoder with two norms a layer: all but the first normalise a residual sum."""
    counts = {f"add_{norm}": 2 * LAYERS - 1, activation: LAYERS}
    counts[first or norm] = counts.get(first or norm, 0) + 1
    return counts


FUSIONS = {
    "llama": _pre_norm("rms_norm", "silu_mul"),
    "qwen3": _pre_norm("rms_norm", "silu_mul"),
    "mistral": _pre_norm("rms_norm", "silu_mul"),
    "phi3": _pre_norm("rms_norm", "silu_mul"),
    "gemma3": _pre_norm("rms_norm", "gelu_tanh_mul"),
    "gpt2": _pre_norm("layer_norm", "gelu_tanh"),
    # The sum of token and position embeddings has one shape, so the first norm's is fused as well.
    "opt": _pre_norm("layer_norm", "relu", first="add_layer_norm"),
}


def run(model, arguments, **options):
    compiled = torch.compile(
        model, backend="micromix", dynamic=True, fullgraph=True, options=options
    )
    with torch.no_grad():
        return [compiled(**a).logits for a in arguments], explain(compiled)


def calls(graph: str) -> collections.Counter[str]:
    return collections.Counter(re.findall(r"torch\.ops\.micromix\.(\w+)\.\w+\(", graph))


@pytest.mark.parametrize("name", FUSIONS)
def test_counts_graph_and_numbers(name, tmp_path, monkeypatch):
    model = build(name)
    shapes = [inputs(name, 2, 13), inputs(name, 3, 7)]
    plan = calibrate(model).run(shapes).plan(RECIPE)
    eager, _ = run(model, shapes, plan=plan, inductor=False)
    torch.compiler.reset()
    monkeypatch.setenv("MICROMIX_DUMP", str(tmp_path))
    outputs, explanation = run(model, shapes, plan=plan, strict=True)

    assert explanation.graphs == 1
    counts = dict(explanation.passes)
    assert counts.pop("lowered") == len(plan)
    assert counts.pop("micromix::quantize") == counts.pop("micromix::linear") == 4 * LAYERS
    assert counts.pop("lower_attention", 0) == (0 if cpu_isa() == "portable" else LAYERS)
    assert counts == FUSIONS[name]

    # Attention's result is all that is quantised for itself, and nothing is gathered where a fold applies.
    (dump,) = tmp_path.glob("*_3_fuse_pointwise.py")
    last = calls(dump.read_text())
    assert last["quantize"] == LAYERS
    assert last["linear"] + last["linears"] == 4 * LAYERS
    folded = [row for row in explanation.layers.values() if row.folded_into]
    assert len(folded) == LAYERS
    assert {row.fused_with for row in folded} == {n for n in counts if "norm" not in n}

    for output, expected, arguments in zip(outputs, eager, shapes):
        with torch.no_grad():
            change = (expected - model(**arguments).logits).norm()
        assert (output - expected).norm() <= 0.02 * change


def test_dump_shows_each_pass_and_the_patterns(tmp_path, monkeypatch):
    model, arguments = build("llama"), inputs("llama")
    monkeypatch.setenv("MICROMIX_DUMP", str(tmp_path))
    monkeypatch.setattr(manager, "_graphs", iter([7]))
    run(model, [arguments], recipe=Recipe(format="mxfp8"))
    before = calls((tmp_path / "graph7_0_before.py").read_text())
    after = calls((tmp_path / "graph7_1_fuse_rms_norm.py").read_text())
    assert before["quantize"] == 8 and not before["rms_norm_quantize"]
    assert after["quantize"] == 4 and after["rms_norm_quantize"] == 4
    assert "rsqrt" in (tmp_path / "patterns.py").read_text()
