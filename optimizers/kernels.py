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

TILE = 128  # rows of a tile of C
# Columns of a tile, its depth along p, and loads in flight; two programs fit on a processor.
WHOLE, HALF = (TILE, 64, 3), (TILE // 2, 64, 4)

if triton is not None:

    @triton.jit
    def symmetric_kernel(
        A, B, D, C, alpha, beta, gamma, p: tl.constexpr, A_TURNED: tl.constexpr,
        B_TURNED: tl.constexpr, HAS_D: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """Program (t, matrix): tile t of the lower triangle, counted row by row.

        Row i has PER (i + 1) tiles; the last PER of them are its square on the diagonal, in full.
        """
        t, matrix = tl.program_id(0), tl.program_id(1)
        PER: tl.constexpr = ROWS // COLUMNS  # 1 or 2
        # + 1 would be exact; + 3 gives the same, and sqrt may round as it likes
        i = ((tl.sqrt(8.0 / PER * t.to(tl.float32) + 3.0) - 1.0) / 2.0).to(tl.int32)
        j = t - PER * i * (i + 1) // 2
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, p, DEPTH):  # beyond the edges descriptors read zeros
            if A_TURNED:
                a = A.load([0, matrix, start, i * ROWS]).reshape(DEPTH, ROWS).T
            else:
                a = A.load([0, matrix, i * ROWS, start]).reshape(ROWS, DEPTH)
            if B_TURNED:
                b = B.load([0, matrix, start, j * COLUMNS]).reshape(DEPTH, COLUMNS)
            else:
                b = B.load([0, matrix, j * COLUMNS, start]).reshape(COLUMNS, DEPTH).T
            product = tl.dot(a, b, product)
        if EACH:  # pointers to one number for each matrix
            alpha, beta = tl.load(alpha + matrix), tl.load(beta + matrix)
            gamma = tl.load(gamma + matrix)
        product *= alpha
        if HAS_D:
            d = D.load([0, matrix, i * ROWS, j * COLUMNS]).reshape(ROWS, COLUMNS)
            product += beta * d.to(tl.float32)
        rows, columns = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
        product += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
        result, mirrored = product.to(C.dtype), j < PER * i
        if PER == 1:
            C.store([matrix, i * COLUMNS, j * COLUMNS], result.reshape(1, COLUMNS, COLUMNS))
            if mirrored:
                C.store([matrix, j * COLUMNS, i * COLUMNS], result.T.reshape(1, COLUMNS, COLUMNS))
        else:  # in squares: C has one descriptor, compiled code would clone it for a second one
            upper, lower = tl.split(result.reshape(2, COLUMNS, COLUMNS).permute(1, 2, 0))
            row = i * ROWS
            C.store([matrix, row, j * COLUMNS], upper.reshape(1, COLUMNS, COLUMNS))
            C.store([matrix, row + COLUMNS, j * COLUMNS], lower.reshape(1, COLUMNS, COLUMNS))
            if mirrored:
                C.store([matrix, j * COLUMNS, row], upper.T.reshape(1, COLUMNS, COLUMNS))
                C.store([matrix, j * COLUMNS, row + COLUMNS], lower.T.reshape(1, COLUMNS, COLUMNS))


def tile_for(squares: int) -> tuple[int, int, int]:
    """WHOLE or HALF, for a product that has so many square tiles in all.

    An H100 has 132 processors with room for two programs each. 6 matrices of 768 x 768 have 126
    square tiles, which leave half of the room empty, and 252 of half the width: 8.5 us, not 8.8.
    With 24 matrices halves take 40 us, whole tiles 34.
    """
    return HALF if squares <= 132 else WHOLE


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
    squares = (side := triton.cdiv(n, TILE)) * (side + 1) // 2
    columns, depth, stages = tile_for(squares * k)
    C = torch.empty(k, n, n, dtype=A.dtype, device=A.device)
    turned, described = [X.stride(-1) != 1 for X in (A, B)], []
    for X, flip, width in zip((A, B), turned, (TILE, columns), strict=True):
        X, block = (X.mT, (depth, width)) if flip else (X, (width, depth))
        described.append(TensorDescriptor.from_tensor(X.contiguous()[None], [1, 1, *block]))
    given = described[0]
    if D is not None:
        given = TensorDescriptor.from_tensor(D[None], [1, 1, TILE, columns])
    described += [given, TensorDescriptor.from_tensor(C, [1, columns, columns])]
    symmetric_kernel[(squares * TILE // columns, k)](
        *described, alpha, beta, gamma, p=p, A_TURNED=turned[0], B_TURNED=turned[1],
        HAS_D=D is not None, EACH=isinstance(alpha, Tensor), ROWS=TILE, COLUMNS=columns,
        DEPTH=depth, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return C
