"""Kernels that make one pass over memory each, in Triton, and the functions that launch them.

They compute what lies between the matmuls of the trunk (trunk.py) and in the loss (head.py), where
the formulas are. Sums over tokens take two kernels: each program stores the sums of its part, and
`sum_kernel` adds the rows of all programs, faster than torch.sum does for a thousand rows. For
the 128 rows of the loss's gradient torch.sum is no slower.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

EPS = torch.finfo(torch.float32).eps  # F.rms_norm's default, also for half precision
CAP = 15.0  # bounds the logits
LEAST_GAIN = 2.0**-60  # replaces gains nearer to 0, as gradients divide by them; float32 only
PROGRAMS = 1056  # of kernels that sum over tokens: 8 for each of an H100's 132 SMs

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
        """Compute n = gain v s and s = 1 / rms(v), v = h + shift; program i takes ROWS tokens."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows < tokens)[:, None] & (columns < width)[None, :]
        g = tl.load(gain + columns, mask=columns < width, other=0.0)
        v = tl.load(h + offsets, mask=inside, other=0.0).to(tl.float32)
        v += tl.load(shift + columns, mask=columns < width, other=0.0)[None, :]
        s = tl.rsqrt(tl.sum(v * v, axis=1) / width + eps)
        tl.store(scales + rows, s, mask=rows < tokens)
        v *= s[:, None] * tl.where(tl.abs(g) < least, least, g)[None, :]
        tl.store(n + offsets, v.to(n.dtype.element_ty), mask=inside)

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
        iterations: tl.constexpr,
        width: tl.constexpr,
        PASSED: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Compute dx, and in sums[p] the sums of dgain and dx over program p's tokens.

        The sum of dx is dbias. PASSED: add dh, which reaches h by another way than n.
        """
        columns = tl.arange(0, BLOCK)
        g = tl.load(gain + columns, mask=columns < width, other=0.0)[None, :]
        g = tl.where(tl.abs(g) < least, least, g)
        inverse_gain = 1.0 / g
        dgain = tl.zeros((ROWS, BLOCK), tl.float32)
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)
        for iteration in tl.range(iterations, num_stages=3):
            rows = (iteration * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
            offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
            inside = (rows < tokens)[:, None] & (columns < width)[None, :]
            s = tl.load(scales + rows, mask=rows < tokens, other=0.0)[:, None]
            u = tl.load(n + offsets, mask=inside, other=0.0).to(tl.float32) * inverse_gain
            d = tl.load(dn + offsets, mask=inside, other=0.0).to(tl.float32)
            dgain += d * u
            d *= g
            d = (d - u * (tl.sum(d * u, axis=1) / width)[:, None]) * s
            if PASSED:
                d += tl.load(dh + offsets, mask=inside, other=0.0).to(tl.float32)
            dbias += d
            tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside)
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
        """Compute h = gain x / rms(x) of table rows x, and as `norm_kernel` the norm n of h.

        Program i takes ROWS tokens.
        """
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        word = tl.load(ids + rows, mask=rows < tokens, other=0).to(tl.int64)
        offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows < tokens)[:, None] & (columns < width)[None, :]
        f = tl.load(gain + columns, mask=columns < width, other=0.0)
        g = tl.load(next_gain + columns, mask=columns < width, other=0.0)
        table_offsets = word[:, None] * width + columns[None, :]
        x = tl.load(table + table_offsets, mask=inside, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None] * f[None, :]
        v = x.to(h.dtype.element_ty)
        tl.store(h + offsets, v, mask=inside)
        v = v.to(tl.float32)
        s = tl.rsqrt(tl.sum(v * v, axis=1) / width + eps)
        tl.store(scales + rows, s, mask=rows < tokens)
        v *= s[:, None] * tl.where(tl.abs(g) < least, least, g)[None, :]
        tl.store(n + offsets, v.to(n.dtype.element_ty), mask=inside)

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
        iterations: tl.constexpr,
        width: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Add each word's gradient to dtable; program p takes a part of the tokens, sorted by id.

        Programs that share a word add to it in any order. sums[p]: dgain, then next_dgain. order:
        indices of the sorted tokens.
        """
        columns = tl.arange(0, BLOCK)
        f = tl.load(gain + columns, mask=columns < width, other=0.0)
        g = tl.load(next_gain + columns, mask=columns < width, other=0.0)
        g = tl.where(tl.abs(g) < least, least, g)
        inverse_gain = 1.0 / g
        dgain, next_dgain = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for iteration in tl.range(iterations, num_stages=3):
            at = tl.program_id(0) * iterations + iteration
            row = tl.load(order + at, mask=at < tokens, other=0).to(tl.int64)
            word = tl.load(ids + at, mask=at < tokens, other=0).to(tl.int64)
            next_word = tl.load(ids + at + 1, mask=at + 1 < tokens, other=-1)
            offsets, inside = row * width + columns, (at < tokens) & (columns < width)
            u = tl.load(n + offsets, mask=inside, other=0.0).to(tl.float32) * inverse_gain
            d = tl.load(dn + offsets, mask=inside, other=0.0).to(tl.float32)
            next_dgain += d * u
            d *= g
            d = (d - u * (tl.sum(d * u, axis=0) / width)) * tl.load(scales + row)
            d += tl.load(dh + offsets, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(table + word * width + columns, mask=inside, other=0.0).to(tl.float32)
            s = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
            x *= s
            dgain += d * x
            d *= f
            total += (d - x * (tl.sum(d * x, axis=0) / width)) * s
            last = (iteration == iterations - 1) | (next_word != word)
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
        iterations: tl.constexpr,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Compute dqk, the gradient before rotation and norm, and its sums (2, HEADS, 2 HALF).

        The number of programs is a multiple of row_tokens, so all tokens of a program have the
        same place in their rows and the same angles. With u = s x and y = R u:
        dx = s R^T (dy - y mean(dy y)), as rotations keep inner products.
        """
        head, c = tl.arange(0, BLOCK), tl.arange(0, HALF)
        columns, is_head = head[:, None] * 2 * HALF + c[None, :], head < HEADS
        table = tl.program_id(0) % row_tokens * HALF + c
        cosine, sine = tl.load(cos + table)[None, :], tl.load(sin + table)[None, :]
        width = 2 * HEADS * HALF
        for part in tl.static_range(2):
            first, second = tl.zeros((BLOCK, HALF), tl.float32), tl.zeros((BLOCK, HALF), tl.float32)
            for iteration in tl.range(iterations, num_stages=3):
                row = (iteration * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
                is_token = row < tokens
                inside = (is_head & is_token)[:, None]
                gradient = (dk if part else dq) + row * width + columns
                a = tl.load(gradient, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(gradient + HALF, mask=inside, other=0.0).to(tl.float32)
                rotated = qkv + row * (3 * width) + part * width + columns
                y = tl.load(rotated, mask=inside, other=0.0).to(tl.float32)
                z = tl.load(rotated + HALF, mask=inside, other=0.0).to(tl.float32)
                mean = (tl.sum(a * y + b * z, axis=1) / (2 * HALF))[:, None]
                scale_at = scales + row * 2 * HEADS + part * HEADS + head
                s = tl.load(scale_at, mask=is_head & is_token, other=0.0)[:, None]
                a, b = (a - y * mean) * s, (b - z * mean) * s
                a, b = a * cosine - b * sine, a * sine + b * cosine
                first += a
                second += b
                to = dqk + row * (2 * width) + part * width + columns
                tl.store(to, a.to(dqk.dtype.element_ty), mask=inside)
                tl.store(to + HALF, b.to(dqk.dtype.element_ty), mask=inside)
            at = sums + tl.program_id(0) * 2 * width + part * width + columns
            tl.store(at, first, mask=is_head[:, None])
            tl.store(at + HALF, second, mask=is_head[:, None])

    @triton.jit
    def capped_loss_kernel(
        Z, targets, losses, log_sums, cap, bend, n: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Compute loss and log sum exp(f) of row i of Z (rows, n), dense. bend = cap^-2."""
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
    def loss_from_sums_kernel(
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
        """Compute what `capped_loss_kernel` does from sums (parts, rows) of exp(f - cap)."""
        row, total = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.zeros((ROWS,), tl.float32)
        inside = row < rows
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            here = (part < parts)[:, None] & inside[None, :]
            partial = tl.load(sums + part[:, None] * rows + row[None, :], mask=here, other=0.0)
            total += tl.sum(partial, axis=0)
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
        """Overwrite Z with dz; program (j, p) takes block j of the columns of PART rows.

        sums[p] gets dz summed over these rows.
        """
        columns, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
        inside, total = columns < n, tl.zeros((BLOCK,), tl.float32)
        for i in range(PART):
            row = (part * PART + i).to(tl.int64)
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
        """Multiply block i of x by factor. If it is 1, as for a loss itself, x is not read."""
        f = tl.load(factor)
        if f != 1.0:
            at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            y = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32) * f
            tl.store(x + at, y.to(x.dtype.element_ty), mask=at < count)

    @triton.jit
    def sum_kernel(x, total, n, rows: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """Sum block i of the columns of x (rows, n) over its rows."""
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in tl.static_range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & (columns < n)[None, :]
            sums += tl.load(x + row[:, None] * n + columns[None, :], mask=inside, other=0.0)
        tl.store(total + columns, tl.sum(sums, axis=0), mask=columns < n)


def triton_obstacle(x: Tensor) -> str:
    """Return why the Triton kernels cannot take a tensor like x, or '' if they can."""
    if torch.version.hip is not None:
        return "ROCm"
    if not x.is_cuda:
        return f"device {x.device.type}"
    if triton is None:
        return "Triton missing"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {str(x.dtype).removeprefix('torch.')}, needs bfloat16 or float16"
    return ""


def power_of_two(width: int) -> int:
    """Return the least power of two that is not below width."""
    return 1 << (width - 1).bit_length()


def sum_by_triton(x: Tensor) -> Tensor:
    """Return the sums over the first dimension of x, dense and in float32."""
    total, block = torch.empty_like(x[0]), 16
    sum_kernel[(triton.cdiv(total.numel(), block),)](
        x, total, total.numel(), rows=len(x), ROWS=128, BLOCK=block, num_warps=4
    )
    return total


def norm_by_triton(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Return n = gain v / rms(v) for v = h + shift (tokens, width), and 1 / rms(v) (tokens)."""
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
    """Return the gradients of h, gain and the last bias in shift.

    dh: the gradient that reaches h by another way than n, or None.
    """
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
        iterations=triton.cdiv(tokens, PROGRAMS * rows),
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
    """Return h = gain x / rms(x) for x = table[ids], its norm n, and 1 / rms(h)."""
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
    """Return the gradients of table, gain and next_gain from those of h and n."""
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
        iterations=triton.cdiv(tokens, PROGRAMS),
        width=width,
        BLOCK=power_of_two(width),
        num_warps=max(1, power_of_two(width) // 1024),
    )
    return dtable.to(table.dtype), *sum_by_triton(sums)


def rotary_gradient_by_triton(
    dq: Tensor, dk: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients (tokens, 2, heads, head_dim) of q and k before norm and rotation.

    Their sum over tokens comes second. q and k in qkv are those of the forward pass, scales
    (tokens, 2, heads) their 1 / rms.
    """
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
        iterations=triton.cdiv(tokens, programs),
        HEADS=heads,
        HALF=head_dim // 2,
        BLOCK=power_of_two(heads),
        num_warps=1,
    )
    return dqk, sum_by_triton(sums)


def capped_loss_by_triton(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and log sum exp(f) of each row of z (rows, n), f = z / sqrt(z^2 / CAP^2 + 1)."""
    losses, log_sums = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    capped_loss_kernel[(len(z),)](
        z, targets, losses, log_sums, CAP, CAP**-2, n=z.size(1), BLOCK=2048, num_warps=4
    )
    return losses, log_sums


def loss_from_sums_by_triton(z: Tensor, targets: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `capped_loss_by_triton` does, from sums (parts, rows) of exp(f - CAP)."""
    losses, log_sums = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    loss_from_sums_kernel[(triton.cdiv(len(z), 32),)](
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
    """Overwrite z with its gradient, and return that gradient's sum over rows."""
    (rows, n), part, block = z.shape, 128, 512
    sums = torch.empty(triton.cdiv(rows, part), n, dtype=torch.float32, device=z.device)
    capped_gradient_kernel[(triton.cdiv(n, block), len(sums))](
        z, targets, log_sums, sums, rows, CAP**-2, n=n, PART=part, BLOCK=block, num_warps=4
    )
    return sums.sum(dim=0)


def multiply_by_triton(x: Tensor, factor: Tensor) -> None:
    """Multiply x, dense, by factor () in place."""
    count, block = x.numel(), 8192
    multiply_kernel[(triton.cdiv(count, block),)](x, factor, count, BLOCK=block, num_warps=4)
    torch.autograd.graph.increment_version(x)
