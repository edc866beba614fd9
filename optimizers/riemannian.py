"""Riemannian Aurora: the orthogonal, row-even matrix that goes furthest along the momentum.

Aurora's update is feasible, not the best: this one climbs tr(X^T U) over all U (m x n, m > n) with
orthonormal columns and rows of norm sqrt(n/m), by projected gradient steps from U = polar(X):

    B = sym(U^T X),  P = U U^T,  q = diag(X U^T) - diag(U B U^T)
    lam solves (diag(P) - P * P) lam = q        by conjugate gradients; P * P elementwise
    Z = X - U (B - U^T diag(lam) U) - diag(lam) U        X in the tangent space of both constraints
    U <- retract(U + eta Z)        rows to sqrt(n/m), then the polar factor, retractions times

Z has the units of X, so X enters with the norm of U, sqrt(n): then scale does not matter. diag(P) -
P * P is the exact operator, the Laplacian of a graph: positive semidefinite for any U, and q has no
part in its null space, as its sum is 0. The authors' release has a shifted constant in place of
diag(P), takes X at its own scale, and crashes for m != n.

Source: arXiv 2606.27715, aurora-release src/riemannian_aurora.py, as described in aurora.md 1.5.
Memory: Muon's. FLOPs: 1 + climbs x retractions polar factors (7), climbs x cg_steps products with
P * P (60) at 4 m n^2, 8 m n^2 more for each climb: 12 times Muon's in all at 4x.
"""

import torch
from torch import Tensor

from .aurora import Aurora
from .gram import unit_max
from .muon import Muon
from .polar import polar


def row_dot(A: Tensor, B: Tensor) -> Tensor:
    """diag(A B^T) in float32 or better: (k, m, n) twice -> (k, m, 1)."""
    wide = torch.promote_types(A.dtype, torch.float32)
    return (A.to(wide) * B).sum(dim=-1, keepdim=True)


def solve_laplacian(U: Tensor, q: Tensor, steps: int) -> Tensor:
    """(diag(P) - P * P)^+ q, P = U U^T never formed; U (k, m, n), q (k, m, 1) of sum 0."""
    diagonal, lam, r, p = row_dot(U, U), torch.zeros_like(q), q, q
    rr = r.square().sum(dim=-2, keepdim=True)
    solved = torch.finfo(q.dtype).eps ** 2 * rr  # beyond it the quotients are of rounding errors
    flat = max(1e-6, torch.finfo(U.dtype).eps)  # less curvature than that is rounding, too
    for _ in range(steps):
        Ap = diagonal * p - row_dot(U @ (U.mT @ (p.to(U.dtype) * U)), U)
        curvature, scale = ((p * v).sum(dim=-2, keepdim=True) for v in (Ap, diagonal * p))
        alpha = torch.where((rr > solved) & (curvature > flat * scale), rr / curvature, 0)
        lam, r = lam + alpha * p, r - alpha * Ap
        before, rr = rr, r.square().sum(dim=-2, keepdim=True)
        p = r + torch.where(before > solved, rr / before, 0) * p
    return lam


def retract(U: Tensor, times: int, method: str, dtype: torch.dtype) -> Tensor:
    """Towards both constraints: rows of one length, then orthonormal columns, in turn."""
    for _ in range(times):
        norms = U.norm(dim=-1, keepdim=True)
        U = polar(U * torch.where(norms > 0, 1 / norms, 0), method, dtype).to(U.dtype)
    return U


def climb(X: Tensor, U: Tensor, step_size: float | Tensor, cg_steps: int, dtype: torch.dtype):
    """U plus a step along X in the tangent space at U; all (k, m, n), products in `dtype`."""
    low, x = U.to(dtype), X.to(dtype)
    B = low.mT @ x
    B = (B + B.mT) / 2
    q = row_dot(x, low) - row_dot(low @ B, low)
    lam = solve_laplacian(low, (q - q.mean(dim=-2, keepdim=True)).to(X.dtype), cg_steps)
    S = B - low.mT @ (lam.to(dtype) * low)
    return U + step_size * (X - (low @ S).to(X.dtype) - lam * U)


class RiemannianAurora(Aurora):
    """Aurora by climbing.

    Hyperparameters: Muon's and Aurora's balance; climbs, step_size (eta), cg_steps of each climb
    and retractions after it.
    """

    defaults = Muon.defaults | dict(
        balance="both", climbs=3, step_size=0.1, cg_steps=20, retractions=2
    )
    worth_compiling = False  # 60 steps of conjugate gradients in a row

    def even(self, X: Tensor, group: dict) -> Tensor:
        X, how = unit_max(X), (group["polar"], group["dtype"])
        tiny = torch.finfo(X.dtype).tiny
        X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny) * X.size(-1) ** 0.5
        U = polar(X, *how).to(X.dtype)
        for _ in range(group["climbs"]):
            U = climb(X, U, group["step_size"], group["cg_steps"], group["dtype"])
            U = retract(U, group["retractions"], *how)
        return U

    def polar_factors(self, group: dict) -> float:
        products = 4 * group["cg_steps"] + 8  # times m n^2; a polar factor has 54 m n^2 at 4x
        return 1 + group["climbs"] * (group["retractions"] + products / 54)
