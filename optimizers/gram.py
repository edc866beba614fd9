"""Polar factors by way of the Gram matrix: as exact as 12 quintic steps, at a quarter of the price.

X (k, n, m) with n <= m, singular values s <= 1. An odd polynomial step

    X <- W X,    W = a I + b R + c R^2,    R = X X^T

needs X only through R: W and R commute, so that the next R is W R W, and the factors of several
steps can be gathered in Q = ... W W before they meet X: products of n x n matrices, all symmetric
(kernels.py), instead of n x m. Rounding spoils the small eigenvalues of R as they grow, so after
every second step X <- Q X and R are made anew; with three steps in between, spectra like 1/i came
out several times too long. R also gives a tight bound of the largest singular value, |R|_F^(1/2),
which saves the two steps that the Frobenius norm of X costs on flat spectra.

Half precision is float16: values are scaled into its range, and bfloat16 has 3 bits less.
FLOPs for m = r n >= 2 n, a symmetric product counted half: (15 + 9 r) n^3; for squares 24 n^3.
12 quintic steps have 12 (4 r + 2) n^3.
Source: Gram Newton-Schulz (dao-lab.ai/blog/2026/gram-newton-schulz); aurora.md 4.
"""

import torch
from torch import Tensor

from .kernels import symmetric_product

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


def unit_max(X: Tensor) -> Tensor:
    """Each matrix divided by its largest |entry|: squares then neither overflow nor vanish."""
    tiny = torch.finfo(X.dtype).tiny  # relative to the input: only an all-zero matrix meets it
    return X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)


def gram_polar(X: Tensor, dtype: torch.dtype) -> Tensor:
    """Polar factors of wide X (k, n, m), n <= m; products and result in `dtype`.

    Not in bfloat16: float16 instead, on the CPU float32 (it is slow in half precision).
    """
    if dtype == torch.bfloat16:
        dtype = torch.float32 if X.device.type == "cpu" else torch.float16
    gather = 2 if X.size(-1) >= 2 * X.size(-2) else 1  # steps; for squares it saves nothing
    X, tiny = unit_max(X), torch.finfo(X.dtype).tiny
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny) * 8  # above fp16's denormals
    X, Q = X.to(dtype), None
    R = symmetric_product(X, X)
    wide = R.to(torch.promote_types(dtype, torch.float32))
    bound = wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-3)  # of the largest s^2
    R, scale = (R / bound).to(dtype), bound.rsqrt()
    for step, (a, b, c) in enumerate(EXPRESS6, 1):
        W = symmetric_product(R, R, R, alpha=c, beta=b, gamma=a)
        Q = W if Q is None else symmetric_product(Q, W)
        if step % gather == 0:
            X, Q, scale = (Q * scale).to(dtype) @ X, None, 1.0
            R = symmetric_product(X, X) if step < len(EXPRESS6) else R
        else:
            R = symmetric_product(symmetric_product(W, R), W)
    return X
