"""GPTQ: optimal where the answer is known, better than nearest where it should be, and carried by plans."""

from __future__ import annotations

import copy

import pytest
import torch
from test_budget import batches
from tiny_llama import tiny_llama

from micromix_compile import Recipe, calibrate, load_plan
from micromix_compile.errors import NotRoundedWarning, RecipeError, RoundedWeightError
from micromix_compile.mx import MixedLayout, dequantize, hadamard, quantize
from micromix_compile.packing import pack_weight
from micromix_compile.plan import fingerprint
from micromix_compile.rounding import compensate, gptq, round_weights

LAYOUTS = [
    MixedLayout(96, 0, 0),
    MixedLayout(32, 32, 32),
    MixedLayout(64, 32, 0, format6="e3m2", hadamard=(4, 6)),
]


def inputs(tokens: int = 512, channels: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=generator)
    return torch.randn(tokens, channels, generator=generator) @ mixing


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_independent_inputs_are_rounded_to_nearest(layout):
    """With a diagonal Hessian no column can make up for another: the bits are those of quantize."""
    weight = torch.randn(24, 96)
    rotated = MixedLayout(layout.k4, layout.k6, layout.k8, layout.format6)
    data, scales = gptq(weight, torch.diag(torch.rand(96) + 0.1), rotated, damping=0.0)
    expected = quantize(weight, rotated)
    assert torch.equal(data, expected[0])
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lowers_the_error_of_the_output(layout):
    x, weight = inputs(), torch.randn(40, 96)
    plain = MixedLayout(layout.k4, layout.k6, layout.k8, layout.format6)
    errors = []
    for packed in (quantize(weight, plain), gptq(weight, x.T @ x, plain)):
        errors.append(float((x @ (dequantize(*packed, plain) - weight).T).norm()))
    assert errors[1] < 0.75 * errors[0]


def test_drift_is_made_up_for():
    """The inputs arrive at half their size: doubling the weight is the answer."""
    z = inputs().double()
    x = 0.5 * z
    moved = compensate(x.T @ x, x.T @ (z - x), damping=1e-12)
    torch.testing.assert_close(moved, torch.eye(96), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def calibrated():
    torch.compiler.reset()
    return calibrate(tiny_llama(torch.float32), gradients=True).run(batches(12))


@pytest.fixture(scope="module")
def rounded(calibrated):
    return calibrated.plan(Recipe(bits=4.5, hadamard=(4, 6), rounding="gptq"))


def lowered_logits(model, plan, batch, **options):
    options = {"plan": plan, "strict": True, "inductor": False, **options}
    compiled = torch.compile(model, backend="micromix", options=options, fullgraph=True)
    with torch.no_grad():
        logits = compiled(**batch).logits
    torch.compiler.reset()
    return logits


def test_every_layer_is_rounded_and_the_model_is_as_before(calibrated, rounded):
    model, reference = calibrated.model, tiny_llama(torch.float32)
    assert list(rounded.rounded) == list(rounded)
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert model.config.use_cache
    assert not any("forward" in vars(module) for module in model.modules())


def test_lowers_the_error_of_the_model_on_unseen_text(calibrated, rounded):
    model, errors = calibrated.model, []
    for plan in (rounded.without_rounding(), rounded):
        error = 0.0
        for batch in batches(4, seed=7):
            with torch.no_grad():
                exact = model(**batch).logits
            error += float((lowered_logits(model, plan, batch) - exact).square().sum())
        errors.append(error)
    assert errors[1] < 0.95 * errors[0]


def test_a_saved_plan_gives_the_same_numbers(calibrated, rounded, tmp_path):
    rounded.save(tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert loaded == rounded != rounded.without_rounding()
    batch = batches(1, seed=3)[0]
    first, second = (lowered_logits(calibrated.model, p, batch) for p in (rounded, loaded))
    assert torch.equal(first, second)


def test_the_compiled_model_computes_with_the_rounded_weights(calibrated, rounded):
    """Against the plain product of the dequantised operands, folded channel orders and all."""
    model = copy.deepcopy(calibrated.model)
    for name, layer in rounded.items():
        module, weight = model.get_submodule(name), rounded.rounded[name]
        values = dequantize(weight.data, weight.scales, layer.weight_layout)

        def forward(x, layer=layer, values=values):
            operand = dequantize(*quantize(x, layer.layout, layer.order), layer.layout)
            return (operand.double() @ values.double().T).float()

        module.forward = forward
    batch = batches(1, seed=3)[0]
    with torch.no_grad():
        expected = model(**batch).logits
    logits = lowered_logits(calibrated.model, rounded, batch)
    assert (logits - expected).norm() / expected.norm() < 2e-3


def test_a_rounded_weight_rotated_back_is_near_the_weight(calibrated, rounded):
    for name, layer in list(rounded.items())[:4]:
        weight = calibrated.model.get_submodule(name).weight.detach()
        packed = rounded.rounded[name]
        values = dequantize(packed.data, packed.scales, layer.weight_layout)
        for segment in layer.weight_layout.segments():
            own = slice(segment.start, segment.stop)
            values[:, own] = hadamard(values[:, own]) if segment.hadamard else values[:, own]
        order = torch.arange(weight.shape[1]) if layer.order is None else layer.order.long()
        assert (values[:, order >= 0] - weight[:, order[order >= 0]]).norm() / weight.norm() < 0.25


def test_other_weights_are_refused(calibrated, rounded):
    model = copy.deepcopy(calibrated.model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(Exception, match="rounded from other values") as raised:
        lowered_logits(model, rounded, batches(1)[0])
    errors = [raised.value, raised.value.__cause__, getattr(raised.value, "inner_exception", None)]
    assert any(isinstance(error, RoundedWeightError) for error in errors)
    name = next(iter(rounded))
    with pytest.raises(RoundedWeightError, match="a layer"):
        pack_weight(torch.zeros(64, 64), rounded[name], rounded=rounded.rounded[name])


def test_the_fingerprint_is_of_the_values():
    weight = torch.randn(33, 65).bfloat16()
    assert fingerprint(weight) == fingerprint(weight.float()) == fingerprint(weight.t().t())
    changed = weight.clone()
    changed[32, 64] += 0.01
    swapped = weight.flip(0)
    assert len({fingerprint(w) for w in (weight, changed, swapped, weight.t())}) == 4


def test_a_model_without_blocks_is_one_block():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    own = [inputs(64, 64) for _ in range(4)]
    plan = calibrate(model).run(own).plan(Recipe(format="mxfp4", rounding="gptq"))
    assert list(plan.rounded) == ["0", "2"]
    exact = model(own[0]).detach()
    errors = []
    for choice in (plan.without_rounding(), plan):
        compiled = torch.compile(
            model, backend="micromix", options={"plan": choice, "inductor": False}
        )
        with torch.no_grad():
            errors.append(float((compiled(own[0]) - exact).norm()))
        torch.compiler.reset()
    assert errors[1] < errors[0]


def test_layers_that_cannot_be_rounded_are_named():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.twice(self.twice(self.once(x)))

    model, own = Twice(), [inputs(16, 32)]
    plan = calibrate(model).run(own).plan(Recipe(format="mxfp6"))
    with pytest.warns(NotRoundedWarning, match="twice"):
        assert list(round_weights(model, plan, own).rounded) == ["once"]


def test_batches_that_are_gone_are_asked_for():
    calibration = calibrate(torch.nn.Linear(32, 8)).run(iter([torch.randn(4, 32)]))
    with pytest.raises(RecipeError, match="a list or a tensor of batches"):
        calibration.plan(Recipe(format="mxfp4", rounding="gptq"))
