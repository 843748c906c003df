"""Recipe: what the user chooses about a plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from .errors import RecipeError
from .mx.layout import ROTATIONS
from .mx.scales import ScaleRule
from .targets import TARGETS

__all__ = ["Recipe"]

BITS = {"mxfp4": 4, "mxfp6": 6, "mxfp8": 8}
WEIGHTS = ("match", "mxfp4")
ACTIVATIONS = ("match", "bfloat16")
_THRESHOLDS = ("published", "paper")
_SORTS = ("mean", "max", "hessian")
_RULES = tuple(rule.label for rule in ScaleRule)
_SORTED = ("thresholds", "split", "counts")  # the methods that sort by a metric
_METHODS = ("thresholds", "split", "counts", "format", "bits", "time")

# The output head under the names that Hugging Face models give it.
OUTPUT_HEADS = (
    "lm_head",
    "*.lm_head",
    "embed_out",
    "*.embed_out",
    "*predictions.decoder",
    "proj_out",
    "score",
    "classifier",
    "qa_outputs",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How channels get their formats. Immutable and hashable; bad values raise RecipeError.

    Exactly one of six methods decides the counts of channels per format (none given means
    ``thresholds="published"``):

    * ``thresholds``: "published" or "paper", the two forms of the MicroMix thresholds
      (arXiv 2508.02343; see ChannelStatistics.fractions), both scaled by ``lam`` (λ).
    * ``split``: fractions (p4, p6, p8) of the channels of every layer; they sum to 1.
    * ``counts``: ``{glob of layer names: (k4, k6, k8)}``, numbers of channels, each a multiple of
      ``multiple``, summing to the layer's K rounded up to a multiple. The first glob that matches
      a layer wins; layers that share an input share the counts.
    * ``format``: "mxfp8", "mxfp6" or "mxfp4" for all channels; needs no calibration, unless ``rounding`` is "gptq".
    * ``bits``: an average of the element bits over all weights (scales take 0.25 bit more), spent over
      all layers where it lowers the error most, on ``formats`` (budget.py). Calibrate with gradients
      for it. With ``weights="mxfp4"`` it is the activations' average.
    * ``time``: the same with modelled time for bits (targets.py): at most this fraction of what the products take
      in MXFP8, in a forward of ``rows`` rows (1: decode at batch 1) on ``target``, a name of targets.TARGETS.

    The other choices:

    * ``format6``: "e2m3" or "e3m2", the element of MXFP6; "e2m3" has the lower error.
    * ``rules``: scale rules ("floor", "ceil", "even") of the activations in the 4-, 6- and 8-bit
      segment ("even" has the lower error for MXFP4); ``weight_rules`` those of the weights, None for the same ones.
    * ``weights``: "match", the weight of a channel in the format of the channel, or "mxfp4".
    * ``activations``: "match", quantised in the format of the channel when the model runs, or "bfloat16": not
      quantised. Then formats and ``rules`` are those of the weights alone.
    * ``hadamard``: the segments, out of 4, 6 and 8, whose blocks of 32 are rotated before the cast,
      when the model runs too; with a budget also "measured": each input as is or with (4, 6), whichever
      lowers the error. None by default.
    * ``rounding``: of the weights, "nearest" or "gptq" (rounding.py), which takes the calibration's
      batches again, and several times as long.
    * ``sort``: what channels are sorted by: "mean" of |x|, "max" of |x|, or "hessian", E[x²]; with thresholds,
      split and counts.
    * ``multiple``: 32, 64 or 128; counts are multiples of it, K is padded to one.
    * ``skip``: globs (case-sensitive, on the full name) of layers to leave alone.
    * ``include_lm_head``: whether the output head is quantised too; it is left alone by default, under the names
      lm_head, embed_out, predictions.decoder, proj_out, score, classifier and qa_outputs, if ``counts`` has no
      pattern that is its very name.
    """

    thresholds: str | None = None
    lam: float = 1.0
    split: tuple[float, float, float] | None = None
    counts: Any = None  # given as a mapping, kept as a tuple of its items: hashable
    format: str | None = None
    bits: float | None = None
    time: float | None = None
    target: str | None = None
    rows: int = 1
    formats: tuple[str, ...] = tuple(BITS)
    format6: str = "e2m3"
    rules: tuple[str, str, str] = ("even", "ceil", "ceil")
    weight_rules: tuple[str, str, str] | None = None
    weights: str = "match"
    activations: str = "match"
    hadamard: tuple[int, ...] | str = ()
    rounding: str = "nearest"
    sort: str = "mean"
    multiple: int = 32
    skip: tuple[str, ...] = ()
    include_lm_head: bool = False

    def __post_init__(self) -> None:
        given = [name for name in _METHODS if getattr(self, name) is not None]
        if len(given) > 1:
            value, others = getattr(self, given[0]), " and ".join(given[1:])
            expected = f"left out beside {others}: one of {', '.join(_METHODS)} decides the counts"
            _reject(given[0], value, expected)
        if not given:
            object.__setattr__(self, "thresholds", "published")

        self._one_of("thresholds", (None, *_THRESHOLDS))
        self._one_of("format", (None, *BITS))
        self._one_of("format6", ("e2m3", "e3m2"))
        self._one_of("weights", WEIGHTS)
        self._one_of("activations", ACTIVATIONS)
        self._one_of("rounding", ("nearest", "gptq"))
        self._one_of("sort", _SORTS)
        self._one_of("multiple", (32, 64, 128))
        self._one_of("include_lm_head", (False, True))
        self._one_of("target", (None, *TARGETS))
        for name, check in (
            ("lam", self._checked_lam),
            ("split", _checked_split),
            ("counts", self._checked_counts),
            ("rules", _checked_rules),
            ("weight_rules", _checked_rules),
            ("skip", _checked_skip),
            ("hadamard", self._checked_hadamard),
            ("formats", self._checked_formats),
            ("bits", self._checked_bits),
            ("time", self._checked_time),
            ("rows", self._checked_rows),
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.target is not None and self.time is None:
            _reject("target", self.target, "left out: it is where time=... is spent")
        if self.sort != "mean" and self.method not in _SORTED:
            _reject("sort", self.sort, "left out: bits, time and format sort by no metric")
        if self.activations == "bfloat16":
            self._check_weight_only()

    @classmethod
    def micromix(cls) -> Recipe:
        """The published MicroMix setting: thresholds, λ = 1, E3M2, the ceil rule everywhere."""
        return cls(thresholds="published", format6="e3m2", rules=("ceil", "ceil", "ceil"))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Recipe:
        """The recipe with these fields; the inverse of :meth:`to_dict`.

        Raises RecipeError for a field that does not exist, or a bad value. A ``sort`` that its method does not use,
        as earlier versions saved it, is left out.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                _reject(name, options[name], f"left out; the options are {', '.join(known)}")
        given = [name for name in _METHODS if options.get(name) is not None]
        if given and given[0] not in _SORTED:
            options = {name: value for name, value in options.items() if name != "sort"}
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        options = asdict(self)
        if self.counts is not None:
            options["counts"] = dict(self.counts)
        return json.loads(json.dumps(options))

    @property
    def method(self) -> str:
        """The method that decides the counts: "thresholds", "split", "counts", "format", "bits" or "time"."""
        return next(name for name in _METHODS if getattr(self, name) is not None)

    @property
    def has_budget(self) -> bool:
        """Whether one budget is spent over all layers, by measured error."""
        return self.method in ("bits", "time")

    def skips(self, layer: str) -> bool:
        """Whether the layer of this full name is to be left alone."""
        named = any(pattern == layer for pattern, _ in self.counts or ())
        heads = () if self.include_lm_head or named else OUTPUT_HEADS
        return any(fnmatchcase(layer, pattern) for pattern in (*self.skip, *heads))

    def counts_for(self, layer: str) -> tuple[int, int, int] | None:
        """The counts that ``counts`` gives a layer; None if no glob matches."""
        matches = (counts for pattern, counts in self.counts if fnmatchcase(layer, pattern))
        return next(matches, None)

    def _one_of(self, name: str, valid: tuple) -> None:
        value = getattr(self, name)
        # The type is compared too: True == 1 and 32.0 == 32.
        if not any(value is v or (type(value) is type(v) and value == v) for v in valid):
            _reject(name, value, "one of " + ", ".join(map(repr, valid)))

    def _check_weight_only(self) -> None:
        """What says how activations are quantised is refused where they are not."""
        if self.weights != "match":
            _reject(
                "weights",
                self.weights,
                "format='mxfp4' with activations='bfloat16': it says the same",
            )
        if self.weight_rules is not None:
            expected = "left out with activations='bfloat16': rules are those of the weights"
            _reject("weight_rules", self.weight_rules, expected)
        if self.hadamard == "measured":
            expected = "segments, as in (4, 6), with activations='bfloat16': their error is what is measured"
            _reject("hadamard", self.hadamard, expected)
        if self.target is not None and not TARGETS[self.target].cpu:
            expected = "a CPU with activations='bfloat16': a GPU's time is modelled for quantised activations"
            _reject("target", self.target, expected)

    def _checked_lam(self, name: str, value: Any) -> float:
        if not _is_number(value) or not value > 0:
            _reject(name, value, "a positive number")
        if self.method != "thresholds" and value != 1:
            _reject(name, value, "left out: it scales thresholds, and this recipe has none")
        return float(value)

    def _checked_hadamard(self, name: str, value: Any) -> tuple[int, ...] | str:
        if value == "measured":
            if not self.has_budget:
                _reject(name, value, "segments, as in (4, 6); it is measured with bits or time")
            if self.weights != "match":
                _reject(name, value, "() or (4, 6, 8) with weights='mxfp4', which have one segment")
            return value
        if not _is_list(value) or tuple(value) not in list(ROTATIONS):
            _reject(name, value, "segments out of 4, 6 and 8, rising, as in (4, 6), or 'measured'")
        if self.weights == "mxfp4" and len(value) not in (0, 3):
            _reject(name, value, "() or (4, 6, 8) with weights='mxfp4', which have one segment")
        return tuple(value)

    def _checked_formats(self, name: str, value: Any) -> tuple[str, ...]:
        good = _is_list(value) and value and all(name in list(BITS) for name in value)
        if not good or len(set(value)) != len(value):
            _reject(name, value, f"some of {', '.join(BITS)}, each once")
        formats = tuple(sorted(value, key=BITS.get))
        if not self.has_budget and len(formats) < len(BITS):
            _reject(name, value, "left out: it limits what bits or time is spent on")
        return formats

    def _checked_bits(self, name: str, value: Any) -> float:
        low, high = BITS[self.formats[0]], BITS[self.formats[-1]]
        if not _is_number(value) or not low <= value <= high:
            _reject(name, value, f"a number from {low} to {high}, element bits of {self.formats}")
        return float(value)

    def _checked_time(self, name: str, value: Any) -> float:
        if self.target is None:
            _reject(name, value, f"beside a target: one of {', '.join(TARGETS)}")
        if not _is_number(value) or not 0 < value <= 1:
            _reject(name, value, "above 0 and at most 1, a fraction of the time of MXFP8")
        return float(value)

    def _checked_rows(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            _reject(name, value, "a whole number from 1")
        if self.time is None and value != 1:
            _reject(name, value, "left out: it is what time=... is modelled for")
        return value

    def _checked_counts(self, name: str, value: Any) -> tuple:
        expected = (
            "a mapping from layer globs to (k4, k6, k8), "
            f"each a multiple of {self.multiple} and not negative, not all zero"
        )
        try:
            items = tuple((k, tuple(v)) for k, v in dict(value).items())
        except (TypeError, ValueError):
            _reject(name, value, expected)
        for pattern, counts in items:
            good = isinstance(pattern, str) and len(counts) == 3 and any(counts)
            for k in counts:
                good = good and type(k) is int and k >= 0 and k % self.multiple == 0
            if not good:
                _reject(name, value, expected)
        if not items:
            _reject(name, value, expected)
        return items


def _reject(option: str, value: Any, expected: str) -> None:
    raise RecipeError(option=option, value=value, expected=expected)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _checked_split(name: str, value: Any) -> tuple[float, float, float]:
    good = _is_list(value) and len(value) == 3 and all(_is_number(p) and p >= 0 for p in value)
    if not good or abs(sum(value) - 1) > 1e-6:
        _reject(name, value, "three fractions (p4, p6, p8), not negative, that sum to 1")
    return tuple(float(p) for p in value)


def _checked_rules(name: str, value: Any) -> tuple[str, str, str]:
    if not _is_list(value) or len(value) != 3 or any(rule not in _RULES for rule in value):
        _reject(name, value, f"three of {', '.join(_RULES)}: for 4, 6 and 8 bits")
    return tuple(value)


def _checked_skip(name: str, value: Any) -> tuple[str, ...]:
    if not _is_list(value) or not all(isinstance(pattern, str) for pattern in value):
        _reject(name, value, "a sequence of layer name patterns, as in skip=('*.down_proj',)")
    return tuple(value)
