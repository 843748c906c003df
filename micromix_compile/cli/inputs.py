"""What flags name: a recipe, a model on its device, texts and the windows of them."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

import torch

from micromix_compile.decoder import longest_text
from micromix_compile.errors import OptionError
from micromix_compile.ops import kernel_name
from micromix_compile.quantized_linear import QuantizedLinear
from micromix_compile.recipe import Recipe

SEQLEN = 2048
"""Tokens of a window, where the model has positions for as many."""


def check_device(device: str | None) -> None:
    """Before the long work: the device is there, and the CPU has the instructions asked for. Raises OptionError."""
    if os.environ.get("MICROMIX_CPU_ISA"):
        try:
            kernel_name("cpu")
        except RuntimeError as error:
            reason = f"does not work: {str(error).rstrip('.')}"
            valid = "an instruction set of this CPU, or nothing"
            raise OptionError(option="MICROMIX_CPU_ISA", reason=reason, valid=valid) from None
    if device in (None, "cpu"):
        return
    try:
        torch.zeros(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"cannot be {device!r} here: {error}"
        raise OptionError(option="--device", reason=reason, valid="cpu, or a GPU's name") from None


def recipe_of(arguments: argparse.Namespace, **budget: float) -> Recipe:
    """The recipe of the flags; with `budget`, that in place of the flag. Raises RecipeError."""
    flags = {field.name: getattr(arguments, field.name) for field in fields(Recipe)} | budget
    given = {name: value for name, value in flags.items() if value is not None}
    if "counts" in given:
        given["counts"] = dict(given["counts"])
    return Recipe(**given)


def load_model(
    arguments: argparse.Namespace, offload: Path | None = None, needs_tokenizer: bool = True
):
    """The model on its device, or with `offload` on disk, and its tokenizer. Raises as `models.load`."""
    from micromix_compile.models import load

    dtype = getattr(torch, arguments.dtype)
    model, tokenizer = load(arguments.model, dtype, offload, needs_tokenizer)
    return model if offload else model.to(arguments.device), tokenizer


def texts_of(arguments: argparse.Namespace, half: int | None) -> dict[str, str]:
    """The texts given; a half of the built-in one, and of each file where one command calibrates and measures.

    All of each if half is None. Raises TextError.
    """
    from micromix_compile.models import builtin_text, halves, read_text

    texts = {n: builtin_text() if n == "builtin" else read_text(n) for n in arguments.text}
    if half is None:
        return texts
    cut = {"builtin"} if arguments.command != "sweep" else texts.keys()
    return {name: halves(text)[half] if name in cut else text for name, text in texts.items()}


def is_quantised(model) -> bool:
    """Whether layers of it are packed: there are no float weights to plan for."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def refuse_quantised(arguments: argparse.Namespace, model, valid: str = "a float model") -> None:
    """Before the long work: raises OptionError for a model that is quantised already."""
    if is_quantised(model):
        reason = f"cannot be {arguments.model}, which is quantised already"
        raise OptionError(option="--model", reason=reason, valid=valid)


def fit_windows(arguments: argparse.Namespace, model) -> None:
    """--seqlen is what the model has positions for: where left out, cut to that. Raises OptionError for one that is not.

    Beyond it learned positions end in an IndexError, and the model was not made for rotated ones.
    """
    most = longest_text(model)
    if arguments.seqlen is None:
        arguments.seqlen = min(SEQLEN, most or SEQLEN)
        if arguments.seqlen < SEQLEN:
            print(f"windows of {most} tokens and not {SEQLEN}: the model has no more positions")
    elif most and arguments.seqlen > most:
        reason = f"is {arguments.seqlen}, and {arguments.model} has {most} positions"
        raise OptionError(option="--seqlen", reason=reason, valid=f"2 to {most}")


def calibration_windows(arguments: argparse.Namespace, tokenizer) -> torch.Tensor:
    """--samples windows of all texts together, each giving what its length allows of an equal part."""
    from micromix_compile.models import token_windows

    windows, texts = [], texts_of(arguments, half=0)
    for i, text in enumerate(texts.values()):
        left = arguments.samples - sum(map(len, windows))
        part = -(-left // (len(texts) - i))
        if part:
            windows.append(token_windows(tokenizer, text, arguments.seqlen, part))
    return torch.cat(windows).to(arguments.device)
