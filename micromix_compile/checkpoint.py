"""Quantised checkpoints: a Hugging Face directory whose planned layers are packed.

The files are safetensors. A planned layer has `weight` uint8 `[N, row bytes]` and `weight_scales` uint8 `[N, Kp/32]`,
the device-neutral layout of docs/numerics.md, in the place of its float weight; `order` int32 `[Kp]` is saved with the
first of the layers that share an input. All else is saved as it is. `quantization_config` of config.json says which
layers those are and how their channels are split, and holds the digest of each file.

A checkpoint is written in `NAME.partial` beside its place, file by file, and gets its name when it is whole. What was
begun from the same files and plan is continued.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from tqdm import tqdm

from micromix_compile import _torch_compat as compat
from micromix_compile.errors import (
    CheckpointError,
    CheckpointExistsError,
    FileVersionError,
    InvalidPlanError,
    OptionError,
    OutputError,
)
from micromix_compile.files import as_path, file_digest, write_tensors, write_text
from micromix_compile.layers import LayerShape, named_modules
from micromix_compile.ops import build_id
from micromix_compile.packing import is_released
from micromix_compile.plan import LayerPlan, ModelPlan
from micromix_compile.planned import AnyPlan, loaded, pack_layer, plan_to_use
from micromix_compile.quantized_linear import QuantizedLinear

__all__ = [
    "METHOD",
    "Description",
    "bytes_of",
    "check_directory",
    "files_fingerprint",
    "restore",
    "save_pretrained",
    "verify_files",
]

METHOD = "micromix"
VERSION = 2
_PROGRESS = "progress.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass
class Description:
    """What config.json says of a quantised checkpoint.

    `groups`: plans without their orders. `layers`: name -> (number of its group, shape). `owners`: for each group the
    layer that the order is saved with, or None where there is no order. `files`: name -> SHA-256; empty for a
    checkpoint that transformers wrote itself.
    """

    groups: list[LayerPlan]
    layers: dict[str, tuple[int, LayerShape]]
    owners: list[str | None]
    digest: str
    recipe: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: ModelPlan, names: Iterable[str]) -> Description:
        """The description of a plan whose layers are saved in the order of `names`."""
        number: dict[LayerPlan, int] = {}
        groups, owners, layers = [], [], {}
        for name in names:
            layer = plan[name]
            if layer not in number:
                number[layer] = len(groups)
                groups.append(replace(layer, order=None))
                owners.append(None if layer.order is None else name)
            layers[name] = (number[layer], plan.shapes[name])
        return cls(groups, layers, owners, plan.layers_digest, plan.recipe)

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        from micromix_compile import __version__

        return {
            "quant_method": METHOD,
            "version": VERSION,
            "library_version": __version__,
            "plan_digest": self.digest,
            "recipe": self.recipe,
            "groups": [
                group.to_dict() | {"order": owner} for group, owner in zip(self.groups, self.owners)
            ],
            "layers": {name: [group, *shape] for name, (group, shape) in self.layers.items()},
            "files": self.files,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any], path: str = "config.json") -> Description:
        """The inverse of to_dict. Raises CheckpointError and FileVersionError, which name `path`."""
        try:
            if operator.index(facts["version"]) > VERSION:
                raise FileVersionError(
                    path=path,
                    kind="quantised checkpoint",
                    version=facts["version"],
                    supported=VERSION,
                )
            groups = [LayerPlan.from_dict(group) for group in facts["groups"]]
            owners = [group["order"] for group in facts["groups"]]
            layers = {}
            for name, (group, *shape) in facts["layers"].items():
                layers[name] = (group, LayerShape(*shape))
                if groups[group].in_features != layers[name][1].in_features or group < 0:
                    raise ValueError(f"{name} does not fit its group")
            if any(owner is not None and layers[owner][0] != i for i, owner in enumerate(owners)):
                raise ValueError("an order belongs to another group")
            files = {str(name): str(digest) for name, digest in (facts["files"] or {}).items()}
            return cls(groups, layers, owners, facts["plan_digest"], dict(facts["recipe"]), files)
        except FileVersionError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"its quantization_config is damaged ({type(error).__name__}: {error})"
            raise CheckpointError(path=path, reason=reason) from error

    def owner(self, name: str) -> str | None:
        """The layer that the channel order of a layer is saved with."""
        return self.owners[self.layers[name][0]]

    def owns_order(self, name: str) -> bool:
        return self.owner(name) == name

    def tensors(self) -> Iterator[tuple[str, list[int], str]]:
        """Name, shape and safetensors dtype of everything that the planned layers must have."""
        for name, (group, shape) in self.layers.items():
            layout = self.groups[group].weight_layout
            yield f"{name}.weight", [shape.out_features, layout.row_bytes], "U8"
            yield f"{name}.weight_scales", [shape.out_features, layout.blocks], "U8"
            if self.owns_order(name):
                yield f"{name}.order", [layout.channels], "I32"

    def plan(self, orders: Mapping[str, Tensor], path: str = "the model") -> ModelPlan:
        """The plan, given the order of each layer that owns one. Raises CheckpointError if it is not the one saved."""
        try:
            groups = [
                group if owner is None else replace(group, order=orders[owner].cpu())
                for group, owner in zip(self.groups, self.owners)
            ]
            layers = {name: groups[group] for name, (group, _) in self.layers.items()}
            plan = ModelPlan(layers, {n: s for n, (_, s) in self.layers.items()}, self.recipe)
        except InvalidPlanError as error:
            raise CheckpointError(
                path=path, reason=f"a channel order is damaged ({error})"
            ) from error
        if plan.layers_digest != self.digest:
            reason = "its layers do not match the digest of the plan they were made by"
            raise CheckpointError(path=path, reason=reason)
        return plan


def verify_files(description: Description, files: Iterable[str | os.PathLike]) -> dict[str, Path]:
    """Check the files of a checkpoint before anything is loaded from them; returns the file of each tensor.

    Each file must have its digest, and every planned layer's tensors must be there with their shapes and dtypes.
    Raises CheckpointError.
    """
    holder: dict[str, Path] = {}
    found: dict[str, tuple[list[int], str]] = {}
    files = [Path(file) for file in files]
    missing = description.files.keys() - {file.name for file in files}
    if missing:
        raise CheckpointError(
            path=files[0].parent if files else "", reason=f"{min(missing)} is missing"
        )
    for file in files:
        try:
            if description.files and file_digest(file) != description.files.get(file.name):
                reason = "its content does not match the digest that was saved with it"
                raise CheckpointError(path=file, reason=reason)
            with safetensors.safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no mapping
                    tensor = opened.get_slice(name)
                    found[name] = (list(tensor.get_shape()), tensor.get_dtype())
                    holder[name] = file
        except OSError as error:
            raise CheckpointError(path=file, reason=error.strerror or str(error)) from error
        except safetensors.SafetensorError as error:
            reason = f"it is truncated, or not a safetensors file ({error})"
            raise CheckpointError(path=file, reason=reason) from error
    for name in found:
        layer, _, kind = name.rpartition(".")
        if kind == "weight_scales" and layer not in description.layers:
            reason = f"{layer} is packed there, and its quantization_config does not have it"
            raise CheckpointError(path=files[0].parent, reason=reason)
    for name, shape, dtype in description.tensors():
        if found.get(name) != (shape, dtype):
            there = f"is {found[name]}" if name in found else "is missing"
            reason = f"{name} must be {(shape, dtype)} and {there}"
            raise CheckpointError(path=files[0].parent if files else "", reason=reason)
    return holder


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a file in memory of its own: a mapped one stays resident with the rest of its file."""
    with safetensors.safe_open(file, framework="pt", backend="pread") as opened:
        return opened.get_tensor(name)


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike,
    plan: AnyPlan | None = None,
    *,
    max_shard_size: int | str = "2GB",
    tokenizer: Any = None,
    source: str | os.PathLike | None = None,
) -> None:
    """Write a transformers model as a quantised checkpoint that `from_pretrained` loads.

    Args:
        model: a float model, which may be offloaded by accelerate, or one that is quantised already.
        directory: where to; must not exist, or be empty. Nothing is there before everything is.
        plan: which layers, and how: a ModelPlan, the path of a saved one, or a Recipe that needs no calibration. By
            default the plan that is attached to the model, and MXFP8, with a NoPlanWarning, where there is none.
        max_shard_size: bytes of one file, or "500MB". About one file is held in memory.
        tokenizer: saved beside the model.
        source: the directory that the model was loaded from. What an earlier call wrote from the same source
            with the same plan, and did not finish, is then kept.

    Raises CheckpointExistsError, OutputError, PlanMismatchError, QuantizedAlreadyError, UnsavableLayerError,
    HookedLayerError, ReleasedWeightError, RecipeError for a recipe that needs calibration, PlanFileError and
    FileVersionError for a plan's file, OptionError for `model`, `directory`, `plan` and `max_shard_size`, and OSError.
    """
    # Where a link leads to: the link itself cannot be replaced by a directory.
    directory = as_path(directory, "directory", "save_pretrained(model, directory, plan)").resolve()
    check_directory(directory)
    model = compat.original_module(model)
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        reason = f"is a {type(model).__name__}, which is no model of transformers"
        valid = "a model with a config of transformers; micromix.export takes any other"
        raise OptionError(option="model", reason=reason, valid=valid)
    plan = plan_to_use(model, plan)
    entries = _entries(model, plan)
    description = Description.of(plan, [e.layer for e in entries if e.layer])
    shards = _shards(entries, bytes_of(max_shard_size))
    partial = directory.with_name(directory.name + ".partial")
    fingerprint = None
    if source is not None:
        fingerprint = {"source": files_fingerprint(source), "plan": plan.digest}
        fingerprint["build"] = build_id()
        fingerprint["shards"] = _digest(shards, model)
    with _alone_in(partial):
        done = _begin(partial, fingerprint)
        weight_map, total = {}, 0
        for file, shard in tqdm(shards.items(), "writing", unit="file", disable=None):
            names = [name for entry in shard for name in entry.sizes]
            weight_map |= dict.fromkeys(names, file)
            total += sum(size for entry in shard for size in entry.sizes.values())
            if file not in done:
                tensors: dict[str, Tensor] = {}
                for entry in tqdm(shard, file, unit="layer", leave=False, disable=None, delay=2):
                    tensors |= entry.tensors()
                write_tensors(partial / file, tensors, {"format": "pt"})
                del tensors
                done[file] = file_digest(partial / file)
                _note_progress(partial, fingerprint, done)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_text(partial / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        description.files = {file: done[file] for file in shards}
        _write_documents(model, partial, description, plan, tokenizer)
        os.replace(partial, directory)
        # Only now: until then another call is to find the files. (Killed here, a whole checkpoint keeps the note.)
        (directory / _PROGRESS).unlink(missing_ok=True)


def check_directory(directory: Path) -> None:
    """Say before long work that a checkpoint cannot be written there. Raises CheckpointExistsError and OutputError."""
    partial = Path(os.path.realpath(directory) + ".partial")
    if os.path.lexists(partial) and not _is_begun(partial):
        begun = f"the beginning of a checkpoint, as which {directory} is written until it is whole"
        raise CheckpointExistsError(path=partial, expected=begun)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointExistsError(path=directory, expected="an empty directory")
    if os.path.ismount(directory):
        reason = "a file system is mounted there, and a checkpoint gets its name at the end"
        raise OutputError(path=directory, reason=reason, mend="Give a new folder within it")


def _is_begun(partial: Path) -> bool:
    """Whether a directory is that of a checkpoint that was begun, and no one else's: what is not needed there is removed."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    names = [path.name for path in partial.iterdir()]
    return _PROGRESS in names or all(name.startswith(".progress.") for name in names)


@contextlib.contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """The directory is there, and no other process writes it meanwhile. Raises OutputError."""
    partial.mkdir(parents=True, exist_ok=True)
    folder = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mend = "Wait for that, or give another directory"
            reason = "another process is writing it"
            raise OutputError(path=partial, reason=reason, mend=mend) from None
        except OSError:
            pass  # a file system without locks, as NFS is for a folder
        if not partial.is_dir() or not os.path.samestat(os.fstat(folder), os.stat(partial)):
            reason = "another process has just given it its name"
            raise OutputError(path=partial, reason=reason, mend="Give another directory")
        yield
    finally:
        os.close(folder)


@dataclass(eq=False)
class _Entry:
    """Tensors that are made together: those of a planned layer, or one that is saved as it is."""

    sizes: dict[str, int]
    tensors: Callable[[], dict[str, Tensor]]
    layer: str = ""


def _entries(model: nn.Module, plan: ModelPlan) -> list[_Entry]:
    """Everything of a model that is saved, in the order of its modules."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    left_out = {name for name in tied if name.removesuffix(".weight") not in plan}
    left_out.update(getattr(model, "_keys_to_ignore_on_save", None) or ())
    entries, owned = [], set()
    for prefix, module in named_modules(model):
        dot = f"{prefix}." if prefix else ""
        own = {
            name: tensor
            for name, tensor in compat.saved_tensors(module).items()
            if dot + name not in left_out
        }
        if prefix in plan:
            layer = plan[prefix]
            owner = layer.order is not None and layer not in owned
            owned.add(layer)
            entries.append(_layer_entry(module, prefix, plan, owner))
            own = {}
        for name, tensor in own.items():
            entries.append(_float_entry(module, dot, name, tensor))
    return entries


def _layer_entry(module: nn.Module, name: str, plan: ModelPlan, owner: bool) -> _Entry:
    layout, n = plan[name].weight_layout, plan.shapes[name].out_features
    sizes = {f"{name}.weight": n * layout.row_bytes, f"{name}.weight_scales": n * layout.blocks}
    if owner:
        sizes[f"{name}.order"] = 4 * layout.channels
    if module.bias is not None:
        sizes[f"{name}.bias"] = module.bias.nbytes

    def tensors() -> dict[str, Tensor]:
        with loaded(module):
            if isinstance(module, QuantizedLinear):
                packed = module.packed()
            else:
                packed = pack_layer(plan, name, module.weight)
            result = {f"{name}.weight": packed.data, f"{name}.weight_scales": packed.scales}
            if owner:
                result[f"{name}.order"] = plan[name].order
            if module.bias is not None:
                result[f"{name}.bias"] = module.bias.detach()
            return {key: _own_memory(tensor) for key, tensor in result.items()}

    return _Entry(sizes, tensors, name)


def _float_entry(module: nn.Module, dot: str, name: str, tensor: Tensor) -> _Entry:
    def tensors() -> dict[str, Tensor]:
        with loaded(module):
            return {dot + name: _own_memory(getattr(module, name).detach())}

    return _Entry({dot + name: tensor.nbytes}, tensors)


def _own_memory(tensor: Tensor) -> Tensor:
    """Contiguous on the CPU, and no view of a larger tensor."""
    tensor = tensor.cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _shards(entries: list[_Entry], limit: int) -> dict[str, list[_Entry]]:
    """File name -> what goes into it. The same model and limit always give the same files."""
    shards: list[list[_Entry]] = []
    room = 0
    for entry in entries:
        size = sum(entry.sizes.values())
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= size
    if len(shards) < 2:
        return {_WEIGHTS: shards[0] if shards else []}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def bytes_of(size: int | str) -> int:
    """The number of bytes that a user means. Raises OptionError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    text = str(size).upper().strip()
    number, unit = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        result = int(float(number) * unit)
    except (ValueError, OverflowError):
        result = 0
    if result < 1:
        raise OptionError(
            option="max_shard_size", reason=f"cannot be {size!r}", valid='bytes, or as in "500MB"'
        )
    return result


def files_fingerprint(source: str | os.PathLike) -> list[list[Any]]:
    """What changes when the files of a directory change, or it is another directory."""
    files = sorted(path for path in Path(source).iterdir() if path.is_file())
    facts = [[p.name, (stat := p.stat()).st_size, stat.st_mtime_ns, _sampled(p)] for p in files]
    return [[str(Path(source).resolve())], *facts]


def _sampled(path: Path) -> str:
    """A digest of up to 64 blocks spread over a file: names, sizes and times may be those of another model's."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        for start in range(0, size, max(4096, -(-size // 64))):
            file.seek(start)
            digest.update(file.read(4096))
    return digest.hexdigest()


def _digest(shards: Mapping[str, list[_Entry]], model: nn.Module) -> str:
    """What changes when a file would hold other tensors, or tensors of another dtype."""
    sizes = {file: [entry.sizes for entry in shard] for file, shard in shards.items()}
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    return hashlib.sha256(json.dumps([sizes, dtypes]).encode()).hexdigest()


def _begin(partial: Path, fingerprint: Any) -> dict[str, str]:
    """The files that were finished before, with their digests, of the same source and plan; all else is removed."""
    done: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        progress = json.loads((partial / _PROGRESS).read_text(encoding="utf-8"))
        if fingerprint is not None and progress["fingerprint"] == fingerprint:
            done = {
                file: digest
                for file, digest in progress["files"].items()
                if Path(file).name == file and file_digest(partial / file) == digest
            }
    if partial.is_dir():
        for path in partial.iterdir():
            if path.name not in done and path.name != _PROGRESS:  # which says whose the folder is
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    _note_progress(partial, fingerprint, done)
    return done


def _note_progress(partial: Path, fingerprint: Any, done: dict[str, str]) -> None:
    write_text(partial / _PROGRESS, json.dumps({"fingerprint": fingerprint, "files": done}))


def _write_documents(
    model: nn.Module, partial: Path, description: Description, plan: ModelPlan, tokenizer: Any
) -> None:
    import copy

    config = copy.deepcopy(model.config)
    config.quantization_config = description.to_dict()
    config.architectures = [type(model).__name__]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if any(name.removesuffix(".weight") in plan for name in tied):
        config.tie_word_embeddings = False  # the head has a weight of its own now
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    config.dtype = next(dtypes, torch.get_default_dtype())
    config.save_pretrained(partial)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(partial)
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(partial)
        except Exception as error:  # what tokenizers makes of an OSError
            raise OSError(f"the tokenizer cannot be written to {partial}: {error}") from error
    write_text(partial / "README.md", model_card(model.config, plan))


def model_card(config: Any, plan: ModelPlan) -> str:
    """The README.md of a checkpoint, in the form that the Hugging Face hub reads."""
    rows = plan.summary()
    channels = sum(row["K"] * row["N"] for row in rows)
    share = {
        name: sum(row[k] * row["N"] for row in rows) / channels if channels else 0.0
        for name, k in (("MXFP4", "k4"), ("MXFP6", "k6"), ("MXFP8", "k8"))
    }
    name = str(getattr(config, "name_or_path", "") or "")
    # A path of this machine says nothing to a reader; "owner/name" does.
    base = name if name.count("/") == 1 and not Path(name).exists() else ""
    header = ["library_name: transformers", "tags:", "- micromix", "- mxfp4", "- mxfp6", "- mxfp8"]
    if base:
        header += [f"base_model: {base}", "base_model_relation: quantized"]
    activations = "Activations are quantised in the same formats when the model runs."
    if plan and all(layer.weight_only for layer in plan.values()):
        activations = "Activations stay in bfloat16."
    shares = ", ".join(f"{name} {part:.0%}" for name, part in share.items())
    return f"""---
{chr(10).join(header)}
---

# {base or getattr(config, "model_type", "model")}, mixed MXFP4 / MXFP6 / MXFP8

{len(rows)} linear layers are packed at {plan.weight_bits:.2f} bits per weight, scales counted ({shares} of the weights).
{activations} All other tensors are as they were.

```python
import micromix_compile  # makes the format known to transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/repository")
model.compile(backend="micromix")  # adds the fusions; the model runs without it too
```

Without `import micromix_compile` transformers cannot load this checkpoint.
"""


def restore(model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor]) -> list[str]:
    """Bring back the float weights that `release_weights` freed; returns their names.

    `source` is the directory of the float checkpoint, whose tensors must be named as the model's parameters, or a
    mapping from names to tensors. All are found before one is brought back. Raises CheckpointError.
    """
    named = compat.original_module(model).named_parameters()
    released = {name: parameter for name, parameter in named if is_released(parameter)}
    with contextlib.ExitStack() as stack:
        path, find = ("the mapping", source.get) if isinstance(source, Mapping) else (source, None)
        if find is None:
            find = _reader(Path(source), stack)
        tensors = {}
        for name, parameter in released.items():
            tensor = tensors[name] = find(name)
            fits = tensor is not None and tensor.shape == parameter.shape
            if not fits or not tensor.is_floating_point():  # packed bytes can have the same shape
                there = "is missing"
                if tensor is not None:
                    there = f"is {list(tensor.shape)} of {tensor.dtype}"
                reason = f"{name} must be {list(parameter.shape)} of floats and {there}"
                raise CheckpointError(path=path, reason=reason)
        with torch.no_grad():
            for name, parameter in released.items():
                parameter.untyped_storage().resize_(parameter.nbytes)
                parameter.copy_(tensors.pop(name))
    return list(released)


def _reader(directory: Path, stack: contextlib.ExitStack) -> Callable[[str], Tensor | None]:
    """Reads tensors by name from the safetensors files of a directory."""
    holder = {}
    if not directory.is_dir():
        raise CheckpointError(path=directory, reason="it is no folder")
    try:
        for path in sorted(directory.glob("*.safetensors")):
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            holder |= dict.fromkeys(file.keys(), file)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(path=directory, reason=str(error)) from error
    if not holder:
        raise CheckpointError(path=directory, reason="it has no safetensors files")
    return lambda name: holder[name].get_tensor(name) if name in holder else None
