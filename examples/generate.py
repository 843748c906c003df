"""Text from a compiled model: SmolLM2 by default, or any local Hugging Face directory.

Run: python examples/generate.py --prompt "What is a fixed point?"
With a plan of `micromix calibrate`: --plan smollm2.micromix.safetensors; without one every layer is MXFP8.
"""

import argparse

import micromix_compile as micromix
from micromix_compile.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plan")
    parser.add_argument("--prompt", default="What is a compiler?")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    if arguments.plan:
        micromix.load_plan(arguments.plan).attach(model)

    # Not torch.compile(model): its generate() would run the model uncompiled. dynamic: no new graph for each length.
    model.compile(backend="micromix", dynamic=True)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)

    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(
        *str(micromix.explain(model)).splitlines()[-3:], sep="\n"
    )  # the totals, without a row for each layer


if __name__ == "__main__":
    main()
