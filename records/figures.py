"""Group runs, choose colours, draw means with bands and render files, for all pictures."""

import io
import json
from statistics import fmean, stdev
from typing import Any

from records.run import Run

OPTIMIZERS = {  # name in the log: label and colour (Okabe and Ito's colour-blind-safe palette)
    "aurora": ("Aurora", "#D55E00"),
    "riemannian": ("Riemannian Aurora", "#E69F00"),
    "muon": ("Muon", "#0072B2"),
    "adamw": ("AdamW", "#56B4E9"),
    "normuon": ("NorMuon", "#009E73"),
    "unormuon": ("U-NorMuon", "#CC79A7"),
}
STYLES = ("-", "--", ":", "-.")  # groups of one colour take these in turn, then other tints of it
Groups = dict[str, list[Run]]


def look(name: str) -> tuple[str, str]:
    """Return the label and the colour of an optimizer."""
    return OPTIMIZERS.get(name, (name, "black"))


def gpus(entry: dict) -> str:
    """Return a text like `2 x H200` for a log's meta or a measurement."""
    count = entry.get("world_size", entry.get("gpus", 1))
    return f"{count} x {entry['device'].removeprefix('NVIDIA ')}"


def shared_settings(run: Run) -> dict[str, Any]:
    """Return everything that runs of one group share. A public log is known by its folder only."""
    if "config" not in run.meta:
        return {"optimizer": str(run.path.parent)}
    return run.settings | {
        "optimizer": run.meta["optimizer"],
        "GPUs": gpus(run.meta),
        "code": run.meta.get("code_sha256", "unknown")[:7],
    }


def group_runs(runs: list[Run]) -> Groups:
    """Group runs by their settings. A label names the optimizer and the settings that differ."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(shared_settings(run), sort_keys=True), []).append(run)
    groups = list(found.values())
    every = [shared_settings(group[0]) for group in groups]
    keys = dict.fromkeys(key for one in every for key in one)
    differ = [key for key in keys if len({json.dumps(one.get(key)) for one in every}) > 1]
    common = set.intersection(*({*one.get("set", ())} for one in every)) if every else set()
    labels = [_label(one, differ, common) for one in every]
    for place, label in enumerate(labels):
        labels[place] += f" ({place})" if label in labels[:place] else ""  # no group is lost
    return dict(zip(labels, groups, strict=True))


def _label(settings: dict[str, Any], differ: list[str], common: set[str]) -> str:
    """Name the optimizer and the settings that differ, `--set fc.lr=1` among them as fc.lr 1."""
    words = [look(settings["optimizer"])[0]]
    for key in differ:
        if key == "set":
            given = [text for text in settings.get(key, ()) if text not in common]
            words += [text.replace("=", " ", 1) for text in given]
        elif key in settings and key != "optimizer":
            words.append(f"{settings[key]}" if key == "GPUs" else f"{key} {settings[key]}")
    return ", ".join(words)


def tint(colour: str, rounds: int) -> str:
    """Return the colour itself, then shades of it: darker, lighter, still darker and so on."""
    share, end = 0.6 ** ((rounds + 1) // 2), 255 * (rounds % 2 == 0)
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(share * part + (1 - share) * end):02X}" for part in parts)


def looks(
    groups: Groups, band: bool = True, styles: int = len(STYLES)
) -> dict[str, dict[str, Any]]:
    """Return the colour (its optimizer's), line style and label of each group, no two alike.

    The label explains the band that mean_line draws, or counts the runs if `band` is false. Groups
    of one optimizer take so many line styles in turn, and then another tint of the colour.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: list[str] = []
    rest = [colour for _, colour in OPTIMIZERS.values()]
    for label, runs in groups.items():
        colour = look(runs[0].meta.get("optimizer", ""))[1]
        if colour == "black":
            colour = rest[len(found) % len(rest)]
        rounds, style = divmod(seen.count(colour), styles)
        seen.append(colour)
        count = f" (mean of {len(runs)}, band: sd)" if band else f" ({len(runs)} runs)"
        count = count if len(runs) > 1 else ""
        found[label] = {
            "color": tint(colour, rounds),
            "linestyle": STYLES[style],
            "label": label + count,
        }
    return found


def new_figure(title: str, columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure with a title, and its panels row by row."""
    from matplotlib.figure import Figure  # imported here: tables need no matplotlib

    figure = Figure(figsize=(4.5 * columns, 4.4 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def legend(figure: Any, axes: Any) -> None:
    """Draw one legend below the whole figure, in one column if two would be cut off."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 2 if figure.get_figwidth() > 6 else 1
        figure.legend(handles, labels, ncols=columns, frameon=False, loc="outside lower center")


def mean_line(axes: Any, curves: list[dict[float, tuple[float, float]]], style: dict) -> None:
    """Draw the mean of curves {step: (x, y)} at their common steps, with a band of one sd."""
    steps = sorted(set.intersection(*map(set, curves)))
    xs, ys = ([[curve[step][i] for curve in curves] for step in steps] for i in (0, 1))
    x, y = list(map(fmean, xs)), list(map(fmean, ys))
    axes.plot(x, y, **style)
    if len(curves) > 1:
        low, high = ([m + sign * stdev(v) for m, v in zip(y, ys, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def rendered(figure: Any, suffix: str) -> bytes:
    """Return the bytes of a png or svg file without date and version."""
    from matplotlib import rc_context

    stamp = {"Software": None} if suffix == "png" else {"Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": "records"}), io.BytesIO() as file:
        figure.savefig(file, format=suffix, metadata=stamp)
        return file.getvalue()
