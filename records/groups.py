"""Find the runs that a command's argument names: a file, a folder, a glob or track_3#N."""

from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from math import isfinite
from pathlib import Path

from records.log import read_runs
from records.published import TARGET, entry
from records.run import Run


@dataclass(frozen=True)
class Group:
    """Runs that count as repeats of one setup. A published entry has a claimed step."""

    name: str
    runs: list[Run]
    step: int | None = None
    published: bool = False

    def losses(self, step: int) -> list[float]:
        """Return the scored loss of every run at this step; ValueError if one is missing or NaN."""
        for run in self.runs:
            loss = run.loss_at(step)
            if loss is None:
                raise ValueError(
                    f"{self.name}: {run.name} has no validation at step {step}, "
                    f"expected one (its last is {run.final.step}); choose another --step"
                )
            if not isfinite(loss):
                raise ValueError(
                    f"{self.name}: found loss {loss} at step {step} of {run.name}, "
                    "expected a number; leave that run out and say so"
                )
        return [run.loss_at(step) for run in self.runs]

    def last_step(self) -> int:
        """Return the claimed step, or the last step at which all runs were validated."""
        shared = set.intersection(*({point.step for point in run.points} for run in self.runs))
        if not shared:
            raise ValueError(
                f"{self.name}: found no step at which all {len(self.runs)} runs were "
                "validated, expected one; compare fewer of them"
            )
        return self.step or max(shared)


def group(name: str) -> Group:
    """Read the runs behind a name, without a folder's trailing /; ValueError if there are none."""
    if not name.strip():
        raise ValueError("found an empty name, expected a log or a folder of logs; name one")
    if name == "track_3" and not Path(name).exists():
        raise ValueError(
            "found track_3, expected one of its entries here; write track_3#46, or "
            "show track_3 alone for all of them"
        )
    if name.startswith("track_") and not Path(name).exists():
        found = entry(name)
        return Group(found.label, found.runs, found.steps, published=True)
    paths = sorted(glob(name, recursive=True)) if any(sign in name for sign in "*?[") else [name]
    if not paths:
        raise ValueError(f"found nothing that matches {name}, expected logs; look into the folder")
    return Group(name.rstrip("/"), read_runs(paths))


def target_of(groups: Iterable[Group], wanted: float | None = None) -> float | None:
    """Return the target of all runs, None if no run has one; ValueError if they disagree."""
    if wanted is not None:
        if not isfinite(wanted):
            raise ValueError(f"found --target {wanted}, expected a loss; write a number like 3.28")
        return wanted
    targets: dict[float, str] = {}
    for one in groups:
        for run in one.runs:
            value = TARGET if one.published else run.meta.get("config", {}).get("target")
            if value:
                targets.setdefault(value, f"{one.name}/{run.name}")
    if len(targets) > 1:
        listed = ", ".join(f"{value:g} ({where})" for value, where in targets.items())
        raise ValueError(f"found mixed targets: {listed}, expected one; name it with --target")
    return next(iter(targets), None)
