"""What `micromix sweep` writes: perplexity against bits or modelled time, as JSON, as a table and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from micromix_compile.files import write_text
from micromix_compile.picture import save_figure

__all__ = ["FILES", "table", "write_sweep"]

FILES = ("sweep.json", "sweep.md", "sweep.png")
"""What `write_sweep` writes to its folder."""


def write_sweep(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes FILES to `folder`: all that is known of each row, a table and a picture.

    A row has `bits` and `activation_bits` (elements), `with_scales` (of the weights), with a budget of time also `time`
    (of that of MXFP8), `target` and `rows`, and `texts`: name -> `increase`,
    `increase_error`, `kl`, `top1` and the like, as `micromix eval` gives them; JSON has null for the error of a single
    window.
    """
    figures, words, picture = (folder / name for name in FILES)
    write_text(figures, json.dumps(_without_nan(list(rows)), indent=1))
    write_text(words, table(rows))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    timed = "time" in rows[0]
    for name in rows[0]["texts"]:
        found = [row["texts"][name] for row in rows]
        axes.errorbar(
            [row["time" if timed else "bits"] for row in rows],
            [100 * own["increase"] for own in found],
            yerr=[100 * own["increase_error"] for own in found],
            marker="o",
            capsize=3,
            label=Path(name).name,
        )
    axes.set_xlabel(
        f"modelled time of the products, of that of MXFP8 ({rows[0]['target']}, rows: {rows[0]['rows']})"
        if timed
        else "element bits (0.25 for the scales not counted)"
    )
    axes.set_ylabel("increase of perplexity over the float model, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, picture)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, ± standard errors by window."""
    texts = [Path(name).name for name in rows[0]["texts"]]
    columns = {
        "bits": "bits of weights", "with_scales": "with scales", "activation_bits": "bits of activations",
        "time": "modelled time of MXFP8's",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    head = list(columns.values())
    head += [f"{text}: {what}" for text in texts for what in ("perplexity", "KL", "top-1")]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [f"{row[key]:.2f}" for key in columns]
        for own in row["texts"].values():
            cells.append(f"{100 * own['increase']:+.1f} % ± {100 * own['increase_error']:.1f} %")
            cells += [f"{own['kl']:.4f}", f"{100 * own['top1']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
