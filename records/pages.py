"""Write the tables of `PAGES` and the picture of the README: `python -m records.pages [--check]`.

A table stands between the lines `<!-- table:NAME -->` and `<!-- /table:NAME -->`. A page has one
pair for each of its names. The data are the logs records/prose/*.txt and records/bench/*.jsonl (one
line per measurement, newest last). `--check` only compares, and exits with 2 if a page is stale.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev

if __name__ == "__main__":
    from records.missing import explain_missing

    explain_missing()

from records import benches
from records.figures import gpus, group_runs, look, rendered
from records.findings import APART, VERSIONS, gaps_table, neurons_table
from records.groups import Group
from records.log import Run, parse_log
from records.show import run_table
from records.table import markdown, number

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^(<!-- table:(\w+) -->\n).*?^(<!-- /table:\2 -->)$", re.DOTALL | re.MULTILINE)


def prose_runs(root: Path, folder: str = "records/prose") -> list[Run]:
    """Read all logs of a folder, in the order of the table."""
    runs = [parse_log(path) for path in sorted((root / folder).glob("*.txt"))]
    keys = ("optimizer", "device", "world_size", "seed")
    return sorted(runs, key=lambda run: [run.meta[key] for key in keys])


COLUMNS = (  # of a table of runs
    "optimizer",
    "GPUs",
    "seed",
    "loss at 250",
    "at 375",
    "at 500",
    "final (step)",
    "steps to target (interpolated)",
    "train time (s)",
    "ms per step",
    "tokens/s",
    "log",
)
TIMES = COLUMNS[8:11]  # they mean nothing for runs that shared their GPUs
RESULTS = [COLUMNS[place] for place in (0, 1, 6, 7, 9, 11)]  # for the README


def prose_table(
    root: Path, folder="records/prose", page="records/prose", columns: Sequence[str] = COLUMNS
) -> str:
    """Return a table with one row per log, crashed runs included; links are relative to `page`."""
    command = f"python train_gpt.py --preset prose --log {folder}/NAME.txt"
    rows = [_prose_row(run, root / page) for run in prose_runs(root, folder)]
    places = [COLUMNS.index(title) for title in columns]
    rows = [[row[place] for place in places] for row in rows]
    return markdown(list(columns), rows) if rows else f"not measured yet: run `{command}`\n"


def _prose_row(run: Run, page: Path) -> list[str]:
    meta, last, goal = run.meta, run.points[-1], run.meta["config"]["target"]
    final = f"{last.val_loss:.5f} ({last.step})"
    header, (row,) = run_table([Group(run.name, [run])], goal or None)  # as show prints them
    # the column "step at 3.42 (interpolated)" comes after the column "step" and replaces it here
    shown = {title.partition(" at ")[0]: cell for title, cell in zip(header, row, strict=True)}
    steps = "-" if not goal else f"{shown['step']} to {goal:.6g}"
    if goal and run.crossing(goal) is None:
        steps = f"{goal:.6g} not reached"
    name = look(meta["optimizer"])[0] + (", FP8" if meta["config"].get("fp8") else "")
    return [
        name,
        gpus(meta),
        str(meta["seed"]),
        *(number(run.loss_at(step), ".5f") for step in (250, 375, 500)),
        final if run.status == "complete" else f"{final}, {run.status}",
        steps,
        f"{last.train_time_s:.3f}",
        shown["ms per step"],
        shown["tokens/s"],
        f"[log]({run.path.relative_to(page).as_posix()})",
    ]


def leaderboard(root: Path) -> str:
    """Return a row per record: those that pass the rule first, sorted by steps, then by loss."""
    rows = []
    for path in root.glob("records/*/*/record.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            order = (not record["passes"], record["steps"], record["mean_loss"], path)
            rows.append((order, _record_row(record, path.parent.relative_to(root / "records"))))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: found no record ({error!r}), expected what pack wrote; run "
                f"python -m records verify {path.parent}"
            ) from error
    header = [
        "track",
        "steps",
        "mean loss",
        "sd",
        "n",
        "target",
        "statistic",
        "passes",
        "optimizer",
        "what",
        "date",
        "record",
    ]
    table = markdown(header, [row for _, row in sorted(rows)])
    return table if rows else "no record yet: run `python -m records pack FOLDER --name NAME`\n"


def _record_row(record: dict, folder: Path) -> list[str]:
    return [
        folder.parent.name,
        f"{record['steps']}",
        f"{record['mean_loss']:.5f}",
        number(record["sd"], ".5f"),
        f"{record['n']}",
        f"{record['target']:.6g}",
        f"{record['statistic']:.5f}",
        "yes" if record["passes"] else "no",
        look(record["optimizer"])[0],
        record["what"] or "-",
        record["date"],
        f"[{record['name']}]({folder.as_posix()}/README.md)",
    ]


def prose_groups(root: Path) -> str:
    """Return a row per group of complete prose runs that differ only in their seeds."""
    runs = [run for run in prose_runs(root) if run.status == "complete"]
    rows = []
    for label, group in group_runs(runs).items():
        seeds, losses = [run.seed for run in group], [run.final.val_loss for run in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"records/prose: {label} has seeds {sorted(seeds)}, expected each "
                "once; keep one log of each"
            )
        crossings = [run.crossing(run.meta["config"]["target"]) for run in group]
        steps = "-" if None in crossings else number(fmean(c.exact_step for c in crossings), ".1f")
        rows.append(
            [
                label,
                f"{len(group)}",
                ", ".join(map(str, sorted(seeds))),
                f"{fmean(losses):.5f}",
                f"{stdev(losses):.5f}" if len(losses) > 1 else "-",
                steps,
                f"{fmean(run.final.step_avg_ms for run in group):.2f}",
            ]
        )
    header = ["runs", "n", "seeds", "mean final loss", "sd", "mean steps to target", "ms per step"]
    return markdown(header, rows) if rows else "not measured yet\n"


# Folders of records/prose, each with a table
FOLDERS = ("family", "fp8", "gluon", "gpus", "resumed", "techniques", "tune")
PAGES = {
    "README.md": ("bench_trainer", "results"),
    "docs/optimizers.md": ("parity", "polar"),
    "records/bench/README.md": ("growth", "kernels", "ranks", "slot", "starts", "trainer"),
    "records/README.md": ("leaderboard", "prose_groups"),
    "records/prose/README.md": ("apart", "neurons", "prose", "versions", *FOLDERS),
}
TABLES = {
    "results": partial(prose_table, page="", columns=RESULTS),
    "prose": prose_table,
    "apart": partial(gaps_table, pairs=APART),
    "versions": partial(gaps_table, pairs=VERSIONS),
    "neurons": neurons_table,
    "leaderboard": leaderboard,
    "prose_groups": prose_groups,
}
TABLES |= benches.TABLES
TABLES |= {name: partial(prose_table, folder=f"records/prose/{name}") for name in FOLDERS}
UNTIMED = [title for title in COLUMNS if title not in TIMES]
TABLES["gpus"] = partial(TABLES["gpus"], columns=UNTIMED)


def fill_tables(text: str, root: Path, page: str = "README.md") -> str:
    """Return the text of a page with a new table between each pair of markers."""
    names = sorted(block[2] for block in BLOCK.finditer(text))
    if names != sorted(PAGES[page]):
        raise ValueError(
            f"{page}: found whole pairs of markers for {names}, expected one for each of "
            f"{sorted(PAGES[page])}; see the top of records/pages.py"
        )
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]](root) + block[3], text)


def check(root: Path, pages: Iterable[str] = PAGES) -> None:
    """Raise ValueError at the first line of a page that differs from the data."""
    for page in pages:
        text = (root / page).read_text(encoding="utf-8")
        pairs = zip_longest(text.split("\n"), fill_tables(text, root, page).split("\n"))
        for place, (found, expected) in enumerate(pairs, 1):
            if found != expected:
                raise ValueError(
                    f"{page} line {place}: found '{found}', expected '{expected}'; "
                    "run python -m records.pages"
                )


def write(root: Path) -> None:
    """Write the tables and, if there is a complete run, records/prose/curves.png."""
    texts = {page: (root / page).read_text(encoding="utf-8") for page in PAGES}
    texts = {page: fill_tables(text, root, page) for page, text in texts.items()}
    for page, text in texts.items():
        (root / page).write_text(text, encoding="utf-8", newline="\n")
    if runs := [run for run in prose_runs(root) if run.status == "complete"]:
        from records.plot import draw_loss  # imported here: tables need no matplotlib

        picture = rendered(draw_loss(group_runs(runs), runs[0].meta["config"]["target"]), "png")
        (root / "records/prose/curves.png").write_bytes(picture)


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(prog="python -m records.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    try:
        (check if parser.parse_args(argv).check else write)(root)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
