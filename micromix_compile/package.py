"""Loading of packages that `micromix_compile.export` wrote.

A package holds compiled code, which runs with the rights of the process that loads it: the digests in it find damage,
not malice. Load packages from whom you would take a program.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from micromix_compile import _torch_compat as compat
from micromix_compile.archive import Archive, as_size, this_machine
from micromix_compile.errors import (
    PackageError,
    PackageInputError,
    PackageMismatchError,
    UncapturedStepWarning,
)
from micromix_compile.plan import ModelPlan

__all__ = ["DecoderPackage", "Output", "Package", "load_package"]

# What to do about arguments that a package does not take.
_GIVE_SO = "Give them so"
_SIZES = f"{_GIVE_SO}, or export again with another max_length (`micromix export --max-length`) or batch_size"
_SHAPES = f"{_GIVE_SO}, or export again with dynamic_shapes for what varies"


def load_package(path: str | os.PathLike, *, plan: ModelPlan | None = None) -> Package:
    """The package of a file, checked; nothing of it runs before all checks have passed.

    Every part is compared with its digest; torch, this library, the device and the CPU's instruction sets with what
    the code was made for; the plan's digest with that of `plan`, if one is given. The result is called like the model
    that was exported. A causal language model that `export_decoder` wrote has `generate` too.

    A package for a GPU stays on the current CUDA device (`torch.cuda.device(1)` for the second), and so do its arguments.

    Raises PackageError, FileVersionError and PackageMismatchError.
    """
    archive = Archive(path)
    device = _check_machine(path, archive.manifest, plan)
    try:
        constants = archive.constants(device)
        entries = {
            name: _Entry(name, facts, constants, archive, device)
            for name, facts in archive.manifest["entries"].items()
        }
        if not entries:
            raise ValueError("there is no graph in it")
        if archive.manifest["decoder"] is not None:
            return DecoderPackage(archive, entries, device)
        return Package(archive, entries, device)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, (PackageError, torch.OutOfMemoryError)):
            raise
        reason = f"its manifest is damaged ({type(error).__name__}: {error})"
        raise PackageError(path=path, reason=reason) from error


class Package:
    """A loaded package; call it as the model, with tensors on its `device`.

    `plan_digest` is that of the plan it was made with.
    """

    def __init__(self, archive: Archive, entries: dict[str, _Entry], device: torch.device) -> None:
        self.path = archive.path
        self.device = device
        self.plan_digest: str = archive.manifest["plan_digest"]
        self.weight_bytes: int = archive.manifest["weight_bytes"]
        self.entries = entries

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result for arguments nested as those of the export. Raises PackageInputError."""
        return self.entries["model"](*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.weight_bytes:,} bytes of weights)"


class Output(dict):
    """A result that was a dict, or an object of named fields: `output["logits"]` or `output.logits`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DecoderPackage(Package):
    """A package of a causal language model: `generate`, or `prefill` and `decode` one by one."""

    def __init__(self, archive: Archive, entries: dict[str, _Entry], device: torch.device) -> None:
        super().__init__(archive, entries, device)
        facts = archive.manifest["decoder"]
        self.batch_size, self.max_length = map(as_size, (facts["batch_size"], facts["max_length"]))
        self.eos_token_id = [as_size(token) for token in facts["eos_token_id"]]
        self._cache = [[as_size(n) for n in shape] for shape in facts["cache"]]
        self._dtype = getattr(torch, facts["dtype"])
        most = (1 << 62) - 1  # packages of format 1 do not say
        self.vocabulary = as_size(facts.get("vocabulary", most))
        self._archive = archive
        self._idle: list[_Steps] = []  # at most one: what a text that is done used
        if {"prefill", "decode"} - entries.keys():
            raise ValueError("a graph of the decoder is missing")

    def tokenizer(self) -> Any:
        """The tokenizer that was exported with the model."""
        return self._archive.tokenizer()

    def new_cache(self) -> list[Tensor]:
        """An empty cache: keys and values, layer by layer."""
        return [torch.zeros(shape, dtype=self._dtype, device=self.device) for shape in self._cache]

    def __call__(self, input_ids: Tensor, start: int, cache: list[Tensor]) -> Tensor:
        """Logits `[batch, vocabulary]` after the last of some tokens, of which `start` came before; writes the cache.

        Raises PackageInputError.
        """
        self._check_tokens(input_ids)
        if not 0 <= start <= self.max_length - input_ids.shape[1]:
            there = f"{start} tokens, {input_ids.shape[1]} more"
            reason = f"start and input_ids are {there}: the cache holds {self.max_length}"
            raise PackageInputError(differences=[reason], mend=_SIZES)
        if not all(part.is_contiguous() for part in cache if isinstance(part, Tensor)):
            reason = (
                "cache is not contiguous, as that of new_cache() is: what is written would be lost"
            )
            raise PackageInputError(differences=[reason], mend=_GIVE_SO)
        entry = self.entries["decode" if input_ids.shape[1] == 1 else "prefill"]
        return entry(input_ids, torch.tensor(start, device=self.device), cache)

    def _fits(self, input_ids: Tensor) -> bool:
        """Whether there is a prompt for each row. Raises PackageInputError for what is no tensor of tokens at all."""
        wrong = _tensor_differences("input_ids", input_ids, torch.int64, self.device, None, {})
        if wrong:
            raise PackageInputError(differences=wrong, mend=_GIVE_SO)
        return input_ids.dim() == 2 and len(input_ids) == self.batch_size

    def _check_tokens(self, input_ids: Tensor) -> None:
        if not self._fits(input_ids) or not input_ids.shape[1]:
            reason = f"input_ids is {list(input_ids.shape)}, not [{self.batch_size}, 1 or more]"
            raise PackageInputError(differences=[reason], mend=_SIZES)
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= self.vocabulary:
            reason = f"input_ids holds {low if low < 0 else high}, and tokens are 0 to {self.vocabulary - 1}"
            raise PackageInputError(differences=[reason], mend=_GIVE_SO)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        eos_token_id: list[int] | None = None,
    ) -> Tensor:
        """int64 `[batch, length]` -> `[batch, length + new]`, the prompt and what follows.

        Prompts of one batch have one length. With `temperature` 0 each token is the likeliest. It ends where every
        row has had an end token, which a row then repeats, or the cache is full. Raises PackageInputError.
        """
        tokens = [input_ids]
        for token in self.stream(
            input_ids, max_new_tokens, temperature=temperature, generator=generator,
            eos_token_id=eos_token_id,
        ):  # fmt: skip
            tokens.append(token[:, None])
        return torch.cat(tokens, dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        eos_token_id: list[int] | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens one by one, int64 `[batch]`; see generate."""
        if not self._fits(input_ids) or not 1 <= input_ids.shape[1] < self.max_length:
            reason = f"input_ids is {list(input_ids.shape)}, not [{self.batch_size}, 1 to {self.max_length - 1}]"
            raise PackageInputError(differences=[reason], mend=_SIZES)
        if not temperature >= 0:
            reason = f"temperature is {temperature}, not 0 or more"
            raise PackageInputError(differences=[reason], mend=_GIVE_SO)
        ends = torch.tensor(
            self.eos_token_id if eos_token_id is None else eos_token_id, device=input_ids.device
        )
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        length, token = input_ids.shape[1], input_ids[:, -1]
        steps = self._steps(length)
        try:
            logits = self(input_ids, 0, steps.cache)
            for left in reversed(range(min(max_new_tokens, self.max_length - length + 1))):
                token = torch.where(ended, token, _choose(logits, temperature, generator))
                yield token
                if not left:
                    return
                ended |= torch.isin(token, ends)
                over = _Fetched(ended.all())
                if over.ready and over.value():
                    return
                logits = steps(
                    token
                )  # while a GPU still has the answer to find; this one is for nothing then
                if over.value():
                    return
        finally:
            if steps.captured:
                self._idle[:] = [steps]

    def _steps(self, length: int) -> _Steps:
        try:
            steps = self._idle.pop()
        except IndexError:
            with torch.inference_mode(False):  # tensors of that mode could be written in it alone
                return _Steps(self, length)
        steps.restart(length)
        return steps


class _Steps:
    """The decode graph over one cache, token by token.

    On a GPU, where launching its kernels takes longer than they do, the second step is captured as a CUDA graph,
    which it and all later ones replay, those of later texts too.
    """

    def __init__(self, package: DecoderPackage, length: int) -> None:
        self.cache = package.new_cache()
        self._decode, self._path = package.entries["decode"], package.path
        self._token = torch.zeros(package.batch_size, 1, dtype=torch.int64, device=package.device)
        self._start = torch.tensor(length, device=package.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._first = True

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def restart(self, length: int) -> None:
        """Begins another text after what was given to the stream of the last one, maybe another stream."""
        stream = torch.cuda.current_stream(self._start.device)
        stream.wait_stream(self._stream)
        self._stream = stream
        for part in self.cache:
            part.zero_()  # attention multiplies what it masks by zero: a NaN would stay
        self._start.fill_(length)

    def __call__(self, token: Tensor) -> Tensor:
        """int64 `[batch]` -> the logits that follow, until the next call."""
        self._token.copy_(token[:, None])
        if self._decode.captures and not self._first and self._graph is None:
            self._graph = self._captured()
        if self._graph is not None:
            self._stream = torch.cuda.current_stream(self._start.device)
            self._graph.replay()
        else:
            self._run()
        self._first = False
        return self._logits

    def _run(self) -> None:
        (self._logits,) = self._decode.run([self._token, self._start, *self.cache])
        self._start += 1

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph, of which nothing ran; None, with a warning, where something in it cannot be captured."""
        device = self._start.device
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.empty_cache()  # of graphs that are gone: another one cannot use their memory
        cause = None
        with torch.cuda.stream(stream):
            try:
                graph.capture_begin(capture_error_mode="thread_local")  # others may allocate
                self._run()
            except RuntimeError as error:
                cause = error
            finally:
                try:
                    graph.capture_end()
                except RuntimeError as error:  # that of a broken capture raises too
                    cause = cause or error
        if cause is not None:
            self._decode.captures = False
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
            warnings.warn(UncapturedStepWarning(path=self._path, reason=reason), stacklevel=4)
            return None
        return graph


class _Fetched:
    """A bool of a device, without holding up what its stream is given after it."""

    def __init__(self, value: Tensor) -> None:
        self.ready = not value.is_cuda
        self._value = value.to("cpu", non_blocking=True)
        if not self.ready:
            self._event = torch.cuda.current_stream(value.device).record_event()

    def value(self) -> bool:
        if not self.ready:
            self._event.synchronize()
        return bool(self._value)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if not temperature:
        return logits.argmax(-1)
    # The largest is 0 then; a small temperature would make it infinite.
    logits = logits.double() - logits.double().amax(-1, keepdim=True)
    chances = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


class _Entry:
    """One compiled graph with its constants."""

    def __init__(
        self,
        name: str,
        facts: dict[str, Any],
        constants: Sequence[Tensor],
        archive: Archive,
        device: torch.device,
    ) -> None:
        self.inputs = [
            (
                tuple(i["path"]),
                getattr(torch, i["dtype"]),
                device if i["device"] == device.type else torch.device(i["device"]),
                _sizes(i["shape"]),
            )
            for i in facts["inputs"]
        ]
        self.constants = {tuple(c["path"]): c["value"] for c in facts["constants"]}
        self.positional = [str(n) for n in facts["positional"]]
        self.mend = _SHAPES if name == "model" else _SIZES
        self.output = facts["output"]
        weights = {str(fqn): constants[as_size(i)] for fqn, i in facts["weights"].items()}
        self._model = compat.AotiModel(os.fspath(archive.path), name, device)
        if set(self._model.constant_names()) != weights.keys():
            raise ValueError(f"the code of {name} wants other weights")
        self._model.load_constants(weights)
        self._weights = weights  # the graph reads their memory
        self.captures = device.type == "cuda"  # until a run could not be captured

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._model.run(self._flat(args, kwargs))
        return _rebuilt(self.output, flat)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """The tensors of the result for those of the arguments, unchecked; empties the list."""
        return self._model.run(inputs)

    def _flat(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        missing = self.positional[len(args) :]
        if missing and all(name in kwargs for name in missing):
            args = (*args, *(kwargs[name] for name in missing))
            kwargs = {name: value for name, value in kwargs.items() if name not in missing}
        paths, leaves, _ = optree.tree_flatten_with_path((args, kwargs))
        given = dict(zip(map(tuple, paths), leaves))
        expected = {path for path, *_ in self.inputs} | self.constants.keys()
        differences = [f"{_where(p)} is missing" for p in expected - given.keys()]
        differences += [f"{_where(p)} is not among them" for p in given.keys() - expected]
        for path, value in self.constants.items():
            if path in given and (type(given[path]) is not type(value) or given[path] != value):
                differences.append(f"{_where(path)} is {given[path]!r}, and was {value!r}")
        symbols: dict[int, int] = {}
        for path, dtype, device, sizes in self.inputs:
            if path in given:
                differences += _tensor_differences(
                    _where(path), given[path], dtype, device, sizes, symbols
                )
        if differences:
            raise PackageInputError(differences=sorted(differences), mend=self.mend)
        # The graph was traced with contiguous tensors.
        return [given[path].contiguous() for path, *_ in self.inputs]


def _tensor_differences(
    where: str,
    value: Any,
    dtype: torch.dtype,
    device: torch.device,
    sizes: list | None,
    symbols: dict[int, int],
) -> list[str]:
    """What is not as expected; sizes are left out where they are None."""
    if not isinstance(value, Tensor):
        return [f"{where} is a {type(value).__name__}, not a tensor"]
    if value.layout != torch.strided:
        return [f"{where} is {value.layout}, not dense"]
    found = []
    if value.dtype != dtype:
        found.append(f"{where} is {value.dtype}, not {dtype}")
    if value.device != device:
        found.append(f"{where} is on {value.device}, not on {device}")
    if sizes is None:
        return found
    fits = value.dim() == len(sizes)
    for size, expected in zip(value.shape, sizes):
        if isinstance(expected, int):
            fits &= size == expected
        else:
            number, smallest, largest, factor, constant = expected
            symbol, rest = divmod(size - constant, factor)
            fits &= not rest and smallest <= symbol <= largest
            fits &= symbols.setdefault(number, symbol) == symbol
    if not fits:
        text = [
            str(s)
            if isinstance(s, int)
            else f"{_expression(s)} ({s[1]} to {'any' if s[2] == math.inf else s[2]})"
            for s in sizes
        ]
        found.append(f"{where} is {list(value.shape)}, not [{', '.join(text)}]")
    return found


def _expression(size: tuple) -> str:
    """A size that varies, as a user would write it: `s0`, `2*s0 + 1`; the range beside it is that of `s0`."""
    number, _, _, factor, constant = size
    text = f"s{number}" if factor == 1 else f"{factor}*s{number}"
    return text if not constant else f"{text} {'+' if constant > 0 else '-'} {abs(constant)}"


def _sizes(shape: list) -> list:
    """The sizes of an input, checked: ints, or (symbol, smallest, largest, a, b) for a times the symbol plus b."""
    result = []
    for size in shape:
        if isinstance(size, list):
            # Format 1 has no factor and constant.
            number, smallest, largest, factor, constant = size if len(size) > 3 else [*size, 1, 0]
            if type(constant) is not int or not as_size(factor):
                raise ValueError(f"{size!r} is no size")
            largest = math.inf if largest is None else as_size(largest)
            result.append((as_size(number), as_size(smallest), largest, factor, constant))
        else:
            result.append(as_size(size))
    return result


def _where(path: tuple) -> str:
    """("args", ...) as the caller wrote it: `argument 0`, `argument mask["x"]`."""
    if len(path) < 2:
        return "the arguments"
    return f"argument {path[1]}" + "".join(f"[{key!r}]" for key in path[2:])


def _rebuilt(form: Mapping[str, Any], flat: Sequence[Tensor]) -> Any:
    ((kind, value),) = form.items()
    if kind == "tensor":
        return flat[value]
    if kind == "constant":
        return value
    if kind == "dict":
        return Output({key: _rebuilt(item, flat) for key, item in value.items()})
    items = [_rebuilt(item, flat) for item in value]
    return items if kind == "list" else tuple(items)


def _check_machine(
    path: str | os.PathLike, manifest: Mapping[str, Any], plan: ModelPlan | None
) -> torch.device:
    """The device that the package will run on; for a GPU the current one.

    Raises PackageMismatchError where the code was made for something else than what runs here.
    """
    try:
        device = torch.device(str(manifest["device"]))
        flags, capability = set(map(str, manifest["cpu_flags"])), manifest["cuda_capability"]
        made_with = {key: manifest[key] for key in ("torch", "library_version", "abi")}
        digest = manifest["plan_digest"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PackageError(path=path, reason=f"its manifest is damaged ({error})") from error
    differences = []
    if device.type == "cuda" and not torch.cuda.is_available():
        differences.append("it was made for a CUDA device, and there is none")
    elif device.type not in ("cpu", "cuda"):
        differences.append(f"it was made for the device {device.type}")
    if not differences:
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        here = this_machine(device)
        if _minor(made_with["torch"]) != _minor(here["torch"]):
            differences.append(f"torch {made_with['torch']}, and here is {here['torch']}")
        if made_with["abi"] != here["abi"]:
            differences.append(
                f"micromix-compile {made_with['library_version']} (operators {made_with['abi']}), and "
                f"here is {here['library_version']} (operators {here['abi']})"
            )
        lacking = sorted(flags - set(here["cpu_flags"]))
        if lacking:
            differences.append(f"a CPU with {', '.join(lacking)}")
        if capability != here["cuda_capability"]:
            differences.append(
                f"CUDA capability {capability}, and here is {here['cuda_capability']}"
            )
    # A checkpoint holds the weights that a plan rounded, and no record of that: its packages have the layers' digest.
    if plan is not None and digest not in (plan.digest, plan.layers_digest):
        differences.append("another plan than the one given")
    if differences:
        raise PackageMismatchError(path=path, differences=differences)
    return device


def _minor(version: Any) -> tuple[str, ...]:
    return tuple(itertools.islice(str(version).split("."), 2))
