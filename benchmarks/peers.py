"""The products that micromix is compared with, each of one bf16 input and copies of one weight."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """A product to time, with one copy or, in one graph, with all, and the rows that it computes, to check."""

    run: Callable[[], object]
    result: Callable[[], Tensor]


def of_function(function: Callable[[], Tensor]) -> Product:
    return Product(function, function)


def eager(weights: list[Tensor], x: Tensor) -> list[Product]:
    """torch's own bf16 product, called as it is: nothing checks its arguments as a compiled call's guards do."""
    return [of_function(lambda w=w: torch.nn.functional.linear(x, w)) for w in weights]


def inductor(
    weights: list[Tensor], x: Tensor, dtype: torch.dtype = torch.bfloat16
) -> list[Product]:
    """Inductor with freezing: the weight is packed for oneDNN when the graph is compiled."""
    return [compiled([_linear(weight.to(dtype)) for weight in weights], x.to(dtype))]


def _linear(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def compiled(layers: list[torch.nn.Module], x: Tensor) -> Product:
    """One graph of these layers, as a model's is, compiled by Inductor with freezing, and run once; each has an input of
    its own.

    Dynamo keeps what it has compiled by the code object, and looks through it at every call: the graph gets a code object
    of its own. Nothing may reset Dynamo afterwards: the next call would compile again, unfrozen.
    """
    from torch._inductor import config

    for layer in layers:
        layer.eval()
    inputs = [x.clone() for _ in layers]

    def call(*inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(layers, inputs)]

    own = types.FunctionType(
        call.__code__.replace(), call.__globals__, "call", None, call.__closure__
    )
    function = torch.compile(own, dynamic=False, fullgraph=True)
    with config.patch(freezing=True), torch.inference_mode():
        function(*inputs)
    return Product(lambda: function(*inputs), lambda: torch.cat(function(*inputs)))


def torchao_int8(weights: list[Tensor], x: Tensor) -> list[Product]:
    """torchao's int8 dynamic activations, int8 weights, compiled as torchao advises."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = [_linear(weight.clone()) for weight in weights]
    for layer in layers:
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return [compiled(layers, x)]


class _GgmlParameters(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


GGML_F32, GGML_Q4_0 = 0, 2
# Called with a level, a line of llama.cpp's log, and nothing.
_SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def _ggml() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """llama.cpp's libraries: tensors and graphs, and the CPU's kernels."""
    library = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    base = ctypes.CDLL(str(library / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(library / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointers = "init new_tensor_2d mul_mat new_graph get_data backend_reg_dev_get"
    pointers += " backend_reg_get_proc_address backend_alloc_ctx_tensors_from_buft"
    for name in pointers.split():
        getattr(base, f"ggml_{name}").restype = ctypes.c_void_p
    cpu.ggml_backend_cpu_reg.restype = cpu.ggml_backend_cpu_init.restype = ctypes.c_void_p
    base.ggml_backend_buft_name.restype = ctypes.c_char_p
    base.ggml_quantize_chunk.restype = base.ggml_nbytes.restype = ctypes.c_size_t
    base.ggml_backend_dev_supports_op.restype = ctypes.c_bool
    base.ggml_log_set(_SILENCE, None)
    cpu.ggml_cpu_init()
    return base, cpu


def _ggml_tensor(base: ctypes.CDLL, context: ctypes.c_void_p, kind: int, rows: int, width: int):
    sizes = ctypes.c_int64(width), ctypes.c_int64(rows)
    return ctypes.c_void_p(base.ggml_new_tensor_2d(context, kind, *sizes))


def _ggml_context(base: ctypes.CDLL, bytes_needed: int, allocates: bool = True) -> ctypes.c_void_p:
    return ctypes.c_void_p(base.ggml_init(_GgmlParameters(bytes_needed, None, not allocates)))


def ggml_q4_0(weights: list[Tensor], x: Tensor, repacks: bool = False) -> list[Product]:
    """The mul_mat of llama.cpp's CPU library on Q4_0 weights (4.5 bits): in their common layout, or
    with their rows interleaved."""
    base, cpu = _ggml()
    backend = ctypes.c_void_p(cpu.ggml_backend_cpu_init())
    cpu.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    products = []
    values = x.float().contiguous()
    for weight in weights:
        n, k = weight.shape
        bytes_needed = n * k * 3 + len(values) * (n + 2 * k) * 8 + (64 << 20)
        context = _ggml_context(base, bytes_needed)
        rows = _ggml_tensor(base, context, GGML_F32, len(values), k)
        ctypes.memmove(base.ggml_get_data(rows), values.data_ptr(), values.numel() * 4)
        plain = _ggml_tensor(base, context, GGML_Q4_0, n, k)
        source = weight.float().contiguous()
        base.ggml_quantize_chunk(
            *(GGML_Q4_0, ctypes.c_void_p(source.data_ptr())),
            ctypes.c_void_p(base.ggml_get_data(plain)),
            *(ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k), None),
        )
        packed = _repacked(base, cpu, context, plain, rows, (n, k)) if repacks else plain
        graph = ctypes.c_void_p(base.ggml_new_graph(context))
        result = ctypes.c_void_p(base.ggml_mul_mat(context, packed, rows))
        base.ggml_build_forward_expand(graph, result)
        # The context owns the tensors, and is never freed; the backend keeps the scratch of a call.
        run = functools.partial(base.ggml_backend_graph_compute, backend, graph)
        copy = functools.partial(_ggml_values, base, run, result, (len(values), n))
        products.append(Product(run, copy))
    return products


def _ggml_values(base, run, tensor: ctypes.c_void_p, shape: tuple[int, int]) -> Tensor:
    """A float32 tensor of ggml after a run that fills it."""
    if run() != 0:
        raise RuntimeError("llama.cpp did not compute its graph")
    values = torch.empty(shape)
    ctypes.memmove(values.data_ptr(), base.ggml_get_data(tensor), values.nbytes)
    return values


def _repacked(base, cpu, context, plain, rows, shape: tuple[int, int]) -> ctypes.c_void_p:
    """A Q4_0 weight with its rows interleaved for the vector units, as llama.cpp lays it out when it
    loads a model on a CPU without AMX. Its kernel for AMX is left out: built by gcc 12 it faults."""
    registry = ctypes.c_void_p(cpu.ggml_backend_cpu_reg())
    device = ctypes.c_void_p(base.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0)))
    list_types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(
        base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    )
    types = [ctypes.c_void_p(t) for t in itertools.takewhile(bool, list_types(device))]
    repack = next(t for t in types if base.ggml_backend_buft_name(t) == b"CPU_REPACK")
    weight_context = _ggml_context(base, 1 << 20, allocates=False)
    packed = _ggml_tensor(base, weight_context, GGML_Q4_0, *shape)
    base.ggml_backend_alloc_ctx_tensors_from_buft(weight_context, repack)
    product = ctypes.c_void_p(base.ggml_mul_mat(context, packed, rows))
    if not base.ggml_backend_dev_supports_op(device, product):
        raise NotImplementedError("llama.cpp does not repack Q4_0 weights of this shape here")
    size = ctypes.c_size_t(base.ggml_nbytes(plain))
    data = ctypes.c_void_p(base.ggml_get_data(plain))
    base.ggml_backend_tensor_set(packed, data, ctypes.c_size_t(0), size)
    return packed


def openvino_int4(weights: list[Tensor], x: Tensor) -> list[Product]:
    """OpenVINO's product with a weight of symmetric int4 in groups of 32 and float16 scales (4.5
    bits), in the form that its compression gives; all else is OpenVINO's choice, as for its users."""
    import numpy
    import openvino
    from openvino import opset13 as operators

    core = openvino.Core()
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    products = []
    for weight in weights:
        n, k = weight.shape
        groups = weight.float().view(n, k // 32, 32)
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 7
        codes = (groups / scale).round().to(torch.int8)
        nibbles = (codes[..., 0::2] & 0xF) | (codes[..., 1::2] << 4)
        packed = openvino.Tensor(nibbles.numpy().view(numpy.uint8), groups.shape, openvino.Type.i4)
        node = operators.convert(operators.constant(packed), "f16")
        node = operators.multiply(node, operators.constant(scale.half().numpy()))
        node = operators.reshape(node, operators.constant([n, k]), special_zero=False)
        rows = operators.parameter([len(x), k], openvino.Type.f32)
        result = operators.matmul(rows, operators.convert(node, "f32"), False, True)
        model = openvino.Model([result], [rows])
        request = core.compile_model(model, "CPU", threads).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.float().numpy()))
        products.append(
            Product(
                request.infer,
                lambda request=request: torch.from_numpy(request.infer()[0].copy()),
            )
        )
    return products


class Peer(NamedTuple):
    make: Callable[[list[Tensor], Tensor], list[Product]]
    bits: float = 16  # of an element of its weight, scales included
    module: str = "torch"
    package: str = "torch"  # that has the module


PEERS = {
    "eager bf16": Peer(eager),
    "inductor bf16": Peer(inductor),
    "inductor fp32": Peer(functools.partial(inductor, dtype=torch.float32), 32),
    "torchao int8": Peer(torchao_int8, 8, "torchao", "torchao"),
    "openvino int4": Peer(openvino_int4, 4.5, "openvino", "openvino"),
    "ggml q4_0": Peer(ggml_q4_0, 4.5, "llama_cpp", "llama-cpp-python"),
    "ggml q4_0 repacked": Peer(
        functools.partial(ggml_q4_0, repacks=True), 4.5, "llama_cpp", "llama-cpp-python"
    ),
}


def available(names: list[str]) -> dict[str, Callable[[list[Tensor], Tensor], list[Product]]]:
    """The peers of these names whose packages are installed; says how to get the others."""
    for name in names:
        if not importlib.util.find_spec(PEERS[name].module):
            print(f"{name} is left out: it needs `pip install {PEERS[name].package}`")
    return {
        name: PEERS[name].make for name in names if importlib.util.find_spec(PEERS[name].module)
    }
