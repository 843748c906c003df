"""Packages: what runs ahead-of-time compiled is what torch.compile runs, from Python and from C++."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import zipfile
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from gated import Gated
from tiny_llama import save_tiny, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import StaticLayer

import micromix_compile as micromix
from micromix_compile import Recipe, calibrate
from micromix_compile import _torch_compat as compat
from micromix_compile.archive import MANIFEST
from micromix_compile.cli import main
from micromix_compile.decoder import export_decoder
from micromix_compile.errors import (
    ExportError,
    FileVersionError,
    GenerationSettingsWarning,
    GradientError,
    HookedLayerError,
    MicroMixError,
    OptionError,
    PackageError,
    PackageInputError,
    PackageMismatchError,
    UncapturedStepWarning,
)
from micromix_compile.export import _check_linking, trace
from micromix_compile.ops import _extension
from micromix_compile.package import DecoderPackage, _choose
from micromix_compile.planned import quantised

pytestmark = pytest.mark.skipif(not compat.runs_packages(), reason="torch 2.11 runs none")
RUNNER = _extension.LIBRARY.with_name("micromix_runner")
MIX = Recipe(split=(0.5, 0.25, 0.25))
LENGTH = 48


class Nested(Gated):
    """Takes and gives nested values."""

    def forward(self, x, more, scale=1.0):
        x = self.norm(x)
        y = self.products(x) * scale
        return {"y": y + more["shift"][0], "parts": [y, (x, None)]}


def run(*arguments, timeout=None, **environment):
    return subprocess.run(
        [str(a) for a in arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A model, its plan, its package with a dynamic batch, and example arguments."""
    torch.manual_seed(0)
    model = Nested().eval()
    # An example of other strides than the package gets.
    x, more = torch.randn(64, 4).T, {"shift": [torch.randn(64)]}
    with micromix.calibrate(model) as calibration, torch.no_grad():
        model(x, more)
    plan = calibration.plan(MIX)
    path = tmp_path_factory.mktemp("package") / "gated.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"x": {0: batch}, "more": {"shift": [None]}, "scale": None}
    micromix.export(model, path, (x, more), {"scale": 2.0}, plan=plan, dynamic_shapes=shapes)
    return model, plan, path, more


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A quantised tiny Llama and its package with prefill and decode."""
    folder = tmp_path_factory.mktemp("decoder")
    save_tiny(folder / "float")
    model = AutoModelForCausalLM.from_pretrained(folder / "float")
    plan = calibrate(model).run([torch.randint(0, 128, (2, 24))]).plan(MIX)
    micromix.save_pretrained(model, folder / "quantised", plan, tokenizer=tiny_tokenizer())
    arguments = ["export", str(folder / "quantised"), str(folder / "decoder.pt2")]
    assert main([*arguments, "--max-length", str(LENGTH)]) == 0
    return AutoModelForCausalLM.from_pretrained(folder / "quantised"), folder / "decoder.pt2"


def test_a_package_gives_what_torch_compile_gives(gated):
    model, plan, path, more = gated
    assert isinstance(model.gate, nn.Linear), "the model is float again"
    package = micromix.load_package(path, plan=plan)
    plan.attach(model)
    compiled = torch.compile(model, backend="micromix", dynamic=True)
    for rows in (1, 2, 17):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            expected = compiled(x, more, scale=2.0)
        given = package(x, more, scale=2.0)
        assert torch.equal(given.y, expected["y"])
        assert torch.equal(given["parts"][0], expected["parts"][0])
        assert isinstance(given["parts"][1], tuple) and given["parts"][1][1] is None
        again = package(x=x, more=more, scale=2.0)
        assert torch.equal(again.y, given.y)


def test_the_archive_is_close_to_the_packed_bytes(gated, decoder):
    _, plan, path, _ = gated
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        weights = next(i for i in archive.infolist() if i.filename.endswith("weights.bin"))
    packed = sum(row["weight_bytes"] for row in plan.summary())
    assert packed < weights.file_size < packed + 64 * 16 + 4 * (64 * 4 + 96 * 2) + 2048
    assert not [name for name in names if name.endswith((".pkl", ".pt"))]
    model, path = decoder
    state = sum(t.nbytes for t in model.state_dict().values())
    bytes_ = micromix.load_package(path).weight_bytes
    assert state < bytes_ < 1.05 * state, "both graphs share the weights"


def test_prefill_and_decode_are_the_compiled_model(decoder):
    model, path = decoder
    package = micromix.load_package(path)
    compiled = torch.compile(model, backend="micromix", dynamic=True)
    ids = torch.randint(0, 128, (1, 30))
    with torch.no_grad():
        expected = compiled(ids).logits[0]
    cache = package.new_cache()
    rows = [package(ids[:, :12], 0, cache)]
    rows += [package(ids[:, i : i + 1], i, cache) for i in range(12, 30)]
    # Attention runs over the whole cache here, and so sums in another order.
    difference = (torch.cat(rows).float() - expected[11:].float()).norm()
    assert difference < 0.03 * expected[11:].float().norm()


def test_generate(decoder):
    _, path = decoder
    package = micromix.load_package(path)
    prompt = torch.randint(0, 128, (1, 9))
    tokens = package.generate(prompt, 20, eos_token_id=[])
    assert tokens.shape == (1, 29) and torch.equal(tokens[:, :9], prompt)
    assert package.generate(prompt, 500, eos_token_id=[]).shape == (1, LENGTH + 1)
    end = tokens[0, 12].item()
    stopped = package.generate(prompt, 20, eos_token_id=[end])
    assert stopped[0, -1] == end and stopped.shape[1] <= 13
    one = package.generate(prompt[:, :1], 3, eos_token_id=[])
    assert one.shape == (1, 4)
    sampled = [
        package.generate(prompt, 12, temperature=5.0, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    with pytest.raises(PackageInputError, match=r"1 to 47\]\nGive them so, .* --max-length"):
        package.generate(torch.zeros(1, LENGTH, dtype=torch.int64))


def test_rows_of_a_batch_are_those_of_single_prompts(decoder, tmp_path):
    model, path = decoder
    micromix.export_decoder(model, tmp_path / "two.pt2", batch_size=2, max_length=LENGTH)
    one, two = micromix.load_package(path), micromix.load_package(tmp_path / "two.pt2")
    for length in (1, 9):
        prompts = torch.randint(0, 128, (2, length))
        rows = [one.generate(prompt[None], 20, eos_token_id=[]) for prompt in prompts]
        tokens = two.generate(prompts, 20, eos_token_id=[])
        assert torch.equal(tokens, torch.cat(rows))
    ends = [tokens[0, 12].item(), tokens[1, 16].item()]
    stopped = two.generate(prompts, 20, eos_token_id=ends)
    rows = [one.generate(prompt[None], 20, eos_token_id=ends)[0].tolist() for prompt in prompts]
    longest = max(map(len, rows))
    repeated = [row + row[-1:] * (longest - len(row)) for row in rows]
    assert stopped.tolist() == repeated
    for rows in (prompts[:1], prompts.repeat(2, 1)):
        with pytest.raises(PackageInputError, match=r"input_ids is .*, not \[2, 1"):
            two.generate(rows)
    for size in (0, 1.5, True):
        with pytest.raises(ExportError, match=f"batch_size cannot be {size}. Give 1 or more"):
            micromix.export_decoder(model, tmp_path / "x.pt2", batch_size=size)


class BrokenGraph:
    """A capture in which something is not allowed; its end raises too, as CUDA's does."""

    def capture_begin(self, capture_error_mode):
        raise RuntimeError("a wait is not permitted.\nMore of it")

    def capture_end(self):
        raise RuntimeError("the capture was broken")


def test_a_step_that_no_graph_can_hold(decoder, monkeypatch):
    """What a GPU does then, without one."""
    package = micromix.load_package(decoder[1])
    prompt = torch.randint(0, 128, (1, 9))
    expected = package.generate(prompt, 8, eos_token_id=[])
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "CUDAGraph": BrokenGraph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda given: contextlib.nullcontext(),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    package.entries["decode"].captures = True
    with pytest.warns(UncapturedStepWarning, match=r"\(a wait is not permitted\)") as warned:
        tokens = [package.generate(prompt, 8, eos_token_id=[]) for _ in range(2)]
    assert len(warned) == 1 and all(torch.equal(found, expected) for found in tokens)
    package.entries["decode"].captures = True
    monkeypatch.setattr(BrokenGraph, "capture_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package.generate(prompt, 8, eos_token_id=[])


def interrupted(self, capture_error_mode):
    raise KeyboardInterrupt


def test_the_runner_gives_the_same_tokens_without_python(decoder):
    if not RUNNER.exists():
        pytest.skip("the runner was not built")
    _, path = decoder
    prompt = torch.randint(0, 128, (1, 9))
    expected = micromix.load_package(path).generate(prompt, 20, eos_token_id=[])[0, 9:]
    ids = " ".join(map(str, prompt[0].tolist()))
    result = run(RUNNER, path, "--tokens", ids, "--new", 20, "--ignore-eos")
    assert result.returncode == 0, result.stderr
    assert list(map(int, result.stdout.split())) == expected.tolist()
    assert "decode: 19 tokens" in result.stderr and "load:" in result.stderr
    libraries = run("ldd", RUNNER).stdout
    assert "libtorch_cpu" in libraries and "libpython" not in libraries


def test_the_runner_on_raw_tensors(gated, tmp_path):
    if not RUNNER.exists():
        pytest.skip("the runner was not built")
    _, _, path, more = gated
    x = torch.randn(3, 64)
    (tmp_path / "x.bin").write_bytes(x.numpy().tobytes())
    (tmp_path / "s.bin").write_bytes(more["shift"][0].numpy().tobytes())
    inputs = [f"float32:3x64:{tmp_path}/x.bin", f"float32:64:{tmp_path}/s.bin"]
    flags = ["--input", inputs[0], "--input", inputs[1], "--output", tmp_path / "out"]
    result = run(RUNNER, path, *flags)
    assert result.returncode == 0, result.stderr
    expected = micromix.load_package(path)(x, more, scale=2.0).y
    given = torch.frombuffer(bytearray((tmp_path / "out0.bin").read_bytes()), dtype=torch.float32)
    assert torch.equal(given.view(3, 64), expected)
    short = run(RUNNER, path, "--input", f"float32:4x64:{tmp_path}/x.bin", "--input", inputs[1])
    assert short.returncode == 1 and "the file has 768 bytes" in short.stderr
    assert run(RUNNER).returncode == 2


def test_a_fresh_process(decoder):
    _, path = decoder
    prompt = torch.randint(0, 128, (1, 9))
    program = (
        "import sys, torch, micromix_compile as m; from pathlib import Path;"
        f"p = m.load_package({str(path)!r}); print(*p.generate(torch.tensor({prompt.tolist()}), 8)[0].tolist())"
    )
    result = run(sys.executable, "-c", program)
    expected = micromix.load_package(path).generate(prompt, 8)
    assert list(map(int, result.stdout.split())) == expected[0].tolist(), result.stderr


def test_threads_share_a_package(decoder):
    """In a process of its own: what waits for another thread with the GIL in its hands stops them all."""
    program = (
        "import torch, micromix_compile as m; from concurrent.futures import ThreadPoolExecutor;"
        f"torch.set_num_threads(1); p = m.load_package({str(decoder[1])!r});"
        "one = lambda i: p.generate(torch.tensor([[1, 2, i]]), 20, eos_token_id=[]).tolist();"
        "expected = [*map(one, range(60))];"
        "print(list(ThreadPoolExecutor(4).map(one, range(60))) == expected)"
    )
    assert run(sys.executable, "-c", program, timeout=120).stdout == "True\n"


def test_the_command_generates_from_both(decoder, capsys, monkeypatch):
    _, path = decoder
    quantised = str(path.with_name("quantised"))
    for source in (str(path), quantised):
        assert main(["generate", source, "--prompt", "the import", "--max-new-tokens", "5"]) == 0
        out, err = capsys.readouterr()
        assert out.strip() and "tokens/s" in err and "stopped" not in err
    endless = partialmethod(DecoderPackage.generate, eos_token_id=[-1])
    monkeypatch.setattr(DecoderPackage, "generate", endless)
    assert main(["generate", str(path), "--prompt", "the import", "--max-new-tokens", "500"]) == 0
    assert f"was exported for {LENGTH} tokens (--max-length)" in capsys.readouterr().err


def test_wrong_arguments_are_named(gated):
    *_, path, more = gated
    package = micromix.load_package(path)
    x = torch.randn(2, 64)
    cases = [
        ((x, more), {}, "argument scale is missing"),
        ((x, more), {"scale": 3.0}, "argument scale is 3.0, and was 2.0"),
        ((x.double(), more), {"scale": 2.0}, "is torch.float64, not torch.float32"),
        (
            (x[:, :32], more),
            {"scale": 2.0},
            r"is \[2, 32\], not \[s0 \(1 to 64\), 64\]\n.* dynamic_shapes",
        ),
        ((torch.randn(65, 64), more), {"scale": 2.0}, r"is \[65, 64\]"),
        ((x, {"shift": []}), {"scale": 2.0}, r"argument 1\['shift'\]\[0\] is missing"),
        ((x, more, 1), {"scale": 2.0}, "argument 2 is not among them"),
        (("text", more), {"scale": 2.0}, "is a str, not a tensor"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(PackageInputError, match=message):
            package(*args, **kwargs)


def test_a_torch_that_runs_no_packages_makes_none(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "runs_packages", lambda: False)
    with pytest.raises(ExportError, match="Use torch 2.12 or newer"):
        micromix.export(
            Nested().eval(),
            tmp_path / "x.pt2",
            (torch.randn(2, 64),),
            plan=Recipe(format="mxfp8"),
        )
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_links_its_own_libstdcxx(tmp_path):
    source = tmp_path / "regex.cpp"
    source.write_text(
        '#include <regex>\nbool f(const char* s) { return std::regex_match(s, std::regex("[a-z]")); }\n'
    )
    made = [str(tmp_path / "shared.so"), str(tmp_path / "static.so")]
    for file, flags in zip(made, ([], ["-static-libstdc++"]), strict=True):
        assert not run("g++", *flags, "-shared", "-fPIC", "-o", file, source).returncode
    _check_linking([*made[:1], str(source)])
    with pytest.raises(ExportError, match="libstdc.* statically.*Set CXX"):
        _check_linking(made)


def test_what_cannot_be_exported_says_so(gated, tmp_path):
    model, plan, _, more = gated
    x = torch.randn(4, 64)
    with pytest.raises(ExportError, match="does not end in .pt2"):
        micromix.export(model, tmp_path / "a.so", (x, more), plan=plan)
    with pytest.raises(ExportError, match="a linear layer itself.*nn.Sequential"):
        micromix.export(torch.nn.Linear(64, 64), tmp_path / "a.pt2", (x,))
    with pytest.raises(ExportError, match="holds a slice"):
        micromix.export(model, tmp_path / "a.pt2", (x, slice(3)), plan=plan)
    with pytest.raises(GradientError):
        micromix.export(Nested(), tmp_path / "a.pt2", (x, more), plan=Recipe(format="mxfp8"))
    assert not list(tmp_path.iterdir())


def test_arguments_in_another_order_say_the_right_one(gated, tmp_path):
    model, plan, _, more = gated
    args, path = (torch.randn(4, 64), more), tmp_path / "a.pt2"
    for wrong in (
        lambda: micromix.export(model, args, {}, path, plan=plan),  # as it was before 1.0
        lambda: export_decoder(model, plan),
        lambda: micromix.save_pretrained(model, plan, tmp_path / "checkpoint"),
    ):
        with pytest.raises(
            OptionError, match=r"cannot be a .*Valid: .*\(model, (path|directory), "
        ):
            wrong()
    with pytest.raises(OptionError, match=r"'args' cannot be a Tensor.* as \(x,\)"):
        micromix.export(model, path, args[0], plan=plan)
    assert not list(tmp_path.iterdir())


class Related(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x, y):
        return self.linear(torch.cat([x, x]) * y[1:])


@pytest.fixture(scope="module")
def related(tmp_path_factory):
    """A package whose second argument has twice the rows of the first and one; no size has an upper bound."""
    path = tmp_path_factory.mktemp("related") / "related.pt2"
    rows = torch.export.Dim("rows")
    arguments = (torch.randn(8, 64), torch.randn(17, 64))
    shapes = ({0: rows}, {0: 2 * rows + 1})
    recipe = Recipe(format="mxfp8")
    micromix.export(Related().eval(), path, arguments, plan=recipe, dynamic_shapes=shapes)
    return path


def test_sizes_that_depend_on_another_one(related):
    package = micromix.load_package(related)
    assert package(torch.randn(5, 64), torch.randn(11, 64)).shape == (10, 32)
    assert package(torch.randn(500, 64), torch.randn(1001, 64)).shape == (1000, 32)
    for rows in (9, 10, 12):
        with pytest.raises(PackageInputError, match=r"2\*s0 \+ 1 \(0 to any\), 64\]"):
            package(torch.randn(5, 64), torch.randn(rows, 64))


def test_the_runner_checks_its_inputs(related, tmp_path):
    if not RUNNER.exists():
        pytest.skip("the runner was not built")

    def result(*inputs):
        flags = ["--output", tmp_path / "out"]
        for i, (dtype, *shape) in enumerate(inputs):
            data = torch.zeros(shape, dtype=getattr(torch, dtype))
            file = tmp_path / f"{i}.bin"
            file.write_bytes(data.numpy().tobytes())
            flags += ["--input", f"{dtype}:{'x'.join(map(str, shape))}:{file}"]
        return run(RUNNER, related, *flags)

    x = ("float32", 5, 64)
    assert result(x, ("float32", 11, 64)).returncode == 0
    for wrong in (("float32", 10, 64), ("float32", 11, 32), ("float64", 11, 64), ("float32", 704)):
        found = result(x, wrong)
        assert found.returncode == 1 and "input 1 is" in found.stderr, found
        assert "2*s0+1 (s0 from 0" in found.stderr


def test_the_runner_leaves_nothing_behind(decoder, tmp_path):
    """Wrong usage ends the process before the package's code is unpacked; later the code is loaded, and its files gone."""
    if not RUNNER.exists():
        pytest.skip("the runner was not built")
    many = ["--tokens", "1", "--threads", "100000"]  # OpenMP would crash
    wrong = (["--tokens", "1 x"], ["--input", "float32:3"], ["--input", "float32:3x-1:f"], many)
    for flags in wrong:
        found = run(RUNNER, decoder[1], *flags, TMPDIR=str(tmp_path))
        assert found.returncode == 2 and not list(tmp_path.iterdir()), found
    found = run(RUNNER, decoder[1], "--tokens", "1 256", TMPDIR=str(tmp_path))
    assert found.returncode == 1 and "tokens are 0 to 255" in found.stderr
    endless = [RUNNER, decoder[1], "--tokens", "1", "--ignore-eos"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, env={"TMPDIR": str(tmp_path)}) as reads:
        assert reads.stdout.read(1)
        reads.kill()
    assert not list(tmp_path.iterdir())


def test_the_runner_says_where_its_output_is_lost(decoder):
    if not RUNNER.exists():
        pytest.skip("the runner was not built")
    with open("/dev/full", "w") as full:
        command = [str(RUNNER), str(decoder[1]), "--tokens", "1 2"]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 1 and "output cannot be written" in found.stderr


def traced(model, sizes, monkeypatch):
    """The manifest of a graph of one argument, not compiled."""
    monkeypatch.setattr(compat, "aot_compile", lambda *_: ([], {}))
    with quantised(model.eval(), Recipe(format="mxfp8")):
        return trace(model, (torch.randn(8, 64),), {}, ({0: sizes},)).manifest["inputs"]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x):
        return self.linear(x.view(-1, 2, 64).sum(1))


def test_sizes_without_a_bound(monkeypatch):
    Dim = torch.export.Dim
    for sizes, smallest in (
        (Dim("n"), 0),
        (Dim.AUTO, 2),
        (Dim.DYNAMIC, 2),
        (Dim.DYNAMIC(min=3), 3),
    ):
        (given,) = traced(nn.Sequential(nn.Linear(64, 32)), sizes, monkeypatch)
        assert given["shape"] == [[0, smallest, None, 1, 0], 64]


def test_relations_that_a_package_does_not_check(monkeypatch):
    """The code for even sizes drops the last row of odd ones."""
    Dim = torch.export.Dim
    for sizes in (Dim.AUTO, Dim.DYNAMIC(max=64)):
        with pytest.raises(ExportError, match=r"its graph needs .*Mod.* 2 \* torch.export.Dim"):
            traced(Pairs(), sizes, monkeypatch)
    (given,) = traced(Pairs(), 2 * Dim("half", max=32), monkeypatch)
    assert given["shape"][0] == [0, 2, 32, 2, 0]


def test_hooks_are_not_dropped(gated, tmp_path):
    model, *_, more = gated
    hook = model.up.register_forward_hook(lambda module, arguments, output: None)
    with pytest.raises(HookedLayerError, match="up"):
        micromix.export(model, tmp_path / "x.pt2", (torch.randn(4, 64), more), plan=gated[1])
    hook.remove()


SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
NO_STATIC_CACHE = {
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=128, hidden_size=64, num_layers=2, num_heads=4, window_size=6,
            attention_types=[[["global", "local"], 1]], initializer_range=0.2,
        )
    ),
    "falcon_alibi": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL, **HEADS, alibi=True)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**SMALL)),
    "dynamic_rope": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **SMALL, **HEADS, intermediate_size=96, max_position_embeddings=40,
            rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_STATIC_CACHE)
def test_models_that_no_static_cache_fits(name, tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "aot_compile", lambda *_: ([], {}))
    model = NO_STATIC_CACHE[name]().eval()
    with pytest.raises(ExportError, match="static cache|cannot trace"):
        export_decoder(model, tmp_path / "x.pt2", plan=Recipe(format="mxfp8"), max_length=40)
    assert not list(tmp_path.iterdir())


def partly_on_disk():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **HEADS, intermediate_size=96)).eval()
    model.model.layers[1].mlp.down_proj.to("meta")
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: torch.nn.Linear(8, 8),
            "a Linear is no causal language model.*Use micromix.export",
        ),
        (
            lambda: tf.LlamaModel(tf.LlamaConfig(**SMALL, **HEADS)),
            "a LlamaModel is no causal language model",
        ),
        (
            lambda: tf.T5ForConditionalGeneration(tf.T5Config(d_model=64, d_ff=96, num_layers=1)),
            "it has an encoder",
        ),
        (partly_on_disk, "layers.1.mlp.down_proj.weight is not in memory.*Load the model without"),
    ],
)
def test_models_that_are_no_decoder_or_not_all_there(build, reason, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export_decoder(build(), tmp_path / "x.pt2", plan=Recipe(format="mxfp8"), max_length=40)
    assert not list(tmp_path.iterdir())


def test_the_cache_is_what_the_layers_keep(tmp_path, not_compiled):
    """One head of keys for all of the queries, which no field of the configuration says."""
    config = tf.FalconConfig(**SMALL, **HEADS, multi_query=True, new_decoder_architecture=False)
    model = tf.FalconForCausalLM(config).eval()
    export_decoder(
        model, tmp_path / "x.pt2", plan=Recipe(format="mxfp8"), batch_size=2, max_length=40
    )
    assert not_compiled[0][3]["cache"] == 4 * [[2, 1, 40, 16]]


def test_layers_that_keep_no_keys(tmp_path, not_compiled):
    """The last two layers read what earlier ones keep."""
    config = tf.Gemma3nTextConfig(
        vocab_size=128, vocab_size_per_layer_input=128, hidden_size=64, intermediate_size=96,
        hidden_size_per_layer_input=16, num_hidden_layers=4, num_kv_shared_layers=2, laurel_rank=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=None,
    )  # fmt: skip
    model = tf.Gemma3nForCausalLM(config).eval()
    export_decoder(model, tmp_path / "x.pt2", plan=Recipe(format="mxfp8"), max_length=40)
    assert not_compiled[0][3]["cache"] == 4 * [[1, 2, 40, 16]]


def test_a_transformers_whose_cache_counts_elsewhere(tmp_path, monkeypatch):
    own = StaticLayer.__init__

    def counts_elsewhere(self, *args, **kwargs):
        own(self, *args, **kwargs)
        del self.cumulative_length

    monkeypatch.setattr(StaticLayer, "__init__", counts_elsewhere)
    with pytest.raises(ExportError, match="Use transformers 5.14 or newer"):
        export_decoder(tiny_llama(), tmp_path / "x.pt2", plan=Recipe(format="mxfp8"))


def test_a_quantised_model_that_no_static_cache_fits(tmp_path):
    model = NO_STATIC_CACHE["gpt_neo"]().eval()
    recipe = Recipe(format="mxfp4")
    with quantised(model, recipe), pytest.raises(ExportError, match="transformers says"):
        export_decoder(model, tmp_path / "x.pt2", max_length=40)


@pytest.fixture
def not_compiled(monkeypatch):
    """What export_decoder would have written."""
    written = []
    monkeypatch.setattr("micromix_compile.decoder.trace", lambda *_: None)
    monkeypatch.setattr("micromix_compile.decoder.write_package", lambda *a: written.append(a))
    return written


def test_generation_settings_that_a_package_leaves_out(tmp_path, not_compiled, recwarn):
    model = tiny_llama()
    export = lambda: export_decoder(model, tmp_path / "x.pt2", plan=Recipe(format="mxfp8"))
    export()
    assert not [w for w in recwarn if w.category is GenerationSettingsWarning]
    model.generation_config.update(repetition_penalty=1.1, do_sample=True, top_k=20)
    with pytest.warns(
        GenerationSettingsWarning, match=r"repetition_penalty = 1.1\n.*\n?.*top_k = 20"
    ):
        export()


def test_the_default_length_fits_the_model(tmp_path, not_compiled):
    export_decoder(tiny_llama(), tmp_path / "x.pt2", plan=Recipe(format="mxfp8"))
    assert not_compiled[0][3]["max_length"] == 128
    with pytest.raises(ExportError, match="Give 3 to 128"):
        export_decoder(tiny_llama(), tmp_path / "x.pt2", max_length=129)


def test_tokens_and_places_that_a_decoder_does_not_have(decoder):
    package = micromix.load_package(decoder[1])
    cache, two = package.new_cache(), torch.tensor([[1, 2]])
    for ids, start, message in (
        (two, -1, "start and input_ids"),
        (two, LENGTH - 1, f"the cache holds {LENGTH}"),
        (torch.tensor([[1, 256]]), 0, "holds 256, and tokens are 0 to 255"),
        (torch.tensor([[-1]]), 0, "holds -1"),
        (two[0], 0, "not \\[1, 1 or more\\]"),
        (two[:, :0], 0, "not \\[1, 1 or more\\]"),
    ):
        with pytest.raises(PackageInputError, match=message):
            package(ids, start, cache)
    with pytest.raises(PackageInputError, match="tokens are 0 to 255"):
        package.generate(torch.tensor([[1, 256]]))
    package(two, LENGTH - 2, cache)
    for ids, message in (
        ([[1, 2]], "input_ids is a list"),
        (two.int(), "input_ids is torch.int32"),
        (two.to("meta"), "input_ids is on meta"),
        (two.to_sparse(), "torch.sparse_coo, not dense"),
    ):
        for call in (lambda ids: package(ids, 0, cache), package.generate):
            with pytest.raises(PackageInputError, match=message):
                call(ids)
    for temperature in (-1.0, float("nan")):
        with pytest.raises(PackageInputError, match=r"temperature is .*\nGive them so\.$"):
            package.generate(two, 2, temperature=temperature)
    other = [part.mT.contiguous().mT for part in cache]
    with pytest.raises(PackageInputError, match="cache is not contiguous"):
        package(two, 0, other)
    with pytest.raises(PackageInputError, match=r"not \[.*\]\nGive them so, .* --max-length"):
        package(two, 0, [part[..., :1, :].contiguous() for part in cache])


def test_the_smallest_temperature_is_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert all(_choose(logits, t, None) == 1 for t in (1e-3, 1e-40, 5e-324))


def test_named_chat_templates_are_in_the_package(gated, tmp_path):
    from micromix_compile.archive import Archive, Entry, write_package

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    with zipfile.ZipFile(gated[2]) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"model"}
        file = next(name for name in archive.namelist() if name.endswith(".so"))
        code = Path(archive.extract(file, tmp_path))
    entry = Entry([str(code)], {}, {"inputs": []})
    for name in ("x", "y"):
        write_package(tmp_path / f"{name}.pt2", {"model": entry}, gated[1], None, tokenizer)
    assert (tmp_path / "x.pt2").read_bytes() == (tmp_path / "y.pt2").read_bytes()
    given = Archive(tmp_path / "x.pt2").tokenizer()
    assert given.chat_template == {"default": "a", "tool_use": "b"}


# --- damaged, foreign and hostile packages


def rewritten(path: Path, target: Path, change) -> Path:
    """A copy of an archive, its members changed by `change(name, data)` -> [(name, data), ...]."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as result:
        for name in source.namelist():
            for new_name, data in change(name, source.read(name)):
                result.writestr(new_name, data)
    return target


def with_manifest(path: Path, target: Path, edit) -> Path:
    def change(name, data):
        if name.endswith(MANIFEST):
            manifest = json.loads(data)
            edit(manifest)
            data = json.dumps(manifest).encode()
        return [(name, data)]

    return rewritten(path, target, change)


FOREIGN = {
    "torch": (lambda m: m.update(torch="1.9.0"), "torch 1.9.0, and here is"),
    "library": (lambda m: m.update(abi=999), "operators 999"),
    "device": (lambda m: m.update(device="xpu"), "device xpu"),
    "cpu": (lambda m: m["cpu_flags"].append("avx9000"), "a CPU with avx9000"),
    "flag of another kind": (lambda m: m["cpu_flags"].append(9000), "a CPU with 9000"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_packages_made_for_something_else(name, gated, tmp_path):
    edit, message = FOREIGN[name]
    path = with_manifest(gated[2], tmp_path / "foreign.pt2", edit)
    with pytest.raises(PackageMismatchError, match=message):
        micromix.load_package(path)


def test_a_newer_format(gated, tmp_path):
    path = with_manifest(gated[2], tmp_path / "newer.pt2", lambda m: m.update(format=99))
    with pytest.raises(FileVersionError, match=r"is a package of version 99; .* reads up to 2"):
        micromix.load_package(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_package_for_cuda(gated, tmp_path):
    edit = lambda m: m.update(device="cuda", cuda_capability=[9, 0])
    with pytest.raises(PackageMismatchError, match="CUDA device, and there is none"):
        micromix.load_package(with_manifest(gated[2], tmp_path / "cuda.pt2", edit))


def test_another_plan(gated, decoder):
    with pytest.raises(PackageMismatchError, match="another plan"):
        micromix.load_package(decoder[1], plan=gated[1])


def weight(m, **facts):
    m["weights"][0].update(facts)


FORGED = {
    "offset beyond": lambda m: weight(m, offset=1 << 40),
    "offset negative": lambda m: weight(m, offset=-64),
    "offset unaligned": lambda m: weight(m, offset=4),
    "shape overflows": lambda m: weight(m, shape=[1 << 40, 1 << 40], stride=[1, 1]),
    "shape negative": lambda m: weight(m, shape=[-1]),
    "shape is text": lambda m: weight(m, shape="abc"),
    "stride overflows": lambda m: weight(m, shape=[2, 2], stride=[1 << 61, 1]),
    "strides missing": lambda m: weight(m, stride=[]),
    "dtype unknown": lambda m: weight(m, dtype="nn"),
    "dtype is no dtype": lambda m: weight(m, dtype="load"),
    "weights too long": lambda m: m.update(weight_bytes=1 << 50),
    "no weights": lambda m: m.update(weights=[]),
    "weights are text": lambda m: m.update(weights="x"),
    "no entries": lambda m: m.update(entries={}),
    "entries are a list": lambda m: m.update(entries=[]),
    "an entry that is not there": lambda m: m["entries"].update(other=m["entries"]["model"]),
    "an entry with a path": lambda m: m["entries"].update({"../../x": m["entries"]["model"]}),
    "a weight left out": lambda m: m["entries"]["model"]["weights"].popitem(),
    "a weight number": lambda m: m["entries"]["model"]["weights"].update(x=10**9),
    "input size": lambda m: m["entries"]["model"]["inputs"][0].update(shape=[1, 2, "x"]),
    "no inputs": lambda m: m["entries"]["model"].pop("inputs"),
    "members missing": lambda m: m["members"].popitem(),
    "members more": lambda m: m["members"].update(x="0"),
    "members a list": lambda m: m.update(members=[]),
    "no format": lambda m: m.pop("format"),
    "format text": lambda m: m.update(format="one"),
    "format endless": lambda m: m.update(format=float("inf")),
    "flags a number": lambda m: m.update(cpu_flags=3),
    "a size endless": lambda m: m.update(
        decoder={"batch_size": float("inf"), "max_length": 8, "cache": [], "dtype": "bfloat16", "eos_token_id": []}
    ),
    "no decoder": lambda m: m.pop("decoder"),
    "decoder text": lambda m: m.update(decoder="x"),
    "decoder without graphs": lambda m: m.update(
        decoder={"batch_size": 1, "max_length": 8, "cache": [], "dtype": "bfloat16", "eos_token_id": []}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_manifests(name, gated, tmp_path):
    path = with_manifest(gated[2], tmp_path / "forged.pt2", FORGED[name])
    with pytest.raises(PackageError):
        micromix.load_package(path)


HOSTILE = ["{root}/../../evil", "/etc/evil", "{root}/data/weights/evil.pkl", "evil",
    "{root}/data/aotinductor/../../evil.so", "{root}/extra/tokenizer/../evil.json",
    "{root}/extra/evil.py", "{root}/data/aotinductor/model/a/b.so"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_path_tricks_and_foreign_members(name, gated, tmp_path):
    """Even with a manifest that names them."""
    with zipfile.ZipFile(gated[2]) as archive:
        root = archive.namelist()[0].split("/")[0]
    evil = name.format(root=root)
    digest = __import__("hashlib").sha256(b"evil").hexdigest()

    def change(member, data):
        if member.endswith(MANIFEST):
            manifest = json.loads(data)
            manifest["members"][evil] = digest
            return [(evil, b"evil"), (member, json.dumps(manifest).encode())]
        return [(member, data)]

    path = rewritten(gated[2], tmp_path / "hostile.pt2", change)
    with pytest.raises(PackageError, match="which no package has"):
        micromix.load_package(path)


def test_compressed_doubled_and_foreign_archives(gated, tmp_path):
    bomb = zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED)
    with bomb, zipfile.ZipFile(gated[2]) as source:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    with pytest.raises(PackageError, match="not stored as it is"):
        micromix.load_package(tmp_path / "bomb.pt2")
    with zipfile.ZipFile(tmp_path / "plain.pt2", "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(PackageError, match="not written by micromix"):
        micromix.load_package(tmp_path / "plain.pt2")
    for content in (b"", b"PK", b"\x80\x04not a pickle to be read"):
        (tmp_path / "other.pt2").write_bytes(content)
        with pytest.raises(PackageError):
            micromix.load_package(tmp_path / "other.pt2")
    with pytest.raises(PackageError, match="No such file"):
        micromix.load_package(tmp_path / "none.pt2")


def test_damaged_packages(gated, tmp_path):
    """Truncated anywhere, or one bit flipped anywhere that is read: an error, or the package as it was."""
    chance = random.Random(0)
    data = gated[2].read_bytes()
    target = tmp_path / "damaged.pt2"
    refused = 0
    for i in range(60):
        if i % 2:
            target.write_bytes(data[: chance.randrange(len(data))])
        else:
            at = chance.randrange(len(data))
            target.write_bytes(
                data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
            )
        try:
            micromix.load_package(target)
        except MicroMixError as error:
            assert isinstance(error, (PackageError, PackageMismatchError, FileVersionError))
            refused += 1
    assert refused >= 55  # a bit of a zip header that nothing reads may flip


def test_the_runner_refuses_damage(decoder, tmp_path):
    if not RUNNER.exists():
        pytest.skip("the runner was not built")
    path = decoder[1]
    target = tmp_path / "damaged.pt2"
    chance = random.Random(0)
    data = path.read_bytes()
    for _ in range(10):
        target.write_bytes(data[: chance.randrange(len(data))])
        result = run(RUNNER, target, "--tokens", "1 2")
        assert result.returncode == 1 and "error:" in result.stderr, result

    def flipped(name, content):
        middle = len(content) // 2
        if name.endswith("weights.bin"):
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        return [(name, content)]

    result = run(RUNNER, rewritten(path, target, flipped), "--tokens", "1 2")
    assert result.returncode == 1 and "weights are damaged" in result.stderr, result

    def forged(old, new):
        def change(name, content):
            if name.endswith("runner.txt"):
                assert old.encode() in content
                content = content.replace(old.encode(), new.encode(), 1)
            return [(name, content)]

        return rewritten(path, target, change)

    for old, new, message in (
        ("torch 2", "torch 1", "exported for something else"),
        ("device cpu", "device cuda", "exported for something else"),
        ("\nflag ", "\nflag avx9000\nflag ", "avx9000"),
        ("format 2", "format 9", "format"),
        ("\nweight ", "\nweight bfloat16 99999999936 1 4 1 1\nweight ", "outside"),
        ("\ndecoder ", "\nbytes 64\ndecoder ", "outside"),
        ("\nweight ", "\nweight bfloat16 -64 1 4 1 1\nweight ", "damaged"),
        ("\nconstant ", "\nconstant decode 99999 x\nconstant ", "no weight"),
        ("\nconstant ", "\nconstant decode 0 x\nconstant ", "other weights"),
        ("\ninput decode", "\ninput prefill", "not all named"),
        ("\ninput ", "\ninput decode int64 99\ninput ", "damaged"),
        ("\ndecoder 1 ", "\ndecoder 3 ", "batches of 3 prompts"),
    ):
        result = run(RUNNER, forged(old, new), "--tokens", "1 2")
        assert result.returncode == 1 and message in result.stderr, (new, result)
