"""The linear kernel on the host: csrc/cutlass/simulator, compiled by g++ and called by ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_uint, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parents[2] / "csrc"
TILES = {16: 0, 32: 1, 64: 2, 128: 3}  # rows -> TileId
DTYPES = [torch.bfloat16, torch.float16, torch.float32]  # by Dtype
GUARD = 64  # elements behind a result that must stay as they are


def compile_simulator(sources: Path, library: Path, few: bool = False) -> None:
    """Compiles csrc/ at ``sources``. Raises CalledProcessError with g++'s message.

    ``few``: soon compiled, and only with one of FORMATS for each of TILES, in their order.
    """
    source = sources / "cutlass" / "simulator" / "simulator.cpp"
    flags = ["-std=c++20", "-shared", "-fPIC", "-DMICROMIX_SIMULATOR", "-w"]
    flags += ["-O0", "-DMICROMIX_SIMULATOR_FEW"] if few else ["-O1"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)


class Simulator:
    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.placed_bytes.restype = c_int64
        self._library.placed_bytes.argtypes = [*[c_int64] * 4, c_int]
        self._library.place.argtypes = [*[c_int64] * 4, c_int, *[c_void_p] * 3]
        self._library.place.restype = None
        self._library.tile_for.argtypes = [c_int64]
        self._library.splits_for.argtypes = [c_int64, c_int, c_int]
        self._library.linear.restype = c_char_p
        self._library.linear.argtypes = [
            *[c_int, c_int, c_int, c_uint],
            *[*[c_int64] * 4, c_int],
            *[c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int],
        ]

    def tile_for(self, m: int) -> int:
        return self._library.tile_for(m)

    def splits_for(self, blocks: int, stages: int, multiprocessors: int) -> int:
        return self._library.splits_for(blocks, stages, multiprocessors)

    def place(self, data: Tensor, scales: Tensor, arguments: tuple[int, ...]) -> Tensor:
        n = len(data)
        placed = torch.zeros(self._library.placed_bytes(n, *arguments), dtype=torch.uint8)
        pointers = (t.contiguous().data_ptr() for t in (data, scales, placed))
        self._library.place(n, *arguments, *pointers)
        return placed

    def linear(self, product, tile, splits, late, dtype, bias_dtype=torch.float32, seed=0):
        """The results of a product, on a tile of ``tile`` rows with K in ``splits`` ranges.

        ``late``: asynchronous copies land when they are waited for, not when they are issued.
        Raises RuntimeError for what the simulator refuses: a bad address, a write beyond a result.
        """
        count, m = len(product.n), product.m
        placed = [self.place(*weight, product.arguments) for weight in product.weights]
        biases = [b if b is None else b.to(bias_dtype) for b in product.biases]
        outs = [torch.full((m * n + GUARD,), 7.0, dtype=dtype) for n in product.n]
        pointers = c_void_p * count
        message = self._library.linear(
            *(TILES[tile], splits, late, seed),
            *(m, *product.arguments),
            *(product.data.data_ptr(), product.scales.data_ptr()),
            *(count, (c_int64 * count)(*product.n)),
            pointers(*(p.data_ptr() for p in placed)),
            pointers(*(b if b is None else b.data_ptr() for b in biases)),
            DTYPES.index(bias_dtype),
            pointers(*(out.data_ptr() for out in outs)),
            DTYPES.index(dtype),
        )
        if message is not None:
            raise RuntimeError(message.decode())
        if any((out[-GUARD:] != 7).any() for out in outs):
            raise RuntimeError("write beyond a result")
        return [out[:-GUARD].view(m, n) for out, n in zip(outs, product.n, strict=True)]
