"""Perplexity against hand-computed values, and decoding through a static cache against the model itself."""

import math
import statistics

import pytest
import torch
from tiny_llama import VOCABULARY, tiny_llama

from micromix_compile import evaluate
from micromix_compile.errors import EvaluationError
from micromix_compile.evaluate import Decoder, Perplexity, decode_speed, perplexity


def uniform(input_ids):
    return torch.zeros(1, input_ids.shape[1], 10)


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    windows = torch.randint(0, 10, (3, 8))
    measured = perplexity(uniform, windows, label=None)
    assert measured.value == pytest.approx(10)
    assert measured.tokens == 3 * 7
    assert measured.standard_error == pytest.approx(0, abs=1e-5)


def test_every_token_is_predicted_from_the_one_before_it():
    """A model that knows that tokens count upwards: probability 1/2 on the next one, the rest spread."""

    def counting(input_ids):
        logits = torch.full((1, input_ids.shape[1], 10), math.log(0.5 / 9))
        following = (input_ids + 1) % 10
        return logits.scatter_(2, following[..., None], math.log(0.5))

    windows = torch.arange(12).remainder(10)[None]
    assert perplexity(counting, windows, label=None).value == pytest.approx(2)


def test_context_is_not_scored():
    def wrong_on_the_first_three(input_ids):
        logits = torch.zeros(1, input_ids.shape[1], 10)
        logits[0, :3, 9] = 50.0
        return logits

    windows = torch.zeros(2, 8, dtype=torch.int64)
    measured = perplexity(wrong_on_the_first_three, windows, context=4, label=None)
    assert measured.value == pytest.approx(10)
    assert measured.tokens == 2 * 4


def test_agrees_with_the_loss_of_the_model():
    model = tiny_llama(torch.float32)
    windows = torch.randint(0, VOCABULARY, (4, 16))
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    measured = perplexity(model, windows, label=None)
    assert measured.losses == pytest.approx(losses, rel=1e-5)
    assert measured.value == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-5)


def test_standard_error_is_first_order():
    """losses 1 and 2: mean 1.5, standard deviation 0.7071, over sqrt(2): 0.5, times exp(1.5)."""
    assert Perplexity((1.0, 2.0), 10).standard_error == pytest.approx(0.5 * math.exp(1.5))
    assert math.isnan(Perplexity((1.0,), 10).standard_error)


def test_increase_is_paired():
    """What both share cancels: a constant difference of 0.1 nat has no error at all."""
    base = Perplexity((1.0, 2.0, 5.0), 30)
    worse = Perplexity((1.1, 2.1, 5.1), 30)
    increase, error = worse.increase_over(base)
    assert increase == pytest.approx(math.exp(0.1) - 1)
    assert error == pytest.approx(0, abs=1e-12)
    with pytest.raises(EvaluationError, match="different windows"):
        worse.increase_over(Perplexity((1.0,), 10))


def test_output_that_is_not_finite():
    def broken(input_ids):
        return torch.full((1, input_ids.shape[1], 10), math.nan)

    with pytest.raises(EvaluationError, match="NaN or Inf"):
        perplexity(broken, torch.zeros(1, 4, dtype=torch.int64), label=None)


@pytest.mark.parametrize("shape, context", [((0, 8), 0), ((2, 1), 0), ((2, 8), 7)])
def test_nothing_to_score(shape, context):
    with pytest.raises(EvaluationError, match="no token"):
        perplexity(uniform, torch.zeros(shape, dtype=torch.int64), context, label=None)


def test_decoder_continues_as_the_model_without_a_cache_does():
    model = tiny_llama(torch.float32)
    prompt, expected = [3, 1, 4, 1, 5], []
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.tensor([prompt + expected])
            expected.append(int(model(input_ids=tokens).logits[0, -1].argmax()))
    decoder = Decoder(model, max_tokens=32)
    assert decoder.generate(prompt, 12) == expected
    assert decoder.generate(prompt, 12) == expected  # a second time: nothing is left of the first
    stop = expected[4]
    assert decoder.generate(prompt, 12, stop) == expected[: expected.index(stop)]


def test_compiled_decoder_makes_one_graph():
    model = tiny_llama(torch.float32)
    graphs = []

    def count(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    step = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    decoder = Decoder(model, step, max_tokens=32)
    assert decoder.generate([3, 1, 4], 8) == Decoder(model, max_tokens=32).generate([3, 1, 4], 8)
    decode_speed({"compiled": decoder}, tokens=3, rounds=2, label=None)
    assert len(graphs) == 1


def test_decoder_that_is_full_or_has_no_prompt():
    decoder = Decoder(tiny_llama(), max_tokens=4)
    with pytest.raises(EvaluationError, match="holds 4 tokens"):
        decoder.generate([1, 2, 3], 8)
    with pytest.raises(EvaluationError, match="prompt is empty"):
        decoder.generate([], 8)


class Fake:
    """A decoder whose token takes as long as it is told, on a clock that only it moves."""

    now = 0.0

    def __init__(self, calls, name, seconds):
        self.calls, self.name, self.seconds = calls, name, seconds

    def restart(self):
        self.calls.append(self.name)

    def feed(self, token):
        Fake.now += next(self.seconds)
        return token


def test_decode_speed_takes_turns_and_medians(monkeypatch):
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: Fake.now)
    calls = []
    # The first round warms up and is not counted. Then the machine halves its speed for both: the ratio does not see it.
    a = Fake(calls, "a", iter([9, 9, 1, 1, 2, 2, 2, 2]))
    b = Fake(calls, "b", iter([9, 9, 0.5, 0.5, 1, 1, 0.5, 0.5]))
    speeds = decode_speed({"a": a, "b": b}, tokens=2, rounds=3, label=None)
    assert calls == ["a", "b"] * 4
    assert speeds["a"].rates == (1.0, 0.5, 0.5)
    assert speeds["a"].tokens_per_second == 0.5
    assert speeds["a"].ratio == 1.0
    assert speeds["b"].rates == (2.0, 1.0, 2.0)
    assert speeds["b"].ratio == 2.0


def test_decode_speed_of_nothing():
    with pytest.raises(EvaluationError):
        decode_speed({})


def test_comparing_a_model_with_itself():
    model, windows = tiny_llama(), torch.randint(0, VOCABULARY, (3, 24))
    found = evaluate.compare(model, model, windows, label=None)
    assert found.base == found.model == perplexity(model, windows, label=None)
    assert found.divergence == pytest.approx((0, 0), abs=1e-6)
    assert found.agreement == (1, 0)
    assert found.increase[0] == 0


def test_divergence_and_agreement_by_hand():
    """One model says 1/2, 1/4, 1/4, the other 1/4, 1/2, 1/4: KL = ln(2) / 4, and never the same first choice."""

    def constant(*probabilities):
        logits = torch.tensor(probabilities).log()
        return lambda input_ids: logits.expand(1, input_ids.shape[1], 3)

    windows = torch.zeros(2, 6, dtype=torch.int64)
    found = evaluate.compare(
        constant(0.5, 0.25, 0.25), constant(0.25, 0.5, 0.25), windows, context=2, label=None
    )
    assert found.divergence[0] == pytest.approx(math.log(2) / 4)
    assert found.agreement[0] == 0
    assert found.base.value == pytest.approx(2)
    assert found.model.value == pytest.approx(4)
    assert found.base.tokens == 2 * 4
