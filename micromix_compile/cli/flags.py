"""The parser of the command line: each command, its flags, and which function runs it."""

from __future__ import annotations

import argparse
from pathlib import Path

from micromix_compile.checkpoint import check_directory
from micromix_compile.cli import calibrate, deploy, measure, show
from micromix_compile.cli.inputs import SEQLEN
from micromix_compile.cli.outputs import check_folder, reads, writes
from micromix_compile.export import check_path

_MODEL = (
    "directory of a causal language model of transformers, a name that `hf download NAME` has put in the cache "
    "(nothing is downloaded), or smollm2"
)
_EXIT_CODES = "exit codes: 0 done, 1 failed (one line on stderr says what to do), 2 wrong usage, 130 interrupted"
_DTYPES = ("bfloat16", "float16", "float32")


def make_parser() -> argparse.ArgumentParser:
    """The parser; its result has the flags and, as `run`, the function of the command."""
    parser = argparse.ArgumentParser(
        prog="micromix",
        description="Linear layers in mixed MXFP4 / MXFP6 / MXFP8, through torch.compile.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, *parents, more: str = "") -> argparse.ArgumentParser:
        result = commands.add_parser(
            name, help=summary, description=summary + more, epilog=_EXIT_CODES, parents=parents
        )
        result.set_defaults(run=run)
        return result

    _add_calibrate(command)
    _add_plan(command)
    _add_quantize(command)
    _add_export(command)
    _add_generate(command)
    _add_eval(command)
    _add_sweep(command)
    _add_report(command)
    _add_demo(command)
    env = command(
        "env", show.env, "versions, CPU features, devices, and the kernels that are there"
    )
    env.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_calibrate(command) -> None:
    parser = command(
        "calibrate", calibrate.calibrate, "run a model on text, and make a plan from what was seen",
        _model_flags(), _recipe_flags(),
    )  # fmt: skip
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="observe the loss's gradients too, for --bits and --time (which imply it)",
    )
    reads(
        parser, "--sequential", type=Path, metavar="PLAN",
        help="run the layers quantised by this plan, so that each sees what those before it leave",
    )  # fmt: skip
    writes(
        parser, "--output", default=calibrate.default_output, metavar="FILE",
        help="write the plan here (default: MODEL.micromix.safetensors)",
    )  # fmt: skip
    writes(
        parser, "--statistics", metavar="FILE",
        help="write the statistics here, for `micromix plan`; alone, no plan is made",
    )  # fmt: skip


def _add_plan(command) -> None:
    summary = "make a plan from saved statistics and a recipe"
    parser = command("plan", calibrate.plan, summary, _recipe_flags())
    help = "from `micromix calibrate`; several are merged"
    reads(parser, "statistics", type=Path, nargs="+", help=help)
    writes(parser, "--output", required=True, metavar="FILE", help="write it here")


def _add_quantize(command) -> None:
    parser = command(
        "quantize", deploy.quantize, "write a model as a quantised checkpoint that transformers loads",
        _text_flags(), _recipe_flags(),
    )  # fmt: skip
    reads(parser, "model", metavar="IN", help=_MODEL)
    writes(
        parser, "output", check=check_directory, metavar="OUT", help="a directory that is not there"
    )
    reads(
        parser, "--plan", type=Path, metavar="FILE",
        help="a plan instead of a recipe (default: calibrate, and write OUT.plan.safetensors)",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", default="2GB", metavar="SIZE",
        help="of one file; about one is held in memory (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--offload", action="store_true",
        help="keep the float weights on disk: for a model that is larger than memory",
    )  # fmt: skip


def _add_export(command) -> None:
    parser = command(
        "export", deploy.export, "compile a model ahead of time, into one .pt2 file that generates",
        _text_flags(), _recipe_flags(),
    )  # fmt: skip
    reads(parser, "model", metavar="IN", help=_MODEL + "; quantised or not")
    help = "replaced if it is there"
    writes(parser, "output", check=check_path, metavar="OUT.pt2", help=help)
    reads(
        parser, "--plan", type=Path, metavar="FILE",
        help="a plan instead of a recipe (default: calibrate, and write OUT.pt2.plan.safetensors)",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", type=_from(1), metavar="N",
        help="tokens of a prompt and its continuation, at most (default: 2048, or what the model has if less)",
    )  # fmt: skip


def _add_generate(command) -> None:
    parser = command(
        "generate", deploy.generate, "continue a text with a checkpoint or a package",
        more=". A package runs as it was compiled. A checkpoint runs eagerly, without torch.compile: "
        "the tokens/s that are printed are not those of a compiled model",
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="DIR|PT2",
        help="from `micromix quantize` or `export`; or a float model, as --model of the other commands",
    )  # fmt: skip
    parser.add_argument("--prompt", required=True, help="the text")
    parser.add_argument("--chat", action="store_true", help="as a message to a chat model")
    parser.add_argument(
        "--max-new-tokens", type=_from(1), metavar="N",
        help=f"at most (default: {deploy.NEW_TOKENS}, or what fits a checkpoint or a float model behind the prompt if less)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of a checkpoint (default: its own); a package has its own"
    )
    parser.add_argument(
        "--device", help="where a checkpoint runs (default: cpu); a package has its own"
    )


def _add_eval(command) -> None:
    summary = "perplexity of a model as it is, and under plans or single formats"
    parser = command("eval", measure.evaluate, summary, _model_flags())
    help = "plan files to measure"
    reads(parser, "--plan", type=Path, nargs="+", default=[], metavar="FILE", help=help)
    parser.add_argument(
        "--format", nargs="+", default=[], choices=("mxfp8", "mxfp6", "mxfp4"),
        help="single formats to measure, which need no calibration",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=("match", "bfloat16"), default="match",
        help="those of --format: bfloat16 measures the formats of weights alone",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=_from(0), default=0, metavar="N",
        help="sliding windows: each overlaps the one before by N tokens, which are not scored again",
    )  # fmt: skip
    parser.add_argument(
        "--against", choices=("float", "reference"), default="float",
        help="what plans and formats are compared with: the model as it is (default), or the reference arithmetic "
        "of the same plan in pure torch, which shows what the kernels add, on the whole built-in text",
    )  # fmt: skip
    reads(
        parser, "--tasks", nargs="+", default=[], metavar="TASK",
        help="tasks of lm-evaluation-harness instead of a text: names, or YAML files",
    )  # fmt: skip
    writes(parser, "--output", metavar="FILE", help="write the figures here, as JSON")


def _add_sweep(command) -> None:
    parser = command(
        "sweep", measure.sweep, "plan a model for several budgets, and draw perplexity against them",
        _model_flags(), _recipe_flags(),
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=float, nargs="+", metavar="B",
        help="each a plan: element bits (default: 4 4.5 5 6), or with --target fractions of the time of MXFP8 "
        "(default: 0.6 0.7 0.8 0.9)",
    )  # fmt: skip
    help = "from an earlier run, instead of calibrating"
    reads(parser, "--statistics", type=Path, metavar="FILE", help=help)
    writes(
        parser, "--output", check=check_folder, default=Path("sweep"), metavar="DIR",
        help="where sweep.json, sweep.md, sweep.png and the plans go (default: %(default)s)",
    )  # fmt: skip


def _add_report(command) -> None:
    summary = "one picture of a plan: bits, formats and outliers by layer"
    parser = command("report", show.report, summary)
    reads(parser, "plan", type=Path, help="a plan file")
    help = "those it was made from: draws outliers too"
    reads(parser, "--statistics", type=Path, metavar="FILE", help=help)
    parser.add_argument("--target", help="say the modelled time on this device too")
    parser.add_argument(
        "--rows", type=_from(1), metavar="M", help="of a forward on it (default: 1, decode)"
    )
    writes(parser, "--output", required=True, metavar="PNG", help="write it here")


def _add_demo(command) -> None:
    summary = "SmolLM2-135M as it is, in MXFP8, MXFP4 and the mix, side by side"
    parser = command("demo", show.demo, summary)
    parser.add_argument("--prompt", help="what the model is asked")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        help="of the model (default: bfloat16, and float32 on a CPU without AVX-512)",
    )  # fmt: skip
    writes(
        parser, "--output", check=check_folder, default=Path("demo-output"), metavar="DIR",
        help="where the picture, the figures and the plan go (default: %(default)s)",
    )  # fmt: skip


def _from(least: int):
    """The type of a whole number of at least `least`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return convert


def _model_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False, parents=[_text_flags()])
    reads(flags, "--model", required=True, metavar="DIR|NAME|smollm2", help=_MODEL)
    return flags


def _text_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("model and text")
    add = group.add_argument
    add(
        "--dtype", default="bfloat16", choices=_DTYPES,
        help="of the model (default: %(default)s); float32 is faster on a CPU without AVX-512",
    )  # fmt: skip
    add("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    add("--samples", type=_from(1), default=32, help="windows of text, at most (default: 32)")
    add(
        "--seqlen", type=_from(2), metavar="N",
        help=f"tokens of a window (default: {SEQLEN}, or what the model has if less)",
    )  # fmt: skip
    reads(
        group, "--text", nargs="+", default=["builtin"], metavar="FILE|builtin",
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
    add("--rows", type=_from(1), metavar="M",
        help="rows of a forward, for --time (default: 1, decode)")  # fmt: skip
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
        return tuple(int(width) for width in text.strip("()").split(",") if width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not 4,6 or measured") from None
