"""micromix::attention against softmax(q kᵀ) v in float64, and against torch's own error."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from micromix_compile import ops

from .conftest import ISAS, usable_isas

attention = torch.ops.micromix.attention
TYPES = (torch.bfloat16, torch.float32)
MASKS = (None, "bool", "of each head", "bfloat16", "float32", "causal")


def operands(
    batch, heads, groups, queries, keys, size, value_size, dtype=torch.bfloat16
) -> tuple[Tensor, ...]:
    """Tensors as models have them: the query is a transposed view."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = random(batch, queries, heads, size).transpose(1, 2)
    return query, random(batch, groups, keys, size), random(batch, groups, keys, value_size)


def mask_of(kind: str | None, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    of_heads = heads if kind == "of each head" else 1
    random = torch.randn(batch, of_heads, queries, keys, generator=generator)
    if kind in ("bool", "of each head"):
        return random > 0
    if kind == "causal":  # a prompt in a cache with room
        seen = torch.arange(keys) <= torch.arange(queries)[:, None] + max(keys - queries - 3, 0)
        return seen[None, None].expand(batch, 1, queries, keys)
    if kind in ("bfloat16", "float32"):
        random[random > 1] = -math.inf
        return random.to(getattr(torch, kind))
    return None


def exact(query, key, value, mask, is_causal, scale) -> Tensor:
    """In float64, `[batch, queries, heads, size]`; zeros for a query that sees no key."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(shared, 1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, -1).nan_to_num(0) @ value).transpose(1, 2)


def check(query, key, value, mask=None, is_causal=False, scale=0.125) -> None:
    result = attention(query, key, value, mask, is_causal, scale)
    expected = exact(query, key, value, mask, is_causal, scale)
    assert result.shape == expected.shape and result.dtype == query.dtype
    of_weights = exact(query, key, value.abs(), mask, is_causal, scale)
    if query.dtype == torch.bfloat16:
        # Weights and results are rounded to it: half a unit each, up to 2^-8 of the value.
        allowed = 2**-8 * (expected.abs() + of_weights) * 1.01
    else:
        # A weight is off by as much as its score, a sum of float32 products whose size this bounds.
        of_scores = abs(scale) * (
            query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()
        )
        allowed = 2**-22 * (8 + of_scores) * of_weights
    assert ((result - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 200), (6, 300), (70, 70), (40, 129)])
def test_against_float64(isa, queries, keys, mask, dtype):
    shape = (2, 6, 2, queries, keys)
    check(*operands(*shape, 64, 64, dtype), mask_of(mask, 2, 6, queries, keys))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size, value_size", [(8, 8), (17, 33), (80, 48), (128, 128), (256, 256)])
def test_head_sizes(isa, size, value_size, dtype):
    check(*operands(1, 4, 4, 35, 140, size, value_size, dtype))


@pytest.mark.parametrize("queries, keys", [(1, 9), (33, 33), (300, 300), (20, 150), (150, 20)])
def test_causal(isa, queries, keys):
    check(*operands(1, 3, 1, queries, keys, 64, 64), is_causal=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ISAS)
def test_any_shape(name, data):
    if name not in usable_isas():
        pytest.skip(f"this machine has no {name}")
    batch, groups, shared = (data.draw(st.integers(1, n), n) for n in (2, 3, 5))
    queries, keys = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 300))
    size, value_size = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100))
    heads, kind = groups * shared, data.draw(st.sampled_from(MASKS))
    dtype = data.draw(st.sampled_from(TYPES))
    before = ops.set_cpu_isa(name)
    try:
        check(
            *operands(batch, heads, groups, queries, keys, size, value_size, dtype),
            mask_of(kind, batch, heads, queries, keys),
            is_causal=kind is None and data.draw(st.booleans()),
            scale=data.draw(st.sampled_from([0.125, 1.0, 0.0, -0.5])),
        )
    finally:
        ops.set_cpu_isa(before)


@pytest.mark.parametrize("dtype", TYPES)
def test_no_less_exact_than_torch(isa, dtype):
    inputs = operands(2, 6, 2, 100, 500, 64, 64, dtype)
    expected = exact(*inputs, None, False, 0.125)
    ours = attention(*inputs, None, False, 0.125) - expected
    torchs = F.scaled_dot_product_attention(*inputs, enable_gqa=True).transpose(1, 2) - expected
    # Of float32, what is left is the order of the sums.
    assert ours.norm() <= (1.1 if dtype == torch.bfloat16 else 1.5) * torchs.norm()


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_queries_that_see_nothing(isa, lowest):
    query, key, value = operands(1, 2, 1, 40, 200, 64, 64)
    mask = torch.zeros(1, 1, 40, 200)
    mask[:, :, 3] = lowest
    mask[:, :, 30:, 100:] = lowest
    check(query, key, value, mask)
    result = attention(query, key, value, mask, False, 0.125)
    if lowest == -math.inf:
        assert torch.equal(attention(query, key, value, mask == 0, False, 0.125), result)
        assert not result[:, 3].any()
    else:  # all equally hidden: the mean
        mean = value.double().mean(2)
        assert (result[0, 3, 0] - mean[0, 0]).abs().max() < 2**-8


def test_nothing_hidden_is_read(isa):
    """NaN among the values of keys that no query sees, as fresh memory may hold, does no harm beyond its block."""
    query, key, value = operands(1, 4, 2, 1, 400, 64, 64)
    mask = (torch.arange(400) < 128)[None, None, None]
    expected = attention(query, key, value, mask, False, 0.125)
    value[:, :, 128:] = math.nan
    assert torch.equal(attention(query, key, value, mask, False, 0.125), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_and_large_scores(isa, dtype):
    query, key, value = operands(1, 2, 2, 3, 50, 64, 64, dtype)
    query[:, 0, 1] = math.nan
    result = attention(query, key, value, None, False, 0.125)
    assert result[:, 1, 0].isnan().all() and not result[:, :, 1].isnan().any()
    assert not result[:, 0].isnan().any() and not result[:, 2].isnan().any()
    query, key, value = operands(1, 2, 2, 3, 50, 64, 64, dtype)
    check(query * 1000, key, value)


PROMPTS = ((9, 3, 16), (6, 2, 40), (70, 1, 1))  # heads, key heads, queries


@pytest.mark.parametrize("kind", ["bool", "bfloat16", "float32"])
@pytest.mark.parametrize("heads, groups, queries", PROMPTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_keys_that_no_query_sees_are_not_there(isa, heads, groups, queries, kind, dtype):
    """A prompt in a cache with room: the bits are those of a cache that ends where the room begins."""
    query, key, value = operands(2, heads, groups, queries, 1100, 64, 48, dtype)
    seen = torch.arange(1100) <= torch.arange(queries)[:, None] + 300
    mask = seen[None, None]
    if kind != "bool":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf).to(getattr(torch, kind))
    key[:, :, 384:] = value[:, :, 384:] = math.nan
    ends = (x[:, :, :384] for x in (key, value))
    expected = attention(query, *ends, mask[..., :384], False, 0.125)
    assert not expected.isnan().any()
    assert torch.equal(attention(query, key, value, mask, False, 0.125), expected)


@pytest.mark.parametrize("queries", [3, 50, 130])
def test_keys_after_the_last_query_are_not_there(isa, queries):
    query, key, value = operands(1, 6, 2, queries, 700, 64, 64)
    check(query, key, value, is_causal=True)
    key[:, :, 256:] = value[:, :, 256:] = math.nan
    ends = (x[:, :, :256] for x in (key, value))
    expected = attention(query, *ends, None, True, 0.125)
    assert torch.equal(attention(query, key, value, None, True, 0.125), expected)


@pytest.mark.parametrize("of_heads, of_queries", [(True, True), (True, False), (False, True)])
def test_masks_that_hide_other_keys_from_every_batch_and_head(isa, of_heads, of_queries):
    """Windows and padding: some blocks of keys are seen by one head alone, and some by none."""
    batch, heads, queries, keys = 2, 6, 40, 1500
    inputs = operands(batch, heads, 2, queries, keys, 64, 64)
    shape = (batch, heads if of_heads else 1, queries if of_queries else 1, 1)
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(130, 1100, shape, generator=generator)
    mask = (torch.arange(keys) >= first) & (torch.arange(keys) < first + 200)
    mask[1] &= torch.arange(keys) < 600  # and some see nothing
    check(*inputs, mask)
    added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    assert torch.equal(
        attention(*inputs, added, False, 0.125), attention(*inputs, mask, False, 0.125)
    )
    assert not attention(*inputs, mask & False, False, 0.125).any()


@pytest.mark.parametrize("farthest", [0, 140, 299])
def test_the_query_that_sees_the_most_may_be_any(isa, threads, farthest):
    """The mask is large enough for several threads to look through it."""
    query, key, value = operands(1, 2, 1, 300, 6000, 32, 32)
    mask = torch.arange(6000)[None] < torch.full((300, 1), 50)
    mask[farthest, 1000] = True
    key[:, :, 1024:] = value[:, :, 1024:] = math.nan
    ends = (x[:, :, :1024] for x in (key, value))
    threads(1)
    expected = attention(query, *ends, mask[None, None, :, :1024], False, 0.125)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(attention(query, key, value, mask[None, None], False, 0.125), expected)


PAYLOADS = (0x7FC00000, 0x7FC10000, 0x7FFFFFFF, -1, 0x7FC00001, -0x3EFFFF, 0x7F810000)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("queries", [4, 40])
def test_every_nan_stays_nan(isa, dtype, queries, payload):
    def nan(of: torch.dtype) -> Tensor:
        number = torch.tensor(payload, dtype=torch.int32)
        if of == torch.float32:
            return number.view(of)
        return (number >> 16).short().view(of)

    nans = []
    for which in range(3):
        inputs = operands(1, 2, 2, queries, queries, 64, 64, dtype)
        inputs[which][0, 0, 1, 3] = nan(dtype)
        nans.append(attention(*inputs, None, False, 0.125).isnan())
    of_query, of_key, of_value = nans
    assert of_query[0, 1, 0].all() and of_query.sum() == 64
    assert of_key[0, :, 0].all() and not of_key[0, :, 1].any()
    assert of_value[0, :, 0, 3].all() and of_value.sum() == queries

    for mask_type in (torch.float32, torch.bfloat16):
        mask = torch.zeros(1, 1, queries, queries, dtype=mask_type)
        mask[0, 0, 2, 1] = nan(mask_type)
        inputs = operands(1, 2, 2, queries, queries, 64, 64, dtype)
        found = attention(*inputs, mask, False, 0.125).isnan()
        assert found[0, 2].all() and found.sum() == 2 * 64


@pytest.mark.parametrize("dtype", TYPES)
def test_threads_and_strides_change_nothing(isa, threads, dtype):
    query, key, value = operands(2, 6, 2, 150, 300, 64, 64, dtype)
    mask = mask_of("bool", 2, 6, 150, 300)
    threads(1)
    expected = attention(query, key, value, mask, False, 0.125)
    threads(2)
    assert torch.equal(attention(query, key, value, mask, False, 0.125), expected)
    others = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value, mask)]
    assert torch.equal(attention(*others, False, 0.125), expected)


def test_empty():
    query, key, value = operands(1, 2, 2, 0, 5, 16, 16)
    assert attention(query, key, value, None, False, 1.0).shape == (1, 0, 2, 16)
    query, key, value = operands(1, 2, 2, 3, 0, 16, 16)
    assert torch.equal(
        attention(query, key, value, None, False, 1.0), torch.zeros(1, 3, 2, 16).bfloat16()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, m: (q.half(), k, v, m), "query must be bfloat16 or float32; got Half"),
        (lambda q, k, v, m: (q.float(), k, v, m), "key must be of query's type, \\[batch"),
        (lambda q, k, v, m: (q, k[0], v, m), "key must be of query's type, \\[batch"),
        (lambda q, k, v, m: (q, k, v[:, :, 1:], m), "do not fit together"),
        (
            lambda q, k, v, m: (q[:, :5], k, v, m),
            "the 5 heads of query must be a multiple of the 2",
        ),
        (lambda q, k, v, m: (q, k, v, m[..., :3]), "mask must be \\[batch, heads, queries, 9\\]"),
        (lambda q, k, v, m: (q, k, v, m[:, :, :2]), "size 2 of mask must be 4 or 1"),
        (lambda q, k, v, m: (q, k, v, m.half()), "mask must be bool, bfloat16 or float32"),
    ],
)
def test_refusals(change, message):
    inputs = (*operands(1, 6, 2, 4, 9, 16, 16), torch.zeros(1, 1, 4, 9))
    attention(*inputs, False, 1.0)
    with pytest.raises(RuntimeError, match=message):
        attention(*change(*inputs), False, 1.0)


def test_traces():
    inputs = operands(2, 6, 2, 7, 9, 16, 24)
    torch.library.opcheck(
        attention.default,
        (*inputs, None, True, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )
