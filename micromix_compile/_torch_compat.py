"""Every private torch name this project uses, in one place.

Each entry says what it is for; docs/kernels.md#versions-of-torch says with which versions of torch the tests ran. Nothing else in the project may
import from `torch._dynamo`, `torch._inductor`, `torch._guards` or `torch._functorch`. What graphs hold as targets
(`torch._ops`, `torch._C._nn`) stands where they are matched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.autograd import forward_ad

# The class of a module whose weight its owner reads, and that is never called: MultiheadAttention's out_proj.
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as UncalledLinear  # noqa: F401
from torch.utils._sympy.numbers import int_oo


def source_name(node: fx.Node) -> str:
    """Where Dynamo read a placeholder from, as the Python expression it guards on.

    For example ``L['self']._modules['lm_head']._parameters['weight']``; empty for a node that Dynamo did not
    make. (`Source.name` was a method in earlier releases.)
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    return source.name() if callable(source.name) else source.name


def is_on_stack(node: fx.Node) -> bool:
    """Whether Dynamo read a placeholder from what a graph break left on Python's stack, which has no names."""
    return source_name(node).startswith("L['___stack")


def module_of(node: fx.Node) -> int | None:
    """The id of the module that called a node of Dynamo's graph."""
    keys = list(node.meta.get("nn_module_stack", {}))
    number = keys[-1].partition("@")[0] if keys else ""  # that of a call follows
    return int(number) if number.isdecimal() else None


def is_static_input(node: fx.Node) -> bool:
    """Whether Dynamo holds a placeholder to be a parameter or buffer of a module."""
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that may be edited, with all that AOTAutograd reads from Dynamo's graph.

    Dynamo reads its own graph again after the backend has returned, so that one must stay as it is. A plain
    `deepcopy` would copy the fake tensors in `meta`; this copies nodes and shares what they refer to.
    """
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
        copies[node] = copy
    graph._codegen = gm.graph._codegen
    result = fx.GraphModule(gm, graph)
    result.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    return result


def mark_static_input(node: fx.Node) -> None:
    """Make a placeholder that this project added look like a parameter: a static address, and no guard on it.

    AOTAutograd wants `_dynamo_source` on every placeholder (None: not from the user's code), and takes the
    indices of static inputs, which CUDA graphs need, from `tensor_dict`.
    """
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def static_fake(tensor: torch.Tensor) -> torch.Tensor:
    """A fake of `tensor` with constant sizes, even under `dynamic=True`; the tensor itself outside a compilation.

    A real tensor given to `compile_fx` under `dynamic=True` would get symbolic sizes and guards that no source
    backs.
    """
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def same_storage(a: object, b: object) -> bool:
    """Whether two fake tensors of one trace are views of the same memory."""
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return tensors and torch._C._is_alias_of(a, b)


def is_infinite(bound: sympy.Expr) -> bool:
    """Whether a bound of a size is none: torch's infinity of integers is a finite number for sympy, without a value."""
    return bound in (int_oo, sympy.oo)


def assumed_relations(size: torch.SymInt) -> list[sympy.Basic]:
    """What tracing has taken for granted of sizes, beyond their ranges."""
    env = size.node.shape_env
    return [env.replace(guard.expr) for guard in env.guards]


def is_transformed(value: object) -> bool:
    """Whether a value is one of those inside torch.vmap or another transformation of torch.func."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return isinstance(value, torch.Tensor) and wrapped(value)


def is_wrapper(value: object) -> bool:
    """Whether a tensor is a subclass that wraps others, as DTensor is, and says itself what an operator does with it."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(value)


def has_tangent(values: Sequence[object]) -> bool:
    """Whether forward-mode differentiation, which torch.no_grad does not stop, goes through one of these."""
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return False
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


FUSED_LAYERS = {
    torch._transformer_encoder_layer_fwd: ((3, 4), (5, 6), (14, 15), (16, 17)),
    torch._native_multi_head_attention: ((5, 6), (7, 8)),
    torch.nn.functional.multi_head_attention_forward: ((5, 6), (11, 12)),
}
"""Operators that torch runs in the place of a whole module, and where they take the weights and biases of its layers."""
for _function in (torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention):
    FUSED_LAYERS[getattr(torch.ops.aten, _function.__name__).default] = FUSED_LAYERS[_function]


def original_module(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps; any other object is itself."""
    return getattr(module, "_orig_mod", module)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module.__dict__.get("_compiled_call_impl") is not None


def raised_through_dynamo(error: Exception) -> Exception:
    """The same error, of a class derived from its own, that Dynamo hands to the caller of the compiled model.

    Any other exception of a backend reaches the user as `BackendCompilerFailed`, which no `except` clause of
    theirs names.
    """
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    # Pickled it is the error of before: the derived class has no name that pickle would find.
    own = {"__module__": kind.__module__, "__reduce__": lambda self: kind.__reduce__(error)}
    derived = type(kind.__name__, (kind, ShortenTraceback), own)
    result = derived.__new__(derived)
    result.args = error.args
    result.__dict__.update(error.__dict__)
    result.first_useful_frame = None
    return result


def guard_identity(node: fx.Node) -> None:
    """Make Dynamo compile anew when the tensor behind a placeholder is another object.

    Dynamo guards a parameter's shape and dtype only, so that one graph can serve several equal modules; a
    graph with packed weights belongs to the very parameters it was packed from.
    """
    _guard(node, "ID_MATCH")


def guard_value(node: fx.Node) -> None:
    """Make Dynamo compile anew when the number behind a placeholder has another value."""
    _guard(node, "EQUALS_MATCH")


def guard_attribute(node: fx.Node, tensor: torch.Tensor, name: str) -> None:
    """Make Dynamo compile anew when a Python attribute of the tensor behind a placeholder has another value, comes or goes.

    HASATTR takes the attribute as an argument on torch 2.13; where it does not, it reads it from the source.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import AttrSource

    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return
    if hasattr(tensor, name):
        _add_guard(AttrSource(source, name), GuardBuilder.EQUALS_MATCH)
    elif "attr" in inspect.signature(GuardBuilder.HASATTR).parameters:
        _add_guard(source, functools.partial(GuardBuilder.HASATTR, attr=name))
    else:
        _add_guard(AttrSource(source, name), GuardBuilder.HASATTR)


def look_again(module: torch.nn.Module) -> None:
    """Make Dynamo evaluate the guards on a module's parameters, though nothing it watches has changed.

    It passes over the guards of a module whose dictionaries are as they were (torch 2.11 over those on attributes of
    its parameters too), so one of these is changed and changed back.
    """
    module._parameters["_micromix_look_again"] = None
    del module._parameters["_micromix_look_again"]


def _guard(node: fx.Node, kind: str) -> None:
    from torch._dynamo.guards import GuardBuilder

    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        _add_guard(source, getattr(GuardBuilder, kind))


def _add_guard(source: Any, kind: Callable) -> None:
    context = torch._guards.TracingContext.try_get()
    if context is not None:
        context.guards_context.dynamo_guards.add(source.make_guard(kind))


def inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config_patches: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a Dynamo-style graph with Inductor."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs), config_patches=config_patches or None)


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The Inductor settings behind a `torch.compile(mode=...)`; ValueError for an unknown mode."""
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode == "default":
        return {}
    if mode not in modes:
        names = ", ".join(dict.fromkeys(["default", *modes]))
        raise ValueError(f"unknown mode {mode!r}; there are {names}")
    return modes[mode]


def is_inductor_option(name: str) -> bool:
    """Whether `torch.compile(options={name: ...})` is a setting of Inductor."""
    from torch._inductor import list_options

    return name.replace("-", "_") in list_options()


def never_uncompiled(backend: Callable[..., Any], refusal: Callable[[str], Exception]) -> None:
    """Make Dynamo compile on, or raise, where it would run a function that is compiled with `backend` uncompiled.

    It gives a function up after 8 compilations of it (`recompile_limit`), and the float model would run unseen. For
    this backend alone, the limit is the one beyond it (`accumulated_recompile_limit`, 256), and past that, or past
    `torch.compile(recompile_limit=...)`, what `refusal` makes of the function is raised. Who has torch raise anyway
    (`fail_on_recompile_limit_hit`) keeps the limits that they set. As a setting this would hold for every other
    compiled model of the process, and for one thread only; so it is put around each compilation.
    """
    from torch._dynamo import config, convert_frame
    from torch._dynamo.exc import FailOnRecompileLimitHit

    convert = convert_frame.ConvertFrameAssert.__call__

    @functools.wraps(convert)
    def convert_or_raise(self: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if _function_of(self) is not backend:
            return convert(self, frame, *args, **kwargs)
        limits: dict[str, Any] = {"fail_on_recompile_limit_hit": True}
        if not config.fail_on_recompile_limit_hit:
            limits["recompile_limit"] = max(
                config.recompile_limit, config.accumulated_recompile_limit
            )
        try:
            with config.patch(limits):
                return convert(self, frame, *args, **kwargs)
        except FailOnRecompileLimitHit:
            code = frame.f_code
            function = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
            raise raised_through_dynamo(refusal(function)) from None

    convert_frame.ConvertFrameAssert.__call__ = convert_or_raise


def _function_of(converter: Any) -> Any:
    """The function that was registered as the backend of one of Dynamo's converters."""
    from torch._dynamo.eval_frame import innermost_backend

    backend = innermost_backend(converter)
    backend = getattr(backend, "compiler_fn", backend)  # what torch.compile holds it by
    return getattr(backend, "func", backend)  # a functools.partial


def given_options(compiled: Any) -> dict[str, Any] | None:
    """What `torch.compile(model, backend=...)` hands to its backend beside the graph; None of a module that is not its result.

    Calls with equal ones share their graphs.
    """
    from torch._dynamo.eval_frame import innermost_backend

    context = getattr(compiled, "dynamo_ctx", None)
    return None if context is None else getattr(innermost_backend(context.callback), "kwargs", {})


@contextlib.contextmanager
def compiled_call(module: torch.nn.Module, backend: Callable[..., Any]) -> Iterator[None]:
    """`module.compile(backend=...)` for the time of a context; an earlier `module.compile` is in force again after.

    Every call is compiled, however often that takes: where Dynamo gives up after 8 compilations of a function,
    the model would run unseen. (Hugging Face models share one wrapper function, and so do the hooks of
    accelerate.) The compilations do not count towards those of the user where torch can keep them apart
    (`isolate_recompiles`, 2.13). `_compiled_call_impl` is what `Module.__call__` runs. Dynamo does not compile
    the frames of torch's own modules (an `nn.Sequential`), so it is given one of ours.
    """
    from torch._dynamo import config

    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options = {"isolate_recompiles": True} if isolated else {}

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    before = module._compiled_call_impl
    module._compiled_call_impl = torch.compile(call, backend=backend, **options)
    unlimited = 1 << 30
    try:
        with config.patch(recompile_limit=unlimited, accumulated_recompile_limit=unlimited):
            yield
    finally:
        module._compiled_call_impl = before


def fresh_compile_cache() -> contextlib.AbstractContextManager[None]:
    """Compiles under it find no earlier kernel, on disk or in memory: for honest compile times."""
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


def graph_pass(run: Callable[[fx.Graph], None], uuid: Callable[[], str | None]) -> Any:
    """A pass over Inductor's graph; `uuid` identifies it to Inductor's caches."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            run(graph)

        def uuid(self) -> str | None:
            return uuid()

    return Pass()


def trace_inference(function: Callable[..., Any], arguments: Sequence[Any]) -> fx.GraphModule:
    """The graph that Inductor makes of a function, with its decompositions, as in inference."""
    from torch._inductor.pattern_matcher import fwd_only
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    quiet = warnings.catch_warnings()
    with quiet, torch.no_grad(), torch._guards.tracing(None), unset_fake_temporarily():
        warnings.simplefilter("ignore")  # they are about a pattern's code, not the user's
        return fwd_only(function, list(arguments))


def fake_mode_of(values: Any) -> contextlib.AbstractContextManager[Any]:
    """The fake-tensor mode of the first fake tensor among nested values."""
    from torch._subclasses.fake_tensor import FakeTensor

    leaves = torch.utils._pytree.tree_leaves(values)
    return next(
        (v.fake_mode for v in leaves if isinstance(v, FakeTensor)), contextlib.nullcontext()
    )


def count(name: str) -> None:
    """Add one to a counter that Inductor saves with the graph under compilation."""
    from torch._dynamo.utils import counters

    counters["inductor"][name] += 1


def counting(run: Callable[[], Any], prefix: str) -> tuple[Any, dict[str, int]]:
    """What `run` returns, and how much it added to the counters whose names start with `prefix`.

    A graph from Inductor's cache adds what its compilation added.
    """
    from torch._dynamo.utils import counters

    before = counters["inductor"].copy()
    result = run()
    return result, {
        name: n - before[name]
        for name, n in counters["inductor"].items()
        if name.startswith(prefix) and n > before[name]
    }


def readable(graph: fx.Graph) -> str:
    """A graph as Python, with the types and sizes of its values."""
    module = graph.owning_module or fx.GraphModule({}, graph)
    return fx.GraphModule(module, graph).print_readable(print_output=False)


def leaves_in_order(value: Any) -> list[Any]:
    """The leaves of nested arguments, None too, in the order of an exported graph's placeholders."""
    return torch.utils._pytree.tree_leaves(value)


def output_of(gm: fx.GraphModule, leaves: Sequence[Any]) -> Any:
    """What an exported graph returns, with these leaves in the places of its flat results."""
    return torch.utils._pytree.tree_unflatten(leaves, gm._out_spec)


def return_flat(gm: fx.GraphModule, values: Sequence[fx.Node]) -> None:
    """Make an exported graph return these nodes, as one tuple."""
    gm.graph.output_node().args = (tuple(values),)
    spec = torch.utils._pytree.tree_structure(tuple(range(len(values))))
    gm.graph._codegen.pytree_info = gm.graph._codegen.pytree_info._replace(out_spec=spec)
    gm._out_spec = spec
    gm.recompile()


def hooks(module: torch.nn.Module) -> list[Callable[..., Any]]:
    """What a call of a module runs before and after its forward."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def saved_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers that its state_dict has, by their names in it."""
    own = [*module._parameters.items(), *module._buffers.items()]
    left_out = module._non_persistent_buffers_set
    return {name: t for name, t in own if t is not None and name not in left_out}


def aot_compile(
    gm: fx.GraphModule, args: Sequence[Any], kwargs: dict[str, Any], settings: dict[str, Any]
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Compile an unlifted exported graph with AOTInductor: its files, and its constants, which are not in them.

    Constants are those of the module and those that Inductor folded. "pickle_weights" is what makes Inductor return
    them; nothing is pickled.
    """
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        **settings,
    }
    result = torch._inductor.aot_compile(gm, tuple(args), kwargs, options=options)
    files = [file for file in result if isinstance(file, str)]
    weights = [part for part in result if not isinstance(part, str)]
    return files, {name: pair[0] for part in weights for name, pair in part.items()}


def write_aoti_archive(path: str, files: dict[str, list[str]]) -> None:
    """A .pt2 archive of the files of several compiled graphs, by name."""
    from torch._inductor.package import package_aoti

    package_aoti(path, files)


class AotiModel:
    """One compiled graph of a .pt2 archive, for flat lists of tensors.

    torch's own loader for Python, `load_package`, loads every graph of an archive at each call, and reads pickles.
    """

    def __init__(self, path: str, name: str, device: torch.device) -> None:
        index = -1 if device.index is None else device.index
        # Without threads, that is without events, which no CUDA graph can capture.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(path, name, True, 1, index)
        # A run is on the stream of the current device.
        self._on_device = contextlib.nullcontext()
        if device.type == "cuda":
            self._on_device = torch.cuda.device(device)
        # One run at a time. In C++ a thread would wait with the GIL, which a run takes to free its inputs.
        self._one_run = threading.Lock()

    def constant_names(self) -> list[str]:
        return self._loader.get_constant_fqns()

    def load_constants(self, constants: dict[str, torch.Tensor]) -> None:
        """The graph uses these very tensors from now on; the caller keeps them alive."""
        self._loader.load_constants(constants, False, True, True)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with self._one_run, self._on_device:
            return self._loader.boxed_run(inputs)


def runs_packages() -> bool:
    """Whether AOTInductor can call an operator that takes a dtype.

    That of torch 2.11 gives it another one (the number of a dtype in the exported program, not torch's own), and goes on
    where the operator refuses, with no results.
    """
    return torch.__version__ >= (2, 12)


def serializable_callable() -> type:
    """What a backend's result must derive from for `aot_compile` to save it."""
    try:
        from torch._dynamo.aot_compile_types import SerializableCallable
    except ImportError:  # an older torch, which saves none
        return object
    return SerializableCallable


def serialized(compiled: Callable[..., Any]) -> bytes:
    """What `inductor` returned under `aot_compile`, in torch's own form, which is a pickle."""
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Bundled

    return Bundled.serialize_compile_artifacts(Bundled(compiled))


def deserialized(data: bytes) -> Callable[..., Any]:
    """The inverse of `serialized`."""
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Bundled

    return Bundled.deserialize_compile_artifacts(data)
