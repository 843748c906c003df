"""Concatenations with an empty tensor keep eager PyTorch's strides; all others are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from micromix_compile.passes import contiguous_cats


class Grown(nn.Module):
    """A linear layer's output, transposed and appended to what the caller has; both leave the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x, kept):
        heads = self.linear(x).view(2, -1, 4, 8).transpose(1, 2)
        return torch.cat([kept, heads], dim=-2), torch.cat([heads, heads], dim=-1)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_strides_are_those_of_eager_pytorch(dynamic):
    model, x, empty = Grown(), torch.randn(2, 5, 32), torch.empty(0)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="micromix", dynamic=dynamic)
    with torch.no_grad(), pytest.warns(UserWarning):
        eager, found = model(x, empty), compiled(x, empty)
    assert [y.stride() for y in found] == [y.stride() for y in eager]
    assert eager[0].is_contiguous()


@pytest.mark.parametrize("kept, count", [(torch.empty(0), 1), (torch.randn(2, 4, 3, 8), 0)])
def test_only_concatenations_with_an_empty_vector_are_rewritten(kept, count):
    counts = []

    def backend(gm, _):
        counts.append(contiguous_cats.contiguous_cats(gm.graph))
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    torch.compiler.reset()
    model, x = Grown(), torch.randn(2, 5, 32)
    with torch.no_grad():
        found = torch.compile(model, backend=backend)(x, kept)
        assert all(torch.equal(y, z) for y, z in zip(found, model(x, kept)))
    assert counts == [count]


def test_a_size_that_depends_on_data_stays_open():
    class Found(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x, y):
            return self.linear(x), torch.cat([y.nonzero().flatten(), torch.zeros(2).long()])

    model, x = Found(), torch.randn(4, 32)
    options = {"inductor": False}
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, backend="micromix", fullgraph=True, options=options)
        for y in (torch.tensor([0, 1, 1, 1]), torch.eye(4)[0], torch.zeros(4)):
            assert torch.equal(compiled(x, y)[1], model(x, y)[1])
