"""Read logs into `Run`s: ours (the grammar is here) and public ones (records/upstream.py).

    script | rule | environment and `meta: {json}` | rule | `step:...` and `word: {json}` lines

A rule is a line of 100 '='. Results are looked for below the last one only: the embedded script
is full of f-strings that look like results. The writer in train_gpt.py is the definition.
"""

import json
import re
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path

from records.run import Point, Run, line_error
from records.upstream import LOOKS_SCORED, public_runs

FORMAT = 1
RULE = "=" * 100
STEP = re.compile(
    r"step:(\d{1,15})/(\d{1,15}) val_loss:(\d{1,30}\.\d+|-?inf|nan) "
    r"train_time:(\d{1,15}\.\d+)s step_avg:(\d{1,15}\.\d+|nan)ms"
)
NUMBER, MISSING = (int, float), type(None)
REQUIRED = {  # the words we know and the keys that readers rely on, with their types
    "meta": {
        "format": int,
        "optimizer": str,
        "seed": int,
        "world_size": int,
        "device": str,
        "config": dict,
    },
    "optim": {"step": int, "groups": list},
    "target": {"loss": NUMBER, "step": int, "crossing_step": NUMBER},
    "end": {"status": str},
}
OPTIONAL = {  # the same of what may be missing
    "meta": {"torch": str, "code_sha256": str},
    "config": {"target": (*NUMBER, MISSING), "steps": int, "batch_tokens": int},
    "groups": {"name": str},
}


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs of files and folders; a folder counts *.txt and *.log at any depth, in order.

    Of a folder with record.json, also of one inside, only the files count that its "logs" names.
    """
    return [run for path in paths for file in log_files(path) for run in parse_runs(file)]


def log_files(path: str | Path) -> list[Path]:
    """The logs of a folder, or the one file itself; ValueError where there is none."""
    path = Path(path)
    found = [path] if path.is_file() else list(_logs_in(path)) if path.is_dir() else []
    if not found:
        what = "no *.txt or *.log in" if path.is_dir() else "nothing at"
        raise ValueError(f"found {what} {path}, expected a log or a folder of logs; name another")
    return found


def _logs_in(folder: Path) -> Iterator[Path]:
    record = folder / "record.json"
    if record.is_file():
        try:
            names = [str(folder / name) for name in json.loads(record.read_text("utf-8"))["logs"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{record}: found no list "logs" ({error!r}), expected the names of '
                "the logs that count; write them"
            ) from None
        if missing := [name for name in names if not Path(name).is_file()]:
            raise ValueError(
                f"{record}: found no {missing[0]}, expected each of its logs; restore it"
            )
        yield from map(Path, names)
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from _logs_in(child)
        elif child.suffix in (".txt", ".log"):
            yield child


def parse_runs(path: str | Path) -> list[Run]:
    """All trials of one log, ours or a public one; ValueError with file and line."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rules = [
        number for number, line in enumerate(lines, 1) if line[:1] == "=" and line.rstrip() == RULE
    ]
    header = lines[rules[0] : rules[-1]] if rules else []
    if len(rules) > 1 and any(line.startswith("meta: {") for line in header):
        return [parse_log(path)]
    return public_runs(path, lines, rules)


def parse_log(path: str | Path) -> Run:
    """Read one log; ValueError with file and line for whatever does not follow the grammar."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rules = [number for number, line in enumerate(lines, 1) if line == RULE]
    if len(rules) < 2:
        found = f"the end after {len(rules)} lines of 100 '='"
        raise line_error(path, len(lines), found, "2 of them")
    meta = _json_lines(path, lines[: rules[1]], rules[0]).get("meta", [{"format": "missing"}])[-1]
    body = _json_lines(path, lines, rules[1])
    if meta["format"] != FORMAT:
        raise line_error(path, rules[1], f"meta: format {meta['format']}", f"{FORMAT}")
    script = "".join(f"{line}\n" for line in lines[: rules[0] - 1])
    optim, target, end = (body.pop(word, [None])[-1] for word in ("optim", "target", "end"))
    return Run(path, script, meta, _points(path, lines, rules[1]), optim, target, end, body)


def _json_lines(path: Path, lines: list[str], start: int) -> dict[str, list[dict]]:
    """All `word: {json}` lines by word; any other text passes, tracebacks and warnings included."""
    found: dict[str, list[dict]] = {}
    for number, line in enumerate(lines[start:], start + 1):
        word, _, text = line.partition(":")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # a number of 5000 digits is a ValueError
            value = None
        keys = REQUIRED.get(word, {})
        if isinstance(value, dict) and all(key in value for key in keys):
            if wrong := _wrong_type(word, value):
                raise line_error(path, number, f"{word} with {wrong}", "a value of its type")
            found.setdefault(word, []).append(value)
        elif word in REQUIRED:
            wanted = f"a JSON object with {', '.join(keys)}"
            raise line_error(path, number, f"'{line[:80]}'", wanted)
    return found


def _wrong_type(word: str, value: dict) -> str:
    """The first key with a value of another type than readers rely on; numbers are finite."""
    types = REQUIRED.get(word, {}) | {
        key: kind for key, kind in OPTIONAL.get(word, {}).items() if key in value
    }
    for key, kind in types.items():
        one = value[key]
        if (
            not isinstance(one, kind)
            or isinstance(one, bool)
            or isinstance(one, float)
            and not isfinite(one)
        ):
            return f"{key} {json.dumps(one)[:60]}"
    if word == "optim":
        wrong = [
            each
            for each in value["groups"]
            if not isinstance(each, dict) or "name" not in each or _wrong_type("groups", each)
        ]
        return f"a group {json.dumps(wrong[0])[:60]}" if wrong else ""
    return _wrong_type("config", value["config"]) if word == "meta" else ""


def _points(path: Path, lines: list[str], start: int) -> list[Point]:
    points: list[Point] = []
    for number, line in enumerate(lines[start:], start + 1):
        if "val_loss" not in line or not LOOKS_SCORED.search(line):
            continue
        match = STEP.fullmatch(line)
        if match is None:
            raise line_error(path, number, f"'{line[:80]}'", "a whole step: line")
        point = Point(int(match[1]), int(match[2]), *map(float, match.groups()[2:]))
        if points and point.step <= points[-1].step:
            raise line_error(path, number, f"step {point.step}", f"one above {points[-1].step}")
        if point.step > point.total_steps:
            raise line_error(path, number, f"step {point.step} of {point.total_steps}", "no more")
        if points and point.train_time_s < points[-1].train_time_s:
            raise line_error(
                path,
                number,
                f"train_time {point.train_time_s:g} s",
                f"{points[-1].train_time_s:g} s or more, as before",
            )
        points.append(point)
    if not points:
        found = "the end without any step: line"
        raise line_error(path, len(lines), found, "at least one validation")
    return points
