"""Perplexity with its standard error, two models compared, and decode speed of several variants measured side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import truediv
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, StaticCache

from micromix_compile.errors import EvaluationError


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on token windows. `losses`: the mean negative log-likelihood of each window, in nats."""

    losses: tuple[float, ...]
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(statistics.fmean(self.losses))

    @property
    def standard_error(self) -> float:
        """Of `value`, to first order; a window is one sample, since the tokens of a text are not independent."""
        return self.value * _standard_error(self.losses)

    def increase_over(self, base: Perplexity) -> tuple[float, float]:
        """Relative increase over `base` and its standard error, e.g. `(0.035, 0.004)`: +3.5 %.

        Both must come from the same windows: the difference is taken window by window, so what makes a window hard cancels.
        """
        if len(self.losses) != len(base.losses) or self.tokens != base.tokens:
            raise EvaluationError(
                reason="the two perplexities come from different windows",
                mend="Measure both on the same ones",
            )
        ratio = self.value / base.value
        differences = [a - b for a, b in zip(self.losses, base.losses, strict=True)]
        return ratio - 1, ratio * _standard_error(differences)


def _standard_error(samples: Iterable[float]) -> float:
    samples = tuple(samples)
    return statistics.stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan


@torch.no_grad()
def perplexity(
    forward: Callable[[torch.Tensor], object],
    windows: torch.Tensor,
    context: int = 0,
    label: str | None = "perplexity",
) -> Perplexity:
    """Perplexity of `forward` over `windows` (int64 `[windows, length]`).

    `forward` takes `[1, length]` token ids by the name `input_ids` and returns logits `[1, length, vocabulary]`, bare or as `.logits`: a model, or
    what torch.compile made of one. Each token after the first of a window is predicted from those before it; of these,
    the first `context` are not scored (overlapping windows: see `models.token_windows`). `label=None` hides the progress bar.
    Raises `EvaluationError` when a loss is not finite.
    """
    first = _first_scored(windows, context)
    losses = []
    for window in tqdm(windows, desc=label, unit="window", disable=label is None, leave=False):
        losses.append(_loss(_logits(forward, window)[first - 1 : -1], window[first:]))
    return Perplexity(_finite(losses), len(windows) * (windows.shape[1] - first))


@dataclass(frozen=True)
class Comparison:
    """Two models on the same windows: the perplexity of both, and how far apart their predictions are.

    `divergences`: the mean Kullback-Leibler divergence KL(base ‖ model) of the next token's distribution, in nats, and
    `agreements`: the fraction of tokens where both find the same next token likeliest, for each window.
    """

    base: Perplexity
    model: Perplexity
    divergences: tuple[float, ...]
    agreements: tuple[float, ...]

    @property
    def increase(self) -> tuple[float, float]:
        """As `Perplexity.increase_over`."""
        return self.model.increase_over(self.base)

    @property
    def divergence(self) -> tuple[float, float]:
        """The mean divergence in nats and its standard error."""
        return statistics.fmean(self.divergences), _standard_error(self.divergences)

    @property
    def agreement(self) -> tuple[float, float]:
        """The mean agreement, from 0 to 1, and its standard error."""
        return statistics.fmean(self.agreements), _standard_error(self.agreements)


@torch.no_grad()
def compare(
    base: Callable[[torch.Tensor], object],
    forward: Callable[[torch.Tensor], object],
    windows: torch.Tensor,
    context: int = 0,
    label: str | None = "comparing",
) -> Comparison:
    """Both models on every window, side by side; arguments and errors are those of `perplexity`."""
    first = _first_scored(windows, context)
    losses: tuple[list[float], list[float]] = ([], [])
    divergences, agreements = [], []
    for window in tqdm(windows, desc=label, unit="window", disable=label is None, leave=False):
        expected, found = (_logits(model, window)[first - 1 : -1] for model in (base, forward))
        for own, logits in zip(losses, (expected, found), strict=True):
            own.append(_loss(logits, window[first:]))
        expected, found = (logits.float().log_softmax(-1) for logits in (expected, found))
        divergence = F.kl_div(found, expected, reduction="batchmean", log_target=True)
        divergences.append(divergence.item())
        agreements.append((expected.argmax(-1) == found.argmax(-1)).float().mean().item())
    tokens = len(windows) * (windows.shape[1] - first)
    return Comparison(
        *(Perplexity(_finite(own), tokens) for own in losses), tuple(divergences), tuple(agreements)
    )


@contextmanager
def lowered(
    model: torch.nn.Module,
    options: Mapping[str, Any],
    *,
    dynamic: bool = False,
    fullgraph: bool = False,
) -> Iterator[Callable]:
    """`model` under these options of the backend, as its lowered graph without Inductor, which compiles in seconds.

    The operators and packed weights are those of a compiled model.
    """
    options = {**options, "inductor": False}
    try:
        yield torch.compile(
            model, backend="micromix", options=options, dynamic=dynamic, fullgraph=fullgraph
        )
    finally:
        torch.compiler.reset()  # Dynamo gives up, silently, on the ninth variant of one function


def _first_scored(windows: torch.Tensor, context: int) -> int:
    """The first token of a window that is scored."""
    if len(windows) == 0 or not 0 <= context < windows.shape[1] - 1:
        raise EvaluationError(
            reason="no token would be scored",
            mend="Give at least one window that is longer than its context by 2 tokens",
        )
    return max(context, 1)


def _logits(forward: Callable[[torch.Tensor], object], window: torch.Tensor) -> torch.Tensor:
    """`[length, vocabulary]`."""
    output = forward(input_ids=window[None])
    return getattr(output, "logits", output)[0]


def _loss(logits: torch.Tensor, target: torch.Tensor) -> float:
    """The mean negative log-likelihood, computed in float32.

    Of a few tokens at a time: those of all, in float32, would be fresh memory of hundreds of megabytes.
    """
    pairs = zip(logits.split(32), target.to(logits.device).split(32), strict=True)
    sums = [F.cross_entropy(few.float(), own, reduction="sum") for few, own in pairs]
    return torch.stack(sums).double().sum().item() / len(target)


def _finite(losses: list[float]) -> tuple[float, ...]:
    if not all(map(math.isfinite, losses)):
        raise EvaluationError(
            reason="the model's output holds NaN or Inf",
            mend="Check the model in bfloat16 and without a plan first",
        )
    return tuple(losses)


class Decoder:
    """Greedy decoding, one token a call, through one compiled step over a static cache.

    Every token, the prompt's too, goes through the step for one token, so one graph serves and nothing runs uncompiled. `step` is the model or
    what torch.compile made of it; `model` gives the configuration and makes the cache's tensors.
    """

    def __init__(self, model: PreTrainedModel, step: Callable | None = None, max_tokens: int = 256):
        self.model = model
        self.step = model if step is None else step
        self.max_tokens = max_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=max_tokens)
        # One uncompiled token: the cache allocates itself at its first use, which inside a compiled step would mean a second graph.
        with torch.no_grad():
            model(input_ids=self._token(0), past_key_values=self.cache, use_cache=True)
        self.restart()

    def _token(self, token: int) -> torch.Tensor:
        return torch.tensor([[token]], device=self.model.device)

    def restart(self) -> None:
        """Forget every token."""
        self.cache.reset()
        self.length = 0

    def feed(self, token: int) -> int:
        """Put one token behind the others; returns the likeliest next one."""
        if self.length == self.max_tokens:
            raise EvaluationError(
                reason=f"the cache holds {self.max_tokens} tokens and is full",
                mend="Use a shorter prompt, fewer new tokens, or a larger max_tokens",
            )
        self.length += 1
        with torch.no_grad():
            output = self.step(
                input_ids=self._token(token), past_key_values=self.cache, use_cache=True
            )
        # Not argmax, which takes six times as long in bfloat16 on a CPU.
        return int(output.logits[0, -1].float().max(0).indices)

    def generate(
        self, prompt: Iterable[int], new_tokens: int, stop: int | None = None
    ) -> list[int]:
        """The greedy continuation of `prompt`, at most `new_tokens` long, up to and without the token `stop`."""
        self.restart()
        token = None
        for given in prompt:
            token = self.feed(given)
        if token is None:
            raise EvaluationError(reason="the prompt is empty", mend="Give at least one token")
        tokens: list[int] = []
        while token != stop and len(tokens) < new_tokens:
            tokens.append(token)
            if len(tokens) < new_tokens:
                token = self.feed(token)
        return tokens


@dataclass(frozen=True)
class DecodeSpeed:
    """Decode speed of one variant: `rates` in tokens per second, one a round; `ratio` to the first variant."""

    rates: tuple[float, ...]
    ratio: float

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(self.rates)


def decode_speed(
    decoders: Mapping[str, Decoder],
    tokens: int = 16,
    rounds: int = 7,
    label: str | None = "decode speed",
) -> dict[str, DecodeSpeed]:
    """Decode speed of several variants at batch 1, measured in turns (A B C A B C ...).

    Each round times `tokens` steps of each variant from an empty cache. In turns, since a machine's speed drifts: `tokens_per_second` is the
    median over the rounds, `ratio` the median over the rounds of the ratio to the first variant in the same round.
    One untimed round goes before, which also compiles what is not compiled yet.
    """
    if tokens < 1 or rounds < 1 or not decoders:
        raise EvaluationError(
            reason=f"{len(decoders)} variants, {tokens} tokens, {rounds} rounds",
            mend="Give at least one of each",
        )
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    turns = [(turn, name) for turn in range(rounds + 1) for name in decoders]
    for turn, name in tqdm(turns, desc=label, unit="turn", disable=label is None, leave=False):
        decoder = decoders[name]
        decoder.restart()
        token, began = 0, time.perf_counter()
        for _ in range(tokens):
            token = decoder.feed(token)
        if turn > 0:
            rates[name].append(tokens / (time.perf_counter() - began))
    base = rates[next(iter(decoders))]
    return {
        name: DecodeSpeed(tuple(own), statistics.median(map(truediv, own, base)))
        for name, own in rates.items()
    }
