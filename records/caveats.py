"""Collect the caveats of a comparison between groups of runs."""

from collections import Counter
from hashlib import sha256

from records.groups import Group
from records.run import Run
from records.show import hardware
from records.stats import TARGET, extended_until_passed


def check_repeats(groups: list[Group]) -> None:
    """Raise ValueError if one run counts twice, which would inflate n."""
    seen: dict[tuple, str] = {}
    for one in groups:
        for run in one.runs:
            curve, name = tuple(point[:4] for point in run.points), f"{one.name}/{run.name}"
            if curve in seen:
                raise ValueError(
                    f"found the same run twice: {seen[curve]} and {name}, expected "
                    "different runs; drop one of them"
                )
            seen[curve] = name
        if (again := same_seeds(one)) and not one.published:
            raise ValueError(
                f"{one.name}: found {again}, expected a seed of its own for each run; "
                "drop the repeats"
            )


def same_seeds(one: Group) -> str:
    """Return which seeds several runs of a group share; empty if none do."""
    seeds = [run.seed for run in one.runs if run.seed is not None]
    again = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    return ", ".join(f"{seeds.count(seed)} runs of seed {seed}" for seed in again)


def warnings(sized: list[tuple[Group, int]], target: float) -> list[str]:
    """Return one sentence per caveat; each group comes with the step at which it is read."""
    found = []
    for one, step in sized:
        runs = sorted(one.runs, key=lambda run: (run.seed is None, run.seed or 0))
        if extended_until_passed([run.loss_at(step) for run in runs], target):
            found.append(
                f"{one.name}: the rule holds for {len(runs)} runs and not for the first "
                f"{len(runs) - 1}; if n was extended until it held, p is larger"
            )
        if again := same_seeds(one):
            found.append(f"{one.name} counts {again}")
        for state, count in Counter(run.state for run in one.runs).items():
            if state != "complete":
                found.append(f"{one.name}: {count} of {len(one.runs)} runs: {state}")
    groups = [one for one, _ in sized]
    single = [one.name for one in groups if len(one.runs) == 1]
    if len(single) > 1:
        found.append(
            f"{', '.join(single)}: one run each, so their differences have no verdict; "
            "train more seeds"
        )
    machines = {one.name: " and ".join(sorted({*map(hardware, one.runs)})) for one in groups}
    if len({*machines.values()}) > 1 or any(" and " in name for name in machines.values()):
        listed = "; ".join(f"{name} on {where}" for name, where in machines.items())
        found.append(f"hardware differs, seconds do not compare: {listed}")
    things, unknown = differences(groups), _unknown(groups)
    if unknown and (things or len(groups) > 1):
        found.append(f"{unknown}{'; seen to differ: ' if things else ''}{'; '.join(things)}")
    elif things:
        count = "one thing" if len(things) == 1 else f"{len(things)} things"
        found.append(f"the runs differ in {count}: {'; '.join(things)}")
    if target != TARGET:
        found.append(
            f"the rule assumes a sigma measured at {TARGET} on FineWeb, this target is "
            f"{target:g}: go by Student's t"
        )
    return found


def differences(groups: list[Group]) -> list[str]:
    """List the settings, versions and code in which the runs that state them differ."""
    values: dict[str, dict[str, list[str]]] = {}
    for one in groups:
        for run in one.runs:
            for key, value in _stated(run).items():
                seen = values.setdefault(key, {}).setdefault(one.name, [])
                seen += [] if value in seen else [value]
    return [
        f"{key} " + ", ".join(f"{' and '.join(seen)} ({name})" for name, seen in by.items())
        for key, by in values.items()
        if len({value for seen in by.values() for value in seen}) > 1
    ]


def _unknown(groups: list[Group]) -> str:
    """Name the groups whose logs lack settings or code: their differences cannot be counted."""
    names = [one.name for one in groups if any("config" not in run.meta for run in one.runs)]
    codes = [{*_stated(run)} & {"code", "code (md5)"} for one in groups for run in one.runs]
    verb = "settings of" if set.intersection(*codes) else "settings and code of"
    return f"{verb} {', '.join(names)} are not known" if names else ""


def _stated(run: Run) -> dict[str, str]:
    """Return the facts of a run that its log states and that a comparison wants to be equal."""
    stated = {key: f"{value}" for key, value in run.settings.items()}
    stated["planned steps"] = stated.pop("steps", f"{run.total_steps}")
    stated["scored metric"] = run.metric
    stated |= {key: f"{run.meta[key]}" for key in ("torch", "method") if key in run.meta}
    kernels = run.meta.get("kernels", {})  # which ones ran, for example {"trunk": "plain PyTorch"}
    stated |= {f"{part} kernels": f"{ran}" for part, ran in kernels.items()}
    code = run.meta.get("code_sha256") or (
        sha256(run.script.encode()).hexdigest() if run.script else ""
    )
    for code_name, value in (("code", code), ("code (md5)", run.meta.get("source_md5"))):
        stated |= {code_name: value[:7]} if value else {}
    for one in run.optim["groups"] if run.optim else []:
        stated |= {
            f"{one['name']}.{key}": f"{value}"
            for key, value in one.items()
            if key not in ("name", "optimizer", "initial_lr")
        }
    return stated
