"""Parse one log of train_gpt.py into a `Run`.

    script | rule | environment and `meta: {json}` | rule | `step:...` and `word: {json}` lines

A rule is a line of 100 '='. Results are looked for below the second one only: the embedded script
is full of f-strings that look like results. The writer in train_gpt.py is the definition.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, isnan
from pathlib import Path
from typing import NamedTuple

FORMAT = 1
RULE = "=" * 100
STEP = re.compile(r"step:(\d+)/(\d+) val_loss:(\d+\.\d+|-?inf|nan) train_time:(\d+\.\d+)s "
                  r"step_avg:(\d+\.\d+|nan)ms")
REQUIRED = {  # the words we know and the keys that readers rely on
    "meta": ("format", "optimizer", "seed", "world_size", "device", "config"),
    "optim": ("step", "groups"),
    "target": ("loss", "step", "crossing_step"),
    "end": ("status",),
}


class Point(NamedTuple):
    """One validation. Public logs may lack the time; they are then nan."""
    step: int
    total_steps: int
    val_loss: float  # the scored loss, see Run.metric
    train_time_s: float
    step_avg_ms: float  # nan at step 0


class Crossing(NamedTuple):
    """The first validation at or below a target; the other two on the line from the one before."""
    step: int
    seconds: float
    exact_step: float
    exact_seconds: float


@dataclass(frozen=True)
class Run:
    """One trial. Where optim, target or end are repeated, the last line counts.

    Of a public log, meta holds only what the log says (device, world_size, seed, torch), optim and
    target are None, and end is None unless the last planned step was reached.
    """
    path: Path
    script: str
    meta: dict
    points: list[Point]
    optim: dict | None
    target: dict | None
    end: dict | None
    extra: dict[str, list[dict]]
    trial: int = 0  # in its file
    metric: str = "val_loss"  # the name under which the scored loss stands in the log

    @property
    def name(self) -> str:
        """The file's stem, with #trial where a file holds several."""
        return f"{self.path.stem}#{self.trial}" if self.trial else self.path.stem

    @property
    def status(self) -> str:
        """What the end line says; a log without one belongs to a run that crashed."""
        return "crashed" if self.end is None else self.end["status"]

    @property
    def seed(self) -> int | None:
        return self.meta.get("seed")

    @property
    def total_steps(self) -> int:
        """Planned, not reached."""
        return self.points[-1].total_steps

    @property
    def final(self) -> Point:
        return self.points[-1]

    @property
    def best(self) -> Point:
        """The smallest loss; a NaN is never the best one."""
        return min(self.points, key=lambda point: (isnan(point.val_loss), point.val_loss))

    def loss_at(self, step: int) -> float | None:
        """Scored loss at exactly this step, None where there was no validation."""
        return next((point.val_loss for point in self.points if point.step == step), None)

    def crossing(self, target: float) -> Crossing | None:
        """None where no validation is at or below the target."""
        before = None
        for point in self.points:
            if point.val_loss <= target:
                break
            before = point
        else:
            return None
        part = 1.0  # of the way from the validation before, where that one exists
        if before is not None and isfinite(before.val_loss):
            part = (before.val_loss - target) / (before.val_loss - point.val_loss)
        before = before or point
        exact = (a + part * (b - a) for a, b in ((before.step, point.step),
                                                 (before.train_time_s, point.train_time_s)))
        return Crossing(point.step, point.train_time_s, *exact)


def parse_log(path: str | Path) -> Run:
    """Read one log; ValueError with file and line for whatever does not follow the grammar."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rules = [number for number, line in enumerate(lines, 1) if line == RULE]
    if len(rules) < 2:
        raise _error(path, len(lines), f"the end after {len(rules)} lines of 100 '='", "2 of them")
    meta = _json_lines(path, lines[:rules[1]], rules[0]).get("meta", [{"format": "missing"}])[-1]
    body = _json_lines(path, lines, rules[1])
    if meta["format"] != FORMAT:
        raise _error(path, rules[1], f"meta: format {meta['format']}", f"{FORMAT}")
    script = "".join(f"{line}\n" for line in lines[:rules[0] - 1])
    optim, target, end = (body.pop(word, [None])[-1] for word in ("optim", "target", "end"))
    return Run(path, script, meta, _points(path, lines, rules[1]), optim, target, end, body)


def parse_runs(path: str | Path) -> list[Run]:
    """All trials of one log, ours or a public one; ValueError with file and line."""
    return [parse_log(path)]


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs of files and folders; a folder counts *.txt and *.log at any depth, in order.

    Where a folder holds record.json, only the files count that its "logs" names.
    """
    return [run for path in paths for file in log_files(path) for run in parse_runs(file)]


def log_files(path: str | Path) -> list[Path]:
    """The logs of a folder, or the one file itself; ValueError where there is none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / "record.json").is_file():
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        return [path / name for name in record["logs"]]
    found = sorted(file for kind in ("*.txt", "*.log") for file in path.rglob(kind))
    if not found:
        raise ValueError(f"{path}: found no *.txt or *.log, expected logs; name their folder")
    return found


def _json_lines(path: Path, lines: list[str], start: int) -> dict[str, list[dict]]:
    """All `word: {json}` lines by word; any other text passes, tracebacks and warnings included."""
    found: dict[str, list[dict]] = {}
    for number, line in enumerate(lines[start:], start + 1):
        word, _, text = line.partition(":")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = None
        keys = REQUIRED.get(word, ())
        if isinstance(value, dict) and all(key in value for key in keys):
            found.setdefault(word, []).append(value)
        elif word in REQUIRED:
            raise _error(path, number, f"'{line[:80]}'", f"a JSON object with {', '.join(keys)}")
    return found


def _points(path: Path, lines: list[str], start: int) -> list[Point]:
    points: list[Point] = []
    for number, line in enumerate(lines[start:], start + 1):
        if not line.startswith("step:") or " val_loss:" not in line:
            continue
        match = STEP.fullmatch(line)
        if match is None:
            raise _error(path, number, f"'{line[:80]}'", "a whole step: line")
        point = Point(int(match[1]), int(match[2]), *map(float, match.groups()[2:]))
        if points and point.step <= points[-1].step:
            raise _error(path, number, f"step {point.step}", f"one above {points[-1].step}")
        points.append(point)
    if not points:
        raise _error(path, len(lines), "the end without any step: line", "at least one validation")
    return points


def _error(path: Path, line: int, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} line {line}: found {found}, expected {expected}; mend or drop it")
