"""Pictures of the published history of track 3, from records/published/."""

from datetime import date
from itertools import accumulate
from typing import Any

from records.figures import legend, mean_line, new_figure
from records.published import TARGET, track_3


def draw_history() -> Any:
    """Claimed steps of each entry over time; the line is the fewest of any record until then."""
    figure, (axes,) = new_figure(1)
    looks = {True: ("record", "#D55E00", "o"), False: ("no record", "#0072B2", "x")}
    for record, (label, colour, marker) in looks.items():
        some = sorted((date.fromisoformat(entry.date), entry.steps)
                      for entry in track_3().values() if entry.record == record)
        days, steps = ([pair[i] for pair in some] for i in (0, 1))
        axes.plot(days, steps, marker, ms=5, color=colour, label=label)
        if record:
            axes.plot(days, list(accumulate(steps, min)), color=colour, drawstyle="steps-post")
    axes.set(ylabel=f"steps to {TARGET}", yscale="log")
    axes.set_yticks([2500, 3000, 4000, 5000, 6000, 8000], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.tick_params(axis="x", rotation=40)
    legend(figure, axes)
    return figure


def draw_entries() -> Any:
    """Mean curve of each entry that set a record: from grey to black, the last one in colour."""
    figure, panels = new_figure(2)
    entries = [entry for entry in track_3().values() if entry.record and entry.runs]
    for axes, (first, top) in zip(panels, ((300, 4.2), (2400, 3.36)), strict=True):
        for age, entry in enumerate(entries):
            last = entry is entries[-1]
            style = {"color": "#D55E00" if last else f"{0.8 - 0.7 * age / len(entries):.2f}",
                     "label": entry.label if last or age == 0 else "", "lw": 1}
            mean_line(axes, [{point.step: (point.step, point.val_loss) for point in run.points
                              if point.step >= first} for run in entry.runs], style)
        axes.axhline(TARGET, ls=(0, (6, 4)), lw=1, color="0.4", label=f"target {TARGET}")
        axes.set(xlabel="step", ylabel="scored loss, mean", ylim=(3.26, top), xlim=(first, None))
    legend(figure, panels[0])
    return figure
