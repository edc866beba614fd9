"""The model's own kernels, each with the PyTorch that computes the same where it cannot run.

What a block of train_gpt.py computes in plain PyTorch passes many times over memory, beside its
matrix products. These kernels leave most products to cuBLAS, attention to cuDNN, and make of the
rest one pass each, or the end of a product (products.py). No torch.compile: nothing to wait for but
a few seconds of Triton.

norm         n = gain v / rms(v),  v = h + shift: products add to the residual h in its place, and
             shift is the sum of these products' biases up to here. Backwards one pass from
             n = gain u, which also sums the gradients of bias and gain over tokens.
qkv          q, k, v from one product, which writes q / rms(q) of each head, rotated; k as well.
             Backwards one pass makes the gradient of the product's output, and sums it over tokens.
relu_square  post = relu(n W^T + b)^2, written by the product itself, and so is its gradient
             (dy V) 2 sqrt(post), summed over tokens: relu(pre) = sqrt(post), only post is kept.
capped_loss  the output head, its cross-entropy and all their gradients in the forward pass:
                 z = x W^T + b,    f = 15 z / sqrt(z^2 + 225),    loss = logsumexp(f) - f[target]
                 dz = (softmax(f) - onehot(target)) s^3,    s = 15 / sqrt(z^2 + 225)
             PyTorch would keep z, f and softmax(f) of all tokens, in float32 200 kB each for a
             token of GPT-2. Here z of some thousand tokens at a time is written once in half
             precision, and dz takes its place; f is below 15, so no exponential overflows. On
             Hopper the product that writes z also sums exp(f), of vocabularies in steps of 128.
             With --fp8 x and W are rounded to 8 bits for z alone (e4m3, one scale for each; exp(f)
             is then summed from what was written), and so are those of relu_square, on Hopper.

Kernels need half precision on an NVIDIA GPU, those of the blocks and all of products.py Hopper
(TMA and wgmma). Not here: the optimizers' (optimizers/).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ahead import compiled_ahead  # noqa: F401 (both for train_gpt.py, in a log one file with this)
from .graphs import MicrobatchGraphs  # noqa: F401
from .products import (
    EPS,
    HEAD_DIM,
    angles_of,
    gluon,
    logits_by_gluon,
    qkv_by_gluon,
    relu_square_by_gluon,
    relu_square_gradient_by_gluon,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

CAP = 15.0
LEAST_GAIN = 2.0**-60  # in place of gains nearer to 0, as gradients divide by them; not in float16
CHUNK = 16384  # tokens whose logits are in memory at once: 1.6 GB in bf16 for 50304 of them
PROGRAMS = 1056  # that sum over tokens, each its part: 8 for each of an H100's 132 processors

####################################################################################################
#                                             Kernels                                              #
####################################################################################################

if triton is not None:

    @triton.jit
    def norm_kernel(
        h, shift, gain, n, scales, tokens, eps, least, width: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
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
        dh, dn, n, gain, scales, dx, sums, tokens, least, turns: tl.constexpr, width: tl.constexpr,
        PASSED: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Program p: dx of its part of the tokens; sums[p]: of dgain, then of dx (= dbias). GIVEN:
        n is what the norm was given, not what it gave."""
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
            u = tl.load(n + here, mask=inside, other=0.0).to(tl.float32) * (s if GIVEN else back)
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
    def rotary_gradient_kernel(
        dq, dk, dv, qkv, cos, sin, scales, dqkv, sums, tokens, row_tokens, turns: tl.constexpr,
        HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Program (p, head): its part of the tokens of dqkv; sums[p] of them, (3, HEADS, 2 HALF).

        y = rotated u, u = s x: dx = s R^T (dy - y mean(dy y)), as rotations keep products.
        """
        head, c = tl.program_id(1), tl.arange(0, HALF)
        width = 2 * HEADS * HALF
        for part in tl.static_range(3):
            first, second = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
            for turn in range(turns):
                rows = (turn * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
                inside = (rows < tokens)[:, None]
                here = rows[:, None].to(tl.int64) * width + head * 2 * HALF + c[None, :]
                there = here + rows[:, None].to(tl.int64) * (2 * width) + part * width
                given = dq if part == 0 else (dk if part == 1 else dv)
                a = tl.load(given + here, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(given + here + HALF, mask=inside, other=0.0).to(tl.float32)
                if part < 2:
                    y = tl.load(qkv + there, mask=inside, other=0.0).to(tl.float32)
                    z = tl.load(qkv + there + HALF, mask=inside, other=0.0).to(tl.float32)
                    mean = (tl.sum(a * y + b * z, axis=1) / (2 * HALF))[:, None]
                    each = scales + rows * 2 * HEADS + part * HEADS + head
                    s = tl.load(each, mask=rows < tokens, other=0.0)[:, None]
                    a, b = (a - y * mean) * s, (b - z * mean) * s
                    table = (rows % row_tokens)[:, None] * HALF + c[None, :]
                    across = tl.load(cos + table, mask=inside, other=0.0)
                    up = tl.load(sin + table, mask=inside, other=0.0)
                    a, b = a * across - b * up, a * up + b * across
                first += a
                second += b
                tl.store(dqkv + there, a.to(dqkv.dtype.element_ty), mask=inside)
                tl.store(dqkv + there + HALF, b.to(dqkv.dtype.element_ty), mask=inside)
            at = sums + tl.program_id(0) * 3 * width + part * width + head * 2 * HALF + c
            tl.store(at, tl.sum(first, axis=0))
            tl.store(at + HALF, tl.sum(second, axis=0))

    @triton.jit
    def capped_loss_kernel(
        Z, targets, losses, log_sums, cap, bend, n: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
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
        Z, targets, sums, losses, log_sums, rows, cap, bend, parts: tl.constexpr, n: tl.constexpr,
        ROWS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
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
        Z, targets, log_sums, sums, rows, bend, n: tl.constexpr, PART: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
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


def runs_triton(x: Tensor) -> bool:
    """Whether kernels take this tensor: half precision on an NVIDIA GPU."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return triton is not None and half and x.is_cuda and torch.version.hip is None


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def runs_products(x: Tensor) -> bool:
    return gluon is not None and runs_triton(x) and is_hopper(x.device)


def runs_blocks(embed: Tensor, head_dim: int) -> bool:
    """Whether `fused_trunk` takes a model of these embeddings (tokens, width)."""
    return embed.size(1) % 16 == 0 and head_dim == HEAD_DIM and runs_products(embed)


def power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()


####################################################################################################
#                                        Residual and norm                                         #
####################################################################################################


def norm_by_triton(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, width), rows, n = h.shape, 2, torch.empty_like(h)
    scales = torch.empty(tokens, dtype=torch.float32, device=h.device)
    norm_kernel[(triton.cdiv(tokens, rows),)](
        h, shift, gain, n, scales, tokens, EPS, LEAST_GAIN, width=width, ROWS=rows,
        BLOCK=power_of_two(width), num_warps=4,
    )  # fmt: skip
    return n, scales


def no_zeros(gain: Tensor) -> Tensor:
    return gain.masked_fill(gain.abs() < LEAST_GAIN, LEAST_GAIN)


def norm_by_torch(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    v = h + shift  # in float32 at least, as shift is
    scales = (v.square().mean(dim=1) + EPS).rsqrt()
    return (v * scales[:, None] * no_zeros(gain)).to(h.dtype), scales


def norm_gradient_by_triton(
    dh: Tensor | None, dn: Tensor, n: Tensor, gain: Tensor, scales: Tensor, given: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), rows, dx = n.shape, 1, torch.empty_like(n)
    sums = torch.empty(PROGRAMS, 2, width, dtype=torch.float32, device=n.device)
    norm_gradient_kernel[(PROGRAMS,)](
        dh, dn.contiguous(), n, gain, scales, dx, sums, tokens, LEAST_GAIN,
        turns=triton.cdiv(tokens, PROGRAMS * rows), width=width, PASSED=dh is not None,
        GIVEN=given, ROWS=rows, BLOCK=power_of_two(width),
        num_warps=max(1, power_of_two(width) // 1024),
    )  # fmt: skip
    return dx, *sums.sum(dim=0)


def norm_gradient_by_torch(
    dh: Tensor | None, dn: Tensor, n: Tensor, gain: Tensor, scales: Tensor, given: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    gain = no_zeros(gain)
    u, d = n * scales[:, None] if given else n / gain, dn * gain
    dx = (d - u * (d * u).mean(dim=1, keepdim=True)) * scales[:, None]
    dx = dx if dh is None else dx + dh
    return dx.to(n.dtype), (dn * u).sum(dim=0), dx.sum(dim=0)


def norm(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """n = gain v / rms(v) of v = h + shift, (tokens, width); and 1 / rms(v) (tokens)."""
    return (norm_by_triton if runs_triton(h) else norm_by_torch)(h, shift, gain)


def norm_gradient(
    dh: Tensor | None, dn: Tensor, n: Tensor, gain: Tensor, scales: Tensor, given: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Of h, gain and the last bias in shift. dh: what reaches h by other ways than n. given: in the
    place of n stands h, and there is no shift."""
    by = norm_gradient_by_triton if runs_triton(n) else norm_gradient_by_torch
    return by(dh, dn, n, gain, scales, given)


class FirstNorms(torch.autograd.Function):
    """h, the norm of x (tokens, width), and n, the norm of h; gains (width) in float32.

    What follows adds to h in its place: backwards its norm is undone from x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, next_gain: Tensor) -> tuple[Tensor, Tensor]:
        shift = torch.zeros_like(gain)
        h, scales = norm(x, shift, gain)
        n, next_scales = norm(h, shift, next_gain)
        ctx.save_for_backward(x, gain, scales, n, next_gain, next_scales)
        return h, n

    @staticmethod
    def backward(ctx, dh: Tensor, dn: Tensor) -> tuple[Tensor, ...]:
        x, gain, scales, *rest = ctx.saved_tensors
        dh, next_dgain, _ = norm_gradient(dh, dn, *rest)
        dx, dgain, _ = norm_gradient(None, dh, x, gain, scales, given=True)
        return dx, dgain, next_dgain


####################################################################################################
#                                        Products, attention                                       #
####################################################################################################


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x, (tokens, m) and (tokens, n) -> (m, n) in float32, not rounded on the way."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(dy.mT, x, out_dtype=torch.float32)
    return (dy.mT @ x).to(torch.promote_types(x.dtype, torch.float32))


class AddProduct(torch.autograd.Function):
    """h + x W^T, in the place of h, and the norm of it and shift. W, bias, shift, gain in float32.

    h, x (tokens, width). shift: the biases of all that was added to h, with this product's bias.
    """

    @staticmethod
    def forward(
        ctx, h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(h)
        W = weight.to(x.dtype)
        n, scales = norm(h.addmm_(x, W.mT), shift, gain)
        ctx.save_for_backward(x, W, n, gain, scales)
        return h, n

    @staticmethod
    def backward(ctx, dh: Tensor | None, dn: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        dh, dgain, dbias = norm_gradient(dh, dn, *rest)
        return dh, dh @ W, weight_gradient(dh, x), dbias, None, dgain


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated x (tokens, ..., head_dim) by cos and sin (row_tokens, 1, head_dim / 2)."""
    a, b = x.unflatten(0, (-1, len(cos))).chunk(2, dim=-1)
    cos, sin = (table.view(len(cos), *[1] * (x.ndim - 2), -1) for table in (cos, sin))
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(0, 1)


def qkv_by_torch(
    x: Tensor, W: Tensor, b: Tensor, cos: Tensor, sin: Tensor, angles: Tensor | None
) -> tuple[Tensor, Tensor]:
    qkv = torch.addmm(b.type_as(x), x, W.mT).unflatten(1, (3, -1, 2 * cos.size(-1)))
    wide = qkv[:, :2].to(torch.promote_types(qkv.dtype, torch.float32))
    scales = (wide.square().mean(dim=-1) + EPS).rsqrt()
    qkv[:, :2] = turned(wide * scales[..., None], cos, sin)
    return qkv, scales


def rotary_gradient_by_triton(
    grads: Sequence[Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    (tokens, _, heads, head_dim), rows = qkv.shape, 8
    dqkv, programs = torch.empty_like(qkv), PROGRAMS // 6
    sums = torch.empty(programs, qkv[0].numel(), dtype=torch.float32, device=qkv.device)
    rotary_gradient_kernel[(programs, heads)](
        *(grad.contiguous() for grad in grads), qkv, cos, sin, scales, dqkv, sums, tokens, len(cos),
        turns=triton.cdiv(tokens, programs * rows), HEADS=heads, HALF=head_dim // 2, ROWS=rows,
        num_warps=4,
    )  # fmt: skip
    return dqkv, sums.sum(dim=0)


def rotary_gradient_by_torch(
    grads: Sequence[Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    d, y = torch.stack(list(grads[:2]), dim=1).to(scales.dtype), qkv[:, :2]
    d = (d - y * (d * y).mean(dim=-1, keepdim=True)) * scales[..., None]
    dqkv = torch.cat([turned(d, cos, -sin), grads[2][:, None]], dim=1)
    return dqkv.to(qkv.dtype), dqkv.sum(dim=0).flatten()


class QKV(torch.autograd.Function):
    """x (tokens, width), weights (width, width) and biases (width) in float32, as of q, k, v."""

    @staticmethod
    def forward(
        ctx, x: Tensor, cos: Tensor, sin: Tensor, angles: Tensor | None, *layers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.half = angles is not None
        W, b = x.new_empty(3, *layers[0].shape), torch.stack(layers[3:])
        torch._foreach_copy_([*W], layers[:3])  # casts
        W, b = W.flatten(0, 1), b.flatten()
        qkv, scales = (qkv_by_gluon if ctx.half else qkv_by_torch)(x, W, b, cos, sin, angles)
        ctx.save_for_backward(x, W, qkv, cos, sin, scales)
        return qkv.unbind(dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        by = rotary_gradient_by_triton if ctx.half else rotary_gradient_by_torch
        dqkv, sums = by(grads, *rest)
        dqkv = dqkv.flatten(1)
        dW = weight_gradient(dqkv, x)
        return dqkv @ W, None, None, None, *dW.chunk(3), *sums.chunk(3)


####################################################################################################
#                                         Squared-ReLU MLP                                         #
####################################################################################################


def eight_bits(x: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x in e4m3, whose largest number is 448, and what brings it back; largest: bounds |x|."""
    if largest is None:
        largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny * 448) / 448
    rounded = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    return torch.mul(x, 1 / scale, out=rounded), scale


def relu_square_by_torch(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None = None, dtype=torch.bfloat16
) -> Tensor:
    if scale is not None:  # emulated
        x, W, b = x.float() * scale, W.float(), b.float()
        return torch.addmm(b, x, W.mT).relu().square().to(dtype)
    return torch.addmm(b.type_as(x), x, W.mT).relu().square()


def relu_square_gradient_by_torch(dy: Tensor, V: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    root = post * post.clamp_min(torch.finfo(post.dtype).tiny).rsqrt()  # CPUs: sqrt(0) is slow
    dpre = (dy @ V) * (2 * root)
    return dpre, dpre.sum(dim=0, dtype=torch.promote_types(post.dtype, torch.float32))


class AddSquaredReluMLP(torch.autograd.Function):
    """h + relu(x W^T + b)^2 V^T, in the place of h, and the norm of it and shift, as AddProduct.

    x_gain: of the norm that made x, where x and W are to be rounded to 8 bits for x W^T. Gradients
    are those of the product that is not rounded.
    """

    @staticmethod
    def forward(
        ctx, h: Tensor, x: Tensor, weight: Tensor, b: Tensor, proj: Tensor, bias: Tensor,
        shift: Tensor, gain: Tensor, x_gain: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(h)
        W, V = weight.to(x.dtype), proj.to(x.dtype)
        ctx.half = runs_products(x)
        inputs = x, W, b
        if x_gain is not None:  # |x| <= |gain| sqrt(width), as |v| <= rms(v) sqrt(width)
            x8, of_x = eight_bits(x, x_gain.abs().amax() * len(x_gain) ** 0.5)
            W8, of_W = eight_bits(W)
            inputs = x8, W8, b, of_x * of_W, x.dtype
        post = (relu_square_by_gluon if ctx.half else relu_square_by_torch)(*inputs)
        n, scales = norm(h.addmm_(post, V.mT), shift, gain)
        ctx.save_for_backward(x, W, V, post, n, gain, scales)
        return h, n

    @staticmethod
    def backward(ctx, dh: Tensor | None, dn: Tensor) -> tuple[Tensor | None, ...]:
        x, W, V, post, *rest = ctx.saved_tensors
        dh, dgain, dbias = norm_gradient(dh, dn, *rest)
        by = relu_square_gradient_by_gluon if ctx.half else relu_square_gradient_by_torch
        dpre, db = by(dh, V, post)
        dW, dV = weight_gradient(dpre, x), weight_gradient(dh, post)
        return dh, dpre @ W, dW, db, dV, dbias, None, dgain, None


def fused_trunk(
    x: Tensor, norm1: nn.Module, blocks: Sequence[nn.Module], norm2: nn.Module, cos: Tensor,
    sin: Tensor, fp8: bool = False,
) -> Tensor:  # fmt: skip
    """x (rows, row_tokens, width) through train_gpt.py's blocks, and the norms around them."""
    shape, by_heads = x.shape, runs_products(x) and 2 * cos.size(-1) == HEAD_DIM
    angles = angles_of(cos, sin) if by_heads else None
    biases = [b.detach() for each in blocks for b in (each.attn.proj.bias, each.mlp.proj.bias)]
    shifts = torch.stack(biases).cumsum(dim=0).unbind()
    h, n = FirstNorms.apply(x.flatten(0, 1), norm1.gain, blocks[0].norm1.gain)
    for i, block in enumerate(blocks):
        attn, mlp = block.attn, block.mlp
        layers = attn.q, attn.k, attn.v
        qkv = QKV.apply(n, cos, sin, angles, *(p.weight for p in layers), *(p.bias for p in layers))
        a, p = attn.attend(*(t.unflatten(0, shape[:2]) for t in qkv)).flatten(0, 1), attn.proj
        h, n = AddProduct.apply(h, a, p.weight, p.bias, shifts[2 * i], block.norm2.gain)
        parts = mlp.fc.weight, mlp.fc.bias, mlp.proj.weight, mlp.proj.bias, shifts[2 * i + 1]
        gain = block.norm2.gain.detach() if fp8 else None
        after = blocks[i + 1].norm1 if i + 1 < len(blocks) else norm2
        h, n = AddSquaredReluMLP.apply(h, n, *parts, after.gain, gain)
    return n.view(shape)


####################################################################################################
#                                        Head and its loss                                         #
####################################################################################################


def capped_loss_by_triton(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, log_sums = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    capped_loss_kernel[(len(z),)](
        z, targets, losses, log_sums, CAP, CAP**-2, n=z.size(1), BLOCK=2048, num_warps=4
    )  # fmt: skip
    return losses, log_sums


def gathered_loss(z: Tensor, targets: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """capped_loss of z (rows, n) from sums (parts, rows) of exp(f - CAP), on a GPU."""
    losses, log_sums = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    gathered_loss_kernel[(triton.cdiv(len(z), 32),)](
        z, targets, sums, losses, log_sums, len(z), CAP, CAP**-2, parts=len(sums), n=z.size(1),
        ROWS=32, PARTS=64, num_warps=4,
    )  # fmt: skip
    return losses, log_sums


def capped_loss_by_torch(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    f = z.float()
    f = f * torch.rsqrt(f.square() / CAP**2 + 1)
    log_sums = f.logsumexp(dim=1)
    return log_sums - f.gather(1, targets[:, None])[:, 0], log_sums


def capped_gradient_by_triton(z: Tensor, targets: Tensor, log_sums: Tensor) -> Tensor:
    (rows, n), part, block = z.shape, 128, 512
    sums = torch.empty(triton.cdiv(rows, part), n, dtype=torch.float32, device=z.device)
    capped_gradient_kernel[(triton.cdiv(n, block), len(sums))](
        z, targets, log_sums, sums, rows, CAP**-2, n=n, PART=part, BLOCK=block, num_warps=4
    )  # fmt: skip
    return sums.sum(dim=0)


def capped_gradient_by_torch(z: Tensor, targets: Tensor, log_sums: Tensor) -> Tensor:
    wide = z.float()
    s = torch.rsqrt(wide.square() / CAP**2 + 1)
    p = (wide * s - log_sums[:, None]).exp()
    p.scatter_add_(1, targets[:, None], -torch.ones_like(log_sums)[:, None])
    z.copy_(dz := p * s**3)
    return dz.sum(dim=0)


class Logits:
    """z = x W^T + b of chunks of x; in 8 bits where wanted, emulated on devices without them."""

    def __init__(self, x: Tensor, W: Tensor, b: Tensor, fp8: bool) -> None:
        self.x, self.W, self.fp8, self.half = x, W, fp8, runs_triton(x)
        fits = x.size(1) % 8 == 0 and len(W) % 128 == 0
        self.sums_powers = fits and not fp8 and runs_products(x)
        self.b = b if self.sums_powers else b.type_as(x)
        if fp8:
            (self.x, self.scale_x), (self.W, self.scale_W) = eight_bits(x), eight_bits(W)

    def of(self, part: slice) -> Tensor:
        if not self.fp8:
            return torch.addmm(self.b, self.x[part], self.W.mT)
        if self.x.is_cuda and torch.cuda.get_device_capability(self.x.device) >= (8, 9):
            how = dict(bias=self.b, out_dtype=self.b.dtype, use_fast_accum=True)
            return torch._scaled_mm(self.x[part], self.W.mT, self.scale_x, self.scale_W, **how)
        x, W = self.x[part].float() * self.scale_x, self.W.float() * self.scale_W
        return torch.addmm(self.b.float(), x, W.mT).to(self.b.dtype)

    def losses_of(self, part: slice, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (rows, n), and of each row the loss and the logarithm of its sum of exp(f)."""
        if self.sums_powers:
            z, sums = logits_by_gluon(self.x[part], self.W, self.b, CAP)
            return z, *gathered_loss(z, targets, sums)
        z = self.of(part)
        return z, *(capped_loss_by_triton if self.half else capped_loss_by_torch)(z, targets)


class CappedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, those of weight and bias summed in float32."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, learns: bool, fp8: bool
    ) -> Tensor:  # fmt: skip
        W = weight.type_as(x)
        logits = Logits(x, W, bias, fp8)
        gradient = capped_gradient_by_triton if logits.half else capped_gradient_by_torch
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        if learns:
            dx, dW, db = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
            ctx.save_for_backward(dx, dW, db)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            z, losses, log_sums = logits.losses_of(part, targets[part])
            loss += losses.sum()
            if learns:
                db += gradient(z, targets[part], log_sums)
                torch.mm(z, W, out=dx[part])
                if logits.half:  # neither rounds the product nor takes a pass of its own to add it
                    torch.addmm(dW, z.mT, x[part], out_dtype=dW.dtype, out=dW)
                else:
                    dW += z.mT @ x[part]
            del z  # before the next one is made
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        for each in grads:  # in its place: PyTorch then refuses to go backwards again
            torch._foreach_mul_([each], grad.to(each.dtype))  # vectorized, as mul_ is not
        return *grads, None, None, None


def capped_loss(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, fp8: bool = False
) -> Tensor:
    """() summed loss in nats of x (tokens, width) and targets (tokens); weight, bias: float32."""
    return CappedLoss.apply(x, weight, bias, targets, torch.is_grad_enabled(), fp8)
