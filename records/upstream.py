"""Read the logs of every track of the public repository KellerJordan/modded-nanogpt.

    source | rule | environment | rule | lines step:125/3200 val_loss:4.64419 train_time:66.065s ...

A rule is a line of 100 '='. There are two, one, or none of them (consoles; llm.c: s:250 tel:6.17).
One file may hold several trials, each starting at the first step again.
"""

import re
from collections.abc import Iterator
from math import nan
from pathlib import Path

from records.run import Point, Run, line_error

FIELD = r"[a-z_]+:(?:\d+(?:\.\d+)?|-?inf|nan)(?:ms|s|%)?"
VALIDATION = re.compile(rf"(?:step:(\d+)/(\d+) +(?=.*\bval_)|s:(\d+) (?=tel:))"
                        rf"({FIELD}(?: +{FIELD})*)")
LOOKS_SCORED = re.compile(r"(?:step:.*\bval_\w*loss:|s:\d+ tel:)")
SCORED = ("val_ema_loss", "val_loss", "tel")  # the first of these in a line counts; tel: llm.c
SOURCE = re.compile(r"(?:import|from) \w+(?:$|[. ,])")
FACTS = {  # of a public log, from the lines around its results; kept where there is one value only
    "torch": re.compile(r"Running py ?torch (\S+)", re.IGNORECASE),
    "device": re.compile(r"^(?:Running .*(?: on |device_name=)(.+) with world_size|"
                         r"\|\s+\d+\s+(NVIDIA .+?)\s+(?:On|Off)\s|GPU \d+: (.+) \(UUID)", re.M),
    "world_size": re.compile(r"^Running .* with world_size[ =](\d+)", re.M),
    "seed": re.compile(r"^(?:Using )?seed[=:] ?(\d+)$|--seed[ =](\d+)\b", re.M),
}


def public_runs(path: Path, lines: list[str], rules: list[int]) -> list[Run]:
    """Trials begin where the first step of the file stands again; a repeated line counts once."""
    _check_source(path, lines, rules)
    trials: list[list[tuple[Point, str, dict]]] = []
    facts: list[dict] = []
    above, cut = rules[0] if rules else 0, None
    for number, line in _validations(lines, rules[-1] if rules else 0):
        if number == len(lines) and not line.endswith("ms"):
            cut = number
            continue
        scored = _scored(path, number, line)
        if not trials or scored[0].step == trials[0][0][0].step and trials[-1] != [scored]:
            trials.append([scored])
            facts.append(_facts("\n".join(lines[above:number])))
        elif scored not in trials[-1]:
            _check_follows(path, number, scored, trials[-1][-1])
            trials[-1].append(scored)
        above = number
    if not trials:
        found = "the end without a validation"
        raise line_error(path, len(lines), found, "a line step:N/N val_loss:X")
    script = "".join(f"{line}\n" for line in lines[:rules[0] - 1]) if rules else ""
    shared = {key: value for key, value in facts[0].items() if key != "seed"}
    return [_public_run(path, script, shared | own, trial, points,
                        cut if trial + 1 == len(trials) else None)
            for trial, (own, points) in enumerate(zip(facts, trials, strict=True))]


def _check_source(path: Path, lines: list[str], rules: list[int]) -> None:
    """Results are looked for below the source only, so that its text cannot be taken for them."""
    if not rules and (number := next((n for n, line in enumerate(lines, 1)
                                      if SOURCE.match(line)), 0)):
        raise line_error(path, number, "source code", "a line of 100 '=' between it and results")
    for number in range(rules[0] + 1, rules[-1]) if rules else ():
        if VALIDATION.fullmatch(lines[number - 1].rstrip()):
            raise line_error(path, number, "a result above the last line of '='", "none there")


def _validations(lines: list[str], start: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines[start:], start + 1):
        if ("val_" in line or line[:2] == "s:") and LOOKS_SCORED.match(line):
            yield number, line.rstrip()


def _scored(path: Path, number: int, line: str) -> tuple[Point, str, dict]:
    """The validation, the name of its scored loss, and the other losses of the line."""
    match = VALIDATION.fullmatch(line)
    fields = dict(field.split(":") for field in match[4].split()) if match else {}
    metric = next((name for name in SCORED if name in fields), None)
    if match is None or metric is None:
        wanted = f"a whole validation with one of {', '.join(SCORED)}"
        raise line_error(path, number, f"'{line[:80]}'", wanted)
    step, loss = int(match[1] or match[3]), _number(fields.pop(metric))
    others = {name: _number(text) for name, text in fields.items() if name.startswith("val_")}
    time, average = fields.get("train_time", "nan"), fields.get("step_avg", "nanms")
    seconds = _number(time) / (1000 if time.endswith("ms") else 1)
    point = Point(step, int(match[2] or 0), loss, seconds, _number(average))
    return point, metric, {"step": step, **others} if others else {}


def _number(text: str) -> float:
    text = text.rstrip("ms%")
    return nan if text in ("nan", "") else float(text)  # one object, so that it equals itself


def _check_follows(path: Path, number: int, scored: tuple, before: tuple) -> None:
    (point, metric, _), (last, name, _) = scored, before
    if point.step <= last.step or point.total_steps != last.total_steps or metric != name:
        raise line_error(path, number, f"{metric} at step {point.step}/{point.total_steps} after "
                     f"{name} at {last.step}/{last.total_steps}", "a later step of the same run")


def _facts(text: str) -> dict:
    found = {key: {next(filter(None, groups)) for groups in
                   (match.groups() for match in pattern.finditer(text))}
             for key, pattern in FACTS.items()}
    single = {key: values.pop() for key, values in found.items() if len(values) == 1}
    return {key: int(value) if value.isdigit() else value for key, value in single.items()}


def _public_run(path: Path, script: str, meta: dict, trial: int, scored: list[tuple],
                cut: int | None) -> Run:
    points, last = [point for point, _, _ in scored], scored[-1][0]
    status = f"ends at step {last.step} of {last.total_steps or 'an unknown number'}"
    if last.step == last.total_steps:
        status = "complete"
    elif cut is not None:
        status = f"cut off in line {cut}, after step {last.step} of {last.total_steps}"
    losses = [others for _, _, others in scored if others]
    return Run(path, script, meta, points, None, None, {"status": status},
               {"losses": losses} if losses else {}, trial, scored[0][1])
