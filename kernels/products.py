"""Matrix products for Hopper GPUs, with ends of our own: one half multiplies, the other finishes.

Each processor makes tiles of C = A B, 256 x 128. Two groups of four warps hold 128 rows each and
share what is loaded of B. Two single warps load, also what the end of a tile takes: angles, or what
a gradient is multiplied by. In Triton all warps finish a tile at once, and the tensor cores wait;
this is Gluon, the layer below it, where layouts, barriers and the roles of warps are written out.
"""

import functools
import math

import torch
from torch import Tensor

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
except (ImportError, AttributeError):  # a CPU build of torch, or a Triton of other names
    gluon = None

EPS = torch.finfo(torch.float32).eps  # F.rms_norm's, also for half precision
HEAD_DIM = 128  # of qkv: a tile is as wide as a head
LOADS_A, LOADS_B = 3, 4  # parts of A and B, 128 bytes deep, that are loaded or wait to be used

if gluon is not None:
    ROWS, COLUMNS, HALF = gl.constexpr(128), gl.constexpr(128), gl.constexpr(64)  # of one group

    @gluon.jit
    def share_of(down, across, groups):
        """How many of down x across tiles are this program's, its place and how many share."""
        members = gl.num_programs(0) // groups
        member = gl.program_id(0) % members
        return gl.cdiv(down * (across // groups) - member, members), member, members

    @gluon.jit
    def place_of(item, down, across, groups, KIND: gl.constexpr):
        """First row and column of a tile, row by row of tiles. For a gradient a group of programs
        goes down one of its columns, then the next: sums over rows stay in registers till then. So
        it does for logits, whose B is larger than A."""
        if KIND == "relu_square_gradient" or KIND == "logits":
            group = gl.program_id(0) // (gl.num_programs(0) // groups)
            row, column = item % down, group * (across // groups) + item // down
        else:
            row, column = item // across, item % across
        return row * (2 * ROWS), column * COLUMNS

    @gluon.jit
    def load_more(more, p, ready, row, column, across, row_tokens, KIND: gl.constexpr):
        """What the end of a tile takes: its part of post, or the angles of its tokens, for q, k."""
        if KIND == "relu_square_gradient" or 3 * column < 2 * across * COLUMNS:
            at, along = row, column
            if KIND == "qkv":
                at, along = row % row_tokens, 0
            mbarrier.expect(ready, 2 * more.block_type.nbytes)
            load_block(more, [at, along], ready, p.index(0))
            load_block(more, [at, along + HALF], ready, p.index(1))
        else:
            mbarrier.arrive(ready)

    @gluon.jit
    def load_part(work, row_tokens, KIND: gl.constexpr, LOWER: gl.constexpr):
        """One warp: a group's rows of A and what its ends take, for the upper group also B."""
        given, parts, bars, sizes, ends = work
        A, B, C, more = given
        a, b, p = parts
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = bars
        down, across, groups, steps = sizes
        DEPTH: gl.constexpr = A.block_type.shape[1]
        of_A = gl.cdiv(A.shape[1], DEPTH)  # steps; what is beyond its columns counts as zeros
        turns, member, members = share_of(down, across, groups)
        i = 0
        for turn in range(turns):
            row, column = place_of(turn * members + member, down, across, groups, KIND)
            row += LOWER * ROWS
            for step in range(steps):
                if not LOWER:
                    slot = i % b_ready.shape[0]
                    mbarrier.wait(b_empty.index(slot), i // b_ready.shape[0] & 1 ^ 1)
                    mbarrier.expect(b_ready.index(slot), B.block_type.nbytes)
                    at, along = column, step * DEPTH
                    if KIND == "relu_square_gradient" or KIND == "joined":
                        at, along = along, column
                    if KIND == "joined":
                        at -= gl.where(step < of_A, 0, of_A * DEPTH - A.shape[1])
                    load_block(B, [at, along], b_ready.index(slot), b.index(slot))
                slot = i % a_ready.shape[0]
                mbarrier.wait(a_empty.index(slot), i // a_ready.shape[0] & 1 ^ 1)
                mbarrier.expect(a_ready.index(slot), A.block_type.nbytes)
                if KIND == "joined" and step >= of_A:
                    at = (step - of_A) * DEPTH
                    load_block(more, [row, at], a_ready.index(slot), a.index(slot))
                else:
                    load_block(A, [row, step * DEPTH], a_ready.index(slot), a.index(slot))
                i += 1
                if KIND == "relu_square_gradient" or KIND == "qkv":
                    if step == gl.maximum(steps - 2, gl.minimum(steps - 1, 1)):  # A and B first
                        mbarrier.wait(p_empty, turn & 1 ^ 1)
                        load_more(more, p, p_ready, row, column, across, row_tokens, KIND)

    @gluon.jit
    def multiply(parts, bars, i, turn, steps, KIND: gl.constexpr):
        """The left and the right half of a group's rows of A B, and the number of the next part."""
        a, b, p = parts
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = bars
        depth: gl.constexpr = 256 // a.dtype.primitive_bitwidth  # of an instruction
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, depth])
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for step in range(steps):
            from_a, from_b = i % a_ready.shape[0], i % b_ready.shape[0]
            mbarrier.wait(b_ready.index(from_b), i // b_ready.shape[0] & 1)
            mbarrier.wait(a_ready.index(from_a), i // a_ready.shape[0] & 1)
            factor = b.index(from_b)
            if KIND != "relu_square_gradient" and KIND != "joined":
                factor = factor.permute((1, 0))
            acc = warpgroup_mma(a.index(from_a), factor, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # for the one before
            from_a, from_b = (i - 1) % a_ready.shape[0], (i - 1) % b_ready.shape[0]
            mbarrier.arrive(a_empty.index(from_a), pred=step > 0)
            mbarrier.arrive(b_empty.index(from_b), pred=step > 0)
            if KIND == "relu_square_gradient" or KIND == "qkv":
                if step == gl.minimum(steps - 1, 1):  # by now the tile before is read from p
                    tma.store_wait(0)
                    mbarrier.arrive(p_empty, pred=turn > 0)
            i += 1
        product = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(a_empty.index((i - 1) % a_ready.shape[0]))
        mbarrier.arrive(b_empty.index((i - 1) % b_ready.shape[0]))
        left, right = product.reshape([ROWS, 2, HALF]).permute(0, 2, 1).split()
        return left, right, i

    @gluon.jit
    def over_rows(x):
        """Sums of x (128, n) over those rows that a thread holds."""
        return gl.sum(gl.sum(x.reshape([2, 4, 2, 8, x.shape[1]]), axis=2), axis=0)

    @gluon.jit
    def store_sums(out, sums, columns):
        """Sums (4, 8, n) of over_rows: first over the threads of a warp, then over warps."""
        total = gl.sum(gl.sum(sums, axis=1), axis=0)
        each = gl.arange(0, total.shape[0], total.type.layout)
        gl.store(out + each, total, mask=each < columns)

    @gluon.jit
    def store_half(C, row, column, p, x):
        p.store(x.to(C.dtype))
        fence_async_shared()
        store_block(C, [row, column], p)

    @gluon.jit
    def gradient_part(work, LOWER: gl.constexpr):
        """A group's part of (A B) 2 sqrt(post), and of its sums over rows."""
        given, parts, bars, sizes, ends = work
        A, B, C, more = given
        a, b, p = parts
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = bars
        down, across, groups, steps = sizes
        bias, scale, out, m, n, eps = ends
        turns, member, members = share_of(down, across, groups)
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
        zeros = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        none, _ = zeros.reshape([ROWS, 2, HALF]).permute(0, 2, 1).split()
        left_sums, right_sums = over_rows(none), over_rows(none)
        i = 0
        for turn in range(turns):
            item = turn * members + member
            row, column = place_of(item, down, across, groups, "relu_square_gradient")
            row += LOWER * ROWS
            left, right, i = multiply(parts, bars, i, turn, steps, "relu_square_gradient")
            half: gl.constexpr = left.type.layout
            mbarrier.wait(p_ready, turn & 1)
            left *= 2 * gl.sqrt(p.index(0).load(half).to(gl.float32))
            store_half(C, row, column, p.index(0), left)
            right *= 2 * gl.sqrt(p.index(1).load(half).to(gl.float32))
            store_half(C, row, column + HALF, p.index(1), right)
            left_sums += over_rows(left)
            right_sums += over_rows(right)
            if item // down < (item + members) // down:  # the last of its column
                at = out + (member * 2 + LOWER) * n + column
                store_sums(at, left_sums, n - column)
                store_sums(at + HALF, right_sums, n - column - HALF)
                left_sums, right_sums = over_rows(none), over_rows(none)
        tma.store_wait(0)

    @gluon.jit
    def rotated(left, right, p, p_ready, turn, row, head, heads, ends):
        """Both halves of a head, for q and k of norm 1 and rotated; stores what it took."""
        bias, scale, out, m, n, eps = ends
        half: gl.constexpr = left.type.layout
        s = gl.rsqrt(gl.sum(left * left + right * right, axis=1) / COLUMNS + eps)
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, half))
        gl.store(out + rows * (2 * heads) + head, s, mask=(rows < m) & (head < 2 * heads))
        mbarrier.wait(p_ready, turn & 1)
        if head < 2 * heads:
            c = p.index(0).load(half).to(gl.float16, bitcast=True).to(gl.float32)
            d = p.index(1).load(half).to(gl.float16, bitcast=True).to(gl.float32)
            c *= s[:, None]
            d *= s[:, None]
            left, right = left * c + right * d, right * c - left * d
        return left, right

    @gluon.jit
    def product_part(work, KIND: gl.constexpr, LOWER: gl.constexpr, SCALED: gl.constexpr):
        """A group's part of a product, with its bias but for joined, and ends but a gradient's."""
        given, parts, bars, sizes, ends = work
        A, B, C, more = given
        a, b, p = parts
        a_ready, a_empty, b_ready, b_empty, p_ready, p_empty = bars
        down, across, groups, steps = sizes
        bias, scale, out, m, n, eps = ends
        turns, member, members = share_of(down, across, groups)
        i = 0
        for turn in range(turns):
            row, column = place_of(turn * members + member, down, across, groups, KIND)
            row += LOWER * ROWS
            left, right, i = multiply(parts, bars, i, turn, steps, KIND)
            if SCALED:
                left, right = left * gl.load(scale), right * gl.load(scale)
            if KIND != "joined":
                columns = column + gl.arange(0, HALF, gl.SliceLayout(0, left.type.layout))
                left += gl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
                columns += HALF
                right += gl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
            if KIND == "relu_square":  # as relu, keeps what is NaN
                left = gl.where(left < 0, 0.0, left * left)
                right = gl.where(right < 0, 0.0, right * right)
            if KIND == "qkv":
                head, heads = column // COLUMNS, n // (3 * COLUMNS)
                left, right = rotated(left, right, p, p_ready, turn, row, head, heads, ends)
            else:
                tma.store_wait(0)
            if KIND == "logits":
                mbarrier.wait(p_empty, turn & 1 ^ 1)
            store_half(C, row, column, p.index(0), left)
            store_half(C, row, column + HALF, p.index(1), right)
            if KIND == "logits":
                mbarrier.arrive(p_ready)
        tma.store_wait(0)

    @gluon.jit
    def group_part(work, KIND: gl.constexpr, LOWER: gl.constexpr, SCALED: gl.constexpr):
        """Four warps: 128 rows of each tile, from the product to what is written."""
        if KIND == "relu_square_gradient":
            gradient_part(work, LOWER)
        else:
            product_part(work, KIND, LOWER, SCALED)

    @gluon.jit
    def powers_of(p, cap, bend):
        """Sums of exp(f - cap) over the columns of p (128, 64), f = z / sqrt(bend z^2 + 1)."""
        layout: gl.constexpr = gl.BlockedLayout([1, 64], [32, 1], [4, 1], [1, 0])
        z = p.load(layout).to(gl.float32)
        f = z * gl.rsqrt(z * z * bend + 1.0)
        return gl.sum(gl.exp(f - cap), axis=1)

    @gluon.jit
    def store_powers(at, p, ready, empty, turn, row, m, cap, bend):
        mbarrier.wait(ready, turn & 1)
        total = powers_of(p.index(0), cap, bend) + powers_of(p.index(1), cap, bend)
        mbarrier.arrive(empty)
        rows = row + gl.arange(0, ROWS, total.type.layout)
        gl.store(at + rows, total, mask=rows < m)

    @gluon.jit
    def powers_part(first, second):
        """Four warps more, for logits: from what the others have stored, while these go on."""
        given, upper, upper_bars, sizes, ends = first
        given, lower, lower_bars, sizes, ends = second
        down, across, groups, steps = sizes
        bias, scale, out, m, n, eps = ends
        cap, bend = eps
        turns, member, members = share_of(down, across, groups)
        for turn in range(turns):
            row, column = place_of(turn * members + member, down, across, groups, "logits")
            at = out + column // COLUMNS * m
            store_powers(at, upper[2], upper_bars[4], upper_bars[5], turn, row, m, cap, bend)
            row += ROWS
            store_powers(at, lower[2], lower_bars[4], lower_bars[5], turn, row, m, cap, bend)

    @gluon.jit
    def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
        made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(COUNT):
            mbarrier.init(made.index(i), count=ARRIVALS)
        return made

    @gluon.jit
    def memory_of(A, C, b, b_bars, LOADS: gl.constexpr):
        """What a group has for itself, beside what both have of B: memory, barriers."""
        a = gl.allocate_shared_memory(A.dtype, [LOADS] + A.block_type.shape, A.layout)
        p = gl.allocate_shared_memory(C.dtype, [2, ROWS, HALF], C.layout)
        p_bars = barriers(2, 1)
        bars = (barriers(LOADS, 1), barriers(LOADS, 1)) + b_bars
        return (a, b, p), bars + (p_bars.index(0), p_bars.index(1))

    @gluon.jit(repr=lambda given: given.constants["KIND"] + "_kernel")  # in profiles
    def product_kernel(
        A,
        B,
        C,
        more,
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
        LOADS_A: gl.constexpr,
        LOADS_B: gl.constexpr,
    ):
        """C (m, n), as its KIND says: relu_square, its gradient, qkv or logits of kernels, or
        joined, [A more] B.

        A (m, k); B (n, k), for a gradient (k, n), for joined of as many rows as A and more have
        columns; each by blocks of 128 x 128 bytes, C by 128 x 64. more, by blocks as C: post of a
        gradient, or angles (bits of float16 as C's type) of row_tokens tokens and a tile's; joined
        has A there where nothing follows it. out: rows of sums over rows, scales
        (m, 2, heads), or sums of powers (n / 128, m). scale: what brings products of 8 bits back.
        eps: of a norm, or of logits (cap, bend).
        """
        b = gl.allocate_shared_memory(B.dtype, [LOADS_B] + B.block_type.shape, B.layout)
        b_bars = barriers(LOADS_B, 1), barriers(LOADS_B, 2)
        upper, upper_bars = memory_of(A, C, b, b_bars, LOADS_A)
        lower, lower_bars = memory_of(A, C, b, b_bars, LOADS_A)
        given, steps = (A, B, C, more), gl.cdiv(k, A.block_type.shape[1])
        if KIND == "joined":
            steps += gl.cdiv(B.shape[0] - k, A.block_type.shape[1])
        sizes = gl.cdiv(m, 2 * ROWS), gl.cdiv(n, COLUMNS), groups, steps
        ends = bias, scale, out, m, n, eps
        first = given, upper, upper_bars, sizes, ends
        second = given, lower, lower_bars, sizes, ends
        if KIND == "logits":  # warps, and registers of a thread; the first has those that are left
            gl.warp_specialize(
                [
                    (group_part, (first, KIND, False, SCALED)),
                    (group_part, (second, KIND, True, SCALED)),
                    (powers_part, (first, second)),
                    (load_part, (first, row_tokens, KIND, False)),
                    (load_part, (second, row_tokens, KIND, True)),
                ],
                [4, 4, 1, 1],
                [200, 88, 24, 24],
            )
        else:
            gl.warp_specialize(
                [
                    (group_part, (first, KIND, False, SCALED)),
                    (group_part, (second, KIND, True, SCALED)),
                    (load_part, (first, row_tokens, KIND, False)),
                    (load_part, (second, row_tokens, KIND, True)),
                ],
                [4, 1, 1],
                [232, 24, 24],
            )


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def layout_of(block: tuple[int, int], dtype: torch.dtype) -> object:
    """In shared memory."""
    kind = dict(float8_e4m3fn="float8e4nv").get(name := str(dtype).removeprefix("torch."), name)
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, kind))


def blocks_of(whole: Tensor, *block: int) -> object:
    whole = whole.contiguous()
    return hopper.TensorDescriptor.from_tensor(whole, list(block), layout_of(block, whole.dtype))


def warps_of(kind: str) -> dict[str, int]:
    """Of the upper group; and the registers of a thread, on average over 16 or 12 warps."""
    return dict(num_warps=4, maxnreg=128 if kind == "logits" else 168)


def launch(
    kind: str,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    more: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    groups: int = 1,
    row_tokens: int = 1,
    eps: float | tuple[float, float] = EPS,
) -> None:
    depth = 128 // A.element_size()
    of_B = (depth, 128) if kind in ("relu_square_gradient", "joined") else (128, depth)
    given = blocks_of(A, 128, depth), blocks_of(B, *of_B), blocks_of(C, 128, 64)
    product_kernel[(processors(A.device),)](
        *given,
        blocks_of(more, 128, 64),
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
        LOADS_A=LOADS_A,
        LOADS_B=LOADS_B,
        **warps_of(kind),
    )


def relu_square_by_gluon(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None = None, dtype=torch.bfloat16
) -> Tensor:
    """(tokens, n); x and W of 8 bits with the scale of their product, post then in `dtype`."""
    post = x.new_empty(len(x), len(W), dtype=x.dtype if scale is None else dtype)
    launch("relu_square", x, W, post, post, b, scale)
    return post


def relu_square_gradient_by_gluon(dy: Tensor, V: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    dpre, programs, n = torch.empty_like(post), processors(dy.device), post.size(1)
    groups = math.gcd(triton.cdiv(n, 128), programs)
    sums = torch.zeros(2 * programs // groups, n, dtype=torch.float32, device=dy.device)
    launch("relu_square_gradient", dy, V, dpre, post, out=sums, groups=groups)
    return dpre, sums.sum(dim=0)


def angles_of(cos: Tensor, sin: Tensor) -> Tensor:
    """(row_tokens and a tile more, HEAD_DIM): a tile may begin at any token of a row."""
    tokens = torch.arange(len(cos) + 128, device=cos.device) % len(cos)
    return torch.cat([cos, sin], dim=-1)[tokens, 0].half()  # to 1/8 of what bfloat16 rounds


def qkv_by_gluon(
    x: Tensor, W: Tensor, b: Tensor, cos: Tensor, sin: Tensor, angles: Tensor
) -> tuple[Tensor, Tensor]:
    qkv, heads = x.new_empty(len(x), len(W)), len(W) // (3 * HEAD_DIM)
    scales = torch.empty(len(x), 2, heads, dtype=torch.float32, device=x.device)
    launch("qkv", x, W, qkv, angles.view(x.dtype), b, out=scales, row_tokens=len(cos))
    return qkv.view(len(x), 3, heads, HEAD_DIM), scales


def joined_by_gluon(x: Tensor, W: Tensor, y: Tensor | None = None) -> Tensor:
    """[x y] W of x (tokens, k), y (tokens, l) and W (k + l, n); without y just x W."""
    launch("joined", x, W, C := x.new_empty(len(x), W.size(1)), x if y is None else y)
    return C


def logits_by_gluon(x: Tensor, W: Tensor, b: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """z = x W^T + b (tokens, n), n a multiple of 128, and (n / 128, tokens): sums of exp(f - cap)
    over 128 columns each, f = z / sqrt(z^2 / cap^2 + 1)."""
    z, parts = x.new_empty(len(x), len(W)), len(W) // 128
    sums = torch.empty(parts, len(x), dtype=torch.float32, device=x.device)
    groups = math.gcd(parts, processors(x.device))
    launch("logits", x, W, z, z, b, out=sums, groups=groups, eps=(cap, cap**-2))
    return z, sums
