"""Parse one log of train_gpt.py into a `Run`.

    script | rule | environment and `meta: {json}` | rule | `step:...` and `word: {json}` lines

A rule is a line of 100 '='. Results are looked for below the second one only: the embedded script
is full of f-strings that look like results. The writer in train_gpt.py is the definition.
"""

import json
import re
from dataclasses import dataclass
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
    """One validation."""
    step: int
    total_steps: int
    val_loss: float
    train_time_s: float
    step_avg_ms: float  # nan at step 0


@dataclass(frozen=True)
class Run:
    """One trial. Where optim, target or end are repeated, the last line counts."""
    path: Path
    script: str
    meta: dict
    points: list[Point]
    optim: dict | None
    target: dict | None
    end: dict | None
    extra: dict[str, list[dict]]

    @property
    def status(self) -> str:
        """What the end line says; a log without one belongs to a run that crashed."""
        return "crashed" if self.end is None else self.end["status"]

    def loss_at(self, step: int) -> float | None:
        """Validation loss at exactly this step, None where there was no validation."""
        return next((point.val_loss for point in self.points if point.step == step), None)


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
