"""micromix::weight_only_linear on a GPU against the float64 product of the rounded activations and the weight."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate, ops
from micromix_compile.errors import OptionError, ReferenceKernelWarning
from micromix_compile.explain import explain
from micromix_compile.mx import WEIGHT_ONLY, MixedLayout
from micromix_compile.reference import reference_model

from .cases import DTYPES, MIXES, VIEWS, arguments, mix_name, relative_error, rows
from .float_operands import BARS, FloatOperands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Up to 16 rows have a kernel of their own; more have tiles of 32, 64, 128 and 256 on Hopper.
ROWS = (1, 3, 8, 9, 16, 17, 40, 100, 300)


class Operands(FloatOperands):
    device = "cuda"


@pytest.fixture(autouse=True)
def decodes():
    """Nothing here is to run on the reference."""
    assert ops.kernel_name("cuda", WEIGHT_ONLY) == "cuda_decoded", "make cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceKernelWarning)
        yield


@pytest.mark.parametrize("weights", ["match", "mxfp4"])
@pytest.mark.parametrize("layout", MIXES, ids=mix_name)
@pytest.mark.parametrize("m", ROWS)
def test_mixes(m, layout, weights):
    Operands(m, 40, layout, weights).check()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("m", [1, 12, 40])
def test_every_column_tail(m, n):
    Operands(m, n, MixedLayout(64, 64, 32)).check()
    Operands(m, n, MixedLayout(64, 64, 32)).check(torch.bfloat16)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 33])
def test_dtypes_and_bias(m, dtype, x_dtype):
    bias = rows(1, 50, dtype, seed=9)[0]
    Operands(m, 50, MixedLayout(96, 32, 64), dtype=x_dtype).check(dtype, bias)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hadamard", [(), (4,), (4, 6), (6, 8), (4, 6, 8)], ids=str)
@pytest.mark.parametrize("k", [170, 176, 192])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_order_padding_and_rotation(m, k, hadamard, x_dtype):
    layout = MixedLayout(96, 64, 32, hadamard=hadamard)
    Operands(m, 33, layout, dtype=x_dtype, k=k).check()
    Operands(m, 33, layout, dtype=x_dtype, k=k).reordered().check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [14336, 28672])
@pytest.mark.parametrize("m", [4, 64])
def test_long_rows(m, k, dtype):
    """A row of many is gathered from shared memory where it fits there."""
    layout = MixedLayout(k - 2048, 1024, 1024, hadamard=(4,))
    Operands(m, 32, layout, dtype=dtype).reordered().check()


@pytest.mark.parametrize("m", [1, 40])
def test_rounds_once(m):
    operands = Operands(m, 64, MixedLayout(256, 128, 64))
    assert torch.equal(operands.run(torch.bfloat16), operands.run().to(torch.bfloat16))
    assert torch.equal(operands.run(torch.float16), operands.run().to(torch.float16))


@pytest.mark.parametrize("m", [1, 4, 40])
@pytest.mark.parametrize(
    ("exponent", "weight_byte"), [(-110, 200), (100, 60), (-60, 127), (60, 127), (0, 200), (80, 0)]
)
def test_ends_of_the_range(m, exponent, weight_byte):
    operands = Operands(m, 24, MixedLayout(64, 32, 32))
    operands.x = (operands.x.float() * 2.0**exponent).bfloat16()
    operands.scales.fill_(weight_byte)
    operands.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [MixedLayout(64, 32, 32), MixedLayout(32, 96, 0, "e3m2")])
@pytest.mark.parametrize("m", [1, 40])
def test_nan_and_inf_are_nan_in_their_row_only(m, layout, value):
    operands = Operands(m, 24, layout)
    operands.scales[5, 3] = 0xFF
    for channel in (3, 70, 127):
        operands.x[m // 2, channel] = value
        actual, expected = operands.run(), operands.expected()
        assert torch.equal(actual.isnan(), expected.isnan())
        assert actual[m // 2].isnan().all() and actual[:, 5].isnan().all()
        assert m == 1 or relative_error(actual[0, :5], expected[0, :5]) <= BARS[torch.float32]


@pytest.mark.parametrize("m", [2, 40])
def test_a_channel_that_cannot_be_is_nan(m):
    operands = Operands(m, 16, MixedLayout(64, 32, 32)).reordered()
    operands.order[5] = 128
    assert operands.run().isnan().all()


@pytest.mark.parametrize("m", [0, 1, 12, 40, 300])
@pytest.mark.parametrize("n", [(17, 40), (33, 16, 0), (300, 40, 17000)], ids=str)
def test_layers_that_share_a_launch(m, n):
    layout = MixedLayout(64, 64, 32, hadamard=(4, 6))
    layers = [Operands(m, size, layout, seed=7, k=150).reordered() for size in n]
    x, order = layers[0].x.cuda(), layers[0].order.cuda()
    *counts, code = arguments(layout)
    given = []
    for layer in layers:
        data, scales = layer.data.cuda(), layer.scales.cuda()
        placed = torch.ops.micromix.place_weight(data, scales, *counts, code | WEIGHT_ONLY)
        given += [placed, None, layer.n]
    several = getattr(torch.ops.micromix.weight_only_linears, {2: "two", 3: "three"}[len(n)])
    found = several(x, order, *given, *counts, code | WEIGHT_ONLY, torch.float32)
    for y, layer in zip(found, layers, strict=True):
        expected = layer.expected()
        assert y.shape == expected.shape
        assert not y.numel() or relative_error(y.cpu(), expected) <= BARS[torch.float32]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("ordered", [False, True])
def test_views(view, ordered):
    x = VIEWS[view](lambda *sizes: torch.randn(*sizes, dtype=torch.bfloat16))
    k = x.shape[-1]
    operands = Operands(1, 24, MixedLayout(64, 32, 32), k=k)
    if ordered:
        operands.reordered()
    operands.x = x
    expected = operands.expected()
    storage, offset = x.untyped_storage(), x.storage_offset()
    whole = torch.empty(0, dtype=x.dtype).set_(storage, 0, (len(storage) // 2,), (1,)).cuda()
    operands.x = whole.as_strided(x.shape, x.stride(), offset)
    found = operands.run()
    assert found.shape == expected.shape
    assert not found.numel() or relative_error(found, expected) <= BARS[torch.float32]


@given(
    m=st.integers(1, 300),
    n=st.integers(1, 300),
    blocks=st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)).filter(any),
    padding=st.integers(0, 31),
    format6=st.sampled_from(("e2m3", "e3m2")),
    hadamard=st.sampled_from(((), (4,), (4, 6), (6, 8), (4, 6, 8))),
    ordered=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(m, n, blocks, padding, format6, hadamard, ordered, dtype, seed):
    layout = MixedLayout(*(32 * b for b in blocks), format6=format6, hadamard=hadamard)
    operands = Operands(m, n, layout, seed=seed, dtype=dtype, k=layout.channels - padding)
    (operands.reordered(seed) if ordered else operands).check()


@pytest.mark.parametrize("m", [1, 40])
def test_a_cuda_graph_and_a_stream(m):
    operands = Operands(m, 48, MixedLayout(128, 64, 64)).reordered()
    *counts, code = arguments(operands.layout)
    x, order = operands.x.cuda(), operands.order.cuda()
    rest = (None, 48, *counts, code | WEIGHT_ONLY, torch.float32)
    data, scales = operands.data.cuda(), operands.scales.cuda()
    placed = torch.ops.micromix.place_weight(data, scales, *counts, code | WEIGHT_ONLY)
    product = torch.ops.micromix.weight_only_linear
    expected = product(x, order, placed, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, order, placed, *rest)
    graph.replay()
    assert torch.equal(y, expected)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, 2 * expected)


@pytest.mark.parametrize("inductor", [False, True])
@pytest.mark.parametrize("m", [2, 60])
def test_a_model(m, inductor):
    torch.manual_seed(0)
    from gated import Gated

    model = Gated().eval().to("cuda", torch.bfloat16)
    x = torch.randn(m, 64, device="cuda", dtype=torch.bfloat16)
    recipe = Recipe(split=(0.5, 0.25, 0.25), activations="bfloat16", hadamard=(4,))
    plan = calibrate(model).run([x]).plan(recipe)
    options = {"plan": plan, "strict": True, "inductor": inductor}
    compiled = torch.compile(model, backend="micromix", options=options)
    with torch.no_grad():
        y, exact = compiled(x).float(), model(x).float()
        reference = reference_model(copy.deepcopy(model).cpu(), plan)(x.cpu()).cuda().float()
    assert (y - reference).norm() <= 0.1 * (reference - exact).norm()
    explanation = explain(compiled)
    assert explanation.passes["micromix::weight_only_linear"] == 2  # gate and up share one
    assert {row.kernel for row in explanation.layers.values()} == {"cuda_decoded"}
    emulated = torch.compile(
        model, backend="micromix", options={"plan": plan, "kernel": "mx_emulated"}
    )
    refused = pytest.raises(OptionError, match="leaves the activations of .* in bfloat16")
    with refused, torch.no_grad():
        emulated(x)


def test_a_checkpoint(tmp_path):
    from tiny_llama import save_tiny
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    save_tiny(tmp_path / "float")
    ids = torch.randint(0, 128, (2, 24), device="cuda")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", device_map="cuda")
    recipe = Recipe(split=(0.5, 0.25, 0.25), activations="bfloat16")
    plan = calibrate(model).run([ids]).plan(recipe)
    with torch.no_grad():
        compiled = torch.compile(model, backend="micromix", options={"plan": plan})
        expected = compiled(ids).logits.float()
    micromix.save_pretrained(model, tmp_path / "quantised", plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cuda")
    with torch.no_grad():
        found = torch.compile(loaded, backend="micromix")(ids).logits.float()
        eager = loaded(ids).logits.float()
    assert relative_error(found, expected) <= 0.01
    assert relative_error(eager, expected) <= 0.03
