"""Kernels of one pass over memory each, in Triton, and their launches; kernels says what they make.

Sums over tokens: programs that take a part of the tokens each store what they have of them, and
sum_kernel adds a thousand of these faster than torch.sum; of the head's 128 it does not.
"""

import torch
from torch import Tensor

from .products import EPS

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

CAP = 15.0
LEAST_GAIN = 2.0**-60  # in place of gains nearer to 0, as gradients divide by them; not in float16
PROGRAMS = 1056  # that sum over tokens, each its part: 8 for each of an H100's 132 processors

if triton is not None:

    @triton.jit
    def norm_kernel(
        h,
        shift,
        gain,
        n,
        scales,
        tokens,
        eps,
        least,
        width: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Program i: ROWS tokens of n = gain v s, v = h + shift, s = 1 / rms(v) in scales."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        here = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows < tokens)[:, None] & (columns < width)[None, :]
        g = tl.load(gain + columns, mask=columns < width, other=0.0)
        v = tl.load(h + here, mask=inside, other=0.0).to(tl.float32)
        v += tl.load(shift + columns, mask=columns < width, other=0.0)[None, :]
        s = tl.rsqrt(tl.sum(v * v, axis=1) / width + eps)
        tl.store(scales + rows, s, mask=rows < tokens)
        v *= s[:, None] * tl.where(tl.abs(g) < least, least, g)[None, :]
        tl.store(n + here, v.to(n.dtype.element_ty), mask=inside)

    @triton.jit
    def norm_gradient_kernel(
        dh,
        dn,
        n,
        gain,
        scales,
        dx,
        sums,
        tokens,
        least,
        turns: tl.constexpr,
        width: tl.constexpr,
        PASSED: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Program p: dx of its part of the tokens; sums[p]: of dgain, then of dx (= dbias)."""
        columns = tl.arange(0, BLOCK)
        g = tl.load(gain + columns, mask=columns < width, other=0.0)[None, :]
        g = tl.where(tl.abs(g) < least, least, g)
        back = 1.0 / g
        dgain = tl.zeros((ROWS, BLOCK), tl.float32)
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)
        for turn in tl.range(turns, num_stages=3):
            rows = (turn * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
            here = rows[:, None].to(tl.int64) * width + columns[None, :]
            inside = (rows < tokens)[:, None] & (columns < width)[None, :]
            s = tl.load(scales + rows, mask=rows < tokens, other=0.0)[:, None]
            u = tl.load(n + here, mask=inside, other=0.0).to(tl.float32) * back
            d = tl.load(dn + here, mask=inside, other=0.0).to(tl.float32)
            dgain += d * u
            d *= g
            d = (d - u * (tl.sum(d * u, axis=1) / width)[:, None]) * s
            if PASSED:
                d += tl.load(dh + here, mask=inside, other=0.0).to(tl.float32)
            dbias += d
            tl.store(dx + here, d.to(dx.dtype.element_ty), mask=inside)
        at = sums + tl.program_id(0) * 2 * width + columns
        tl.store(at, tl.sum(dgain, axis=0), mask=columns < width)
        tl.store(at + width, tl.sum(dbias, axis=0), mask=columns < width)

    @triton.jit
    def embed_kernel(
        ids,
        table,
        gain,
        next_gain,
        h,
        n,
        scales,
        tokens,
        eps,
        least,
        width: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Program i: ROWS tokens of h = gain x / rms(x), x of the table, and of n, the norm of h,
        s = 1 / rms(h) in scales."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        each = tl.load(ids + rows, mask=rows < tokens, other=0).to(tl.int64)
        here = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows < tokens)[:, None] & (columns < width)[None, :]
        f = tl.load(gain + columns, mask=columns < width, other=0.0)
        g = tl.load(next_gain + columns, mask=columns < width, other=0.0)
        there = each[:, None] * width + columns[None, :]
        x = tl.load(table + there, mask=inside, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None] * f[None, :]
        v = x.to(h.dtype.element_ty)
        tl.store(h + here, v, mask=inside)
        v = v.to(tl.float32)
        s = tl.rsqrt(tl.sum(v * v, axis=1) / width + eps)
        tl.store(scales + rows, s, mask=rows < tokens)
        v *= s[:, None] * tl.where(tl.abs(g) < least, least, g)[None, :]
        tl.store(n + here, v.to(n.dtype.element_ty), mask=inside)

    @triton.jit
    def embed_gradient_kernel(
        dh,
        dn,
        n,
        ids,
        order,
        table,
        gain,
        next_gain,
        scales,
        dtable,
        sums,
        tokens,
        eps,
        least,
        turns: tl.constexpr,
        width: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Program p: its part of the tokens, sorted by id: adds the sum of a word's rows to dtable,
        in an order that varies where programs share a word; sums[p]: of dgain, then of next_dgain.
        order: where the sorted tokens were."""
        columns = tl.arange(0, BLOCK)
        f = tl.load(gain + columns, mask=columns < width, other=0.0)
        g = tl.load(next_gain + columns, mask=columns < width, other=0.0)
        g = tl.where(tl.abs(g) < least, least, g)
        back = 1.0 / g
        dgain, next_dgain = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for turn in tl.range(turns, num_stages=3):
            at = tl.program_id(0) * turns + turn
            row = tl.load(order + at, mask=at < tokens, other=0).to(tl.int64)
            word = tl.load(ids + at, mask=at < tokens, other=0).to(tl.int64)
            next_word = tl.load(ids + at + 1, mask=at + 1 < tokens, other=-1)
            here, inside = row * width + columns, (at < tokens) & (columns < width)
            u = tl.load(n + here, mask=inside, other=0.0).to(tl.float32) * back
            d = tl.load(dn + here, mask=inside, other=0.0).to(tl.float32)
            next_dgain += d * u
            d *= g
            d = (d - u * (tl.sum(d * u, axis=0) / width)) * tl.load(scales + row)
            d += tl.load(dh + here, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(table + word * width + columns, mask=inside, other=0.0).to(tl.float32)
            s = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
            x *= s
            dgain += d * x
            d *= f
            total += (d - x * (tl.sum(d * x, axis=0) / width)) * s
            last = (turn == turns - 1) | (next_word != word)
            to = dtable + word * width + columns
            tl.atomic_add(to, total, mask=inside & last, sem="relaxed")
            total = tl.where(last, 0.0, total)
        at = sums + tl.program_id(0) * 2 * width + columns
        tl.store(at, dgain, mask=columns < width)
        tl.store(at + width, next_dgain, mask=columns < width)

    @triton.jit
    def rotary_gradient_kernel(
        dq,
        dk,
        qkv,
        cos,
        sin,
        scales,
        dqk,
        sums,
        tokens,
        row_tokens,
        turns: tl.constexpr,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Program p: its part of the tokens of dqk; sums[p] of them, (2, HEADS, 2 HALF). Programs
        are a multiple of row_tokens: all tokens of one have the same place in their rows, so the
        same angles.

        y = rotated u, u = s x: dx = s R^T (dy - y mean(dy y)), as rotations keep products.
        """
        head, c = tl.arange(0, BLOCK), tl.arange(0, HALF)
        each, real = head[:, None] * 2 * HALF + c[None, :], head < HEADS
        table = tl.program_id(0) % row_tokens * HALF + c
        across, up = tl.load(cos + table)[None, :], tl.load(sin + table)[None, :]
        width = 2 * HEADS * HALF
        for part in tl.static_range(2):
            first, second = tl.zeros((BLOCK, HALF), tl.float32), tl.zeros((BLOCK, HALF), tl.float32)
            for turn in tl.range(turns, num_stages=3):
                row = (turn * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
                here = row < tokens
                inside = (real & here)[:, None]
                given = (dk if part else dq) + row * width + each
                a = tl.load(given, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(given + HALF, mask=inside, other=0.0).to(tl.float32)
                turned = qkv + row * (3 * width) + part * width + each
                y = tl.load(turned, mask=inside, other=0.0).to(tl.float32)
                z = tl.load(turned + HALF, mask=inside, other=0.0).to(tl.float32)
                mean = (tl.sum(a * y + b * z, axis=1) / (2 * HALF))[:, None]
                of_head = scales + row * 2 * HEADS + part * HEADS + head
                s = tl.load(of_head, mask=real & here, other=0.0)[:, None]
                a, b = (a - y * mean) * s, (b - z * mean) * s
                a, b = a * across - b * up, a * up + b * across
                first += a
                second += b
                to = dqk + row * (2 * width) + part * width + each
                tl.store(to, a.to(dqk.dtype.element_ty), mask=inside)
                tl.store(to + HALF, b.to(dqk.dtype.element_ty), mask=inside)
            at = sums + tl.program_id(0) * 2 * width + part * width + each
            tl.store(at, first, mask=real[:, None])
            tl.store(at + HALF, second, mask=real[:, None])

    @triton.jit
    def capped_loss_kernel(
        Z, targets, losses, log_sums, cap, bend, n: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Program i: the loss of row i of Z (rows, n), dense, and log sum exp(f). bend: cap^-2."""
        row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        at, sums = Z + row * n, tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            inside = start + columns < n
            z = tl.load(at + start + columns, mask=inside, other=0.0).to(tl.float32)
            f = z * tl.rsqrt(z * z * bend + 1.0)
            sums += tl.where(inside, tl.exp(f - cap), 0.0)
        log_sum = cap + tl.log(tl.sum(sums, axis=0))
        hit = tl.load(at + tl.load(targets + row)).to(tl.float32)
        tl.store(losses + row, log_sum - hit * tl.rsqrt(hit * hit * bend + 1.0))
        tl.store(log_sums + row, log_sum)

    @triton.jit
    def gathered_loss_kernel(
        Z,
        targets,
        sums,
        losses,
        log_sums,
        rows,
        cap,
        bend,
        parts: tl.constexpr,
        n: tl.constexpr,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        """Program i: what capped_loss_kernel gives, of ROWS rows, from sums (parts, rows) of
        exp(f - cap)."""
        row, total = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.zeros((ROWS,), tl.float32)
        inside = row < rows
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            here = (part < parts)[:, None] & inside[None, :]
            each = tl.load(sums + part[:, None] * rows + row[None, :], mask=here, other=0.0)
            total += tl.sum(each, axis=0)
        log_sum = cap + tl.log(total)
        target = tl.load(targets + row, mask=inside, other=0)
        hit = tl.load(Z + row.to(tl.int64) * n + target, mask=inside, other=0.0).to(tl.float32)
        loss = log_sum - hit * tl.rsqrt(hit * hit * bend + 1.0)
        tl.store(losses + row, loss, mask=inside)
        tl.store(log_sums + row, log_sum, mask=inside)

    @triton.jit
    def capped_gradient_kernel(
        Z,
        targets,
        log_sums,
        sums,
        rows,
        bend,
        n: tl.constexpr,
        PART: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Program (j, p): columns j of PART rows of Z become dz; sums[p] of them over the rows."""
        columns, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
        inside, total = columns < n, tl.zeros((BLOCK,), tl.float32)
        for each in range(PART):
            row = (part * PART + each).to(tl.int64)
            at, here = Z + row * n + columns, columns < tl.where(row < rows, n, 0)
            z = tl.load(at, mask=here, other=0.0).to(tl.float32)
            s = tl.rsqrt(z * z * bend + 1.0)
            p = tl.exp(z * s - tl.load(log_sums + row, mask=row < rows, other=0.0))
            hit = columns == tl.load(targets + row, mask=row < rows, other=-1)
            dz = (p - tl.where(hit, 1.0, 0.0)) * (s * s * s)
            total += tl.where(here, dz, 0.0)
            tl.store(at, dz.to(Z.dtype.element_ty), mask=here)
        tl.store(sums + part * n + columns, total, mask=inside)

    @triton.jit
    def multiply_kernel(x, factor, count, BLOCK: tl.constexpr):
        """Program i: block i of x *= factor. By 1, as a loss's own gradient is, x is not read."""
        f = tl.load(factor)
        if f != 1.0:
            at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            y = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32) * f
            tl.store(x + at, y.to(x.dtype.element_ty), mask=at < count)

    @triton.jit
    def sum_kernel(x, total, n, rows: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """Program i: block i of the sums of x (rows, n) over its rows."""
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in tl.static_range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & (columns < n)[None, :]
            sums += tl.load(x + row[:, None] * n + columns[None, :], mask=inside, other=0.0)
        tl.store(total + columns, tl.sum(sums, axis=0), mask=columns < n)


def power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()


def sum_by_triton(x: Tensor) -> Tensor:
    """Over the first dimension of x, dense and in float32."""
    total, block = torch.empty_like(x[0]), 16
    sum_kernel[(triton.cdiv(total.numel(), block),)](
        x, total, total.numel(), rows=len(x), ROWS=128, BLOCK=block, num_warps=4
    )
    return total


def norm_by_triton(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, width), rows, n = h.shape, 2, torch.empty_like(h)
    scales = torch.empty(tokens, dtype=torch.float32, device=h.device)
    norm_kernel[(triton.cdiv(tokens, rows),)](
        h,
        shift,
        gain,
        n,
        scales,
        tokens,
        EPS,
        LEAST_GAIN,
        width=width,
        ROWS=rows,
        BLOCK=power_of_two(width),
        num_warps=4,
    )
    return n, scales


def norm_gradient_by_triton(
    dh: Tensor | None, dn: Tensor, n: Tensor, gain: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), rows, dx = n.shape, 1, torch.empty_like(n)
    sums = torch.empty(PROGRAMS, 2, width, dtype=torch.float32, device=n.device)
    norm_gradient_kernel[(PROGRAMS,)](
        dh,
        dn.contiguous(),
        n,
        gain,
        scales,
        dx,
        sums,
        tokens,
        LEAST_GAIN,
        turns=triton.cdiv(tokens, PROGRAMS * rows),
        width=width,
        PASSED=dh is not None,
        ROWS=rows,
        BLOCK=power_of_two(width),
        num_warps=max(1, power_of_two(width) // 1024),
    )
    return dx, *sum_by_triton(sums)


def embed_by_triton(
    ids: Tensor, table: Tensor, gain: Tensor, next_gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width, rows = len(ids), table.size(1), 2
    h, n = table.new_empty(tokens, width), table.new_empty(tokens, width)  # no views of one
    scales = torch.empty(tokens, dtype=torch.float32, device=table.device)
    embed_kernel[(triton.cdiv(tokens, rows),)](
        ids,
        table,
        gain,
        next_gain,
        h,
        n,
        scales,
        tokens,
        EPS,
        LEAST_GAIN,
        width=width,
        ROWS=rows,
        BLOCK=power_of_two(width),
        num_warps=4,
    )
    return h, n, scales


def embed_gradient_by_triton(
    dh: Tensor,
    dn: Tensor,
    n: Tensor,
    ids: Tensor,
    table: Tensor,
    gain: Tensor,
    next_gain: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), (ids, order) = n.shape, ids.int().sort()
    dtable = torch.zeros_like(table, dtype=torch.float32)
    sums = torch.empty(PROGRAMS, 2, width, dtype=torch.float32, device=n.device)
    embed_gradient_kernel[(PROGRAMS,)](
        dh.contiguous(),
        dn.contiguous(),
        n,
        ids,
        order,
        table,
        gain,
        next_gain,
        scales,
        dtable,
        sums,
        tokens,
        EPS,
        LEAST_GAIN,
        turns=triton.cdiv(tokens, PROGRAMS),
        width=width,
        BLOCK=power_of_two(width),
        num_warps=max(1, power_of_two(width) // 1024),
    )
    return dtable.to(table.dtype), *sum_by_triton(sums)


def rotary_gradient_by_triton(
    dq: Tensor, dk: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    (tokens, _, heads, head_dim), row_tokens = qkv.shape, len(cos)
    programs = max(1, PROGRAMS // row_tokens) * row_tokens
    dqk = qkv.new_empty(tokens, 2, heads, head_dim)
    sums = torch.empty(programs, dqk[0].numel(), dtype=torch.float32, device=qkv.device)
    rotary_gradient_kernel[(programs,)](
        dq.contiguous(),
        dk.contiguous(),
        qkv,
        cos,
        sin,
        scales,
        dqk,
        sums,
        tokens,
        row_tokens,
        turns=triton.cdiv(tokens, programs),
        HEADS=heads,
        HALF=head_dim // 2,
        BLOCK=power_of_two(heads),
        num_warps=1,
    )
    return dqk, sum_by_triton(sums)


def capped_loss_by_triton(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, log_sums = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    capped_loss_kernel[(len(z),)](
        z, targets, losses, log_sums, CAP, CAP**-2, n=z.size(1), BLOCK=2048, num_warps=4
    )
    return losses, log_sums


def gathered_loss(z: Tensor, targets: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """capped_loss of z (rows, n) from sums (parts, rows) of exp(f - CAP), on a GPU."""
    losses, log_sums = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    gathered_loss_kernel[(triton.cdiv(len(z), 32),)](
        z,
        targets,
        sums,
        losses,
        log_sums,
        len(z),
        CAP,
        CAP**-2,
        parts=len(sums),
        n=z.size(1),
        ROWS=32,
        PARTS=64,
        num_warps=4,
    )
    return losses, log_sums


def capped_gradient_by_triton(z: Tensor, targets: Tensor, log_sums: Tensor) -> Tensor:
    (rows, n), part, block = z.shape, 128, 512
    sums = torch.empty(triton.cdiv(rows, part), n, dtype=torch.float32, device=z.device)
    capped_gradient_kernel[(triton.cdiv(n, block), len(sums))](
        z, targets, log_sums, sums, rows, CAP**-2, n=n, PART=part, BLOCK=block, num_warps=4
    )
    return sums.sum(dim=0)


def multiply_by_triton(x: Tensor, factor: Tensor) -> None:
    """x *= factor, in its place; x dense, factor ()."""
    count, block = x.numel(), 8192
    multiply_kernel[(triton.cdiv(count, block),)](x, factor, count, BLOCK=block, num_warps=4)
    torch.autograd.graph.increment_version(x)
