"""Statistics of the inputs of linear layers: streaming, in bounded memory, and mergeable.

The thresholds that they serve are those of MicroMix (arXiv 2508.02343).
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .allocation import allocate
from .errors import (
    EmptyCalibrationError,
    NonFiniteCalibrationError,
    StatisticsFileError,
    StatisticsMismatchError,
)
from .files import read_file, write_file
from .layers import LayerShape
from .recipe import Recipe
from .row_sample import RowSample

if TYPE_CHECKING:
    from .plan import ModelPlan

__all__ = ["ChannelStatistics", "ModelStatistics", "load_statistics", "thresholds"]

_KIND = "micromix_statistics"
_VERSION = 2
_TENSORS = ("total", "peak", "square", "histogram")
_SENSITIVITY = ("importance", "gradient")

# A bin of the histogram is the exponent and the upper mantissa bits of a float32 ratio in [0, 1]:
# 64 bins an octave, from 2^-20 (with all below it) up to 1, which has a bin to itself.
_MANTISSA_BITS = 6
_OCTAVES = 20
_SHIFT = 23 - _MANTISSA_BITS
_TOP = 127 << _MANTISSA_BITS  # the bin number of 1.0
_BINS = (_OCTAVES << _MANTISSA_BITS) + 1

# Elements. Below 2^15 torch runs an operation on one thread: waking the others costs more than they
# bring (half of the time is bincount, which has one anyway), and much more on a busy machine.
_CPU_CHUNK = (1 << 15) - 1
_DEVICE_CHUNK = 1 << 22
_SQUARE_SAFE = 1e15  # the squares of a chunk of larger values could overflow float32


def thresholds(form: str, lam: float = 1.0) -> tuple[float, float]:
    """(T4, T6) as fractions of the largest magnitude of a token row.

    An element of at most T4 goes to MXFP4, one of at most T6 to MXFP6, any other to MXFP8.
    ``form`` is "published", of MicroMix's released code: 448/6/2^10 and 448/28/2^6, where 448, 6
    and 28 are the largest elements of E4M3, E2M1 and E3M2; or "paper", of arXiv 2508.02343:
    2^b·2^(n-1)/q_max/254, with n bits, exponent bias b and largest element q_max of E2M1 and
    E3M2, which is 6.945 times tighter. Both are multiplied by ``lam``. Raises ValueError for
    another form.
    """
    if form == "published":
        return lam * 448 / 6 / 2**10, lam * 448 / 28 / 2**6
    if form == "paper":
        return lam * 2**1 * 2**3 / 6 / 254, lam * 2**3 * 2**5 / 28 / 254
    raise ValueError(f"unknown form of thresholds {form!r}; known: 'published', 'paper'")


class Fractions(NamedTuple):
    """The fractions of the elements of an input that want each format; they sum to 1."""

    p4: float
    p6: float
    p8: float


class ChannelStatistics:
    """What calibration keeps of one input ``[..., K]``; all on the CPU, about 300 K + 10 000 bytes.

    ``tokens``: rows seen. ``total`` float64 ``[K]``: Σ|x|. ``peak`` float32 ``[K]``: max |x|.
    ``square`` float64 ``[K]``: Σx². ``histogram`` int64: elements by |x| / max|row|, in bins 1/64
    octave wide; rows of zeros are left out of it, because they ask for no format.

    For a budget of bits (budget.py): with gradients g of the loss, ``importance`` float64 ``[K]`` is Σx²g² and
    ``gradient`` Σg², and ``sample`` holds rows drawn by |x|²|g|². Without, ``importance`` is Σx²/|x|², |x| being
    the norm of the row, so that no token weighs more than another (the first tokens of a text can be a thousand
    times as large), ``gradient`` is the number of rows, and the sample is even. ``graded`` tells which.
    """

    def __init__(self, channels: int) -> None:
        self.tokens = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device="cpu")
        self.peak = torch.zeros(channels, dtype=torch.float32, device="cpu")
        self.square = torch.zeros(channels, dtype=torch.float64, device="cpu")
        self.histogram = torch.zeros(_BINS, dtype=torch.int64, device="cpu")
        self.importance = torch.zeros(channels, dtype=torch.float64, device="cpu")
        self.gradient = torch.zeros(channels, dtype=torch.float64, device="cpu")
        self.sample = RowSample(channels)
        self.graded = False

    @property
    def channels(self) -> int:
        """K."""
        return len(self.total)

    @torch.no_grad()
    def update(self, x: Tensor, layer: str = "a layer", gradient: Tensor | None = None) -> None:
        """Adds the rows of ``x`` ``[..., K]``, of any float dtype and device; no rows are welcome.

        ``gradient`` is that of the loss by ``x``, same shape. ``layer`` is the name that errors give. Raises
        NonFiniteCalibrationError for NaN or Inf, and StatisticsMismatchError for another K, or where some
        rows come with gradients and others without; nothing of ``x`` has been added then.
        """
        if x.dim() == 0 or x.shape[-1] != self.channels:
            difference = f"{layer}: an input {list(x.shape)}, where K is {self.channels}"
            raise StatisticsMismatchError(differences=[difference])
        rows = x.detach().reshape(-1, self.channels)
        size = _CPU_CHUNK if x.device.type == "cpu" else _DEVICE_CHUNK
        new = ChannelStatistics(self.channels)
        new.graded = gradient is not None
        step = max(1, size // self.channels)
        slopes = None if gradient is None else gradient.detach().reshape(rows.shape).split(step)
        weights = [
            new._add(chunk, layer, None if slopes is None else slopes[i])
            for i, chunk in enumerate(rows.split(step))
        ]
        new.sample.add(rows, torch.cat(weights))
        self.merge(new)

    def _add(self, rows: Tensor, layer: str, slopes: Tensor | None) -> Tensor:
        """Adds one chunk of rows ``[M, K]``, and the loss's slopes there; returns their weights in the sample."""
        if not len(rows):
            return torch.empty(0, dtype=torch.float64, device=rows.device)
        magnitudes = rows.contiguous().abs().float()  # a copy, whatever the dtype
        row_peaks = magnitudes.amax(dim=1, keepdim=True)
        largest = float(row_peaks.max())  # NaN wins over all else
        if not math.isfinite(largest):
            raise NonFiniteCalibrationError(layer=layer)
        wide = magnitudes.double() if largest > _SQUARE_SAFE else magnitudes
        self.tokens += len(rows)
        self.total += wide.sum(dim=0).cpu()
        self.peak = torch.maximum(self.peak, magnitudes.amax(dim=0).cpu())
        squares = wide.square()
        self.square += squares.sum(dim=0).cpu()
        self.histogram += _histogram(magnitudes, row_peaks)
        return self._add_sensitivity(squares, slopes, layer)

    def _add_sensitivity(self, squares: Tensor, slopes: Tensor | None, layer: str) -> Tensor:
        energy = squares.sum(dim=1, dtype=torch.float64)
        if slopes is None:
            real = energy > 0
            inverse = torch.where(real, 1 / energy, 0.0).unsqueeze(1)
            self.importance += (squares * inverse).sum(dim=0).cpu()
            self.gradient += len(squares)
            return real.double()
        slopes = slopes.double().square()  # of a mean loss they may be too small for float32
        steepness = slopes.sum(dim=1)
        if not bool(steepness.isfinite().all()):
            raise NonFiniteCalibrationError(layer=f"{layer} (its gradient)")
        self.importance += (squares * slopes).sum(dim=0).cpu()
        self.gradient += slopes.sum(dim=0).cpu()
        return energy * steepness

    def merge(self, other: ChannelStatistics) -> None:
        """Adds the rows that ``other`` has seen.

        Raises StatisticsMismatchError for another K, or if only one of both has gradients.
        """
        if other.channels != self.channels:
            difference = f"{self.channels} channels here, {other.channels} there"
            raise StatisticsMismatchError(differences=[difference])
        if self.tokens and other.tokens and self.graded != other.graded:
            known, new = (
                "with gradients" if s.graded else "without gradients" for s in (self, other)
            )
            raise StatisticsMismatchError(differences=[f"rows {known} here, {new} there"])
        if other.tokens:
            self.graded = other.graded
        # Not in place: tensors made under inference_mode could not be changed outside of it.
        self.tokens += other.tokens
        self.total = self.total + other.total
        self.peak = torch.maximum(self.peak, other.peak)
        self.square = self.square + other.square
        self.histogram = self.histogram + other.histogram
        self.importance = self.importance + other.importance
        self.gradient = self.gradient + other.gradient
        self.sample.merge(other.sample)

    def metric(self, sort: str) -> Tensor:
        """What channels are sorted by, float64 ``[K]``: "mean" or "max" of |x|, "hessian" E[x²]."""
        if sort == "max":
            return self.peak.double()
        sums = {"mean": self.total, "hessian": self.square}[sort]
        return sums / max(1, self.tokens)

    def fraction_below(self, ratio: float) -> float:
        """The fraction of elements with |x| <= ratio · max|row|, as the mean over rows.

        Exact at the edges of bins (1/64 octave), linear between them. 1.0 if all rows were zero.
        """
        count = int(self.histogram.sum())
        if ratio >= 1 or count == 0:
            return 1.0
        position = _bin_position(ratio)
        whole = math.floor(position)
        below = int(self.histogram[:whole].sum())
        inside = int(self.histogram[whole]) * (position - whole)
        return (below + inside) / count

    def fractions(self, form: str, lam: float = 1.0) -> Fractions:
        """The fractions of elements in (0, T4], (T4, T6] and above; see :func:`thresholds`."""
        p4, p46 = (self.fraction_below(t) for t in thresholds(form, lam))
        return Fractions(p4, p46 - p4, 1 - p46)


def _histogram(magnitudes: Tensor, row_peaks: Tensor) -> Tensor:
    # In a row of zeros the ratios are 0, in bin 0; they are taken out of it again below.
    ratios = magnitudes / row_peaks.clamp(min=torch.finfo(torch.float32).tiny)
    # The bits of a positive float sort as it does, and their upper part is a bin number.
    numbers = ratios.view(torch.int32).bitwise_right_shift_(_SHIFT)
    counts = torch.bincount(numbers.flatten(), minlength=_TOP + 1).cpu()
    result = counts[-_BINS:].clone()
    result[0] += counts[:-_BINS].sum()
    result[0] -= magnitudes.shape[1] * (row_peaks == 0).sum().cpu()
    return result


def _bin_position(ratio: float) -> float:
    """Where a ratio below 1 falls among the bins: the number of its bin, plus a part of it."""
    if ratio < 2.0**-_OCTAVES * (1 + 2.0**-_MANTISSA_BITS):
        return max(0.0, ratio / (2.0**-_OCTAVES * (1 + 2.0**-_MANTISSA_BITS)))
    mantissa, exponent = math.frexp(ratio)  # in [0.5, 1): one octave, linear within
    return ((exponent - 1 + _OCTAVES) + (2 * mantissa - 1)) * 2**_MANTISSA_BITS


class ModelStatistics:
    """The statistics of all linear layers of a model; layers that read the same input share them.

    ``layers``: name -> LayerShape, in the order they were seen. ``columns``: name -> float64 ``[K]``, Σw² of each
    column of the layer's weight, where calibration has seen the weight.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerShape] = {}
        self.columns: dict[str, Tensor] = {}
        self._statistics: dict[str, ChannelStatistics] = {}

    def add_group(self, layers: Mapping[str, LayerShape]) -> None:
        """Says that these layers read one input. Calling it again changes nothing.

        Two graphs may group the layers differently (one call has a graph break that the other
        lacks, or a layer is used twice). Groups that overlap become one: each layer must end with
        one plan. Raises StatisticsMismatchError if the layers differ in K, or a shape differs
        from what is known.
        """
        shapes = {name: LayerShape(*shape) for name, shape in layers.items()}
        widths = sorted({shape.in_features for shape in shapes.values()})
        differences = _shape_differences(self.layers, shapes)
        if len(widths) > 1:
            differences.append(f"{', '.join(shapes)}: one input with K of {widths}")
        if differences:
            raise StatisticsMismatchError(differences=differences)
        if not shapes:
            return
        known = {id(s): s for n, s in self._statistics.items() if n in shapes}
        shared, *others = known.values() or [ChannelStatistics(widths[0])]
        for other in others:
            shared.merge(other)
        for name, statistics in self._statistics.items():
            if id(statistics) in known:
                self._statistics[name] = shared
        self.layers.update(shapes)
        self._statistics.update(dict.fromkeys(shapes, shared))

    def update(self, layer: str, x: Tensor, gradient: Tensor | None = None) -> None:
        """Adds an input ``[..., K]`` of the group that this layer is in, and the loss's gradient there.

        Raises KeyError for an unknown layer, else as ChannelStatistics.update.
        """
        self._statistics[layer].update(x, layer, gradient)

    @torch.no_grad()
    def add_weight(self, layer: str, weight: Tensor) -> None:
        """Keeps the energy of the columns of a layer's weight, of any float dtype; the first call counts.

        Raises KeyError for an unknown layer.
        """
        rows = 0 if not self.layers[layer].transposed else 1
        if layer not in self.columns:
            energy = weight.detach().float().square().sum(dim=rows, dtype=torch.float64)
            self.columns[layer] = energy.cpu()

    def __getitem__(self, layer: str) -> ChannelStatistics:
        return self._statistics[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def groups(self) -> Iterator[tuple[tuple[str, ...], ChannelStatistics]]:
        """The layers of each group, in the order they were seen, and their statistics."""
        names: dict[int, list[str]] = {}
        for name, statistics in self._statistics.items():
            names.setdefault(id(statistics), []).append(name)
        for members in names.values():
            yield tuple(members), self._statistics[members[0]]

    @property
    def tokens(self) -> int:
        """The most tokens that any input has seen."""
        return max((s.tokens for s in self._statistics.values()), default=0)

    def require_tokens(self, layers: Iterable[str] | None = None) -> None:
        """Raises EmptyCalibrationError if one of these layers (None: any layer) saw no token."""
        names = self.layers if layers is None else layers
        empty = [name for name in names if not self._statistics[name].tokens]
        if empty or not self.layers:
            raise EmptyCalibrationError(empty)

    def plan(self, recipe: Recipe | None = None) -> ModelPlan:
        """Allocates formats to channels, as ``Calibration.plan`` does, without a model: weights are rounded to nearest.

        Raises EmptyCalibrationError if a layer saw no token, and RecipeError for a recipe that does not fit the
        layers, or rounds by GPTQ.
        """
        return allocate(self, recipe or Recipe())

    def merge(self, other: ModelStatistics) -> None:
        """Adds what another run of the same model has seen.

        Raises StatisticsMismatchError, and changes nothing, if layers or shapes differ, or some rows come with
        gradients and others without.
        """
        differences = _shape_differences(self.layers, other.layers)
        differences += [f"{n}: only in the first" for n in self.layers if n not in other.layers]
        differences += [f"{n}: only in the second" for n in other.layers if n not in self.layers]
        here, there = (
            {statistics.graded for _, statistics in part.groups() if statistics.tokens}
            for part in (self, other)
        )
        if len(here | there) > 1:
            known, new = (
                " and ".join(f"with{'' if graded else 'out'} gradients" for graded in sorted(part))
                for part in (here, there)
            )
            differences.append(f"rows {known or 'none'} here, {new or 'none'} there")
        if differences:
            raise StatisticsMismatchError(differences=differences)
        for names, statistics in other.groups():
            self.add_group({name: other.layers[name] for name in names})
            self._statistics[names[0]].merge(statistics)
        self.columns = other.columns | self.columns

    def save(self, path: str | os.PathLike) -> None:
        """Writes the statistics as safetensors, atomically. Raises OSError if that fails."""
        groups = dict(self.groups())
        number = {name: i for i, names in enumerate(groups) for name in names}
        content = {
            "layers": {name: [number[name], *shape] for name, shape in self.layers.items()},
            "tokens": [statistics.tokens for statistics in groups.values()],
            "graded": [statistics.graded for statistics in groups.values()],
        }
        tensors = {
            f"{key}.{i}": getattr(statistics, key)
            for i, statistics in enumerate(groups.values())
            for key in (*_TENSORS, *_SENSITIVITY)
        }
        for i, statistics in enumerate(groups.values()):
            tensors[f"sample.rows.{i}"] = statistics.sample.rows
            tensors[f"sample.keys.{i}"] = statistics.sample.keys
        tensors |= {f"columns.{name}": energy for name, energy in self.columns.items()}
        write_file(path, _KIND, _VERSION, content, tensors)


def load_statistics(path: str | os.PathLike) -> ModelStatistics:
    """Reads statistics that :meth:`ModelStatistics.save` wrote.

    Raises StatisticsFileError if the file is missing, truncated, damaged or not statistics, and
    FileVersionError if a newer version wrote it.
    """
    content, tensors = read_file(path, _KIND, _VERSION, StatisticsFileError)
    result = ModelStatistics()
    try:
        groups: dict[int, ChannelStatistics] = {}
        for name, (i, *facts) in content["layers"].items():
            shape = LayerShape(*facts)
            if operator.index(shape.out_features) < 1:
                raise ValueError(f"{name} has {shape}")
            if i not in groups:
                groups[i] = _loaded_group(i, shape.in_features, content, tensors)
            if groups[i].channels != shape.in_features:
                raise ValueError(f"{name} has another K than its group")
            result.layers[name], result._statistics[name] = shape, groups[i]
            if f"columns.{name}" in tensors:
                empty = torch.empty(shape.in_features, dtype=torch.float64, device="cpu")
                result.columns[name] = _checked("columns", tensors[f"columns.{name}"], empty)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"its content is damaged ({error})"
        raise StatisticsFileError(path=os.fspath(path), reason=reason) from error
    return result


def _loaded_group(
    i: int, channels: int, content: Mapping, tensors: dict[str, Tensor]
) -> ChannelStatistics:
    total = tensors[f"total.{i}"]
    if total.shape != (channels,):  # a number of the file alone allocates nothing
        raise ValueError(f"total is {total.dtype} {list(total.shape)}")
    result = ChannelStatistics(channels)
    result.tokens = operator.index(content["tokens"][i])
    keys = _TENSORS
    if "graded" in content:  # a file of version 1 has nothing that a budget of bits needs
        keys = (*_TENSORS, *_SENSITIVITY)
        result.graded = bool(content["graded"][i])
        sample, size = result.sample, len(tensors[f"sample.keys.{i}"])
        for key, like in (
            ("rows", sample.rows.new_empty(size, channels)),
            ("keys", sample.keys.new_empty(size)),
        ):
            setattr(sample, key, _checked(f"sample.{key}", tensors[f"sample.{key}.{i}"], like))
    for key in keys:
        setattr(result, key, _checked(key, tensors[f"{key}.{i}"], getattr(result, key)))
    return result


def _checked(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, which must be finite and have the shape and the type of another."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or Inf")
    return tensor


def _shape_differences(known: Mapping[str, LayerShape], new: Mapping[str, LayerShape]) -> list[str]:
    return [
        f"{name}: {known[name]} before, {shape} now"
        for name, shape in new.items()
        if name in known and known[name] != shape
    ]
