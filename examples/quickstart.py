"""The whole path on a model small enough to be made on the spot: calibrate, plan, compile, look.

Run: python examples/quickstart.py
"""

import torch
from torch import nn

import micromix_compile as micromix


class Block(nn.Module):
    """The feed-forward half of a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        with torch.no_grad():  # large values in the same few channels, as language models have
            self.norm.weight[torch.randperm(width)[: width // 16]] *= 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(256), Block(256), nn.RMSNorm(256), nn.Linear(256, 512))
    model.bfloat16().eval()
    batches = [torch.randn(2, 64, 256, dtype=torch.bfloat16) for _ in range(8)]

    # What the inputs of the linear layers look like, and from that a format for every channel.
    calibration = micromix.calibrate(model).run(batches)
    plan = calibration.plan(micromix.Recipe())
    plan.attach(model)

    compiled = torch.compile(model, backend="micromix")
    print("compiling, which may take a minute the first time", flush=True)
    with torch.no_grad():
        expected = model(batches[0]).float()
        output = compiled(batches[0]).float()
    error = (output - expected).norm() / expected.norm()

    print(micromix.explain(compiled))
    print(f"relative difference of the output to bf16: {error:.3f}")


if __name__ == "__main__":
    main()
