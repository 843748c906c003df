"""The perplexity of a real model: calibrated on one half of a text, measured on the other, both ways round."""

from __future__ import annotations

import math

import pytest
import torch

from micromix_compile import Recipe, calibrate, evaluate, explain, models
from micromix_compile.reference import reference_model

WINDOWS, LENGTH = 12, 2048


@pytest.fixture(scope="module")
def fast_smollm2(smollm2):
    """In the type in which this machine gets through the text in minutes."""
    dtype = models.fast_dtype()
    return smollm2 if dtype == torch.bfloat16 else models.load("smollm2", dtype)


@pytest.fixture(scope="module")
def halves(fast_smollm2):
    """Of each half of the text: its windows, their calibration, and the perplexity of the float model."""
    model, tokenizer = fast_smollm2
    found = []
    for half in models.halves(models.builtin_text()):
        windows = models.token_windows(tokenizer, half, LENGTH, WINDOWS)
        with calibrate(model) as calibration:  # which changes no number
            exact = evaluate.perplexity(model, windows, label=None)
        found.append((windows, calibration, exact))
    return found


@pytest.mark.parametrize("seen", [0, 1])
def test_the_published_setting_and_mxfp8_lose_no_more_than_they_should(fast_smollm2, halves, seen):
    model, _ = fast_smollm2
    _, calibration, _ = halves[seen]
    unseen, _, exact = halves[1 - seen]
    for recipe, bar in ((Recipe.micromix(), 0.22), (Recipe(format="mxfp8"), 0.045)):
        plan = calibration.plan(recipe)
        options = {"plan": plan, "strict": True, "inductor": False}
        compiled = torch.compile(model, backend="micromix", options=options, fullgraph=True)
        increase, _ = evaluate.perplexity(compiled, unseen, label=None).increase_over(exact)
        assert 0.005 < increase <= bar
        rows = [row for row in explain(compiled).layers.values() if not row.reason]
        assert len(rows) == 7 * model.config.num_hidden_layers
        before = sum(row.bytes_before for row in rows) * 2 / model.dtype.itemsize  # in bfloat16
        size = sum(row.bytes_after for row in rows) / before
        assert size <= (0.35 if recipe.format is None else 0.53)
        torch.compiler.reset()


@pytest.fixture(scope="module")
def calibrated(smollm2):
    model, tokenizer = smollm2
    seen, unseen = models.halves(models.builtin_text())
    windows = models.token_windows(tokenizer, seen, 192, 4)
    return calibrate(model).run([{"input_ids": window[None]} for window in windows]), unseen


@pytest.mark.parametrize(
    ("recipe", "length", "windows", "differ"),
    [
        (Recipe(format="mxfp4"), 192, 4, 0),
        (Recipe(split=(0.5, 0.5, 0), hadamard=(4, 6)), 192, 4, 0),
        (Recipe(), 24, 12, 3),
    ],
    ids=["mxfp4", "rotated", "default"],
)
def test_the_kernels_have_the_perplexity_of_the_reference_arithmetic(
    recipe, length, windows, differ, smollm2, calibrated
):
    """Where sums are exact, everywhere. With MXFP8, whose sums depend on their order in the last bit, in three of four windows:
    one rounding that falls the other way, in a few hundred to a few thousand tokens, moves all tokens after it. So these
    windows are short, and many.
    """
    model, tokenizer = smollm2
    calibration, unseen = calibrated
    tokens = models.token_windows(tokenizer, unseen, length, windows)
    plan = calibration.plan(recipe)
    options = {"plan": plan, "strict": True, "inductor": False}
    compiled = torch.compile(model, backend="micromix", options=options, fullgraph=True)
    found = evaluate.perplexity(compiled, tokens, label=None).losses
    expected = evaluate.perplexity(reference_model(model, plan), tokens, label=None).losses
    differences = [abs(math.expm1(a - b)) for a, b in zip(found, expected, strict=True)]
    assert sum(not difference < 0.001 for difference in differences) <= differ  # NaN differs
