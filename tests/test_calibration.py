"""Calibration sees what a hook on every linear layer would see, through whatever Dynamo makes of the model."""

from __future__ import annotations

import gc
import types
import weakref

import accelerate
import pytest
import torch
from linear_modules import is_linear
from tiny_llama import VOCABULARY, tiny_llama
from torch import nn
from transformers import BatchEncoding

from micromix_compile import Recipe, calibrate, explain, load_statistics
from micromix_compile.batches import next_token_loss, on_device
from micromix_compile.errors import (
    CalibrationGradientError,
    EmptyCalibrationError,
    NonFiniteCalibrationError,
    OptionError,
    PlanMismatchError,
)
from micromix_compile.planned import quantised
from micromix_compile.quantized_linear import QuantizedLinear
from micromix_compile.statistics import ChannelStatistics


class Nested(nn.Module):
    """Layers that share inputs, one used twice, a graph break, and a batch that is a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 48, bias=False)
        self.twice = nn.Linear(48, 48)
        self.last = nn.Linear(48, 16)

    def forward(self, batch, scale=1.0):
        x = batch["inputs"][0] * scale
        x = torch.relu(self.a(x)) + self.b(x)
        torch._dynamo.graph_break()
        return self.last(self.twice(self.twice(x))) + batch["inputs"][1]


def batches(count: int = 3) -> list:
    """Arguments of `Nested`, of several shapes."""
    return [
        ({"inputs": (torch.randn(2, 3 + i, 48), torch.zeros(16))}, 1.0 + i) for i in range(count)
    ]


def hooked(model: nn.Module, arguments: list, kinds=is_linear) -> dict[str, ChannelStatistics]:
    """Statistics gathered by module hooks, eagerly: the oracle."""
    found: dict[str, ChannelStatistics] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: found.setdefault(
                name, ChannelStatistics(inputs[0].shape[-1])
            ).update(inputs[0])
        )
        for name, module in model.named_modules()
        if kinds(module)
    ]
    with torch.no_grad():
        for args in arguments:
            model(*args)
    for handle in handles:
        handle.remove()
    return found


def assert_same(statistics, expected: dict[str, ChannelStatistics]) -> None:
    assert sorted(statistics.layers) == sorted(expected)
    for name, oracle in expected.items():
        found = statistics[name]
        assert found.tokens == oracle.tokens, name
        for what in ("total", "peak", "square"):
            torch.testing.assert_close(
                getattr(found, what), getattr(oracle, what), rtol=1e-5, atol=1e-6
            )
        moved = (found.histogram - oracle.histogram).abs().sum()
        assert moved <= 0.001 * oracle.histogram.sum(), name


def test_statistics_are_those_of_hooks():
    model, arguments = Nested().eval(), batches()
    calibration = calibrate(model).run(arguments)
    assert_same(calibration.statistics, hooked(model, arguments))
    groups = [names for names, _ in calibration.statistics.groups()]
    assert groups == [("a", "b"), ("twice",), ("last",)]


def test_the_context_changes_no_result_and_leaves_no_trace():
    model, arguments = Nested().eval(), batches(2)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    with torch.no_grad():
        expected = [model(*args) for args in arguments]
        with calibrate(model) as calibration:
            found = [model(*args) for args in arguments]
        again = model(*arguments[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(again, expected[0])
    assert model._compiled_call_impl is compiled
    assert calibration.statistics["a"].tokens == sum(
        args[0]["inputs"][0].shape[1] * 2 for args in arguments
    )


@pytest.mark.parametrize("how", ["statistics", "gradients", "plan"])
def test_calibration_keeps_no_model_alive(how):
    model = Nested().eval()
    weight, arguments = weakref.ref(model.a.weight), batches(1)
    if how == "gradients":
        calibrate(model, gradients=True).run(arguments, loss=lambda output, _: output.sum())
    else:
        plan = calibrate(model).run(arguments).plan(Recipe(format="mxfp8"))
        if how == "plan":
            calibrate(model, plan=plan).run(arguments)
    del model
    gc.collect()
    assert weight() is None


def test_statistics_add_up_over_contexts_and_files(tmp_path):
    model, arguments = Nested().eval(), batches(4)
    whole = calibrate(model).run(arguments)
    parts = [calibrate(model).run(arguments[:1]), calibrate(model).run(arguments[1:])]
    parts[1].save(tmp_path / "part.safetensors")
    parts[0].statistics.merge(load_statistics(tmp_path / "part.safetensors"))
    assert_same(parts[0].statistics, {n: whole.statistics[n] for n in whole.statistics.layers})
    recipe = Recipe(split=(0.4, 0.3, 0.3))
    assert parts[0].statistics.plan(recipe) == whole.plan(recipe)
    twice = calibrate(model).run(arguments[:2]).run(arguments[2:])
    assert twice.plan(recipe) == whole.plan(recipe)


def test_more_compilations_than_dynamo_allows_lose_no_token():
    """Static shapes: every batch is another compilation, beyond the 8 after which Dynamo runs uncompiled."""
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    xs = [torch.randn(2, n, 32) for n in range(1, 13)]
    static = {"assume_static_by_default": True, "automatic_dynamic_shapes": False}
    with torch._dynamo.config.patch(**static):
        calibration = calibrate(model).run(xs)
    assert calibration.statistics["0"].tokens == sum(2 * n for n in range(1, 13))


def test_one_graph_for_several_equal_layers_tells_them_apart():
    """A graph break in the loop makes Dynamo compile the layer, once for all layers."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            return torch.relu(self.linear(x))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model, xs = Stack().eval(), [(torch.randn(n, 32),) for n in (4, 6)]
    assert_same(calibrate(model).run(xs).statistics, hooked(model, xs))


def test_what_calibration_finds_is_what_is_lowered():
    model, arguments = Nested().eval(), batches(1)
    plan = calibrate(model).run(arguments).plan(Recipe(split=(0.5, 0.5, 0)))
    options = {"plan": plan, "strict": True, "inductor": False}
    compiled = torch.compile(model, backend="micromix", options=options)
    with torch.no_grad():
        compiled(*arguments[0])
    lowered = [row.name for row in explain(compiled).layers.values() if not row.reason]
    assert sorted(lowered) == sorted(plan) == ["a", "b", "last", "twice"]


def test_nothing_seen_and_bad_values_are_errors():
    model = Nested().eval()
    with calibrate(model) as calibration:
        pass
    with pytest.raises(EmptyCalibrationError, match="any linear layer"):
        calibration.plan(Recipe())
    ((batch, scale),) = batches(1)
    batch["inputs"][0][0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteCalibrationError, match="input of a "):
        calibrate(model).run([(batch, scale)])
    with pytest.raises(EmptyCalibrationError, match="last"):
        calibrate(model).run([({"inputs": (torch.empty(0, 3, 48), torch.zeros(16))},)]).plan()


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_model_that_accelerate_offloads(offload, tmp_path):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(48, 64), nn.ReLU())
            self.second = nn.Linear(64, 16)

        def forward(self, x):
            return self.second(self.first(x))

    model = Plain().eval()
    xs = [(torch.randn(2, n, 48),) for n in (4, 7)]
    expected = hooked(model, xs)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    calibration = calibrate(model).run([x for (x,) in xs], device="cpu")
    assert_same(calibration.statistics, expected)


def test_layers_see_what_quantised_layers_before_them_leave():
    torch.manual_seed(0)
    model, arguments = Nested().eval(), batches()
    recipe = Recipe(format="mxfp4")
    exact = calibrate(model).run(arguments)
    plan = exact.plan(recipe)
    before = model(*arguments[0])
    sequential = calibrate(model, plan=plan).run(arguments)
    assert torch.equal(model(*arguments[0]), before)
    with quantised(model, plan):
        expected = hooked(model, arguments, lambda m: isinstance(m, QuantizedLinear))
    assert_same(sequential.statistics, expected)
    assert sequential.statistics.layers == exact.statistics.layers
    for name, same in (("a", True), ("twice", False), ("last", False)):
        mean, other = (s.statistics[name].total for s in (exact, sequential))
        assert torch.equal(mean, other) == same
    assert torch.equal(sequential.statistics.columns["last"], exact.statistics.columns["last"])
    sequential.plan(Recipe(split=(0.5, 0.5, 0))).attach(model)
    with pytest.raises(CalibrationGradientError, match="quantises"):
        calibrate(model, gradients=True, plan=plan)


def test_a_layer_that_reads_one_value_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.lin(x) + self.other(x) + self.lin(x)

    found = calibrate(Twice().eval()).run([torch.randn(4, 32)]).statistics
    assert [names for names, _ in found.groups()] == [("lin", "other")]
    assert found["lin"].tokens == 4


class Writes(nn.Module):
    """Writes to what layers have read: to its own input, to the first value that has a gradient, and to a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        x += self.a(x)
        x += self.b(x)
        x = x * 1
        y = self.c(x)
        x.mul_(1000)
        return y + x.sum() * 0


def squared(output, batch):
    return output.square().sum()


def test_gradients_go_with_the_inputs_that_the_layers_read():
    model, x = Writes().eval(), torch.randn(8, 32)
    with torch.inference_mode():
        inference = x.clone()
    for batch in (x, inference):
        before = batch.clone()
        graded = calibrate(model, gradients=True).run([batch], loss=squared).statistics
        plain = calibrate(model).run([batch]).statistics
        for name in "abc":
            torch.testing.assert_close(graded[name].peak, plain[name].peak)
            assert graded[name].importance.all()
        # The caller's batch is as it was.
        assert torch.equal(batch, before) and not batch.requires_grad and batch.grad is None


def test_what_a_tokenizer_gives_is_moved():
    batch = BatchEncoding({"input_ids": torch.zeros(1, 4)})
    moved = on_device(batch, "meta")
    assert moved.input_ids.device.type == "meta"
    assert batch["input_ids"].device.type == "cpu"


class Residual(nn.Module):
    """Two layers whose inputs are read by a residual sum too; the first ones have no gradient of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x):
        x = x + 1e-3 * self.a(x)
        return x + 1e-3 * self.b(x)


def test_gradients_are_those_of_the_layers_alone():
    torch.manual_seed(0)
    model = Residual()
    found = calibrate(model, gradients=True).run([(torch.randn(8, 32),)], loss=squared).statistics
    first, second = (found[name].gradient.sum().item() for name in ("a", "b"))
    assert 0.2 < first / second < 5
    assert second < 1e-2  # of a loss whose gradient by x itself is about 1


def test_an_encoder_of_torch_in_training_mode():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    plan = calibrate(model).run([(torch.randn(2, 5, 32),)]).plan(Recipe(format="mxfp8"))
    assert {"layers.0.linear1", "layers.1.linear2"} <= set(plan)
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.training


def test_run_inside_of_the_context():
    model, arguments = Nested().eval(), batches(2)
    calibration = calibrate(model, gradients=True)
    with calibration:
        calibration.run(arguments[:1], loss=squared)
        squared(model(*arguments[1]), None).backward()
    whole = calibrate(model, gradients=True).run(arguments, loss=squared)
    assert calibration.statistics.tokens == whole.statistics.tokens
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("sequential", [False, True])
def test_a_context_that_cannot_begin_leaves_the_model(sequential, monkeypatch):
    model, arguments = Nested(), batches(1)
    plan = calibrate(model).run(arguments).plan(Recipe(format="mxfp4")) if sequential else None

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        calibrate(model, gradients=not sequential, plan=plan).run(arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert type(model.a) is nn.Linear


def test_the_model_is_in_evaluation_mode_meanwhile():
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 8))
    model[1].eval()
    x = torch.randn(16, 32)
    found = calibrate(model).run([x]).statistics
    assert [module.training for module in model] == [True, False, True, True]
    assert_same(found, hooked(model.eval(), [(x,)]))


def test_padding_is_no_text():
    class Output:
        logits = torch.zeros(2, 12, VOCABULARY)

    tokens = torch.randint(0, VOCABULARY, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 5:] = mask[1, :3] = 0
    loss = next_token_loss(Output, {"input_ids": tokens, "attention_mask": mask})
    assert loss / torch.tensor(VOCABULARY).log() == pytest.approx(4 + 8)


def test_a_mean_over_labels_counts_by_their_number():
    """As the model's own loss is: a label weighs the same in a batch of 8 as in one of 4, of which 3 are left out."""
    logits = torch.randn(12, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (12,))
    labels[8:11] = -100
    losses = []
    for part in (slice(0, 8), slice(8, 12), slice(0, 12)):
        mean = nn.functional.cross_entropy(logits[part], labels[part])
        output = types.SimpleNamespace(loss=mean, logits=logits[None, part])
        losses.append(next_token_loss(output, {"labels": labels[None, part]}))
    torch.testing.assert_close(losses[0] + losses[1], losses[2])
    assert next_token_loss(output, {"pixels": None}) == mean


def test_the_tokens_of_a_decoder_are_what_it_predicts():
    logits, ids = torch.randn(1, 5, VOCABULARY), torch.randint(0, VOCABULARY, (3, 1, 5))
    output = types.SimpleNamespace(logits=logits)
    batch = {"input_ids": ids[0], "attention_mask": torch.zeros(1, 5), "decoder_input_ids": ids[1]}
    expected = next_token_loss(output, {"input_ids": ids[1]})
    torch.testing.assert_close(next_token_loss(output, batch), expected)
    with pytest.raises(CalibrationGradientError, match="no logits for the batch's input_ids"):
        next_token_loss(output, {"input_ids": torch.zeros(1, 7, dtype=torch.int64)})


@pytest.mark.parametrize(
    "mask",
    [{"full": None}, [1, 1], *(torch.tensor([m]) for m in ((0.0, 0.0, -1e9), (1.0, 1.0, 0.0)))],
)
def test_masks_of_other_kinds(mask):
    tokens = torch.tensor([[1, 2, 3]])
    output = types.SimpleNamespace(logits=torch.zeros(1, 3, 4))
    loss = next_token_loss(output, {"input_ids": tokens, "attention_mask": mask})
    counted = 1 if isinstance(mask, torch.Tensor) else 2
    torch.testing.assert_close(loss, counted * torch.tensor(4.0).log())


def test_what_was_meant_is_said():
    model, x = nn.Sequential(nn.Linear(32, 32)).eval(), torch.randn(4, 32)
    with calibrate(model, gradients=True) as calibration:
        model(x)
    with pytest.raises(CalibrationGradientError, match="no loss was differentiated"):
        calibration.plan()
    compiled = torch.compile(model, backend="eager")
    with calibrate(compiled) as calibration, torch.no_grad():
        compiled(x)
    with pytest.raises(EmptyCalibrationError, match=r"as model\(\.\.\.\) itself"):
        calibration.plan()
    with pytest.raises(OptionError, match=r"one batch.*run\(\[batch\]\)"):
        calibrate(model).run({"input": x})
    plan = calibrate(model).run([x]).plan()
    with pytest.raises(PlanMismatchError, match="0: the model has no such layer"):
        calibrate(nn.ModuleDict({"q": nn.Linear(32, 32)}), plan=plan)


@pytest.mark.parametrize("bits", [None, 5.0])
def test_a_default_device_and_dtype_are_not_the_statistics(bits):
    model, xs = nn.Sequential(nn.Linear(70, 64)).eval(), [torch.randn(8, 70)]
    expected = calibrate(model).run(xs).plan(Recipe(bits=bits))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert calibrate(model).run(xs).plan(Recipe(bits=bits)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_names_are_those_without_compile():
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 64)).eval()
    model[0], model[1] = (torch.compile(part, backend="micromix") for part in model)
    plan = calibrate(model).run([torch.randn(4, 64)]).plan(Recipe(format="mxfp6"))
    assert list(plan) == ["0.0", "1"]
    plan.attach(model)
    with torch.no_grad():
        model(torch.randn(4, 64))
    assert {name: row.k6 for name, row in explain(model).layers.items()} == {"0.0": 64, "1": 64}


class Tokens(nn.Module):
    """A language model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids):
        return types.SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def test_a_batch_that_is_a_tensor_of_integers_is_the_ids_of_the_loss():
    model, ids = Tokens().eval(), torch.randint(0, 32, (2, 9))
    found = calibrate(model, gradients=True).run([ids]).statistics
    named = calibrate(model, gradients=True).run([{"input_ids": ids}]).statistics
    assert torch.equal(
        next_token_loss(model(ids), ids), next_token_loss(model(ids), {"input_ids": ids})
    )
    assert found.layers.keys() == named.layers.keys() != set()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("hello", "cannot be 'hello'"),
        (None, "cannot be None"),
        (["hello"], "a batch without a tensor, 'hello', and the model failed"),
        ([[1, 2, 3]], r"a batch without a tensor, \[1, 2, 3\]"),
        ([{"input_ids": [[1, 2, 3]]}], "a batch with a list as input_ids"),
        ([{"input_ids": torch.ones(1, 3)}], "input_ids of torch.float32"),
    ],
    ids=str,
)
def test_what_is_no_batch_is_said(wrong, message):
    with pytest.raises(OptionError, match=message):
        calibrate(Tokens()).run(wrong)


def test_a_tensor_of_windows_is_no_list_of_batches():
    windows = torch.randint(0, VOCABULARY, (3, 16))
    with pytest.raises(OptionError, match=r"shape \[16\], without a dimension of sequences"):
        calibrate(tiny_llama()).run(windows)


def test_a_model_may_take_batches_without_tensors():
    class OfWords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = Tokens()

        def forward(self, text):
            return self.tokens(torch.tensor([[ord(letter) % 32 for letter in text]]))

    assert calibrate(OfWords()).run(["hello", "words"]).statistics.layers
