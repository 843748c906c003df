"""GPTQ: optimal where the answer is known, better than nearest where it should be, and carried by plans."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import accelerate
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
    rotated = MixedLayout(*layout.counts, layout.format6)
    data, scales = gptq(weight, torch.diag(torch.rand(96) + 0.1), rotated, damping=0.0)
    expected = quantize(weight, rotated)
    assert torch.equal(data, expected[0])
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lowers_the_error_of_the_output(layout):
    x, weight = inputs(), torch.randn(40, 96)
    plain = MixedLayout(*layout.counts, layout.format6)
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


def relative_error(model, plan, x):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="micromix", options={"plan": plan, "inductor": False})
    with torch.no_grad():
        exact = model(x.clone())
        return float((compiled(x.clone()) - exact).norm() / exact.norm())


def same_weights(plan, other):
    names = plan.rounded.keys()
    return names == other.rounded.keys() and all(
        plan.rounded[n].digest == other.rounded[n].digest for n in names
    )


class Readers(torch.nn.Module):
    """Two layers that read one tensor, which is written to, or has a graph break, between them."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = torch.nn.Linear(128, 128), torch.nn.Linear(128, 128)
        self.between = between
        with torch.no_grad():
            self.b.weight[:, :32] *= 30
            self.a.weight[:, 64:96] *= 30

    def forward(self, x):
        x = x * 1.0
        y = self.a(x)
        if self.between == "write":
            x.mul_(torch.linspace(4, 0.1, 128))
        else:
            torch._dynamo.graph_break()
        return y + self.b(x)


@pytest.mark.parametrize(
    ("between", "recipe"),
    [("write", {"split": (0.5, 0.25, 0.25)}), ("break", {"bits": 4.5}), ("break", {"bits": 5.0})],
)
def test_a_layer_is_rounded_by_its_own_plan(between, recipe):
    model = Readers(between).eval()
    own = [torch.randn(64, 128) * torch.logspace(-1, 1, 128) for _ in range(3)]
    plan = calibrate(model).run(own).plan(Recipe(**recipe, rounding="gptq"))
    assert plan["a"] != plan["b"] and list(plan.rounded) == ["a", "b"]
    assert relative_error(model, plan, own[0]) < 1.2 * relative_error(
        model, plan.without_rounding(), own[0]
    )


@pytest.mark.parametrize("part", ["model", "blocks"])
def test_a_compiled_model_is_rounded_by_its_float_self(part):
    model, own = tiny_llama(torch.float32), batches(2)
    recipe = Recipe(format="mxfp4", rounding="gptq")
    expected = calibrate(model).run(own).plan(recipe)
    torch.compiler.reset()
    for module in [model] if part == "model" else model.model.layers:
        module.compile(backend="micromix", options={"recipe": Recipe(format="mxfp4")})
    found = calibrate(model).run(own).plan(recipe)
    assert len(found.rounded) == len(expected.rounded) == 14
    assert same_weights(found, expected)
    assert (model if part == "model" else model.model.layers[0])._compiled_call_impl is not None


class Blocks(torch.nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.first = torch.nn.Linear(64, 64)
        self.layers = torch.nn.ModuleList(Block(in_place) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Block(torch.nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.linear, self.in_place = torch.nn.Linear(64, 64), in_place

    def forward(self, x):
        y = self.linear(input=x)  # by keyword, which is no other layer
        if self.in_place:
            x += y
            return x
        return x + y


def test_blocks_that_write_to_their_input_are_as_good_as_others():
    models = [Blocks(in_place).eval() for in_place in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    own = [torch.randn(64, 64) for _ in range(3)]
    recipe = Recipe(format="mxfp4", rounding="gptq")
    plans = [calibrate(model).run(own).plan(recipe) for model in models]
    assert len(plans[0].rounded) == 3
    assert same_weights(*plans)


class Decoder(torch.nn.Module):
    """Every block reads one memory, as a decoder reads what its encoder gives; itself or a copy."""

    def __init__(self, copied):
        super().__init__()
        self.layers = torch.nn.ModuleList(CrossBlock(copied) for _ in range(2))

    def forward(self, x, memory):
        for layer in self.layers:
            x = layer(x, memory)
        return x


class CrossBlock(torch.nn.Module):
    def __init__(self, copied):
        super().__init__()
        self.key, self.out = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.copied = copied

    def forward(self, x, memory):
        return x + self.out(torch.relu(self.key(memory.clone() if self.copied else memory)))


def test_blocks_that_read_one_tensor_are_measured_before_they_are_rounded():
    models = [Decoder(copied).eval() for copied in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    own = [(torch.randn(64, 64), torch.randn(64, 64)) for _ in range(3)]
    recipe = Recipe(format="mxfp4", rounding="gptq")
    plans = [calibrate(model).run(own).plan(recipe) for model in models]
    assert len(plans[0].rounded) == 4
    assert same_weights(*plans)


@pytest.mark.parametrize("where", ["batch", "part", "given"])
def test_no_cache_grows(where):
    """Asked for by the batch, by the configuration of a part, or in a way that cannot be known beforehand."""
    model, own = tiny_llama(torch.float32), batches(2)
    recipe = Recipe(format="mxfp4", rounding="gptq")
    expected = calibrate(model).run(own).plan(recipe)
    if where == "batch":
        own = [batch | {"use_cache": True} for batch in own]
    elif where == "part":
        model.model.config = copy.deepcopy(model.config)
        model.config = SimpleNamespace(**model.config.to_dict())
        del model.config.use_cache
    else:
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"use_cache": True}), with_kwargs=True
        )
    found = round_weights(model, expected.without_rounding(), own)
    assert model.model.config.use_cache
    if where == "given":  # all layers as one block: what is measured first is the same
        assert found.rounded.keys() == expected.rounded.keys()
        name = "model.layers.0.self_attn.q_proj"
        assert found.rounded[name].digest == expected.rounded[name].digest
    else:
        assert same_weights(found, expected)


def test_experts_stay_with_nearest():
    """All run for every batch of the float model, and are given other tokens by the quantised one."""

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.router = torch.nn.Linear(64, 64), torch.nn.Linear(64, 4)

        def forward(self, x):
            x = self.first(x)
            return x, self.router(x).argmax(-1)

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.routed = Routed()
            self.experts = torch.nn.ModuleList(Block(False) for _ in range(4))

        def forward(self, x):
            x, top = self.routed(x)
            result = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                own = (top == i).nonzero().squeeze(-1)
                if own.numel():
                    result[own] = expert(x[own])
            return result

    model, own = Experts().eval(), [torch.randn(256, 64) for _ in range(3)]
    plan = calibrate(model).run(own).plan(Recipe(format="mxfp4"))
    with pytest.warns(NotRoundedWarning, match="experts"):
        assert list(round_weights(model, plan, own).rounded) == ["routed.first", "routed.router"]


def test_a_layer_that_runs_twice_for_one_batch_and_never_for_another():
    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def forward(self, x, times):
            x = self.once(x)
            for _ in range(times):
                x = self.twice(x)
            return x

    model, own = Loop().eval(), [(torch.randn(8, 64), 2), (torch.randn(8, 64), 0)]
    plan = calibrate(model).run(own).plan(Recipe(format="mxfp4"))
    with pytest.warns(NotRoundedWarning, match="twice"):
        assert list(round_weights(model, plan, own).rounded) == ["once"]


def test_the_models_own_forwards_and_modes_come_back():
    calls = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(), torch.nn.Linear(64, 8))
    model.eval()
    model[1].train()
    accelerate.hooks.add_hook_to_module(model[0], Hook())
    calibrate(model).run([torch.randn(8, 64)]).plan(Recipe(format="mxfp4", rounding="gptq"))
    assert [module.training for module in model] == [False, True, False]
    before = len(calls)
    model(torch.randn(8, 64))
    assert len(calls) == before + 1


def test_offloaded_weights_are_refused_and_double_ones_left():
    model, own = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), [torch.randn(8, 64)]
    plan = calibrate(model).run(own).plan(Recipe(format="mxfp4"))
    with pytest.warns(NotRoundedWarning):
        round_weights(copy.deepcopy(model).double(), plan, [own[0].double()])
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(RecipeError, match="needs the weights in memory"):
        round_weights(model, plan, own)


def test_the_hessian_stays_as_it_was():
    hessian = torch.eye(32, dtype=torch.float64)
    gptq(torch.randn(4, 32), hessian, MixedLayout(32, 0, 0))
    assert torch.equal(hessian, torch.eye(32, dtype=torch.float64))
