"""Batches and the model that they are given to: what calibration and GPTQ do alike with them."""

from __future__ import annotations

import contextlib
import copy
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import optree
import torch

from micromix_compile.errors import CalibrationGradientError

__all__ = ["call", "evaluating", "first_device", "next_token_loss", "on_device"]


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
    if isinstance(
        batch, UserDict
    ):  # a tokenizer's, which optree does not know; a loss may read its attributes
        moved = copy.copy(batch)
        moved.data = on_device(batch.data, device)
        return moved
    return optree.tree_map(
        lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf, batch
    )


def call(model: torch.nn.Module, batch: Any) -> Any:
    """The model's output for a batch: keyword arguments, positional ones, or the one argument."""
    if isinstance(batch, torch.Tensor) or not hasattr(batch, "__iter__"):
        return model(batch)
    return model(**batch) if hasattr(batch, "keys") else model(*batch)


def next_token_loss(output: Any, batch: Any) -> torch.Tensor:
    """The model's own loss, or the summed cross-entropy of each token given those before it.

    Tokens that the batch's `attention_mask` leaves out are no part of it. Raises CalibrationGradientError if the
    output has neither a loss nor logits, or the batch no `input_ids`.
    """
    if getattr(output, "loss", None) is not None:
        return output.loss
    logits = getattr(output, "logits", None)
    tokens = batch.get("input_ids") if hasattr(batch, "get") else None
    if logits is None or tokens is None or logits.dim() != 3:
        raise CalibrationGradientError(
            reason="the output has no loss, and no logits for the batch's input_ids"
        )
    targets, mask = tokens[:, 1:], batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
        text = mask >= 0 if mask.is_floating_point() else mask.bool()
        targets = targets.masked_fill(~(text[:, 1:] & text[:, :-1]), -100)  # which is not counted
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten().to(logits.device),
        reduction="sum",
    )
