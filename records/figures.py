"""What all pictures share: who belongs to one group, colours, means with bands, bytes of a file."""

import io
import json
from statistics import fmean, stdev
from typing import Any

from records.run import FREE, Run

OPTIMIZERS = {  # name in the log: label, colour for good (Okabe and Ito's colour-blind-safe set)
    "aurora": ("Aurora", "#D55E00"),
    "riemannian": ("Riemannian Aurora", "#E69F00"),
    "muon": ("Muon", "#0072B2"),
    "adamw": ("AdamW", "#56B4E9"),
    "normuon": ("NorMuon", "#009E73"),
    "unormuon": ("U-NorMuon", "#CC79A7"),
}
STYLES = ("-", "--", ":", "-.")  # of the first, second ... group of one colour
Groups = dict[str, list[Run]]


def look(name: str) -> tuple[str, str]:
    """Label and colour of an optimizer."""
    return OPTIMIZERS.get(name, (name, "black"))


def gpus(entry: dict) -> str:
    """As in `2 x H200`, of a log's meta or a measurement."""
    count = entry.get("world_size", entry.get("gpus", 1))
    return f"{count} x {entry['device'].removeprefix('NVIDIA ')}"


def settings(run: Run) -> dict[str, Any]:
    """What runs of one group share, their code too; of a public log we know its folder only."""
    if "config" not in run.meta:
        return {"optimizer": str(run.path.parent)}
    config = {key: value for key, value in run.meta["config"].items() if key not in FREE}
    return config | {
        "optimizer": run.meta["optimizer"],
        "GPUs": gpus(run.meta),
        "code": run.meta.get("code_sha256", "unknown")[:7],
    }


def group_runs(runs: list[Run]) -> Groups:
    """Label to runs, in order of appearance; a label says the optimizer and what is special."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(settings(run), sort_keys=True), []).append(run)
    groups = list(found.values())
    every = [settings(group[0]) for group in groups]
    keys = dict.fromkeys(key for one in every for key in one)
    differ = [key for key in keys if len({json.dumps(one.get(key)) for one in every}) > 1]
    labels = [
        ", ".join(
            [
                look(one["optimizer"])[0],
                *(
                    f"{one.get(key)}" if key == "GPUs" else f"{key} {one.get(key)}"
                    for key in differ
                    if key != "optimizer"
                ),
            ]
        )
        for one in every
    ]
    return dict(zip(labels, groups, strict=True))


def looks(groups: Groups, band: bool = True) -> dict[str, dict[str, Any]]:
    """Colour, line style and label of each group: the colour is its optimizer's.

    The label says what mean_line draws of several runs; without a band, their number.
    """
    found: dict[str, dict[str, Any]] = {}
    rest = [colour for _, colour in OPTIMIZERS.values()]
    for label, runs in groups.items():
        colour = look(runs[0].meta.get("optimizer", ""))[1]
        if colour == "black":
            colour = rest[len(found) % len(rest)]
        style = STYLES[sum(other["color"] == colour for other in found.values()) % len(STYLES)]
        count = f" (mean of {len(runs)}, band: sd)" if band else f" ({len(runs)} runs)"
        count = count if len(runs) > 1 else ""
        found[label] = {"color": colour, "linestyle": style, "label": label + count}
    return found


def new_figure(title: str, columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure with a title, and its panels, row by row."""
    from matplotlib.figure import Figure  # here: the tables do not need matplotlib

    figure = Figure(figsize=(4.5 * columns, 4.4 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def legend(figure: Any, axes: Any) -> None:
    """One for the whole figure, below it; in one column where two would be cut off."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 2 if figure.get_figwidth() > 6 else 1
        figure.legend(handles, labels, ncols=columns, frameon=False, loc="outside lower center")


def mean_line(axes: Any, curves: list[dict[float, tuple[float, float]]], style: dict) -> None:
    """Of curves {step: (x, y)} the mean at the steps that all have, with a band of one sd."""
    steps = sorted(set.intersection(*map(set, curves)))
    xs, ys = ([[curve[step][i] for curve in curves] for step in steps] for i in (0, 1))
    x, y = list(map(fmean, xs)), list(map(fmean, ys))
    axes.plot(x, y, **style)
    if len(curves) > 1:
        low, high = ([m + sign * stdev(v) for m, v in zip(y, ys, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def rendered(figure: Any, kind: str) -> bytes:
    """The bytes of a png or svg file, without date and version."""
    from matplotlib import rc_context

    stamp = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": "records"}), io.BytesIO() as file:
        figure.savefig(file, format=kind, metadata=stamp)
        return file.getvalue()
