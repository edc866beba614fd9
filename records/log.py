"""Read logs into `Run`s: ours by the grammar below, public ones by records/upstream.py.

    script | rule | environment and `meta: {json}` | rule | `step:...` and `word: {json}` lines

A rule is a line of 100 '='. Results stand below the last rule only: the embedded script is full of
f-strings that look like results. records/writer.py writes these logs for the trainer.
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
REQUIRED = {  # the words that we know, and the keys that readers rely on with their types
    "meta": {
        "format": int,
        "optimizer": str,
        "seed": int,
        "world_size": int,
        "device": str,
        "config": dict,
    },
    "optim": {"step": int, "groups": list},
    "train": {"step": int, "lr": dict},
    "target": {"loss": NUMBER, "step": int, "crossing_step": NUMBER},
    "end": {"status": str},
}
OPTIONAL = {  # the types of keys that may be missing
    "meta": {"torch": str, "code_sha256": str, "free": list, "kernels": dict},
    "config": {"target": (*NUMBER, MISSING), "steps": int, "batch_tokens": int},
    "groups": {"name": str},
}


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read the runs of files and of folders, which are searched for *.txt and *.log at any depth.

    In a folder with record.json, at any depth, only the files that its "logs" names count.
    """
    return [run for path in paths for file in log_files(path) for run in parse_runs(file)]


def log_files(path: str | Path) -> list[Path]:
    """Return the logs of a folder, or the one file itself; ValueError if there is none."""
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
    """Read all trials of one log, ours or a public one; ValueError names the file and the line."""
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
    """Read one of our logs; ValueError names the file and the line that breaks the grammar."""
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
    """Collect the `word: {json}` lines by word. Other text is ignored: tracebacks, warnings."""
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
    """Describe the first value of a type that readers do not expect; numbers must be finite."""
    types = REQUIRED.get(word, {}) | {
        key: expected for key, expected in OPTIONAL.get(word, {}).items() if key in value
    }
    for key, expected in types.items():
        found = value[key]
        if (
            not isinstance(found, expected)
            or isinstance(found, bool)
            or isinstance(found, float)
            and not isfinite(found)
        ):
            return f"{key} {json.dumps(found)[:60]}"
    if word == "optim":
        wrong = [
            group
            for group in value["groups"]
            if not isinstance(group, dict) or "name" not in group or _wrong_type("groups", group)
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
