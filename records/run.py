"""What a log holds: `Run`, its validations, and the one sentence said of a line nobody can read."""

from dataclasses import dataclass
from math import isfinite, isnan, nan
from pathlib import Path
from typing import NamedTuple

# Of a run's config: where it ran and what it wrote, which change no loss.
FREE = {"seed", "trials", "log", "data", "wandb", "device", "diagnostics", "checkpoint", "eval"}


class Point(NamedTuple):
    """One validation. Public logs may lack the number of planned steps (0) and times (nan)."""

    step: int
    total_steps: int
    val_loss: float  # the scored loss, see Run.metric
    train_time_s: float
    step_avg_ms: float  # as printed: since the start, or since the validation before; nan at step 0


class Crossing(NamedTuple):
    """The first validation at or below a target, and where a line from the one before crosses it.

    Where no validation stands above the target before it, the exact values are unknown: nan.
    """

    step: int
    seconds: float
    exact_step: float
    exact_seconds: float


@dataclass(frozen=True)
class Run:
    """One trial. Where optim, target or end are repeated, the last line counts.

    Of a public log, meta holds only what the log says (torch, device, world_size, seed), optim and
    target are None, end says how far it got, and extra["losses"] has the losses not scored.
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
        """The file's stem, with #trial where that is not the first."""
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
        """Planned, not reached; 0 where the log does not say."""
        return self.points[-1].total_steps

    @property
    def final(self) -> Point:
        return self.points[-1]

    @property
    def seconds_per_step(self) -> float | None:
        """Of what this log holds: a resumed run's clock goes on from, perhaps, other GPUs."""
        first, last = self.points[0], self.points[-1]
        if "resumed" not in self.extra:
            return last.train_time_s / last.step if last.step else None
        steps = last.step - first.step
        return (last.train_time_s - first.train_time_s) / steps if steps else None

    @property
    def best(self) -> Point:
        """The smallest loss; a NaN is never the best one."""
        return min(self.points, key=lambda point: (isnan(point.val_loss), point.val_loss))

    def loss_at(self, step: int) -> float | None:
        """Scored loss at exactly this step, None where there was no validation."""
        return next((point.val_loss for point in self.points if point.step == step), None)

    def crossing(self, target: float) -> Crossing | None:
        """None where no validation is at or below the target."""
        index = next((i for i, point in enumerate(self.points) if point.val_loss <= target), None)
        if index is None:
            return None
        after, before = self.points[index], self.points[max(index - 1, 0)]
        if not (isfinite(before.val_loss) and before.val_loss > target):
            return Crossing(after.step, after.train_time_s, nan, nan)
        part = (before.val_loss - target) / (before.val_loss - after.val_loss)
        step = before.step + part * (after.step - before.step)
        seconds = before.train_time_s + part * (after.train_time_s - before.train_time_s)
        return Crossing(after.step, after.train_time_s, step, seconds)


def line_error(path: Path, line: int, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} line {line}: found {found}, expected {expected}; mend or drop it")
