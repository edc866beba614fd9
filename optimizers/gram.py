"""Polar factors through the Gram matrix: as exact as 12 quintic steps, at a quarter of the price.

X (k, n, m) with n <= m, singular values s <= 1. An odd polynomial step

    X <- W X,    W = a I + b R + c R^2 + ...,    R = X X^T

needs X only through R: W and R commute, so the next R is W R W, and the factors of several steps
collect in Q = ... W W before they multiply X: matmuls of n x n matrices, all symmetric
(symmetric.py), instead of n x m. Rounding spoils the small eigenvalues of R as they grow, so
X <- Q X and R are computed anew after every second step; with three steps in between, spectra like
1/i came out several times too long. R also bounds the largest singular value tightly by
|R|_F^(1/2), which saves the two steps that the Frobenius norm of X costs on flat spectra.

Where only the row norms of a tall factor are needed, LEVERAGE4 manages with one restart: for a
3072 x 768 matrix of spectrum 1/i, Aurora's update is then off by 0.6% in half precision, the same
as with 12 quintic steps.

Half precision is float16: the values are scaled into its range, and bfloat16 has 3 bits less.
FLOPs for m = r n >= 2 n, with a symmetric matmul counted half: (15 + 9 r) n^3, with LEVERAGE4
(13 + 6 r) n^3; for squares 24 n^3. 12 quintic steps take 12 (4 r + 2) n^3.
Source: Gram Newton-Schulz (dao-lab.ai/blog/2026/gram-newton-schulz).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .symmetric import symmetric_matmul

# Minimax quintics (Remez) for singular values in [1e-3, 1], one after the other on the range that
# the last one left; each but the last takes arguments 1% beyond its range, for rounding. Ends in
# 0.9987 to 1.0013; tests/test_gram.py holds them to it.
EXPRESS6 = tuple(
    (a / safety, b / safety**3, c / safety**5)
    for a, b, c, safety in (
        (8.470328803848073, -25.108074706661885, 18.62927559911802, 1.01),
        (4.183730461536217, -3.10959310046508, 0.5807855591983248, 1.01),
        (3.9678799372329494, -2.959364851579474, 0.5638940626863321, 1.01),
        (3.309013155226455, -2.4848625853909017, 0.5107999245579977, 1.01),
        (2.301824959052128, -1.6762778247997234, 0.4229523642054836, 1.01),
        (1.8977037662081064, -1.280406513677635, 0.3827279984439539, 1.0),
    )
)
LEVERAGE4 = (  # degrees 5, 9, 9, 9, made the same way for [2e-3, 1]; ends in 0.9928 to 1.0072
    (8.3433542623, -24.20276604, 17.594972447),
    (7.0408257172, -16.837263301, 13.881646197, -4.4345736339, 0.48008663665),
    (5.0557791009, -11.226345226, 9.7017175445, -3.3456637886, 0.39556968881),
    (2.7466891003, -4.1945024787, 3.9009758208, -1.758896195, 0.30125201646),
)


def length(X: Tensor, dim: int | tuple[int, int] = (-2, -1)) -> Tensor:
    """Return the Euclidean norm along `dim`, which is kept. No square overflows or vanishes."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    if X.is_mps:  # has no float64
        largest = X.abs().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
        return largest * (X / largest).norm(dim=dim, keepdim=True)
    return X.double().square().sum(dim=dim, keepdim=True).sqrt().to(X.dtype)


def polynomial(coefficients: Sequence[float | Tensor], R: Tensor) -> Tensor:
    """Return a I + b R + c R^2 by one matmul, or with d R^3 + e R^4 by two.

    The second takes T = R^2 + p R + q I and e T^2.
    """
    if len(coefficients) == 3:
        a, b, c = coefficients
        return symmetric_matmul(R, R, R, alpha=c, beta=b, gamma=a)
    a, b, c, d, e = coefficients
    p = d / (2 * e)
    q = (c / e - p * p) / 2
    T = symmetric_matmul(R, R, R, alpha=1.0, beta=p, gamma=q)
    return symmetric_matmul(T, T, R, alpha=e, beta=b - 2 * e * p * q, gamma=a - e * q * q)


def gram_polar(X: Tensor, steps: tuple = EXPRESS6) -> Tensor:
    """Return the polar factors of X (k, m, n), |X|_F <= 8, in its type: float16, 32 or 64.

    X must not be part of a larger tensor: compiled code would lose the offset.
    """
    if (
        torch.compiler.is_compiling()
    ):  # keeps one X in memory, not one for each matmul that reads it
        X = X.as_strided(X.shape, X.stride())
    if X.stride(-2) == 1 < X.stride(-1):  # keeps the memory order: nothing is written transposed
        return gram_polar(X.mT, steps).mT
    tall = X.size(-2) > X.size(-1)
    collected = 2 if max(X.shape[-2:]) >= 2 * min(X.shape[-2:]) else 1  # no gain for squares
    A, Q = X.mT if tall else X, None
    R = symmetric_matmul(A, A)
    wide = R.to(torch.promote_types(X.dtype, torch.float32))
    s = wide.norm(dim=(-2, -1)).clamp_min(1e-3).rsqrt()  # 1 / a bound of the singular values
    for step, coefficients in enumerate(steps, 1):
        if step == 1:  # s X is never written: this W takes R for s^2 R, and X for s X
            coefficients = [c * s ** (2 * k + 1) for k, c in enumerate(coefficients)]
        W = polynomial(coefficients, R)
        Q = W if Q is None else symmetric_matmul(Q, W)
        if step % collected:
            R = symmetric_matmul(symmetric_matmul(W, R), W)
            continue
        A, Q = (A.mT @ Q).mT if tall else Q @ A, None
        R = symmetric_matmul(A, A) if step < len(steps) else R
    return A.mT if tall else A
