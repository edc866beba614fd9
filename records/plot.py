"""Draw pictures of runs as PNG and SVG: `python -m records plot PATHS... --out DIR`.

Runs that differ only in the seed form a group: a line shows its mean, with a band of one standard
deviation if there are several. PATHS are logs, folders of logs and published entries like
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
    """Draw loss against steps or training time: after the first tenth, and the last third."""
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
    """Draw a dot per run at the step where its loss crossed the target; None if none was seen."""
    figure, (axes,) = new_figure(f"Steps to a loss of {target:.6g}", 1)
    found = {
        label: [crossing.exact_step for run in runs if (crossing := run.crossing(target))]
        for label, runs in groups.items()
    }
    steps = {label: [step for step in some if not isnan(step)] for label, some in found.items()}
    for row, (label, style) in enumerate(looks(groups, False, styles=1).items()):
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
    """Draw a histogram of the step times between two validations; None if there are no times."""
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


DIAGNOSES: dict[str, Callable[[dict], float | None]] = {  # each reads one matrix of a diag: line
    "update: CV over neurons": lambda matrix: matrix["update"]["cv"],
    "share of neurons with leverage below 1/16": lambda matrix: matrix["leverage"]["below"][0],
    "update: orthogonality error": lambda matrix: matrix["orthogonality"],
}


def _diagnosis(run: Run, matrix: str, title: str) -> dict[float, tuple[float, float]]:
    """Return {step: (step, mean over layers)}; titles outside DIAGNOSES count silent neurons."""
    curve = {}
    for line in run.extra.get("diag", []):
        part, read = (
            ("matrices", DIAGNOSES[title])
            if title in DIAGNOSES
            else ("neurons", lambda layer: layer["silent"])
        )
        values = [read(v) for name, v in line[part].items() if matrix in name.split(".")]
        values = [value for value in values if value is not None]
        if values:
            curve[line["step"]] = (line["step"], sum(values) / len(values))
    return curve


def draw_diagnostics(groups: Groups) -> Any | None:
    """Draw the means over layers of --diagnostics against steps; None if none were logged."""
    figure, panels = new_figure("Neurons of the MLP, mean over the layers", 2, 2)
    seen = False
    for axes, title in zip(panels, [*DIAGNOSES, "share of neurons that never fire"], strict=True):
        for label, style in looks(groups, styles=1).items():
            for matrix, line in (("fc", "-"), ("proj", "--")):
                curves = [_diagnosis(run, matrix, title) for run in groups[label]]
                if all(curves):
                    seen = True
                    extra = {"linestyle": line, "label": f"{label}, {matrix}"}
                    mean_line(axes, curves, style | extra)
        axes.set(xlabel="step", ylabel=title)
        axes.set_ylim(bottom=0)
    legend(figure, panels[0])
    return figure if seen else None


TRAINING = {  # keys of a train: line that hold a number for each parameter group, and their axes
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "update_norm": "norm of a step's change of the weights",
}


def _training(run: Run, key: str, part: str) -> dict[float, tuple[float, float]]:
    """Return {step: (step, value)} of a key, for a parameter group where it has one for each."""
    values = {line["step"]: line[key] for line in run.extra["train"] if key in line}
    if part:
        values = {step: value[part] for step, value in values.items() if part in value}
    return {step: (step, value) for step, value in values.items()}


def draw_training(groups: Groups) -> dict[str, Any]:
    """Return pictures of what `train:` lines say: the loss, and one for each parameter group."""
    known = {label: runs for label, runs in groups.items() if all("train" in r.extra for r in runs)}
    lines = [line for runs in known.values() for run in runs for line in run.extra["train"]]
    parts = {f"train_{name}": (name, [*TRAINING]) for line in lines for name in line["lr"]}
    figures = {}
    for name, (part, keys) in (dict(train_loss=("", ["train_loss"])) | parts).items():
        title = f"Parameter group {part}" if part else "Training loss of single steps"
        figures[name], panels = new_figure(title, len(keys))
        for axes, key in zip(panels, keys, strict=True):
            for label, style in looks(known).items():
                curves = [_training(run, key, part) for run in known[label]]
                if all(curves):
                    mean_line(axes, curves, style)
            axes.set(xlabel="step", ylabel=TRAINING.get(key, "loss"))
        legend(figures[name], panels[0])
    return figures if known else {}


def read_groups(names: list[str]) -> list[Group]:
    """Group the runs of logs and folders by their settings; published entries are groups already.

    Incomplete runs are left out, unless there are no others.
    """
    found = [group(name) for name in names]
    place = {id(run): place for place, one in enumerate(found) for run in one.runs}
    runs = [run for one in found if not one.published for run in one.runs]
    complete = [run for run in runs if run.status == "complete"] or runs
    groups = [Group(label, some) for label, some in group_runs(complete).items()]
    groups += [one for one in found if one.published]
    groups.sort(key=lambda one: min(place[id(run)] for run in one.runs))  # the order of the names
    for one in groups:
        one.last_step()  # ValueError if the runs share no step, so that there is no mean
        for run in one.runs:
            if wrong := [point for point in run.points if not isfinite(point.val_loss)]:
                raise ValueError(
                    f"{run.path}: found loss {wrong[0].val_loss} at step "
                    f"{wrong[0].step}, expected numbers; leave that run out"
                )
    return groups


def pictures(groups: Groups, target: float | None) -> dict[str, Any]:
    """Return {name: figure} for all pictures that the groups have data for."""
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
    """Raise ValueError if a file stands in the way of the folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--out: {there} is a file, expected a folder; name another")


def history() -> dict[str, Any]:
    """Return {name: figure} for the published entries of track 3."""
    return {"history": draw_history(), "published_curves": draw_entries()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", help="logs, folders, track_3#36 or track_3")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the pictures")
    parser.add_argument("--training", action="store_true", help="also train loss, rates, norms")
    parser.add_argument("--target", type=float, help="the loss to reach (default: the logs' own)")


def run(args: argparse.Namespace) -> None:
    check_folder(args.out)
    found = read_groups([name for name in args.paths if name != "track_3"])
    target = target_of(found, args.target)
    check_repeats(found)
    groups = {one.name: one.runs for one in found}
    drawn = pictures(groups, target) if found else {}
    drawn |= draw_training(groups) if args.training else {}
    drawn |= history() if "track_3" in args.paths else {}
    files = {
        args.out / f"{name}.{suffix}": rendered(figure, suffix)
        for name, figure in drawn.items()
        for suffix in ("png", "svg")
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        path.write_bytes(data)
    print("\n".join(map(str, files)))
    if groups and "steps_to_target" not in drawn:
        print("no picture of steps to a target: no run crosses it between two validations")
    if args.training and "train_loss" not in drawn:
        print("no pictures of the training: no group of runs has train: lines in all of its logs")
