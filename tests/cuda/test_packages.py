"""Packages for a GPU: what runs ahead-of-time compiled is what torch.compile runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from gated import Gated
from tiny_llama import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate
from micromix_compile import _torch_compat as compat
from micromix_compile.errors import PackageInputError, UncapturedStepWarning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not compat.runs_packages(), reason="torch 2.11 runs none"),
]
MIX = Recipe(split=(0.5, 0.25, 0.25))
LENGTH = 48


def in_a_fresh_process(program: str):
    """What a program prints as JSON, in a Python that has compiled nothing."""
    result = subprocess.run(
        [sys.executable, "-c", "import json, torch, micromix_compile as m; " + program],
        capture_output=True, text=True, check=False, env=dict(os.environ), timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_package_gives_what_torch_compile_gives(tmp_path, dtype):
    torch.manual_seed(0)
    model = Gated().eval().to("cuda", dtype)
    x = torch.randn(40, 64, device="cuda", dtype=dtype)
    plan = calibrate(model).run([x]).plan(MIX)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    micromix.export(model, tmp_path / "gated.pt2", (x,), plan=plan, dynamic_shapes=shapes)
    package = micromix.load_package(tmp_path / "gated.pt2", plan=plan)
    plan.attach(model)
    compiled = torch.compile(model, backend="micromix", dynamic=True, options={"strict": True})
    for rows in (1, 7, 40):
        with torch.no_grad():
            expected = compiled(x[:rows])
        given = package(x[:rows])
        assert given.is_cuda and torch.equal(given, expected)
    with pytest.raises(PackageInputError, match="argument 0 is on cpu, not on cuda"):
        package(x.cpu())
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        again = package(x)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(again, given)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A quantised tiny Llama on the GPU, and its package with prefill and decode."""
    folder = tmp_path_factory.mktemp("decoder")
    save_tiny(folder / "float")
    model = AutoModelForCausalLM.from_pretrained(folder / "float", device_map="cuda")
    plan = calibrate(model).run([torch.randint(0, 128, (2, 24), device="cuda")]).plan(MIX)
    micromix.save_pretrained(model, folder / "quantised", plan, tokenizer=tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(folder / "quantised", device_map="cuda")
    micromix.export_decoder(
        model, folder / "decoder.pt2", max_length=LENGTH, tokenizer=tiny_tokenizer()
    )
    return model, folder / "decoder.pt2"


def test_prefill_and_decode_are_the_compiled_model(decoder):
    model, path = decoder
    package = micromix.load_package(path)
    compiled = torch.compile(model, backend="micromix", dynamic=True)
    ids = torch.randint(0, 128, (1, 30), device="cuda")
    with torch.no_grad():
        expected = compiled(ids).logits[0].float()
    cache = package.new_cache()
    rows = [package(ids[:, :12], 0, cache)]
    rows += [package(ids[:, i : i + 1], i, cache) for i in range(12, 30)]
    # Attention runs over the whole cache here, and so sums in another order.
    assert (torch.cat(rows).float() - expected[11:]).norm() < 0.03 * expected[11:].norm()


def test_a_decoder_generates_in_a_fresh_process(decoder):
    _, path = decoder
    package = micromix.load_package(path)
    prompt = torch.randint(0, 128, (1, 9), device="cuda")
    expected = package.generate(prompt, 20, eos_token_id=[])
    assert expected.is_cuda and expected.shape == (1, 29)
    sampled = [
        package.generate(
            prompt, 12, temperature=5.0, generator=torch.Generator("cuda").manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    with pytest.raises(PackageInputError, match="is on cpu, not on cuda"):
        package.generate(prompt.cpu(), 2)
    program = (
        f"p = m.load_package({str(path)!r}); ids = torch.tensor({prompt.tolist()}, device='cuda');"
        "print(json.dumps(p.generate(ids, 20, eos_token_id=[]).tolist()))"
    )
    assert in_a_fresh_process(program) == expected.tolist()


def test_steps_replay_a_cuda_graph(decoder):
    _, path = decoder
    package = micromix.load_package(path)
    prompt = torch.randint(0, 128, (1, 9), device="cuda")
    cache = package.new_cache()
    token, expected = package(prompt, 0, cache).argmax(-1), []
    for place in range(9, 29):
        expected.append(token)
        token = package(token[:, None], place, cache).argmax(-1)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        tokens = package.generate(prompt, 20, eos_token_id=[])
    assert tokens[0, 9:].tolist() == torch.cat(expected).tolist()
    # 19 steps, of which the first one runs by itself.
    assert launches(profile) == 18
    aside = torch.cuda.stream(torch.cuda.Stream())
    with torch.profiler.profile(activities=activities) as profile, aside, torch.inference_mode():
        again = package.generate(prompt, 20, eos_token_id=[])
    assert torch.equal(again, tokens) and launches(profile) == 19


def launches(profile: torch.profiler.profile) -> int:
    """Of CUDA graphs."""
    return sum("GraphLaunch" in event.name for event in profile.events())


def test_texts_at_once_and_one_left_half_way(decoder):
    package = micromix.load_package(decoder[1])
    prompts = torch.randint(0, 128, (3, 1, 9), device="cuda")
    expected = [package.generate(prompt, 12, eos_token_id=[])[0, 9:] for prompt in prompts]
    next(package.stream(prompts[0], 12, eos_token_id=[]))
    streams = [package.stream(prompt, 12, eos_token_id=[]) for prompt in prompts]
    found = torch.stack([torch.cat(tokens) for tokens in zip(*streams, strict=True)])
    assert torch.equal(found.T, torch.stack(expected))


def test_an_end_token_ends_a_text(decoder):
    package = micromix.load_package(decoder[1])
    prompt = torch.randint(0, 128, (1, 9), device="cuda")
    free = package.generate(prompt, 24, eos_token_id=[])
    for end in free[0, 9:].unique().tolist():
        length = 10 + free[0, 9:].tolist().index(end)
        found = package.generate(prompt, 24, eos_token_id=[end])
        assert torch.equal(found, free[:, :length])


def test_a_text_leaves_nothing_to_the_next_one(decoder):
    package = micromix.load_package(decoder[1])
    prompt = torch.randint(0, 128, (1, 9), device="cuda")
    expected = package.generate(prompt, 12, eos_token_id=[])
    (steps,) = package._idle
    for part in steps.cache:
        part.fill_(float("nan"))
    assert torch.equal(package.generate(prompt, 12, eos_token_id=[]), expected)
    assert package._idle == [steps]


def test_graphs_that_are_gone_leave_no_memory(decoder):
    package = micromix.load_package(decoder[1])
    prompt, reserved = torch.randint(0, 128, (1, 9), device="cuda"), []
    for _ in range(12):
        streams = [package.stream(prompt, 4, eos_token_id=[]) for _ in range(2)]
        for _ in zip(*streams, strict=True):
            pass
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[1]
    before = torch.cuda.memory_allocated()
    del package, streams
    assert torch.cuda.memory_allocated() < before


def test_a_step_that_cannot_be_captured_says_so(decoder, monkeypatch):
    _, path = decoder
    package = micromix.load_package(path)
    prompt = torch.randint(0, 128, (1, 9), device="cuda")
    expected = micromix.load_package(path).generate(prompt, 8, eos_token_id=[])
    decode = package.entries["decode"]
    run, waits = decode.run, lambda inputs: inputs[1].item()
    monkeypatch.setattr(decode, "run", lambda inputs: (waits(inputs), run(inputs))[1])
    with pytest.warns(UncapturedStepWarning, match=r"cannot be captured.*not permitted") as warned:
        tokens = [package.generate(prompt, 8, temperature=t, eos_token_id=[]) for t in (0.0, 1.0)]
    assert len(warned) == 1 and torch.equal(tokens[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_package_runs_on_the_device_it_was_loaded_on(decoder):
    _, path = decoder
    prompt = torch.randint(0, 128, (1, 9), device="cuda")
    expected = micromix.load_package(path).generate(prompt, 8, eos_token_id=[])
    with torch.cuda.device(1):
        package = micromix.load_package(path)
    found = package.generate(prompt.to("cuda:1"), 8, eos_token_id=[])
    assert found.device.index == 1 and torch.equal(found.cpu(), expected.cpu())
    with pytest.raises(PackageInputError, match="is on cuda:0, not on cuda:1"):
        package.generate(prompt, 2)
