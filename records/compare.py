"""Compare groups of runs: means, the rules of track 3, Welch's t-test and the paired t-test.

A group is a log, a folder, a glob or track_3#N. It is read at --step; without that, at its claimed
step or at the last step that all its runs share. The loss there must be finite. `compare A B` says
A against B: gains of A are positive. With one run each, it gives the difference and no verdict.
"""

from argparse import ArgumentParser, Namespace
from itertools import combinations
from math import isnan

from records.caveats import check_repeats, same_seeds, warnings
from records.groups import Group, group, target_of
from records.show import hardware
from records.stats import (
    SIGMA,
    Difference,
    Summary,
    paired,
    pairwise,
    precision,
    summary,
    welch,
)
from records.table import number, p_value, say

Sized = list[tuple[Group, int]]  # each group with the step at which it is read


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("groups", nargs="+", help="a log, a folder, a 'glob' or track_3#N")
    parser.add_argument("--step", type=int, help="read all groups at this step")
    parser.add_argument("--target", type=float, help="the loss to reach (default: the logs' own)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")


def run(args: Namespace) -> None:
    groups = [group(name) for name in args.groups]
    target = target_of(groups, args.target)
    if target is None:
        raise ValueError(
            "found no target in these logs, expected the loss that runs have to "
            "reach; name it with --target"
        )
    check_repeats(groups)
    sized = [(one, one.last_step() if args.step is None else args.step) for one in groups]
    say(*loss_table(sized, target), args.markdown)
    say(*target_table(groups, target), args.markdown)
    if len(groups) > 1:
        say(*against_table(sized, target), args.markdown)
    for warning in warnings(sized, target):
        print(f"warning: {warning}")


def loss_table(sized: Sized, target: float) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row per group: its mean loss and the precision rule."""
    header = [
        "group",
        "step",
        "n",
        "mean loss",
        "sd",
        "95% t interval",
        f"({target:g} - mean) sqrt(n)",
        "rule",
        f"p (sigma {SIGMA})",
        "p (Student's t)",
    ]
    rows = []
    for one, step in sized:
        losses = one.losses(step)
        found, official = summary(losses), precision(losses, target)
        rows.append(
            [
                one.name,
                f"{step}",
                f"{found.n}",
                f"{found.mean:.5f}",
                number(found.sd, ".5f"),
                interval(found, ".5f"),
                f"{official.statistic:.5f}",
                "passes" if official.passes else "fails",
                p_value(official.p),
                p_value(official.p_t),
            ]
        )
    return header, rows


def target_table(groups: list[Group], target: float) -> tuple[list[str], list[list[str]]]:
    """Return the mean of the interpolated crossings of each group.

    A group has no mean unless every run was seen to cross: leaving runs out would select them.
    """
    header = [
        "group",
        f"runs that reach {target:g}",
        "steps to it",
        "95% t interval",
        "seconds to it",
        "95% t interval",
    ]
    rows = []
    for one in groups:
        reached = sum(run.crossing(target) is not None for run in one.runs)
        cells = [one.name, f"{reached} of {len(one.runs)}"]
        for field, form in ((2, ".1f"), (3, ".2f")):
            values = _crossings(one, target, field)
            whole = summary(values) if len(values) == len(one.runs) else None
            cells += [number(whole and whole.mean, form), interval(whole, form) if whole else "-"]
        rows.append(cells)
    return header, rows


def _crossings(one: Group, target: float, field: int) -> list[float]:
    """Return the exact steps (field 2) or seconds (field 3) of all crossings that were seen."""
    found = [crossing[field] for run in one.runs if (crossing := run.crossing(target))]
    return [value for value in found if not isnan(value)]


def against_table(sized: Sized, target: float) -> tuple[list[str], list[list[str]]]:
    """Return a row per pair, in the order given: each group against those that come after it."""
    header, rows = pair_table(sized[::-1], target)
    return header, rows[::-1]


def pair_table(sized: Sized, target: float) -> tuple[list[str], list[list[str]]]:
    """Return a row per pair of an old group and a new one, which comes later in `sized`.

    Differences are old - new, so the new group's gains are positive. Pairs of single runs get no
    verdict: the rule assumes how far runs scatter, and two runs cannot show that it holds.
    """
    header = [
        "new against old",
        "loss gained",
        "Welch p",
        "pairwise rule",
        "better",
        "p",
        "steps gained",
        "seconds gained",
        "same seeds",
        "loss gained, paired",
        "paired p",
        "steps gained, paired",
    ]
    rows = []
    for (old, old_step), (new, new_step) in combinations(sized, 2):
        a, b = old.losses(old_step), new.losses(new_step)
        test, rule = welch(a, b), pairwise(a, old_step, b, new_step)
        verdict = [f"{rule.statistic:.5f}", "yes" if rule.passes else "not shown", p_value(rule.p)]
        both = paired(_by_seed(old, a), _by_seed(new, b))
        steps = paired(_crossed_by_seed(old, target), _crossed_by_seed(new, target))
        gained = [_gain(old, new, target, field, form) for field, form in ((2, ".1f"), (3, ".2f"))]
        if len({hardware(run) for run in (*old.runs, *new.runs)}) > 1:
            gained[1] = "-"  # seconds of different hardware do not compare
        rows.append(
            [
                f"{new.name} against {old.name}",
                _with_interval(test, ".5f"),
                p_value(test.p),
                *(verdict if max(len(a), len(b)) > 1 else ["-"] * len(verdict)),
                *gained,
                f"{both.n}" if both else "-",
                _with_interval(both, ".5f") if both else "-",
                p_value(both.p) if both else "-",
                _with_interval(steps, ".1f") if steps else "-",
            ]
        )
    return header, rows


def _gain(old: Group, new: Group, target: float, field: int, form: str) -> str:
    a, b = _crossings(old, target, field), _crossings(new, target, field)
    if len(a) < len(old.runs) or len(b) < len(new.runs):
        return "-"
    return _with_interval(welch(a, b), form)


def _with_interval(test: Difference, form: str) -> str:
    return f"{test.difference:{form}} {interval(test, form)}".removesuffix(" -")


def _by_seed(one: Group, losses: list[float]) -> dict[int, float]:
    """Map seeds to losses; empty if several runs share a seed."""
    seeds = {} if same_seeds(one) else dict(zip((r.seed for r in one.runs), losses, strict=True))
    return {seed: loss for seed, loss in seeds.items() if seed is not None}


def _crossed_by_seed(one: Group, target: float) -> dict[int, float]:
    """Map seeds to exact steps; empty unless every run crosses."""
    steps = _crossings(one, target, 2)
    return _by_seed(one, steps) if len(steps) == len(one.runs) else {}


def interval(found: Summary | Difference, form: str) -> str:
    return "-" if isnan(found.low) else f"[{found.low:{form}}, {found.high:{form}}]"
