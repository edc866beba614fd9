"""Read the published leaderboard of track 3: each entry with its runs and its claims.

The tables hold facts of the public repository, see records/published/README.md. `track_3#36` names
an entry. Only runs with the role "evidence" count; ablations, duplicates and the like do not.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import nan
from pathlib import Path

from records.run import Point, Run

PUBLISHED = Path(__file__).resolve().parent / "published"
ENTRY = re.compile(r"track_3#(\d+)")
TARGET = 3.28


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard. Claimed values are those printed there."""

    number: int
    steps: int
    mean_loss: float
    n: int
    record: bool
    method: str
    date: str
    runs: list[Run]
    readme_losses: list[float]  # at the claimed step, of runs without a log upstream

    @property
    def label(self) -> str:
        return f"track_3#{self.number}"

    @property
    def losses(self) -> list[float]:
        """Return the scored loss of each run at the claimed step, from the logs."""
        losses = [run.loss_at(self.steps) for run in self.runs]
        return [loss for loss in losses if loss is not None]


def entry(name: str) -> Entry:
    """Return the entry that a name like track_3#36 means; ValueError if there is none."""
    entries, match = track_3(), ENTRY.fullmatch(name)
    if match is None or int(match[1]) not in entries:
        raise ValueError(
            f"found no entry {name}, expected track_3#1 to track_3#{max(entries)}; "
            "see python -m records show track_3"
        )
    return entries[int(match[1])]


@cache
def track_3() -> dict[int, Entry]:
    """Return all entries by number, in the order of the table."""
    scored = {row["entry"]: row["claim_field"] for row in _rows("results")}
    points, methods = _points(scored), {row["entry"]: row["method"] for row in _rows("results")}
    runs: dict[int, list[Run]] = {}
    for row in _rows("runs"):
        if row["role"] == "evidence":
            runs.setdefault(int(row["entry"]), []).append(
                _run(
                    row,
                    points[row["entry"], row["run"]],
                    scored[row["entry"]],
                    methods[row["entry"]],
                )
            )
    notes: dict[tuple[int, int], list[float]] = {}
    for row in _rows("readme_only"):
        key = int(row["entry"]), int(row["step"])
        notes.setdefault(key, []).append(float(row["val_loss"]))
    entries = {}
    for row in _rows("results"):
        number, steps = int(row["entry"]), int(row["steps"])
        entries[number] = Entry(
            number,
            steps,
            float(row["mean_loss"]),
            int(row["n"]),
            row["record"] == "1",
            row["method"],
            row["date"],
            runs.get(number, []),
            notes.get((number, steps), []),
        )
    return entries


def _rows(table: str) -> Iterator[dict[str, str]]:
    with (PUBLISHED / f"track_3_{table}.tsv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")


def _points(scored: dict[str, str]) -> dict[tuple[str, str], list[Point]]:
    points: dict[tuple[str, str], list[Point]] = {}
    for row in _rows("curves"):
        if loss := row[scored[row["entry"]]]:
            time = float(row["train_time_s"]) if row["train_time_s"] else nan
            points.setdefault((row["entry"], row["run"]), []).append(
                Point(int(row["step"]), int(row["total_steps"]), float(loss), time, nan)
            )
    return points


def _run(row: dict[str, str], points: list[Point], metric: str, method: str) -> Run:
    known = {"seed": row["seed"], "world_size": row["world_size"]}
    meta: dict = {key: int(value) for key, value in known.items() if value}
    meta |= {
        key: value
        for key, value in (
            ("device", row["gpu"]),
            ("torch", row["torch"]),
            ("source_md5", row["source_md5"]),
            ("method", method),
        )
        if value
    }
    last, total = int(row["last_step"]), int(row["total_steps"])
    status = "complete" if last == total else f"ends at step {last} of {total}"
    return Run(
        Path(row["file"]),
        "",
        meta,
        points,
        None,
        None,
        {"status": status},
        {},
        int(row["trial"]),
        metric,
    )
