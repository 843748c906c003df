"""The command line: what each command does on a tiny model, its exit codes, and its one-line errors."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import VOCABULARY, save_tiny, tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from micromix_compile import Recipe, load_plan, load_statistics, models
from micromix_compile.allocation import allocate
from micromix_compile.cli import deploy, main, measure
from micromix_compile.cli.flags import make_parser
from micromix_compile.decoder import longest_text
from micromix_compile.errors import EvaluationError

COMMANDS = (
    "calibrate", "plan", "quantize", "export", "generate", "eval", "sweep", "report", "demo", "env",
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def statistics(directory):
    path = f"{directory}/statistics.safetensors"
    assert main(["calibrate", *small(directory), "--statistics", path]) == 0
    return path


@pytest.fixture(scope="module")
def gradients(directory):
    """Statistics with the loss's gradients, for budgets."""
    path = f"{directory}/gradients.safetensors"
    assert main(["calibrate", *small(directory), "--gradients", "--statistics", path]) == 0
    return path


def small(directory):
    return ["--model", directory, "--samples", "3", "--seqlen", "64"]


def failure(capsys, *arguments):
    """The one line on stderr of a command that must fail with exit code 1."""
    capsys.readouterr()
    assert main([*arguments]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("micromix: ")]
    assert len(lines) == 1
    assert "Traceback" not in out + err
    return lines[0]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes" in out
    assert all(name in out for name in COMMANDS) or command


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["calibrate"],
        ["calibrate", "--model", "x", "--samples", "0"],
        ["calibrate", "--model", "x", "--seqlen", "1"],
        ["plan", "s", "--output", "p", "--counts", "*=1,2"],
        ["plan", "s", "--output", "p", "--rules", "even", "even", "odd"],
        ["eval", "--model", "x", "--format", "mxfp5"],
        ["generate", "x", "--prompt", "x", "--max-new-tokens", "abc"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_every_field_of_a_recipe_has_a_flag():
    plan = make_parser().parse_args(["plan", "statistics", "--output", "plan"])
    assert {field.name for field in fields(Recipe)} <= vars(plan).keys()


@pytest.mark.parametrize("segments", ["4,6", "(4, 6)"])
def test_segments_as_in_a_shell_and_as_in_python(segments):
    arguments = ["quantize", "--hadamard", segments, "in", "out", "--multiple", "64"]
    parsed = make_parser().parse_args(arguments)
    assert (parsed.hadamard, parsed.model, parsed.output) == ((4, 6), "in", Path("out"))


def test_calibrate_writes_the_plan_of_its_recipe(directory, statistics, tmp_path, capsys):
    path = tmp_path / "plan.safetensors"
    flags = ["--act-sort-metric", "hessian", "--split", "0.5", "0.25", "0.25"]
    assert main(["calibrate", *small(directory), "--output", str(path), *flags]) == 0
    assert "calibrated on 3 windows of 64 tokens" in capsys.readouterr().out
    recipe = Recipe(sort="hessian", split=(0.5, 0.25, 0.25))
    assert load_plan(path) == allocate(load_statistics(statistics), recipe)
    assert len(load_plan(path)) == 2 * 7


def test_calibrate_again_behind_quantised_layers(directory, tmp_path):
    first, second = (str(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    flags = ["--split", "0.5", "0.25", "0.25"]
    assert main(["calibrate", *small(directory), *flags, "--output", first]) == 0
    assert main(["calibrate", *small(directory), *flags, "--sequential", first, "--output", second]) == 0  # fmt: skip
    plans = [load_plan(path) for path in (first, second)]
    assert list(plans[0]) == list(plans[1])
    orders = [[layer.order for layer in plan.values()] for plan in plans]
    assert torch.equal(orders[0][0], orders[1][0])  # nothing lies before the first layer
    assert any(not torch.equal(a, b) for a, b in zip(*orders))


def test_calibrate_on_a_text_file(directory, tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "statistics.safetensors"
    text.write_text("A sentence of some words, again and again. " * 40, encoding="utf-8")
    flags = ["--text", str(text), "--statistics", str(path)]
    assert main(["calibrate", *small(directory), *flags]) == 0
    assert load_statistics(path).tokens == 3 * 64


def test_plan_from_statistics(statistics, tmp_path, capsys):
    path = tmp_path / "plan.safetensors"
    flags = ["--counts", "*.down_proj=32,32,32", "--counts", "*=64,0,0", "--format6", "e3m2"]
    assert main(["plan", statistics, "--output", str(path), *flags]) == 0
    assert "14 layers" in capsys.readouterr().out
    layouts = {name.rsplit(".", 1)[1]: layer.layout for name, layer in load_plan(path).items()}
    assert (layouts["down_proj"].k4, layouts["down_proj"].k6, layouts["down_proj"].k8) == (
        32,
        32,
        32,
    )
    assert layouts["q_proj"].k4 == 64
    assert layouts["q_proj"].format6 == "e3m2"


def test_plan_from_several_runs(statistics, tmp_path):
    path = tmp_path / "plan.safetensors"
    assert main(["plan", statistics, statistics, "--output", str(path)]) == 0
    assert load_plan(path) == allocate(load_statistics(statistics), Recipe())


def test_eval(directory, statistics, tmp_path, capsys):
    path = str(tmp_path / "plan.safetensors")
    assert main(["plan", statistics, "--output", path]) == 0
    flags = ["--plan", path, "--format", "mxfp8", "mxfp4"]
    assert main(["eval", *small(directory), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    names = [line.rpartition(": ")[0] for line in lines]
    assert names == ["bfloat16", path, "mxfp8", "mxfp4"]
    values = [float(line.rpartition(": ")[2].split()[0].rstrip(",")) for line in lines]
    assert len(set(values)) == 4  # four kinds of arithmetic give four perplexities
    assert abs(values[2] / values[0] - 1) < 0.2


def test_one_window_has_no_standard_errors(directory, capsys):
    flags = ["--samples", "1", "--seqlen", "64", "--format", "mxfp8"]
    assert main(["eval", "--model", directory, *flags]) == 0
    out = capsys.readouterr().out
    assert "one window: no standard errors" in out and "mxfp8: " in out
    assert "±" not in out and "nan" not in out


def test_eval_writes_its_figures(directory, tmp_path, capsys):
    text, path = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("A sentence of some words, again and again. " * 40, encoding="utf-8")
    flags = ["--text", "builtin", str(text), "--context", "16", "--output", str(path)]
    assert main(["eval", *small(directory), *flags, "--format", "mxfp8"]) == 0
    assert "3 windows of 64 tokens, 48 scored" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert [(row["text"], row["variant"]) for row in rows] == [
        (name, variant) for name in ("builtin", str(text)) for variant in ("bfloat16", "mxfp8")
    ]
    assert rows[1]["kl"] > 0 and 0 < rows[1]["top1"] <= 1


def test_eval_against_the_reference_arithmetic(directory, tmp_path, capsys):
    """Nothing for MXFP4, whose sums are exact; little for MXFP8."""
    path = tmp_path / "figures.json"
    flags = ["--against", "reference", "--output", str(path)]
    assert main(["eval", *small(directory), *flags, "--format", "mxfp4", "mxfp8"]) == 0
    assert "reference arithmetic" in capsys.readouterr().out
    exact, near = json.loads(path.read_text())
    assert (exact["variant"], exact["against"]) == ("mxfp4", "reference")
    assert exact["increase"] == 0 and exact["top1"] == 1
    assert abs(near["increase"]) < 0.02 and near["kl"] < 0.02
    assert "beside --plan or --format" in failure(capsys, "eval", *small(directory), *flags)


def test_a_budget_rotated_and_rounded(directory, tmp_path, capsys):
    path = tmp_path / "plan.safetensors"
    flags = ["--bits", "5", "--hadamard", "measured", "--rounding", "gptq"]
    assert main(["calibrate", *small(directory), *flags, "--output", str(path)]) == 0
    assert "5.00 + 0.25 bits per weight" in capsys.readouterr().out
    assert len(load_plan(path).rounded) == 14


def test_sweep_and_report(directory, gradients, tmp_path, capsys):
    folder = tmp_path / "sweep"
    flags = ["--budgets", "4", "6", "--hadamard", "4,6", "--statistics", gradients]
    assert main(["sweep", *small(directory), *flags, "--output", str(folder)]) == 0
    rows = json.loads((folder / "sweep.json").read_text())
    assert [row["bits"] for row in rows] == [4, 6]
    assert rows[0]["texts"]["builtin"]["kl"] > rows[1]["texts"]["builtin"]["kl"]
    assert (folder / "sweep.md").read_text().count("\n") == 4
    picture = tmp_path / "report.png"
    plan = str(folder / "bits-6.safetensors")
    assert main(["report", plan, "--statistics", gradients, "--output", str(picture)]) == 0
    for image in (picture, folder / "sweep.png"):
        assert image.read_bytes().startswith(b"\x89PNG")
    assert "report: " in capsys.readouterr().out


def test_a_sweep_that_is_stopped_keeps_its_rows(
    directory, gradients, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "sweep"
    assert "--budgets" in failure(capsys, "sweep", *small(directory), "--bits", "7")
    figures = dict.fromkeys(("perplexity", "increase", "kl", "top1"), 1.0)
    measured = [{**figures, "increase_error": math.nan}]  # of one window

    def compare(*args, **kwargs):
        if not measured:
            raise EvaluationError(reason="that was enough", mend="Stop")
        return measured.pop()

    monkeypatch.setattr(measure, "_compare", compare)
    flags = ["--budgets", "4", "6", "--statistics", gradients, "--output", str(folder)]
    assert "enough" in failure(capsys, "sweep", *small(directory), *flags)
    text = (folder / "sweep.json").read_text()
    assert "NaN" not in text
    assert [row["bits"] for row in json.loads(text)] == [4]
    assert (folder / "sweep.png").exists()


def test_budgets_of_time(directory, gradients, tmp_path, capsys):
    folder = tmp_path / "sweep"
    target = ["--target", "sm_120", "--rows", "4"]
    line = failure(capsys, "calibrate", *small(directory), *target, "--time", "0.3")
    assert "at least 0.5" in line  # before anything is calibrated
    plan = str(tmp_path / "plan.safetensors")
    assert main(["plan", gradients, *target, "--time", "0.7", "--output", plan]) == 0
    assert "modelled for sm_120, 4 rows" in capsys.readouterr().out
    flags = ["--budgets", "0.6", "0.8", "--statistics", gradients, "--output", str(folder)]
    assert main(["sweep", *small(directory), *target, *flags]) == 0
    rows = json.loads((folder / "sweep.json").read_text())
    assert [row["target"] for row in rows] == ["sm_120", "sm_120"]
    for row, time in zip(rows, (0.6, 0.8), strict=True):
        assert time - 0.03 < row["time"] <= time
    assert "modelled time" in (folder / "sweep.md").read_text()
    capsys.readouterr()
    assert main(["report", plan, *target, "--output", str(tmp_path / "report.png")]) == 0
    assert "4 rows" in capsys.readouterr().out
    line = failure(capsys, "report", plan, "--target", "x", "--output", str(tmp_path / "r.png"))
    assert "amx, sm_120" in line


def test_flags_that_would_change_nothing_are_refused(directory, capsys, monkeypatch):
    monkeypatch.setattr("micromix_compile.models.load", no_work)
    line = failure(capsys, "eval", *small(directory), "--activations", "bfloat16")
    assert "--activations bfloat16" in line and "beside --format" in line
    line = failure(capsys, "report", "plan", "--rows", "4", "--output", "none.png")
    assert "--rows" in line and "beside --target" in line


def test_env(capsys):
    assert main(["env"]) == 0
    assert "extension" in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    assert "versions" in json.loads(capsys.readouterr().out)


def test_errors_are_one_line_and_say_the_mend(directory, statistics, tmp_path, capsys):
    output = str(tmp_path / "plan.safetensors")
    assert "hf download" in failure(capsys, "calibrate", "--model", "some/one")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a file of ours")
    line = failure(capsys, "plan", str(foreign), "--output", output)
    assert "micromix calibrate" in line
    line = failure(capsys, "plan", statistics, "--output", output, "--split", "1", "1", "1")
    assert "sum to 1" in line
    line = failure(capsys, "plan", statistics, "--output", str(tmp_path / "none" / "plan"))
    assert "No such file or directory" in line
    flags = ["--samples", "2", "--seqlen", "64"]
    line = failure(capsys, "eval", "--model", directory, *flags, "--plan", statistics)
    assert "cannot be read as a plan" in line
    line = failure(capsys, "calibrate", "--model", directory, "--seqlen", "10000000")
    assert "--seqlen" in line


@pytest.mark.parametrize("model", ["/no/such/dir", "./a/b/c"])
def test_a_directory_that_is_not_there(model, tmp_path, capsys):
    for arguments in (
        ["quantize", model, str(tmp_path / "ck")],
        ["export", model, str(tmp_path / "x.pt2")],
        ["generate", model, "--prompt", "hi"],
        ["eval", *small(model), "--format", "mxfp8"],
    ):
        line = failure(capsys, *arguments)
        assert model in line and "neither a directory" in line


def test_plan_of_another_model(directory, statistics, tmp_path, capsys):
    from micromix_compile.layers import LayerShape
    from micromix_compile.plan import ModelPlan

    plan = allocate(load_statistics(statistics), Recipe(format="mxfp8"))
    wider = {name: LayerShape(2 * n, k, t) for name, (n, k, t) in plan.shapes.items()}
    path = tmp_path / "plan.safetensors"
    ModelPlan(plan, wider, plan.recipe).save(path)
    line = failure(capsys, "eval", *small(directory), "--plan", str(path))
    assert "another model" in line


def test_plans_and_statistics_of_a_model_with_other_layers(
    directory, statistics, gradients, tmp_path, capsys, monkeypatch
):
    small_plan, large_plan, large = (str(tmp_path / name) for name in ("small", "large", "model"))
    tiny_llama(layers=3).save_pretrained(large)
    tiny_tokenizer().save_pretrained(large)
    large_statistics = str(tmp_path / "statistics")
    outputs = ["--output", large_plan, "--statistics", large_statistics]
    assert main(["calibrate", *small(large), "--gradients", *outputs]) == 0
    assert main(["plan", statistics, "--output", small_plan]) == 0
    picture = ["--output", str(tmp_path / "report.png")]
    line = failure(capsys, "report", large_plan, "--statistics", statistics, *picture)
    assert "layers.2" in line and "no such layer" in line
    sweep = ["--budgets", "5", "--output", str(tmp_path / "sweep"), "--statistics"]
    line = failure(capsys, "sweep", *small(directory), *sweep, large_statistics)
    assert "statistics do not belong" in line and "layers.2" in line
    # The other way round there may be such layers, which do not run: they are named.
    assert main(["sweep", *small(large), *sweep, gradients]) == 0
    assert capsys.readouterr().err.count("stay float: model.layers.2") == 1
    assert main(["eval", *small(large), "--plan", small_plan]) == 0
    assert capsys.readouterr().err.count("stay float: model.layers.2") == 1
    monkeypatch.setattr("micromix_compile.evaluate.perplexity", no_work)
    line = failure(capsys, "eval", *small(directory), "--plan", large_plan)
    assert "another model" in line and "layers.2" in line


def test_the_installed_command():
    run = subprocess.run(
        [sys.executable, "-m", "micromix_compile.cli", "plan", "none", "--output", "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("micromix: error: none cannot be read as calibration statistics")


def test_numbers_that_are_none_are_called_so(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "x", "--prompt", "x", "--max-new-tokens", "abc"])
    assert "'abc' is no whole number" in capsys.readouterr().err


def test_no_result_goes_where_an_input_lies(directory, statistics, tmp_path, capsys):
    file = tmp_path / "statistics.safetensors"
    shutil.copy(statistics, file)
    (tmp_path / "link").symlink_to(file)
    plan = tmp_path / "bits-5.safetensors"  # as sweep calls its own
    shutil.copy(statistics, plan)
    (tmp_path / "sweep.md").write_text("Some words.")
    before = file.read_bytes()
    for arguments in (
        ["plan", file, "--output", file],
        ["plan", statistics, file, "--output", tmp_path / "link"],
        ["report", file, "--output", file],
        ["report", "plan", "--statistics", file, "--output", file],
        ["calibrate", *small(directory), "--output", "new", "--statistics", "new"],
        ["calibrate", *small(directory), "--text", file, "--output", file],
        ["eval", *small(directory), "--plan", file, "--output", file],
        ["sweep", *small(directory), "--output", directory],
        ["sweep", *small(directory), "--statistics", plan, "--budgets", 5, "--output", tmp_path],
        ["sweep", *small(directory), "--text", tmp_path / "sweep.md", "--output", tmp_path],
    ):
        assert "is the same file" in failure(capsys, *map(str, arguments))
    assert file.read_bytes() == plan.read_bytes() == before


def test_no_result_goes_over_a_file_of_the_model(
    directory, statistics, tmp_path, capsys, monkeypatch
):
    plan = tmp_path / "plan.safetensors"
    allocate(load_statistics(statistics), Recipe(format="mxfp8")).save(plan)
    monkeypatch.setattr("micromix_compile.models.load", no_work)
    folder = tmp_path / "snapshot"  # as the cache of Hugging Face: links to files elsewhere
    shutil.copytree(directory, tmp_path / "blobs")
    folder.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (folder / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    before = weights.read_bytes(), config.read_bytes()

    def refused(*arguments):
        line = failure(capsys, *map(str, arguments))
        assert "is one of the files of the model" in line and "Give another path" in line

    for model in (folder, tmp_path / "link"):
        refused("calibrate", *small(str(model)), "--output", weights)
        refused("calibrate", *small(str(model)), "--statistics", tmp_path / "blobs" / weights.name)
        refused("eval", *small(str(model)), "--output", config)
    monkeypatch.setattr(models, "files_of", lambda name: folder)  # a name in the cache
    refused("eval", *small("some/one"), "--output", config)
    for own in (statistics, plan):  # what is not read as the model's is replaced
        shutil.copy(own, folder / "own.safetensors")
        with pytest.raises(AssertionError, match="long work has begun"):
            main(["calibrate", *small(str(folder)), "--output", str(folder / "own.safetensors")])
    assert before == (weights.read_bytes(), config.read_bytes())


def no_work(*_, **__):
    raise AssertionError("long work has begun")


def test_what_can_be_checked_is_checked_first(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("micromix_compile.models.load", no_work)
    none, out, file = (str(tmp_path / name) for name in ("none/file", "out", "file"))
    Path(file).touch()
    for arguments, message in (
        (["quantize", directory, out, "--max-shard-size", "banana"], "max_shard_size"),
        (["quantize", directory, out, "--rounding", "gptq", "--offload"], "--offload"),
        (["quantize", directory, out, "--text", none], "Give a readable UTF-8 text"),
        (["export", directory, f"{out}.pt2", "--text", none], "Give a readable UTF-8 text"),
        (["calibrate", *small(directory), "--output", none], "Make that folder first"),
        (["calibrate", *small(directory), "--statistics", str(tmp_path)], "is a directory"),
        (["calibrate", *small(directory), "--sequential", none], "cannot be read as a plan"),
        (["calibrate", *small(directory), "--text", none], "Give a readable UTF-8 text"),
        (["eval", *small(directory), "--output", none], "Make that folder first"),
        (["eval", *small(directory), "--text", none], "Give a readable UTF-8 text"),
        (["eval", *small(directory), "--device", "meta"], "--device"),
        (["eval", *small(directory), "--context", "63"], "0 to 62"),
        (["sweep", *small(directory), "--output", f"{file}/sweep"], f"{file} is no directory"),
        (["sweep", *small(directory), "--statistics", none], "cannot be read as calibration"),
        (["sweep", *small(directory), "--text", none], "Give a readable UTF-8 text"),
        (["demo", "--output", file], "is no directory"),
    ):
        assert message in failure(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_plan_that_calibrate_names_itself_is_checked_first(
    directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("micromix_compile.models.load", no_work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{Path(directory).name}.micromix.safetensors").mkdir()
    assert "is a directory" in failure(capsys, "calibrate", *small(directory))


def test_a_plan_of_the_users_is_not_written_over(directory, tmp_path, capsys, monkeypatch):
    for output, command in (("out", "quantize"), ("out.pt2", "export")):
        for name in (f"{output}.plan.safetensors", f"{output}.plan.json"):
            (tmp_path / name).write_text("mine")
            with monkeypatch.context() as patch:
                patch.setattr("micromix_compile.models.load", no_work)
                line = failure(capsys, command, directory, str(tmp_path / output))
            assert name in line and "--plan" in line
            assert (tmp_path / name).read_text() == "mine"
            (tmp_path / name).unlink()


def test_a_plan_among_the_files_of_the_model_would_change_them(
    directory, tmp_path, capsys, monkeypatch
):
    """No later run would take the files for the same."""
    (tmp_path / "link").symlink_to(directory)
    before = sorted(os.listdir(directory))
    with monkeypatch.context() as patch:
        patch.setattr("micromix_compile.models.load", no_work)
        for command, out in (("quantize", f"{directory}/q"), ("export", f"{tmp_path}/link/q.pt2")):
            line = failure(capsys, command, directory, out)
            assert "one of the files of the model" in line and "Give an OUT outside" in line
    assert sorted(os.listdir(directory)) == before
    assert main(["quantize", directory, f"{directory}/q", "--format", "mxfp8"]) == 0  # no plan
    shutil.rmtree(f"{directory}/q")


def test_another_file_of_json_is_no_note_of_a_plan(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("micromix_compile.models.load", no_work)
    note = tmp_path / "out.plan.json"
    note.write_text("[1, 2, 3, 4, 5, 6]")
    line = failure(capsys, "quantize", directory, str(tmp_path / "out"))
    assert note.name in line and "--plan" in line


def test_a_plan_that_was_removed_is_made_again(directory, tmp_path):
    flags = ["--samples", "1", "--seqlen", "64", "--split", "1", "0", "0"]
    out = tmp_path / "new" / "out"  # whose folder is made
    assert main(["quantize", directory, str(out), *flags]) == 0
    out.with_name("out.plan.safetensors").unlink()
    shutil.rmtree(out)
    assert main(["quantize", directory, str(out), *flags]) == 0
    assert out.with_name("out.plan.safetensors").exists()


def test_a_length_that_does_not_fit_is_refused_before_calibrating(
    directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("micromix_compile.calibrate", no_work)
    out = str(tmp_path / "x.pt2")
    assert "Give 3 to 128" in failure(capsys, "export", directory, out, "--max-length", "4000")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Learned positions, 96 of them: the next one is an IndexError."""
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 96, "vocab_size": VOCABULARY}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_windows_are_no_longer_than_the_model_has_positions(gpt2, directory, tmp_path, capsys):
    model = ["--model", gpt2, "--samples", "2"]
    plan = ["--output", str(tmp_path / "plan.safetensors")]
    for command in (["eval"], ["calibrate", *plan]):
        assert main([*command, *model]) == 0
        out = capsys.readouterr().out
        assert out.count("windows of 96 tokens and not 2048") == 1
        assert "2 windows of 96 tokens" in out
        assert main([*command, *model, "--seqlen", "96"]) == 0
        assert "not 2048" not in capsys.readouterr().out
        line = failure(capsys, *command, *model, "--seqlen", "97")
        assert "--seqlen" in line and "2 to 96" in line
    out, small = str(tmp_path / "out"), ["--samples", "1", "--split", "1", "0", "0"]
    assert main(["quantize", gpt2, out, *small]) == 0
    shutil.rmtree(out)
    capsys.readouterr()
    assert main(["quantize", gpt2, out, *small]) == 0
    assert "from an earlier run" in capsys.readouterr().out
    line = failure(capsys, "eval", "--model", directory, "--seqlen", "129")  # rotated positions
    assert "2 to 128" in line


@pytest.mark.parametrize(
    "rotary, most",
    [
        (None, 128),
        ({"rope_type": "dynamic", "factor": 4.0}, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 32,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 128),
    ],
)  # fmt: skip
def test_scaled_rotary_positions_reach_further(rotary, most):
    config = tiny_llama().config
    config.rope_parameters = {"rope_theta": 10000.0, **(rotary or {})}
    assert longest_text(SimpleNamespace(config=config)) == most
    config.alibi = True
    assert longest_text(SimpleNamespace(config=config)) is None


def test_generate_is_no_longer_than_the_model_has_positions(gpt2, capsys):
    command = ["generate", gpt2, "--prompt"]
    prompt = len(tiny_tokenizer()("the import").input_ids)
    left = 97 - prompt  # the last token has no position
    assert main([*command, "the import"]) == 0
    assert f"at most {left} tokens and not 128" in capsys.readouterr().err
    assert main([*command, "the import", "--max-new-tokens", str(left)]) == 0
    assert "at most" not in capsys.readouterr().err
    line = failure(capsys, *command, "the import", "--max-new-tokens", str(left + 1))
    assert "--max-new-tokens" in line and f"1 to {left}" in line
    line = failure(capsys, *command, "the import statement " * 50)
    assert "--prompt" in line and "at most 96 tokens" in line


def test_a_model_that_is_quantised_is_not_quantised_again(directory, tmp_path, capsys, monkeypatch):
    packed, again = tmp_path / "packed", tmp_path / "again"
    assert main(["quantize", directory, str(packed), "--format", "mxfp8"]) == 0
    monkeypatch.setattr("micromix_compile.calibrate", no_work)
    for command, out in (("quantize", again), ("export", tmp_path / "x.pt2")):
        for flags in (["--format", "mxfp4"], ["--bits", "5"]):
            line = failure(capsys, command, str(packed), str(out), *flags)
            assert "is quantised already" in line
    assert main(["quantize", str(packed), str(again)]) == 0
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (packed / file).read_bytes()


def test_a_model_that_is_quantised_is_measured_as_it_is_alone(
    directory, statistics, gradients, tmp_path, capsys, monkeypatch
):
    packed, plan, figures = (str(tmp_path / name) for name in ("packed", "plan", "figures"))
    assert main(["plan", statistics, "--output", plan]) == 0
    assert main(["quantize", directory, packed, "--plan", plan]) == 0
    assert main(["eval", *small(packed), "--output", figures]) == 0
    assert [row["variant"] for row in json.loads(Path(figures).read_text())] == ["as it is"]
    assert "\nas it is: " in capsys.readouterr().out
    monkeypatch.setattr("micromix_compile.evaluate.perplexity", no_work)
    monkeypatch.setattr("micromix_compile.calibrate", no_work)
    output = ["--output", str(tmp_path / "new")]
    for arguments in (
        ["eval", *small(packed), "--plan", plan],
        ["eval", *small(packed), "--format", "mxfp4"],
        ["eval", *small(packed), "--format", "mxfp4", "--tasks", "lambada"],
        ["calibrate", *small(packed), *output],
        ["sweep", *small(packed), *output, "--budgets", "5"],
        ["sweep", *small(packed), *output, "--budgets", "5", "--statistics", gradients],
    ):
        line = failure(capsys, *arguments)
        assert "--model" in line and "quantised already" in line and "a float model" in line


def test_generate_says_what_is_wrong(directory, capsys):
    for flags, message in (
        (["--prompt", ""], "--prompt"),
        (["--prompt", "x", "--chat"], "has no chat template"),
        (["--prompt", "x", "--temperature", "1e-40"], "--temperature"),
        (["--prompt", "x", "--device", "meta"], "--device"),
    ):
        assert message in failure(capsys, "generate", directory, *flags)
    for flags in (["--dtype", "float32"], ["--device", "cpu"]):
        line = failure(capsys, "generate", "some.pt2", "--prompt", "x", *flags)
        assert line.startswith(f"micromix: error: Option '{flags[0]}' cannot be given")


def test_letters_that_a_terminal_or_utf_8_lacks(directory, statistics, tmp_path, capsys):
    assert main(["generate", str(directory), "--prompt", "\udcff"]) == 1
    assert "--prompt" in capsys.readouterr().err
    program = "import sys; from micromix_compile.cli import main; sys.exit(main(sys.argv[1:]))"
    output = tmp_path / "ü.safetensors"
    found = subprocess.run(
        [sys.executable, "-c", program, "plan", str(statistics), "--output", str(output)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert found.returncode == 0 and r"\xfc.safetensors" in found.stdout, found.stderr


def test_sigterm_ends_a_command_as_an_interrupt_does(directory, monkeypatch, capsys):
    monkeypatch.setattr(deploy, "load_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["quantize", str(directory), str(directory) + "-x", "--format", "mxfp8"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_generate_runs_a_checkpoint_in_the_dtype_asked_for(
    directory, tmp_path, capsys, monkeypatch
):
    packed, seen = str(tmp_path / "packed"), []
    assert main(["quantize", directory, packed, "--format", "mxfp8"]) == 0
    load = models.load
    monkeypatch.setattr(models, "load", lambda *args: seen.append(load(*args)) or seen[-1])
    for source in (directory, packed):
        for flags in ([], ["--dtype", "float32", "--device", "cpu"]):
            words = ["--prompt", "the import", "--max-new-tokens", "3", *flags]
            assert main(["generate", source, *words]) == 0
            assert "tokens/s" in capsys.readouterr().err
    dtypes = [model.dtype for model, _ in seen]
    assert dtypes == [torch.bfloat16, torch.float32] * 2


def test_env_fails_where_the_extension_does(capsys, monkeypatch):
    def fail():
        raise RuntimeError("no kernels")

    monkeypatch.setattr("micromix_compile.env.collect", fail)
    assert main(["env"]) == 1
    assert "no kernels" in capsys.readouterr().err


def test_an_unknown_instruction_set_is_one_line(directory):
    command = [sys.executable, "-m", "micromix_compile.cli", "eval", *small(directory)]
    run = subprocess.run(
        [*command, "--format", "mxfp8"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MICROMIX_CPU_ISA": "bogus"},
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "MICROMIX_CPU_ISA" in run.stderr
