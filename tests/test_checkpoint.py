"""Quantised checkpoints: what is saved is what is loaded, bit for bit, or a clear error."""

from __future__ import annotations

import copy
import errno
import fcntl
import functools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from architectures import build
from tiny_llama import save_tiny, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate, checkpoint, explain, save_pretrained
from micromix_compile.allocation import uniform_plan
from micromix_compile.cli import main
from micromix_compile.errors import (
    CheckpointClassError,
    CheckpointError,
    CheckpointExistsError,
    FileVersionError,
    GradientError,
    HookedLayerError,
    LeftAloneWarning,
    MicroMixError,
    OptionError,
    OutputError,
    PlanFileError,
    PlanMismatchError,
    QuantizedAlreadyError,
    RecipeError,
    ReleasedWeightError,
    UnsavableLayerError,
)
from micromix_compile.integrations.transformers import MicroMixConfig
from micromix_compile.layers import LayerShape, linear_shapes
from micromix_compile.packing import pack_weight
from micromix_compile.plan import ModelPlan
from micromix_compile.planned import plan_to_use, quantised
from micromix_compile.quantized_linear import QuantizedLinear

MIX = Recipe(split=(0.5, 0.25, 0.25))
SHARD = 40_000  # bytes: the tiny model makes several files


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(1)
    return torch.randint(3, 128, (2, 16))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def plan(source, ids):
    return calibrate(load(source)).run([ids]).plan(MIX)


@pytest.fixture(scope="module")
def saved(source, plan, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(load(source), directory, plan, max_shard_size=SHARD)
    return directory


def lowered(model, plan, ids):
    """The logits of the float model under the backend, without Inductor: the arithmetic that is to be kept."""
    plan.attach(model)
    return logits(torch.compile(model, backend="micromix", options={"inductor": False}), ids)


def test_what_is_loaded_computes_what_the_compiled_model_computes(source, saved, plan, ids):
    model = load(saved)
    assert torch.equal(logits(model, ids), lowered(load(source), plan, ids))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == len(plan) == 14
    assert {n: m.plan for n, m in model.named_modules() if n in plan} == dict(plan)
    assert all(m.weight is None for m in layers), "the weights are there once, placed"


def test_the_files_hold_the_packed_layout_and_nothing_twice(source, saved, plan):
    files = sorted(saved.glob("*.safetensors"))
    assert len(files) > 2
    tensors = {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}
    float_model = load(source)
    for name, layer in plan.items():
        packed = pack_weight(float_model.get_submodule(name).weight, layer)
        assert torch.equal(tensors[f"{name}.weight"], packed.data)
        assert torch.equal(tensors[f"{name}.weight_scales"], packed.scales)
    orders = [name for name in tensors if name.endswith(".order")]
    assert len(orders) == len(set(plan.values()))
    packed_bytes = sum(row["weight_bytes"] for row in plan.summary())
    rest = sum(v.nbytes for k, v in float_model.state_dict().items() if k[:-7] not in plan)
    order_bytes = sum(tensors[name].nbytes for name in orders)
    assert sum(v.nbytes for v in tensors.values()) == packed_bytes + rest + order_bytes


def test_saving_again_gives_the_same_files(saved, tmp_path):
    save_pretrained(load(saved), tmp_path / "again", max_shard_size=SHARD)
    assert contents(tmp_path / "again") == contents(saved)


def test_transformers_own_save_pretrained(saved, ids, tmp_path):
    model = load(saved)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(model, ids))


def test_quantising_while_loading(source, saved, plan, ids, tmp_path):
    expected = logits(load(saved), ids)
    plan.save(tmp_path / "plan.safetensors")
    for given in (plan, tmp_path / "plan.safetensors"):
        model = load(source, quantization_config=MicroMixConfig(plan=given))
        assert torch.equal(logits(model, ids), expected)
    save_pretrained(model, tmp_path / "again", max_shard_size=SHARD)
    assert contents(tmp_path / "again") == contents(saved)
    model = load(source, quantization_config=MicroMixConfig(plan=Recipe(format="mxfp4")))
    assert {m.plan.layout.k8 for m in model.modules() if isinstance(m, QuantizedLinear)} == {0}


def test_offloaded_models_are_saved_and_loaded(source, saved, plan, ids, tmp_path):
    disk = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    save_pretrained(load(source, **disk), tmp_path / "model", plan, max_shard_size=SHARD)
    assert contents(tmp_path / "model") == contents(saved)
    assert torch.equal(logits(load(saved, **disk), ids), logits(load(saved), ids))


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2"])
def test_other_architectures(name, ids, tmp_path):
    """Conv1D weights, biases, tied heads."""
    build(name).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float")
    plan = calibrate(model).run([ids]).plan(Recipe(split=(0.5, 0.25, 0.25), include_lm_head=True))
    save_pretrained(model, tmp_path / "model", plan)
    loaded = load(tmp_path / "model")
    assert torch.equal(logits(loaded, ids), lowered(model, plan, ids))
    assert isinstance(loaded.get_output_embeddings(), QuantizedLinear)


def test_compiling_adds_the_fusions(source, saved, plan, ids):
    model = load(saved)
    expected = logits(model, ids)
    compiled = torch.compile(model, backend="micromix", options={"inductor": False, "strict": True})
    assert torch.equal(logits(compiled, ids), expected)
    assert explain(compiled).passes["micromix::quantize"] == 4 * 2
    torch.compiler.reset()
    compiled = torch.compile(model, backend="micromix", options={"strict": True})
    fused = logits(compiled, ids)
    passes = explain(compiled).passes
    assert passes["rms_norm"] + passes["add_rms_norm"] == 2 * 2 and passes["silu_mul"] == 2
    layer = explain(compiled).layers["model.layers.1.mlp.down_proj"]
    assert layer.fused_with == "silu_mul" and layer.bytes_after == layer.bytes_before
    torch.compiler.reset()
    plan.attach(float_model := load(source))
    assert torch.equal(fused, logits(torch.compile(float_model, backend="micromix"), ids))


def test_the_layers_that_were_left_alone_stay_so(source, ids, tmp_path):
    model = load(source)
    plan = calibrate(model).run([ids]).plan(Recipe(format="mxfp6", skip=("*.o_proj",)))
    save_pretrained(model, tmp_path / "model", plan)
    loaded = load(tmp_path / "model")
    compiled = torch.compile(loaded, backend="micromix", options={"inductor": False})
    assert torch.equal(logits(compiled, ids), logits(loaded, ids))
    reasons = {n: r.reason for n, r in explain(compiled).layers.items() if r.reason}
    assert len(reasons) == 3 and set(reasons.values()) == {"the recipe skips it"}


def test_generate_and_gradients(saved, ids):
    model = load(saved)
    assert model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4).shape == (1, 20)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(GradientError):
        layer(torch.randn(1, 64, requires_grad=True))


def test_devices_and_state_dicts(saved, ids):
    model = load(saved)
    expected = logits(model, ids)
    state = model.state_dict()
    other = load(saved)
    for p in other.parameters():
        p.data.zero_()
    for m in other.modules():
        if isinstance(m, QuantizedLinear):
            m.placed[64:].zero_()
    assert not other.load_state_dict(state).missing_keys
    assert torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(copy.deepcopy(model.to("cpu")), ids), expected)
    layer = model.model.layers[0].mlp.up_proj
    packed = layer.packed()
    layer.to("meta")
    assert layer.placed is None and layer.weight.shape == packed.data.shape


@pytest.mark.parametrize("way", ["copied", "assigned", "moved", "pickled"])
def test_a_state_dict_of_another_plan(way, source, saved, ids, tmp_path):
    """Layers that share an input have one order in it, under the name of one of them."""
    batch = torch.randint(3, 128, (2, 16))
    with torch.no_grad():
        model = load(source)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # other channels are the large ones
                parameter.copy_(torch.rand_like(parameter) + 0.1)
    save_pretrained(model, tmp_path / "other", calibrate(model).run([batch]).plan(MIX))
    other, model = load(tmp_path / "other"), load(saved)
    layer = model.model.layers[0].mlp
    assert not torch.equal(layer.up_proj.order, other.model.layers[0].mlp.up_proj.order)
    if way == "moved":
        model._apply(lambda tensor: tensor.clone())  # as to another device
    elif way == "pickled":
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        model._apply(lambda tensor: tensor.clone())
    model.load_state_dict(other.state_dict(), assign=way == "assigned")
    assert torch.equal(logits(model, ids), logits(other, ids))
    compiled = torch.compile(model, backend="micromix", options={"inductor": False})
    assert torch.equal(logits(compiled, ids), logits(other, ids))


def test_without_the_package_transformers_refuses(saved):
    program = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(saved)!r})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and "size" in run.stderr


def test_nothing_is_written_over(source, saved, plan, tmp_path):
    before = contents(saved)
    with pytest.raises(CheckpointExistsError, match="never written over"):
        save_pretrained(load(source), saved, plan)
    assert contents(saved) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointExistsError):
        save_pretrained(load(source), tmp_path / "file", plan)


def test_plans_that_do_not_fit(source, plan, tmp_path):
    wider = {n: LayerShape(s.out_features + 1, s.in_features) for n, s in plan.shapes.items()}
    with pytest.raises(PlanMismatchError):
        save_pretrained(load(source), tmp_path / "m", ModelPlan(plan, wider, plan.recipe))
    layer = micromix.LayerPlan(64, plan["model.layers.0.mlp.up_proj"].layout)
    embedding = ModelPlan({"model.embed_tokens": layer}, {"model.embed_tokens": (256, 64)})
    with pytest.raises(UnsavableLayerError, match="embed_tokens"):
        save_pretrained(load(source), tmp_path / "m", embedding)
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


# --- damaged and hostile checkpoints


def copy_of(directory: Path, target: Path) -> Path:
    target.mkdir()
    for name, data in contents(directory).items():
        (target / name).write_bytes(data)
    return target


def edit(directory: Path, change, digests: bool = True) -> None:
    """Change the quantization_config of a checkpoint; without digests, as somebody who forges them would."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    if not digests:
        config["quantization_config"]["files"] = {}
    path.write_text(json.dumps(config))


LAYER = "model.layers.0.mlp.up_proj"
FORGERIES = {
    "counts overflow": lambda q: q["groups"][0].update(counts=[2**62, 2**62, 2**62]),
    "counts are negative": lambda q: q["groups"][0].update(counts=[-32, 64, 32]),
    "counts are text": lambda q: q["groups"][0].update(counts="abc"),
    "counts of another split": lambda q: q["groups"][0].update(counts=[64, 0, 0]),
    "N is huge": lambda q: q["layers"].update({LAYER: [2, 2**60, 64, False]}),
    "K of another layer": lambda q: q["layers"].update({LAYER: [3, 96, 96, False]}),
    "a group that is not there": lambda q: q["layers"].update({LAYER: [99, 96, 64, False]}),
    "a negative group": lambda q: q["layers"].update({LAYER: [-1, 96, 64, False]}),
    "a layer that is not there": lambda q: q["layers"].update({"no.such": [2, 96, 64, False]}),
    "a path as a name": lambda q: q["layers"].update({"../../etc/passwd": [2, 96, 64, False]}),
    "a layer without a name": lambda q: q["layers"].update({"": [2, 96, 64, False]}),
    "a layer left out": lambda q: q["layers"].pop(LAYER),
    "an order's owner changed": lambda q: q["groups"][0].update(order=LAYER),
    "an unknown format": lambda q: q["groups"][0].update(format6="e9m9"),
    "an unknown rule": lambda q: q["groups"][0].update(rules=["odd", "odd", "odd"]),
    "another rule": lambda q: q["groups"][0].update(rules=["floor", "floor", "floor"]),
    "no groups": lambda q: q.pop("groups"),
    "no version": lambda q: q.pop("version"),
    "a version that is text": lambda q: q.update(version="new"),
    "an endless version": lambda q: q.update(version=float("inf")),
    "layers are a list": lambda q: q.update(layers=[]),
    "another digest": lambda q: q.update(plan_digest="0" * 64),
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("digests", [True, False])
def test_forged_descriptions(name, digests, saved, tmp_path):
    directory = copy_of(saved, tmp_path / "forged")
    edit(directory, FORGERIES[name], digests)
    with pytest.raises(MicroMixError) as caught:
        load(directory)
    assert isinstance(caught.value, CheckpointError), caught.value


def test_a_newer_version(saved, tmp_path):
    directory = copy_of(saved, tmp_path / "newer")
    edit(directory, lambda q: q.update(version=99))
    with pytest.raises(FileVersionError, match="Upgrade"):
        load(directory)


def damaged(data: bytes, kind: str, chance: random.Random) -> bytes:
    header = 8 + int.from_bytes(data[:8], "little")
    if kind == "truncated":
        return data[: chance.randrange(len(data))]
    at = {"header": chance.randrange(header), "length": chance.randrange(8)}.get(
        kind, chance.randrange(header, len(data))
    )
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


@pytest.mark.parametrize("kind", ["truncated", "header", "length", "body"])
def test_damaged_files(kind, saved, tmp_path):
    """A digest finds every one of them before anything is loaded."""
    chance = random.Random(kind)
    files = sorted(saved.glob("*.safetensors"))
    directory = copy_of(saved, tmp_path / "damaged")
    for _ in range(20):
        file = directory / chance.choice(files).name
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, kind, chance))
        with pytest.raises(CheckpointError, match="digest"):
            load(directory)
        file.write_bytes(whole)
    load(directory)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "order"])
def test_wrong_tensors_without_digests(change, saved, tmp_path):
    directory = copy_of(saved, tmp_path / "wrong")
    edit(directory, lambda q: None, digests=False)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    owner = "model.layers.0.self_attn.q_proj"
    key = f"{owner}.order" if change == "order" else f"{LAYER}.weight"
    file = directory / index[key]
    tensors = safetensors.torch.load_file(file)
    if change == "missing":
        del tensors[key]
    elif change == "shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    elif change == "dtype":
        tensors[key] = tensors[key].to(torch.int8)
    else:
        tensors[key][0] = 1 << 20
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError):
        load(directory)


def test_a_missing_file(saved, tmp_path):
    directory = copy_of(saved, tmp_path / "missing")
    sorted(directory.glob("*.safetensors"))[1].unlink()
    with pytest.raises((CheckpointError, OSError), match="00002"):
        load(directory)


# --- stopped half-way

KILLED = """
    import hashlib, os, random, shutil, signal, sys, threading, time
    from pathlib import Path
    import torch
    from tqdm import tqdm
    tqdm.set_lock(threading.RLock())  # its own is shared with the children, and a killed one may hold it
    torch.set_num_threads(1)
    from transformers import AutoModel, AutoModelForCausalLM
    from micromix_compile import load_plan, save_pretrained
    source, work, resumes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "resumes"
    plan = load_plan(work / "plan.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source)

    def save(target):
        save_pretrained(model, target, plan, max_shard_size=20_000, source=source if resumes else None)

    def state(directory):
        files = (p for p in directory.iterdir() if p.name != "progress.json")  # killed before that could go
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    save(work / "warm")
    start = time.perf_counter()
    save(work / "whole")
    seconds = time.perf_counter() - start
    whole = state(work / "whole")
    chance, finished, continued = random.Random(0), 0, 0
    for i in range(20):
        target = work / f"killed{i}"
        child = os.fork()
        if child == 0:
            try:
                save(target)
            finally:
                os._exit(0)
        time.sleep(seconds * (i + chance.random()) / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if target.exists():
            assert state(target) == whole, "a name is given to a whole checkpoint only"
            finished += 1
            continue
        partial = target.with_name(target.name + ".partial")
        before = {p.name: p.stat().st_mtime_ns for p in partial.glob("model-*.safetensors")}
        save(target)
        assert state(target) == whole and not partial.exists()
        kept = [n for n, t in before.items() if (target / n).stat().st_mtime_ns == t]
        continued += bool(kept)
    print(finished, continued)
"""


@pytest.mark.parametrize("resumes", [True, False])
def test_kill_9_at_20_points(resumes, source, plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    arguments = [str(source), str(tmp_path), "resumes" if resumes else "begins anew"]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    finished, continued = map(int, run.stdout.split())
    assert finished < 18, "hardly any was killed half-way"
    assert (continued > 0) == resumes


def test_a_resume_that_fails_at_once_is_resumed(source, plan, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(source)
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    write, written = checkpoint.write_tensors, []

    def save():
        save_pretrained(model, target, plan, max_shard_size=20_000, source=source)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_one(*arguments):
        written.append(write(*arguments) if not written else fail())

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(checkpoint, "write_tensors", write_one)
        save()
    (first,) = partial.glob("model-*.safetensors")
    done = first.stat().st_mtime_ns
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(checkpoint, "_note_progress", fail)
        save()
    save()
    assert (target / first.name).stat().st_mtime_ns == done


MEMORY = """
    import sys, torch
    from pathlib import Path
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from micromix_compile import Recipe, save_pretrained
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])

    def memory(key):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    def peak(run):
        open("/proc/self/clear_refs", "w").write("5")
        before = memory("VmRSS")
        run()
        return memory("VmHWM") - before

    def quantise(name):
        disk = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"}
        model = AutoModelForCausalLM.from_pretrained(folder / name, **disk)
        save_pretrained(model, folder / f"{name}-quantised", Recipe(format="mxfp8"), max_shard_size="8MB")

    def size(name):
        return sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))

    for name, hidden, layers in (("small", 64, 1), ("large", 1024, 8)):
        config = LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=4 * hidden,
                             num_hidden_layers=layers, num_attention_heads=8, dtype="bfloat16")
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    quantise("small")
    AutoModelForCausalLM.from_pretrained(folder / "small-quantised")
    print(peak(lambda: quantise("large")) / size("large"))
    print(peak(lambda: AutoModelForCausalLM.from_pretrained(folder / "large-quantised")) / size("large-quantised"))
"""


def test_memory_of_quantising_from_disk_and_of_loading(tmp_path):
    """134 million weights: quantised within a fraction of their float size, and loaded not twice at any time.

    Huge pages and one layer's packed weights come on top, which count for less in a larger model.
    """
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    quantising, loading = map(float, run.stdout.split())
    assert quantising < 0.4, f"{quantising:.2f} of the float size"
    assert loading < 1.5, f"{loading:.2f} of the packed size"


def test_another_plan_begins_anew(source, plan, tmp_path):
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "progress.json").write_text(
        '{"fingerprint": {"plan": "other"}, "files": {"../x": ""}}'
    )
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"of another plan")
    save_pretrained(load(source), tmp_path / "model", plan, source=source)
    names = {path.name for path in (tmp_path / "model").glob("model*")}
    assert names == {"model.safetensors"}


def test_the_command(source, ids, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--samples", "2", "--seqlen", "64", "--split", "0.5", "0.25", "0.25"]
    assert main(["quantize", str(source), str(out), *flags, "--offload"]) == 0
    assert "MB of weights" in capsys.readouterr().out
    plan = micromix.load_plan(tmp_path / "out.plan.safetensors")
    expected = load(source, quantization_config=MicroMixConfig(plan=plan))
    assert torch.equal(logits(load(out), ids), logits(expected, ids))
    assert (out / "tokenizer.json").exists()
    assert main(["quantize", str(source), str(out), *flags]) == 1
    assert "never written over" in capsys.readouterr().err
    other = str(tmp_path / "other")
    assert main(["quantize", str(source), other, *flags]) == 0
    arguments = ["--plan", str(tmp_path / "out.plan.safetensors")]
    assert main(["quantize", str(source), str(tmp_path / "third"), *arguments]) == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "third")
    assert main(["quantize", str(source), str(tmp_path / "x"), *arguments, *flags]) == 1


def test_a_model_without_a_tokenizer(tmp_path):
    """A plan or one format needs none; calibration does, and says so."""
    source, out = tmp_path / "model", tmp_path / "packed"
    tiny_llama().save_pretrained(source)
    assert main(["quantize", str(source), str(out), "--format", "mxfp8"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert main(["quantize", str(source), str(tmp_path / "other")]) == 1


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(torch.nn.Linear):
    pass


class FalconLinear(torch.nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_linear_of_another_forward_stays_float_and_is_named():
    model = torch.nn.ModuleDict(
        {
            "own": Doubled(32, 32),
            "kept": Renamed(32, 32),
            "falcon": FalconLinear(32, 32),
            "heads": torch.nn.MultiheadAttention(32, 2),
        }
    )
    assert list(linear_shapes(model)) == ["kept", "falcon"]
    with pytest.warns(LeftAloneWarning, match=r"own\n\s+heads\n\s+heads.out_proj"):
        assert list(plan_to_use(model, Recipe(format="mxfp8"))) == ["kept", "falcon"]
    layer = uniform_plan({"own": (32, 32)}, Recipe(format="mxfp8"))
    with pytest.raises(UnsavableLayerError, match="own"):
        plan_to_use(model, layer)


def test_a_compiled_model_is_saved_as_the_model_it_is(source, saved, plan, tmp_path):
    compiled = torch.compile(load(source), backend="micromix")
    save_pretrained(compiled, tmp_path / "again", plan, max_shard_size=SHARD)
    assert contents(tmp_path / "again") == contents(saved)


@pytest.mark.parametrize("change", ["shards", "dtype"])
def test_files_that_would_hold_something_else_are_not_kept(change, source, plan, tmp_path):
    """A run that was stopped after its first file goes on with other files, or in another dtype."""

    def interrupt(*_):
        raise KeyboardInterrupt

    save = functools.partial(save_pretrained, source=source)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("micromix_compile.checkpoint._write_documents", interrupt)
        save(load(source, dtype=torch.bfloat16), tmp_path / "model", plan, max_shard_size=SHARD)
    assert (tmp_path / "model.partial").is_dir()
    # The same number of files, with another boundary.
    options = {"max_shard_size": SHARD + 3000} if change == "shards" else {"max_shard_size": SHARD}
    model = load(source, dtype=torch.float16 if change == "dtype" else torch.bfloat16)
    save(model, tmp_path / "model", plan, **options)
    model = load(source, dtype=torch.float16 if change == "dtype" else torch.bfloat16)
    save(model, tmp_path / "whole", plan, **options)
    assert contents(tmp_path / "model") == contents(tmp_path / "whole")


def test_nothing_is_done_where_nothing_can_be_written(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("micromix_compile.models.load", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["quantize", str(source), str(tmp_path / "full")]) == 1
    assert "never written over" in capsys.readouterr().err
    assert main(["export", str(source), str(tmp_path / "model.bin")]) == 1
    assert ".pt2" in capsys.readouterr().err
    assert main(["quantize", str(source), str(tmp_path / "q"), "--device", "nothing"]) == 1
    assert "--device" in capsys.readouterr().err


def test_a_plan_of_other_samples_is_not_used_again(source, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("Some words of a text. " * 200)
    flags = [str(source), str(tmp_path / "out"), "--seqlen", "64", "--text", str(text)]
    flags += ["--split", "0.5", "0.25", "0.25"]
    assert main(["quantize", *flags, "--samples", "1"]) == 0
    for samples, again in (("1", True), ("2", False), ("2", True), ("2", False)):
        shutil.rmtree(tmp_path / "out")
        capsys.readouterr()
        if (samples, again) == ("2", False):
            text.write_text("Other words. " * (400 + text.stat().st_size))
        assert main(["quantize", *flags, "--samples", samples]) == 0
        assert ("from an earlier run" in capsys.readouterr().out) == again


def test_one_format_is_rounded_by_gptq(source, tmp_path, capsys):
    flags = ["--format", "mxfp4", "--rounding", "gptq", "--samples", "2", "--seqlen", "32"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *flags]) == 0
    plan = micromix.load_plan(tmp_path / "out.plan.safetensors")
    assert plan.rounded and plan_to_use(load(tmp_path / "out"), plan) is plan
    with pytest.raises(QuantizedAlreadyError):
        plan_to_use(load(tmp_path / "out"), Recipe(format="mxfp6", rounding="gptq"))
    with pytest.raises(RecipeError, match="GPTQ needs calibration"):
        save_pretrained(load(source), tmp_path / "x", Recipe(format="mxfp4", rounding="gptq"))


def test_a_package_without_a_tokenizer_generates_no_text(capsys, monkeypatch):
    monkeypatch.setattr("micromix_compile.package.load_package", lambda path: object())
    assert main(["generate", "some.pt2", "--prompt", "x"]) == 1
    assert "generates no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "saver", [save_pretrained, lambda model, path: model.save_pretrained(path)]
)
def test_a_tied_head_that_is_quantised_while_loading(saver, ids, tmp_path):
    """Its weight is in the files under the embedding's name only."""
    build("gpt2").save_pretrained(tmp_path / "float")
    recipe = Recipe(format="mxfp8", include_lm_head=True)
    save_pretrained(load(tmp_path / "float"), tmp_path / "packed", recipe)
    expected = logits(load(tmp_path / "packed"), ids)
    model = load(tmp_path / "float", quantization_config=MicroMixConfig(plan=recipe))
    assert isinstance(model.lm_head, QuantizedLinear) and not model.config.tie_word_embeddings
    assert torch.equal(logits(model, ids), expected)
    saver(model, tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), expected)


def test_a_planned_layer_that_the_files_lack(tmp_path):
    source = save_tiny(tmp_path / "model")
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[f"{LAYER}.weight"]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{LAYER}.weight is missing"):
        load(source, quantization_config=MicroMixConfig(plan=Recipe(format="mxfp8")))


def test_quantising_while_loading_is_not_for_disks(source, tmp_path):
    with pytest.raises(OptionError, match="micromix quantize --offload"):
        load(
            source,
            quantization_config=MicroMixConfig(plan=Recipe(format="mxfp8")),
            device_map={"": "disk"},
            offload_folder=tmp_path,
        )


def test_a_model_that_is_quantised_takes_no_other_recipe(source, saved, plan, tmp_path):
    model = load(saved)
    for other in (Recipe(format="mxfp4"), calibrated_otherwise(source)):
        with pytest.raises(QuantizedAlreadyError, match="load the float model"):
            save_pretrained(model, tmp_path / "other", other)
    assert not list(tmp_path.iterdir())
    assert plan_to_use(model, plan) == plan
    assert plan_to_use(model, Recipe(split=MIX.split)) == plan


def test_what_a_plan_may_be_given_as(source, saved, plan, tmp_path):
    """The same for every call that quantises a model; the errors too."""
    plan.save(tmp_path / "plan.safetensors")
    for given in (plan, tmp_path / "plan.safetensors", str(tmp_path / "plan.safetensors")):
        assert plan_to_use(load(source), given) == plan
        assert MicroMixConfig(plan=given).plan == plan
        assert plan_to_use(load(saved), given) == plan
    recipe = Recipe(format="mxfp6")
    assert plan_to_use(load(source), recipe) == MicroMixConfig(recipe).plan_for(load(source))
    for wrong in ({"format": "mxfp6"}, 8, object()):
        for call in (
            functools.partial(save_pretrained, load(source), tmp_path / "m"),
            MicroMixConfig,
        ):
            with pytest.raises(OptionError, match="'plan' cannot be a .*the path of a saved one"):
                call(plan=wrong)
    with pytest.raises(PlanFileError, match="No such file"):
        save_pretrained(load(source), tmp_path / "m", tmp_path / "none.safetensors")
    with pytest.raises(OptionError, match="'recipe' is not known. Valid: plan, "):
        MicroMixConfig(recipe=recipe)
    assert not (tmp_path / "m").exists()


def calibrated_otherwise(source):
    return uniform_plan(linear_shapes(load(source)), Recipe(format="mxfp6"))


def test_a_rounded_plan_is_that_of_its_checkpoint(source, ids, tmp_path):
    from micromix_compile.archive import this_machine
    from micromix_compile.package import _check_machine

    model = load(source)
    calibration = calibrate(model).run([ids])
    plan = calibration.plan(Recipe(split=MIX.split, rounding="gptq"))
    save_pretrained(model, tmp_path / "rounded", plan)
    save_pretrained(load(source), tmp_path / "nearest", plan.without_rounding())
    assert plan_to_use(load(tmp_path / "rounded"), plan).digest == plan.digest
    with pytest.raises(QuantizedAlreadyError):
        plan_to_use(load(tmp_path / "nearest"), plan)
    made = plan_to_use(load(tmp_path / "rounded"), None)
    _check_machine("x.pt2", this_machine(torch.device("cpu")) | {"plan_digest": made.digest}, plan)


def test_hooks_of_planned_layers_are_not_dropped(source, tmp_path):
    model = load(source)
    layer = model.get_submodule(LAYER)
    hook = layer.register_forward_pre_hook(lambda module, arguments: None)
    with pytest.raises(HookedLayerError, match=LAYER):
        save_pretrained(model, tmp_path / "m", Recipe(format="mxfp8"))
    save_pretrained(model, tmp_path / "m", Recipe(format="mxfp8", skip=("*.up_proj",)))
    hook.remove()
    layer.forward = functools.partial(type(layer).forward, layer)
    with pytest.raises(HookedLayerError, match=LAYER), quantised(model, Recipe(format="mxfp8")):
        pass


def test_released_weights_are_not_saved(source, ids, tmp_path):
    model = load(source)
    options = {"inductor": False, "recipe": Recipe(format="mxfp8"), "release_weights": True}
    compiled = torch.compile(model, backend="micromix", options=options)
    logits(compiled, ids)
    for recipe in (Recipe(format="mxfp8"), Recipe(format="mxfp8", skip=("*",))):
        with pytest.raises(ReleasedWeightError, match="micromix.restore"):
            save_pretrained(compiled, tmp_path / "m", recipe)
    assert not list(tmp_path.iterdir())
    micromix.restore(model, source)
    save_pretrained(compiled, tmp_path / "m", Recipe(format="mxfp8"))


def test_a_link_to_an_empty_directory(source, plan, saved, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_pretrained(load(source), tmp_path / "link", plan, max_shard_size=SHARD)
    assert contents(tmp_path / "real") == contents(saved)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_the_users_is_not_taken_for_a_partial_one(linked, source, plan, tmp_path):
    mine = tmp_path / ("mine" if linked else "model.partial")
    mine.mkdir()
    (mine / "data.txt").write_text("precious")
    if linked:
        (tmp_path / "model.partial").symlink_to("mine")
    with pytest.raises(CheckpointExistsError, match=r"model\.partial exists .*/model is written"):
        save_pretrained(load(source), tmp_path / "model", plan)
    assert (mine / "data.txt").read_text() == "precious"


def test_two_processes_do_not_write_one_checkpoint(source, plan, saved, tmp_path):
    partial = tmp_path / "model.partial"
    partial.mkdir()
    folder = os.open(partial, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another process is writing it"):
        save_pretrained(load(source), tmp_path / "model", plan, max_shard_size=SHARD)
    os.close(folder)
    save_pretrained(load(source), tmp_path / "model", plan, max_shard_size=SHARD)
    assert contents(tmp_path / "model") == contents(saved)


def test_a_full_disk_is_an_os_error_for_the_tokenizer_too(source, plan, tmp_path):
    class Full:
        def save_pretrained(self, directory):
            raise RuntimeError("No space left on device (os error 28)")  # tokenizers: Exception

    with pytest.raises(OSError, match="tokenizer cannot be written .* No space left"):
        save_pretrained(load(source), tmp_path / "model", plan, tokenizer=Full())


def test_a_mount_point_is_refused_before_the_work(source, plan, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(OutputError, match="a new folder within it"):
        save_pretrained(load(source), tmp_path / "disk", plan)


def test_a_name_that_cannot_be_given_keeps_the_progress(source, plan, tmp_path, monkeypatch):
    def replace(source, target):
        if Path(target).name == "model":
            raise OSError("no")
        real(source, target)

    real = os.replace
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "replace", replace)
        save_pretrained(load(source), tmp_path / "model", plan, source=source)
    whole = tmp_path / "model.partial" / "model.safetensors"
    time = whole.stat().st_mtime_ns
    save_pretrained(load(source), tmp_path / "model", plan, source=source)
    assert (tmp_path / "model" / whole.name).stat().st_mtime_ns == time


def test_another_model_of_the_same_names_sizes_and_times(tmp_path):
    """As archives and some build systems leave them."""
    models = {}
    for name, sign in (("a", 1), ("b", -1)):
        models[name] = tiny_llama()
        with torch.no_grad():
            for parameter in models[name].parameters():
                parameter.mul_(sign)
        models[name].save_pretrained(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (0, 0))
    out = tmp_path / "out"
    save = functools.partial(save_pretrained, plan=Recipe(format="mxfp8"), max_shard_size=SHARD)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="stopped"):
        patch.setattr("micromix_compile.checkpoint._write_documents", stop)
        save(models["a"], out, source=tmp_path / "a")
    for file in (tmp_path / "a").iterdir():  # b in the place of a
        file.write_bytes((tmp_path / "b" / file.name).read_bytes())
        os.utime(file, (0, 0))
    save(models["b"], out, source=tmp_path / "a")
    save(models["b"], tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def stop(*_):
    raise OSError("stopped")


def test_a_class_without_the_head(saved):
    with pytest.raises(
        CheckpointClassError, match="saved from LlamaForCausalLM and is loaded as Llama"
    ):
        AutoModel.from_pretrained(saved)


def test_who_asks_where_the_registry_lies_does_not_stop_the_registration():
    program = """
        import importlib.util, micromix_compile
        importlib.util.find_spec("transformers.quantizers")
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        assert "micromix" in AUTO_QUANTIZER_MAPPING
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("size", ["banana", "infGB", "nan", 0])
def test_sizes_of_shards_that_make_no_sense(size, source, plan, tmp_path):
    with pytest.raises(OptionError, match="max_shard_size"):
        save_pretrained(load(source), tmp_path / "m", plan, max_shard_size=size)
