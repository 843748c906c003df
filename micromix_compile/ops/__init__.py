"""The micromix:: operators. Importing this module registers them; call them as torch.ops.micromix.*.

======================  ======================================================================
``quantize``            activations (or a weight) to packed rows of a mixed layout
``place_weight``        packed rows of a weight to the buffer that ``linear`` of its device reads
``linear``              packed activations times a placed weight
``linears``             the same for two or three weights of one layout, in one launch
``weight_only_linear``  float activations, as bfloat16, times a placed weight
``weight_only_linears`` the same for two or three weights of one layout, in one launch
``attention``           softmax(query keyᵀ) value in bfloat16 or float32, between the products on a CPU
``materialize``         a copy of a value that Inductor is not to compute twice
``*_quantize``          a norm, an activation or a sum, quantised as it is computed (fused.py)
======================  ======================================================================

docs/architecture.md has the schemas. On the CPU they are C++ kernels from the extension; where
there is no kernel they are the pure-torch reference, with one warning per device.
"""

from . import _extension, _fakes, _reference, fused
from ._extension import (
    ABI,
    blackwell_kernel,
    build_id,
    build_info,
    cpu_isa,
    cuda_build_info,
    kernel_name,
    loaded,
    set_cpu_isa,
)
from ._fakes import placed_bytes
from ._schemas import EMULATED

_extension.load()
_reference.register()
_fakes.register()
fused.register()

__all__ = [
    "ABI",
    "EMULATED",
    "blackwell_kernel",
    "build_id",
    "build_info",
    "cpu_isa",
    "cuda_build_info",
    "kernel_name",
    "loaded",
    "placed_bytes",
    "set_cpu_isa",
]
