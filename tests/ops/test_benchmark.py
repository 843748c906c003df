"""benchmarks/linear_cpu.py runs on the smallest shape; its times are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from micromix_compile import ops

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "linear_cpu.py"


@pytest.mark.skipif(not ops.loaded(), reason="the extension was not built")
def test_quick_benchmark_writes_a_table_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "linear"
    command = [sys.executable, str(BENCHMARK), "--quick", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    document = json.loads(output.with_suffix(".json").read_text())
    assert document["kernel"] == ops.kernel_name("cpu")
    measured = {(r["name"], r["rows"]) for r in document["results"] if r["microseconds"] > 0}
    expected = {("micromix 4.5", 1), ("micromix mxfp4", 16), ("eager bf16", 1)}
    expected |= {(f"reading 4.5 at {places}", 1) for places in (1, 2, 4)}
    assert expected <= measured
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "x eager bf16" in result.stdout


def test_two_peers_of_inductor_stay_frozen_and_a_compilation_is_seen(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    import checks
    import peers

    weights = [torch.randn(64, 32).bfloat16() for _ in range(2)]
    x = torch.randn(1, 32).bfloat16()
    expected = torch.cat([torch.nn.functional.linear(x, weight) for weight in weights])
    bf16 = peers.inductor(weights, x)
    fp32 = peers.inductor(weights, x, dtype=torch.float32)
    with torch.inference_mode(), checks.nothing_compiles():
        for product in (*bf16, *fp32):
            product.run()
            checks.check_product("bf16", product.result(), expected.float())
    with pytest.raises(RuntimeError, match="wrong by"):
        checks.check_product("mxfp8", expected.flip(1), expected)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="graphs were compiled"), checks.nothing_compiles():
        bf16[0].run()
