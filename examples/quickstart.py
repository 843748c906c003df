"""The whole path on a model small enough to be made on the spot: calibrate, plan, compile, look.

Run: python examples/quickstart.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import micromix_compile as micromix


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    batches = [{"input_ids": torch.randint(0, 1000, (2, 64))} for _ in range(8)]

    # What the inputs of the linear layers look like, and from that a format for every channel.
    calibration = micromix.calibrate(model).run(batches)
    plan = calibration.plan(micromix.Recipe())
    plan.attach(model)

    compiled = torch.compile(model, backend="micromix")
    with torch.no_grad():
        expected = model(**batches[0]).logits.float()
        logits = compiled(**batches[0]).logits.float()
    error = (logits - expected).norm() / expected.norm()

    print(micromix.explain(compiled))
    print(f"relative difference of the logits to bf16: {error:.3f}")


if __name__ == "__main__":
    main()
