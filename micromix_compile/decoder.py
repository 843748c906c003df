"""Export of a causal language model as two graphs, prefill and decode, with a static cache."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from micromix_compile import _torch_compat as compat
from micromix_compile.archive import dtype_name, write_package
from micromix_compile.errors import ExportError, GenerationSettingsWarning, MicroMixError
from micromix_compile.export import check_path, trace
from micromix_compile.files import as_path
from micromix_compile.planned import AnyPlan, quantised
from micromix_compile.quantized_linear import QuantizedLinear

__all__ = ["check_decoder", "export_decoder", "longest_text"]

_LONGEST = 2048
_PROMPTS = (8, 64)  # tokens that a static cache is tried on
_DIFFERENCE = 0.1  # of a float model's logits: sums in another order make about 1 per cent
_NO_STATIC_CACHE = "A package has one cache of fixed size; use a quantised checkpoint for this model, or micromix.export"


def export_decoder(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    plan: AnyPlan | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    tokenizer: Any = None,
) -> None:
    """Compile a causal language model of transformers into a package that generates.

    The package has two graphs, `prefill` for prompts of 2 to `max_length` tokens and `decode` for one token, which
    share the weights. Keys and values are arguments, `[batch, heads, max_length, head size]` each in one
    dtype, written in place.

    Args:
        model: in evaluation mode; float, or quantised already.
        path: where to, ending in ".pt2"; replaced whole, or not at all.
        plan: as for `save_pretrained`.
        batch_size: rows of each call, of one length.
        max_length: tokens that the cache holds; by default 2048, or the model's longest text where that is less.
        tokenizer: kept in the package, for `package.tokenizer()`.

    Raises as `export` does, and ExportError for a model that does not give the same logits with a static cache, which
    is tried first, or whose graph torch.export cannot make. Warns of generation settings that the package leaves out.
    """
    call = "export_decoder(model, path, *, plan=, batch_size=, max_length=, tokenizer=)"
    path = as_path(path, "path", call)
    check_path(path)
    if type(batch_size) is not int or batch_size < 1:
        raise ExportError(reason=f"batch_size cannot be {batch_size!r}", mend="Give 1 or more")
    model = compat.original_module(model)
    max_length = check_decoder(model, max_length)
    step = _Step(model, max_length).eval()
    with _as_export_error("it has no static cache of keys and values"):
        cache = step.empty_cache(batch_size)
    _check_cache(step)
    left_out = _settings_left_out(model.generation_config)
    if left_out:
        warnings.warn(GenerationSettingsWarning(settings=left_out), stacklevel=2)
    start = torch.zeros((), dtype=torch.int64, device=model.device)
    with quantised(model, plan) as used:
        tokens = torch.zeros(batch_size, 2, dtype=torch.int64, device=model.device)
        length = torch.export.Dim("length", min=2, max=max_length)
        tracing = functools.partial(_as_export_error, "torch.export cannot trace it")
        shapes = {"input_ids": {1: length}, "start": None, "cache": [None] * len(cache)}
        entries = {
            "prefill": trace(
                step, (tokens.repeat(1, min(4, max_length // 2)), start, cache), {}, shapes, tracing
            ),
            "decode": trace(step, (tokens[:, :1], start, cache), {}, None, tracing),
        }
    eos = model.generation_config.eos_token_id
    decoder = {
        "batch_size": batch_size,
        "max_length": max_length,
        "vocabulary": len(model.get_input_embeddings().weight),
        "cache": [list(tensor.shape) for tensor in cache],
        "dtype": dtype_name(cache[0].dtype),
        "eos_token_id": [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
    }
    write_package(path, entries, used, decoder, tokenizer)


def check_decoder(model: nn.Module, max_length: int | None) -> int:
    """The length of a package of this model, by default at most 2048.

    Raises ExportError for a length that does not fit, and for what is no decoder or is not all in memory.
    """
    _check_model(model)
    most = longest_text(model)
    if max_length is None:
        return min(_LONGEST, most or _LONGEST)
    if not 2 < max_length <= (most or max_length):
        raise ExportError(
            reason=f"max_length = {max_length} does not fit the model",
            mend=f"Give 3 to {most or 'its longest text'}",
        )
    return max_length


def longest_text(model: nn.Module) -> int | None:
    """The tokens that a model of transformers has positions for; None where nothing bounds them.

    Of rotary positions that are scaled the configuration names what they reach, or what they reach unscaled.
    """
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions")
    found = (getattr(config, name, None) or 0 for name in names)
    most = next((most for most in found if most > 0), None)  # XLNet's, which has none, says -1
    if most is None or getattr(config, "alibi", False):
        return None
    given = getattr(config, "rope_parameters", None) or {}
    own = [part for part in given.values() if isinstance(part, dict)] or [given]  # by kind of layer
    for rotary in own:
        if rotary.get("rope_type") == "dynamic":
            return None
        unscaled = rotary.get("original_max_position_embeddings") or most
        most = max(most, int((rotary.get("factor") or 1) * unscaled))
    return most


def _check_model(model: nn.Module) -> None:
    """Raises ExportError for what is no causal language model of transformers, or is not all there."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        reason = f"a {type(model).__name__} is no causal language model of transformers"
        raise ExportError(reason=reason, mend="Use micromix.export for it")
    if model.config.is_encoder_decoder:
        reason = "it has an encoder, and a package has the graphs of a decoder alone"
        raise ExportError(reason=reason, mend="Use a quantised checkpoint for this model")
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    if missing:
        reason = f"{missing[0]} is not in memory, as where a device map leaves weights on disk"
        raise ExportError(reason=reason, mend="Load the model without one, or with more memory")


def _check_cache(step: _Step) -> None:
    """Raises ExportError where the model cannot use a static cache, or is another model with one."""
    with _as_export_error("it does not run with a static cache"):
        difference = step.difference()
    if any(isinstance(module, QuantizedLinear) for module in step.modules()):
        # Sums in another order, quantised again in each layer, can make other logits: transformers' word has to do.
        if _says_it_cannot(step.model):
            reason = "transformers says that it does not work with a static cache"
            raise ExportError(reason=reason, mend=_NO_STATIC_CACHE)
    elif not difference < _DIFFERENCE:
        reason = f"its logits with a static cache differ by {difference:.0%} from those without one"
        raise ExportError(reason=reason, mend=_NO_STATIC_CACHE)


def _says_it_cannot(model: nn.Module) -> bool:
    """Whether a class of transformers has the mark that its models do not work with a static cache.

    The class that all derive from has it too, and says nothing by that.
    """
    from transformers import PreTrainedModel

    classes = (vars(c) for c in type(model).__mro__ if c is not PreTrainedModel)
    marks = (own["_can_compile_fullgraph"] for own in classes if "_can_compile_fullgraph" in own)
    return next(marks, None) is False


@contextlib.contextmanager
def _as_export_error(reason: str) -> Iterator[None]:
    """What transformers and torch raise for a model that cannot be such a package becomes an ExportError."""
    try:
        yield
    except (MicroMixError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        detail = f"{reason} ({type(error).__name__}: {first})"
        raise ExportError(reason=detail, mend=_NO_STATIC_CACHE) from error


def _settings_left_out(config: Any) -> list[str]:
    """What a model's generation_config asks for and a package does not do: it samples by temperature alone."""
    neutral = {
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "bad_words_ids": None,
        "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None, "num_beams": 1,
    }  # fmt: skip
    if getattr(config, "do_sample", False):
        neutral |= {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None}
    found = {name: getattr(config, name, None) for name in neutral}
    return [f"{n} = {v}" for n, v in found.items() if v is not None and v != neutral[n]]


class _Step(nn.Module):
    """Some tokens after others: the logits that follow the last one, and the cache written in place."""

    def __init__(self, model: nn.Module, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.max_length = max_length

    def _static_cache(self):
        from transformers import StaticCache, __version__
        from transformers.cache_utils import StaticLayer

        if not isinstance(getattr(StaticLayer(1), "cumulative_length", None), Tensor):
            reason = (
                f"transformers {__version__} has no static cache that counts its tokens in a tensor"
            )
            raise ExportError(reason=reason, mend="Use transformers 5.14 or newer")
        cache = StaticCache(config=self.model.config, max_cache_len=self.max_length)
        # A sliding window is in the mask; a cache that slides has control flow that no graph holds.
        cache.layers = [StaticLayer(self.max_length) for _ in cache.layers]
        return cache

    @torch.no_grad()
    def empty_cache(self, batch_size: int) -> list[Tensor]:
        """Keys and values, zeros, of the layers that keep any. One token runs: only the layers know."""
        if getattr(self.model, "_is_stateful", False):
            raise ValueError("its layers keep a state of their own")
        cache = self._static_cache()
        tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.model.device)
        self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        self.kept = [i for i, layer in enumerate(cache.layers) if layer.is_initialized]
        if not self.kept:
            raise ValueError("none of its layers keeps keys in it")
        layers = [cache.layers[i] for i in self.kept]
        return [tensor.zero_() for layer in layers for tensor in (layer.keys, layer.values)]

    @torch.no_grad()
    def difference(self) -> float:
        """How far the logits of a prompt and of a token after it are from the model's own, by norm: the second largest.

        A short prompt and a long one: a mask that counts from the wrong end may be right for one of them. The largest
        may be a router's, which takes another expert where two are all but equal.
        """
        device = self.model.device
        vocabulary = len(self.model.get_input_embeddings().weight)
        chance, found = torch.Generator().manual_seed(0), []
        for length in sorted({min(self.max_length - 1, most) for most in _PROMPTS}):
            ids = torch.randint(vocabulary, (1, length + 1), generator=chance).to(device)
            cache = self.empty_cache(1)
            own = self.model(input_ids=ids, use_cache=False).logits[0, -2:].float()
            for row, (first, last) in zip(own, ((0, length), (length, length + 1)), strict=True):
                logits = self(ids[:, first:last], torch.tensor(first, device=device), cache)
                found.append((logits[0].float() - row).norm() / row.norm())
        return torch.stack(found).sort().values[-2].item()

    def forward(self, input_ids: Tensor, start: Tensor, cache: list[Tensor]) -> Tensor:
        """int64 `[batch, length]`, the number of tokens before them, the cache -> logits `[batch, vocabulary]`."""
        static = self._static_cache()
        for i, keys, values in zip(self.kept, cache[::2], cache[1::2], strict=True):
            layer = static.layers[i]
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.batch_size, layer.num_heads = keys.shape[:2]
            layer.k_head_dim, layer.v_head_dim = keys.shape[-1], values.shape[-1]
            layer.cumulative_length = start.clone()
            layer.is_initialized = True
        result = self.model(
            input_ids=input_ids, past_key_values=static, use_cache=True, logits_to_keep=1
        )
        return result.logits[:, -1]
