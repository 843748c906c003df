"""Inductor's caches with the passes in: a second process compiles nothing, and counts what was counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from micromix_compile import Recipe, explain
from micromix_compile.errors import StrictError
from micromix_compile.passes import manager

SCRIPT = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from torch._dynamo.utils import counters
from micromix_compile import Recipe, explain
from micromix_compile.passes import manager


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


sources = manager._sources
torch.manual_seed(0)
model, x = Block().eval(), torch.randn(4, 64)
for change in sys.argv[1:]:
    torch.compiler.reset()
    counters.clear()
    manager._sources = (lambda: "other") if change == "other pass" else sources
    options = {"recipe": Recipe(format="mxfp6" if change == "other plan" else "mxfp8"), "strict": True}
    began = time.perf_counter()
    with torch.no_grad():
        compiled = torch.compile(model, backend="micromix", options=options)
        y = compiled(x)
    print(json.dumps({
        "seconds": time.perf_counter() - began,
        "fx": counters["inductor"]["fxgraph_cache_hit"],
        "aot": counters["aot_autograd"]["autograd_cache_hit"],
        "passes": explain(compiled).passes,
        "result": y.tolist(),
    }))
"""


def in_a_process(cache: Path, *changes: str) -> list[dict]:
    """What each compilation says, one for each change, in one new process."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    # A header compiled ahead is worth its time for many kernels only.
    environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    environment.pop("MICROMIX_DUMP", None)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *changes],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()[-len(changes) :]]


def test_a_second_process_hits_and_a_change_misses(tmp_path):
    (first,) = in_a_process(tmp_path, "same")
    second, *changed, third = in_a_process(tmp_path, "same", "other pass", "other plan", "same")
    assert (first["fx"], first["aot"]) == (0, 0)
    for hit in (second, third):
        assert (hit["fx"], hit["aot"]) == (1, 1)
        assert hit["result"] == first["result"]
        assert hit["passes"] == first["passes"]
    assert first["passes"]["rms_norm"] == 1 and first["passes"]["relu"] == 1
    print(f"first process {first['seconds']:.1f} s, second {second['seconds']:.1f} s")
    assert [(miss["fx"], miss["aot"]) for miss in changed] == [(0, 0), (0, 0)]


def test_the_key_holds_the_passes_the_kernels_and_no_cache_is_used_while_dumping(monkeypatch):
    monkeypatch.delenv("MICROMIX_DUMP", raising=False)
    here = manager.uuid()
    monkeypatch.setattr(manager.ops, "build_id", lambda: "another build")
    assert manager.uuid() != here
    monkeypatch.setenv("MICROMIX_DUMP", "somewhere")
    assert manager.uuid() is None


class OddNorm(torch.nn.Module):
    """An RMSNorm with x * x for its square: a form that no pattern has."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 32)

    def forward(self, x):
        return self.up(x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))


def test_strict_refuses_a_norm_that_no_pattern_knows():
    model, x = OddNorm().eval(), torch.randn(4, 64)
    options = {"recipe": Recipe(format="mxfp8")}
    with torch.no_grad():
        compiled = torch.compile(model, backend="micromix", options=options)
        compiled(x)
        assert explain(compiled).layers["up"].fused_with == ""
        torch.compiler.reset()
        strict = torch.compile(model, backend="micromix", options={**options, "strict": True})
        with pytest.raises(StrictError, match="up: a norm comes before"):
            strict(x)
