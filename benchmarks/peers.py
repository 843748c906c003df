"""The products that micromix is compared with, each as a function of one bf16 input and one weight."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Product = Callable[[], object]


def eager(weights: list[Tensor], x: Tensor) -> list[Product]:
    """torch's own bf16 product."""
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def inductor(weights: list[Tensor], x: Tensor) -> list[Product]:
    """Inductor with freezing: the weight is packed for oneDNN when the graph is compiled."""
    products = []
    for weight in weights:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        products.append(_frozen(layer, x))
    return products


def _frozen(layer: torch.nn.Module, x: Tensor) -> Product:
    """The layer compiled by Inductor with freezing, and run once."""
    from torch._inductor import config

    torch.compiler.reset()
    with config.patch(freezing=True), torch.inference_mode():
        compiled = torch.compile(layer.eval())
        compiled(x)
    return lambda: compiled(x)


def torchao_int8(weights: list[Tensor], x: Tensor) -> list[Product]:
    """torchao's int8 dynamic activations, int8 weights, compiled as torchao advises."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    products = []
    for weight in weights:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        products.append(_frozen(layer, x))
    return products


class _GgmlParameters(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


GGML_F32, GGML_Q4_0 = 0, 2


def ggml_q4_0(weights: list[Tensor], x: Tensor) -> list[Product]:
    """The mul_mat of llama.cpp's CPU library on Q4_0 weights (4.5 bits), in its common layout.

    llama.cpp itself re-packs Q4_0 weights for some CPUs when it loads a model; that is not in here.
    """
    library = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    base = ctypes.CDLL(str(library / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(library / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    for name in ("init", "new_tensor_2d", "mul_mat", "new_graph", "get_data"):
        getattr(base, f"ggml_{name}").restype = ctypes.c_void_p
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    cpu.ggml_cpu_init()

    products = []
    values = x.float().contiguous()
    for weight in weights:
        n, k = weight.shape
        bytes_needed = n * k * 3 + len(values) * (n + 2 * k) * 8 + (64 << 20)
        context = ctypes.c_void_p(base.ggml_init(_GgmlParameters(bytes_needed, None, False)))

        def tensor(kind: int, width: int, height: int, context=context) -> ctypes.c_void_p:
            sizes = ctypes.c_int64(width), ctypes.c_int64(height)
            return ctypes.c_void_p(base.ggml_new_tensor_2d(context, kind, *sizes))

        packed, rows = tensor(GGML_Q4_0, k, n), tensor(GGML_F32, k, len(values))
        source = weight.float().contiguous()
        base.ggml_quantize_chunk(
            *(GGML_Q4_0, ctypes.c_void_p(source.data_ptr())),
            ctypes.c_void_p(base.ggml_get_data(packed)),
            *(ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k), None),
        )
        ctypes.memmove(base.ggml_get_data(rows), values.data_ptr(), values.numel() * 4)
        graph = ctypes.c_void_p(base.ggml_new_graph(context))
        base.ggml_build_forward_expand(
            graph, ctypes.c_void_p(base.ggml_mul_mat(context, packed, rows))
        )
        threads = torch.get_num_threads()
        products.append(
            lambda context=context, graph=graph, threads=threads: cpu.ggml_graph_compute_with_ctx(
                context, graph, threads
            )
        )
    return products


def available(names: list[str]) -> dict[str, Callable[[list[Tensor], Tensor], list[Product]]]:
    """The peers of these names whose packages are installed."""
    needs = {"torchao int8": "torchao", "ggml q4_0": "llama_cpp"}
    peers = {
        "eager bf16": eager,
        "inductor bf16": inductor,
        "torchao int8": torchao_int8,
        "ggml q4_0": ggml_q4_0,
    }
    return {
        name: peers[name]
        for name in names
        if name not in needs or importlib.util.find_spec(needs[name])
    }
