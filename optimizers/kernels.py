"""Triton's kernel of the symmetric products in products.py: C = alpha A B^T + beta D + gamma I.

It computes the tiles on and below the diagonal and stores those below twice; Hopper's copy engine
brings its operands (pointers in place of descriptors took twice as long). Compiled code sees an
operator: of a kernel, inductor makes the IR three times for each call, to see what it writes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch comes without it
    triton = None

# Rows and columns of a tile of C, its depth along p, and loads in flight: 2 programs on a processor
TILE, DEPTH, STAGES = 128, 64, 3

if triton is not None:

    @triton.jit
    def symmetric_kernel(
        A,
        B,
        D,
        C,
        alpha,
        beta,
        gamma,
        each,
        p: tl.constexpr,
        A_TURNED: tl.constexpr,
        B_TURNED: tl.constexpr,
        TILE: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        """Program (t, matrix): tile t of the lower triangle, counted row by row.

        D may be None. each: None, or points to alpha, then beta, then gamma of all matrices.
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
        if each is not None:
            matrices = tl.num_programs(1)
            alpha, beta = tl.load(each + matrix), tl.load(each + matrices + matrix)
            gamma = tl.load(each + 2 * matrices + matrix)
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


def kernel_runs(A: Tensor) -> bool:
    """Whether the kernel takes A (k, n, p): half precision on Hopper or later."""
    half = A.dtype in (torch.float16, torch.bfloat16) and A.size(1) % 8 == A.size(2) % 8 == 0
    if triton is None or not half or not A.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(A.device) >= (9, 0)


@torch.library.custom_op("aurora::symmetric_product", mutates_args=())
def symmetric_by_triton(
    A: Tensor, B: Tensor, D: Tensor | None, numbers: Sequence[float], each: Tensor | None
) -> Tensor:
    """numbers: alpha, beta, gamma; each (3, k): these of every matrix, in place of `numbers`."""
    k, n, p = A.shape
    C = torch.empty(k, n, n, dtype=A.dtype, device=A.device)
    tile, turned, strips = [1, TILE, TILE], [X.stride(-1) != 1 for X in (A, B)], []
    tiles = [None if X is None else TensorDescriptor.from_tensor(X, tile) for X in (D, C)]
    for X, flip in zip((A, B), turned, strict=True):
        X, block = (X.mT, (DEPTH, TILE)) if flip else (X, (TILE, DEPTH))
        strips.append(TensorDescriptor.from_tensor(X.contiguous(), [1, *block]))
    with torch.cuda.device_of(A):  # Triton launches on the current device
        symmetric_kernel[((side := triton.cdiv(n, TILE)) * (side + 1) // 2, k)](
            *strips,
            *tiles,
            *numbers,
            each,
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
