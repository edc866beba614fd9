"""Show runs as a table: logs, folders, globs, `track_3` (the published leaderboard), `track_3#36`.

A dash stands for an unknown value; a NaN loss is printed as NaN, with the status of its run. A log
without an `end:` line is of a run that is running if the log changed within the last 10 minutes (or
within three times the training time between its last two validations); otherwise the run has
stopped at the step of its last validation. The leaderboard prints the claimed mean or n as well if
it differs from the one in the logs. A narrow terminal gets fewer columns, and --wide gets them all.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from textwrap import fill, wrap

from records.groups import Group, group, target_of
from records.published import Entry, track_3
from records.run import Run
from records.stats import precision, summary
from records.table import number, p_value, say

SHORT = {"weight_decay": "wd"}
UNSET = ("name", "optimizer", "initial_lr", "fused", "decoupled_weight_decay")
LEADERBOARD = [
    "entry",
    "date",
    "steps",
    "n",
    "mean loss",
    "sd",
    "(3.28 - mean) sqrt(n)",
    "rule",
    "p",
    "record",
    "method",
]

SPARE = (  # columns that a narrow terminal does without, by the beginnings of their titles
    "hardware",
    "tokens/s",
    "optimizer",
    "seed",
    "best loss",
    "record",
    "date",
    "p",
    "sd",
    "metric",
    "seconds to",
    "ms per step",
)
FOLDED = 14  # characters of a cell that count there: longer ones are folded


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="a log, a folder, a 'glob', track_3 or track_3#N")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--wide", action="store_true", help="print all columns on any terminal")
    parser.add_argument("--target", type=float, help="the loss to cross (default: the logs' own)")


def run(args: Namespace) -> None:
    if args.runs == ["track_3"]:
        notes = [note for note in map(_note, track_3().values()) if note]
        _print(LEADERBOARD, [_entry_row(entry) for entry in track_3().values()], notes, args)
        return
    groups = [group(name) for name in args.runs]
    _print(*run_table(groups, target_of(groups, args.target)), read_back(groups), args)


def _print(
    header: Sequence[str], rows: Sequence[Sequence[str]], notes: list[str], args: Namespace
) -> None:
    """Print a table and the notes below it, as wide as the terminal; a pipe gets whole lines."""
    if not args.markdown and not args.wide:
        from rich.console import Console  # imported here: Markdown needs the standard library only

        if (terminal := Console()).is_terminal:
            header, rows, dropped = fitted(header, rows, terminal.width)
            notes = [*([f"no room for: {dropped} (see --wide)"] if dropped else []), *notes]
            whole = dict(break_long_words=False, break_on_hyphens=False)
            notes = [fill(note, terminal.width, subsequent_indent="  ", **whole) for note in notes]
    say(header, rows, args.markdown)
    print("".join(f"{note}\n" for note in notes), end="")


def fitted(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[str], list[list[str]], str]:
    """Drop spare columns until the table fits, and shorten and break the titles that are left.

    Returns the titles of the dropped columns as well. Columns that are all dashes do not count.
    """
    kept = {
        title: (max(min(FOLDED, max(map(len, cells))), *map(len, title.split())), cells)
        for title, *cells in zip(header, *rows, strict=True)
        if {*cells} != {"-"}
    }
    spare = [title for start in SPARE for title in kept if title.startswith(start)]
    dropped = []
    while spare and sum(size + 2 for size, _ in kept.values()) > width:
        dropped.append(spare.pop(0))
        del kept[dropped[-1]]
    old, new = "(interpolated)", "(exact)" if dropped else "(interpolated)"
    titles = ["\n".join(wrap(title.replace(old, new), n)) for title, (n, _) in kept.items()]
    cells = zip(*(cells for _, cells in kept.values()), strict=True)
    return titles, [[*row] for row in cells], ", ".join(dropped)


def run_table(groups: list[Group], target: float | None) -> tuple[list[str], list[list[str]]]:
    """Return a header and one row per run."""
    goal = "target" if target is None else f"{target:g}"
    header = [
        "group",
        "run",
        "status",
        "step",
        "final loss",
        "best loss (step)",
        f"step at {goal} (interpolated)",
        f"seconds to {goal}",
        "ms per step",
        "tokens/s",
        "hardware",
        "optimizer",
        "seed",
    ]
    claimed = any(one.step for one in groups)
    header[4:4] = ["loss at the claimed step"] if claimed else []
    rows = []
    for one in groups:
        for run in one.runs:
            row = [one.name, *_run_row(run, target)]
            if claimed:
                loss = run.loss_at(one.step) if one.step else None
                row[4:4] = [f"{number(loss, '.5f')} ({one.step})" if one.step else "-"]
            rows.append(row)
    metrics = [run.metric for one in groups for run in one.runs]
    if {*metrics} != {"val_loss"}:
        header.append("metric")
        rows = [[*row, metric] for row, metric in zip(rows, metrics, strict=True)]
    same = len(groups) == 1
    return header[same:], [row[same:] for row in rows]


def _run_row(run: Run, target: float | None) -> list[str]:
    last, best = run.final, run.best
    crossing = None if target is None else run.crossing(target)
    where = "not reached" if target is not None else "-"
    if crossing is not None:
        where = f"{crossing.step} ({number(crossing.exact_step, '.1f')})"
    pace = run.seconds_per_step
    tokens = run.meta.get("config", {}).get("batch_tokens")
    return [
        run.name,
        run.state,
        f"{last.step}/{last.total_steps or '?'}",
        f"{last.val_loss:.5f}",
        f"{best.val_loss:.5f} ({best.step})",
        where,
        number(crossing and crossing.exact_seconds, ".3f"),
        number(pace and 1000 * pace, ".2f"),
        number(tokens and pace and tokens / pace, ",.0f"),
        hardware(run),
        run.meta.get("optimizer", "-"),
        number(run.seed, "d"),
    ]


def hardware(run: Run) -> str:
    device, count = run.meta.get("device", "unknown"), run.meta.get("world_size", "?")
    return f"{count} x {device.removeprefix('NVIDIA ')}"


def read_back(groups: list[Group]) -> list[str]:
    """Return a line for each set of hyperparameters in use, with the runs that used it."""
    runs: dict[str, list[str]] = {}
    names = [run.name for one in groups for run in one.runs]
    for owner, run in ((one, run) for one in groups for run in one.runs if run.optim):
        parts: dict[str, list[str]] = {}
        for part in run.optim["groups"]:
            values = " ".join(
                f"{SHORT.get(key, key)} {_setting(value)}"
                for key, value in part.items()
                if key not in UNSET and value is not None and value is not False
            )
            parts.setdefault(values, []).append(part["name"])
        settings = "; ".join(f"{', '.join(same)} {values}" for values, same in parts.items())
        unique, several = names.count(run.name) == 1, len(groups) > 1
        name = run.name if unique else _path_in(owner, run, several)
        runs.setdefault(settings, []).append(name)
    return [f"settings read back of {', '.join(names)}: {line}" for line, names in runs.items()]


def _setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}".replace(" ", "")


def _path_in(one: Group, run: Run, several: bool) -> str:
    """Name a run by its path if its stem is not unique, relative to the folder if there is one."""
    inside = not several and one.name in map(str, run.path.parents)
    path = run.path.relative_to(one.name) if inside else run.path
    return f"{path}#{run.trial}" if run.trial else f"{path}"


def _entry_row(entry: Entry) -> list[str]:
    found, official = summary(entry.losses), precision(entry.losses)
    mean, n = f"{found.mean:.5f}", str(found.n)
    if abs(found.mean - entry.mean_loss) > 0.00005 + 1e-9:  # more than rounding to 4 decimals
        mean = f"{mean}, claimed {entry.mean_loss:.4f}"
    return [
        f"{entry.number}",
        entry.date,
        f"{entry.steps}",
        n if found.n == entry.n else f"{n}, claimed {entry.n}",
        mean,
        number(found.sd, ".5f"),
        f"{official.statistic:.5f}",
        "passes" if official.passes else "fails",
        p_value(official.p),
        "yes" if entry.record else "",
        entry.method,
    ]


def _note(entry: Entry) -> str:
    if not entry.readme_losses:
        return ""
    official, found = precision(entry.readme_losses), summary(entry.readme_losses)
    return (
        f"{entry.label}: its README lists {found.n} losses at step {entry.steps} without logs: "
        f"mean {found.mean:.5f}, statistic {official.statistic:.5f}, "
        f"{'passes' if official.passes else 'fails'}"
    )
