import copy
import json
import math
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from micromix_compile import files
from micromix_compile.attachment import attached, detach
from micromix_compile.errors import (
    FileVersionError,
    InvalidPlanError,
    OutputError,
    PlanFileError,
    PlanMismatchError,
    TiedLayersWarning,
    UnplannedLayersWarning,
)
from micromix_compile.layers import LayerShape
from micromix_compile.mx.layout import WEIGHT_IS_MXFP4, MixedLayout
from micromix_compile.plan import (
    LayerPlan,
    ModelPlan,
    load_plan,
)


def padded_order(k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.full((-k % 32,), -1)
    order = torch.cat([torch.randperm(k, generator=generator), padding])
    return order[torch.randperm(len(order), generator=generator)].to(torch.int32)


def layer_plan(k=96, **changes):
    """32 MXFP8 channels, 32 MXFP6, the rest MXFP4."""
    kp = -(-k // 32) * 32
    facts = {
        "in_features": k,
        "layout": MixedLayout(kp - 64, 32, 32),
        "order": padded_order(k),
        "group": "g",
    }
    return LayerPlan(**(facts | changes))


def model_plan(**changes):
    shared = layer_plan(96)
    layers = {
        "q": shared,
        "k": shared,
        "block.down": layer_plan(70, weights="mxfp4"),
        "block.conv": LayerPlan(64, MixedLayout(0, 0, 64)),
    }
    shapes = {
        "q": (8, 96),
        "k": (4, 96),
        "block.down": (96, 70),
        "block.conv": (16, 64, True),
    }
    return ModelPlan(layers | changes, shapes, {"format": "mxfp8"})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(96, 8)
        self.k = nn.Linear(96, 4, bias=False)
        self.other = nn.Linear(96, 4)
        self.block = nn.Module()
        self.block.down = nn.Linear(70, 96)
        self.block.conv = Conv1D(16, 64)


# --- LayerPlan ---


def test_weight_layout():
    layer = layer_plan()
    assert layer.weight_layout == layer.layout
    assert layer.weight_rules == layer.layout.rules
    assert layer.format_code == layer.layout.code
    narrow = layer_plan(weights="mxfp4", weight_rules=("ceil", "floor", "even"))
    assert narrow.weight_layout == MixedLayout(96, 0, 0, "e2m3", ("ceil", "floor", "even"))
    assert narrow.format_code == layer.layout.code | WEIGHT_IS_MXFP4


def test_equal_by_what_changes_a_number():
    layer = layer_plan()
    assert layer == layer_plan(group="another name")
    assert hash(layer) == hash(layer_plan(group="another name"))
    different = [
        layer_plan(95),
        layer_plan(order=padded_order(96, seed=1)),
        layer_plan(order=None),
        layer_plan(layout=MixedLayout(0, 32, 64)),
        layer_plan(layout=MixedLayout(32, 32, 32, "e3m2")),
        layer_plan(layout=MixedLayout(32, 32, 32, rules=("ceil", "ceil", "ceil"))),
        layer_plan(weights="mxfp4"),
        layer_plan(weight_rules=("ceil", "ceil", "ceil")),
    ]
    assert len({layer.digest, *(other.digest for other in different)}) == len(different) + 1
    assert copy.deepcopy(layer) == layer == pickle.loads(pickle.dumps(layer))


def test_digest_is_the_same_in_another_process():
    program = (
        "from micromix_compile.plan import LayerPlan, MixedLayout; import torch;"
        "order = torch.arange(63, -1, -1, dtype=torch.int32);"
        "print(LayerPlan(64, MixedLayout(32, 0, 32), order).digest)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    order = torch.arange(63, -1, -1, dtype=torch.int32)
    assert run.stdout.strip() == LayerPlan(64, MixedLayout(32, 0, 32), order).digest, run.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "mxfp8"}, "weights are 'mxfp8'"),
        ({"in_features": 0}, "K = 0"),
        ({"in_features": 97}, "96 planned channels for K = 97"),
        ({"weight_rules": ("ceil",)}, "weight_rules"),
        ({"weight_rules": ("ceil", "ceil", "up")}, "weight_rules"),
        ({"order": torch.arange(96)}, "int64"),
        ({"order": torch.arange(64, dtype=torch.int32)}, r"\[64\], not int32 \[96\]"),
        ({"order": torch.zeros(96, dtype=torch.int32)}, "each of 0 to 95 once"),
        ({"order": torch.arange(1, 97, dtype=torch.int32)}, "each of 0 to 95 once"),
        ({"order": torch.arange(-1, 95, dtype=torch.int32)}, "each of 0 to 95 once"),
        ({"order": torch.arange(-2, 94, dtype=torch.int32)}, "each of 0 to 95 once"),
    ],
)
def test_invalid_layer_plans(changes, message):
    with pytest.raises(InvalidPlanError, match=message):
        layer_plan(**changes)


# --- ModelPlan ---


def test_model_plan_is_a_mapping():
    plan = model_plan()
    assert list(plan) == ["q", "k", "block.down", "block.conv"]
    assert len(plan) == 4
    assert plan["q"] is plan["k"]
    assert "other" not in plan
    assert plan.get("other") is None
    assert plan.shapes["block.conv"] == LayerShape(16, 64, transposed=True)
    assert plan.recipe == {"format": "mxfp8"}


def test_model_plans_are_equal_by_what_changes_a_number():
    plan = model_plan()
    assert plan == model_plan() == copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan))
    assert hash(plan) == hash(model_plan())
    assert plan != model_plan(q=layer_plan(order=None))
    assert plan.digest != ModelPlan({}, {}).digest


def test_contradictions():
    with pytest.raises(InvalidPlanError, match="different layers"):
        ModelPlan({"q": layer_plan()}, {"k": (8, 96)})
    with pytest.raises(InvalidPlanError, match=r"q has K=64, N=8, its plan K=96"):
        ModelPlan({"q": layer_plan()}, {"q": (8, 64)})


def test_summary_and_weight_bits():
    plan = model_plan()
    down = plan.summary()[2]
    assert down == {
        "layer": "block.down",
        "K": 70,
        "N": 96,
        "k4": 32,
        "k6": 32,
        "k8": 32,
        "weight_bytes": 96 * (48 + 3),
    }
    elements = (8 + 4) * 96 + 96 * 70 + 16 * 64
    stored = 8 * sum(row["weight_bytes"] for row in plan.summary())
    assert plan.weight_bits == pytest.approx(stored / elements)
    assert ModelPlan({}, {}).weight_bits == 0.0
    assert "4 layers" in repr(plan)


def test_check():
    plan = model_plan()
    plan.check(plan.shapes | {"other": (3, 3)})
    found = {"q": (8, 96), "k": (5, 96), "block.conv": (16, 64, False)}
    with pytest.raises(PlanMismatchError) as caught:
        plan.check(found)
    assert caught.value.facts["differences"] == [
        "k: the plan has K=96, N=4, the model K=96, N=5",
        "block.down: the model has no such layer",
        "block.conv: the plan has K=64, N=16, transposed, the model K=64, N=16",
    ]


# --- attach ---


def marked(model):
    """The parameters marked as the weight of a planned layer."""
    marks = {n: attached(p) for n, p in model.named_parameters()}
    return {n: mark for n, mark in marks.items() if mark is not None and mark[1] is not None}


def test_attach_marks_the_planned_weights():
    plan, model = model_plan(), Model()
    assert plan.attach(model) is plan
    assert marked(model) == {
        "q.weight": (plan, "q"),
        "k.weight": (plan, "k"),
        "block.down.weight": (plan, "block.down"),
        "block.conv.weight": (plan, "block.conv"),
    }
    # What is not planned is known to be so: the backend must not take the model for one without a plan.
    assert attached(model.other.weight) == (plan, None)
    detach(model)
    assert all(attached(p) is None for p in model.parameters())
    detach(model)


def test_attach_survives_a_move_and_is_found_in_a_compiled_model():
    plan, model = model_plan(), Model()
    plan.attach(torch.compile(model))
    assert len(marked(model)) == 4
    model.to(torch.bfloat16)
    assert len(marked(model)) == 4
    model.block = torch.compile(model.block)
    plan.attach(model)
    assert len(marked(model)) == 4


def test_attach_replaces_another_plan():
    model = Model()
    model_plan().attach(model)
    small = ModelPlan({"other": layer_plan()}, {"other": (4, 96)}).attach(model)
    assert marked(model) == {"other.weight": (small, "other")}


def test_attach_changes_nothing_if_the_plan_is_wrong():
    model = Model()
    first = ModelPlan({"q": layer_plan()}, {"q": (8, 96)}).attach(model)
    model.k = nn.Linear(96, 5)
    del model.block.down
    with pytest.raises(PlanMismatchError) as caught:
        model_plan().attach(model)
    assert caught.value.facts["differences"] == [
        "k: the plan has a weight [4, 96], the model [5, 96]",
        "block.down: the model has no such layer",
    ]
    assert marked(model) == {"q.weight": (first, "q")}


def test_attach_reads_the_weight_of_conv1d_transposed():
    model = Model()
    model.block.conv = nn.Linear(64, 16)
    with pytest.raises(PlanMismatchError, match=r"a weight \[64, 16\], the model \[16, 64\]"):
        model_plan().attach(model)


def test_tied_weights_are_marked_with_the_first_layer():
    model = Model()
    model.k = nn.Linear(96, 8)
    model.k.weight = model.q.weight
    layer = layer_plan()
    plan = ModelPlan({"q": layer, "k": layer}, {"q": (8, 96), "k": (8, 96)}).attach(model)
    assert attached(model.k.weight) == (plan, "q")
    only_k = ModelPlan({"k": layer}, {"k": (8, 96)}).attach(model)
    assert attached(model.q.weight) == (only_k, "k")


def test_tied_weights_with_different_plans_are_said():
    model = Model()
    model.k = nn.Linear(96, 8)
    model.k.weight = model.q.weight
    layers = {"q": layer_plan(), "k": layer_plan(weights="mxfp4")}
    with pytest.warns(TiedLayersWarning, match="q, k"):
        ModelPlan(layers, {"q": (8, 96), "k": (8, 96)}).attach(model)


def test_layers_that_are_neither_planned_nor_skipped_are_said():
    model, plan = Model(), model_plan()
    with pytest.warns(UnplannedLayersWarning, match="stay float:\n  other\n"):
        plan.attach(model)
    del model.other
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.attach(model)
        model.lm_head = nn.Linear(96, 4)
        plan.attach(model)
        model.block = torch.compile(model.block)
        plan.attach(model)


@pytest.mark.parametrize("recipe", [{}, {"made by": "hand"}])
def test_a_plan_of_ones_own_may_leave_layers_out(recipe):
    plan = ModelPlan({"q": layer_plan()}, {"q": (8, 96)}, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.attach(Model())


def test_a_module_under_two_names():
    model = Model()
    model.again = model.q
    plan = ModelPlan({"again": layer_plan()}, {"again": (8, 96)}).attach(model)
    assert attached(model.q.weight) == (plan, "again")


def test_attach_to_a_layer_that_is_a_parameter():
    model = Model()
    model.projection = nn.Parameter(torch.zeros(8, 96))
    plan = ModelPlan({"projection": layer_plan()}, {"projection": (8, 96)}).attach(model)
    assert attached(model.projection) == (plan, "projection")


# --- files ---


def test_save_and_load_are_bit_exact(tmp_path):
    plan = model_plan()
    plan.save(tmp_path / "p")
    loaded = load_plan(tmp_path / "p")
    assert loaded == plan
    assert list(loaded) == list(plan)
    assert loaded.shapes == plan.shapes
    assert loaded.recipe == plan.recipe
    assert loaded["q"] is loaded["k"]
    assert loaded["q"].group == "g"
    for name in plan:
        assert loaded[name].layout == plan[name].layout
        assert loaded[name].weight_layout == plan[name].weight_layout
    assert torch.equal(loaded["block.down"].order, plan["block.down"].order)
    assert loaded["block.conv"].order is None


def test_an_order_that_two_layers_share(tmp_path):
    order = padded_order(96)
    layers = {"q": layer_plan(order=order), "k": layer_plan(order=order, weights="mxfp4")}
    plan = ModelPlan(layers, {"q": (8, 96), "k": (8, 96)})
    plan.save(tmp_path / "p")
    assert load_plan(tmp_path / "p") == plan


def test_an_empty_plan_and_a_string_path(tmp_path):
    path = str(tmp_path / "p")
    ModelPlan({}, {}).save(path)
    assert len(load_plan(path)) == 0


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(k=st.integers(1, 300), seed=st.integers(0, 9), weights=st.sampled_from(["match", "mxfp4"]))
def test_any_layer_round_trips(tmp_path, k, seed, weights):
    kp = -(-k // 32) * 32
    layer = LayerPlan(k, MixedLayout(0, kp, 0), padded_order(k, seed), weights)
    ModelPlan({"l": layer}, {"l": (3, k)}).save(tmp_path / "p")
    assert load_plan(tmp_path / "p")["l"] == layer


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PlanFileError, match="No such file"):
        load_plan(tmp_path / "nothing")
    with pytest.raises(PlanFileError):
        load_plan(tmp_path)


def test_truncated_files(tmp_path):
    path = tmp_path / "p"
    model_plan().save(path)
    whole = path.read_bytes()
    for length in [*range(20), 100, 500, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(PlanFileError, match="truncated"):
            load_plan(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "p"
    path.write_bytes(b"PK\x03\x04 this is a zip file, as torch.save would write it" * 10)
    with pytest.raises(PlanFileError, match="not a safetensors file"):
        load_plan(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(PlanFileError, match="without 'micromix_plan'"):
        load_plan(path)
    files.write_file(path, "micromix_statistics", 1, {}, {})
    with pytest.raises(PlanFileError, match="without 'micromix_plan'"):
        load_plan(path)


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "p").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), tmp_path / "t")
    for name in ("p", "t"):
        with pytest.raises(PlanFileError):
            load_plan(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def rewrite(path, change):
    """Applies ``change`` to the metadata and tensors of a file."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["content"])
    change(metadata, content, tensors)
    if "content" in metadata and content:
        metadata["content"] = json.dumps(content)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c, t: m.update(micromix_plan="one"), "metadata is damaged"),
        (lambda m, c, t: m.pop("content"), "metadata is damaged"),
        (lambda m, c, t: (m.update(content="[" * 10**5), c.clear()), "metadata is damaged"),
        (lambda m, c, t: c.pop("groups"), "content is damaged"),
        (lambda m, c, t: c.update(layers=[]), "content is damaged"),
        (lambda m, c, t: c["groups"].pop(), "content is damaged"),
        (lambda m, c, t: c["groups"][0].pop("counts"), "content is damaged"),
        (lambda m, c, t: c["groups"][0].update(counts=[5, 5, 5]), "content is damaged"),
        (lambda m, c, t: c["groups"][0].update(in_features=math.nan), "content is damaged"),
        (lambda m, c, t: c["groups"][0].update(format6="e5m0"), "content is damaged"),
        (lambda m, c, t: c["layers"].update(q=[0, 8]), "content is damaged"),
        (lambda m, c, t: c["layers"].update(q=[0, 8, 95, False]), "content is damaged"),
        (lambda m, c, t: t["order.0"].zero_(), "content is damaged"),
        (lambda m, c, t: t.pop("order.0"), "does not match its digest"),
        (lambda m, c, t: t.update({"order.0": t["order.0"].flip(0)}), "not match its digest"),
        (lambda m, c, t: c["groups"][0].update(weights="mxfp4"), "does not match its digest"),
    ],
)
def test_damaged_content(tmp_path, change, message):
    path = tmp_path / "p"
    model_plan().save(path)
    rewrite(path, change)
    with pytest.raises(PlanFileError, match=message) as caught:
        load_plan(path)
    assert caught.value.facts["path"] == str(path)


def test_newer_version(tmp_path):
    path = tmp_path / "p"
    model_plan().save(path)
    rewrite(path, lambda m, c, t: m.update(micromix_plan="4"))
    with pytest.raises(FileVersionError, match=r"version 4.*reads up to 3"):
        load_plan(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "p"
    model_plan().save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="disk is full"):
        ModelPlan({}, {}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p"]


def test_saving_into_a_missing_folder(tmp_path):
    with pytest.raises(OutputError, match=r"p cannot be written: .*nowhere\. Make that folder"):
        model_plan().save(tmp_path / "nowhere" / "p")


def test_a_directory_is_no_plan(tmp_path):
    with pytest.raises(PlanFileError, match="it is a directory"):
        load_plan(tmp_path)


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="no ordinary file"):
        model_plan().save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "p")
    for _ in range(2):
        model_plan().save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert load_plan(tmp_path / "folder" / "p") == model_plan()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["p"]


def test_saved_files_have_ordinary_permissions(tmp_path):
    model_plan().save(tmp_path / "p")
    (tmp_path / "ordinary").write_text("")
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
