"""Products whose result is known to be symmetric, at half the price.

    C = alpha A B^T + beta D + gamma I,    A, B (k, n, p), D and C (k, n, n)

for A B^T symmetric (A = B, or polynomials of one symmetric matrix) and D symmetric. The Triton
kernel computes the tiles on and below the diagonal and stores each twice. Where it cannot run (no
Triton, no NVIDIA GPU, fp32 or fp64) PyTorch computes the same in full.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

TILE, DEPTH = 128, 64  # of C, and of A and B along p

if triton is not None:

    @triton.jit
    def symmetric_kernel(
        A, B, D, C, a_batch, a_row, a_column, b_batch, b_row, b_column, alpha, beta, gamma,
        n: tl.constexpr, p: tl.constexpr, HAS_D: tl.constexpr, TILE: tl.constexpr,
        DEPTH: tl.constexpr,
    ):  # fmt: skip
        """Program (t, matrix): tile t of the lower triangle, counted row by row; D, C are dense."""
        t = tl.program_id(0)
        i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
        j = t - i * (i + 1) // 2
        matrix = tl.program_id(1).to(tl.int64)
        rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        depth = tl.arange(0, DEPTH)
        a_at = A + matrix * a_batch + rows[:, None] * a_row + depth[None, :] * a_column
        b_at = B + matrix * b_batch + columns[:, None] * b_row + depth[None, :] * b_column
        product = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, p, DEPTH):
            if n % TILE == 0 and p % DEPTH == 0:
                a, b = tl.load(a_at), tl.load(b_at)
            else:
                inside = start + depth[None, :] < p
                a = tl.load(a_at, mask=(rows[:, None] < n) & inside, other=0.0)
                b = tl.load(b_at, mask=(columns[:, None] < n) & inside, other=0.0)
            product = tl.dot(a, b.trans(), product)
            a_at, b_at = a_at + DEPTH * a_column, b_at + DEPTH * b_column
        product *= alpha
        below = matrix * n * n + rows[:, None] * n + columns[None, :]
        above = matrix * n * n + columns[:, None] * n + rows[None, :]
        inside = (rows[:, None] < n) & (columns[None, :] < n)
        if HAS_D:
            product += beta * tl.load(D + below, mask=inside, other=0.0).to(tl.float32)
        product += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
        result = product.to(C.dtype.element_ty)
        tl.store(C + below, result, mask=inside)
        if i != j:
            mirrored = (columns[:, None] < n) & (rows[None, :] < n)
            tl.store(C + above, result.trans(), mask=mirrored)


def kernel_runs(A: Tensor) -> bool:
    """Whether the kernel takes this tensor: half precision on an NVIDIA GPU with tensor cores."""
    half = A.dtype in (torch.float16, torch.bfloat16)
    return triton is not None and half and A.is_cuda and torch.version.hip is None


def symmetric_product(
    A: Tensor, B: Tensor, D: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0,
    gamma: float = 0.0,
) -> Tensor:  # fmt: skip
    """alpha A B^T + beta D + gamma I, symmetric: (k, n, p) twice -> (k, n, n)."""
    inputs = (A, B, D, alpha, beta, gamma)
    if not kernel_runs(A):
        return symmetric_by_torch(*inputs)
    if torch.compiler.is_compiling():  # compiled code minds the device itself
        return symmetric_by_triton(*inputs)
    with torch.cuda.device_of(A):  # Triton launches on the current device
        return symmetric_by_triton(*inputs)


def symmetric_by_torch(
    A: Tensor, B: Tensor, D: Tensor | None, alpha: float, beta: float, gamma: float
) -> Tensor:
    C = alpha * (A @ B.mT) if D is None else torch.baddbmm(D, A, B.mT, beta=beta, alpha=alpha)
    return C + gamma * torch.eye(C.size(-1), dtype=C.dtype, device=C.device) if gamma else C


def symmetric_by_triton(
    A: Tensor, B: Tensor, D: Tensor | None, alpha: float, beta: float, gamma: float
) -> Tensor:
    (k, n, p), D = A.shape, None if D is None else D.contiguous()
    C = torch.empty(k, n, n, dtype=A.dtype, device=A.device)
    tiles = triton.cdiv(n, TILE)
    symmetric_kernel[(tiles * (tiles + 1) // 2, k)](
        A, B, C if D is None else D, C, *A.stride(), *B.stride(), alpha, beta, gamma, n=n, p=p,
        HAS_D=D is not None, TILE=TILE, DEPTH=DEPTH, num_warps=8, num_stages=4,
    )  # fmt: skip
    return C
