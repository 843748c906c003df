"""`micromix quantize`, `export` and `generate`: checkpoints and packages, made and run."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from micromix_compile import package
from micromix_compile.checkpoint import bytes_of, save_pretrained
from micromix_compile.cli.inputs import load_model
from micromix_compile.cli.plans import calibrates, settled, wanted
from micromix_compile.decoder import check_decoder, export_decoder, longest_text
from micromix_compile.errors import OptionError

NEW_TOKENS = 128
"""What `generate` continues a prompt by, where the model has positions for as many."""


def quantize(arguments: argparse.Namespace) -> None:
    from micromix_compile.models import files_of

    bytes_of(arguments.max_shard_size)
    plan = wanted(arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="micromix-offload-") as folder:
        offload = Path(folder) if arguments.offload else None
        model, tokenizer = load_model(arguments, offload, needs_tokenizer=calibrates(plan))
        save_pretrained(
            model, arguments.output, settled(plan, model, tokenizer, arguments), tokenizer=tokenizer,
            max_shard_size=arguments.max_shard_size, source=files_of(arguments.model),
        )  # fmt: skip
    size = sum(path.stat().st_size for path in arguments.output.glob("*.safetensors"))
    seconds = time.monotonic() - start
    print(f"{arguments.output}: {size / 1e6:,.1f} MB of weights, in {seconds:.0f} s")


def export(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    plan = wanted(arguments)
    model, tokenizer = load_model(arguments)
    check_decoder(model, arguments.max_length)
    plan = settled(plan, model, tokenizer, arguments)
    print("compiling prefill and decode, which takes minutes", flush=True)
    export_decoder(
        model, arguments.output, plan=plan, max_length=arguments.max_length, tokenizer=tokenizer
    )
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size / 1e6:,.1f} MB, in {time.monotonic() - start:.0f} s")


def generate(arguments: argparse.Namespace) -> None:
    if arguments.temperature != 0 and not 1e-4 <= arguments.temperature < float("inf"):
        raise OptionError(
            option="--temperature",
            reason=f"is {arguments.temperature}",
            valid="0, or 0.0001 and more",
        )
    if arguments.prompt.encode(errors="ignore").decode() != arguments.prompt:
        raise OptionError(option="--prompt", reason="is not UTF-8", valid="text in UTF-8")
    packaged = arguments.model.endswith(".pt2")
    model, tokenizer = _package(arguments) if packaged else _model(arguments)
    ids = _prompt(arguments, tokenizer).to(model.device)
    count = _new_tokens(arguments, ids.shape[1], None if packaged else longest_text(model))
    start = time.monotonic()
    if packaged:
        tokens = model.generate(ids, count, temperature=arguments.temperature)
    else:
        sampling = {"do_sample": arguments.temperature > 0}
        if sampling["do_sample"]:
            sampling["temperature"] = arguments.temperature
        with torch.inference_mode():
            tokens = model.generate(ids, max_new_tokens=count, **sampling)
    seconds = time.monotonic() - start
    new = tokens[0, ids.shape[1] :]
    print(tokenizer.decode(new, skip_special_tokens=True))
    print(
        f"{len(new)} tokens in {seconds:.2f} s, {len(new) / seconds:.1f} tokens/s", file=sys.stderr
    )
    if packaged and len(new) < count and tokens.shape[1] > model.max_length:
        print(
            f"stopped: {arguments.model} was exported for {model.max_length} tokens (--max-length)",
            file=sys.stderr,
        )


def _package(arguments: argparse.Namespace):
    """A package that generates, and its tokenizer. Raises OptionError, also for flags that change nothing of it."""
    for flag, value in (("--dtype", arguments.dtype), ("--device", arguments.device)):
        if value is not None:
            reason = f"cannot be given for {arguments.model}, a package, which has its own"
            raise OptionError(option=flag, reason=reason, valid="left out, or a model's directory")
    model = package.load_package(arguments.model)
    if not hasattr(model, "tokenizer"):
        reason = (
            f"cannot be {arguments.model}, a package of micromix.export, which generates no text"
        )
        raise OptionError(
            option="MODEL", reason=reason, valid="a package of `micromix export`, or a model"
        )
    return model, model.tokenizer()


def _model(arguments: argparse.Namespace):
    """A checkpoint or a float model, which runs as it is, and its tokenizer."""
    from micromix_compile.models import load

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else "auto"
    model, tokenizer = load(arguments.model, dtype)
    return model.to(arguments.device or "cpu"), tokenizer


def _prompt(arguments: argparse.Namespace, tokenizer) -> torch.Tensor:
    """int64 `[1, length]`: the tokens of the prompt, in the template of a chat model for --chat. Raises OptionError."""
    prompt = arguments.prompt
    if arguments.chat and not tokenizer.chat_template:
        reason = f"cannot be given: {arguments.model} has no chat template"
        raise OptionError(option="--chat", reason=reason, valid="--prompt alone")
    if arguments.chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(
        prompt, return_tensors="pt", add_special_tokens=not arguments.chat, verbose=False
    ).input_ids
    if not ids.shape[1]:
        raise OptionError(option="--prompt", reason="has no tokens", valid="some text")
    return ids


def _new_tokens(arguments: argparse.Namespace, prompt: int, most: int | None) -> int:
    """--max-new-tokens, which together with the prompt are `most` (a package itself stops where it is full).

    Where left out, cut to that. Raises OptionError for more.
    """
    asked = arguments.max_new_tokens
    left = (most or prompt + (asked or NEW_TOKENS)) + 1 - prompt  # the last one has no position
    have = f"{arguments.model} has {most} positions"
    if left < 1:
        reason = f"has {prompt} tokens, and {have}"
        raise OptionError(option="--prompt", reason=reason, valid=f"at most {most} tokens")
    if asked is None:
        if left < NEW_TOKENS:
            print(f"at most {left} tokens and not {NEW_TOKENS}: {have}", file=sys.stderr)
        return min(left, NEW_TOKENS)
    if asked > left:
        reason = f"is {asked} behind a prompt of {prompt} tokens, and {have}"
        raise OptionError(option="--max-new-tokens", reason=reason, valid=f"1 to {left}")
    return asked
