"""Pictures of runs, PNG and SVG: `python -m records plot PATHS... --out DIR`.

Runs that agree in everything but the seed are one group: its mean is a line, with a band of one
standard deviation where it has several. PATHS are logs, folders of logs and published entries like
track_3#36; `track_3` adds the published history. The same data give the same bytes (with the same
matplotlib).
"""

import argparse
from collections.abc import Callable
from math import isfinite, isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from records.caveats import check_repeats
from records.figures import Groups, group_runs, legend, looks, mean_line, new_figure, rendered
from records.groups import Group, group, target_of
from records.history import draw_entries, draw_history
from records.run import Run


def draw_loss(groups: Groups, target: float | None, time: bool = False) -> Any:
    """Loss against steps or training time: without its fall from the start, and the last third."""
    figure, panels = new_figure(f"Validation loss against {'time' if time else 'steps'}", 2)
    last = max(run.final.step for runs in groups.values() for run in runs)
    for axes, first in zip(panels, (0.1 * last, 2 / 3 * last), strict=True):
        for label, style in looks(groups).items():
            curves = [
                {
                    p.step: (p.train_time_s if time else p.step, p.val_loss)
                    for p in run.points
                    if p.step >= first
                }
                for run in groups[label]
            ]
            mean_line(axes, curves, style)
        if target:
            axes.axhline(target, ls=(0, (6, 4)), lw=1, color="0.4", label=f"target {target:.6g}")
        axes.set(xlabel="training time (s)" if time else "step", ylabel="validation loss")
    legend(figure, panels[0])
    return figure


def draw_crossings(groups: Groups, target: float) -> Any | None:
    """One dot per run: the step at which its loss crossed the target; None where none is known."""
    figure, (axes,) = new_figure(f"Steps to a loss of {target:.6g}", 1)
    found = {
        label: [crossing.exact_step for run in runs if (crossing := run.crossing(target))]
        for label, runs in groups.items()
    }
    steps = {label: [step for step in some if not isnan(step)] for label, some in found.items()}
    for row, (label, style) in enumerate(looks(groups, band=False).items()):
        axes.plot(steps[label], [row] * len(steps[label]), "o", color=style["color"], alpha=0.6)
        if steps[label]:
            axes.plot(fmean(steps[label]), row, "|", ms=22, mew=2, color=style["color"])
    axes.set(xlabel=f"steps to {target:.6g} (bar: mean)", ylim=(-0.6, len(groups) - 0.4))
    axes.set_yticks(
        range(len(groups)),
        [
            f"{label}\n{len(steps[label])} of {len(runs)}"
            + (f", {lost} not bracketed" if (lost := len(found[label]) - len(steps[label])) else "")
            for label, runs in groups.items()
        ],
    )
    axes.locator_params(axis="x", nbins=5)
    return figure if any(steps.values()) else None


def draw_times(groups: Groups) -> Any | None:
    """Histogram of the time of a step, averaged between two validations; None without times."""
    times = {
        label: [
            1000 * (b.train_time_s - a.train_time_s) / (b.step - a.step)
            for run in runs
            for a, b in zip(run.points, run.points[1:], strict=False)
            if b.train_time_s > a.train_time_s
        ]
        for label, runs in groups.items()
    }
    every = [value for values in times.values() for value in values]
    if not every:
        return None
    figure, (axes,) = new_figure("Time of a step", 1)
    low, high = min(every), max(every)
    edges = [low + (high - low) * i / 40 for i in range(41)] if high > low else [low - 1, low + 1]
    for label, style in looks(groups, band=False).items():
        axes.hist(times[label], bins=edges, histtype="step", linewidth=1.6, **style)
    axes.set(xlabel="ms per step, between two validations", ylabel="count")
    legend(figure, axes)
    return figure


DIAGNOSES: dict[str, Callable[[dict], float | None]] = {  # of one matrix in a diag: line
    "update: CV over neurons": lambda matrix: matrix["update"]["cv"],
    "share of neurons with leverage below 1/16": lambda matrix: matrix["leverage"]["below"][0],
    "update: orthogonality error": lambda matrix: matrix["orthogonality"],
}


def _diagnosis(run: Run, kind: str, title: str) -> dict[float, tuple[float, float]]:
    """{step: (step, mean over the layers of a kind)}; neurons that never fire where not titled."""
    curve = {}
    for line in run.extra.get("diag", []):
        part, of = (
            ("matrices", DIAGNOSES[title])
            if title in DIAGNOSES
            else ("neurons", lambda layer: layer["silent"])
        )
        values = [of(v) for name, v in line[part].items() if kind in name.split(".")]
        values = [value for value in values if value is not None]
        if values:
            curve[line["step"]] = (line["step"], sum(values) / len(values))
    return curve


def draw_diagnostics(groups: Groups) -> Any | None:
    """What --diagnostics logged, mean over layers against steps; None where nothing was."""
    figure, panels = new_figure("Neurons of the MLP, mean over the layers", 2, 2)
    seen = False
    for axes, title in zip(panels, [*DIAGNOSES, "share of neurons that never fire"], strict=True):
        for label, style in looks(groups).items():
            for kind, line in (("fc", "-"), ("proj", "--")):
                curves = [_diagnosis(run, kind, title) for run in groups[label]]
                if all(curves):
                    seen = True
                    extra = {"linestyle": line, "label": f"{label}, {kind}"}
                    mean_line(axes, curves, style | extra)
        axes.set(xlabel="step", ylabel=title)
        axes.set_ylim(bottom=0)
    legend(figure, panels[0])
    return figure if seen else None


def read_groups(names: list[str]) -> list[Group]:
    """Logs and folders by their settings, published entries (track_3#36) by their name.

    Runs that did not complete are left out, unless all did not.
    """
    entries = [group(name) for name in names if name.startswith("track_")]
    runs = [run for name in names if not name.startswith("track_") for run in group(name).runs]
    complete = [run for run in runs if run.status == "complete"] or runs
    groups = [Group(label, some) for label, some in group_runs(complete).items()] + entries
    for one in groups:
        one.last_step()  # ValueError where they share none: there is no mean
        for run in one.runs:
            if wrong := [point for point in run.points if not isfinite(point.val_loss)]:
                raise ValueError(
                    f"{run.path}: found loss {wrong[0].val_loss} at step "
                    f"{wrong[0].step}, expected numbers; leave that run out"
                )
    return groups


def pictures(groups: Groups, target: float | None) -> dict[str, Any]:
    """Name to figure, of those for which the groups have data."""
    times = draw_times(groups)
    drawn = {
        "loss_steps": draw_loss(groups, target),
        "loss_time": draw_loss(groups, target, time=True) if times else None,
        "steps_to_target": draw_crossings(groups, target) if target else None,
        "step_time": times,
        "diagnostics": draw_diagnostics(groups),
    }
    return {name: figure for name, figure in drawn.items() if figure}


def check_folder(folder: Path) -> None:
    """ValueError where a file stands in the way of the folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--out: {there} is a file, expected a folder; name another")


def history() -> dict[str, Any]:
    """Name to figure, of the published entries of track 3."""
    return {"history": draw_history(), "published_curves": draw_entries()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", help="logs, folders, track_3#36, or track_3")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--target", type=float, help="loss to reach, if not that of the logs")


def run(args: argparse.Namespace) -> None:
    check_folder(args.out)
    found = read_groups([name for name in args.paths if name != "track_3"])
    target = target_of(found, args.target)
    check_repeats(found)
    groups = {one.name: one.runs for one in found}
    drawn = pictures(groups, target) if found else {}
    drawn |= history() if "track_3" in args.paths else {}
    files = {
        args.out / f"{name}.{kind}": rendered(figure, kind)
        for name, figure in drawn.items()
        for kind in ("png", "svg")
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        path.write_bytes(data)
    print("\n".join(map(str, files)))
    if groups and "steps_to_target" not in drawn:
        print("no picture of steps to a target: no run crosses one between two validations")
