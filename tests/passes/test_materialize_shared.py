"""What all layers read is computed once."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from tiny_llama import tiny_llama
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from micromix_compile import Recipe, explain

OPTIONS = {"recipe": Recipe(format="mxfp8")}
LAYERS = 4


def test_rotary_embedding_and_mask_are_computed_once(monkeypatch):
    # In bfloat16 Inductor leaves out the rounding of cosines that it computes where they are read.
    model = tiny_llama(torch.float32, layers=LAYERS)
    ids = torch.randint(0, 256, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0

    def run():
        torch.compiler.reset()
        compiled = torch.compile(model, backend="micromix", options=OPTIONS)
        with torch.no_grad(), config.patch(force_disable_caches=True):
            output, code = run_and_get_code(lambda: compiled(ids, attention_mask=mask).logits)
        return output, "\n".join(code), explain(compiled).passes

    output, code, passes = run()
    assert passes["materialize_shared"] == 3
    assert code.count("cos(") <= 2  # vectorised, and the rest of a row
    monkeypatch.setattr("micromix_compile.passes.between_layers.materialize_shared", lambda *_: 0)
    expected, code, passes = run()
    assert "materialize_shared" not in passes
    assert code.count("cos(") > 2
    assert torch.equal(output, expected)


class Shared(nn.Module):
    """Layers that read a value made before them, through `use`."""

    def __init__(self, readers, use):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(readers))
        self.use = use

    def forward(self, x, y):
        return self.use(self.layers, x, y)


def before_the_layers(layers, x, y):
    scale = torch.sigmoid(y)
    for layer in layers:
        x = layer(x) * scale
    return x


def written_later(layers, x, y):
    scale = torch.sigmoid(y)
    for layer in layers:
        x = layer(x) * scale
        scale.mul_(0.5)
    return x


def written_later_in_a_checkpoint(layers, x, y):
    scale = torch.sigmoid(y)
    for layer in layers:
        x = layer(x) * scale
        torch.utils.checkpoint.checkpoint(lambda t: t.mul_(0.5), scale, use_reentrant=False)
    return x


def after_a_layer(layers, x, y):
    scale = torch.sigmoid(layers[0](y))
    for layer in layers:
        x = layer(x) * scale
    return x


def of_which_a_view_is_written_later(layers, x, y):
    scale = y[:]
    view = scale.unsqueeze(0)
    for layer in layers:
        x = layer(x) * scale
    torch._dynamo.graph_break()
    view.mul_(3)
    return x + y


def of_integers(layers, x, y):
    number = y.int() + 1
    for layer in layers:
        x = layer(x) * number
    return x


@pytest.mark.parametrize(
    "readers, use, count",
    [
        (4, before_the_layers, 1),
        (3, before_the_layers, 0),
        (4, written_later, 0),
        (4, written_later_in_a_checkpoint, 0),
        (4, after_a_layer, 0),
        (4, of_integers, 0),
        (4, of_which_a_view_is_written_later, 0),
    ],
)
def test_what_is_computed_once(readers, use, count):
    model = Shared(readers, use).eval()
    x, y = torch.randn(3, 32), torch.randn(3, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="micromix", options=OPTIONS)
        actual = compiled(x, y.clone())
        assert explain(compiled).passes.get("materialize_shared", 0) == count
        torch.testing.assert_close(actual, model(x, y.clone()), atol=0.1, rtol=0.1)


def test_the_operator():
    operator = torch.ops.micromix.materialize.default
    for x in (
        torch.randn(3, 4).t(),
        torch.randn(4, 1).expand(4, 3),
        torch.ones(2, dtype=torch.bool),
    ):
        assert torch.equal(operator(x), x) and operator(x).data_ptr() != x.data_ptr()
        torch.library.opcheck(operator, (x,), test_utils=("test_schema", "test_faketensor"))
