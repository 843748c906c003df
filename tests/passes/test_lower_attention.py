"""Attention on a CPU: one operator, and the numbers of torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import tiny_llama
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from micromix_compile import Recipe, explain
from micromix_compile.evaluate import Decoder
from micromix_compile.passes.lower_attention import lower_attention

from .repeated_keys import COPIES_THAT_DIFFER, GROUPS, HEADS, B, D, S, attention, repeated

OPERATOR = torch.ops.micromix.attention.default


@pytest.fixture(autouse=True, params=["avx2", "avx512_bf16", "amx"])
def instruction_set(request, monkeypatch):
    """The pass as on such a CPU; whatever this machine has runs the operator."""
    monkeypatch.setattr("micromix_compile.passes.lower_attention.cpu_isa", lambda: request.param)


def operands(tokens=5, dtype=torch.bfloat16, mask=None):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(B, h, n, D, generator=generator).to(dtype)
        for h, n in ((HEADS, tokens), (GROUPS, S), (GROUPS, S))
    )
    scores = torch.randn(B, HEADS, tokens, S, generator=generator)
    masks = {
        None: None,
        "bool": scores[:, :1] > 0,
        "bfloat16": scores[:1, :1].to(dtype),
        "two dimensions": scores[0, 0].to(dtype),
        "of each head": scores > 0,
        "of the keys": scores[:, :1, :1] > 0,
        "of one key": scores[..., :1] > -100,
    }
    return query, key, value, masks[mask]


def lowered(function, *inputs) -> tuple[int, fx.GraphModule]:
    absent = {"mask": None} if inputs[3] is None else {}
    gm = fx.symbolic_trace(function, absent)
    mode = FakeTensorMode()
    fakes = [x if x is None else mode.from_tensor(x) for x in inputs]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    count = lower_attention(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return count, gm


def causal(query, key, value, mask):
    return F.scaled_dot_product_attention(
        query, repeated(key), repeated(value), is_causal=True, scale=0.5
    )


def of_equal_weights(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeated(key), repeated(value), mask, scale=0.0)


def without_repeating(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def equal_heads(query, key, value, mask):
    return F.scaled_dot_product_attention(
        query[:, :4], torch.cat((key,) * 2, 1), torch.cat((value,) * 2, 1), mask
    )


def key_repeated(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeated(key), torch.cat((value,) * 3, 1), mask)


MASKS = [None, "bool", "bfloat16", "two dimensions", "of each head", "of the keys"]


@pytest.mark.parametrize(
    "function, given, copies",
    [
        *((attention, {"mask": mask}, False) for mask in MASKS),
        (attention, {"tokens": 1, "mask": "bool"}, False),
        (attention, {"dtype": torch.float32, "mask": "bool"}, False),
        (attention, {"dtype": torch.float32, "tokens": 1, "mask": "two dimensions"}, False),
        (causal, {"tokens": S}, False),
        (of_equal_weights, {"mask": "bool"}, False),
        (without_repeating, {"mask": "bool"}, False),
        (equal_heads, {}, False),
        (key_repeated, {}, True),
        *((function, {}, True) for function in COPIES_THAT_DIFFER),
    ],
)
def test_what_is_lowered(function, given, copies):
    inputs = operands(**given)
    expected = function(*(x if x is None else x.clone() for x in inputs))
    count, gm = lowered(function, *inputs)
    assert count == 1
    assert len(gm.graph.find_nodes(op="call_function", target=OPERATOR)) == 1
    assert bool(gm.graph.find_nodes(op="call_method", target="expand")) == copies
    error = {"atol": 0.04, "rtol": 0.02} if expected.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(gm(*inputs), expected, **error)


def dropped_out(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeated(key), repeated(value), dropout_p=0.1)


def three_dimensions(query, key, value, mask):
    return F.scaled_dot_product_attention(query[0, :2], key[0], value[0])


def broadcast_batch(query, key, value, mask):
    return F.scaled_dot_product_attention(query[:, :2], key[:1], value[:1])


def broadcast_values(query, key, value, mask):
    return F.scaled_dot_product_attention(query[:, :2], key, value[:, :1])


def broadcast_keys(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key[:, :1], value, enable_gqa=True)


@pytest.mark.parametrize(
    "function, given",
    [
        (broadcast_batch, {}),
        (broadcast_values, {}),
        (broadcast_keys, {}),
        (attention, {"dtype": torch.float16}),
        (attention, {"mask": "of one key"}),
        (dropped_out, {}),
        (three_dimensions, {}),
    ],
)
def test_what_is_left_to_torch(function, given):
    assert lowered(function, *operands(**given))[0] == 0


def test_under_autocast_it_is_left_to_torch():
    with torch.autocast("cpu", torch.bfloat16):
        assert lowered(attention, *operands(dtype=torch.float32))[0] == 0


def in_eagers_layout(order, size):
    """Attention whose query lies in memory in an order, and what a model may do with it then."""

    def function(query, key, value, mask):
        query = query.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        value = value[..., :size]
        result = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return result, result.permute(order).view(-1)

    return function


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "order, size, copied",
    [((0, 2, 1, 3), D, False), ((0, 1, 2, 3), D, True), ((2, 0, 1, 3), D, True)]
    + [((0, 1, 2, 3), 8, True)],
)
def test_a_result_lies_in_memory_as_eagers_does(tokens, order, size, copied):
    inputs = operands(tokens, torch.float32)
    function = in_eagers_layout(order, size)
    expected, flat = function(*inputs)
    count, gm = lowered(function, *inputs)
    assert count == 1
    clones = gm.graph.find_nodes(op="call_function", target=torch.clone)
    assert bool(clones) == (copied and tokens > 1)
    actual, actual_flat = gm(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_flat, flat)
    if tokens > 1:
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("then", ["contiguous", "reshape"])
def test_a_result_that_is_copied_anyway_is_not_copied_before(then):
    def function(query, key, value, mask):
        result = F.scaled_dot_product_attention(query, repeated(key), repeated(value))
        result = result.reshape(B, -1, 5, D).transpose(1, 2)
        result = result.contiguous() if then == "contiguous" else result.reshape(B, -1, HEADS * D)
        return result.view(B, -1, HEADS * D)

    inputs = operands(dtype=torch.float32)
    count, gm = lowered(function, *inputs)
    assert count == 1 and not gm.graph.find_nodes(op="call_function", target=torch.clone)
    torch.testing.assert_close(gm(*inputs), function(*inputs))


@pytest.mark.parametrize(
    "isa, dtype, count",
    [("portable", torch.float32, 0), ("avx512", torch.bfloat16, 0), ("avx512", torch.float32, 1)],
)
def test_where_torchs_is_faster_it_is_left_to_it(monkeypatch, isa, dtype, count):
    monkeypatch.setattr("micromix_compile.passes.lower_attention.cpu_isa", lambda: isa)
    assert lowered(attention, *operands(dtype=dtype))[0] == count


def test_a_decoder_counts_them(monkeypatch):
    model = tiny_llama()

    def logits(**settings):
        torch.compiler.reset()
        options = {"recipe": Recipe(format="mxfp8"), **settings}
        step = torch.compile(model, backend="micromix", options=options)
        decoder = Decoder(model, step, 32)
        result = []
        for token in (3, 1, 4, 1, 5):
            decoder.length += 1
            with torch.no_grad():
                output = step(
                    input_ids=torch.tensor([[token]]),
                    past_key_values=decoder.cache,
                    use_cache=True,
                )
            result.append(output.logits.float())
        return torch.cat(result), explain(step).passes

    ours, passes = logits()
    assert passes["lower_attention"] == model.config.num_hidden_layers
    assert "group_queries" not in passes
    assert "lower_attention" not in logits(inductor=False)[1]  # numbers as uncompiled
    monkeypatch.setattr("micromix_compile.passes.between_layers.ATTENTION", ())
    torchs, _ = logits()
    assert (ours - torchs).norm() < 0.1 * torchs.norm()  # codes that round the other way
