"""Contra-Muon: a polar factor minus some of the momentum, which slows down its large directions.

Source: modded-nanogpt's optimizer track, entries #11, #17 (constant share) and #30 (falling share).
"""

import torch
from torch import Tensor

from .size import TINY
from .technique import Technique


def schatten4(X: Tensor) -> Tensor:
    """Return the Schatten-4 norm (k, 1, 1) of each matrix: sqrt(|X X^T|)."""
    X = X if X.size(-2) <= X.size(-1) else X.mT
    return (X @ X.mT).norm(dim=(-2, -1), keepdim=True).sqrt()


def spectral(X: Tensor, rounds: int = 5) -> Tensor:
    """Return an estimate (k, 1, 1) of the largest singular value, by power iteration."""
    v = torch.ones_like(X[..., :1, :]).mT / X.size(-1) ** 0.5
    for _ in range(rounds):
        v = X.mT @ (X @ v)
        v = v / v.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    return (X @ v).norm(dim=(-2, -1), keepdim=True)


class Contra(Technique):
    """X <- X - c U / |U|, at the norm of X = inner(U), a technique such as Polar or Balance.

    Hyperparameters: those of `inner`, and contra (c). With `falling`, norms are Schatten-4 norms,
    as from #30 on, and a schedule lets c fall; else U is divided by its largest singular value and
    the result has X's Frobenius norm, as in #17. FLOPs: of `inner`, and 4 m n^2 with `falling`.
    """

    def __init__(self, inner: Technique, falling: bool = False) -> None:
        self.inner, self.falling = inner, falling
        self.defaults = inner.defaults | dict(contra=0.2)
        self.choices, self.least = inner.choices, inner.least
        self.init, self.cost, self.kernel = inner.init, inner.cost, inner.kernel

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        X = self.inner.before(U, W, state, group).to(W.dtype)
        size = schatten4 if self.falling else spectral
        Y = X - group["contra"] * U / size(U).clamp_min(TINY)
        if self.falling:
            return Y * (schatten4(X) / schatten4(Y).clamp_min(TINY))
        norms = [matrix.norm(dim=(-2, -1), keepdim=True) for matrix in (X, Y)]
        return Y * (norms[0] / norms[1].clamp_min(TINY))
