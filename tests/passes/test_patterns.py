"""Each form of a norm and an activation, alone: what it becomes, and that the numbers are those of the two steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from micromix_compile.passes.fuse_quantize import fuse_quantize, number_quantises
from micromix_compile.passes.manager import PATTERNS, run_passes
from micromix_compile.passes.missed_fusions import missed_fusions

K = 96
LAYOUT = (32, 32, 32, 88)
OTHER = (0, 96, 0, 88)
micromix = torch.ops.micromix


def traced(function, *inputs) -> torch.fx.GraphModule:
    """The graph that Inductor's passes get, with sizes that are not constants."""
    with torch.no_grad():
        gm = make_fx(function, select_decomp_table(), tracing_mode="symbolic")(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def calls(gm) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if "micromix" in str(node.target):
            name = str(node.target).split(".")[1]
            counts[name] = counts.get(name, 0) + 1
    return counts


def fused(function, *inputs):
    """What the passes leave of a graph, after a check that its results agree with those before.

    Floats may differ by a rounding: of the last bit in float32, of one step of the type elsewhere. Quantised
    bytes may differ where a value was rounded the other way, in at most 0.1 % of them.
    """
    gm = traced(function, *inputs)
    before = gm(*inputs)
    run_passes(gm.graph)
    assert_kept_where_read(gm.graph)
    gm.recompile()
    after = gm(*inputs)
    for a, b in zip(after, before, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype == torch.uint8:
            assert (a != b).float().mean() <= 1e-3
        else:
            torch.testing.assert_close(a, b, rtol=1.01 * torch.finfo(a.dtype).eps * 4, atol=1e-6)
    return calls(gm)


def assert_kept_where_read(graph) -> None:
    """A fused operator returns its value only where somebody else reads it."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        if "keep" in names:
            value = [result.name for result in schema.returns].index("y")
            read = any(user.args[1] == value and user.users for user in node.users)
            assert node.args[names.index("keep")] == read


def values(dtype, count=1):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, 7, K, generator=generator).to(dtype) for _ in range(count)]
    return made[0] if count == 1 else made


def weight(dtype):
    return 1 + 0.3 * torch.randn(K, generator=torch.Generator().manual_seed(1)).to(dtype)


def wide(x, eps):
    h = x.to(torch.float32)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


RMS = {
    "llama": lambda x, w, eps: w * wide(x, eps).to(x.dtype),
    "llama, weight last": lambda x, w, eps: wide(x, eps).to(x.dtype) * w,
    "gemma": lambda x, w, eps: (wide(x, eps) * (1.0 + w.float())).type_as(x),
    "t5": lambda x, w, eps: (w * wide(x, eps)).to(x.dtype),
    "torch": lambda x, w, eps: F.rms_norm(x, (K,), w, eps),
}
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu written out": lambda x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
}


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("form", RMS)
def test_rms_norm(form, dtype, weight_dtype, eps):
    x, w = values(dtype), weight(weight_dtype)
    found = fused(lambda x, w: micromix.quantize(RMS[form](x, w, eps), None, *LAYOUT), x, w)
    assert found == {"rms_norm_quantize": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["llama", "gemma", "torch", "layer_norm"])
def test_residual_sum_is_taken_in_and_returned(form, dtype):
    norm = RMS.get(form, lambda x, w, eps: F.layer_norm(x, (K,), w, w, eps))

    def block(x, residual, w):
        total = residual + x
        return (total * 2, *micromix.quantize(norm(total, w, 1e-5), None, *LAYOUT), total)

    found = fused(block, *values(dtype, 2), weight(dtype))
    assert found == {f"{'layer' if form == 'layer_norm' else 'rms'}_norm_quantize": 1}
    gm = traced(block, *values(dtype, 2), weight(dtype))
    run_passes(gm.graph)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("affine", [0, 1, 2])
def test_layer_norm(affine, dtype):
    def block(x, *vectors):
        w, b = (*vectors, None, None)[:2]
        return micromix.quantize(F.layer_norm(x, (K,), w, b, 1e-5), None, *LAYOUT)

    found = fused(block, values(dtype), *[weight(dtype) for _ in range(affine)])
    assert found == {"layer_norm_quantize": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, product, dtype):
    def block(x, y):
        a = ACTIVATIONS[name](x)
        return micromix.quantize(y * a if product else a, None, *LAYOUT)

    if name in ("gelu written out", "quick_gelu") and dtype != torch.float32:
        # Eager rounds each of its steps; fused, they are float32, as in Inductor's own code.
        gm = traced(block, *values(dtype, 2))
        run_passes(gm.graph)
        assert calls(gm) == {"pointwise_quantize": 1}
        return
    assert fused(block, *values(dtype, 2)) == {"pointwise_quantize": 1}


def test_cast_and_sum():
    cast = fused(lambda x: micromix.quantize(x.bfloat16(), None, *LAYOUT), values(torch.float32))
    assert cast == {"pointwise_quantize": 1}

    def block(x, y):
        total = x + y
        return (total, *micromix.quantize(total, None, *LAYOUT))

    assert fused(block, *values(torch.bfloat16, 2)) == {"pointwise_quantize": 1}


def test_of_two_plans_the_first_is_fused_and_the_value_is_kept_for_others():
    order = torch.randperm(K).int()

    def block(x, w, order):
        y = RMS["llama"](x, w, 1e-6)
        flat = y.reshape(-1, K)
        return (
            *micromix.quantize(y, order, *LAYOUT),
            *micromix.quantize(flat, None, *OTHER),
            y.sin(),
        )

    x, w = values(torch.bfloat16), weight(torch.bfloat16)
    assert fused(block, x, w, order) == {"rms_norm_quantize": 1, "quantize": 1}
    gm = traced(block, x, w, order)
    run_passes(gm.graph)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)
    assert not missed_fusions(gm.graph)


def test_what_is_no_norm_is_left_alone():
    def another_axis(x, w):
        h = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
        return micromix.quantize(w * h, None, *LAYOUT)

    def cubes(x, w):
        h = x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)
        return micromix.quantize(w * h, None, *LAYOUT)

    def wide_weight(x, w):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return micromix.quantize(w.expand(7, K).contiguous() * h, None, *LAYOUT)

    def factor_that_broadcasts(x, w):
        return micromix.quantize(F.silu(x) * x[:1], None, *LAYOUT)

    for block in (another_axis, cubes, wide_weight, factor_that_broadcasts):
        gm = traced(block, values(torch.float32), weight(torch.float32))
        run_passes(gm.graph)
        assert calls(gm) == {"quantize": 1}, block


def test_a_sum_that_broadcasts_stays_outside():
    def block(x, position, w):
        return micromix.quantize(RMS["llama"](x + position, w, 1e-6), None, *LAYOUT)

    x = values(torch.float32)
    gm = traced(block, x, x[0].clone(), weight(torch.float32))
    run_passes(gm.graph)
    assert calls(gm) == {"rms_norm_quantize": 1}
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)


GATES = {
    "silu, too large by 2": (lambda x: x * torch.sigmoid(x) * 2.0, "an activation"),
    "swish 1.5": (lambda x: x / (1 + torch.exp(-1.5 * x)), "an activation"),
    "gelu with another constant": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.9 * (x + 0.05 * torch.pow(x, 3.0)))),
        "an activation",
    ),
    "a norm without a mean": (lambda x: x * torch.rsqrt(x.pow(2).sum(-1, True)), "a norm"),
    "tanh": (torch.tanh, None),
    "sigmoid": (torch.sigmoid, None),
    "a gate of another value": (lambda x: (x + 1) * torch.sigmoid(x.flip(-1)), None),
}


@pytest.mark.parametrize("name", GATES)
def test_what_looks_like_a_fused_form_and_is_none_is_reported(name):
    function, what = GATES[name]
    gm = traced(lambda x: micromix.quantize(function(x), None, *LAYOUT), values(torch.float32))
    number_quantises(gm.graph)
    for patterns in PATTERNS.values():
        fuse_quantize(gm.graph, patterns)
    assert list(missed_fusions(gm.graph).values()) == ([] if what is None else [what])
