"""Polar factors of stacks of matrices: U = X (X^T X)^(-1/2), the nearest orthogonal matrix.

Orthogonal means orthonormal columns of a tall matrix, rows of a wide one. Not here: what
is done with U (see muon.py, aurora.py) and who computes it (slot.py).
"""

import torch
from torch import Tensor

QUINTIC = (2.0, -1.5, 0.5)  # p(s) = 2s - 1.5s^3 + 0.5s^5: p(1) = 1, p'(1) = 0; slope 2 at 0


def unit_max(X: Tensor) -> Tensor:
    """Each matrix divided by its largest |entry|: squares then neither overflow nor vanish."""
    tiny = torch.finfo(X.dtype).tiny  # relative to the input: only an all-zero matrix meets it
    return X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)


def polar(X: Tensor, steps: int = 12, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Polar factor of every matrix of a stack by `steps` quintic Newton-Schulz steps.

    X: (k, m, n) or (m, n), any scale; returns the same shape in `dtype`, the type of the products.
    12 steps lift singular values from 4.6e-4 of the Frobenius norm to within 1% of 1. A zero matrix
    stays zero. FLOPs of a step: (4r + 2) s^3, with s the short side and r s the long one.
    Source: https://kellerjordan.github.io/posts/muon/ with the coefficients of track-3 entry #36.
    """
    if X.ndim == 2:
        return polar(X[None], steps, dtype)[0]
    a, b, c = QUINTIC
    tall = X.size(-2) > X.size(-1)
    X = unit_max(X)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    X = (X.mT if tall else X).to(dtype)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2, inside the product's epilogue
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT if tall else X
