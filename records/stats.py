"""Compute statistics of losses: the rules of modded-nanogpt's track 3, and the usual tests.

The precision rule for n runs of mean m and a target T is (T - m) * sqrt(n) >= 0.004. It is a
one-sided z-test with an assumed sigma of 0.0013 per run; 0.004 is z = 3.077, p = 0.00105. We print
Student's t with the measured sigma beside it: 0.0013 is too large for Muon, too small for AdamW.
"""

from collections.abc import Mapping, Sequence
from math import nan, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats

TARGET = 3.28
SIGMA = 0.0013  # the rules assume this standard deviation of a run's loss
PRECISION = 0.004
LOSS_PER_STEP = 0.0045 / 100  # the loss that a step is worth, between runs with their own schedules
TOLERANCE = 1e-9  # (3.28 - 3.278) * sqrt(4) is 0.0039999999999995595 and a pass


class Summary(NamedTuple):
    """Sample sd and Student's t interval of the mean; nan if there is only one value."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


class Precision(NamedTuple):
    """The official statistic with its z and p (sigma 0.0013), and Student's t with its p."""

    statistic: float
    passes: bool
    z: float
    p: float
    t: float
    p_t: float


class Pairwise(NamedTuple):
    """The official statistic for "new is better than old", its verdict and its one-sided p."""

    statistic: float
    passes: bool
    p: float


class Difference(NamedTuple):
    """mean(a) - mean(b), its t interval, t, degrees of freedom and two-sided p."""

    n: int
    difference: float
    low: float
    high: float
    t: float
    df: float
    p: float


def summary(values: Sequence[float], confidence: float = 0.95) -> Summary:
    n, mean = len(values), fmean(values)
    if n < 2:
        return Summary(n, mean, nan, nan, nan)
    sd = stdev(values)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def precision(losses: Sequence[float], target: float = TARGET) -> Precision:
    """Apply the rule for a valid result. It assumes that nobody selected the runs."""
    n, mean, sd, _, _ = summary(losses)
    statistic = (target - mean) * sqrt(n)
    t = statistic / sd if sd > 0 else nan
    return Precision(
        statistic,
        statistic >= PRECISION - TOLERANCE,
        statistic / SIGMA,
        float(stats.norm.sf(statistic / SIGMA)),
        t,
        float(stats.t.sf(t, n - 1)),
    )


def extended_until_passed(losses: Sequence[float], target: float = TARGET) -> bool:
    """True if the rule holds for all runs, but not without the last one."""
    return (
        len(losses) > 1
        and precision(losses, target).passes
        and not precision(losses[:-1], target).passes
    )


def pairwise(old: Sequence[float], old_step: int, new: Sequence[float], new_step: int) -> Pairwise:
    """Apply the rule for calling new better than old, to the losses at their claimed steps."""
    loss_gain = summary(old).mean - summary(new).mean
    step_gain = LOSS_PER_STEP * (old_step - new_step)
    statistic = (loss_gain + step_gain) / sqrt(1 / len(old) + 1 / len(new))
    return Pairwise(
        statistic, statistic >= PRECISION - TOLERANCE, float(stats.norm.sf(statistic / SIGMA))
    )


def welch(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """Compare the means of two independent groups by Welch's t; nan if a group has one run."""
    difference = summary(a).mean - summary(b).mean
    if min(len(a), len(b)) < 2 or len({*a}) == len({*b}) == 1:
        return Difference(len(a) + len(b), difference, nan, nan, nan, nan, nan)
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(confidence)
    return Difference(
        len(a) + len(b), difference, *map(float, (low, high, test.statistic, test.df, test.pvalue))
    )


def paired(
    a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95
) -> Difference | None:
    """Compare two groups, paired by common seeds; None if there are fewer than two."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return None
    gaps = [a[seed] - b[seed] for seed in seeds]
    n, mean, sd, low, high = summary(gaps, confidence)
    t = mean * sqrt(n) / sd if sd > 0 else nan
    return Difference(n, mean, low, high, t, n - 1, 2 * float(stats.t.sf(abs(t), n - 1)))
