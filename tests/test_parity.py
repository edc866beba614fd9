"""Every optimizer against its reference (tests/references.py): 50 steps with changing lr.

Deviations are relative to how far the weights moved, the largest of all steps. What a wrong
formula costs in these units is at the end: at least 0.005 for every hyperparameter and 0.04 for
another optimizer, so that bfloat16 cannot see all that float32 sees.
"""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from references import DEFAULTS, momenta, problem, run

from optimizers import OPTIMIZERS

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
from exactness import PARITY, parity  # noqa: E402

CASES = [(where, *case) for where, cases in PARITY.items() for case in cases]
in_every_shape = pytest.mark.parametrize("where, shape, axis", CASES, ids=str)
CHANGED = {
    "adamw": [dict(beta1=0.8), dict(beta2=0.9), dict(eps=0.1), dict(weight_decay=0.5)],
    "muon": [dict(momentum=0.8), dict(weight_decay=0.5)],
    "normuon": [dict(beta2=0.8), dict(momentum=0.8), dict(weight_decay=0.5)],
    "unormuon": [dict(beta2=0.8), dict(momentum=0.8), dict(weight_decay=0.5)],
    "aurora": [
        dict(rounds=1),
        dict(rounds=3),
        dict(exponent=0.25),
        dict(momentum=0.8),
        dict(weight_decay=0.5),
    ],
    "riemannian": [
        dict(climbs=1),
        dict(step_size=0.4),
        dict(retractions=1),
        dict(momentum=0.8),
        dict(weight_decay=0.5),
    ],
}
changes = [(name, how) for name, some in CHANGED.items() for how in some]


@pytest.mark.parametrize("name", OPTIMIZERS)
@in_every_shape
def test_float64_steps_are_the_references_to_rounding(
    where: str, shape: tuple[int, int], axis: int | None, name: str
) -> None:
    assert parity(name, torch.float64, shape, axis) < 1e-11


@pytest.mark.parametrize("name, how", changes, ids=str)
def test_changed_hyperparameters_are_the_references_too(name: str, how: dict) -> None:
    assert parity(name, torch.float64, (24, 6), 0, **how) < 1e-11


@pytest.mark.parametrize("name", OPTIMIZERS)
@in_every_shape
def test_float32_steps_are_near_the_references(
    where: str, shape: tuple[int, int], axis: int | None, name: str
) -> None:
    """The momentum of a square matrix may be singular beyond the reach of 12 steps: 5%."""
    beyond = where == "square" and name != "adamw"
    assert parity(name, torch.float32, shape, axis) < (0.05 if beyond else 2e-5)


def test_the_square_problem_is_beyond_the_reach_of_twelve_steps() -> None:
    """4.6e-4 of the Frobenius norm (polar.py); without this the square columns could be 2e-5."""
    inputs = momenta(problem((8, 8))[1], 0.95)
    assert min(np.linalg.norm(X, -2) / np.linalg.norm(X) for X in inputs) < 4.6e-4
    for shape in ((24, 6), (9, 8)):
        inputs = momenta(problem(shape)[1], 0.95)
        assert min(np.linalg.norm(X, -2) / np.linalg.norm(X) for X in inputs) > 4.6e-4


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
@in_every_shape
def test_bfloat16_steps_are_near_the_references(
    where: str, shape: tuple[int, int], axis: int | None, name: str
) -> None:
    """Of a square momentum that is nearly singular, see above: 5%."""
    assert parity(name, torch.bfloat16, shape, axis) < (0.05 if where == "square" else 0.015)


@pytest.mark.parametrize("neurons, axis", [(0, 0), (1, 1), (None, None), ("unset", 0)])
@pytest.mark.parametrize("balance", ["fc", "proj", "both"])
@pytest.mark.parametrize("name", ["aurora", "riemannian"])
def test_the_balanced_matrices_are_those_that_group_and_hyperparameter_name(
    name: str, balance: str, neurons: int | str | None, axis: int | None
) -> None:
    """Tall and wide; a group without neuron_axis gets its longer side, whatever that is."""
    for shape in ((12, 4), (4, 12)):
        group = {} if neurons == "unset" else {"neuron_axis": neurons}
        if neurons == "unset":
            axis = int(shape[1] > shape[0])
        if (balance, axis) in (("fc", 1), ("proj", 0)):
            axis = None
        weight, grads, lrs = problem(shape, steps=3)
        p = torch.nn.Parameter(torch.from_numpy(weight.copy()))
        how = dict(polar="exact", dtype=torch.float64, balance=balance)
        opt = OPTIMIZERS[name]([dict(params=[p], **group)], **how)
        for grad, lr in zip(grads, lrs, strict=True):
            opt.param_groups[0]["lr"], p.grad = lr, torch.from_numpy(grad)
            opt.step()
        expected = run(name, weight, grads, lrs, axis)[-1]
        assert apart(weight, expected, p.detach().numpy()) < 1e-11


def apart(start: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a - start))


def test_the_references_have_the_defaults_of_the_optimizers() -> None:
    """Typed in twice on purpose. lr is part of the problem; the rest is precision."""
    precision = {"lr", "polar", "dtype", "balance", "clamp", "cg_steps"}
    for name, kind in OPTIMIZERS.items():
        kept = {key: value for key, value in kind.defaults.items() if key not in precision}
        assert kept == DEFAULTS[name]


def test_the_references_tell_the_optimizers_apart() -> None:
    """Aurora and Riemannian Aurora are the nearest."""
    weight, grads, lrs = problem((24, 6))
    ends = {name: run(name, weight, grads, lrs, 0)[-1] for name in OPTIMIZERS}
    for a, b in combinations(OPTIMIZERS, 2):
        assert apart(weight, ends[a], ends[b]) > 0.04, (a, b)


@pytest.mark.parametrize("name, how", changes, ids=str)
def test_the_references_tell_hyperparameters_apart(name: str, how: dict) -> None:
    weight, grads, lrs = problem((24, 6))
    base, changed = (run(name, weight, grads, lrs, 0, **some)[-1] for some in ({}, how))
    assert apart(weight, base, changed) > 0.005


def test_the_references_use_neurons_and_every_rate() -> None:
    weight, grads, lrs = problem((24, 6))
    for name in OPTIMIZERS:
        base = run(name, weight, grads, lrs, 0)[-1]
        faster = run(name, weight, grads, [1.1 * lr for lr in lrs], 0)[-1]
        assert apart(weight, base, faster) > 0.05
        unaware = apart(weight, base, run(name, weight, grads, lrs, None)[-1])
        assert unaware > 0.1 if name in ("aurora", "riemannian") else unaware == 0
