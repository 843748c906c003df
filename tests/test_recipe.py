import copy
import dataclasses
import json
import pickle
import re

import pytest

from micromix_compile.errors import RecipeError
from micromix_compile.recipe import Recipe


def test_default_is_published_thresholds_with_e2m3_and_even():
    recipe = Recipe()
    assert recipe == Recipe(thresholds="published")
    assert (recipe.method, recipe.lam, recipe.format6) == ("thresholds", 1.0, "e2m3")
    assert recipe.rules == ("even", "ceil", "ceil")
    assert (recipe.weights, recipe.sort, recipe.multiple) == ("match", "mean", 32)


def test_micromix_is_the_published_setting():
    recipe = Recipe.micromix()
    assert (recipe.thresholds, recipe.lam, recipe.format6) == ("published", 1.0, "e3m2")
    assert recipe.rules == ("ceil", "ceil", "ceil")
    assert recipe.weights == "match"


RECIPES = [
    Recipe(),
    Recipe.micromix(),
    Recipe(thresholds="paper", lam=2, sort="hessian", multiple=128),
    Recipe(split=[0.5, 0.25, 0.25], weights="mxfp4", skip=["*.down_proj"]),
    Recipe(counts={"*.b": [32, 0, 64], "*": (64, 32, 0)}, include_lm_head=True),
    Recipe(format="mxfp6", format6="e3m2", weight_rules=["floor", "even", "ceil"]),
    Recipe(bits=4.5, hadamard=[4, 6], activations="bfloat16"),
    Recipe(time=0.7, target="sm_120", rows=16),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_dict_round_trip(recipe):
    twin = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert twin == recipe
    assert hash(twin) == hash(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe)


def test_the_order_of_counts_has_a_meaning():
    one, other = {"a*": (32, 0, 0), "*": (0, 32, 0)}, {"*": (0, 32, 0), "a*": (32, 0, 0)}
    assert Recipe(counts=one) != Recipe(counts=other)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("thresholds", "Published"),
        ("lam", 0),
        ("lam", -1.0),
        ("lam", float("nan")),
        ("lam", float("inf")),
        ("lam", True),
        ("lam", "1"),
        ("split", (0.5, 0.5)),
        ("split", (0.5, 0.5, 0.5)),
        ("split", (1.5, -0.5, 0.0)),
        ("split", "abc"),
        ("split", 0.5),
        ("split", (float("nan"), 0.5, 0.5)),
        ("counts", {}),
        ("counts", 7),
        ("counts", {"*": (32, 32)}),
        ("counts", {"*": (31, 0, 1)}),
        ("counts", {"*": (-32, 32, 32)}),
        ("counts", {"*": (0, 0, 0)}),
        ("counts", {"*": (32.0, 0, 0)}),
        ("counts", {3: (32, 0, 0)}),
        ("counts", {"*": 32}),
        ("format", "mxfp5"),
        ("hadamard", [[4], [6]]),
        ("formats", [["mxfp4"]]),
        ("format6", "e4m3"),
        ("rules", ("even", "ceil")),
        ("rules", ("even", "ceil", "rceil")),
        ("rules", "ceil"),
        ("weight_rules", ("ceil",)),
        ("weights", "mxfp8"),
        ("sort", "median"),
        ("multiple", 16),
        ("multiple", 96),
        ("multiple", 32.0),
        ("skip", "lm_head"),
        ("skip", (1,)),
        ("include_lm_head", 1),
    ],
)
def test_bad_values(option, value):
    with pytest.raises(RecipeError, match=option) as caught:
        Recipe(**{option: value})
    assert caught.value.facts["option"] == option


def test_a_bad_sequence_is_shown_as_it_was_given():
    with pytest.raises(RecipeError, match=re.escape("split = (0.5, 0.5, 0.5) does not work")):
        Recipe(split=(0.5, 0.5, 0.5))
    with pytest.raises(RecipeError, match=re.escape("rules = ['even', 'ceil'] does not work")):
        Recipe(rules=["even", "ceil"])


def test_counts_are_multiples_of_the_multiple():
    Recipe(counts={"*": (128, 0, 0)}, multiple=128)
    with pytest.raises(RecipeError, match="multiple of 128"):
        Recipe(counts={"*": (32, 96, 0)}, multiple=128)


def test_only_one_method():
    with pytest.raises(RecipeError, match="thresholds = .* left out beside format"):
        Recipe(thresholds="published", format="mxfp8")


def test_lam_needs_thresholds():
    with pytest.raises(RecipeError, match="lam"):
        Recipe(format="mxfp8", lam=2.0)


@pytest.mark.parametrize("options", [{"format": "mxfp8"}, {"bits": 5.0}])
def test_sort_needs_counts(options):
    with pytest.raises(RecipeError, match="sort"):
        Recipe(**options, sort="max")
    Recipe(**options, sort="mean")


def test_unknown_option():
    with pytest.raises(RecipeError, match=r"bitz.*the options are thresholds, lam, split"):
        Recipe.from_dict({"bitz": 5})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lam = 2.0


def test_skips_output_heads_unless_asked():
    heads = [
        "lm_head",
        "model.lm_head",
        "embed_out",
        "cls.predictions.decoder",
        "proj_out",
        "score",
        "classifier",
        "qa_outputs",
    ]
    layers = ["model.layers.0.mlp.up_proj", "decoder.layers.1.fc1", "blocks.0.proj_out"]
    for name in heads:
        assert Recipe().skips(name)
        assert not Recipe(include_lm_head=True).skips(name)
    for name in layers:
        assert not Recipe().skips(name)


def test_skip_patterns_match_full_names_and_case():
    recipe = Recipe(skip=("*.down_proj", "visual.*"), include_lm_head=True)
    assert recipe.skips("model.layers.3.mlp.down_proj")
    assert recipe.skips("visual.patch.proj")
    assert not recipe.skips("model.layers.3.mlp.Down_proj")
    assert not recipe.skips("model.layers.3.mlp.down_proj.base")
    assert not recipe.skips("lm_head")


def test_first_matching_counts_win():
    recipe = Recipe(counts={"*.1.*": (0, 0, 64), "*.up": (64, 0, 0)})
    assert recipe.counts_for("layers.1.up") == (0, 0, 64)
    assert recipe.counts_for("layers.2.up") == (64, 0, 0)
    assert recipe.counts_for("layers.2.down") is None


def test_a_sort_that_earlier_versions_saved_is_left_out():
    saved = Recipe(bits=5).to_dict() | {"sort": "hessian"}
    assert Recipe.from_dict(saved) == Recipe(bits=5)
    assert Recipe.from_dict({"sort": "max"}).sort == "max"


def test_a_head_that_counts_names_is_planned():
    assert Recipe(counts={"*": (32, 0, 0)}).skips("classifier")
    assert not Recipe(counts={"classifier": (32, 0, 0), "*": (64, 0, 0)}).skips("classifier")
