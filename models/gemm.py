"""Hopper matmuls with fused epilogues, in Gluon.

A program computes tiles of C = A B, 256 x 128. Two consumer warpgroups take 128 rows each, with
loads of A of their own, and share those of B; as one may run STAGES_B steps ahead of the other, the
tensor cores work for one while the other is in its epilogue. Two producer warps load by TMA, the
epilogue's operand as well. In Triton all warps of a program reach the epilogue at once and the
tensor cores wait; Gluon, the layer below, lets us write out layouts, barriers and warp roles.

The kernels pass these tuples on:

    operands   A, B, C, extra: TMA descriptors
    buffers    a, b, p: shared memory for stages of A and of B, and for a tile of the epilogue
    barriers   ready and empty of a, of b and of p
    tiling     down, across: tiles in a column and in a row of C; groups of programs that share a
               range of columns; steps along k
    epilogue   bias, scale, out, m, n, eps: the arguments of `gemm_kernel`
"""

import functools
import math

import torch
from torch import Tensor

from .passes import EPS, triton_obstacle

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia import hopper

    if hasattr(tma, "async_load"):  # since Triton 3.7
        load_block, store_block = tma.async_load, tma.async_store
    else:
        load_block, store_block = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
except (ImportError, AttributeError):  # CPU builds of torch lack Triton, some Tritons these names
    gluon = None

HEAD_DIM = 128  # one head fills the width of a tile
STAGES_A, STAGES_B = 3, 4  # blocks of A and B in flight, each 128 bytes deep along k

if gluon is not None:
    ROWS, COLUMNS, HALF = gl.constexpr(128), gl.constexpr(128), gl.constexpr(64)  # of a consumer

    @gluon.jit
    def divide_tiles(down, across, groups):
        """Return this program's number of tiles, its index in its group, and the group's size."""
        members = gl.num_programs(0) // groups
        member = gl.program_id(0) % members
        return gl.cdiv(down * (across // groups) - member, members), member, members

    @gluon.jit
    def locate_tile(item, down, across, groups, KIND: gl.constexpr):
        """Return the first row and column of tile `item`; tiles are counted row by row.

        For the gradient a group of programs finishes one of its columns of tiles before the next,
        so that the sums over rows stay in registers. Logits do the same, as their B is larger
        than A.
        """
        if KIND == "relu_square_gradient" or KIND == "logits":
            group = gl.program_id(0) // (gl.num_programs(0) // groups)
            row, column = item % down, group * (across // groups) + item // down
        else:
            row, column = item // across, item % across
        return row * (2 * ROWS), column * COLUMNS

    @gluon.jit
    def load_epilogue(extra, p, ready, row, column, across, row_tokens, KIND: gl.constexpr):
        """Load the epilogue's operand: the tile of post, or for q and k the angles of its rows."""
        if KIND == "relu_square_gradient" or 3 * column < 2 * across * COLUMNS:
            at, along = row, column
            if KIND == "qkv":
                at, along = row % row_tokens, 0
            mbarrier.expect(ready, 2 * extra.block_type.nbytes)
            load_block(extra, [at, along], ready, p.index(0))
            load_block(extra, [at, along + HALF], ready, p.index(1))
        else:
            mbarrier.arrive(ready)

    @gluon.jit
    def run_producer(work, row_tokens, KIND: gl.constexpr, LOWER: gl.constexpr):
        """Run a producer warp: load a consumer's A and epilogue operand; the upper one loads B."""
        operands, buffers, barriers, tiling, epilogue = work
        A, B, C, extra = operands
        a, b, p = buffers
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = barriers
        down, across, groups, steps = tiling
        DEPTH: gl.constexpr = A.block_type.shape[1]
        steps_of_A = gl.cdiv(A.shape[1], DEPTH)  # TMA reads zeros beyond the last column
        tiles, member, members = divide_tiles(down, across, groups)
        i = 0
        for tile in range(tiles):
            row, column = locate_tile(tile * members + member, down, across, groups, KIND)
            row += LOWER * ROWS
            for step in range(steps):
                if not LOWER:
                    slot = i % b_ready.shape[0]
                    mbarrier.wait(b_empty.index(slot), i // b_ready.shape[0] & 1 ^ 1)
                    mbarrier.expect(b_ready.index(slot), B.block_type.nbytes)
                    at, along = column, step * DEPTH
                    if KIND == "relu_square_gradient" or KIND == "matmul":
                        at, along = along, column
                    if KIND == "matmul":
                        at -= gl.where(step < steps_of_A, 0, steps_of_A * DEPTH - A.shape[1])
                    load_block(B, [at, along], b_ready.index(slot), b.index(slot))
                slot = i % a_ready.shape[0]
                mbarrier.wait(a_empty.index(slot), i // a_ready.shape[0] & 1 ^ 1)
                mbarrier.expect(a_ready.index(slot), A.block_type.nbytes)
                if KIND == "matmul" and step >= steps_of_A:
                    at = (step - steps_of_A) * DEPTH
                    load_block(extra, [row, at], a_ready.index(slot), a.index(slot))
                else:
                    load_block(A, [row, step * DEPTH], a_ready.index(slot), a.index(slot))
                i += 1
                if KIND == "relu_square_gradient" or KIND == "qkv":
                    if step == gl.maximum(steps - 2, gl.minimum(steps - 1, 1)):  # A and B go first
                        mbarrier.wait(p_empty, tile & 1 ^ 1)
                        load_epilogue(extra, p, p_ready, row, column, across, row_tokens, KIND)

    @gluon.jit
    def run_mainloop(buffers, barriers, i, tile, steps, KIND: gl.constexpr):
        """Return the left and right half of a consumer's rows of A B, and the next step's count."""
        a, b, p = buffers
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = barriers
        depth: gl.constexpr = 256 // a.dtype.primitive_bitwidth  # of one wgmma
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, depth])
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for step in range(steps):
            from_a, from_b = i % a_ready.shape[0], i % b_ready.shape[0]
            mbarrier.wait(b_ready.index(from_b), i // b_ready.shape[0] & 1)
            mbarrier.wait(a_ready.index(from_a), i // a_ready.shape[0] & 1)
            factor = b.index(from_b)
            if KIND != "relu_square_gradient" and KIND != "matmul":
                factor = factor.permute((1, 0))
            acc = warpgroup_mma(a.index(from_a), factor, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the step before has ended
            from_a, from_b = (i - 1) % a_ready.shape[0], (i - 1) % b_ready.shape[0]
            mbarrier.arrive(a_empty.index(from_a), pred=step > 0)
            mbarrier.arrive(b_empty.index(from_b), pred=step > 0)
            if KIND == "relu_square_gradient" or KIND == "qkv":
                if step == gl.minimum(steps - 1, 1):  # the last tile has left p by now
                    tma.store_wait(0)
                    mbarrier.arrive(p_empty, pred=tile > 0)
            i += 1
        product = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(a_empty.index((i - 1) % a_ready.shape[0]))
        mbarrier.arrive(b_empty.index((i - 1) % b_ready.shape[0]))
        left, right = product.reshape([ROWS, 2, HALF]).permute(0, 2, 1).split()
        return left, right, i

    @gluon.jit
    def sum_rows(x):
        """Sum x (128, n) over the rows that each thread holds."""
        return gl.sum(gl.sum(x.reshape([2, 4, 2, 8, x.shape[1]]), axis=2), axis=0)

    @gluon.jit
    def store_column_sums(out, sums, columns):
        """Add the sums (4, 8, n) of `sum_rows` over threads, then over warps, and store them."""
        total = gl.sum(gl.sum(sums, axis=1), axis=0)
        offsets = gl.arange(0, total.shape[0], total.type.layout)
        gl.store(out + offsets, total, mask=offsets < columns)

    @gluon.jit
    def store_half(C, row, column, p, x):
        """Store half a tile through shared memory."""
        p.store(x.to(C.dtype))
        fence_async_shared()
        store_block(C, [row, column], p)

    @gluon.jit
    def run_gradient_consumer(work, LOWER: gl.constexpr):
        """Run a consumer of the gradient: (A B) 2 sqrt(post), and its sums over rows."""
        operands, buffers, barriers, tiling, epilogue = work
        A, B, C, extra = operands
        a, b, p = buffers
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = barriers
        down, across, groups, steps = tiling
        bias, scale, out, m, n, eps = epilogue
        tiles, member, members = divide_tiles(down, across, groups)
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
        zeros = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        nothing, _ = zeros.reshape([ROWS, 2, HALF]).permute(0, 2, 1).split()
        left_sums, right_sums = sum_rows(nothing), sum_rows(nothing)
        i = 0
        for tile in range(tiles):
            item = tile * members + member
            row, column = locate_tile(item, down, across, groups, "relu_square_gradient")
            row += LOWER * ROWS
            left, right, i = run_mainloop(buffers, barriers, i, tile, steps, "relu_square_gradient")
            half: gl.constexpr = left.type.layout
            mbarrier.wait(p_ready, tile & 1)
            left *= 2 * gl.sqrt(p.index(0).load(half).to(gl.float32))
            store_half(C, row, column, p.index(0), left)
            right *= 2 * gl.sqrt(p.index(1).load(half).to(gl.float32))
            store_half(C, row, column + HALF, p.index(1), right)
            left_sums += sum_rows(left)
            right_sums += sum_rows(right)
            if item // down < (item + members) // down:  # this column's last
                at = out + (member * 2 + LOWER) * n + column
                store_column_sums(at, left_sums, n - column)
                store_column_sums(at + HALF, right_sums, n - column - HALF)
                left_sums, right_sums = sum_rows(nothing), sum_rows(nothing)
        tma.store_wait(0)

    @gluon.jit
    def rotate_head(left, right, p, p_ready, tile, row, head, heads, epilogue):
        """Return both halves of a head; q and k are divided by their rms, stored, and rotated."""
        bias, scale, out, m, n, eps = epilogue
        half: gl.constexpr = left.type.layout
        s = gl.rsqrt(gl.sum(left * left + right * right, axis=1) / COLUMNS + eps)
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, half))
        gl.store(out + rows * (2 * heads) + head, s, mask=(rows < m) & (head < 2 * heads))
        mbarrier.wait(p_ready, tile & 1)
        if head < 2 * heads:
            c = p.index(0).load(half).to(gl.float16, bitcast=True).to(gl.float32)
            d = p.index(1).load(half).to(gl.float16, bitcast=True).to(gl.float32)
            c *= s[:, None]
            d *= s[:, None]
            left, right = left * c + right * d, right * c - left * d
        return left, right

    @gluon.jit
    def run_tile_consumer(work, KIND: gl.constexpr, LOWER: gl.constexpr, SCALED: gl.constexpr):
        """Run a consumer of any other KIND: the matmul, its bias and its epilogue."""
        operands, buffers, barriers, tiling, epilogue = work
        A, B, C, extra = operands
        a, b, p = buffers
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = barriers
        down, across, groups, steps = tiling
        bias, scale, out, m, n, eps = epilogue
        tiles, member, members = divide_tiles(down, across, groups)
        i = 0
        for tile in range(tiles):
            row, column = locate_tile(tile * members + member, down, across, groups, KIND)
            row += LOWER * ROWS
            left, right, i = run_mainloop(buffers, barriers, i, tile, steps, KIND)
            if SCALED:
                left, right = left * gl.load(scale), right * gl.load(scale)
            if KIND != "matmul":
                columns = column + gl.arange(0, HALF, gl.SliceLayout(0, left.type.layout))
                left += gl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
                columns += HALF
                right += gl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
            if KIND == "relu_square":  # keeps NaN, as relu does
                left = gl.where(left < 0, 0.0, left * left)
                right = gl.where(right < 0, 0.0, right * right)
            if KIND == "qkv":
                head, heads = column // COLUMNS, n // (3 * COLUMNS)
                left, right = rotate_head(left, right, p, p_ready, tile, row, head, heads, epilogue)
            else:
                tma.store_wait(0)
            if KIND == "logits":
                mbarrier.wait(p_empty, tile & 1 ^ 1)
            store_half(C, row, column, p.index(0), left)
            store_half(C, row, column + HALF, p.index(1), right)
            if KIND == "logits":
                mbarrier.arrive(p_ready)
        tma.store_wait(0)

    @gluon.jit
    def run_consumer(work, KIND: gl.constexpr, LOWER: gl.constexpr, SCALED: gl.constexpr):
        """Run a consumer warpgroup: 128 rows of each tile, from the matmul to the stores."""
        if KIND == "relu_square_gradient":
            run_gradient_consumer(work, LOWER)
        else:
            run_tile_consumer(work, KIND, LOWER, SCALED)

    @gluon.jit
    def sum_exponentials(p, cap, bend):
        """Sum exp(f - cap) over the columns of p (128, 64), f = z / sqrt(bend z^2 + 1)."""
        layout: gl.constexpr = gl.BlockedLayout([1, 64], [32, 1], [4, 1], [1, 0])
        z = p.load(layout).to(gl.float32)
        f = z * gl.rsqrt(z * z * bend + 1.0)
        return gl.sum(gl.exp(f - cap), axis=1)

    @gluon.jit
    def store_exponentials(at, p, ready, empty, tile, row, m, cap, bend):
        """Wait for a consumer's tile of logits in p and store its sums; then p is free again."""
        mbarrier.wait(ready, tile & 1)
        total = sum_exponentials(p.index(0), cap, bend) + sum_exponentials(p.index(1), cap, bend)
        mbarrier.arrive(empty)
        rows = row + gl.arange(0, ROWS, total.type.layout)
        gl.store(at + rows, total, mask=rows < m)

    @gluon.jit
    def run_exponentials(first, second):
        """Run a third warpgroup, which sums exp(f - cap) of logits while the consumers go on."""
        operands, upper, upper_barriers, tiling, epilogue = first
        operands, lower, lower_barriers, tiling, epilogue = second
        down, across, groups, steps = tiling
        bias, scale, out, m, n, eps = epilogue
        cap, bend = eps
        tiles, member, members = divide_tiles(down, across, groups)
        for tile in range(tiles):
            row, column = locate_tile(tile * members + member, down, across, groups, "logits")
            at = out + column // COLUMNS * m
            store_exponentials(
                at, upper[2], upper_barriers[4], upper_barriers[5], tile, row, m, cap, bend
            )
            row += ROWS
            store_exponentials(
                at, lower[2], lower_barriers[4], lower_barriers[5], tile, row, m, cap, bend
            )

    @gluon.jit
    def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
        """Allocate and initialise COUNT barriers."""
        array = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(COUNT):
            mbarrier.init(array.index(i), count=ARRIVALS)
        return array

    @gluon.jit
    def allocate_consumer(A, C, b, b_barriers, STAGES: gl.constexpr):
        """Allocate a consumer's own buffers and barriers; those of B are shared."""
        a = gl.allocate_shared_memory(A.dtype, [STAGES] + A.block_type.shape, A.layout)
        p = gl.allocate_shared_memory(C.dtype, [2, ROWS, HALF], C.layout)
        p_barriers = make_barriers(2, 1)
        barriers = (make_barriers(STAGES, 1), make_barriers(STAGES, 1)) + b_barriers
        return (a, b, p), barriers + (p_barriers.index(0), p_barriers.index(1))

    @gluon.jit(repr=lambda kernel: kernel.constants["KIND"] + "_kernel")  # for profiles
    def gemm_kernel(
        A,
        B,
        C,
        extra,
        bias,
        scale,
        out,
        m,
        n,
        k,
        groups,
        row_tokens,
        eps,
        KIND: gl.constexpr,
        SCALED: gl.constexpr,
        STAGES_A: gl.constexpr,
        STAGES_B: gl.constexpr,
    ):
        """Compute C (m, n) from A (m, k), B (n, k) or (k, n) and the epilogue that KIND names:

        relu_square            relu(A B^T + bias)^2
        relu_square_gradient   (A B) 2 sqrt(extra) with extra = post; its sums over rows go to out
        qkv                    A B^T + bias; heads of q and k are normalised and rotated by the
                               angles in extra, 1 / rms goes to out (m, 2, heads)
        logits                 A B^T + bias; sums of exp(f - cap) go to out (n / 128, m)
        matmul                 [A extra] B; extra = A if B has no more rows than A has columns

        TMA moves blocks of A and B of 128 x 128 bytes, of C and extra of 128 x 64. The angles are
        float16 behind C's dtype, for row_tokens tokens and one tile more. `scale` undoes the
        rounding of A and B to 8 bits. eps is that of the norm or, for logits, (cap, bend).
        """
        b = gl.allocate_shared_memory(B.dtype, [STAGES_B] + B.block_type.shape, B.layout)
        b_barriers = make_barriers(STAGES_B, 1), make_barriers(STAGES_B, 2)
        upper, upper_barriers = allocate_consumer(A, C, b, b_barriers, STAGES_A)
        lower, lower_barriers = allocate_consumer(A, C, b, b_barriers, STAGES_A)
        operands, steps = (A, B, C, extra), gl.cdiv(k, A.block_type.shape[1])
        if KIND == "matmul":
            steps += gl.cdiv(B.shape[0] - k, A.block_type.shape[1])
        tiling = gl.cdiv(m, 2 * ROWS), gl.cdiv(n, COLUMNS), groups, steps
        epilogue = bias, scale, out, m, n, eps
        first = operands, upper, upper_barriers, tiling, epilogue
        second = operands, lower, lower_barriers, tiling, epilogue
        if KIND == "logits":  # warps, then registers of a thread; the first consumer has the rest
            gl.warp_specialize(
                [
                    (run_consumer, (first, KIND, False, SCALED)),
                    (run_consumer, (second, KIND, True, SCALED)),
                    (run_exponentials, (first, second)),
                    (run_producer, (first, row_tokens, KIND, False)),
                    (run_producer, (second, row_tokens, KIND, True)),
                ],
                [4, 4, 1, 1],
                [200, 88, 24, 24],
            )
        else:
            gl.warp_specialize(
                [
                    (run_consumer, (first, KIND, False, SCALED)),
                    (run_consumer, (second, KIND, True, SCALED)),
                    (run_producer, (first, row_tokens, KIND, False)),
                    (run_producer, (second, row_tokens, KIND, True)),
                ],
                [4, 1, 1],
                [232, 24, 24],
            )


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the CUDA compute capability; asking the driver each time would cost microseconds."""
    return torch.cuda.get_device_capability(device)


def gemm_obstacle(x: Tensor) -> str:
    """Return why the Gluon matmuls cannot take a tensor like x, or '' if they can."""
    if obstacle := triton_obstacle(x):
        return obstacle
    if gluon is None:
        return "Gluon missing in this Triton"
    if (found := compute_capability(x.device))[0] != 9:
        return f"compute capability {found}, needs 9"
    return ""


def round_to_e4m3(x: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x / scale in e4m3, whose largest number is 448, and scale. `largest` bounds |x|."""
    if largest is None:
        largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny * 448) / 448
    rounded = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    return torch.mul(x, 1 / scale, out=rounded), scale


@functools.cache
def count_sms(device: torch.device) -> int:
    """Return the number of SMs, each of which runs one program."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_layout(block: tuple[int, int], dtype: torch.dtype) -> object:
    """Return the layout in shared memory that wgmma and TMA expect."""
    kind = dict(float8_e4m3fn="float8e4nv").get(name := str(dtype).removeprefix("torch."), name)
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, kind))


def describe_blocks(whole: Tensor, *block: int) -> object:
    """Return a TMA descriptor that loads and stores such blocks of a matrix."""
    whole = whole.contiguous()
    return hopper.TensorDescriptor.from_tensor(
        whole, list(block), shared_layout(block, whole.dtype)
    )


def launch_options(kind: str) -> dict[str, int]:
    """Return the upper consumer's warps, and the mean registers of a thread (16 or 12 warps)."""
    return dict(num_warps=4, maxnreg=128 if kind == "logits" else 168)


def launch_gemm(
    kind: str,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    extra: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    groups: int = 1,
    row_tokens: int = 1,
    eps: float | tuple[float, float] = EPS,
) -> None:
    """Launch `gemm_kernel` with one program on each SM."""
    depth = 128 // A.element_size()
    block_B = (depth, 128) if kind in ("relu_square_gradient", "matmul") else (128, depth)
    operands = (
        describe_blocks(A, 128, depth),
        describe_blocks(B, *block_B),
        describe_blocks(C, 128, 64),
    )
    gemm_kernel[(count_sms(A.device),)](
        *operands,
        describe_blocks(extra, 128, 64),
        bias,
        scale,
        out,
        *C.shape,
        A.size(1),
        groups,
        row_tokens,
        eps,
        KIND=kind,
        SCALED=scale is not None,
        STAGES_A=STAGES_A,
        STAGES_B=STAGES_B,
        **launch_options(kind),
    )


def relu_square_by_gluon(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None = None, dtype=torch.bfloat16
) -> Tensor:
    """Return post = relu(x W^T + b)^2 (tokens, n).

    With a scale, x and W are in e4m3, their product is multiplied by it, and post is in `dtype`.
    """
    post = x.new_empty(len(x), len(W), dtype=x.dtype if scale is None else dtype)
    launch_gemm("relu_square", x, W, post, post, b, scale)
    return post


def relu_square_gradient_by_gluon(dy: Tensor, V: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """Return dpre = (dy V) 2 sqrt(post), as relu(pre) = sqrt(post), and its sum over tokens."""
    dpre, programs, n = torch.empty_like(post), count_sms(dy.device), post.size(1)
    groups = math.gcd(triton.cdiv(n, 128), programs)
    sums = torch.zeros(2 * programs // groups, n, dtype=torch.float32, device=dy.device)
    launch_gemm("relu_square_gradient", dy, V, dpre, post, out=sums, groups=groups)
    return dpre, sums.sum(dim=0)


def pack_angles(cos: Tensor, sin: Tensor) -> Tensor:
    """Return cos, sin (row_tokens + 128, HEAD_DIM), as a tile may begin at any token of a row."""
    tokens = torch.arange(len(cos) + 128, device=cos.device) % len(cos)
    return torch.cat([cos, sin], dim=-1)[tokens, 0].half()  # rounds 8 times finer than bfloat16


def qkv_by_gluon(
    x: Tensor, W: Tensor, b: Tensor, cos: Tensor, sin: Tensor, angles: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q, k, v (tokens, 3, heads, HEAD_DIM) of x W^T + b and 1 / rms of q and k per head.

    q and k are divided by their rms and rotated. angles: `pack_angles(cos, sin)`.
    """
    qkv, heads = x.new_empty(len(x), len(W)), len(W) // (3 * HEAD_DIM)
    scales = torch.empty(len(x), 2, heads, dtype=torch.float32, device=x.device)
    launch_gemm("qkv", x, W, qkv, angles.view(x.dtype), b, out=scales, row_tokens=len(cos))
    return qkv.view(len(x), 3, heads, HEAD_DIM), scales


def matmul_by_gluon(x: Tensor, W: Tensor, y: Tensor | None = None) -> Tensor:
    """Return [x y] W for x (tokens, k), y (tokens, l) and W (k + l, n), or x W without y."""
    launch_gemm("matmul", x, W, C := x.new_empty(len(x), W.size(1)), x if y is None else y)
    return C


def logits_by_gluon(x: Tensor, W: Tensor, b: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Return z = x W^T + b (tokens, n), n a multiple of 128, and sums (n / 128, tokens).

    Each sum is that of exp(f - cap) over 128 columns, f = z / sqrt(z^2 / cap^2 + 1).
    """
    z, parts = x.new_empty(len(x), len(W)), len(W) // 128
    sums = torch.empty(parts, len(x), dtype=torch.float32, device=x.device)
    groups = math.gcd(parts, count_sms(x.device))
    launch_gemm("logits", x, W, z, z, b, out=sums, groups=groups, eps=(cap, cap**-2))
    return z, sums
