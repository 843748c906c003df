"""Hugging Face `generate` through the compiled model."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from architectures import VOCABULARY, build, token_ids

from micromix_compile import Recipe, calibrate, explain
from micromix_compile.packing import packings
from micromix_compile.reference import reference_model

NEW_TOKENS = 64


@pytest.fixture
def model_and_plan():
    model = build("llama")
    # A random model's logits are nearly flat; sharper ones make greedy decoding say more.
    model.lm_head.weight.data *= 20
    model.generation_config.eos_token_id = None
    plan = calibrate(model).run([token_ids(4, 24)]).plan(Recipe(split=(0.5, 0.25, 0.25)))
    return model, plan


def assert_same_greedy(tokens: torch.Tensor, reference: torch.nn.Module, prompt_length: int) -> int:
    """Each new token is the reference's own choice after the same tokens, or one of a near tie.

    Returns the number of near ties. The reference sees the whole sequence at once, so a token that differs does
    not end the comparison.
    """
    with torch.no_grad():
        logits = reference(tokens).logits[:, prompt_length - 1 : -1].float()
    new = tokens[:, prompt_length:]
    chosen = logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)
    gap = logits.amax(-1) - chosen
    spread = logits.std(-1)
    ties = gap > 0
    assert (gap <= 0.01 * spread)[ties].all(), (gap / spread)[ties]
    return int(ties.sum())


def test_dynamic_cache_gives_the_references_tokens(model_and_plan):
    model, plan = model_and_plan
    reference = reference_model(model, plan)
    plan.attach(model)
    prompt = token_ids(2, 11)
    model.compile(backend="micromix", dynamic=True)
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert tokens.shape == (2, 11 + NEW_TOKENS)
    assert explain(model).graphs >= 1
    assert assert_same_greedy(tokens, reference, 11) <= 1


def static_cache(**options) -> dict:
    compile_config = tf.CompileConfig(backend="micromix", mode=None, **options)
    compile_config._compile_all_devices = (
        True  # transformers compiles for accelerators only, unless told
    )
    return {
        "do_sample": False,
        "cache_implementation": "static",
        "compile_config": compile_config,
        "prefill_chunk_size": 64,  # without it transformers runs the prompt uncompiled, in float
    }


def test_static_cache_gives_the_references_tokens(model_and_plan):
    model, plan = model_and_plan
    reference = reference_model(model, plan)
    plan.attach(model)
    before = packings()
    arguments = static_cache(fullgraph=True)
    tokens = model.generate(token_ids(2, 11), max_new_tokens=NEW_TOKENS, **arguments)
    assert explain(model).graphs >= 1
    assert packings() - before == len(plan)
    assert assert_same_greedy(tokens, reference, 11) <= 1


def test_static_cache_five_prompt_lengths_make_two_graphs_and_one_packing(model_and_plan):
    model, plan = model_and_plan
    plan.attach(model)
    before = packings()
    for length in (5, 9, 16, 23, 40):
        arguments = static_cache(dynamic=True)
        tokens = model.generate(token_ids(2, length), max_new_tokens=5, **arguments)
        assert tokens.shape == (2, length + 5)
        assert tokens.max() < VOCABULARY
    assert explain(model).graphs == 2
    assert packings() - before == len(plan)


@pytest.mark.parametrize("inductor", [True, False])
def test_dynamic_cache_five_prompt_lengths_make_two_graphs_and_one_packing(
    model_and_plan, inductor
):
    model, plan = model_and_plan
    plan.attach(model)
    before = packings()
    model.compile(backend="micromix", dynamic=True, options={"inductor": inductor})
    for length in (5, 9, 16, 23, 40):
        tokens = model.generate(token_ids(2, length), max_new_tokens=5, do_sample=False)
        assert tokens.shape == (2, length + 5)
    assert explain(model).graphs == 2
    assert packings() - before == len(plan)
