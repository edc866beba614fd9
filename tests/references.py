"""The six optimizers once more, for tests: numpy in float64, one matrix, exact polar factors.

Written from the papers' formulas (as the docstrings of optimizers/ state them), slowly and without
sharing code with optimizers/: SVDs for polar factors, dense P * P and a pseudo-inverse in place of
conjugate gradients. `run` makes whole steps: momentum, direction, scale, decay. `problem` is what
tests/test_parity.py and tools/exactness.py run both sides on.
"""

from collections.abc import Callable

import numpy as np

DEFAULTS = {  # what the optimizers' files promise, typed in again
    "adamw": dict(weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-10),
    "muon": dict(weight_decay=0.05, momentum=0.95),
    "normuon": dict(weight_decay=0.05, momentum=0.95, beta2=0.95),
    "unormuon": dict(weight_decay=0.05, momentum=0.95, beta2=0.95),
    "aurora": dict(weight_decay=0.05, momentum=0.95, rounds=2, exponent=0.5),
    "riemannian": dict(weight_decay=0.05, momentum=0.95, climbs=3, step_size=0.1, retractions=2),
}


def run(
    name: str,
    weight: np.ndarray,
    grads: list[np.ndarray],
    lrs: list[float],
    neurons: int | None = None,
    **changed: float,
) -> list[np.ndarray]:
    """The weights after each step. neurons: axis along which aurora and riemannian balance."""
    how = DEFAULTS[name] | changed
    W, decay = np.array(weight, dtype=np.float64), how.pop("weight_decay")
    if name == "adamw":
        steps = adamw(grads, **how)
    else:
        mu = how.pop("momentum")
        steps = directions(name, momenta(grads, mu), neurons, how)
        if name != "unormuon":
            steps = [max(1, W.shape[0] / W.shape[1]) ** 0.5 * U for U in steps]
    found = []
    for lr, U in zip(lrs, steps, strict=True):
        W = W - lr * decay * W
        W = W - lr * U
        found.append(W)
    return found


def problem(
    shape: tuple[int, int], steps: int = 50, seed: int = 0
) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    """Weights; gradients of changing size with log-normal long-side vectors; changing lr."""
    rng = np.random.default_rng([seed, *shape])
    side = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    weight = rng.standard_normal(shape)
    grads = [
        rng.standard_normal(shape) * np.exp(rng.standard_normal(side)) * 10 ** rng.uniform(-1, 1)
        for _ in range(steps)
    ]
    lrs = [0.1 * (1 - t / (steps + 10)) * (0.5 + 0.5 * (t % 3)) for t in range(steps)]
    return weight, grads, lrs


def adamw(grads: list[np.ndarray], beta1: float, beta2: float, eps: float) -> list[np.ndarray]:
    """Kingma and Ba's algorithm 1, the fraction only."""
    m, v, steps = 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        steps.append(m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps))
    return steps


def momenta(grads: list[np.ndarray], mu: float) -> list[np.ndarray]:
    """Nesterov's: what enters the polar factor."""
    M, found = np.zeros_like(grads[0]), []
    for G in grads:
        M = mu * M + (1 - mu) * G
        found.append((1 - mu) * G + mu * M)
    return found


def directions(
    name: str, inputs: list[np.ndarray], neurons: int | None, how: dict
) -> list[np.ndarray]:
    if name == "muon":
        return [polar(X) for X in inputs]
    if name in ("normuon", "unormuon"):
        return normuon(inputs, **how)
    even: Callable = {"aurora": aurora, "riemannian": riemannian}[name]
    m, n = inputs[0].shape
    if neurons == 0 and m > n:
        return [even(X, **how) for X in inputs]
    if neurons == 1 and n > m:
        return [even(X.T, **how).T for X in inputs]
    return [polar(X) for X in inputs]


def polar(X: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return U @ Vh


def normuon(inputs: list[np.ndarray], beta2: float) -> list[np.ndarray]:
    v, found = np.zeros(inputs[0].shape[0]), []
    for X in inputs:
        U = polar(X)
        v = beta2 * v + (1 - beta2) * np.mean(U * U, axis=1)
        even = U / np.sqrt(v)[:, None]
        found.append(even * np.linalg.norm(U) / np.linalg.norm(even))
    return found


def aurora(X: np.ndarray, rounds: int, exponent: float) -> np.ndarray:
    """The released code with exact polar factors; X is tall."""
    m, n = X.shape
    d = 1 / np.linalg.norm(X, axis=1)
    for _ in range(rounds - 1):
        U = polar(d[:, None] * X)
        d = d * (n / m / np.sum(U * U, axis=1)) ** exponent
    return polar(d[:, None] * X)


def riemannian(X: np.ndarray, climbs: int, step_size: float, retractions: int) -> np.ndarray:
    """Projected ascent of tr(X^T U); the system for lam is solved exactly. X is tall."""
    m, n = X.shape
    X = X * np.sqrt(n) / np.linalg.norm(X)
    U = polar(X)
    for _ in range(climbs):
        P = U @ U.T
        B = (U.T @ X + X.T @ U) / 2
        q = np.diag(X @ U.T) - np.diag(U @ B @ U.T)
        laplacian = np.diag(np.diag(P)) - P * P  # constants are its null space: cut off, not 1/0
        lam = np.linalg.pinv(laplacian, rcond=1e-9, hermitian=True) @ q
        U = U + step_size * (X - U @ (B - U.T @ np.diag(lam) @ U) - np.diag(lam) @ U)
        for _ in range(retractions):
            U = polar(U * np.sqrt(n / m) / np.linalg.norm(U, axis=1)[:, None])
    return U
