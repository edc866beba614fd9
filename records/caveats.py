"""What a reader has to know before believing a comparison of groups of runs."""

from collections import Counter
from hashlib import sha256

from records.groups import Group
from records.run import FREE, Run
from records.show import hardware
from records.stats import TARGET, extended_until_passed


def check_repeats(groups: list[Group]) -> None:
    """ValueError where one run counts twice: n would be larger than what was measured."""
    seen: dict[tuple, str] = {}
    for one in groups:
        for each in one.runs:
            curve, name = tuple(point[:4] for point in each.points), f"{one.name}/{each.name}"
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
    seeds = [each.seed for each in one.runs if each.seed is not None]
    again = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    return ", ".join(f"{seeds.count(seed)} runs of seed {seed}" for seed in again)


def warnings(sized: list[tuple[Group, int]], target: float) -> list[str]:
    """One sentence each; the groups come with the step at which they are read."""
    found = []
    for one, step in sized:
        runs = sorted(one.runs, key=lambda each: (each.seed is None, each.seed or 0))
        if extended_until_passed([each.loss_at(step) for each in runs], target):
            found.append(
                f"{one.name}: the rule holds for {len(runs)} runs and not for the first "
                f"{len(runs) - 1}; if n was extended until it held, p is larger"
            )
        if again := same_seeds(one):
            found.append(f"{one.name} counts {again}")
        for status, count in Counter(each.status for each in one.runs).items():
            if status != "complete":
                found.append(f"{one.name}: {count} of {len(one.runs)} runs: {status}")
    groups = [one for one, _ in sized]
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
    """Settings, planned steps and code that are not the same in all runs that state them."""
    values: dict[str, dict[str, list[str]]] = {}
    for one in groups:
        for each in one.runs:
            for key, value in _stated(each).items():
                seen = values.setdefault(key, {}).setdefault(one.name, [])
                seen += [] if value in seen else [value]
    return [
        f"{key} " + ", ".join(f"{' and '.join(seen)} ({name})" for name, seen in by.items())
        for key, by in values.items()
        if len({value for seen in by.values() for value in seen}) > 1
    ]


def _unknown(groups: list[Group]) -> str:
    """Of which groups the log does not say everything: nobody can count where they differ."""
    names = [one.name for one in groups if any("config" not in each.meta for each in one.runs)]
    kinds = [{*_stated(each)} & {"code", "code (md5)"} for one in groups for each in one.runs]
    verb = "settings of" if set.intersection(*kinds) else "settings and code of"
    return f"{verb} {', '.join(names)} are not known" if names else ""


def _stated(each: Run) -> dict[str, str]:
    config = each.meta.get("config", {})
    stated = {key: f"{value}" for key, value in config.items() if key not in {*FREE, "steps"}}
    stated["planned steps"] = f"{config.get('steps', each.total_steps)}"
    stated["scored metric"] = each.metric
    stated |= {key: f"{each.meta[key]}" for key in ("torch", "method") if key in each.meta}
    code = each.meta.get("code_sha256") or (
        sha256(each.script.encode()).hexdigest() if each.script else ""
    )
    for kind, value in (("code", code), ("code (md5)", each.meta.get("source_md5"))):
        stated |= {kind: value[:7]} if value else {}
    for one in each.optim["groups"] if each.optim else []:
        stated |= {
            f"{one['name']}.{key}": f"{value}"
            for key, value in one.items()
            if key not in ("name", "optimizer", "initial_lr")
        }
    return stated
