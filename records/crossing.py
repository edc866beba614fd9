"""Find the validation that first reaches a target, and the point where the loss crosses it.

The trainer's log and the readers share this module: standard library only, so that `flatten` can
copy it into a log.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Crossing(NamedTuple):
    """The first validation at or below a target, and where a line from the one before crosses it.

    The exact values are nan unless the validation before it is finite and above the target.
    """

    step: int
    seconds: float
    exact_step: float
    exact_seconds: float

    @property
    def point(self) -> tuple[float, float]:
        """Return the exact step and seconds, or those of the validation where these are nan."""
        return self[:2] if math.isnan(self.exact_step) else self[2:]


def crossing(points: Sequence[tuple[int, float, float]], target: float) -> Crossing | None:
    """Interpolate between (step, loss, seconds) points; None if no loss reaches the target."""
    index = next((i for i, (_, loss, _) in enumerate(points) if loss <= target), None)
    if index is None:
        return None
    (step0, loss0, seconds0), (step, loss, seconds) = points[max(index - 1, 0)], points[index]
    if not (math.isfinite(loss0) and loss0 > target):
        return Crossing(step, seconds, math.nan, math.nan)
    part = (loss0 - target) / (loss0 - loss)
    exact = step0 + part * (step - step0), seconds0 + part * (seconds - seconds0)
    return Crossing(step, seconds, *exact)
