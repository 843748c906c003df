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

if sys.argv[1] == "other pass":
    manager._sources = lambda: "other"
recipe = Recipe(format="mxfp6" if sys.argv[1] == "other plan" else "mxfp8")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


torch.manual_seed(0)
model, x = Block().eval(), torch.randn(4, 64)
began = time.perf_counter()
with torch.no_grad():
    compiled = torch.compile(model, backend="micromix", options={"recipe": recipe, "strict": True})
    y = compiled(x)
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "fx": counters["inductor"]["fxgraph_cache_hit"],
    "aot": counters["aot_autograd"]["autograd_cache_hit"],
    "passes": explain(compiled).passes,
    "result": y.tolist(),
}))
"""


def in_a_process(cache: Path, variant: str) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    environment.pop("MICROMIX_DUMP", None)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, variant],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_second_process_hits_and_a_change_misses(tmp_path):
    first, second = (in_a_process(tmp_path, "same") for _ in range(2))
    assert (first["fx"], first["aot"]) == (0, 0)
    assert (second["fx"], second["aot"]) == (1, 1)
    assert second["result"] == first["result"]
    assert second["passes"] == first["passes"]
    assert first["passes"]["rms_norm"] == 1 and first["passes"]["relu"] == 1
    print(f"first process {first['seconds']:.1f} s, second {second['seconds']:.1f} s")
    for change in ("other pass", "other plan"):
        assert in_a_process(tmp_path, change)["fx"] == 0, change


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
