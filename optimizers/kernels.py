"""Triton's kernel of the symmetric products in products.py: C = alpha A B^T + beta D + gamma I.

It computes the tiles on and below the diagonal and stores each twice; Hopper's copy engine brings
its operands (pointers in place of descriptors took twice as long).
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch comes without it
    triton = None

TILE, DEPTH = 128, 64  # of C, and of A and B along p

if triton is not None:

    @triton.jit
    def symmetric_kernel(
        A, B, D, C, alpha, beta, gamma, p: tl.constexpr, A_TURNED: tl.constexpr,
        B_TURNED: tl.constexpr, HAS_D: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr,
        DEPTH: tl.constexpr,
    ):  # fmt: skip
        """Program (t, matrix): tile t of the lower triangle, counted row by row."""
        t, matrix = tl.program_id(0), tl.program_id(1)
        i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
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
        if EACH:  # pointers to one number for each matrix
            alpha, beta = tl.load(alpha + matrix), tl.load(beta + matrix)
            gamma = tl.load(gamma + matrix)
        product *= alpha
        if HAS_D:
            d = D.load([matrix, i * TILE, j * TILE]).reshape(TILE, TILE)
            product += beta * d.to(tl.float32)
        rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        product += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
        result = product.to(C.dtype)
        C.store([matrix, i * TILE, j * TILE], result.reshape(1, TILE, TILE))
        if i != j:
            C.store([matrix, j * TILE, i * TILE], result.T.reshape(1, TILE, TILE))


def kernel_runs(A: Tensor) -> bool:
    """Whether the kernel takes A (k, n, p): half precision on Hopper or later."""
    half = A.dtype in (torch.float16, torch.bfloat16) and A.size(1) % 8 == A.size(2) % 8 == 0
    if triton is None or not half or not A.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(A.device) >= (9, 0)


def symmetric_by_triton(
    A: Tensor, B: Tensor, D: Tensor | None, alpha: float | Tensor, beta: float | Tensor,
    gamma: float | Tensor,
) -> Tensor:  # fmt: skip
    (k, n, p), tile = A.shape, [1, TILE, TILE]
    deep = {False: [1, TILE, DEPTH], True: [1, DEPTH, TILE]}
    C = torch.empty(k, n, n, dtype=A.dtype, device=A.device)
    turned = [X.stride(-1) != 1 for X in (A, B)]
    described = [
        TensorDescriptor.from_tensor((X.mT if flip else X).contiguous(), deep[flip])
        for X, flip in zip((A, B), turned, strict=True)
    ]
    described += [TensorDescriptor.from_tensor(X, tile) for X in (C if D is None else D, C)]
    tiles = (side := triton.cdiv(n, TILE)) * (side + 1) // 2
    symmetric_kernel[(tiles, k)](
        *described, alpha, beta, gamma, p=p, A_TURNED=turned[0], B_TURNED=turned[1],
        HAS_D=D is not None, EACH=isinstance(alpha, Tensor), TILE=TILE, DEPTH=DEPTH, num_warps=4,
        num_stages=3 if tiles * k > 132 else 4,  # two programs on each of 132 processors, or one
    )  # fmt: skip
    return C
