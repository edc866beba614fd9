"""Draw the published history of track 3 from records/published/."""

from datetime import date
from itertools import accumulate
from typing import Any

from records.figures import legend, mean_line, new_figure
from records.published import TARGET, track_3
from records.stats import precision


def draw_history() -> Any:
    """Draw the claimed steps of each entry over time, with a line at the best record so far.

    A record's marker is hollow if the losses of its runs do not pass the rule.
    """
    figure, (axes,) = new_figure("Published entries of track 3", 1)
    looks = {
        "record": ("#D55E00", "o", "#D55E00"),
        "no record": ("#0072B2", "x", "#0072B2"),
        "record whose logs fail the rule": ("#D55E00", "o", "white"),
    }
    for label, (colour, marker, fill) in looks.items():
        some = [pair for pair, role in _claims() if role == label]
        axes.plot(
            [day for day, _ in some],
            [steps for _, steps in some],
            marker,
            ms=5,
            color=colour,
            markerfacecolor=fill,
            label=label,
            zorder=3,
        )
    records = sorted(pair for pair, role in _claims() if role != "no record")
    axes.plot(
        [day for day, _ in records],
        list(accumulate((n for _, n in records), min)),
        color="#D55E00",
        drawstyle="steps-post",
    )
    axes.set(ylabel=f"claimed steps to {TARGET}", yscale="log")
    axes.set_yticks([2500, 3000, 4000, 5000, 6000, 8000], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.tick_params(axis="x", rotation=40)
    legend(figure, axes)
    return figure


def _claims() -> list[tuple[tuple[date, int], str]]:
    """Return the date, the claimed steps and the role of each entry."""
    return [
        (
            (date.fromisoformat(entry.date), entry.steps),
            "no record"
            if not entry.record
            else "record"
            if precision(entry.losses).passes
            else "record whose logs fail the rule",
        )
        for entry in track_3().values()
    ]


def draw_entries() -> Any:
    """Draw the mean curve of each entry that set a record: dark to light, the last one in red."""
    from matplotlib import colormaps  # imported here: tables need no matplotlib

    figure, panels = new_figure("Mean loss of the published entries that set a record", 2)
    figure.set_figwidth(12)
    entries = [entry for entry in track_3().values() if entry.record and entry.runs]
    for axes, (first, top) in zip(panels, ((300, 4.2), (2400, 3.36)), strict=True):
        for age, entry in enumerate(entries):
            last = entry is entries[-1]
            style = {
                "color": "#D55E00" if last else colormaps["viridis"](age / len(entries)),
                "label": entry.label,
                "lw": 1,
            }
            mean_line(
                axes,
                [
                    {
                        point.step: (point.step, point.val_loss)
                        for point in run.points
                        if point.step >= first
                    }
                    for run in entry.runs
                ],
                style,
            )
        axes.axhline(TARGET, ls=(0, (6, 4)), lw=1, color="0.4", label=f"target {TARGET}")
        axes.set(xlabel="step", ylabel="scored loss, mean", ylim=(3.26, top), xlim=(first, None))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        ncols=2,
        frameon=False,
        fontsize=8,
        loc="outside right upper",
    )
    return figure
