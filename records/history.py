"""Pictures of the published history of track 3, from records/published/."""

import csv
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

from records.figures import legend, mean_line, new_figure

PUBLISHED = Path(__file__).resolve().parent / "published"


def published(table: str) -> list[dict[str, str]]:
    """The rows of one table of records/published/, by column name."""
    with (PUBLISHED / f"{table}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def draw_history() -> Any:
    """Steps of each entry over time; the line is the fewest steps of any record until then."""
    figure, (axes,) = new_figure(1)
    looks = {"1": ("record", "#D55E00", "o"), "0": ("no record", "#0072B2", "x")}
    entries = sorted((entry["date"], int(entry["steps"]), entry["record"])
                     for entry in published("track_3_results"))
    for wanted, (label, colour, marker) in looks.items():
        days = [date.fromisoformat(day) for day, _, record in entries if record == wanted]
        steps = [steps for _, steps, record in entries if record == wanted]
        axes.plot(days, steps, marker, ms=5, color=colour, label=label)
        if wanted == "1":
            axes.plot(days, list(accumulate(steps, min)), color=colour, drawstyle="steps-post")
    axes.set(ylabel="steps to 3.28", yscale="log")
    axes.set_yticks([2500, 3000, 4000, 5000, 6000, 8000], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.tick_params(axis="x", rotation=40)
    legend(figure, axes)
    return figure


def mean_curves() -> dict[str, list[dict[float, tuple[float, float]]]]:
    """{step: (step, scored loss)} of each run of each entry that set a record."""
    scored = {entry["entry"]: entry["claim_field"] for entry in published("track_3_results")
              if entry["record"] == "1"}
    runs: dict[str, dict[str, dict]] = {entry: {} for entry in scored}
    for row in published("track_3_curves"):
        entry, step = row["entry"], int(row["step"])
        if entry in runs and row["role"] == "evidence" and (loss := row[scored[entry]]):
            runs[entry].setdefault(row["run"], {})[step] = (step, float(loss))
    return {entry: list(curves.values()) for entry, curves in runs.items() if curves}


def draw_entries() -> Any:
    """Mean curve of each entry that set a record: from grey to black, the last one in colour."""
    figure, panels = new_figure(2)
    entries = mean_curves()
    ages = {entry: age / len(entries) for age, entry in enumerate(entries)}
    for axes, (first, top) in zip(panels, ((300, 4.2), (2400, 3.36)), strict=True):
        for entry, curves in entries.items():
            ends = entry in (list(entries)[0], list(entries)[-1])
            colour = "#D55E00" if entry == list(entries)[-1] else f"{0.8 - 0.7 * ages[entry]:.2f}"
            late = [{step: xy for step, xy in curve.items() if step >= first} for curve in curves]
            mean_line(axes, late, {"color": colour, "lw": 1, "label": f"#{entry}" if ends else ""})
        axes.axhline(3.28, ls=(0, (6, 4)), lw=1, color="0.4", label="target 3.28")
        axes.set(xlabel="step", ylabel="scored loss, mean", ylim=(3.26, top), xlim=(first, None))
    legend(figure, panels[0])
    return figure
