"""Batches and the model that they are given to: what calibration and GPTQ do alike with them."""

from __future__ import annotations

import contextlib
import copy
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import optree
import torch

from micromix_compile.errors import CalibrationGradientError, MicroMixError, OptionError

__all__ = ["call", "call_batch", "evaluating", "first_device", "next_token_loss", "on_device"]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each in the mode that it had afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()  # modules may do more then
        yield
    finally:
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


def first_device(model: torch.nn.Module) -> torch.device:
    """The device of a model's first parameter; where accelerate offloads it, of the first that is on one."""
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(devices, torch.device("cpu"))


def on_device(batch: Any, device: torch.device | str) -> Any:
    """A batch with copies of its tensors on a device: a model may write to what it is given."""
    if isinstance(batch, UserDict):
        # A tokenizer's, which optree does not know; a loss may read its attributes.
        moved = copy.copy(batch)
        moved.data = on_device(batch.data, device)
        return moved
    return optree.tree_map(
        lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf, batch
    )


def call(model: torch.nn.Module, batch: Any) -> Any:
    """The model's output for a batch: keyword arguments, positional ones, or the one argument."""
    if isinstance(batch, (torch.Tensor, str, bytes)) or not hasattr(batch, "__iter__"):
        return model(batch)
    return model(**batch) if hasattr(batch, "keys") else model(*batch)


def call_batch(model: torch.nn.Module, batch: Any) -> Any:
    """As `call`; raises OptionError where the model fails with something that looks like no batch."""
    try:
        return call(model, batch)
    except MicroMixError:
        raise
    except Exception as error:
        reason = _doubt(batch)
        if reason is None:
            raise
        valid = "batches of tensors, as in run([{'input_ids': ids}]) or run([ids])"
        reason = f"{reason}, and the model failed: {type(error).__name__}: {error}"
        raise OptionError(option="batches", reason=reason, valid=valid) from error


def _doubt(batch: Any) -> str | None:
    """What is odd about a batch for most models, though some may take it."""
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    if isinstance(ids, torch.Tensor) and ids.is_floating_point():
        return f"has a batch with input_ids of {ids.dtype}"
    if ids is not None and not isinstance(ids, torch.Tensor):
        return f"has a batch with a {type(ids).__name__} as input_ids"
    tokens = batch if isinstance(batch, torch.Tensor) and not batch.is_floating_point() else ids
    if tokens is not None and tokens.dim() == 1:  # an item of a tensor of all windows
        return f"has a batch of shape {list(tokens.shape)}, without a dimension of sequences"
    leaves = optree.tree_leaves(batch.data if isinstance(batch, UserDict) else batch)
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return f"has a batch without a tensor, {batch!r:.80}"
    return None


def next_token_loss(output: Any, batch: Any) -> torch.Tensor:
    """The summed cross-entropy of each token given those before it, or the model's own loss where it gives one.

    That is taken for the mean over the batch's `labels`, if it has any, and multiplied by their number (of a causal
    model one too many for each sequence, whose first it does not score): else a token of a short batch would count
    more than one of a long batch, by the square of their lengths. Tokens are the batch's
    `input_ids`, or `decoder_input_ids` where it has them; those that its `attention_mask` (`decoder_attention_mask`)
    leaves out are no part of the cross-entropy. Raises CalibrationGradientError if the output has neither a loss nor
    logits of these tokens, or the batch no tokens, and is no tensor of them itself.
    """
    fields = batch if hasattr(batch, "get") else {}
    if getattr(output, "loss", None) is not None:
        labels = fields.get("labels")
        counted = int((labels != -100).sum()) if isinstance(labels, torch.Tensor) else 1
        return output.loss * counted
    logits = getattr(output, "logits", None)
    # An encoder's tokens are not what the logits of a decoder predict.
    part = "" if fields.get("decoder_input_ids") is None else "decoder_"
    tokens, mask = fields.get(f"{part}input_ids"), fields.get(f"{part}attention_mask")
    if isinstance(batch, torch.Tensor) and not batch.is_floating_point():
        tokens = batch
    if logits is None or tokens is None or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise CalibrationGradientError(
            reason="the output has no loss, and no logits for the batch's input_ids"
        )
    targets = tokens[:, 1:]
    if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
        # One and zero, as transformers reads floats too; or what is added to the scores, zero and below.
        added = mask.is_floating_point() and not bool((mask > 0).any())
        text = mask >= 0 if added else mask > 0
        targets = targets.masked_fill(~(text[:, 1:] & text[:, :-1]), -100)  # which is not counted
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten().to(logits.device),
        reduction="sum",
    )
