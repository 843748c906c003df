"""Inductor's C++ wrapper around the operators (`options={"cpp_wrapper": True}`)."""

from __future__ import annotations

import torch
from tiny_llama import tiny_llama
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from micromix_compile import Recipe
from micromix_compile.evaluate import Decoder

OPERATORS = ("quantize", "linear", "linears", "rms_norm_quantize", "pointwise_quantize")


def test_no_operator_is_called_through_python_and_the_tokens_stay():
    model = tiny_llama(layers=1)

    def decode(**settings) -> list[int]:
        torch.compiler.reset()
        options = {"recipe": Recipe(format="mxfp8"), **settings}
        step = torch.compile(model, backend="micromix", options=options)
        return Decoder(model, step, 32).generate([3, 1, 4], 12)

    expected = decode()
    with config.patch(force_disable_caches=True):  # code from a cache is not shown
        tokens, sources = run_and_get_code(decode, cpp_wrapper=True)
    code = "\n".join(sources)
    assert tokens == expected
    assert all(f'aoti_torch_call_dispatcher("micromix::{name}"' in code for name in OPERATORS)
    assert "custom_op_wrapper" not in code and "PyObject_Call" not in code
