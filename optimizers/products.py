"""Products whose result is known to be symmetric, at half the price.

    C = alpha A B^T + beta D + gamma I,    A, B (k, n, p), D and C (k, n, n)

for A B^T symmetric (A = B, or polynomials of one symmetric matrix) and D symmetric. Where the
kernel (kernels.py) cannot run (no Triton, an older GPU, fp32 or fp64, sizes no multiple of 8)
PyTorch computes the same in full.
"""

import torch
from torch import Tensor

from .kernels import kernel_runs, symmetric_by_triton


def symmetric_product(
    A: Tensor,
    B: Tensor,
    D: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    """alpha A B^T + beta D + gamma I, symmetric: (k, n, p) twice -> (k, n, n).

    alpha, beta, gamma: three numbers, or three float32 tensors (k,), one number for each matrix.
    """
    if not kernel_runs(A):
        return symmetric_by_torch(A, B, D, alpha, beta, gamma)
    if isinstance(alpha, Tensor):
        return symmetric_by_triton(A, B, D, [0.0] * 3, torch.stack([alpha, beta, gamma]))
    return symmetric_by_triton(A, B, D, [alpha, beta, gamma], None)


def symmetric_by_torch(
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    alpha: float | Tensor,
    beta: float | Tensor,
    gamma: float | Tensor,
) -> Tensor:
    eye = torch.eye(A.size(-2), dtype=A.dtype, device=A.device)
    if isinstance(alpha, Tensor):
        alpha, beta, gamma = (number[:, None, None] for number in (alpha, beta, gamma))
        C = alpha * (A @ B.mT) + gamma * eye
        return (C if D is None else C + beta * D).to(A.dtype)
    C = alpha * (A @ B.mT) if D is None else torch.baddbmm(D, A, B.mT, beta=beta, alpha=alpha)
    return C + gamma * eye if gamma else C
