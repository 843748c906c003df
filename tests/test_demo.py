"""The demo: its table and picture from known values, and the whole of it on a tiny model."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny_llama import tiny_llama, tiny_tokenizer

from micromix_compile import Recipe, demo, load_plan
from micromix_compile.allocation import uniform_plan
from micromix_compile.evaluate import DecodeSpeed, Perplexity
from micromix_compile.layers import LayerShape
from micromix_compile.mx.layout import MixedLayout
from micromix_compile.picture import channel_bits, draw, format_maps
from micromix_compile.plan import LayerPlan, ModelPlan

PNG = b"\x89PNG\r\n\x1a\n"


def rows():
    base = demo.Variant("bf16", None, Perplexity((2.0, 3.0), 20), weight_bytes=4_000_000)
    base.speed = DecodeSpeed((20.0, 30.0, 25.0), 1.0)
    mix = demo.Variant("mix", None, Perplexity((2.1, 3.1), 20), weight_bytes=1_250_000)
    mix.speed = DecodeSpeed((50.0, 40.0, 45.0), 1.8)
    mix.weight_bits, mix.compile_seconds, mix.text = 5.0, 41.6, "A compiler translates."
    return [base, mix]


def test_table():
    console = Console(file=io.StringIO(), width=80)
    console.print(demo.table(rows()))
    lines = console.file.getvalue().splitlines()
    base = next(line for line in lines if line.strip().startswith("bf16"))
    mix = next(line for line in lines if line.strip().startswith("mix"))
    # exp(2.5) = 12.18; exp(2.6) = 13.46 = +10.5 %, with no error, since both windows differ by the same.
    assert all(text in base for text in ("12.18", "4.0", "100%", "16.00", "25.0", "1.00x"))
    assert all(text in mix for text in ("13.46", "+10.5% ± 0.0%", "1.2", "31%", "5.00"))
    assert all(text in mix for text in ("45.0", "1.80x", "42 s"))


def test_results_are_plain_values():
    read = json.loads(json.dumps(demo.results(rows())))
    assert read["mix"]["weight_bytes"] == 1_250_000
    assert read["mix"]["decode_rounds"] == [50.0, 40.0, 45.0]
    assert read["bf16"]["window_losses"] == [2.0, 3.0]


def test_channel_bits():
    """64 channels in reverse order, and 32 of padding behind the first 32: 63..32 are MXFP4, 31..0 MXFP8."""
    reverse = torch.arange(63, -1, -1, dtype=torch.int32)
    padding = torch.full((32,), -1, dtype=torch.int32)
    order = torch.cat([reverse[:32], padding, reverse[32:]])
    layer = LayerPlan(64, MixedLayout(64, 0, 32, "e2m3", ("even", "ceil", "ceil")), order)
    assert channel_bits(layer).tolist() == [8] * 32 + [4] * 32


def test_channel_bits_without_an_order():
    layer = LayerPlan(40, MixedLayout(32, 32, 0, "e2m3", ("even", "ceil", "ceil")))
    assert channel_bits(layer).tolist() == [4] * 32 + [6] * 8


def test_format_maps_have_one_row_a_layer():
    layout = MixedLayout(32, 32, 0, "e2m3", ("even", "ceil", "ceil"))
    layers, shapes = {}, {}
    for i in range(3):
        shared = LayerPlan(64, layout, torch.arange(64, dtype=torch.int32).roll(i))
        for name in ("q_proj", "k_proj"):
            layers[f"model.layers.{i}.{name}"] = shared
            shapes[f"model.layers.{i}.{name}"] = LayerShape(64, 64)
    maps = format_maps(ModelPlan(layers, shapes))
    assert list(maps) == ["q_proj, k_proj"]
    assert maps["q_proj, k_proj"].shape == (3, 64)
    assert torch.equal(maps["q_proj, k_proj"][1], channel_bits(layers["model.layers.1.q_proj"]))


def test_format_maps_of_one_kind_and_several_widths():
    shapes = {"encoder.0.fc": (8, 64), "decoder.0.fc": (8, 32)}
    maps = format_maps(uniform_plan(shapes, Recipe(format="mxfp8")))
    assert {kind: tuple(bits.shape) for kind, bits in maps.items()} == {
        "fc (K = 64)": (1, 64),
        "fc (K = 32)": (1, 32),
    }


def test_picture(tmp_path):
    plan = uniform_plan({"layers.0.a": (64, 64), "layers.1.a": (64, 64)}, Recipe(format="mxfp4"))
    path = tmp_path / "plan.png"
    draw(plan, demo.points(rows()), path)
    assert path.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


@pytest.fixture
def tiny_demo(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    monkeypatch.setattr(
        demo, "load_smollm2", lambda dtype: (tiny_llama(layers=1, dtype=dtype), tokenizer)
    )
    for name, value in {
        "_WINDOW": 64,
        "_CALIBRATION_WINDOWS": 2,
        "_TEST_WINDOWS": 2,
        "_NEW_TOKENS": 4,
        "_CACHE_TOKENS": 32,
    }.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.parametrize(
    ("dtype", "base"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")], ids=["bf16", "fp32"]
)
def test_whole_demo(tiny_demo, tmp_path, capsys, dtype, base):
    variants = demo.run(prompt="What?", output=tmp_path, dtype=dtype)
    assert [variant.name for variant in variants] == [base, "MXFP8", "MXFP4", "mix"]
    out = capsys.readouterr().out
    assert all(word in out for word in ("perplexity", "MB", "tok/s", "compile", "What?"))

    plan = load_plan(tmp_path / "smollm2.micromix.safetensors")
    assert len(plan) == 7
    bits = {variant.name: variant.weight_bits for variant in variants}
    # 8 and 4 bits, and a scale byte for 32 elements; K of down_proj is 96, a whole number of blocks.
    assert bits[base] == 8 * dtype.itemsize
    elements = sum(s.out_features * s.in_features for s in plan.shapes.values())
    assert variants[0].weight_bytes == elements * dtype.itemsize
    assert f"to {base}" in out
    assert bits["MXFP8"] == pytest.approx(8.25)
    assert bits["MXFP4"] == pytest.approx(4.25)
    assert bits["mix"] == pytest.approx(plan.weight_bits)
    assert all(variant.compile_seconds > 0 for variant in variants)
    assert len({variant.perplexity.losses for variant in variants}) == 4

    read = json.loads((tmp_path / "results.json").read_text())
    assert read["mix"]["perplexity"] == variants[3].perplexity.value
    assert (tmp_path / "plan.png").read_bytes().startswith(PNG)
