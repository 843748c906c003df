"""The layout of a mixed row: the first k4 channels MXFP4, the next k6 MXFP6, the last k8 MXFP8."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .bits import packed_bytes
from .elements import E2M1, E2M3, E3M2, E4M3, ElementFormat
from .scales import BLOCK, ScaleRule

SCALE_BITS = 8
WEIGHT_IS_MXFP4 = 0b10
"""The bit of a format code that says that the weight is MXFP4 in every segment."""

WEIGHT_ONLY = 1 << 12
"""The bit of a format code that says that the activations stay in bfloat16, which decides how CUDA places the weight."""

_FORMATS6 = {"e2m3": E2M3, "e3m2": E3M2}
_WIDTHS = (4, 6, 8)
ROTATIONS = {w for count in range(4) for w in itertools.combinations(_WIDTHS, count)}
_HADAMARD_SHIFT = 9  # bit 8 is ops.EMULATED, which is not a matter of the layout
_NO_LAYOUT = 1 << (_HADAMARD_SHIFT - 1)
_CODES = WEIGHT_ONLY << 1


class Segment(NamedTuple):
    """Channels [start, stop) of a row, and bytes [byte_start, byte_stop) of its packed data."""

    fmt: ElementFormat
    rule: ScaleRule
    start: int
    stop: int
    byte_start: int
    byte_stop: int
    hadamard: bool


@dataclass(frozen=True)
class MixedLayout:
    """Channel counts, element formats, scale rules and rotations of the three segments of a row.

    ``k4``, ``k6`` and ``k8`` count channels, each a multiple of 32, padding channels included.
    ``format6`` is "e2m3" or "e3m2". ``rules`` names the scale rules ("floor", "ceil", "even") of the
    4-, 6- and 8-bit segments. ``hadamard`` names the segments, by their bits, whose blocks are rotated
    (hadamard.py) before they are cast. Raises ValueError for anything else.
    """

    k4: int
    k6: int
    k8: int
    format6: str = "e2m3"
    rules: tuple[str, str, str] = ("even", "ceil", "ceil")
    hadamard: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("k4", "k6", "k8"):
            count = getattr(self, name)
            if count < 0 or count % BLOCK:
                raise ValueError(f"{name} must be a multiple of {BLOCK}, not negative; got {count}")
        if self.format6 not in _FORMATS6:
            known = ", ".join(_FORMATS6)
            raise ValueError(f"unknown format6 {self.format6!r}; known formats: {known}")
        object.__setattr__(self, "rules", tuple(self.rules))  # a list, from JSON, is welcome
        if len(self.rules) != 3:
            raise ValueError(f"rules must name three scale rules, got {self.rules}")
        for rule in self.rules:
            ScaleRule.from_name(rule)
        object.__setattr__(self, "hadamard", tuple(self.hadamard))
        if self.hadamard not in ROTATIONS:
            raise ValueError(f"hadamard must name segments out of 4, 6, 8; got {self.hadamard}")

    @classmethod
    def uniform(cls, channels: int, width: int, **choices: Any) -> MixedLayout:
        """``channels`` channels, all in the format of ``width`` bits; ``choices`` are the other fields of a layout.

        Raises ValueError for another width than 4, 6 or 8, or channels that are not whole blocks.
        """
        if width not in _WIDTHS:
            raise ValueError(f"no format has {width} bits; there are 4, 6 and 8")
        return cls(*(channels if width == own else 0 for own in _WIDTHS), **choices)

    @classmethod
    def from_code(cls, k4: int, k6: int, k8: int, code: int) -> MixedLayout:
        """The layout of the activations under a format code (see :attr:`code`).

        WEIGHT_IS_MXFP4 and WEIGHT_ONLY are ignored: they are no matter of that layout. Raises ValueError
        for a code that means nothing.
        """
        rules = [(code >> shift) & 0b11 for shift in (2, 4, 6)]
        if not 0 <= code < _CODES or code & _NO_LAYOUT or max(rules) > max(ScaleRule):
            raise ValueError(f"{code} is not a format code")
        labels = tuple(ScaleRule(rule).label for rule in rules)
        rotated = tuple(w for i, w in enumerate(_WIDTHS) if code >> (_HADAMARD_SHIFT + i) & 1)
        return cls(k4, k6, k8, "e3m2" if code & 1 else "e2m3", labels, rotated)

    @classmethod
    def weight_from_code(cls, k4: int, k6: int, k8: int, code: int) -> MixedLayout:
        """The layout of the weight under a format code: MXFP4 everywhere if WEIGHT_IS_MXFP4 is set,
        that of the activations if not."""
        layout = cls.from_code(k4, k6, k8, code)
        return layout.as_mxfp4() if code & WEIGHT_IS_MXFP4 else layout

    def as_mxfp4(self) -> MixedLayout:
        """The layout with the same channels and rules, and every channel in the MXFP4 segment.

        It is rotated if all segments are; LayerPlan refuses a layout where only some are.
        """
        rotated = (4,) if self.rotates_all else ()
        return MixedLayout(self.channels, 0, 0, self.format6, self.rules, rotated)

    @property
    def rotates_all(self) -> bool:
        """Whether the blocks of every segment that has channels are rotated."""
        counts = zip(_WIDTHS, self.counts, strict=True)
        return all(width in self.hadamard for width, count in counts if count)

    @property
    def rotates_any(self) -> bool:
        """Whether the blocks of a segment that has channels are rotated."""
        return any(segment.hadamard for segment in self.segments())

    @property
    def code(self) -> int:
        """The operators' ``format`` argument, without the bit for the weight.

        Bit 0: MXFP6 is E3M2. Bits 2-3, 4-5, 6-7: the scale rule of the 4-, 6-, 8-bit segment.
        Bits 9, 10, 11: the blocks of the 4-, 6-, 8-bit segment are rotated.
        Or it with WEIGHT_IS_MXFP4 if the weight's own layout is :meth:`as_mxfp4`.
        """
        rules = (ScaleRule.from_name(rule) for rule in self.rules)
        code = int(self.format6 == "e3m2")
        code |= sum(1 << _HADAMARD_SHIFT + _WIDTHS.index(width) for width in self.hadamard)
        return code | sum(rule << shift for rule, shift in zip(rules, (2, 4, 6), strict=True))

    @property
    def counts(self) -> tuple[int, int, int]:
        """(k4, k6, k8), as the operators take them."""
        return self.k4, self.k6, self.k8

    @property
    def channels(self) -> int:
        """The channels of a row, padding included (Kp)."""
        return sum(self.counts)

    @property
    def blocks(self) -> int:
        """The scale bytes of a row."""
        return self.channels // BLOCK

    @property
    def row_bytes(self) -> int:
        """The bytes of packed elements of a row, scales not counted."""
        return sum(s.byte_stop - s.byte_start for s in self.segments())

    @property
    def element_bits(self) -> float:
        """Bits per channel on average, scales not counted; 0 for an empty row."""
        return 8 * self.row_bytes / self.channels if self.channels else 0.0

    @property
    def total_bits(self) -> float:
        """Bits per channel on average with the scales, 8 bits per block; 0 for an empty row."""
        return self.element_bits + SCALE_BITS / BLOCK if self.channels else 0.0

    def segments(self) -> Iterator[Segment]:
        """The segments of a row that have channels, in order."""
        formats = (E2M1, _FORMATS6[self.format6], E4M3)
        start = byte_start = 0
        for width, count, fmt, name in zip(_WIDTHS, self.counts, formats, self.rules, strict=True):
            if not count:
                continue
            stop, byte_stop = start + count, byte_start + packed_bytes(count, fmt.bits)
            rule, rotated = ScaleRule.from_name(name), width in self.hadamard
            yield Segment(fmt, rule, start, stop, byte_start, byte_stop, rotated)
            start, byte_start = stop, byte_stop
