"""The backend: what it lowers, what it leaves alone and why, and that it never serves stale numbers."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.utils.checkpoint
from architectures import build, token_ids
from torch import nn
from torch._inductor.utils import run_and_get_code

from micromix_compile import Recipe, calibrate, explain, regions
from micromix_compile.errors import (
    GradientError,
    NoPlanWarning,
    OptionError,
    PlanFileError,
    PlanMismatchError,
    ReleasedWeightError,
    StrictError,
)
from micromix_compile.options import Options
from micromix_compile.packing import PlacedWeight, packings
from micromix_compile.reference import reference_model

MIX = Recipe(split=(0.5, 0.25, 0.25))
QUICK = {"inductor": False}


class Block(nn.Module):
    """Two layers that share an input, and one behind them."""

    def __init__(self, k: int = 96, n: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(k, n, bias)
        self.up = nn.Linear(k, n, bias)
        self.down = nn.Linear(n, k, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def block():
    return Block().eval()


def planned(model: nn.Module, *batches: torch.Tensor, recipe: Recipe = MIX):
    return calibrate(model).run(batches).plan(recipe)


def run(model, x, **options):
    compiled = torch.compile(model, backend="micromix", options={**QUICK, **options})
    with torch.no_grad():
        return compiled(x), compiled


def reasons(compiled) -> dict[str, str]:
    return {name: row.reason for name, row in explain(compiled).layers.items()}


def test_a_script_that_never_imports_the_package(tmp_path):
    script = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
assert "micromix_compile" not in sys.modules
with torch.no_grad():
    x = torch.randn(4, 64)
    y = torch.compile(model, backend="micromix")(x)
    error = (y - model(x)).norm() / model(x).norm()
assert 0 < error < 0.1, error
assert "micromix_compile" in sys.modules
print("ran")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "ran\n", result.stderr
    assert result.stderr.count("NoPlanWarning") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inductor", [False, True])
def test_numbers_are_those_of_the_reference(block, dtype, inductor):
    block.to(dtype)
    x = torch.randn(2, 5, 96, dtype=dtype)
    plan = planned(block, x)
    y, compiled = run(block, x, plan=plan, strict=True, inductor=inductor)
    with torch.no_grad():
        reference = reference_model(block, plan)(x).float()
        change = (reference - block(x).float()).norm()
    assert y.dtype == dtype
    assert 0 < (y.float() - block(x).float()).norm()
    assert (y.float() - reference).norm() <= 0.1 * change
    assert explain(compiled).passes["lowered"] == 3


def test_layers_that_share_an_input_share_a_quantise(block):
    x = torch.randn(4, 96)
    _, compiled = run(block, x, plan=planned(block, x))
    assert explain(compiled).passes["micromix::quantize"] == 2


class Writes(nn.Module):
    def __init__(self, write) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)
        self.write = write

    def forward(self, x):
        x = x + 1
        y = self.a(x)
        self.write(x)
        return y, self.b(x)


def in_a_checkpoint(write):
    """The same write, in a graph inside the graph."""
    return lambda x: torch.utils.checkpoint.checkpoint(write, x, use_reentrant=False)


def in_a_branch(write):
    return lambda x: torch.cond(x.sum() > -1e6, lambda x: write(x).clone(), torch.clone, (x,))


WRITE = lambda x: x.mul_(3)
WRITES = {
    "here": WRITE,
    "checkpoint": in_a_checkpoint(WRITE),
    "of a view": in_a_checkpoint(lambda x: WRITE(x.view(-1)[1:])),
    "checkpoint in a checkpoint": in_a_checkpoint(in_a_checkpoint(WRITE)),
    "cond": in_a_branch(WRITE),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_two_readers_is_seen(write):
    model = Writes(WRITES[write]).eval()
    x = torch.randn(4, 64)
    with torch.no_grad():
        (a, b), compiled = run(model, x, recipe=Recipe(format="mxfp8"))
        exact_a, exact_b = model(x)
    assert explain(compiled).passes["micromix::quantize"] == 2
    assert (a - exact_a).norm() < 0.1 * exact_a.norm()
    assert (b - exact_b).norm() < 0.1 * exact_b.norm()


def test_what_a_graph_inside_the_graph_only_reads_is_quantised_once():
    model = Writes(in_a_checkpoint(lambda x: x * 3)).eval()
    _, compiled = run(model, torch.randn(4, 64), recipe=Recipe(format="mxfp8"))
    assert explain(compiled).passes["micromix::quantize"] == 1


def test_no_plan_is_mxfp8_with_one_warning(block):
    x = torch.randn(4, 96)
    with pytest.warns(NoPlanWarning) as caught:
        y, compiled = run(block, x)
    assert len([w for w in caught if w.category is NoPlanWarning]) == 1
    rows = explain(compiled).layers.values()
    assert all((row.k4, row.k6) == (0, 0) and row.k8 in (96, 64) for row in rows)
    assert 0 < (y - block(x)).norm() < 0.1 * block(x).norm()


def test_an_attached_plan_is_found_and_its_gaps_are_left_alone(block):
    x = torch.randn(4, 96)
    planned(block, x, recipe=Recipe(split=(1, 0, 0), skip=("down",))).attach(block)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoPlanWarning)
        _, compiled = run(block, x, strict=True)
    assert reasons(compiled) == {"gate": "", "up": "", "down": "the recipe skips it"}
    assert explain(compiled).layers["gate"].k4 == 96


def test_a_plan_can_be_given_as_a_path(block, tmp_path):
    x = torch.randn(4, 96)
    plan = planned(block, x)
    plan.save(tmp_path / "plan.safetensors")
    by_path, _ = run(block, x, plan=str(tmp_path / "plan.safetensors"))
    torch.compiler.reset()
    assert torch.equal(by_path, run(block, x, plan=plan)[0])
    (tmp_path / "foreign").write_bytes(b"not a plan")
    torch.compiler.reset()
    with pytest.raises(PlanFileError):
        run(block, x, plan=tmp_path / "foreign")


def test_a_plan_for_another_model_is_refused(block):
    x = torch.randn(4, 96)
    with pytest.raises(PlanMismatchError, match="gate"):
        run(block, x, plan=planned(Block(96, 32).eval(), x))
    other = nn.Sequential(nn.Linear(96, 8)).eval()
    with pytest.raises(PlanMismatchError, match="no layer gate"):
        run(block, x, plan=planned(other, x))


def test_a_plan_of_the_whole_model_serves_a_part_of_it(block):
    model = nn.ModuleDict({"inner": block})
    model.forward = lambda x: model["inner"](x)
    x = torch.randn(4, 96)
    plan = planned(model, x)
    assert list(plan) == ["inner.gate", "inner.up", "inner.down"]
    _, compiled = run(block, x, plan=plan, strict=True)
    assert set(reasons(compiled)) == set(plan)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"plann": None}, "plann"),
        ({"strict": 1}, "strict"),
        ({"recipe": "mxfp8"}, "recipe"),
        ({"mode": "fastest"}, "mode"),
        ({"kernel": "fastest"}, "the kernels are auto, mx_emulated"),
        ({"kernel": None}, "kernel"),
        ({"kernel": "mx_emulated"}, "is on cpu, and that kernel needs a CUDA device"),
    ],
)
def test_bad_options_are_refused(block, options, option):
    with pytest.raises(OptionError, match=option):
        run(block, torch.randn(4, 96), **options)


def test_a_plan_and_a_recipe_together_are_refused(block):
    x = torch.randn(4, 96)
    with pytest.raises(OptionError, match="beside a plan"):
        run(block, x, plan=planned(block, x), recipe=Recipe(format="mxfp4"))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("recipe", "mxfp4", r"cannot be 'mxfp4'. Valid: a micromix.Recipe, as in Recipe"),
        ("strict", "yes", "Valid: True or False"),
        ("mode", "fast", r"there are default, (?!.*default)"),
    ],
)
def test_a_bad_option_says_what_it_may_be(option, value, message):
    with pytest.raises(OptionError, match=message):
        Options.parse({option: value}, None)


def test_inductor_settings_and_mode_pass_through(block):
    x = torch.randn(4, 96)
    settings = {"mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False}
    y, _ = run(block, x, recipe=Recipe(format="mxfp8"), inductor=True, **settings)
    assert (y - block(x)).norm() < 0.1 * block(x).norm()


def test_gradients_and_training_are_refused(block):
    x = torch.randn(4, 96)
    compiled = torch.compile(
        block, backend="micromix", options={**QUICK, "plan": planned(block, x)}
    )
    with pytest.raises(GradientError, match="gradients are enabled"):
        compiled(x)
    with torch.no_grad():
        first = compiled(x)
    with torch.inference_mode():
        assert torch.equal(first, compiled(x))

    model = nn.Sequential(nn.Linear(96, 64), nn.Dropout(0.5)).train()
    with torch.no_grad(), pytest.raises(GradientError, match="training mode"):
        torch.compile(model, backend="micromix", options=QUICK)(x)


def test_frozen_parameters_need_no_context(block):
    x = torch.randn(4, 96)
    block.requires_grad_(False)
    compiled = torch.compile(
        block, backend="micromix", options={**QUICK, "plan": planned(block, x)}
    )
    assert not compiled(x).requires_grad


def test_what_is_not_supported_is_left_alone_and_said(block):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(64, 8).double()
            self.computed = nn.Parameter(torch.randn(8, 64))
            self.good = nn.Linear(64, 8)

        def forward(self, x, w):
            f = torch.nn.functional.linear
            return self.wide(x.double()), f(x, self.computed * 2), f(x, w), self.good(x)

    model = Odd().eval()
    x, w = torch.randn(4, 64), torch.randn(8, 64)
    options = {**QUICK, "recipe": Recipe(format="mxfp4")}
    with torch.no_grad():
        compiled = torch.compile(model, backend="micromix", options=options)
        outputs, exact = compiled(x, w), model(x, w)
    assert all(torch.equal(a, b) for a, b in zip(outputs[:3], exact[:3], strict=True))
    assert not torch.equal(outputs[3], exact[3])
    found = reasons(compiled)
    assert found["wide"] == "its weight is float64; bfloat16, float16 and float32 are supported"
    assert found["good"] == ""
    assert sum("computed in the graph" in reason for reason in found.values()) == 1
    assert sum("argument of the call" in reason for reason in found.values()) == 1

    torch.compiler.reset()
    strict = torch.compile(
        model, backend="micromix", options={**options, "strict": True, "release_weights": True}
    )
    with torch.no_grad(), pytest.raises(StrictError, match="wide: its weight is float64"):
        strict(x, w)
    assert model.good.weight.untyped_storage().nbytes() > 0, "an error must lose nothing"


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: x @ w.T,
        lambda x, w: x @ w.mT,
        lambda x, w: x @ w.adjoint(),
        lambda x, w: torch.matmul(x, w.transpose(-1, -2)),
        lambda x, w: torch.mm(x, w.permute(1, 0)),
        lambda x, w: x.matmul(w.transpose(0, 1)),
        lambda x, w: torch.addmm(torch.ones(8), x, w.t()),
        lambda x, w: torch.linalg.matmul(x, w.t()),
        lambda x, w: torch.ops.aten.mm(x, w.t()),
        lambda x, w: torch.ops.aten.matmul(x, w.t()),
        lambda x, w: torch.ops.aten.linear(x, w),
        lambda x, w: torch.ops.aten.addmm(torch.ones(8), x, w.t()),
    ],
)
def test_every_spelling_of_a_linear_layer(product):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 64))

        def forward(self, x):
            return product(x, self.weight)

    model = Product().eval()
    x = torch.randn(4, 64)
    y, compiled = run(model, x, recipe=Recipe(format="mxfp8"), strict=True)
    assert explain(compiled).passes["lowered"] == 1
    assert 0 < (y - model(x)).norm() < 0.1 * model(x).norm()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.view(-1)[3:].mul_(2),
        lambda w: torch.add(w, 1, out=w),
        lambda w: torch.nn.functional.relu(w.t(), True),
        in_a_checkpoint(lambda w: w.add_(1)),
    ],
)
def test_a_weight_that_the_graph_writes_to_is_left_alone(write):
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(64, 64))
            self.other = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            write(self.state)
            once = torch.nn.functional.normalize(self.other, 2, 1)
            return x @ self.state + x.add(1).add_(once[0]) @ self.other

    model, x = State().eval(), torch.randn(4, 64)
    expected = copy.deepcopy(model)
    recipe = Recipe(format="mxfp8")
    with torch.no_grad():
        compiled = torch.compile(model, backend="micromix", options={**QUICK, "recipe": recipe})
        for _ in range(3):
            y, exact = compiled(x), expected(x)
            assert (y - exact).norm() < 0.1 * exact.norm()
            assert torch.equal(model.state, expected.state)
    found = reasons(compiled)
    assert "the graph writes to its weight" in found["state"]
    assert found["other"] == "", "it is read by what writes to something else"
    torch.compiler.reset()
    with pytest.raises(StrictError, match="writes to its weight"):
        run(model, x, recipe=recipe, strict=True)


def test_a_weight_in_an_unknown_form_is_named():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 64))

        def forward(self, x):
            return x @ self.weight.flip(0).t() + x[:, :1] @ x[:1, :8]

    model, x = Product().eval(), torch.randn(4, 64)
    recipe = Recipe(format="mxfp8")
    _, compiled = run(model, x, recipe=recipe)
    (layer,) = explain(compiled).layers.values()
    assert "computed in the graph" in layer.reason
    with pytest.raises(StrictError, match="computed in the graph"):
        run(model, x, recipe=recipe, strict=True)


@pytest.mark.parametrize("fast", [True, False])
def test_layers_inside_an_operator_of_torch_are_named(fast, request):
    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 5, 32)
    request.addfinalizer(lambda: torch.backends.mha.set_fastpath_enabled(True))
    torch.backends.mha.set_fastpath_enabled(fast)
    recipe = Recipe(format="mxfp8")
    _, compiled = run(model, x, recipe=recipe)
    found = reasons(compiled)
    assert found.keys() == {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    assert sum(map(bool, found.values())) == (4 if fast else 2)
    assert "inside" in found["self_attn.out_proj"]
    assert ("set_fastpath_enabled" in found["linear1"]) == fast
    torch.compiler.reset()
    with pytest.raises(StrictError, match="inside"):
        run(model, x, recipe=recipe, strict=True)
    torch.compiler.reset()
    skip = ("*self_attn*", "linear*")
    y, _ = run(model, x, recipe=Recipe(format="mxfp8", skip=skip), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


class ReadsAttention(nn.Module):
    """A layer that reads an attention, as `use` gives it."""

    def __init__(self, use) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(64, 32), use

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return self.layer(self.use(nn.functional.scaled_dot_product_attention(q, q, q)))


@pytest.mark.parametrize("use", [lambda y: y, lambda y: y.view(-1, 64)])
def test_a_layer_may_read_attention_in_any_form(use):
    model, q = ReadsAttention(use), torch.randn(2, 4, 5, 64)
    actual, compiled = run(model, q, recipe=Recipe(format="mxfp8"), inductor=True)
    assert not any(reasons(compiled).values())
    expected = model(q)
    assert (actual - expected).norm() < 0.06 * expected.norm()


class Mapped(nn.Module):
    """Layers and an attention inside torch.vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = Block(64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.vmap(self.block, 1, 1)(x)
        heads = self.out(x).view(len(x), 1, -1, 4, 16).transpose(2, 3)
        return torch.vmap(nn.functional.scaled_dot_product_attention)(heads, heads, heads)


@pytest.mark.parametrize("inductor", [False, True])
def test_layers_inside_vmap_are_lowered_and_read_all_rows_at_once(inductor):
    model, x = Mapped().eval(), torch.randn(6, 5, 64)
    (actual, compiled), code = run_and_get_code(
        lambda: run(model, x, recipe=Recipe(format="mxfp8"), inductor=inductor)
    )
    assert explain(compiled).passes["lowered"] == 4
    assert "lower_attention" not in explain(compiled).passes
    expected = model(x)
    assert (actual - expected).norm() < 0.1 * expected.norm()
    if inductor:
        assert "\n".join(code).count("torch.ops.micromix.linear.default(") == 2


def test_a_weight_for_each_inside_vmap():
    weights, x = torch.randn(3, 32, 64), torch.randn(3, 5, 64)
    rest = (0, 0, 64, 0)
    quantize, linear = torch.ops.micromix.quantize, torch.ops.micromix.linear
    placed = [torch.ops.micromix.place_weight(*quantize(w, None, *rest), *rest) for w in weights]

    def product(x, weight):
        return linear(*quantize(x, None, *rest), weight, None, 32, *rest, torch.float32)

    expected = torch.stack([product(*pair) for pair in zip(x, placed)])
    assert torch.equal(torch.vmap(product)(x, torch.stack(placed)), expected)


def test_attention_of_separate_weights():
    """What is given by keyword, or not at all, is no reason to fail."""
    model, x = nn.MultiheadAttention(32, 2, kdim=16, vdim=16).eval(), torch.randn(5, 32)

    def attend(x):
        return model(x, x[:, :16], x[:, 16:])[0]

    y, _kept = run(attend, x, recipe=Recipe(format="mxfp8"))
    assert torch.equal(y, attend(x))
    assert reasons(model).keys() == {"out_proj"}


@pytest.mark.parametrize("k", [1, 31, 33, 100])
def test_any_k_and_a_transposed_weight(k):
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(k, 24))

        def forward(self, x):
            return x @ self.weight

    model = Transposed().eval()
    x = torch.randn(4, k)
    plan = planned(model, x)
    assert [shape.transposed for shape in plan.shapes.values()] == [True]
    y, _ = run(model, x, plan=plan, strict=True)
    assert (y - model(x)).norm() < 0.3 * model(x).norm()


def test_inputs_without_rows_and_with_gaps(block):
    x = torch.randn(10, 4, 96)  # a half of them is still the same kernel's
    plan = planned(block, x)
    whole, compiled = run(block, x, plan=plan)
    with torch.no_grad():
        assert compiled(x[:0]).shape == (0, 4, 96)
        assert torch.equal(compiled(x[::2]), whole[::2])
        assert torch.equal(compiled(x.transpose(0, 1)), whole.transpose(0, 1))


def test_a_changed_weight_is_never_served_stale(block):
    x = torch.randn(4, 96)
    plan = planned(block, x)
    first, compiled = run(block, x, plan=plan)
    changes = [
        lambda: block.down.weight.mul_(2),
        lambda: block.gate.load_state_dict(nn.Linear(96, 64).state_dict()),
        lambda: setattr(block.up.weight, "data", torch.randn(64, 96)),
        lambda: setattr(block, "down", nn.Linear(64, 96)),
    ]
    for change in changes:
        with torch.no_grad():
            change()
            now = compiled(x)
        assert not torch.equal(now, first)
        first = now
    torch.compiler.reset()
    assert torch.equal(now, run(copy.deepcopy(block), x, plan=plan)[0])


def test_a_write_through_data_is_seen_once_it_is_told(block):
    x = torch.randn(4, 96)
    plan = planned(block, x)
    first, compiled = run(block, x, plan=plan)
    block.down.weight.data.mul_(2)
    torch.autograd.graph.increment_version(block.down.weight)
    with torch.no_grad():
        y = compiled(x)
    assert not torch.equal(first, y)
    torch.compiler.reset()
    assert torch.equal(y, run(copy.deepcopy(block), x, plan=plan)[0])


def test_released_weights_are_freed_and_never_used_again(block):
    x = torch.randn(4, 96)
    plan = planned(block, x)
    kept, _ = run(copy.deepcopy(block), x, plan=plan, inductor=True)
    torch.compiler.reset()
    y, compiled = run(block, x, plan=plan, release_weights=True, inductor=True)
    assert torch.equal(y, kept)
    assert all(m.weight.untyped_storage().nbytes() == 0 for m in (block.gate, block.up, block.down))
    assert all(row.released for row in explain(compiled).layers.values())
    before = packings()
    with torch.no_grad():
        assert compiled(torch.randn(7, 96)).shape == (7, 96), "another shape compiles still"
        assert packings() == before
        with pytest.raises(ReleasedWeightError, match="gate"):
            block(x)
        torch.compiler.reset()
        other = planned_again(block)
        with pytest.raises(ReleasedWeightError, match="gate"):
            run(block, x, plan=other)


def planned_again(block):
    return planned(Block().eval(), torch.randn(4, 96), recipe=Recipe(split=(1, 0, 0)))


class Tied(nn.Module):
    """A head with the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_a_weight_that_something_else_reads_is_not_released():
    model = Tied().eval()
    ids = torch.randint(0, 32, (2, 5))
    recipe = Recipe(format="mxfp8")
    y, compiled = run(model, ids, recipe=recipe, release_weights=True)
    assert not explain(compiled).layers["head"].released
    assert (y - model(ids)).norm() < 0.1 * model(ids).norm()


def test_a_tied_weight_that_another_graph_may_read_is_not_released():
    """A graph that is given embeddings never sees the module that shares the head's weight."""

    class GivenEmbeddings(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(64, 64)

        def forward(self, embedded):
            return self.head(self.other(embedded))

    model, ids = GivenEmbeddings().eval(), torch.randint(0, 32, (2, 5))
    with torch.no_grad():
        embedded = model.embedding(ids)
    recipe = Recipe(format="mxfp8", include_lm_head=True)
    _, compiled = run(model, embedded, recipe=recipe, release_weights=True)
    rows = explain(compiled).layers
    assert (rows["head"].released, rows["other"].released) == (False, True)
    assert torch.equal(model.embedding(ids), embedded)


def test_an_embedding_used_as_a_head_is_not_released():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 64)

        def forward(self, embedded):
            return torch.nn.functional.linear(embedded, self.embedding.weight)

    model, embedded = Head().eval(), torch.randn(2, 5, 64)
    recipe = Recipe(format="mxfp8", include_lm_head=True)
    _, compiled = run(model, embedded, recipe=recipe, release_weights=True)
    (row,) = explain(compiled).layers.values()
    assert (row.reason, row.released) == ("", False)
    assert model.embedding(torch.tensor([3])).isfinite().all()


@pytest.mark.parametrize("norm, reason", [(None, ""), (1.0, "writes to its weight")])
def test_an_embedding_that_scales_its_weight_writes_to_it(norm, reason):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 64))

        def forward(self, ids):
            embedded = torch.nn.functional.embedding(ids, self.weight, max_norm=norm)
            return torch.nn.functional.linear(embedded, self.weight)

    model, ids = Head().eval().requires_grad_(False), torch.randint(0, 32, (2, 5))
    _, compiled = run(model, ids, recipe=Recipe(format="mxfp8", include_lm_head=True))
    (row,) = explain(compiled).layers.values()
    assert reason in row.reason and bool(reason) == bool(row.reason)


def test_parts_of_one_flat_buffer_are_weights_of_their_own():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(2, 64, 64)
            self.register_buffer("first", flat[0])
            self.register_buffer("second", flat[1])

        def forward(self, x):
            self.first.clamp_(-1, 1)
            return x @ self.first + x @ self.second

    model, x = Flat().eval(), torch.randn(4, 64)
    _, compiled = run(model, x, recipe=Recipe(format="mxfp8"))
    found = reasons(compiled)
    assert "writes to its weight" in found["first"] and found["second"] == ""


def test_packed_weights_of_an_earlier_plan_go_with_its_graphs(block):
    x = torch.randn(4, 96)

    def buffers() -> int:
        gc.collect()
        placed = (o for o in gc.get_objects() if type(o) is PlacedWeight)
        return sum(weight.out_features == 77 for weight in placed)

    block.down = nn.Linear(64, 77)
    for recipe in (MIX, Recipe(format="mxfp4")):
        run(block, x, plan=planned(block, x, recipe=recipe))
        assert buffers() == 1  # that of the plan before is gone
        torch.compiler.reset()
    plan = planned(block, x)
    first, _ = run(block, x, plan=plan, release_weights=True)
    torch.compiler.reset()
    assert buffers() == 1  # the float weight is gone
    again, _ = run(block, x, plan=plan, release_weights=True)
    assert torch.equal(first, again)


def test_a_module_used_twice_is_packed_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    model = Twice().eval()
    x = torch.randn(4, 64)
    plan = planned(model, x)
    before = packings()
    _, compiled = run(model, x, plan=plan)
    assert explain(compiled).passes["lowered"] == 2
    assert packings() - before == 1


def test_a_graph_break_leaves_no_layer_behind(block):
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Breaks().eval()
    x = torch.randn(4, 96)
    plan = planned(model, x)
    assert len(plan) == 6
    assert all(name.startswith(("first.", "second.")) for name in plan)
    plan.attach(model)
    y, compiled = run(model, x, strict=True)
    explanation = explain(compiled)
    assert explanation.graphs == 2
    assert sorted(explanation.layers) == sorted(plan)
    reference = reference_model(model, plan)(x)
    assert (y - reference).norm() <= 0.1 * (reference - model(x)).norm()


class Broken(nn.Module):
    """What is called with a body's result is on Python's stack while the body breaks the graph."""

    def __init__(self, call=lambda self, x: self.classifier(self.body(x))) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(64, 64), nn.Linear(64, 64)
        self.call = call
        self.body.register_forward_hook(lambda *_: torch._dynamo.graph_break())

    def forward(self, x):
        return self.call(self, x)


def from_a_variable(self, x):
    head = self.classifier
    return head(self.body(x))


def weight_alone(self, x):
    return torch.nn.functional.linear(self.body(x), self.classifier.weight)


@pytest.mark.parametrize("call", [None, from_a_variable, weight_alone])
@pytest.mark.parametrize("given", ["skip", "recipe", "plan", "function"])
def test_a_layer_on_the_stack_at_a_graph_break_has_its_name(call, given):
    model, x = Broken(call) if call else Broken(), torch.randn(4, 64)
    recipe = Recipe(format="mxfp8", skip=["cl*"]) if given == "skip" else Recipe(format="mxfp8")
    plan = planned(model, x, recipe=Recipe(format="mxfp8", include_lm_head=True))
    options = {
        **QUICK,
        "strict": True,
        **({"plan": plan} if given == "plan" else {"recipe": recipe}),
    }
    compiled = torch.compile(
        model if given != "function" else lambda x: model(x), backend="micromix", options=options
    )
    with torch.no_grad():
        compiled(x)
    found = reasons(model)
    assert found["body"] == ""
    assert found["classifier"] == ("" if given == "plan" else "the recipe skips it")
    assert "weight" not in found


def test_equal_layers_on_the_stack_have_graphs_of_their_own():
    def step(self, head, x):
        return head(self.body(x))

    def call(self, x):
        for head in self.heads:
            x = step(self, head, x)
        return x

    for skipped in ("heads.0", "heads.1"):
        torch.compiler.reset()
        model = Broken(call)
        model.heads = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        recipe = Recipe(format="mxfp8", skip=[skipped])
        _, compiled = run(model, torch.randn(4, 64), recipe=recipe)
        assert {name for name, why in reasons(compiled).items() if "skips" in why} == {skipped}


def test_a_layer_on_the_stack_that_has_two_names_is_left_alone():
    model, x = Broken(), torch.randn(4, 64)
    model.again = nn.Sequential(model.classifier)
    recipe = Recipe(format="mxfp8", skip=["again.0"])
    _, compiled = run(model, x, recipe=recipe)
    assert any("a graph break hides its name" in why for why in reasons(compiled).values())
    torch.compiler.reset()
    with pytest.raises(StrictError, match="a graph break hides its name"):
        run(model, x, recipe=recipe, strict=True)
    torch.compiler.reset()
    planned(model, x, recipe=Recipe(format="mxfp8", include_lm_head=True)).attach(model)
    _, compiled = run(model, x, strict=True)
    assert not any(reasons(compiled).values())


@pytest.mark.parametrize("part", ["alone", "of a model"])
def test_a_layer_may_be_compiled_itself(part):
    model, x = Broken(), torch.randn(4, 64)
    layer = nn.Linear(64, 64) if part == "alone" else model.classifier
    plan = planned(layer, x)
    assert list(plan) == ["weight"]
    function = lambda x: layer(x)
    for what, options in (
        (layer, {"recipe": Recipe(format="mxfp8")}),
        (layer, {"plan": plan}),
        (function, {"plan": plan}),
    ):
        torch.compiler.reset()
        run(what, x, strict=True, **options)
        assert reasons(layer) == {"weight": ""}


def test_one_graph_serves_every_batch_size(block):
    plan = planned(block, torch.randn(4, 96))
    options = {**QUICK, "plan": plan}
    compiled = torch.compile(block, backend="micromix", options=options, dynamic=True)
    with torch.no_grad():
        whole = compiled(torch.randn(9, 96))
        x = torch.randn(5, 96)
        assert torch.equal(compiled(x)[:2], compiled(x[:2].clone()))
    assert whole.shape == (9, 96)
    assert explain(compiled).graphs == 1


def test_explain_says_when_nothing_was_compiled(block):
    compiled = torch.compile(block, backend="micromix", options=QUICK)
    assert "Nothing was compiled" in str(explain(compiled))
    x = torch.randn(4, 96)
    _, compiled = run(block, x, plan=planned(block, x))
    text = str(explain(compiled))
    assert "3 of 3 linear layers lowered, in 1 graph(s)" in text
    facts = explain(compiled).to_dict()
    assert facts["layers"]["gate"]["K"] == 96
    assert facts["layers"]["gate"]["bytes_after"] < facts["layers"]["gate"]["bytes_before"] / 3
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        explain(3)


def test_explain_forgets_what_a_reset_threw_away(block):
    x = torch.randn(4, 96)
    _, compiled = run(block, x, plan=planned(block, x))
    assert explain(compiled).graphs == 1
    torch.compiler.reset()
    assert explain(block).graphs == 0


def test_packed_weights_go_with_their_model():
    model = nn.Sequential(nn.Linear(64, 79)).eval()  # torch's code: Dynamo keeps graphs of it
    run(model, torch.randn(4, 64), recipe=Recipe(format="mxfp8"))
    del model
    gc.collect()
    assert not any(type(o) is PlacedWeight and o.out_features == 79 for o in gc.get_objects())


def test_graphs_that_are_gone_are_not_explained(block):
    x = torch.randn(4, 96)
    gc.disable()
    try:
        run(block, x)
        reports = sys.modules["micromix_compile.explain"]._reports[block.up.weight]
        ring = [*reports]  # Dynamo leaves rings, and collects young ones only
        ring.append(ring)
        gc.collect()
        del ring, reports
        torch.compiler.reset()
        assert explain(run(block, x)[1]).graphs == 1
    finally:
        gc.enable()


def test_a_plan_attached_later_is_followed(block):
    x = torch.randn(4, 96)
    planned(block, x).attach(block)
    first, compiled = run(block, x)
    other = planned(block, x, recipe=Recipe(split=(1, 0, 0))).attach(block)
    with torch.no_grad():
        second = compiled(x)
        assert explain(compiled).graphs == 2
        assert torch.equal(second, run(block, x, plan=other)[0])
        assert not torch.equal(first, second)
        planned(Block().eval(), x).attach(Block())
        assert torch.equal(second, compiled(x)), "another model's plan is no concern of this one"


def test_a_plan_of_the_same_structure_needs_no_other_graph(block):
    x = torch.randn(4, 96)
    planned(block, x).attach(block)
    first, compiled = run(block, x)
    other = planned(block, x * torch.rand(96) * 9).attach(block)
    with torch.no_grad():
        second = compiled(x)
    assert explain(compiled).graphs == 1
    assert torch.equal(second, run(block, x, plan=other)[0])
    assert not torch.equal(first, second)


def test_an_attachment_is_no_concern_of_a_plan_or_a_recipe_given_as_an_option(block):
    x = torch.randn(4, 96)
    plan = planned(block, x)
    first, with_plan = run(block, x, plan=plan)
    second, with_recipe = run(block, x, recipe=Recipe(format="mxfp4"))
    planned(block, x, recipe=Recipe(split=(0, 1, 0))).attach(block)
    with torch.no_grad():
        assert torch.equal(with_plan(x), first)
        assert torch.equal(with_recipe(x), second)
    assert not torch.equal(first, second)


def test_where_addresses_are_fixed_another_plan_is_another_graph(block, monkeypatch):
    monkeypatch.setattr(Options, "uses_cuda_graphs", True)
    x = torch.randn(4, 96)
    planned(block, x).attach(block)
    first, compiled = run(block, x)
    other = planned(block, x * torch.rand(96) * 9).attach(block)
    with torch.no_grad():
        second = compiled(x)
    assert explain(compiled).graphs == 2
    assert torch.equal(second, run(block, x, plan=other)[0]) and not torch.equal(first, second)


@pytest.mark.filterwarnings("error::micromix_compile.errors.NoPlanWarning")
def test_a_plan_attached_after_a_compilation_without_one_is_followed(block):
    x = torch.randn(4, 96)
    with pytest.warns(NoPlanWarning):
        _, compiled = run(block, x)
    plan = planned(block, x).attach(block)
    with torch.no_grad():
        assert torch.equal(compiled(x), run(block, x, plan=plan)[0])


class Stack(nn.Module):
    """Equal blocks, more of them than Dynamo would compile one code object for; a graph break after each."""

    DEPTH = 12

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(bias=bias) for _ in range(self.DEPTH))

    def forward(self, x):
        for layer in self.layers:
            x = x + 3 * layer(x)
            torch._dynamo.graph_break()
        return x


@pytest.fixture
def stack():
    return Stack().eval()


def assert_like_reference(y, model, plan, x):
    reference = reference_model(model, plan)(x)
    assert (y - reference).norm() <= 0.1 * (reference - model(x)).norm()


def test_equal_parts_compiled_one_by_one_share_one_graph_with_their_own_weights(stack):
    x = torch.randn(4, 96)
    plan = planned(stack, x).attach(stack)
    eager = copy.deepcopy(stack)
    before = packings()
    for layer in stack.layers:
        layer.compile(backend="micromix", options={**QUICK, "strict": True})
    with torch.no_grad():
        y = stack(x)
        assert torch.equal(y, stack(x))
    explanation = explain(stack)
    assert explanation.graphs == 1
    assert packings() - before == len(plan)
    assert sorted(explanation.layers) == sorted(plan)
    assert explanation.layers["layers.7.gate"].merged_with == ["layers.7.up"]
    folded = explanation.layers["layers.7.down"].folded_into
    assert sorted(folded) == ["layers.7.gate", "layers.7.up"]
    assert_like_reference(y, eager, plan, x)


def test_decoder_layers_of_a_hugging_face_model_share_one_graph():
    model, ids = build("llama"), token_ids(2, 12)
    planned(model, ids).attach(model)
    with torch.no_grad():
        whole = torch.compile(model, backend="micromix", options=QUICK)(ids, use_cache=False).logits
        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(backend="micromix", options={**QUICK, "strict": True})
        parts = model(ids, use_cache=False).logits
    assert len(model.model.layers) > 1 and explain(model).graphs == 1
    assert torch.equal(whole, parts)


def test_parts_between_graph_breaks_share_one_graph_with_their_own_weights(stack):
    """After a graph break Dynamo compiles the layer's frame, and runs it for every equal layer."""
    x = torch.randn(4, 96)
    plan = planned(stack, x).attach(stack)
    y, compiled = run(stack, x, strict=True)
    assert sorted(explain(compiled).layers) == sorted(plan)
    assert_like_reference(y, stack, plan, x)


def test_equal_parts_without_a_plan_share_one_graph(stack):
    x = torch.randn(4, 96)
    recipe = Recipe(format="mxfp4")
    eager = copy.deepcopy(stack)
    for layer in stack.layers:
        layer.compile(backend="micromix", options={**QUICK, "recipe": recipe})
    with torch.no_grad():
        y = stack(x)
    plan = planned(eager, x, recipe=recipe)
    assert explain(stack).graphs == 1 and sorted(explain(stack).layers) == sorted(plan)
    assert explain(stack).layers["layers.3.gate"].merged_with == ["layers.3.up"]
    json.dumps(explain(stack).to_dict())
    pickle.dumps(explain(stack))
    assert_like_reference(y, eager, plan, x)


def test_parts_of_other_structure_have_graphs_of_their_own(stack):
    x = torch.randn(4, 96)
    first = {f"layers.{i}.down": (32, 0, 32) for i in range(3)}
    recipe = Recipe(counts=first | {"*.down": (64, 0, 0), "*": (64, 32, 0)})
    plan = planned(stack, x, recipe=recipe).attach(stack)
    eager = copy.deepcopy(stack)
    for layer in stack.layers:
        layer.compile(backend="micromix", options=QUICK)
    with torch.no_grad():
        y = stack(x)
    assert explain(stack).graphs == 2
    assert_like_reference(y, eager, plan, x)


def test_a_weight_changed_in_one_of_the_equal_parts_is_packed_again(stack):
    x = torch.randn(4, 96)
    plan = planned(stack, x).attach(stack)
    eager = copy.deepcopy(stack)
    for layer in stack.layers:
        layer.compile(backend="micromix", options=QUICK)
    with torch.no_grad():
        first = stack(x)
        before = packings()
        for model in (stack, eager):
            model.layers[5].gate.weight.mul_(2)
            model.layers[5].gate.bias.add_(1)
        y = stack(x)
    assert packings() - before == 1
    assert not torch.equal(first, y)
    assert_like_reference(y, eager, plan, x)


def test_a_call_of_another_part_meanwhile_leaves_the_weights_alone(stack, monkeypatch):
    """One graph serves all layers, also those that other threads run: here another layer's call comes in between."""
    x = torch.randn(4, 96)
    planned(stack, x).attach(stack)
    first, second = stack.layers[:2]
    for layer in (first, second):
        layer.compile(backend="micromix", options=QUICK)
    with torch.no_grad():
        expected = first(x), second(x)
        assert not torch.equal(*expected)
        refresh, between = regions.Placed.refresh, [second]

        def interrupted(placed, parameters):
            if between:
                assert torch.equal(between.pop()(x), expected[1])
            refresh(placed, parameters)

        monkeypatch.setattr(regions.Placed, "refresh", interrupted)
        assert torch.equal(first(x), expected[0]) and not between


def test_release_weights_frees_those_of_every_equal_part(stack):
    x = torch.randn(4, 96)
    planned(stack, x).attach(stack)
    for layer in stack.layers:
        layer.compile(backend="micromix", options={**QUICK, "release_weights": True})
    with torch.no_grad():
        assert torch.equal(stack(x), stack(x))
    assert all(layer.up.weight.untyped_storage().nbytes() == 0 for layer in stack.layers)
    assert all(row.released for row in explain(stack).layers.values())


def test_weights_of_equal_parts_that_share_storage_are_not_released(stack):
    """Also where the graph was compiled for a part whose own was released."""
    x = torch.randn(4, 96)
    planned(stack, x).attach(stack)
    others = stack.layers[1:]
    one = torch.cat([layer.up.weight.data for layer in others])
    for layer, part in zip(others, one.chunk(len(others)), strict=True):
        layer.up.weight.data = part
    for layer in stack.layers:
        layer.compile(backend="micromix", options={**QUICK, "release_weights": True})
    with torch.no_grad():
        stack(x)
    assert one.untyped_storage().nbytes() == one.nbytes
    kept = {id(layer.up.weight) for layer in others}
    names = {
        name for name, module in stack.named_modules() if id(getattr(module, "weight", 0)) in kept
    }
    assert {name for name, row in explain(stack).layers.items() if not row.released} == names


def test_a_part_whose_names_are_not_unique_is_said_to_be_so(block):
    model = nn.ModuleDict({"encoder": block, "decoder": Block().eval()})
    model.forward = lambda x: model["decoder"](model["encoder"](x))
    x = torch.randn(4, 96)
    plan = planned(model, x)
    with pytest.raises(
        PlanMismatchError, match=r"gate: 2 layers of the plan end in gate; plan\.attach"
    ):
        run(block, x, plan=plan, strict=True)
    plan.attach(model)
    _, compiled = run(block, x, strict=True)
    assert sorted(reasons(compiled)) == ["encoder.down", "encoder.gate", "encoder.up"]


class Inner(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.fc, self.breaks = nn.Linear(64, 64), breaks

    def forward(self, x):
        if self.breaks:
            torch._dynamo.graph_break()
        return self.fc(x)


class SameEnds(nn.Module):
    """Layers whose names end alike: `fc` of two blocks, and one of the model itself."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.b0, self.b1, self.fc = Inner(breaks), Inner(breaks), nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(self.b1(self.b0(x)))


SPLITS = {"b0.fc": (64, 0, 0), "b1.fc": (0, 64, 0), "fc": (0, 0, 64)}


@pytest.mark.parametrize("breaks", [False, True])
def test_layers_whose_names_end_alike_have_their_own_plans(breaks):
    model, x = SameEnds(breaks), torch.randn(4, 64)
    plan = planned(model, x, recipe=Recipe(counts=SPLITS))
    for whole in (model, lambda x: model(x)):
        torch.compiler.reset()
        compiled = torch.compile(
            whole, backend="micromix", options={**QUICK, "plan": plan, "strict": True}
        )
        with torch.no_grad():
            compiled(x)
        rows = explain(model).layers
        assert {n: (row.k4, row.k6, row.k8) for n, row in rows.items()} == SPLITS


def test_a_layer_of_a_part_is_none_of_the_model_with_its_name():
    model, x = SameEnds(False), torch.randn(4, 64)
    plan = planned(model, x, recipe=Recipe(counts=SPLITS))
    with pytest.raises(
        PlanMismatchError, match=r"fc: 3 layers of the plan end in fc; plan\.attach"
    ):
        run(model.b0, x, plan=plan, strict=True)


def test_a_weight_packed_under_inference_mode_is_packed_again_outside_of_it(block):
    x = torch.randn(4, 96)
    compiled = torch.compile(
        block, backend="micromix", options={**QUICK, "plan": planned(block, x)}
    )
    with torch.inference_mode():
        first = compiled(x).clone()
    with torch.no_grad():
        block.gate.weight.mul_(2)
        assert not torch.equal(compiled(x), first)


@torch.library.custom_op("micromix_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "after, options, checked",
    [
        (torch.relu, {}, False),
        (twice, {}, True),
        (torch.relu, {"size_asserts": True}, True),
        (twice, {"size_asserts": False}, False),
    ],
)
def test_sizes_are_checked_where_there_are_operators_of_others(after, options, checked):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def forward(self, x):
            return after(self.layer(x))

    model = Model().eval()
    options = {"recipe": Recipe(format="mxfp8"), **options}
    compiled = torch.compile(model, backend="micromix", options=options)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(compiled, torch.randn(2, 64))
    lines = [line for line in "".join(code).splitlines() if "assert_size_stride(" in line]
    assert bool(lines) == checked


def test_inductors_settings_may_be_spelled_with_dashes(block):
    x = torch.randn(4, 96)
    plan = planned(block, x)
    given = {"plan": plan, "inductor": True, "epilogue-fusion": False}
    y, _ = run(copy.deepcopy(block), x, **given)
    assert torch.equal(y, run(block, x, plan=plan, inductor=True)[0])
