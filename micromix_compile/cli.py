"""The command line: `micromix calibrate | plan | quantize | export | generate | eval | sweep | report | demo | env`.

Exit codes: 0 done, 1 the task failed (one line on stderr says why and what to do), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from micromix_compile.errors import MicroMixError, MicroMixWarning

_MODEL = (
    "directory of a causal language model of transformers, a name that `hf download NAME` has put in the cache "
    "(nothing is downloaded), or smollm2"
)
_EXIT_CODES = "exit codes: 0 done, 1 failed (one line on stderr says what to do), 2 wrong usage, 130 interrupted"
_WRITES = {
    "calibrate": ("output", "statistics"), "plan": ("output",), "eval": ("output",), "report": ("output",),
    "quantize": ("output",), "export": ("output",),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Wrong usage raises SystemExit(2), as argparse does."""
    arguments = _parser().parse_args(argv)
    # transformers imports torchao where it is installed, which then tells of every file of its own that this torch cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _check_outputs(arguments)
            if arguments.run is not _env:  # which is to tell what is wrong
                _check_device(getattr(arguments, "device", "cpu"))
            if code := arguments.run(arguments):
                return code
        except MicroMixError as error:
            print(f"micromix: error: {_one_line(error)}", file=sys.stderr)
            return 1
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"micromix: error: {where}{error.strerror or error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("micromix: interrupted", file=sys.stderr)
            return 130
    return 0


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, MicroMixWarning):
        text = f"micromix: warning: {_one_line(message)}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    sys.stderr.write(text)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Before the long work: no result goes where an input lies, or where no file can be. Raises OutputError."""
    from micromix_compile.errors import OutputError
    from micromix_compile.files import check_output

    paths = [
        (name, Path(path).resolve())
        for name, value in vars(arguments).items()
        if name in ("model", "output", "statistics", "plan", "sequential", "text")
        for path in (value if isinstance(value, list) else [value])
        if path is not None
    ]
    for name in _WRITES.get(arguments.command, ()):
        path = getattr(arguments, name)
        if path is None:
            continue
        others = (
            p for n, p in paths if n != name and (n in _WRITES[arguments.command] or p.exists())
        )
        if path.resolve() in others:
            reason = "another argument of this command is the same file"
            raise OutputError(path=path, reason=reason, mend="Give another path")
        if arguments.command not in ("quantize", "export"):  # which look for themselves
            check_output(path)


def _check_device(device: str) -> None:
    """Before the long work. Raises OptionError."""
    from micromix_compile.errors import OptionError

    if os.environ.get("MICROMIX_CPU_ISA"):
        from micromix_compile.ops import kernel_name

        try:
            kernel_name("cpu")
        except RuntimeError as error:
            reason = f"does not work: {_one_line(error).rstrip('.')}"
            valid = "an instruction set of this CPU, or nothing"
            raise OptionError(option="MICROMIX_CPU_ISA", reason=reason, valid=valid) from None
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"cannot be {device!r} here: {_one_line(error)}"
        raise OptionError(option="--device", reason=reason, valid="cpu, or a GPU's name") from None


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="micromix",
        description="Linear layers in mixed MXFP4 / MXFP6 / MXFP8, through torch.compile.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, *parents) -> argparse.ArgumentParser:
        result = commands.add_parser(
            name, help=summary, description=summary, epilog=_EXIT_CODES, parents=parents
        )
        result.set_defaults(run=run)
        return result

    model, recipe = _model_flags(), _recipe_flags()
    calibrate = command(
        "calibrate", _calibrate, "run a model on text, and make a plan from what was seen",
        model, recipe,
    )  # fmt: skip
    calibrate.add_argument(
        "--gradients",
        action="store_true",
        help="observe the loss's gradients too, for --bits and --time (which imply it)",
    )
    calibrate.add_argument(
        "--sequential", type=Path, metavar="PLAN",
        help="run the layers quantised by this plan, so that each sees what those before it leave",
    )  # fmt: skip
    calibrate.add_argument("--output", type=Path, metavar="FILE", help="write the plan here")
    calibrate.add_argument(
        "--statistics", type=Path, metavar="FILE",
        help="write the statistics here, for `micromix plan`; alone, no plan is made",
    )  # fmt: skip

    plan = command("plan", _plan, "make a plan from saved statistics and a recipe", recipe)
    plan.add_argument(
        "statistics", type=Path, nargs="+", help="from `micromix calibrate`; several are merged"
    )
    plan.add_argument("--output", type=Path, required=True, metavar="FILE", help="write it here")

    quantize = command(
        "quantize", _quantize, "write a model as a quantised checkpoint that transformers loads",
        _text_flags(), recipe,
    )  # fmt: skip
    quantize.add_argument("model", metavar="IN", help=_MODEL)
    quantize.add_argument("output", type=Path, metavar="OUT", help="a directory that is not there")
    quantize.add_argument(
        "--plan", type=Path, metavar="FILE",
        help="a plan instead of a recipe (default: calibrate, and write OUT.plan.safetensors)",
    )  # fmt: skip
    quantize.add_argument(
        "--max-shard-size", default="2GB", metavar="SIZE",
        help="of one file; about one is held in memory (default: %(default)s)",
    )  # fmt: skip
    quantize.add_argument(
        "--offload", action="store_true",
        help="keep the float weights on disk: for a model that is larger than memory",
    )  # fmt: skip

    export = command(
        "export", _export, "compile a model ahead of time, into one .pt2 file that generates",
        _text_flags(), recipe,
    )  # fmt: skip
    export.add_argument("model", metavar="IN", help=_MODEL + "; quantised or not")
    export.add_argument("output", type=Path, metavar="OUT.pt2", help="replaced if it is there")
    export.add_argument("--plan", type=Path, metavar="FILE", help="a plan instead of a recipe")
    export.add_argument(
        "--max-length", type=_positive, metavar="N",
        help="tokens of a prompt and its continuation, at most (default: 2048, or what the model has if less)",
    )  # fmt: skip

    generate = command("generate", _generate, "continue a text with a checkpoint or a package")
    generate.add_argument("model", metavar="DIR|PT2", help="from `micromix quantize` or `export`")
    generate.add_argument("--prompt", required=True, help="the text")
    generate.add_argument("--chat", action="store_true", help="as a message to a chat model")
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest"
    )

    evaluate = command(
        "eval", _eval, "perplexity of a model as it is, and under plans or single formats", model
    )
    evaluate.add_argument(
        "--plan", type=Path, nargs="+", default=[], metavar="FILE", help="plan files to measure"
    )
    evaluate.add_argument(
        "--format", nargs="+", default=[], choices=("mxfp8", "mxfp6", "mxfp4"),
        help="single formats to measure, which need no calibration",
    )  # fmt: skip
    evaluate.add_argument(
        "--activations", choices=("match", "bfloat16"), default="match",
        help="those of --format: bfloat16 measures the formats of weights alone",
    )  # fmt: skip
    evaluate.add_argument(
        "--context", type=_not_negative, default=0, metavar="N",
        help="sliding windows: each overlaps the one before by N tokens, which are not scored again",
    )  # fmt: skip
    evaluate.add_argument(
        "--against", choices=("float", "reference"), default="float",
        help="what plans and formats are compared with: the model as it is (default), or the reference arithmetic "
        "of the same plan in pure torch, which shows what the kernels add, on the whole built-in text",
    )  # fmt: skip
    evaluate.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK",
        help="tasks of lm-evaluation-harness instead of a text: names, or YAML files",
    )  # fmt: skip
    evaluate.add_argument(
        "--output", type=Path, metavar="FILE", help="write the figures here, as JSON"
    )

    sweep = command(
        "sweep", _sweep, "plan a model for several budgets, and draw perplexity against them",
        model, recipe,
    )  # fmt: skip
    sweep.add_argument(
        "--budgets", type=float, nargs="+", metavar="B",
        help="each a plan: element bits (default: 4 4.5 5 6), or with --target fractions of the time of MXFP8 "
        "(default: 0.6 0.7 0.8 0.9)",
    )  # fmt: skip
    sweep.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="from an earlier run, instead of calibrating",
    )
    sweep.add_argument(
        "--output", type=Path, default=Path("sweep"), metavar="DIR",
        help="where sweep.json, sweep.md, sweep.png and the plans go (default: %(default)s)",
    )  # fmt: skip

    report = command(
        "report", _report, "one picture of a plan: bits, formats and outliers by layer"
    )
    report.add_argument("plan", type=Path, help="a plan file")
    report.add_argument(
        "--statistics", type=Path, metavar="FILE", help="those it was made from: draws outliers too"
    )
    report.add_argument("--target", help="say the modelled time on this device too")
    report.add_argument("--rows", type=_positive, default=1, metavar="M", help="of a forward")
    report.add_argument("--output", type=Path, required=True, metavar="PNG", help="write it here")

    demo = command(
        "demo", _demo, "SmolLM2-135M as it is, in MXFP8, MXFP4 and the mix, side by side"
    )
    demo.add_argument("--prompt", help="what the model is asked")
    demo.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        help="of the model (default: bfloat16, and float32 on a CPU without AVX-512)",
    )  # fmt: skip
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR",
        help="where the picture, the figures and the plan go (default: %(default)s)",
    )  # fmt: skip

    env = command("env", _env, "versions, CPU features, devices, and the kernels that are there")
    env.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {value}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _model_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False, parents=[_text_flags()])
    flags.add_argument("--model", required=True, metavar="DIR|NAME|smollm2", help=_MODEL)
    return flags


def _text_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("model and text")
    add = group.add_argument
    add(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"),
        help="of the model (default: %(default)s); float32 is faster on a CPU without AVX-512",
    )  # fmt: skip
    add("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    add("--samples", type=_positive, default=32, help="windows of text, at most (default: 32)")
    add("--seqlen", type=_positive, default=2048, help="tokens of a window (default: 2048)")
    add(
        "--text", nargs="+", default=["builtin"], metavar="FILE|builtin",
        help="UTF-8 text files, or the built-in text (the default), whose first half is for calibrate and "
        "whose second for eval; calibrate takes windows of all of them, eval measures each, and sweep does "
        "the one with first halves and the other with second halves",
    )  # fmt: skip
    return flags


def _recipe_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group(
        "recipe",
        "at most one of thresholds, split, counts, format, bits, time; defaults: micromix.Recipe",
    )
    add = group.add_argument
    add("--thresholds", choices=("published", "paper"), help="MicroMix thresholds")
    add("--split", type=float, nargs=3, metavar=("P4", "P6", "P8"),
        help="fractions of the channels, for every layer")  # fmt: skip
    add("--counts", type=_counts, action="append", metavar="GLOB=K4,K6,K8",
        help="channels per format for matching layers; may be given again")  # fmt: skip
    add("--format", choices=("mxfp8", "mxfp6", "mxfp4"), help="one for all")
    add("--bits", type=float, metavar="B", help="a budget: the average of the element bits")
    add("--time", type=float, metavar="T",
        help="a budget: the modelled time, as a fraction of that in MXFP8")  # fmt: skip
    add("--target", metavar="DEVICE", help="the device of --time (micromix_compile/targets.py)")
    add(
        "--rows",
        type=_positive,
        metavar="M",
        help="rows of a forward, for --time (default: 1, decode)",
    )
    add("--formats", nargs="+", choices=("mxfp4", "mxfp6", "mxfp8"),
        help="what --bits or --time is spent on (default: all three)")  # fmt: skip
    add("--hadamard", type=_hadamard, metavar="4,6|measured",
        help="segments whose blocks are rotated, or, with a budget, what lowers the error")  # fmt: skip
    add("--rounding", choices=("nearest", "gptq"),
        help="of the weights (default: nearest); gptq needs the model, so `micromix plan` refuses it")  # fmt: skip
    add("--lam", type=float, metavar="L", help="scales the thresholds")
    add("--act-sort-metric", dest="sort", choices=("mean", "max", "hessian"),
        help="what channels are sorted by")  # fmt: skip
    add("--format6", choices=("e2m3", "e3m2"), help="the element of MXFP6")
    rule = {"nargs": 3, "choices": ("floor", "ceil", "even"), "metavar": ("R4", "R6", "R8")}
    add("--rules", **rule, help="scale rules: floor, ceil or even, for 4, 6 and 8 bits")
    add("--weight-rules", **rule, help="those of the weights, where they differ")
    add("--weights", choices=("match", "mxfp4"), help="weights as their channels, or all MXFP4")
    add("--activations", choices=("match", "bfloat16"),
        help="as their channels, or not quantised: weights alone are (default: match)")  # fmt: skip
    add("--multiple", type=int, choices=(32, 64, 128), help="counts are multiples of it")
    add("--skip", nargs="+", metavar="GLOB", help="layers to leave alone")
    add("--include-lm-head", action="store_const", const=True, help="the output head too")
    return flags


def _counts(text: str) -> tuple[str, tuple[int, ...]]:
    pattern, equals, numbers = text.rpartition("=")
    try:
        counts = tuple(int(number) for number in numbers.split(","))
    except ValueError:
        counts = ()
    if not equals or len(counts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not GLOB=K4,K6,K8")
    return pattern, counts


def _hadamard(text: str) -> tuple[int, ...] | str:
    if text == "measured":
        return text
    try:
        return tuple(int(width) for width in text.split(",") if width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not 4,6 or measured") from None


def _recipe(arguments: argparse.Namespace, **budget: float):
    """The recipe of the flags; with `budget`, that in place of the flag."""
    from micromix_compile.recipe import Recipe

    flags = {field.name: getattr(arguments, field.name) for field in fields(Recipe)} | budget
    given = {name: value for name, value in flags.items() if value is not None}
    if "counts" in given:
        given["counts"] = dict(given["counts"])
    return Recipe(**given)


def _load(arguments: argparse.Namespace):
    """The model on its device, and its tokenizer."""
    import torch

    from micromix_compile.models import load

    model, tokenizer = load(arguments.model, getattr(torch, arguments.dtype))
    return model.to(arguments.device), tokenizer


def _texts(arguments: argparse.Namespace, half: int | None) -> dict[str, str]:
    """The texts given; a half of the built-in one, and of each file where one command calibrates and measures.

    All of each if half is None.
    """
    from micromix_compile.models import builtin_text, halves, read_text

    texts = {n: builtin_text() if n == "builtin" else read_text(n) for n in arguments.text}
    if half is None:
        return texts
    cut = {"builtin"} if arguments.command != "sweep" else texts.keys()
    return {name: halves(text)[half] if name in cut else text for name, text in texts.items()}


def _calibration_windows(arguments: argparse.Namespace, tokenizer):
    """--samples windows of all texts together, each giving what its length allows of an equal part."""
    import torch

    from micromix_compile.models import token_windows

    windows, texts = [], _texts(arguments, half=0)
    for i, text in enumerate(texts.values()):
        left = arguments.samples - sum(map(len, windows))
        part = -(-left // (len(texts) - i))
        if part:
            windows.append(token_windows(tokenizer, text, arguments.seqlen, part))
    return torch.cat(windows).to(arguments.device)


def _calibrate(arguments: argparse.Namespace) -> None:
    import micromix_compile as micromix

    recipe = _recipe(arguments)  # before the long work: a bad recipe is said at once
    before = micromix.load_plan(arguments.sequential) if arguments.sequential else None
    _texts(arguments, half=0)
    model, tokenizer = _load(arguments)
    _check_time(model, recipe)
    windows = _calibration_windows(arguments, tokenizer)
    gradients = arguments.gradients or (recipe.has_budget and before is None)
    batches = [{"input_ids": window[None]} for window in windows]
    calibration = micromix.calibrate(model, gradients, before).run(batches)
    print(f"calibrated on {len(windows)} windows of {windows.shape[1]} tokens")
    if arguments.statistics:
        calibration.save(arguments.statistics)
        print(f"statistics: {arguments.statistics}")
    if arguments.output or not arguments.statistics:
        name = Path(arguments.model).resolve().name
        _save_plan(
            calibration.plan(recipe), arguments.output or Path(f"{name}.micromix.safetensors")
        )


def _quantize(arguments: argparse.Namespace) -> None:
    import tempfile
    import time

    import torch

    from micromix_compile.checkpoint import bytes_of, check_directory, save_pretrained
    from micromix_compile.models import files_of, load

    check_directory(arguments.output)
    bytes_of(arguments.max_shard_size)
    plan = _given_plan(arguments)
    _recipe(arguments)  # before the long work: a bad recipe is said at once
    _check_plan_file(arguments)
    with tempfile.TemporaryDirectory(prefix="micromix-offload-") as folder:
        start = time.monotonic()
        offload = Path(folder) if arguments.offload else None
        calibrates = plan is None and _calibrates(arguments)
        model, tokenizer = load(
            arguments.model, getattr(torch, arguments.dtype), offload, needs_tokenizer=calibrates
        )
        if not arguments.offload:
            model.to(arguments.device)
        if plan is None:
            plan = _plan_or_recipe(model, tokenizer, arguments)
        save_pretrained(
            model, arguments.output, plan, tokenizer=tokenizer,
            max_shard_size=arguments.max_shard_size, source=files_of(arguments.model),
        )  # fmt: skip
    size = sum(path.stat().st_size for path in arguments.output.glob("*.safetensors"))
    seconds = time.monotonic() - start
    print(f"{arguments.output}: {size / 1e6:,.1f} MB of weights, in {seconds:.0f} s")


def _export(arguments: argparse.Namespace) -> None:
    import time

    import torch

    from micromix_compile.decoder import check_length, export_decoder
    from micromix_compile.export import check_path
    from micromix_compile.models import load

    check_path(arguments.output)
    start = time.monotonic()
    plan = _given_plan(arguments)
    _recipe(arguments)  # before the long work: a bad recipe is said at once
    _check_plan_file(arguments)
    model, tokenizer = load(arguments.model, getattr(torch, arguments.dtype))
    check_length(model, arguments.max_length)
    model.to(arguments.device)
    if plan is None:
        plan = _plan_or_recipe(model, tokenizer, arguments)
    print("compiling prefill and decode, which takes minutes", flush=True)
    export_decoder(
        model, arguments.output, plan=plan, max_length=arguments.max_length, tokenizer=tokenizer
    )
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size / 1e6:,.1f} MB, in {time.monotonic() - start:.0f} s")


def _generate(arguments: argparse.Namespace) -> None:
    import time

    import torch

    from micromix_compile.errors import OptionError
    from micromix_compile.models import load
    from micromix_compile.package import load as load_package

    if arguments.temperature != 0 and not 1e-4 <= arguments.temperature < float("inf"):
        raise OptionError(
            option="--temperature",
            reason=f"is {arguments.temperature}",
            valid="0, or 0.0001 and more",
        )
    package = arguments.model.endswith(".pt2")
    if package:
        model = load_package(arguments.model)
        if not hasattr(model, "tokenizer"):
            reason = f"cannot be {arguments.model}, a package of micromix.export, which generates no text"
            raise OptionError(
                option="MODEL", reason=reason, valid="a package of `micromix export`, or a model"
            )
        tokenizer = model.tokenizer()
    else:
        model, tokenizer = load(arguments.model, "auto")
    prompt = arguments.prompt
    if arguments.chat and not tokenizer.chat_template:
        reason = f"cannot be given: {arguments.model} has no chat template"
        raise OptionError(option="--chat", reason=reason, valid="--prompt alone")
    if arguments.chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(
        prompt, return_tensors="pt", add_special_tokens=not arguments.chat, verbose=False
    ).input_ids
    if not ids.shape[1]:
        raise OptionError(option="--prompt", reason="has no tokens", valid="some text")
    start = time.monotonic()
    if package:
        tokens = model.generate(ids, arguments.max_new_tokens, temperature=arguments.temperature)
    else:
        sampling = {"do_sample": arguments.temperature > 0}
        if sampling["do_sample"]:
            sampling["temperature"] = arguments.temperature
        with torch.inference_mode():
            tokens = model.generate(ids, max_new_tokens=arguments.max_new_tokens, **sampling)
    seconds = time.monotonic() - start
    new = tokens[0, ids.shape[1] :]
    print(tokenizer.decode(new, skip_special_tokens=True))
    print(
        f"{len(new)} tokens in {seconds:.2f} s, {len(new) / seconds:.1f} tokens/s", file=sys.stderr
    )


def _given_plan(arguments: argparse.Namespace):
    """The plan of --plan, or None. Raises OptionError where flags of a recipe are given beside it."""
    from micromix_compile.errors import OptionError
    from micromix_compile.plan import load_plan
    from micromix_compile.recipe import Recipe

    if arguments.plan is None:
        return None
    if _recipe(arguments) != Recipe():
        reason = "cannot be given beside flags of a recipe"
        raise OptionError(option="--plan", reason=reason, valid="a plan file, or a recipe")
    return load_plan(arguments.plan)


def _plan_or_recipe(model, tokenizer, arguments: argparse.Namespace):
    """What the flags of a recipe ask for: a recipe that needs no calibration, or a plan from one.

    None for a model that is quantised already: it stays as it is. Raises OptionError for flags beside it.
    """
    from micromix_compile.errors import OptionError
    from micromix_compile.quantized_linear import QuantizedLinear
    from micromix_compile.recipe import Recipe

    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        if _recipe(arguments) != Recipe():
            reason = (
                f"cannot be quantised by flags of a recipe: {arguments.model} is quantised already"
            )
            raise OptionError(option="IN", reason=reason, valid="no such flags, or the float model")
        return None
    return (
        _calibrated(model, tokenizer, arguments) if _calibrates(arguments) else _recipe(arguments)
    )


def _calibrates(arguments: argparse.Namespace) -> bool:
    return _recipe(arguments).method != "format"


def _plan_file(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Where the plan that a command makes is kept, and the note of what it was made from."""
    path = arguments.output.with_name(arguments.output.name + ".plan.safetensors")
    return path, path.with_suffix(".json")


def _check_plan_file(arguments: argparse.Namespace) -> None:
    """Before the long work: there are texts for the plan that a command makes, and a place, where no other one lies.

    Raises TextError and OutputError.
    """
    from micromix_compile.errors import OutputError
    from micromix_compile.files import check_output

    if arguments.plan is not None or not _calibrates(arguments) or _is_quantised(arguments.model):
        return
    _texts(arguments, half=0)
    path, note = _plan_file(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    there = [file for file in (path, note) if file.exists()]
    if there and not _is_note(note):
        reason = "it is there, and this command did not make it"
        mend = "Move it away, or give the plan to use with --plan"
        raise OutputError(path=there[0], reason=reason, mend=mend)


def _is_quantised(model: str) -> bool:
    """Whether a model's files say so; it has its plan then. What is wrong with them is said when it is loaded."""
    from micromix_compile.models import files_of

    try:
        folder = files_of(model)
        config = json.loads(Path(folder, "config.json").read_text()) if folder else {}
    except (OSError, ValueError, MicroMixError):
        return False
    return "quantization_config" in config


def _is_note(path: Path) -> bool:
    """Whether a file is one that `_made_from` tells of."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, list) and len(content) > 4


def _calibrated(model, tokenizer, arguments: argparse.Namespace):
    """The plan of a model, from OUT.plan.safetensors where an earlier run was stopped after calibrating."""
    import micromix_compile as micromix
    from micromix_compile.files import write_text

    path, note = _plan_file(arguments)
    recipe = _recipe(arguments)
    made_from = _made_from(arguments)
    if path.exists() and note.exists() and note.read_text(encoding="utf-8") == made_from:
        plan = micromix.load_plan(path)
        if plan.recipe == recipe.to_dict():
            print(f"plan: {path}, from an earlier run; remove it to calibrate again")
            return plan
    _check_time(model, recipe)
    windows = _calibration_windows(arguments, tokenizer)
    batches = [{"input_ids": window[None]} for window in windows]
    plan = micromix.calibrate(model, recipe.has_budget).run(batches).plan(recipe)
    _save_plan(plan, path)
    write_text(note, made_from)
    return plan


def _made_from(arguments: argparse.Namespace) -> str:
    """What a plan depends on beside the recipe: the model's files and the flags of calibration."""
    from micromix_compile.checkpoint import files_fingerprint
    from micromix_compile.models import files_of
    from micromix_compile.ops import build_id

    folder = files_of(arguments.model)
    files = files_fingerprint(folder) if folder else arguments.model
    texts = json.dumps(_texts(arguments, half=0)).encode()
    flags = [arguments.samples, arguments.seqlen, arguments.dtype, build_id()]
    return json.dumps([files, hashlib.sha256(texts).hexdigest(), *flags])


def _plan(arguments: argparse.Namespace) -> None:
    from micromix_compile.allocation import allocate
    from micromix_compile.statistics import load_statistics

    first, *others = map(load_statistics, arguments.statistics)
    for other in others:
        first.merge(other)
    _save_plan(allocate(first, _recipe(arguments)), arguments.output)


def _save_plan(plan, path: Path) -> None:
    plan.save(path)
    print(f"plan: {path}, {len(plan)} layers, {_bits(plan)}")


def _bits(plan) -> str:
    from micromix_compile.targets import modelled_time

    if not len(plan):
        return "nothing planned"
    scales = plan.weight_bits - plan.element_bits
    text = (
        f"{plan.element_bits:.2f} + {scales:.2f} bits per weight (elements + scales and padding), "
        f"{plan.activation_element_bits:.2f} bits per activation, scales not counted"
    )
    if target := plan.recipe.get("target"):
        text += f"; {modelled_time(plan, target, plan.recipe['rows'])}"
    return text


def _eval(arguments: argparse.Namespace) -> None:
    from micromix_compile.files import write_text
    from micromix_compile.models import token_windows
    from micromix_compile.plan import load_plan
    from micromix_compile.recipe import Recipe

    if arguments.against == "reference":
        _check_against_reference(arguments)
    variants = [(str(path), {"plan": load_plan(path)}) for path in arguments.plan]
    half = 1 if arguments.against == "float" else None
    texts = {} if arguments.tasks else _texts(arguments, half)  # before the long work
    for name in arguments.format:
        recipe = Recipe(format=name, activations=arguments.activations)
        label = name if recipe.activations == "match" else f"{name} weights"
        variants.append((label, {"recipe": recipe}))
    model, tokenizer = _load(arguments)
    if arguments.tasks:
        from micromix_compile.tasks import evaluate_tasks

        results = []
        for row in evaluate_tasks(model, tokenizer, arguments.tasks, variants, arguments.dtype):
            results.append(row)
            figures = {k: v for k, v in row.items() if k not in ("task", "variant")}
            shown = ", ".join(f"{key.split(',')[0]} {value:.4f}" for key, value in figures.items())
            print(f"{row['task']}, {row['variant']}: {shown}")
    else:
        results = []
        print(
            "Plans and formats run the lowered graph with the operators of a compiled model, without Inductor."
        )
        for name, text in texts.items():
            windows = token_windows(
                tokenizer, text, arguments.seqlen, arguments.samples, arguments.context
            )
            windows = windows.to(arguments.device)
            results += _eval_text(model, name, windows, variants, arguments)
    if arguments.output:
        write_text(arguments.output, json.dumps(results, indent=1))
        print(f"figures: {arguments.output}")


def _check_against_reference(arguments: argparse.Namespace) -> None:
    from micromix_compile.errors import OptionError

    if arguments.tasks or not (arguments.plan or arguments.format):
        raise OptionError(
            option="--against reference",
            reason="compares plans and formats on a text",
            valid="beside --plan or --format, without --tasks",
        )


def _eval_text(model, text: str, windows, variants, arguments) -> list[dict]:
    """Prints and returns the figures of each variant on one text."""
    scored = windows.shape[1] - max(1, arguments.context)
    print(f"{text}: {len(windows)} windows of {windows.shape[1]} tokens, {scored} scored")
    if len(windows) < 2:
        print("one window: no standard errors; ask for more --samples or a smaller --seqlen")
    rows = []
    if arguments.against == "float":
        rows.append(_float_row(model, text, windows, arguments))
    else:
        print("compared with the reference arithmetic of each plan (standard errors, by window)")
    for name, options in variants:
        base, digits = model, 2
        if arguments.against == "reference":
            base, digits = _reference(model, options), 3
        row = {"text": text, "variant": name, "against": arguments.against} | _measure(
            model, windows, options, arguments.context, name, base
        )
        rows.append(row)
        print(
            f"{name}: {row['perplexity']:.3f}, {row['increase']:+.{digits}%} ± {row['increase_error']:.{digits}%}, "
            f"KL {row['kl']:.4f} ± {row['kl_error']:.4f} nats, "
            f"same top token {row['top1']:.2%} ± {row['top1_error']:.2%}"
        )
    return rows


def _float_row(model, text: str, windows, arguments) -> dict:
    from micromix_compile.evaluate import perplexity

    found = perplexity(model, windows, arguments.context, label=arguments.dtype)
    errors = "standard errors, by window"
    print(f"{arguments.dtype}: {found.value:.3f} ± {found.standard_error:.3f} ({errors})")
    return {"text": text, "variant": arguments.dtype, "perplexity": found.value}


def _reference(model, options: dict):
    """The model in the reference arithmetic of a variant."""
    from micromix_compile.allocation import uniform_plan
    from micromix_compile.quantized_linear import linear_shapes
    from micromix_compile.reference import reference_model

    plan = options.get("plan") or uniform_plan(linear_shapes(model), options["recipe"])
    return reference_model(model, plan)


def _measure(
    model, windows, options: dict, context: int = 0, label: str | None = None, base=None
) -> dict:
    """The figures of one variant beside the model itself, or beside `base`."""
    from micromix_compile.evaluate import compare, lowered

    with lowered(model, options) as variant:
        found = compare(model if base is None else base, variant, windows, context, label)
    row = {"perplexity": found.model.value}
    for name, (value, error) in {
        "increase": found.increase, "kl": found.divergence, "top1": found.agreement,
    }.items():  # fmt: skip
        row |= {name: value, f"{name}_error": error}
    return row


def _sweep(arguments: argparse.Namespace) -> None:
    import micromix_compile as micromix
    from micromix_compile.models import token_windows
    from micromix_compile.sweep import write_sweep

    timed = arguments.target is not None
    method, unit = ("time", "of the time of MXFP8") if timed else ("bits", "bits")
    if (given := getattr(arguments, method)) is not None:
        from micromix_compile.errors import RecipeError

        expected = "left out: --budgets names those that are swept"
        raise RecipeError(option=method, value=given, expected=expected)
    budgets = arguments.budgets or ([0.6, 0.7, 0.8, 0.9] if timed else [4.0, 4.5, 5.0, 6.0])
    recipes = [_recipe(arguments, **{method: budget}) for budget in budgets]
    model, tokenizer = _load(arguments)
    _check_time(model, *recipes)
    windows = _calibration_windows(arguments, tokenizer)
    batches = [{"input_ids": window[None]} for window in windows]
    calibration = micromix.calibrate(model, gradients=True)
    if arguments.statistics:
        calibration.statistics = micromix.load_statistics(arguments.statistics)
        calibration.batches = batches
    else:
        calibration.run(batches)
    texts = {
        name: token_windows(tokenizer, text, arguments.seqlen, arguments.samples).to(windows.device)
        for name, text in _texts(arguments, half=1).items()
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for budget, own in zip(budgets, recipes, strict=True):
        plan = calibration.plan(own)
        plan.save(arguments.output / f"{method}-{budget:g}.safetensors")
        row = {"budget": budget, "bits": plan.element_bits, "with_scales": plan.weight_bits}
        row["activation_bits"] = plan.activation_element_bits
        if timed:
            row["time"] = micromix.modelled_time(plan, own.target, own.rows).fraction
            row |= {"target": own.target, "rows": own.rows}
        row["texts"] = {
            name: _measure(model, own_windows, {"plan": plan}, label=f"{budget:g} {unit}, {name}")
            for name, own_windows in texts.items()
        }
        rows.append(row)
        figures = ", ".join(f"{n} {f['increase']:+.2%}" for n, f in row["texts"].items())
        print(f"{budget:g} {unit} ({_bits(plan)}): {figures}")
        write_sweep(rows, arguments.output)  # now: the next row may take an hour
    print(f"table and picture: {arguments.output}")


def _check_time(model, *recipes) -> None:
    """Raises RecipeError before the long work where a budget of time is less than the layers can take."""
    from micromix_compile.quantized_linear import linear_shapes
    from micromix_compile.targets import check_time

    shapes = linear_shapes(model)
    for recipe in recipes:
        if recipe.time is not None:
            check_time({n: s for n, s in shapes.items() if not recipe.skips(n)}, recipe)


def _report(arguments: argparse.Namespace) -> None:
    from micromix_compile.plan import load_plan
    from micromix_compile.report import draw_report
    from micromix_compile.statistics import load_statistics
    from micromix_compile.targets import modelled_time

    statistics = load_statistics(arguments.statistics) if arguments.statistics else None
    plan = load_plan(arguments.plan)
    time = modelled_time(plan, arguments.target, arguments.rows) if arguments.target else None
    draw_report(plan, arguments.output, statistics, time)
    if time:
        print(time)
    print(f"report: {arguments.output}")


def _demo(arguments: argparse.Namespace) -> None:
    import torch

    from micromix_compile.errors import MissingPackageError

    try:
        from micromix_compile import demo
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("micromix_compile"):
            raise
        raise MissingPackageError(
            package=error.name, purpose="the demo", install="'micromix-compile[demo]'"
        ) from error
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    demo.run(prompt=arguments.prompt or demo.PROMPT, output=arguments.output, dtype=dtype)


def _env(arguments: argparse.Namespace) -> int:
    from micromix_compile import env

    return env.show(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
