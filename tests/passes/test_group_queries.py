"""Attention of a decode step: the cache is not repeated, and what comes out is what transformers computes eagerly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from tiny_llama import tiny_llama
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from micromix_compile import Recipe, explain
from micromix_compile.evaluate import Decoder
from micromix_compile.passes.group_queries import group_queries

from .repeated_keys import COPIES_THAT_DIFFER, GROUPS, HEADS, B, D, S, attention, repeated


def operands(tokens=1, dtype=torch.float32, mask=None, **_):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(B, h, n, D, generator=generator).to(dtype)
        for h, n in ((HEADS, tokens), (GROUPS, S), (GROUPS, S))
    )
    masks = {
        None: None,
        "bool": (torch.arange(S) <= 30).expand(B, 1, 1, S),
        "float": torch.randn(B, 1, 1, S, generator=generator).to(dtype),
        "two dimensions": torch.randn(1, S, generator=generator).to(dtype),
        "of each head": torch.randn(B, HEADS, 1, S, generator=generator).to(dtype),
    }
    return query, key, value, masks[mask]


def traced(function, *inputs) -> fx.GraphModule:
    """A graph of torch functions with the values that Dynamo keeps in it."""
    gm = fx.symbolic_trace(function)
    mode = FakeTensorMode()
    fakes = [None if x is None else mode.from_tensor(x) for x in inputs]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    return gm


def grouped(function, *inputs) -> tuple[int, fx.GraphModule]:
    gm = traced(function, *inputs)
    count = group_queries(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return count, gm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "bool", "float", "two dimensions"])
def test_the_cache_is_read_where_it_is_and_the_numbers_stay(mask, dtype):
    inputs = operands(dtype=dtype, mask=mask)
    count, gm = grouped(attention, *inputs)
    assert count == 1
    assert not gm.graph.find_nodes(op="call_method", target="expand")
    torch.testing.assert_close(gm(*inputs), attention(*inputs))

    query, key, value, mask = inputs  # transformers' pack_gqa
    query = query.reshape(B, GROUPS, HEADS // GROUPS, D)
    eager = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(gm(*inputs), eager.reshape(B, HEADS, 1, D) * 2)


def causal(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeated(key), repeated(value), is_causal=True)


def key_alone(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeated(key), torch.cat((value,) * 3, 1), mask)


def in_another_order(query, key, value, mask):
    key, value = (
        x[:, None].expand(B, 3, GROUPS, S, D).reshape(B, HEADS, S, D) for x in (key, value)
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.parametrize(
    "function, given",
    [
        (attention, {"tokens": 2}),
        (attention, {"mask": "of each head"}),
        (causal, {}),
        (key_alone, {}),
        (in_another_order, {}),
        *((function, {}) for function in COPIES_THAT_DIFFER),
    ],
)
def test_other_attentions_are_left_alone(function, given):
    inputs = operands(**given)
    expected = function(*(x if x is None else x.clone() for x in inputs))
    count, gm = grouped(function, *inputs)
    assert count == 0
    torch.testing.assert_close(gm(*inputs), expected)


def in_a_checkpoint(cache):
    torch.utils.checkpoint.checkpoint(lambda x: x.mul_(3), cache, use_reentrant=False)


@pytest.mark.parametrize(
    "write, inductor, count",
    [
        (lambda cache: None, False, {"group_queries": 1}),
        (in_a_checkpoint, False, {}),
        (in_a_checkpoint, True, {}),
    ],
)
def test_a_layer_may_read_it_directly(write, inductor, count, monkeypatch):
    """Unless what is repeated is written to before: a repetition is a copy."""

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(D, 32)

        def forward(self, query, cache, value, mask):
            key, value = repeated(cache), repeated(value)
            write(cache)
            return self.layer(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))

    monkeypatch.setattr("micromix_compile.passes.lower_attention.cpu_isa", lambda: "amx")
    model, inputs = Reads(), operands()
    options = {"recipe": Recipe(format="mxfp8"), "inductor": inductor}
    with torch.no_grad():
        expected = model(*(x if x is None else x.clone() for x in inputs))
        compiled = torch.compile(model, backend="micromix", options=options)
        actual = compiled(*inputs)
        passes = explain(compiled).passes
    assert {name: passes[name] for name in passes if name == "group_queries"} == count
    assert (actual - expected).norm() < 0.06 * expected.norm()


def test_a_decoder_counts_them_and_gives_the_same_tokens(monkeypatch):
    model = tiny_llama(torch.float32)  # in bfloat16 a CPU with AMX has another pass for them
    options = {"recipe": Recipe(format="mxfp8"), "inductor": False}

    def decode():
        step = torch.compile(model, backend="micromix", options=options)
        return Decoder(model, step, 32).generate([3, 1, 4], 12), explain(step).passes

    tokens, passes = decode()
    assert passes["group_queries"] == model.config.num_hidden_layers
    torch.compiler.reset()
    monkeypatch.setattr("micromix_compile.passes.between_layers.ATTENTION", ())
    assert decode()[0] == tokens
