"""Show runs as a table: logs, folders, globs, `track_3` (the published leaderboard), `track_3#36`.

A dash stands for an unknown value; a NaN loss is printed as NaN, with the status of its run. The
leaderboard prints the claimed mean or n as well if it differs from the one in the logs.
"""

from argparse import ArgumentParser, Namespace

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


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="a log, a folder, a 'glob', track_3 or track_3#N")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--target", type=float, help="the loss to cross (default: the logs' own)")


def run(args: Namespace) -> None:
    if args.runs == ["track_3"]:
        say(LEADERBOARD, [_entry_row(entry) for entry in track_3().values()], args.markdown)
        print("".join(f"{note}\n" for note in map(_note, track_3().values()) if note), end="")
        return
    groups = [group(name) for name in args.runs]
    say(*run_table(groups, target_of(groups, args.target)), args.markdown)
    print("".join(f"{line}\n" for line in read_back(groups)), end="")


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
        run.status,
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
