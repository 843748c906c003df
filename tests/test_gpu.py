"""On a CUDA device: the compiler around the kernels. tests/ops/test_quantize_cuda.py and tests/cuda have the kernels."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import build, inputs
from tiny_llama import VOCABULARY, save_tiny, tiny_llama
from transformers import AutoModelForCausalLM

from micromix_compile import Recipe, calibrate, explain, save_pretrained
from micromix_compile.errors import ReferenceKernelWarning
from micromix_compile.integrations.transformers import MicroMixConfig
from micromix_compile.ops import EMULATED, _reference, blackwell_kernel, kernel_name
from micromix_compile.packing import pack_weight, packings
from micromix_compile.reference import reference_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device: str, arguments: dict) -> dict:
    return {name: value.to(device) for name, value in arguments.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plan_made_on_the_cpu_runs_on_the_gpu(name):
    model, arguments = build(name), inputs(name)
    plan = calibrate(model).run([arguments]).plan(Recipe(split=(0.5, 0.25, 0.25)))
    model, arguments = model.cuda(), on("cuda", arguments)
    reference = reference_model(model, plan)
    plan.attach(model)
    with torch.no_grad():
        exact = model(**arguments).logits
        expected = reference(**arguments).logits
        compiled = torch.compile(model, backend="micromix", options={"strict": True})
        _reference._warned.clear()  # it warns once in a process
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReferenceKernelWarning)
            found = compiled(**arguments).logits
    change = (expected - exact).norm()
    assert found.is_cuda and change > 0
    assert (found - expected).norm() <= 0.1 * change
    rows = [row for row in explain(compiled).layers.values() if not row.reason]
    assert len(rows) == len(plan)
    assert {row.kernel for row in rows} == {kernel_name("cuda")}


def test_calibration_on_the_gpu_sees_what_it_sees_on_the_cpu():
    model, arguments = build("llama"), inputs("llama")
    on_cpu = calibrate(model).run([arguments]).statistics
    on_gpu = calibrate(model.cuda()).run([arguments]).statistics
    assert list(on_gpu.layers) == list(on_cpu.layers)
    for name in on_cpu.layers:
        torch.testing.assert_close(on_gpu[name].total, on_cpu[name].total, rtol=1e-3, atol=1e-3)
        assert on_gpu[name].tokens == on_cpu[name].tokens


EMULATION = {"strict": True, "kernel": "mx_emulated"}


MIX = Recipe(split=(0.5, 0.25, 0.25))


def planned_llama(dtype: torch.dtype, recipe: Recipe = MIX) -> tuple[torch.nn.Module, torch.Tensor]:
    """Four layers with a plan of all three formats, on the CPU, and a prompt."""
    model = tiny_llama(dtype, layers=4)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(VOCABULARY, (2, 12), generator=generator)
    calibrate(model).run([{"input_ids": prompt}]).plan(recipe).attach(model)
    return model, prompt


def greedy(compiled, tokens: torch.Tensor, count: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(count):
            logits = compiled(input_ids=tokens, use_cache=False).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens.cpu()


@pytest.mark.parametrize(
    "recipe", (MIX, Recipe(split=(0.5, 0.25, 0.25), hadamard=(4, 6))), ids=("mix", "rotated")
)
def test_llama_with_the_emulated_kernel_gives_the_tokens_of_the_cpu(recipe):
    model, prompt = planned_llama(torch.float32, recipe)
    dynamic = {"backend": "micromix", "dynamic": True}
    compiled = torch.compile(model, options={"strict": True}, **dynamic)
    expected = greedy(compiled, prompt, 12)
    passes = explain(compiled).passes
    passes.pop("materialize_shared")  # of CPUs alone
    passes.pop("lower_attention", None)  # of CPUs with a kernel for it
    torch.compiler.reset()

    model = model.cuda()
    compiled = torch.compile(model, options=EMULATION, **dynamic)
    assert torch.equal(greedy(compiled, prompt.cuda(), 12), expected)
    rows = explain(compiled).layers.values()
    assert {row.kernel for row in rows if not row.reason} == {kernel_name("cuda", EMULATED)}
    assert explain(compiled).passes == passes  # the same layers lowered, merged, and fused
    assert passes["rms_norm"] > 0 and passes["silu_mul"] > 0


def test_cuda_graphs_replay_with_one_packing_at_one_address():
    model, prompt = planned_llama(torch.bfloat16)
    model, prompt = model.cuda(), prompt.cuda()
    prompts = [prompt, prompt.flip(1), prompt.roll(1, 1), prompt]
    plain = torch.compile(model, backend="micromix", options=EMULATION)
    with torch.no_grad():
        expected = [plain(input_ids=tokens, use_cache=False).logits for tokens in prompts]
    torch.compiler.reset()
    packed = packings()
    compiled = torch.compile(
        model, backend="micromix", options={**EMULATION, "mode": "reduce-overhead"}
    )
    activity = torch.profiler.ProfilerActivity
    with torch.no_grad():
        for _ in range(3):  # warm up, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            compiled(input_ids=prompt, use_cache=False)
        for tokens, logits in zip(prompts, expected, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
                found = compiled(input_ids=tokens, use_cache=False).logits
            assert torch.equal(found, logits)
            assert any("GraphLaunch" in event.name for event in profile.events())
        assert packings() == packed
        # A weight changed in place is packed again where the graph reads it.
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.mul_(-2)
        torch.compiler.cudagraph_mark_step_begin()
        changed = compiled(input_ids=prompt, use_cache=False).logits.clone()
        weight.div_(-2)
        torch.compiler.cudagraph_mark_step_begin()
        restored = compiled(input_ids=prompt, use_cache=False).logits
    assert not torch.equal(changed, expected[0])
    assert torch.equal(restored, expected[0])


def test_equal_layers_share_a_graph():
    model, prompt = planned_llama(torch.bfloat16)
    model, prompt = model.cuda(), prompt.cuda()
    whole = torch.compile(model, backend="micromix", options={**EMULATION, "inductor": False})
    with torch.no_grad():
        expected = whole(input_ids=prompt, use_cache=False).logits
        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(backend="micromix", options={**EMULATION, "inductor": False})
        head = torch.compile(model.lm_head, backend="micromix", options={"inductor": False})
        hidden = model.model(input_ids=prompt, use_cache=False).last_hidden_state
        assert torch.equal(head(hidden), expected)
    explained = explain(model.model.layers)
    assert explained.graphs == 1
    assert {row.kernel for row in explained.layers.values()} == {kernel_name("cuda", EMULATED)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_packed_on_the_cpu_is_placed_on_the_gpu(dtype):
    model, _ = planned_llama(dtype)
    name, layer = "model.layers.0.mlp.down_proj", model.model.layers[0].mlp.down_proj
    plan = calibrate(model).run([{"input_ids": torch.zeros(1, 4).long()}]).plan(Recipe())[name]
    packed = pack_weight(layer.weight, plan).to("cuda")
    on_gpu = pack_weight(layer.weight.cuda(), plan)
    assert torch.equal(packed.data, on_gpu.data) and torch.equal(packed.scales, on_gpu.scales)
    for kernel in ("auto", "mx_emulated"):
        assert torch.equal(packed.place(kernel), on_gpu.place(kernel))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))


def load(directory, device="cuda", **options):
    options = {"device_map": device, "dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def test_a_checkpoint_runs_on_the_gpu(source, ids, tmp_path):
    """Made on the CPU or while it is loaded onto the GPU: the same bits, by the same kernels, compiled or not."""
    model = load(source, "cpu")
    plan = calibrate(model).run([ids]).plan(MIX)
    save_pretrained(model, tmp_path / "saved", plan)
    plan.attach(model.cuda())
    ids = ids.cuda()
    compiled = torch.compile(model, backend="micromix", options={"inductor": False})
    with torch.inference_mode():
        expected = compiled(ids, use_cache=False).logits
        exact = model(ids, use_cache=False).logits
        assert not torch.equal(expected, exact)
        saved = load(tmp_path / "saved")
        assert torch.equal(saved(ids, use_cache=False).logits, expected)
        converted = load(source, quantization_config=MicroMixConfig(plan=plan))
        assert torch.equal(converted(ids, use_cache=False).logits, expected)
        torch.compiler.reset()
        fused = torch.compile(saved, backend="micromix", options={"strict": True})
        found = fused(ids, use_cache=False).logits
        assert (found - expected).norm() <= 0.1 * (expected - exact).norm()
        assert {row.kernel for row in explain(fused).layers.values() if not row.reason} == {
            kernel_name("cuda")
        }
        # Transformers compiles the steps of decoding by itself, for a static cache.
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        tokens = saved.generate(ids, cache_implementation="static", **options)
        assert torch.equal(tokens[:, :17], saved.generate(ids, **options)[:, :17])
        assert tokens.shape == (2, 24)


def test_measured_recipes_on_the_gpu(source, ids):
    """A budget of bits by measured errors, rotations and GPTQ: planned on the GPU, better than the mix of equal bits."""
    errors = {}
    for name, gradients, recipe in (
        ("measured", True, Recipe(bits=5.0, hadamard=(4, 6), rounding="gptq")),
        ("mxfp4", False, Recipe(format="mxfp4")),
    ):
        torch.compiler.reset()
        model = load(source)
        plan = calibrate(model, gradients=gradients).run([{"input_ids": ids.cuda()}]).plan(recipe)
        with torch.inference_mode():
            exact = model(ids.cuda(), use_cache=False).logits
            plan.attach(model)
            compiled = torch.compile(model, backend="micromix", options={"strict": True})
            found = compiled(ids.cuda(), use_cache=False).logits
        errors[name] = (found - exact).norm().item()
    assert 0 < errors["measured"] < 0.6 * errors["mxfp4"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_the_second_gpu():
    model, prompt = planned_llama(torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.compiler.reset()
        model = model.to(device)
        compiled = torch.compile(model, backend="micromix", options=EMULATION)
        with torch.no_grad():
            results.append(compiled(input_ids=prompt.to(device), use_cache=False).logits.cpu())
    assert torch.equal(*results)


def test_the_emulated_kernel_runs_only_where_it_is_asked_for():
    device = torch.device("cuda")
    assert blackwell_kernel(device, EMULATED)
    if blackwell_kernel(device) == "native":
        pytest.skip("this GPU runs the kernel natively")
    assert kernel_name(device) == "cuda_decoded"
