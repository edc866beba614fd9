"""Hold the contents of a log as a `Run` with its validations. records/log.py reads them."""

from dataclasses import dataclass
from math import isnan
from pathlib import Path
from time import time
from typing import Any, NamedTuple

from records.crossing import Crossing, crossing

# The fields of the config that change no loss, for older logs, whose meta line has no list "free":
# all of records/prose and records/demo, and records/bench/track3_200_8xH200.txt.
OLD_FREE = ("seed", "trials", "log", "data", "wandb", "device", "diagnostics", "checkpoint", "eval")

IDLE = 600  # seconds without a new line, after which a log without an end line is of a dead run


class Point(NamedTuple):
    """One validation. In a public log, planned steps may be missing (0), and so may times (nan)."""

    step: int
    total_steps: int
    val_loss: float  # the scored loss, see Run.metric
    train_time_s: float
    step_avg_ms: float  # as printed: since the start or the last validation; nan at step 0


@dataclass(frozen=True)
class Run:
    """One trial. If lines of optim, target or end are repeated, the last one counts.

    For a public log, meta holds only the facts that the log states (torch, device, world_size,
    seed), optim and target are None, end says how far the run got, and extra["losses"] has the
    losses that are not scored.
    """

    path: Path
    script: str
    meta: dict
    points: list[Point]
    optim: dict | None
    target: dict | None
    end: dict | None
    extra: dict[str, list[dict]]
    trial: int = 0  # its place among the trials of the file
    metric: str = "val_loss"  # the name of the scored loss in the log

    @property
    def name(self) -> str:
        """Return the file's stem, with #trial for all but the first trial."""
        return f"{self.path.stem}#{self.trial}" if self.trial else self.path.stem

    @property
    def status(self) -> str:
        """Return the status of the end line, or "crashed" if there is none: no clock is read."""
        return "crashed" if self.end is None else self.end["status"]

    @property
    def state(self) -> str:
        """Return the status as of now: a run without an end line runs on, or it has stopped.

        It runs if its log changed within the last 10 minutes, or within three times the training
        time between its last two validations.
        """
        if self.end is not None:
            return self.status
        seconds = [point.train_time_s for point in self.points[-2:]]
        patience = max(IDLE, 3 * (seconds[-1] - seconds[0]))
        fresh = self.path.exists() and time() - self.path.stat().st_mtime < patience
        return "running" if fresh else f"stopped at step {self.final.step}"

    @property
    def free(self) -> set[str]:
        """Return the names of the config's fields that change no loss, as the log lists them."""
        return {str(name) for name in self.meta.get("free", OLD_FREE)}

    @property
    def settings(self) -> dict[str, Any]:
        """Return the config without the free fields; a public log has none."""
        config = self.meta.get("config", {})
        return {key: value for key, value in config.items() if key not in self.free}

    @property
    def seed(self) -> int | None:
        return self.meta.get("seed")

    @property
    def total_steps(self) -> int:
        """Return the number of planned steps; 0 if the log does not state it."""
        return self.points[-1].total_steps

    @property
    def final(self) -> Point:
        return self.points[-1]

    @property
    def seconds_per_step(self) -> float | None:
        """Average over this log only: the clock of a resumed run includes its earlier part."""
        first, last = self.points[0], self.points[-1]
        if "resumed" not in self.extra:
            return last.train_time_s / last.step if last.step else None
        steps = last.step - first.step
        return (last.train_time_s - first.train_time_s) / steps if steps else None

    @property
    def best(self) -> Point:
        """Return the validation with the smallest loss, which is never a NaN."""
        return min(self.points, key=lambda point: (isnan(point.val_loss), point.val_loss))

    def loss_at(self, step: int) -> float | None:
        """Return the scored loss at exactly this step; None if there was no validation."""
        return next((point.val_loss for point in self.points if point.step == step), None)

    def crossing(self, target: float) -> Crossing | None:
        """Return the first validation at the target and the point before it; None if none is."""
        points = [(point.step, point.val_loss, point.train_time_s) for point in self.points]
        return crossing(points, target)


def line_error(path: Path, line: int, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} line {line}: found {found}, expected {expected}; mend or drop it")
