"""Read the logs of every track of the public repository KellerJordan/modded-nanogpt.

    source | rule | environment | rule | lines step:125/3200 val_loss:4.64419 train_time:66.065s ...

A rule is a line of 100 '='. A log has two, one or none: copies of a console have none, and neither
have logs of llm.c (s:250 tel:6.17). A file may hold several trials, which start at the same step.
"""

import re
from collections.abc import Iterator
from math import nan
from pathlib import Path

from records.run import Point, Run, line_error

FIELD = r"[A-Za-z_]\w*:(?:\d{1,30}(?:\.\d{1,30})?|-?inf|nan)(?:ms|s|%)?"
VALIDATION = re.compile(
    rf"(?:step:(\d{{1,15}})/(\d{{1,15}}) +(?=.*\bval_)|s:(\d{{1,15}}) (?=tel:))"
    rf"({FIELD}(?: +{FIELD})*)"
)
LOOKS_SCORED = re.compile(r"step[:= ] ?\d.*\bval_\w*loss\b *[:=]|\bs:\d+ tel:")  # anywhere
PART = re.compile(r"(?:\d*\.?\d*|-?(?:in?f?)?|na?n?)(?:ms?|s|%)?")  # the beginning of a number
SCORED = (
    "val_ema_loss",
    "val_loss",
    "tel",
)  # the first in a line counts; tel is llm.c's
SOURCE = re.compile(r"(?:import|from) \w+(?:$|[. ,])")
FACTS = {  # read from the lines around the results; a fact with several values is dropped
    "torch": re.compile(r"Running py ?torch (\S+)", re.IGNORECASE),
    "device": re.compile(
        r"^(?:Running .*(?: on |device_name=)(.+) with world_size|"
        r"\|\s+\d+\s+(NVIDIA .+?)\s+(?:On|Off)\s|GPU \d+: (.+) \(UUID)",
        re.M,
    ),
    "world_size": re.compile(r"^Running .* with world_size[ =](\d{1,9})", re.M),
    "seed": re.compile(r"^(?:Using )?seed[=:] ?(\d{1,30})$|--seed[ =](\d{1,30})\b", re.M),
}


def public_runs(path: Path, lines: list[str], rules: list[int]) -> list[Run]:
    """Split a public log into its trials: one begins wherever the file's first step comes again.

    A repeated line counts once. Only the last result of a file may be cut off; it does not count,
    and the status says so.
    """
    _check_source(path, lines, rules)
    trials: list[list[tuple[Point, str, dict]]] = []
    facts: list[dict] = []
    above, cut, model, short = rules[0] if rules else 0, None, "", None
    found = [*_validations(lines, rules[-1] if rules else 0)]
    for number, line in found:
        if number == found[-1][0] and _is_cut(line, model):
            cut = number
            continue
        scored = _scored(path, number, line)
        if not trials or scored[0].step == trials[0][0][0].step and trials[-1] != [scored]:
            if short:
                raise short
            trials.append([scored])
            facts.append(_facts("\n".join(lines[above:number])))
            model = max(line, model, key=_decimals) if _shape(line) == _shape(model) else line
        elif scored not in trials[-1]:
            _check_follows(path, number, scored, trials[-1][-1])
            first = trials[-1][0][0].step == 0 and len(trials[-1]) == 1
            if first and {*_shape(model)} < {*_shape(line)}:
                model = line  # some logs lack a field at step 0
            if _shape(line) != _shape(model):
                expected = f"the fields of the first result, '{model[:80]}'"
                raise line_error(path, number, f"'{line[:80]}'", expected)
            trials[-1].append(scored)
        model, short = max(model, line, key=_decimals), None
        if _decimals(line) != _decimals(model):
            short = line_error(path, number, f"'{line[:80]}'", "as many decimals as before")
        if short and line.startswith("step:"):  # these have a fixed number of decimals
            raise short
        above = number
    if not trials:
        raise line_error(
            path, len(lines), "the end without a validation", "a line step:N/N val_loss:X"
        )
    script = "".join(f"{line}\n" for line in lines[: rules[0] - 1]) if rules else ""
    shared = {key: value for key, value in facts[0].items() if key != "seed"}
    cuts = [None] * (len(trials) - 1) + [cut]
    return [
        _public_run(path, script, shared | facts[trial], trial, trials[trial], cuts[trial])
        for trial in range(len(trials))
    ]


def _shape(line: str) -> list[tuple[str, str]]:
    """Return the names and units of a result's fields, without its step."""
    return [
        (name, value[len(value.rstrip("ms%")) :])
        for name, _, value in (field.partition(":") for field in line.split()[1:])
    ]


def _decimals(line: str) -> int:
    """Count the decimals of a last number without a unit: cutting it off leaves a number."""
    field = line.split()[-1]
    return len(field.partition(".")[2]) if field[-1:].isdigit() else 0


def _is_cut(line: str, model: str) -> bool:
    """True if a line begins like the model, a whole result, and ends too early."""
    shape, fields = _shape(model), line.split()[1:]
    if not model:  # the only result of the file
        return bool(VALIDATION.fullmatch(line)) and 0 < _decimals(line) < 4
    if VALIDATION.fullmatch(line) and _shape(line) == shape:
        return _decimals(line) < _decimals(model)
    if not (
        LOOKS_SCORED.match(line)
        and 0 < len(fields) <= len(shape)
        and all(re.fullmatch(FIELD, field) for field in fields[:-1])
    ):
        return False
    name, colon, value = fields[-1].partition(":")
    wanted = shape[len(fields) - 1][0]
    return (
        _shape(line)[:-1] == shape[: len(fields) - 1]
        and PART.fullmatch(value) is not None
        and (name == wanted if colon else wanted.startswith(name))
    )


def _check_source(path: Path, lines: list[str], rules: list[int]) -> None:
    """Raise ValueError if results may stand in the source, or source among the results."""
    if not rules and (
        number := next((n for n, line in enumerate(lines, 1) if SOURCE.match(line)), 0)
    ):
        raise line_error(path, number, "source code", "a line of 100 '=' between it and results")
    for number in range(rules[0] + 1, rules[-1]) if rules else ():
        if VALIDATION.fullmatch(lines[number - 1].rstrip()):
            raise line_error(path, number, "a result above the last line of '='", "none there")


def _validations(lines: list[str], start: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines[start:], start + 1):
        if ("val_" in line or " tel:" in line) and LOOKS_SCORED.search(line):
            yield number, line.rstrip()


def _scored(path: Path, number: int, line: str) -> tuple[Point, str, dict]:
    """Return the validation, the name of its scored loss, and the other losses of the line."""
    match = VALIDATION.fullmatch(line)
    fields = dict(field.split(":") for field in match[4].split()) if match else {}
    metric = next((name for name in SCORED if name in fields), None)
    if match is None or metric is None:
        wanted = f"a whole validation with one of {', '.join(SCORED)}"
        raise line_error(path, number, f"'{line[:80]}'", wanted)
    step, loss = int(match[1] or match[3]), _number(fields.pop(metric))
    others = {name: _number(text) for name, text in fields.items() if name.startswith("val_")}
    time, average = fields.get("train_time", "nan"), fields.get("step_avg", "nanms")
    if not time.endswith("s") and time != "nan" or not average.endswith("s"):
        raise line_error(path, number, f"'{line[:80]}'", "times in s or ms")
    seconds = _number(time) / (1000 if time.endswith("ms") else 1)
    milliseconds = _number(average) * (1 if average.endswith("ms") else 1000)
    point = Point(step, int(match[2] or 0), loss, seconds, milliseconds)
    if match[2] and step > point.total_steps:
        raise line_error(path, number, f"step {step} of {point.total_steps}", "none above the last")
    return point, metric, {"step": step, **others} if others else {}


def _number(text: str) -> float:
    text = text.rstrip("ms%")
    # math.nan is one object, so that tuples of points with it compare equal
    return nan if text in ("nan", "") else float(text)


def _check_follows(path: Path, number: int, scored: tuple, before: tuple) -> None:
    (point, metric, _), (last, name, _) = scored, before
    if point.step <= last.step or point.total_steps != last.total_steps or metric != name:
        raise line_error(
            path,
            number,
            f"{metric} at step {point.step}/{point.total_steps} after "
            f"{name} at {last.step}/{last.total_steps}",
            "a later step of the same run",
        )
    if last.step and point.train_time_s < last.train_time_s:  # some clocks start after step 0
        raise line_error(
            path,
            number,
            f"train_time {point.train_time_s:g} s after {last.train_time_s:g} s",
            "a clock that does not run backwards",
        )


def _facts(text: str) -> dict:
    found = {
        key: {
            next(filter(None, groups))
            for groups in (match.groups() for match in pattern.finditer(text))
        }
        for key, pattern in FACTS.items()
    }
    single = {key: values.pop() for key, values in found.items() if len(values) == 1}
    return {key: int(value) if value.isdigit() else value for key, value in single.items()}


def _public_run(
    path: Path, script: str, meta: dict, trial: int, scored: list[tuple], cut: int | None
) -> Run:
    points, last = [point for point, _, _ in scored], scored[-1][0]
    status = f"ends at step {last.step} of {last.total_steps or 'an unknown number'}"
    if last.step == last.total_steps:
        status = "complete"
    elif cut is not None:
        status = f"cut off in line {cut}, after step {last.step} of {last.total_steps}"
    losses = [others for _, _, others in scored if others]
    return Run(
        path,
        script,
        meta,
        points,
        None,
        None,
        {"status": status},
        {"losses": losses} if losses else {},
        trial,
        scored[0][1],
    )
