"""Layers that are not lowered are named, and what a graph or the user changes behind the backend's back is seen."""

from __future__ import annotations

import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from micromix_compile import Recipe, calibrate, explain
from micromix_compile.errors import GradientError, NoPlanWarning, StrictError
from micromix_compile.planned import quantised

QUICK = {"inductor": False}


class Model(nn.Module):
    """Weights of every kind; `f` is its forward."""

    def __init__(self, f) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.matrix = nn.Parameter(torch.randn(64, 64))
        self.experts = nn.Parameter(torch.randn(3, 64, 64))
        self.register_buffer("filters", torch.randn(64, 64))
        self.f = f

    def forward(self, x):
        return self.f(self, x)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 64)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoPlanWarning)
        yield


def compiled(model, **options):
    return torch.compile(model, backend="micromix", options={**QUICK, **options})


def assert_close(found, expected):
    """As MXFP8 is; 0.03 to 0.04, where the operands are normal."""
    assert (found - expected).norm() <= 0.1 * expected.norm()


def rows(model) -> dict[str, str]:
    """The reasons of the layers that ran."""
    layers = explain(model).layers.items()
    return {name: row.reason for name, row in layers if not row.reason.startswith("no compiled")}


def assert_strict_refuses(model, x, match):
    torch.compiler.reset()
    with pytest.raises(StrictError, match=match):
        compiled(model, strict=True)(x)


OTHER_PRODUCTS = {
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.matrix),
    "bmm": lambda m, x: torch.bmm(x.expand(3, 4, 64), m.experts),
    "baddbmm": lambda m, x: torch.baddbmm(x.expand(3, 4, 64), x.expand(3, 4, 64), m.experts),
    "matmul": lambda m, x: x @ m.experts,
    "mv": lambda m, x: torch.mv(m.matrix, x[0]),
    "inner": lambda m, x: torch.inner(x, m.matrix),
    "tensordot": lambda m, x: torch.tensordot(x, m.matrix, 1),
    "bilinear": lambda m, x: F.bilinear(x, x, m.experts),
    "linalg_matmul": lambda m, x: torch.linalg.matmul(x, m.experts),
    "linalg_vecdot": lambda m, x: torch.linalg.vecdot(x[:, None], m.matrix),
    "_sparse_mm": lambda m, x: torch.sparse.mm(x, m.matrix),
    "imatmul": lambda m, x: operator.imatmul(x, m.matrix),
    "addmm": lambda m, x: torch.addmm(x.sum(), m.matrix, x.t()),
    "addmm_": lambda m, x: x.clone().addmm_(x, m.matrix),
    "addbmm_": lambda m, x: x.clone().addbmm_(x.expand(3, 4, 64), m.experts),
}


OF_EXPERTS = {"bmm", "baddbmm", "addbmm_", "matmul", "bilinear", "linalg_matmul"}


@pytest.mark.parametrize("form", OTHER_PRODUCTS)
def test_a_product_of_another_form_is_named_and_strict_refuses_it(x, form):
    model = Model(OTHER_PRODUCTS[form])
    with torch.no_grad():
        run = compiled(model)
        assert torch.equal(run(x), model(x))
        weight = "experts" if form in OF_EXPERTS else "matrix"
        assert rows(run) == {weight: f"products by {form} of such operands are not lowered"}
        assert_strict_refuses(model, x, weight)


def test_experts_in_one_weight_are_named():
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        run = compiled(model)
        run(input_ids=torch.arange(8)[None], use_cache=False)
    experts = {name: why for name, why in rows(run).items() if "experts" in name}
    assert len(experts) == 2 and all("grouped_mm" in why for why in experts.values())


def test_scores_of_projected_queries_are_no_layers(x):
    """Of learned queries and relative positions: what linear layers give, or what is looked up."""

    def forward(m, x):
        keys = m.a(x)
        scores = m.b(m.matrix) @ keys.t()
        places = m.matrix[torch.arange(4)]
        scores = scores + torch.einsum("qc,kc->qk", m.matrix, keys).detach() * 0
        biased = torch.baddbmm(
            m.experts[:, :4, :4], keys.expand(3, 4, 64), keys.t().expand(3, 64, 4)
        )
        return scores.sum() + torch.einsum("qc,kc->qk", keys, places).sum() + biased.sum()

    model = Model(forward)
    with torch.no_grad():
        run = compiled(model)
        run(x)
    assert {name: bool(why) for name, why in rows(run).items()} == {
        "a": False,
        "b": False,
        "matrix": True,
    }


def test_a_weight_in_two_forms_is_two_rows(x):
    model = Model(lambda m, x: m.a(x) + torch.einsum("bi,io->bo", x, m.a.weight))
    plan = calibrate(model).run([x]).plan(Recipe(format="mxfp8"))
    for attach in (False, True):
        torch.compiler.reset()
        if attach:
            plan.attach(model)
        with torch.no_grad():
            run = compiled(model)
            run(x)
        assert rows(run)["a"] == "" and "einsum" in rows(run)["a.einsum"]


@pytest.mark.parametrize("skip", ["*experts", "experts"])
def test_an_attached_plan_skips_what_has_no_weight_of_its_own(x, skip):
    model = Model(lambda m, x: m.a(x) + torch.bmm(x.expand(3, 4, 64), m.experts))
    plan = calibrate(model).run([x]).plan(Recipe(format="mxfp8", skip=[skip]))
    plan.attach(model)
    with torch.no_grad():
        run = compiled(model, strict=True)
        run(x)
    assert "bmm" in rows(run)["experts"]


def test_equal_parts_name_what_they_leave_alone(x):
    parts = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)))
    calibrate(parts).run([x]).plan(Recipe(format="mxfp8", skip=["*.1"])).attach(parts)
    for part in parts:
        part.compile(backend="micromix", options=QUICK)
    with torch.no_grad():
        parts(x)
    layers = explain(parts).layers
    assert not any(row.reason.startswith("no compiled") for row in layers.values())


def test_a_parametrized_layer_is_one_row(x):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        run = compiled(model)
        run(x)
        assert list(rows(run)) == ["0", "1"]
        recipe = Recipe(format="mxfp8", skip=["0"])
        torch.compiler.reset()
        run = compiled(model, strict=True, recipe=recipe)
        run(x)
    assert list(rows(run)) == list(explain(run).layers) == ["0", "1"]


def test_a_weight_on_the_left_is_named(x):
    model = Model(lambda m, x: m.matrix @ x.t())
    with torch.no_grad():
        run = compiled(model)
        run(x)
    assert list(rows(run)) == ["matrix"]


def test_products_of_activations_and_buffers_are_no_layers(x):
    model = Model(lambda m, x: torch.einsum("bi,oi->bo", x, m.filters) @ x.t() @ m.a(x))
    with torch.no_grad():
        run = compiled(model, strict=True)
        run(x)
    assert rows(run) == {"a": ""}


@pytest.mark.parametrize(
    "update",
    [
        lambda m: m.matrix @ m.b.weight,
        lambda m: torch.addmm(m.b.bias, m.matrix.t() * m.b.bias, m.b.weight),
        lambda m: torch.einsum("oi,ij->oj", m.matrix * m.b.weight, m.b.weight),
        lambda m: m.filters.mul(2) @ m.b.weight,
    ],
)
def test_products_of_constants_are_no_layers(x, update):
    """As LoRA's update of a weight is."""
    model = Model(lambda m, x: F.linear(x, m.a.weight + update(m)))
    with torch.no_grad():
        run = compiled(model, recipe=Recipe(format="mxfp8"))
        assert torch.equal(run(x), model(x))
    (reason,) = rows(run).values()
    assert "computed in the graph" in reason


def test_slices_of_a_weight_have_names_of_their_own(x):
    model = Model(lambda m, x: F.linear(x, m.experts[0]) + F.linear(x, m.experts[1]))
    with torch.no_grad():
        run = compiled(model)
        run(x)
    assert len(rows(run)) == 2 and all("computed in the graph" in why for why in rows(run).values())


@pytest.mark.parametrize("write", ["mm", "addmm", "matmul"])
def test_a_product_that_writes_its_result_somewhere_is_left_alone(x, write):
    def forward(m, x):
        out, weight = x.new_zeros(4, 64), m.a.weight.t()
        operands = (m.a.bias, x, weight) if write == "addmm" else (x, weight)
        getattr(torch, write)(*operands, out=out)
        return out + 1

    model = Model(forward)
    with torch.no_grad():
        run = compiled(model)
        assert torch.equal(run(x), model(x))
    assert rows(run) == {"a": "it writes its result into out="}


@pytest.mark.parametrize("size", [1, 64])
def test_a_bias_of_another_shape_is_left_alone(x, size):
    model = Model(lambda m, x: F.linear(x, m.a.weight, m.a.bias[:size].view(1, size)))
    with torch.no_grad():
        run = compiled(model)
        assert torch.equal(run(x), model(x))
    assert "its bias has the shape" in rows(run)["a"]


def test_a_tensor_that_wraps_others_is_left_to_its_own_operators(x):
    def forward(m, x):
        y, scale = F.relu(m.a(x)), torch.sigmoid(x)  # which all of them read
        for _ in range(4):
            y = m.b(y) * scale
        heads = y.view(1, 4, 4, 16).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)

    model, given = Model(forward), TwoTensor(x, x * 2)
    for inductor in (False, True):
        torch.compiler.reset()
        with torch.no_grad():
            run = compiled(model, recipe=Recipe(format="mxfp8"), inductor=inductor)
            found, expected = run(given), model(given)
        torch.testing.assert_close(found.b, expected.b)
        assert explain(run).passes == {}
        assert set(rows(run).values()) == {"its input is a TwoTensor, not a plain tensor"}
    with torch.no_grad():
        assert_strict_refuses(model, given, "TwoTensor")


def test_a_bias_that_the_graph_writes_to_is_read_in_its_place(x):
    def forward(m, x):
        before = m.a(x)
        m.a.bias.add_(10.0)
        return torch.cat((before, F.linear(x, m.b.weight, m.a.bias)), 1)

    model, other = Model(forward), Model(forward)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_close(compiled(model)(x), other(x))


INSIDE = {
    "checkpoint": lambda m, x: torch.utils.checkpoint.checkpoint(
        lambda y: m.b(F.relu(m.a(y))), x, use_reentrant=False
    ),
    "cond": lambda m, x: torch.cond(x.sum() > 0, lambda y: m.a(y), lambda y: m.b(y), (x,)),
}


@pytest.mark.parametrize("operator", INSIDE)
def test_layers_in_a_graph_inside_the_graph_are_named(x, operator):
    model = Model(INSIDE[operator])
    with torch.no_grad():
        run = compiled(model)
        assert torch.equal(run(x), model(x))
        assert rows(run).keys() == {"a", "b"}
        assert all("which runs a graph of its own" in why for why in rows(run).values())
        assert_strict_refuses(model, x, "graph of its own")


def test_a_layer_that_no_graph_has_is_named(x):
    model = Model(lambda m, x: torch.compiler.disable(m.b)(m.a(x)))
    with torch.no_grad():
        run = compiled(model)
        run(x)
    layers = explain(run).layers
    assert layers["a"].reason == "" and "no compiled graph names it" in layers["b"].reason
    assert layers["b"].bytes_before == 4 * 64 * 64


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"my-adapter": nn.Linear(64, 64)})
        self.q, self.q_a = nn.Module(), nn.Module()
        self.q.a_b, self.q_a.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.adapters["my-adapter"](x) + self.q.a_b(x) + self.q_a.b(x)


def test_names_need_be_no_identifiers_and_may_collide(x):
    model = Named()
    with torch.no_grad():
        run = compiled(model, strict=True)
        assert_close(run(x), model(x))
    assert set(rows(run)) == {"adapters.my-adapter", "q.a_b", "q_a.b"}


def test_a_functional_call_with_other_parameters(x):
    model = nn.Sequential(nn.Linear(64, 64))
    given = {name: nn.Parameter(p.detach() * 2) for name, p in model.named_parameters()}
    call = lambda x: torch.func.functional_call(model, given, (x,))
    with torch.no_grad():
        assert_close(torch.compile(call, backend="micromix", options=QUICK)(x), call(x))


def test_a_plan_with_a_buffer_for_a_weight_can_be_attached(x):
    model = Model(lambda m, x: m.a(x @ m.filters))
    plan = calibrate(model).run([x]).plan(Recipe(format="mxfp8")).attach(model)
    assert set(plan) == {"filters", "a"}
    with torch.no_grad():
        run = compiled(model, strict=True)
        assert_close(run(x), model(x))


@pytest.mark.parametrize("call", ["packet", "method"])
def test_writes_are_seen_however_they_are_called(x, call):
    def forward(m, x):
        x = x + 0
        before = m.a(x)
        if call == "packet":
            torch.ops.micromix_tests.scale(x, 5.0)
        else:
            x.__imul__(5.0)
        return torch.cat((before, m.b(x)), 1)

    model = Model(forward)
    with torch.no_grad():
        assert_close(compiled(model)(x), model(x))


@torch.library.custom_op("micromix_tests::scale", mutates_args=("x",))
def _scale(x: torch.Tensor, factor: float) -> None:
    x.mul_(factor)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_an_optimizer_are_seen(x, fused):
    model = Model(lambda m, x: m.b(F.relu(m.a(x))))
    run = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            assert_close(run(x), model(x))
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()


class Adapted(nn.Module):
    """As adapters are: merged through `.data`, which only the flag tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64)
        self.down = nn.Parameter(torch.randn(8, 64))
        self.up = nn.Parameter(torch.randn(64, 8))
        self.merged = False

    def forward(self, x):
        y = self.base(x)
        return y if self.merged else y + x @ self.down.t() @ self.up.t()


def test_a_merged_adapter_is_seen_by_the_compilation_that_follows(x):
    model = Adapted()
    run = compiled(model)
    with torch.no_grad():
        assert_close(run(x), model(x))
        model.base.weight.data += model.up @ model.down
        model.merged = True
        assert_close(run(x), model(x))


def test_a_weight_that_lost_rows_is_another_weight(x):
    model = nn.Linear(64, 64, bias=False)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        model.weight.data = model.weight.data[:32].clone()
        assert_close(run(x), model(x))


def test_torch_func_cannot_differentiate_a_layer(x):
    model = nn.Linear(64, 64).requires_grad_(False)
    gradient = torch.func.grad(lambda x: model(x).pow(2).sum())
    with pytest.raises(GradientError, match=r"torch\.func differentiates it"):
        torch.compile(gradient, backend="micromix", options=QUICK)(x)


def test_forward_mode_is_refused_where_tensors_have_tangents(x):
    model = Model(lambda m, x: m.a(x)).requires_grad_(False)
    run, numbers = compiled(model), torch.arange(4)
    expected = run(x)
    of_numbers = compiled(Model(lambda m, i: m.a(m.matrix[i])).requires_grad_(False))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (run, compiled(Model(lambda m, x: m.b(x)).requires_grad_(False))):
            with pytest.raises(GradientError, match="has a forward-mode tangent"):
                call(dual)
        assert torch.equal(run(x), expected)
        assert torch.equal(run(forward_ad.unpack_dual(dual).primal), expected)
        with torch.inference_mode():
            assert torch.equal(run(dual), expected)
        of_numbers(numbers)
        plain = compiled(Model(lambda m, x: x * 2))  # without a layer
        plain(dual)
    model.a.bias = None
    with forward_ad.dual_level():
        weight = model.a.weight
        del model.a.weight
        model.a.weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(GradientError):
            run(x)


def test_forward_mode_inside_of_a_graph_is_refused(x):
    model = nn.Linear(64, 64).requires_grad_(False)

    def derivative(x):
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(x, torch.ones_like(x)))
            return forward_ad.unpack_dual(y).tangent

    with pytest.raises(GradientError, match="forward_ad or torch.func differentiates it"):
        torch.compile(derivative, backend="micromix", options=QUICK)(x)


@pytest.mark.parametrize("activations", ["match", "bfloat16"])
def test_quantised_layers_refuse_forward_mode(x, activations):
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    plan = Recipe(format="mxfp8", activations=activations)
    with quantised(model, plan):
        expected = model(x)
        for derivative in (
            lambda: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
            lambda: torch.func.jacfwd(model)(x),
        ):
            with pytest.raises(GradientError, match="has a forward-mode tangent"):
                derivative()
        with forward_ad.dual_level():
            assert torch.equal(model(x), expected)
            assert torch.equal(compiled(model)(x), expected)
            with pytest.raises(GradientError, match="has a forward-mode tangent"):
                compiled(model)(forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.equal(torch.vmap(model)(x), expected)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_torch_func_may_differentiate_something_else(x):
    model = Model(lambda m, x: m.a(x + torch.func.grad(lambda t: (t**3).sum())(x)))
    with torch.no_grad():
        assert_close(compiled(model, strict=True)(x), model(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_views_of_parameters_are_no_gradients(x, mode):
    """They say that they require them even where gradients are disabled."""

    def forward(m, x):
        y, flat = m.a(x), m.matrix.view(-1)
        torch._dynamo.graph_break()
        return m.b(y) + flat.sum(), m.matrix.t()

    model = Model(forward)
    with mode():
        found, view = compiled(model, strict=True)(x)
        assert_close(found, model(x)[0])
    assert view.shape == (64, 64)


def test_gradients_enabled_in_the_graph_are_seen(x):
    def forward(m, x):
        with torch.enable_grad():
            return m.a(x)

    with torch.no_grad(), pytest.raises(GradientError, match="parameter .*a.weight requires them"):
        compiled(Model(forward))(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_disabled_in_the_graph_are_seen(x, mode):
    def forward(m, x):
        with mode():
            return m.a(x)

    model = Model(forward)
    assert_close(compiled(model)(x), model(x))


def test_a_gradient_of_what_follows_a_layer_is_refused(x):
    def forward(m, x):
        with torch.no_grad():
            y = m.a(x)
        return y * m.matrix[0]

    with pytest.raises(GradientError, match="a result requires them"):
        compiled(Model(forward))(x)


def test_a_dropout_of_nothing_is_no_training(x):
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.0)).train()
    with torch.no_grad():
        assert_close(compiled(model)(x), model(x))
        model[1] = nn.Dropout1d(0.5)
        torch.compiler.reset()
        with pytest.raises(GradientError, match="dropout"):
            compiled(model)(x)


def test_a_nested_input_is_left_alone(x):
    model = nn.Linear(64, 64)
    nested = torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged)
    with torch.no_grad():
        run = compiled(model)
        assert torch.equal(run(nested).values(), model(nested).values())
    assert [row.reason for row in explain(run).layers.values()] == ["its input is a nested tensor"]


def test_a_view_that_is_returned_stays_a_view(x):
    def forward(m, x):
        view = m.filters[:, :]
        return m.a(x) + view[0] * 3 + (view + 1)[0] + (view * 2)[1] + view.sum(), view

    model = Model(forward)
    with torch.no_grad():
        _, view = torch.compile(model, backend="micromix")(x)
        view.fill_(7)
    assert (model.filters == 7).all()
