"""Matmuls whose result is known to be symmetric, at half the price.

    C = alpha A B^T + beta D + gamma I,    A, B (k, n, p), D and C (k, n, n)

for symmetric D and symmetric A B^T (A = B, or polynomials of one symmetric matrix). The Triton
kernel computes the tiles on and below the diagonal and stores those below it twice; Hopper's copy
engine loads its operands (loads by pointer took twice as long). Where the kernel cannot run,
PyTorch computes the same in full.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# CPU builds of torch come without Triton. It is imported when it is needed: that takes 0.4 s.
HAS_TRITON = find_spec("triton") is not None
constexpr = "constexpr"  # Triton reads the name, and needs its own type when it compiles
# Rows and columns of a tile of C, its depth along p, loads in flight: two programs fit an SM
TILE, DEPTH, STAGES = 128, 64, 3


def symmetric_kernel(
    A,
    B,
    D,
    C,
    alpha,
    beta,
    gamma,
    coefficients,
    p: constexpr,
    A_TURNED: constexpr,
    B_TURNED: constexpr,
    TILE: constexpr,
    DEPTH: constexpr,
):
    """Compute tile t of the lower triangle, counted row by row, in program (t, matrix).

    D may be None. `coefficients` is None or points to alpha, then beta, then gamma of all
    matrices, which replace the three numbers.
    """
    t, matrix = tl.program_id(0), tl.program_id(1)
    # + 1 would be exact; + 3 gives the same, and sqrt may round as it likes
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 3.0) - 1.0) / 2.0).to(tl.int32)
    j = t - i * (i + 1) // 2
    product = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, p, DEPTH):  # beyond the edges descriptors read zeros
        if A_TURNED:
            a = A.load([matrix, start, i * TILE]).reshape(DEPTH, TILE).T
        else:
            a = A.load([matrix, i * TILE, start]).reshape(TILE, DEPTH)
        if B_TURNED:
            b = B.load([matrix, start, j * TILE]).reshape(DEPTH, TILE)
        else:
            b = B.load([matrix, j * TILE, start]).reshape(TILE, DEPTH).T
        product = tl.dot(a, b, product)
    if coefficients is not None:
        matrices = tl.num_programs(1)
        alpha = tl.load(coefficients + matrix)
        beta = tl.load(coefficients + matrices + matrix)
        gamma = tl.load(coefficients + 2 * matrices + matrix)
    product *= alpha
    if D is not None:
        d = D.load([matrix, i * TILE, j * TILE]).reshape(TILE, TILE)
        product += beta * d.to(tl.float32)
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    product += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    result = product.to(C.dtype)
    C.store([matrix, i * TILE, j * TILE], result.reshape(1, TILE, TILE))
    if i != j:
        C.store([matrix, j * TILE, i * TILE], result.T.reshape(1, TILE, TILE))


@cache
def symmetric_jit():
    """Import Triton and return the kernel as its function."""
    global triton, tl, TensorDescriptor, constexpr
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    constexpr = tl.constexpr
    return triton.jit(symmetric_kernel)


def symmetric_obstacle(device: torch.device, dtype: torch.dtype, *sizes: int) -> str:
    """Return why the kernel cannot run on matrices of this type and these sizes; "" if it can.

    The answers are constants: compiled code traces this function and cannot format strings.
    """
    if device.type != "cuda":
        return "no CUDA device"
    if not HAS_TRITON or torch.version.hip is not None:
        return "no Triton for NVIDIA GPUs"
    if dtype not in (torch.float16, torch.bfloat16):
        return "not in half precision"
    if any(size % 8 for size in sizes):
        return "a size is no multiple of 8"
    return "" if torch.cuda.get_device_capability(device) >= (9, 0) else "a GPU before Hopper"


# Compiled code sees an operator: of a bare kernel, inductor makes the IR three times for each call.
@torch.library.custom_op("aurora::symmetric_matmul", mutates_args=())
def symmetric_by_triton(
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    common: Sequence[float],
    coefficients: Tensor | None,
) -> Tensor:
    """Launch the kernel. `common` holds alpha, beta, gamma for all matrices; `coefficients` (3, k)
    holds them for each matrix and replaces `common`."""
    kernel, (k, n, p) = symmetric_jit(), A.shape
    C = torch.empty(k, n, n, dtype=A.dtype, device=A.device)
    tile, turned, strips = [1, TILE, TILE], [X.stride(-1) != 1 for X in (A, B)], []
    tiles = [None if X is None else TensorDescriptor.from_tensor(X, tile) for X in (D, C)]
    for X, flip in zip((A, B), turned, strict=True):
        X, block = (X.mT, (DEPTH, TILE)) if flip else (X, (TILE, DEPTH))
        strips.append(TensorDescriptor.from_tensor(X.contiguous(), [1, *block]))
    side = triton.cdiv(n, TILE)
    with torch.cuda.device_of(A):  # Triton launches on the current device
        kernel[(side * (side + 1) // 2, k)](
            *strips,
            *tiles,
            *common,
            coefficients,
            p=p,
            A_TURNED=turned[0],
            B_TURNED=turned[1],
            TILE=TILE,
            DEPTH=DEPTH,
            num_warps=4,
            num_stages=STAGES,
        )
    return C


@symmetric_by_triton.register_fake
def symmetric_shape(A: Tensor, *_: object) -> Tensor:
    return A.new_empty(*A.shape[:2], A.size(1))


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


def symmetric_matmul(
    A: Tensor,
    B: Tensor,
    D: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    """Return alpha A B^T + beta D + gamma I, symmetric: (k, n, p) twice -> (k, n, n).

    alpha, beta, gamma: three numbers, or three float32 tensors (k,), one number for each matrix.
    """
    if symmetric_obstacle(A.device, A.dtype, *A.shape[1:]):
        return symmetric_by_torch(A, B, D, alpha, beta, gamma)
    if isinstance(alpha, Tensor):
        return symmetric_by_triton(A, B, D, [0.0] * 3, torch.stack([alpha, beta, gamma]))
    return symmetric_by_triton(A, B, D, [alpha, beta, gamma], None)
