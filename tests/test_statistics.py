import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micromix_compile import statistics as module
from micromix_compile.errors import (
    EmptyCalibrationError,
    FileVersionError,
    NonFiniteCalibrationError,
    StatisticsFileError,
    StatisticsMismatchError,
)
from micromix_compile.layers import LayerShape
from micromix_compile.statistics import (
    ChannelStatistics,
    ModelStatistics,
    load_statistics,
    thresholds,
)


def heavy_tailed(rows, channels, seed=0, dtype=torch.float32):
    """Student-t noise times a scale per channel that spans three decades, like LLM activations."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, channels, generator=generator)
    chi = torch.randn(3, rows, channels, generator=generator).square().sum(0)
    scale = 10 ** (3 * torch.rand(channels, generator=generator))
    return (normal / chi.sqrt() * scale).to(dtype)


def collected(*batches):
    result = ChannelStatistics(batches[0].shape[-1])
    for batch in batches:
        result.update(batch)
    return result


def direct_fractions(x, form, lam):
    """The definition, element by element."""
    magnitudes = x.double().reshape(-1, x.shape[-1]).abs()
    peaks = magnitudes.amax(dim=1, keepdim=True)
    magnitudes, peaks = magnitudes[peaks[:, 0] > 0], peaks[peaks[:, 0] > 0]
    if form == "published":
        t4, t6 = lam * peaks * 448 / 6 / 2**10, lam * peaks * 448 / 28 / 2**6
    else:
        t4, t6 = (
            lam * 2**b * 2 ** (n - 1) / q * peaks / 254 for b, n, q in ((1, 4, 6), (3, 6, 28))
        )
    p4 = (magnitudes <= t4).double().mean()
    p6 = ((magnitudes > t4) & (magnitudes <= t6)).double().mean()
    return float(p4), float(p6), float(1 - p4 - p6)


# --- thresholds ---


def test_paper_thresholds_are_6_945_times_tighter():
    for published, paper in zip(thresholds("published"), thresholds("paper"), strict=True):
        assert published / paper == pytest.approx(448 * 254 / 2**14)
        assert published / paper == pytest.approx(6.945, abs=5e-4)


def test_thresholds_scale_with_lam_and_reject_other_forms():
    assert thresholds("published", 2.0) == pytest.approx([2 * 448 / 6144, 2 * 0.25])
    with pytest.raises(ValueError, match="published"):
        thresholds("other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["published", "paper"])
@pytest.mark.parametrize("lam", [0.25, 1.0, 1.7, 5.0])
def test_fractions_match_the_definition(form, lam, dtype):
    x = heavy_tailed(300, 160, dtype=dtype)
    found = collected(x).fractions(form, lam)
    # bf16 and f16 values fall on few ratios, so a bin is not filled evenly.
    tolerance = 5e-4 if dtype == torch.float32 else 5e-3
    assert found == pytest.approx(direct_fractions(x, form, lam), abs=tolerance)
    assert sum(found) == pytest.approx(1.0)


@settings(max_examples=100, deadline=None)
@given(ratio=st.floats(0, 1.5), seed=st.integers(0, 3))
def test_fraction_below_lies_within_its_bin(ratio, seed):
    x = heavy_tailed(50, 40, seed)
    ratios = x.abs() / x.abs().amax(dim=1, keepdim=True)
    found = collected(x).fraction_below(ratio)
    low, high = ratio * (1 - 2**-6), ratio * (1 + 2**-6) + 2**-20
    assert (ratios <= low).double().mean() - 1e-9 <= found
    assert found <= (ratios <= high).double().mean() + 1e-9


@pytest.mark.parametrize("exponent", [-20, -19, -5, -1])
@pytest.mark.parametrize("step", [1, 17, 63])
def test_fraction_below_is_exact_at_bin_edges(exponent, step):
    edge = math.ldexp(1 + step / 64, exponent)
    x = torch.tensor([[1.0, edge * (1 - 2**-10), edge * (1 + 2**-10), 0.0]])
    assert collected(x).fraction_below(edge) == 0.5


def test_fractions_rise_with_the_ratio():
    statistics = collected(heavy_tailed(50, 40))
    grid = [0.0, *torch.logspace(-8, 0.2, 500).tolist()]
    found = [statistics.fraction_below(ratio) for ratio in grid]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0.0, 1.0)


def test_rows_of_zeros_ask_for_no_format():
    x = heavy_tailed(20, 32)
    padded = torch.cat([x, torch.zeros(500, 32)])
    assert collected(padded).fractions("published") == collected(x).fractions("published")
    assert collected(torch.zeros(3, 32)).fractions("published") == (1.0, 0.0, 0.0)
    assert collected(torch.zeros(3, 32)).tokens == 3


# --- per channel ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channel_sums(dtype, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 1000)  # many chunks
    x = heavy_tailed(400, 37, dtype=dtype).reshape(4, 100, 37)
    found = collected(x)
    exact = x.double().reshape(-1, 37).abs()
    assert found.tokens == 400
    torch.testing.assert_close(found.total, exact.sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.square, exact.square().sum(0), rtol=1e-6, atol=0)
    assert torch.equal(found.peak.double(), exact.amax(0))
    torch.testing.assert_close(found.metric("mean"), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.metric("hessian"), exact.square().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(found.metric("max"), exact.amax(0))
    assert int(found.histogram.sum()) == x.numel()


def test_update_leaves_its_input_alone():
    for dtype in (torch.float32, torch.bfloat16):
        x = heavy_tailed(10, 33, dtype=dtype)
        before = x.clone()
        collected(x)
        assert torch.equal(x, before)


def test_squares_of_huge_values_stay_finite():
    found = collected(torch.tensor([[3e38, -3e38, 1e-30], [3e38, 1.0, 0.0]]))
    assert torch.isfinite(found.square).all()
    assert torch.isfinite(found.total).all()
    assert found.square[0] == pytest.approx(2 * 9e76, rel=1e-6)


def test_subnormal_rows():
    assert collected(torch.full((2, 4), 1e-42)).tokens == 2


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape):
    found = collected(torch.zeros(shape))
    assert found.tokens == 0
    assert int(found.histogram.sum()) == 0


def test_one_channel_and_one_dimension():
    assert collected(torch.tensor([[2.0], [-3.0]])).fractions("published") == (0.0, 0.0, 1.0)
    assert collected(torch.tensor([1.0, 0.5])).tokens == 1


def test_strided_input():
    x = heavy_tailed(64, 64)
    transposed, plain = collected(x.t()), collected(x.t().contiguous())
    assert torch.equal(transposed.total, plain.total)
    assert torch.equal(transposed.histogram, plain.histogram)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values_name_the_layer_and_add_nothing(bad, dtype, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 64)
    x = heavy_tailed(20, 32, dtype=dtype)
    x[19, 7] = bad  # in the last chunk
    found = ChannelStatistics(32)
    with pytest.raises(NonFiniteCalibrationError, match="layers.3.fc1"):
        found.update(x, "layers.3.fc1")
    assert found.tokens == 0
    assert not found.total.any()


def test_another_width_is_rejected():
    with pytest.raises(StatisticsMismatchError, match=r"up: an input \[3, 16\], where K is 32"):
        ChannelStatistics(32).update(torch.zeros(3, 16), "up")
    with pytest.raises(StatisticsMismatchError, match="32 channels here, 16 there"):
        ChannelStatistics(32).merge(ChannelStatistics(16))


def test_grad_and_inference_mode():
    found = ChannelStatistics(8)
    with torch.inference_mode():
        found.update(torch.ones(2, 8))
    found.update(torch.ones(2, 8, requires_grad=True))
    assert found.tokens == 4
    assert not found.total.requires_grad


def test_merge_equals_one_run():
    x = heavy_tailed(200, 48)
    together = collected(x[:70], x[70:])
    merged = collected(x[:70])
    merged.merge(collected(x[70:]))
    assert same(merged, together)


def same(one, other):
    keys = ("total", "peak", "square", "histogram")
    return one.tokens == other.tokens and all(
        torch.equal(getattr(one, key), getattr(other, key)) for key in keys
    )


# --- of a model ---

Q, K, DOWN = LayerShape(64, 32), LayerShape(16, 32), LayerShape(32, 48)


def model_statistics(seed=0, rows=20):
    result = ModelStatistics()
    result.add_group({"q": Q, "k": K})
    result.add_group({"down": DOWN})
    if rows:
        result.update("q", heavy_tailed(rows, 32, seed))
        result.update("down", heavy_tailed(rows, 48, seed))
    return result


def same_model(one, other):
    return (
        list(one.layers.items()) == list(other.layers.items())
        and [names for names, _ in one.groups()] == [names for names, _ in other.groups()]
        and all(same(one[name], other[name]) for name in one.layers)
    )


def test_groups_share_statistics():
    statistics = model_statistics()
    assert statistics["q"] is statistics["k"]
    assert [names for names, _ in statistics.groups()] == [("q", "k"), ("down",)]
    statistics.update("k", torch.ones(5, 32))
    assert statistics["q"].tokens == statistics.tokens == 25
    assert len(statistics) == 3


def test_adding_a_group_again_changes_nothing():
    statistics = model_statistics()
    before = statistics["q"]
    statistics.add_group({"q": Q, "k": K})
    statistics.add_group({"k": K})
    statistics.add_group({})
    assert statistics["q"] is statistics["k"] is before
    assert before.tokens == 20


def test_overlapping_groups_become_one():
    statistics = ModelStatistics()
    statistics.add_group({"q": Q})
    statistics.add_group({"k": K})
    statistics.update("q", torch.ones(2, 32))
    statistics.update("k", torch.ones(3, 32))
    statistics.add_group({"v": K, "k": K, "q": Q})
    assert statistics["q"] is statistics["k"] is statistics["v"]
    assert statistics["v"].tokens == 5


def test_a_group_must_agree_in_shape():
    statistics = model_statistics()
    with pytest.raises(StatisticsMismatchError, match="one input with K of"):
        statistics.add_group({"a": Q, "b": DOWN})
    with pytest.raises(StatisticsMismatchError, match="q: K=32, N=64 before, K=32, N=16 now"):
        statistics.add_group({"q": K})
    assert "a" not in statistics.layers


def test_require_tokens():
    with pytest.raises(EmptyCalibrationError, match="any linear layer"):
        ModelStatistics().require_tokens()
    statistics = model_statistics(rows=0)
    with pytest.raises(EmptyCalibrationError, match=r"(?s)q\n.*k\n.*down"):
        statistics.require_tokens()
    statistics.update("q", torch.ones(1, 32))
    statistics.require_tokens(["q", "k"])
    with pytest.raises(EmptyCalibrationError, match="down"):
        statistics.require_tokens()


def test_model_merge_equals_one_run():
    merged = model_statistics(seed=1)
    merged.merge(model_statistics(seed=2))
    together = model_statistics(seed=1)
    together.update("q", heavy_tailed(20, 32, 2))
    together.update("down", heavy_tailed(20, 48, 2))
    assert same_model(merged, together)


def test_model_merge_rejects_another_model():
    statistics, other = model_statistics(), ModelStatistics()
    other.add_group({"q": K, "up": Q})
    with pytest.raises(StatisticsMismatchError) as caught:
        statistics.merge(other)
    differences = "\n".join(caught.value.facts["differences"])
    assert "q: K=32, N=64 before, K=32, N=16 now" in differences
    assert "down: only in the first" in differences
    assert "up: only in the second" in differences
    assert same_model(statistics, model_statistics())


def test_save_and_load_are_bit_exact(tmp_path):
    statistics = model_statistics()
    statistics.add_group({"up": LayerShape(48, 32, True)})
    statistics.save(tmp_path / "s")
    loaded = load_statistics(tmp_path / "s")
    assert same_model(loaded, statistics)
    assert loaded.layers["up"].transposed
    loaded.merge(statistics)
    assert loaded.tokens == 40


def test_order_of_layers_survives_merged_groups(tmp_path):
    statistics = ModelStatistics()
    for name in ("a", "b", "c"):
        statistics.add_group({name: Q})
    statistics.add_group({"c": Q, "a": Q})
    statistics.save(tmp_path / "s")
    loaded = load_statistics(tmp_path / "s")
    assert list(loaded.layers) == ["a", "b", "c"]
    assert same_model(loaded, statistics)


def test_files_that_are_not_statistics(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(StatisticsFileError, match="No such file"):
        load_statistics(path)
    model_statistics().save(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StatisticsFileError, match="truncated"):
            load_statistics(path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"layers": 3},
        {"layers": {"a": []}},
        {"layers": {"a": [0, 1]}, "tokens": [1]},
        {"layers": {"a": [0, 1, 32]}, "tokens": []},
        {"layers": {"a": [0, 1, 32]}, "tokens": [1]},  # no tensors
        {"layers": {"a": [0, -1, 32]}, "tokens": [1]},
        {"layers": {"a": [0, 1, -32]}, "tokens": [1]},
        {"layers": {"a": [0, 1, 1 << 40]}, "tokens": [1]},  # of a size that no memory has
    ],
)
def test_damaged_content(tmp_path, content):
    module.write_file(tmp_path / "s", "micromix_statistics", 1, content, {})
    with pytest.raises(StatisticsFileError, match="damaged"):
        load_statistics(tmp_path / "s")


def test_damaged_tensors(tmp_path):
    tensors = {f"{key}.0": torch.zeros(3) for key in ("total", "peak", "square", "histogram")}
    content = {"layers": {"a": [0, 1, 32]}, "tokens": [1]}
    module.write_file(tmp_path / "s", "micromix_statistics", 1, content, tensors)
    with pytest.raises(StatisticsFileError, match=r"total is torch.float32 \[3\]"):
        load_statistics(tmp_path / "s")


def test_newer_version(tmp_path):
    module.write_file(tmp_path / "s", "micromix_statistics", 3, {}, {})
    with pytest.raises(FileVersionError, match=r"version 3.*up to 2"):
        load_statistics(tmp_path / "s")


def test_rows_that_are_equal_are_drawn_one_by_one():
    """Rows of a table, as often as words are in a text: as many different ones as in an even sample."""
    chances = 1 / torch.arange(1, 1001).double()
    kept, even = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(1000, 64, generator=generator)
        words = torch.multinomial(chances, 4096, replacement=True, generator=generator)
        for part in words.view(4, 1024):
            sample = collected(table[part]).sample.rows
            kept.append(len(sample.unique(dim=0)))
            even.append(len(part[torch.randperm(1024, generator=generator)[:128]].unique()))
    assert sum(kept) / len(kept) == pytest.approx(sum(even) / len(even), rel=0.05)
    assert min(kept) > 0.75 * min(even)


def test_equal_sequences_of_several_batches_are_drawn_apart():
    """As the beginning that all prompts have."""
    start = heavy_tailed(16, 32)
    batches = [torch.cat([start, heavy_tailed(48, 32, seed)]) for seed in range(1, 65)]
    sample = collected(*batches).sample.rows
    started = (sample.unsqueeze(1) == start.bfloat16()).all(dim=2)
    assert 10 < int(started.sum()) < 60  # 32 of 128
    assert int(started.sum(dim=0).max()) < 12


def test_a_refused_merge_changes_nothing():
    parts = [ModelStatistics(), ModelStatistics()]
    for part in parts:
        part.add_group({"x": K})
        part.add_group({"y": K})
    x = torch.randn(4, 32)
    parts[0].update("y", x, x)
    parts[1].update("x", x)
    parts[1].update("y", x)
    with pytest.raises(StatisticsMismatchError, match="with gradients here, without gradients"):
        parts[0].merge(parts[1])
    assert (parts[0]["x"].tokens, parts[0]["y"].tokens) == (0, 4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sample.rows.0", lambda t: t[:, :16].contiguous()),
        ("sample.rows.0", lambda t: t.float()),
        ("sample.keys.0", lambda t: t[:3].clone()),
        ("columns.q", lambda t: t[:3].clone()),
        ("square.0", lambda t: t * math.nan),
        ("importance.0", lambda t: t + math.inf),
    ],
)
def test_damaged_samples_and_sums(tmp_path, name, change):
    statistics = model_statistics()
    statistics.add_weight("q", torch.ones(64, 32))
    statistics.save(tmp_path / "s")
    content, tensors = module.read_file(
        tmp_path / "s", module._KIND, module._VERSION, StatisticsFileError
    )
    tensors[name] = change(tensors[name])
    module.write_file(tmp_path / "s", module._KIND, module._VERSION, content, tensors)
    with pytest.raises(StatisticsFileError, match="content is damaged"):
        load_statistics(tmp_path / "s")


def test_the_largest_values_can_be_saved(tmp_path):
    statistics = model_statistics()
    statistics.update("q", torch.full((2, 32), 3.4e38))
    statistics.save(tmp_path / "s")
    assert load_statistics(tmp_path / "s").tokens == 22
