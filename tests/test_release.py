"""release_weights: the float weights are gone as they are packed, are never used, and can be brought back."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny_llama import save_tiny
from transformers import AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate
from micromix_compile.errors import CheckpointError, ReleasedWeightError, StrictError
from micromix_compile.ops import kernel_name
from micromix_compile.packing import is_released, owners

PEAK = """
    import torch
    from torch import nn
    from micromix_compile import Recipe
    torch.set_num_threads(1)

    def memory(key):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    def model(layers, k, n):
        parts = [p for _ in range(layers) for p in (nn.Linear(k, n, bias=False), nn.Linear(n, k, bias=False))]
        return nn.Sequential(*parts).eval()

    def compiled(model, x):
        options = {"inductor": False, "recipe": Recipe(format="mxfp4"), "release_weights": True}
        with torch.inference_mode():
            return torch.compile(model, backend="micromix", options=options, dynamic=False)(x)

    compiled(model(2, 128, 256), torch.randn(2, 128))  # whatever the first compilation loads
    torch.compiler.reset()
    big = model(8, 1024, 4096)  # 16 layers of 16 MiB
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    compiled(big, torch.randn(2, 1024))
    print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


def test_peak_memory_is_the_float_model_and_one_layers_packing():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    peak, after = map(float, run.stdout.split())
    # A layer is 16 MiB of float32, packed 2.2 MiB, which it is twice for a moment.
    assert peak < 12, f"{peak} MiB above the float model"
    assert after < -16 * 16 * 0.6, f"{-after} MiB of 256 were freed"


@pytest.fixture
def released(tmp_path):
    directory = save_tiny(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.randint(0, 128, (2, 12))
    calibrate(model).run([ids]).plan(Recipe(split=(0.5, 0.25, 0.25))).attach(model)
    with torch.no_grad():
        expected = model(ids).logits
        options = {"inductor": False, "release_weights": True}
        compiled = torch.compile(model, backend="micromix", options=options)
        packed = compiled(ids).logits
    return directory, model, compiled, ids, expected, packed


def test_eager_use_says_what_to_do(released):
    _, model, compiled, ids, _, packed = released
    with torch.no_grad():
        with pytest.raises(ReleasedWeightError, match=r"q_proj was released .* micromix.restore"):
            model(ids)
        assert torch.equal(compiled(ids).logits, packed), "the compiled model runs"
        assert compiled(ids[:1, :5]).logits.shape[:2] == (1, 5), "another shape compiles"


@pytest.mark.parametrize("mapping", [False, True])
def test_restore(mapping, released):
    directory, model, compiled, ids, expected, packed = released
    source = directory
    if mapping:
        source = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    names = micromix.restore(model, source)
    assert len(names) == 14 and not any(map(is_released, model.parameters()))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(compiled(ids).logits, packed)
    assert micromix.restore(model, source) == []


USES = """
    import copy, io, pickle, torch
    from torch import nn
    from micromix_compile.errors import ReleasedWeightError
    from micromix_compile import Recipe

    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64)).eval(), torch.randn(2, 512)
    options = {"release_weights": True, "inductor": False, "recipe": Recipe(format="mxfp8")}
    compiled = torch.compile(model, backend="micromix", options=options)
    floats = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(use):
        try:
            use()
        except ReleasedWeightError:
            return
        raise AssertionError(use)

    def save(object):
        torch.save(object, io.BytesIO())

    with torch.no_grad():
        y = compiled(x)
        refused(lambda: model(x))
        refused(lambda: copy.deepcopy(model))
        refused(lambda: copy.deepcopy(model[0].weight))
        refused(lambda: pickle.dumps(model))
        refused(lambda: save(model))
        refused(lambda: save(model.state_dict()))
        refused(lambda: compiled.state_dict())
        refused(lambda: [tensor.clone() for tensor in model.state_dict().values()])
        assert torch.equal(compiled(x), y)
"""


def in_a_process_of_its_own(code: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_no_copy_is_made_of_what_is_gone():
    in_a_process_of_its_own(USES)


@pytest.mark.parametrize("restore", ["micromix_compile.restore(model, floats)", "by_hand()"])
def test_copies_of_what_is_restored(restore):
    more = f"""
        import micromix_compile

        def by_hand():
            for name, parameter in model.named_parameters():
                parameter.untyped_storage().resize_(parameter.nbytes)
                parameter.copy_(floats[name])

        {restore}
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), model(x))
        assert all(torch.equal(t, floats[name]) for name, t in model.state_dict().items())
        save(model.state_dict())
        packed = compiled(x)
        assert torch.equal(packed, y)
    """
    in_a_process_of_its_own(USES + more)


def test_restore_is_all_or_nothing(released, tmp_path):
    directory, model, *_ = released
    whole = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    name = "model.layers.1.mlp.down_proj.weight"
    packed = tmp_path / "packed"  # in MXFP8 the bytes of a weight have the shape of the weight
    recipe = Recipe(format="mxfp8")
    micromix.save_pretrained(AutoModelForCausalLM.from_pretrained(directory), packed, recipe)
    for source in (
        {k: v for k, v in whole.items() if k != name},
        {**whole, name: torch.zeros(3, 3)},
        tmp_path,
        tmp_path / "none",
        packed,
    ):
        with pytest.raises(CheckpointError):
            micromix.restore(model, source)
        assert sum(map(is_released, model.parameters())) == 14


@pytest.mark.skipif(kernel_name(torch.device("cpu")) == "reference", reason="it fuses nothing")
def test_a_missed_fusion_is_known_when_the_weights_are_gone():
    class Cubes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True)))

    model, x, recipe = Cubes().eval(), torch.randn(2, 64), Recipe(format="mxfp8")
    floats = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def compiled(**options):
        torch.compiler.reset()
        return torch.compile(model, backend="micromix", options={"recipe": recipe, **options})

    with torch.no_grad():
        expected = compiled()(x)
        with pytest.raises(StrictError, match=r"compile without strict\.\n"):
            compiled(strict=True)(x)
        with pytest.raises(StrictError, match=r"micromix\.restore\(model, checkpoint\) brings"):
            compiled(strict=True, release_weights=True)(x)
        with pytest.raises(ReleasedWeightError):
            model(x)
        micromix.restore(model, floats)
        assert torch.equal(compiled()(x), expected)


def test_modules_that_gc_freeze_hides_are_owners_too():
    embedding = torch.nn.Embedding(4, 8)
    gc.freeze()
    assert owners()[id(embedding.weight)] == 2
