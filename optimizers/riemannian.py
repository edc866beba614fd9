"""Riemannian Aurora's direction: the orthogonal, row-even matrix furthest along the momentum.

Aurora's update meets both constraints, but others go further along the momentum. This one climbs
tr(X^T U) over all U (m x n, m > n) with orthonormal columns and rows of norm sqrt(n/m), by
projected gradient steps from U = polar(X):

    B = sym(U^T X),  P = U U^T,  q = diag(X U^T) - diag(U B U^T)
    lam solves (diag(P P) - P * P) lam = q        by conjugate gradients; P * P elementwise
    Z = X - U (B - U^T diag(lam) U) - diag(lam) U        X in the tangent space of both constraints
    U <- retract(U + eta Z)        rows to sqrt(n/m), then the polar factor, retractions times

Z has the units of X, so X enters with the norm of U, sqrt(n): the result does not depend on its
scale. diag(P P) holds the row sums of P * P, which makes the operator the Laplacian of a graph:
positive semidefinite for any U; q sums to 0, so it has no part in the null space. For orthonormal U
diag(P P) is diag(P); with gram6's singular values, 0.1% off 1, diag(P) had negative curvature, and
lam came out as 1e28. The authors' release has a shifted constant instead, takes X at its own scale,
and crashes for m != n.

Source: arXiv 2606.27715, aurora-release src/riemannian_aurora.py. FLOPs: 1 + climbs x retractions
polar factors (7), climbs x cg_steps products with P * P (60) at 4 m n^2, 12 m n^2 more for each
climb: 12 times Muon's in all for a 4x MLP with quintic12.
"""

import torch
from torch import Tensor

from .balance import Balance
from .gram import length
from .polar import Polar, polar


def row_dot(A: Tensor, B: Tensor) -> Tensor:
    """Return diag(A B^T) in float32 or better: (k, m, n) twice -> (k, m, 1)."""
    wide = torch.promote_types(A.dtype, torch.float32)
    return (A.to(wide) * B).sum(dim=-1, keepdim=True)


def solve_laplacian(U: Tensor, q: Tensor, steps: int) -> Tensor:
    """Return (diag(P P) - P * P)^+ q for U (k, m, n), q (k, m, 1) of sum 0; P is not formed."""
    diagonal = row_dot(U @ (U.mT @ U), U)
    lam, r, p = torch.zeros_like(q), q, q
    rr = r.square().sum(dim=-2, keepdim=True)
    solved = torch.finfo(q.dtype).eps ** 2 * rr  # beyond it the quotients are rounding errors
    flat = max(1e-6, torch.finfo(U.dtype).eps)  # less curvature is rounding, too
    for _ in range(steps):
        Ap = diagonal * p - row_dot(U @ (U.mT @ (p.to(U.dtype) * U)), U)
        curvature, scale = ((p * v).sum(dim=-2, keepdim=True) for v in (Ap, diagonal * p))
        alpha = torch.where((rr > solved) & (curvature > flat * scale), rr / curvature, 0)
        lam, r = lam + alpha * p, r - alpha * Ap
        before, rr = rr, r.square().sum(dim=-2, keepdim=True)
        p = r + torch.where(before > solved, rr / before, 0) * p
    return lam


def retract(U: Tensor, times: int, method: str, dtype: torch.dtype) -> Tensor:
    """Return U moved towards both constraints: equal rows, then orthonormal columns, in turn."""
    for _ in range(times):
        norms = U.norm(dim=-1, keepdim=True)
        U = polar(U * torch.where(norms > 0, 1 / norms, 0), method, dtype).to(U.dtype)
    return U


def climb(
    X: Tensor, U: Tensor, step_size: float | Tensor, cg_steps: int, dtype: torch.dtype
) -> Tensor:
    """Return U after a step along X in its tangent space; all (k, m, n), matmuls in `dtype`."""
    low, x = U.to(dtype), X.to(dtype)
    B = low.mT @ x
    B = (B + B.mT) / 2
    q = row_dot(x, low) - row_dot(low @ B, low)
    lam = solve_laplacian(low, (q - q.mean(dim=-2, keepdim=True)).to(X.dtype), cg_steps)
    S = B - low.mT @ (lam.to(dtype) * low)
    return U + step_size * (X - (low @ S).to(X.dtype) - lam * U)


class Climb(Balance):
    """U <- Riemannian Aurora's direction for MLP matrices, the polar factor of others.

    Hyperparameters: those of Polar; balance as in Balance; climbs, step_size (eta), cg_steps of
    each climb and retractions after it. `polar` is quintic12: where few rows are connected, lam is
    a ratio of two small numbers and needs U^T U = I. With gram6, rows of 1e-15 to 1e5 reversed it.
    """

    defaults = Polar.defaults | dict(
        polar="quintic12", balance="both", climbs=3, step_size=0.1, cg_steps=20, retractions=2
    )
    least = {}
    worth_compiling = False  # 60 steps of conjugate gradients in a row

    def even(self, X: Tensor, group: dict) -> Tensor:
        method, dtype = group["polar"], group["dtype"]
        if X.size(-1) == 1:  # only signs meet both constraints: those of X go furthest
            return X.sign() / X.size(-2) ** 0.5
        X = X / length(X).clamp_min(torch.finfo(X.dtype).tiny) * X.size(-1) ** 0.5
        U = polar(X, method, dtype).to(X.dtype)
        for _ in range(group["climbs"]):
            U = climb(X, U, group["step_size"], group["cg_steps"], dtype)
            U = retract(U, group["retractions"], method, dtype)
        return U

    def polar_factors(self, group: dict) -> float:
        products = 4 * group["cg_steps"] + 12  # times m n^2; a polar factor has 54 m n^2 at 4x
        return 1 + group["climbs"] * (group["retractions"] + products / 54)
