"""Folded channel orders: where they go, where they must not, and that no bit of the result changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import build, inputs
from torch import nn

from micromix_compile import Recipe, backend, calibrate, explain
from micromix_compile.packing import packings
from micromix_compile.passes.fold_order import Folds

RECIPE = Recipe(split=(0.5, 0.25, 0.25))


class Mlp(nn.Module):
    """Two producers with biases, one consumer; a subclass says what stands between."""

    K = 96

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, self.K)
        self.b = nn.Linear(64, self.K)
        self.down = nn.Linear(self.K, 64)
        self.scale = nn.Parameter(torch.rand(self.K))

    def forward(self, x):
        return self.down(self.between(self.a(x), self.b(x)))

    def between(self, a, b):
        return F.silu(a) * b


def run(model, x, plan, **options):
    torch.compiler.reset()
    compiled = torch.compile(
        model, backend="micromix", options={"plan": plan, "inductor": False, **options}
    )
    with torch.no_grad():
        return compiled(x), explain(compiled)


def folded(explanation) -> dict[str, list[str]]:
    return {
        name: sorted(row.folded_into) for name, row in explanation.layers.items() if row.folded_into
    }


def without_folds(monkeypatch, model, x, plan):
    with monkeypatch.context() as patch:
        patch.setattr(backend, "fold_orders", lambda *_: Folds())
        result, explanation = run(model, x, plan)
    assert not folded(explanation)
    return result


NAMES = ("llama", "gpt2", "opt", "phi3", "t5")


@pytest.mark.parametrize("name", NAMES)
def test_models_are_equal_bit_for_bit(name, monkeypatch):
    model, arguments = build(name), inputs(name)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases begin as zeros
    plan = calibrate(model).run([arguments]).plan(RECIPE)
    results, names = [], []
    for fold in (True, False):
        with monkeypatch.context() as patch:
            if not fold:
                patch.setattr(backend, "fold_orders", lambda *_: Folds())
            torch.compiler.reset()
            options = {"plan": plan, "inductor": False}
            compiled = torch.compile(model, backend="micromix", options=options)
            with torch.no_grad():
                result = compiled(**arguments)
            results.append(result.get("logits", result.get("last_hidden_state")))
            names.append(folded(explain(compiled)))
    blocks = sum(1 for layer in plan if layer.endswith(("down_proj", "fc2", "wo", "4h_to_h")))
    blocks = blocks or model.config.num_hidden_layers  # GPT-2's and BERT's layers share names
    assert len(names[0]) == blocks and not names[1]
    assert torch.equal(*results)


def test_biases_and_scalars_go_along(monkeypatch):
    class Scaled(Mlp):
        def between(self, a, b):
            return (F.gelu(a) * 0.5 + b.float().to(b.dtype)) * self.scale.sum()

    model, x = Scaled().eval(), torch.randn(5, 64)
    plan = calibrate(model).run([x]).plan(RECIPE)
    result, explanation = run(model, x, plan)
    assert folded(explanation) == {"down": ["a", "b"]}
    assert not explanation.layers["down"].gathered
    assert torch.equal(result, without_folds(monkeypatch, model, x, plan))


@pytest.mark.parametrize(
    "between",
    [
        lambda self, a, b: a * self.scale,  # a vector over channels has an order of its own
        lambda self, a, b: a.softmax(-1),
        lambda self, a, b: a.flip(-1),
        lambda self, a, b: a.view(-1, 2, self.K // 2).view(-1, self.K),
        lambda self, a, b: a.cumsum(-1) + b,
        lambda self, a, b: a + b.mean(-1, keepdim=True),  # b's order would not matter, a's may go
    ],
)
def test_what_is_not_elementwise_stops_a_fold(between, monkeypatch):
    model, x = Mlp().eval(), torch.randn(5, 64)
    model.between = between.__get__(model)
    plan = calibrate(model).run([x]).plan(RECIPE)
    result, explanation = run(model, x, plan)
    assert torch.equal(result, without_folds(monkeypatch, model, x, plan))
    assert folded(explanation) in ({}, {"down": ["a"]})


def test_a_value_that_others_read_stays_in_order(monkeypatch):
    class Leaks(Mlp):
        def forward(self, x):
            a = self.a(x)
            return self.down(F.relu(a)) + a.sum(-1, keepdim=True) * a[..., :64]

    model, x = Leaks().eval(), torch.randn(5, 64)
    plan = calibrate(model).run([x]).plan(RECIPE)
    result, explanation = run(model, x, plan)
    assert not folded(explanation)
    assert "elementwise" in explanation.layers["down"].gathered
    assert torch.equal(result, without_folds(monkeypatch, model, x, plan))


def test_a_weight_of_several_layers_is_packed_once_and_not_folded():
    class Twice(Mlp):
        def forward(self, x):
            return self.down(F.relu(self.a(x))) + self.down(self.a(2 * x))

    model, x = Twice().eval(), torch.randn(5, 64)
    plan = calibrate(model).run([x]).plan(RECIPE)
    before = packings()
    _, explanation = run(model, x, plan)
    assert not folded(explanation)
    assert "the weight of a serves several layers" in explanation.layers["down"].gathered
    assert packings() - before == 2


def test_padding_between_channels_stops_a_fold(monkeypatch):
    class Padded(Mlp):
        K = 80

    model, x = Padded().eval(), torch.randn(5, 64)
    plan = calibrate(model).run([x]).plan(RECIPE)
    result, explanation = run(model, x, plan)
    assert (plan["down"].order[:80] < 0).any()
    assert not folded(explanation)
    assert "padding" in explanation.layers["down"].gathered
    assert torch.equal(result, without_folds(monkeypatch, model, x, plan))


def test_a_changed_bias_is_not_served_stale():
    model, x = Mlp().eval(), torch.randn(5, 64)
    plan = calibrate(model).run([x]).plan(RECIPE)
    compiled = torch.compile(model, backend="micromix", options={"plan": plan, "inductor": False})
    with torch.no_grad():
        before = compiled(x)
        assert folded(explain(compiled)) == {"down": ["a", "b"]}
        model.a.bias.add_(1)
        model.b.weight.mul_(2)
        after = compiled(x)
        torch.compiler.reset()
        fresh, _ = run(model, x, plan)
    assert torch.equal(after, fresh) and not torch.equal(after, before)
