"""Schedules: the factor of a hyperparameter in each step of a run, and plans made of them."""

import math
from collections.abc import Callable

from .averages import WeightAverage

Schedule = Callable[[int, int], float]  # (step, steps) -> factor of a hyperparameter; step from 0
SHAPES = "linear", "cosine"  # of the fall, before the power


def trapezoid(
    warmup: int = 0,
    cooldown: float = 0.7,
    shape: str = "linear",
    power: float = 1.0,
    floor: float = 0.0,
) -> Schedule:
    """Return a factor that rises, stays 1, and falls in the last steps.

        rise (step + 1) / warmup, at most 1;   x = (1 - step/steps) / cooldown, at most 1
        factor = rise (floor + (1 - floor) shape(x)^power),   cosine(x) = (1 - cos(pi x)) / 2

    Args:
        warmup: steps of the rise; 0: none.
        cooldown: share of all steps in which the factor falls; 0: it stays.
        shape: of SHAPES.
        power: exponent of the shape.
        floor: the factor at the end of the run, 0 to 1.

    Raises ValueError for values outside these ranges.
    """
    ranges = dict(warmup=(warmup, math.inf), cooldown=(cooldown, 1), floor=(floor, 1))
    for name, (value, most) in ranges.items():
        if not 0 <= value <= most:
            raise ValueError(f"schedule.{name} is {value}, expected 0 to {most}")
    if shape not in SHAPES:
        raise ValueError(f"schedule.shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    if not 0 < power < math.inf:
        raise ValueError(f"schedule.power is {power}, expected more than 0")

    def factor(step: int, steps: int) -> float:
        x = min(1.0, (1 - step / steps) / cooldown) if cooldown else 1.0
        x = 0.5 - 0.5 * math.cos(math.pi * x) if shape == "cosine" else x
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return rise * (floor + (1 - floor) * x**power)

    return factor


def ramp(start: float, length: int) -> Schedule:
    """Return a factor that rises linearly from `start` to 1 over the first `length` steps."""
    if not (0 <= start <= 1 and length >= 1):
        raise ValueError(
            f"ramp from {start} over {length} steps, expected 0 to 1 over 1 step or more"
        )
    return lambda step, steps: start + (1 - start) * min(1.0, step / length)


def planned(
    steps: int,
    *,
    momentum_steps: int = 0,
    momentum_start: float = 0.9,
    clip: float = 0.0,
    average: float = 0.0,
    average_from: float = 0.0,
    **rate: object,
) -> dict:
    """Return arguments of ModelOptimizer: schedules, clip and the techniques around all weights.

    Args:
        steps: of the run.
        momentum_steps: in which the matrices' momentum rises to its value; 0: it is constant.
        momentum_start: the share of it in the first step.
        clip: the largest gradient norm; 0: any.
        average: steps that an average of the weights spans, with which the model is validated; 0:
            none.
        average_from: share of the steps after which it begins.
        rate: arguments of `trapezoid`, for the learning rate.
    """
    schedules, around = dict(lr=trapezoid(**rate)), []
    if momentum_steps:
        schedules["momentum"] = ramp(momentum_start, momentum_steps)
    if average:
        around = [WeightAverage(average, round(average_from * steps))]
    return dict(schedules=schedules, around=around, clip=clip)
