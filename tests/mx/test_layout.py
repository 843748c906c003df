"""MixedLayout: counts, offsets, the integer code, and what it refuses."""

import itertools

import pytest

from micromix_compile.mx import E2M1, E2M3, E3M2, E4M3, WEIGHT_IS_MXFP4, MixedLayout, ScaleRule


def test_sizes_by_hand():
    layout = MixedLayout(64, 32, 96)
    assert (layout.channels, layout.blocks) == (192, 6)
    assert layout.row_bytes == 32 + 24 + 96
    assert layout.element_bits == (64 * 4 + 32 * 6 + 96 * 8) / 192
    assert layout.total_bits == layout.element_bits + 0.25


def test_segments_by_hand():
    assert list(MixedLayout(64, 32, 96, "e3m2", ("floor", "even", "ceil")).segments()) == [
        (E2M1, ScaleRule.FLOOR, 0, 64, 0, 32, False),
        (E3M2, ScaleRule.EVEN, 64, 96, 32, 56, False),
        (E4M3, ScaleRule.CEIL, 96, 192, 56, 152, False),
    ]
    assert list(MixedLayout(32, 0, 32).segments()) == [
        (E2M1, ScaleRule.EVEN, 0, 32, 0, 16, False),
        (E4M3, ScaleRule.CEIL, 32, 64, 16, 48, False),
    ]


def test_an_empty_row_is_legal():
    layout = MixedLayout(0, 0, 0)
    assert (layout.channels, layout.row_bytes, layout.blocks) == (0, 0, 0)
    assert (layout.element_bits, layout.total_bits) == (0.0, 0.0)
    assert list(layout.segments()) == []


@pytest.mark.parametrize("fmt", [E2M1, E2M3, E3M2, E4M3], ids=lambda fmt: fmt.name)
def test_uniform(fmt):
    layout = MixedLayout.uniform(64, fmt.bits, format6="e3m2" if fmt is E3M2 else "e2m3")
    assert layout.counts == tuple(64 * (width == fmt.bits) for width in (4, 6, 8))
    assert [(s.fmt, s.start, s.stop) for s in layout.segments()] == [(fmt, 0, 64)]
    assert layout.element_bits == fmt.bits


def test_code_by_hand():
    # rules even = 2, ceil = 1, ceil = 1 at bits 2, 4 and 6
    assert MixedLayout(32, 0, 0).code == 0b01_01_10_00
    assert MixedLayout(32, 0, 0, "e3m2", ("floor", "ceil", "even")).code == 0b10_01_00_01


def test_code_there_and_back():
    rules = list(itertools.product(("floor", "ceil", "even"), repeat=3))
    layouts = [MixedLayout(32, 64, 96, f, r) for f in ("e2m3", "e3m2") for r in rules]
    assert len({layout.code for layout in layouts}) == len(layouts) == 54
    for layout in layouts:
        assert MixedLayout.from_code(32, 64, 96, layout.code) == layout
        assert MixedLayout.weight_from_code(32, 64, 96, layout.code) == layout
        both = layout.code | WEIGHT_IS_MXFP4
        assert MixedLayout.from_code(32, 64, 96, both) == layout
        assert MixedLayout.weight_from_code(32, 64, 96, both) == layout.as_mxfp4()


def test_as_mxfp4():
    layout = MixedLayout(32, 64, 96, "e3m2", ("floor", "ceil", "even")).as_mxfp4()
    assert layout == MixedLayout(192, 0, 0, "e3m2", ("floor", "ceil", "even"))


def test_is_a_value():
    assert MixedLayout(32, 0, 0, rules=["even", "ceil", "ceil"]) == MixedLayout(32, 0, 0)
    assert len({MixedLayout(32, 0, 0), MixedLayout(32, 0, 0), MixedLayout(0, 32, 0)}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 0, 0), "k4.*16"),
        ((0, -32, 0), "k6.*-32"),
        ((0, 0, 33), "k8.*33"),
        ((32, 0, 0, "e5m2"), "e5m2.*e2m3, e3m2"),
        ((32, 0, 0, "e2m3", ("even", "ceil", "rceil")), "rceil"),
        ((32, 0, 0, "e2m3", ("even", "ceil")), "three"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedLayout(*arguments)


@pytest.mark.parametrize("code", [-1, 256, 8192, 0b11_00_00_00, 0b00_00_11_00])
def test_refuses_a_code_without_meaning(code):
    with pytest.raises(ValueError, match="not a format code"):
        MixedLayout.from_code(32, 0, 0, code)


def test_refuses_an_unknown_uniform_format():
    with pytest.raises(ValueError, match="no format has 5 bits"):
        MixedLayout.uniform(32, 5)
