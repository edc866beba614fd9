"""Triton's kernel of the symmetric products in products.py: C = alpha A B^T + beta D + gamma I.

It computes the tiles on and below the diagonal and stores those below twice; Hopper's copy engine
brings its operands (pointers in place of descriptors took twice as long).
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch comes without it
    triton = None

# Rows and columns of a tile of C, its depth along p, and loads in flight: two programs fit on a
# processor. Half tiles where these fill half of an H100 (six matrices) took 8.5 us, not 8.8.
TILE, DEPTH, STAGES = 128, 64, 3

if triton is not None:

    @triton.jit
    def symmetric_kernel(
        A, B, D, C, alpha, beta, gamma, p: tl.constexpr, A_TURNED: tl.constexpr,
        B_TURNED: tl.constexpr, HAS_D: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr,
        DEPTH: tl.constexpr,
    ):  # fmt: skip
        """Program (t, matrix): tile t of the lower triangle, counted row by row."""
        t, matrix = tl.program_id(0), tl.program_id(1)
        # + 1 would be exact; + 3 gives the same, and sqrt may round as it likes
        i = ((tl.sqrt(8.0 * t.to(tl.float32) + 3.0) - 1.0) / 2.0).to(tl.int32)
        j = t - i * (i + 1) // 2
        product = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, p, DEPTH):  # beyond the edges descriptors read zeros
            if A_TURNED:
                a = A.load([0, matrix, start, i * TILE]).reshape(DEPTH, TILE).T
            else:
                a = A.load([0, matrix, i * TILE, start]).reshape(TILE, DEPTH)
            if B_TURNED:
                b = B.load([0, matrix, start, j * TILE]).reshape(DEPTH, TILE)
            else:
                b = B.load([0, matrix, j * TILE, start]).reshape(TILE, DEPTH).T
            product = tl.dot(a, b, product)
        if EACH:  # pointers to one number for each matrix
            alpha, beta = tl.load(alpha + matrix), tl.load(beta + matrix)
            gamma = tl.load(gamma + matrix)
        else:  # float64 from inductor, and then so would be the tile
            alpha, beta = tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32)
            gamma = tl.cast(gamma, tl.float32)
        product *= alpha
        if HAS_D:
            d = D.load([0, matrix, i * TILE, j * TILE]).reshape(TILE, TILE)
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
    """What is read is described as (1, k, n, p), C as (k, n, n): inductor keeps one descriptor of a
    tensor for each shape of blocks, and what reads C by the one that wrote it does not wait for
    the writing (torch 2.11).
    """
    k, n, p = A.shape
    C = torch.empty(k, n, n, dtype=A.dtype, device=A.device)
    turned, described = [X.stride(-1) != 1 for X in (A, B)], []
    for X, flip in zip((A, B), turned, strict=True):
        X, block = (X.mT, (DEPTH, TILE)) if flip else (X, (TILE, DEPTH))
        described.append(TensorDescriptor.from_tensor(X.contiguous()[None], [1, 1, *block]))
    given = described[0]
    if D is not None:
        given = TensorDescriptor.from_tensor(D[None], [1, 1, TILE, TILE])
    described += [given, TensorDescriptor.from_tensor(C, [1, TILE, TILE])]
    symmetric_kernel[((side := triton.cdiv(n, TILE)) * (side + 1) // 2, k)](
        *described, alpha, beta, gamma, p=p, A_TURNED=turned[0], B_TURNED=turned[1],
        HAS_D=D is not None, EACH=isinstance(alpha, Tensor), TILE=TILE, DEPTH=DEPTH, num_warps=4,
        num_stages=STAGES,
    )  # fmt: skip
    return C
