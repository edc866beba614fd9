"""The model's own kernels, each with the PyTorch that computes the same where it cannot run.

What a block of train_gpt.py computes in plain PyTorch passes many times over memory, beside its
matrix products. These kernels leave attention to cuDNN, and to cuBLAS the products that add to the
residual, those for gradients of weights, and of the head's all but one. Of the rest they make one
pass each (passes.py), or the end of a product (products.py). No torch.compile: nothing to wait for
but a few seconds of Triton.

embed        the embedding's rows, their norm h and its norm n. Backwards one pass over the tokens,
             sorted, makes the gradient through both norms and sums it for each word.
norm         n = gain v / rms(v),  v = h + shift: products add to the residual h in its place, and
             shift is the sum of these products' biases up to here. Backwards one pass from
             n = gain u, which also sums the gradients of bias and gain over tokens.
qkv          q, k, v from one product, which writes q / rms(q) of each head, rotated; k as well.
             Backwards one pass makes the gradients of q and k in the product's output and sums them
             over tokens. v's needs none: the product takes it beside them, and the sum for its bias
             comes from the product after attention, as a token's weights sum to 1.
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
from .passes import (
    CAP,
    LEAST_GAIN,
    capped_gradient_by_triton,
    capped_loss_by_triton,
    embed_by_triton,
    embed_gradient_by_triton,
    gathered_loss,
    multiply_by_triton,
    norm_by_triton,
    norm_gradient_by_triton,
    rotary_gradient_by_triton,
    triton,
)
from .products import (
    EPS,
    HEAD_DIM,
    angles_of,
    gluon,
    joined_by_gluon,
    logits_by_gluon,
    qkv_by_gluon,
    relu_square_by_gluon,
    relu_square_gradient_by_gluon,
)

CHUNK = 16384  # tokens whose logits are in memory at once: 1.6 GB in bf16 for 50304 of them


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


####################################################################################################
#                                        Residual and norm                                         #
####################################################################################################


def no_zeros(gain: Tensor) -> Tensor:
    return gain.masked_fill(gain.abs() < LEAST_GAIN, LEAST_GAIN)


def norm_by_torch(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    v = h + shift  # in float32 at least, as shift is
    scales = (v.square().mean(dim=1) + EPS).rsqrt()
    return (v * scales[:, None] * no_zeros(gain)).to(h.dtype), scales


def unscaled(d: Tensor, u: Tensor, scales: Tensor) -> Tensor:
    """The gradient of v, of which u = v scales = v / rms(v) has the gradient d; (tokens, width)."""
    return (d - u * (d * u).mean(dim=1, keepdim=True)) * scales[:, None]


def norm_gradient_by_torch(
    dh: Tensor | None, dn: Tensor, n: Tensor, gain: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    u = n / no_zeros(gain)
    dx = unscaled(dn * no_zeros(gain), u, scales)
    dx = dx if dh is None else dx + dh
    return dx.to(n.dtype), (dn * u).sum(dim=0), dx.sum(dim=0)


def norm(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """n = gain v / rms(v) of v = h + shift, (tokens, width); and 1 / rms(v) (tokens)."""
    return (norm_by_triton if runs_triton(h) else norm_by_torch)(h, shift, gain)


def norm_gradient(
    dh: Tensor | None, dn: Tensor, n: Tensor, gain: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of h, gain and the last bias in shift. dh: what reaches h by other ways than n."""
    by = norm_gradient_by_triton if runs_triton(n) else norm_gradient_by_torch
    return by(dh, dn, n, gain, scales)


####################################################################################################
#                                            Embedding                                             #
####################################################################################################


def embed_by_torch(
    ids: Tensor, table: Tensor, gain: Tensor, next_gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = table[ids].to(torch.promote_types(table.dtype, gain.dtype))
    h = (x * (x.square().mean(dim=1, keepdim=True) + EPS).rsqrt() * gain).to(table.dtype)
    return h, *norm_by_torch(h, torch.zeros_like(gain), next_gain)


def embed_gradient_by_torch(
    dh: Tensor,
    dn: Tensor,
    n: Tensor,
    ids: Tensor,
    table: Tensor,
    gain: Tensor,
    next_gain: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dh, next_dgain, _ = norm_gradient_by_torch(dh, dn, n, next_gain, scales)
    x = table[ids].to(torch.promote_types(table.dtype, gain.dtype))
    s = (x.square().mean(dim=1) + EPS).rsqrt()
    u = x * s[:, None]
    dtable = torch.zeros_like(table, dtype=u.dtype).index_add_(0, ids, unscaled(dh * gain, u, s))
    return dtable.to(table.dtype), (dh * u).sum(dim=0), next_dgain


class EmbedNorms(torch.autograd.Function):
    """h, the norm of the rows of table (words, width) at ids (tokens), and n, the norm of h; gains
    (width) in float32. What follows adds to h in its place: backwards n and table are enough."""

    @staticmethod
    def forward(
        ctx, ids: Tensor, table: Tensor, gain: Tensor, next_gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        by = embed_by_triton if runs_triton(table) else embed_by_torch
        h, n, scales = by(ids, table, gain, next_gain)
        ctx.save_for_backward(n, ids, table, gain, next_gain, scales)
        return h, n

    @staticmethod
    def backward(ctx, dh: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
        by = embed_gradient_by_triton if runs_triton(dn) else embed_gradient_by_torch
        return None, *by(dh, dn, *ctx.saved_tensors)


####################################################################################################
#                                        Products, attention                                       #
####################################################################################################


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x, (tokens, m) and (tokens, n) -> (m, n) in float32, not rounded on the way."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(dy.mT, x, out_dtype=torch.float32)
    return (dy.mT @ x).to(torch.promote_types(x.dtype, torch.float32))


def times(x: Tensor, W: Tensor) -> Tensor:
    return joined_by_gluon(x, W) if runs_products(x) else x @ W


class AddProduct(torch.autograd.Function):
    """h + x W^T, in the place of h, and the norm of it and shift. W, biases, shift, gain: float32.

    h, x (tokens, width). shift: the biases of all that was added to h, with this product's bias.
    x_bias: what each token of x has in it. So v's bias is in what attention gives, as the weights
    of a token's values sum to 1; its gradient comes from sums that are there.
    """

    @staticmethod
    def forward(
        ctx,
        h: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        x_bias: Tensor,
        shift: Tensor,
        gain: Tensor,
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
        dx_bias = dbias @ W.to(dbias.dtype)
        return dh, times(dh, W), weight_gradient(dh, x), dbias, dx_bias, None, dgain


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


def rotary_gradient_by_torch(
    dq: Tensor, dk: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    d, y = torch.stack([dq, dk], dim=1).to(scales.dtype), qkv[:, :2]
    d = (d - y * (d * y).mean(dim=-1, keepdim=True)) * scales[..., None]
    d = turned(d, cos, -sin)
    return d.to(qkv.dtype), d.sum(dim=0).flatten()


class QKV(torch.autograd.Function):
    """x (tokens, width), weights (width, width) and biases (width) in float32, as of q, k, v. The
    gradient of v's bias is left to AddProduct."""

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
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        by = rotary_gradient_by_triton if ctx.half else rotary_gradient_by_torch
        (dqk, sums), dv = by(dq, dk, *rest), dv.flatten(1)
        dqk = dqk.flatten(1)
        dx = joined_by_gluon(dqk, W, dv) if ctx.half else torch.cat([dqk, dv], dim=1) @ W
        dW = *weight_gradient(dqk, x).chunk(2), weight_gradient(dv, x)
        return dx, None, None, None, *dW, *sums.chunk(2), None


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
        ctx,
        h: Tensor,
        x: Tensor,
        weight: Tensor,
        b: Tensor,
        proj: Tensor,
        bias: Tensor,
        shift: Tensor,
        gain: Tensor,
        x_gain: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
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
        return dh, times(dpre, W), dW, db, dV, dbias, None, dgain, None


def fused_trunk(
    ids: Tensor,
    table: Tensor,
    norm1: nn.Module,
    blocks: Sequence[nn.Module],
    norm2: nn.Module,
    cos: Tensor,
    sin: Tensor,
    fp8: bool = False,
) -> Tensor:
    """Tokens (rows, row_tokens) of table (words, width) through train_gpt.py's norms and blocks."""
    by_heads = runs_products(table) and 2 * cos.size(-1) == HEAD_DIM
    angles = angles_of(cos, sin) if by_heads else None
    biases = [b.detach() for each in blocks for b in (each.attn.proj.bias, each.mlp.proj.bias)]
    shifts = torch.stack(biases).cumsum(dim=0).unbind()
    h, n = EmbedNorms.apply(ids.flatten(), table, norm1.gain, blocks[0].norm1.gain)
    for i, block in enumerate(blocks):
        attn, mlp = block.attn, block.mlp
        layers = attn.q, attn.k, attn.v
        qkv = QKV.apply(n, cos, sin, angles, *(p.weight for p in layers), *(p.bias for p in layers))
        a, p = attn.attend(*(t.unflatten(0, ids.shape) for t in qkv)).flatten(0, 1), attn.proj
        parts = p.weight, p.bias, attn.v.bias, shifts[2 * i]
        h, n = AddProduct.apply(h, a, *parts, block.norm2.gain)
        parts = mlp.fc.weight, mlp.fc.bias, mlp.proj.weight, mlp.proj.bias, shifts[2 * i + 1]
        gain = block.norm2.gain.detach() if fp8 else None
        after = blocks[i + 1].norm1 if i + 1 < len(blocks) else norm2
        h, n = AddSquaredReluMLP.apply(h, n, *parts, after.gain, gain)
    return n.view(*ids.shape, -1)


####################################################################################################
#                                        Head and its loss                                         #
####################################################################################################


def capped_loss_by_torch(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    f = z.float()
    f = f * torch.rsqrt(f.square() / CAP**2 + 1)
    log_sums = f.logsumexp(dim=1)
    return log_sums - f.gather(1, targets[:, None])[:, 0], log_sums


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
    ) -> Tensor:
        W = weight.type_as(x)
        logits = Logits(x, W, bias, fp8)
        gradient = capped_gradient_by_triton if logits.half else capped_gradient_by_torch
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        if learns:
            dx, db = torch.empty_like(x), torch.zeros_like(bias)
            dW = (torch.empty_like if logits.half else torch.zeros_like)(weight)
            ctx.save_for_backward(dx, dW, db)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            z, losses, log_sums = logits.losses_of(part, targets[part])
            loss += losses.sum()
            if learns:
                db += gradient(z, targets[part], log_sums)
                torch.mm(z, W, out=dx[part])
                if logits.half:  # neither rounds the product nor takes a pass of its own to add it
                    how = dict(beta=int(start > 0), out_dtype=dW.dtype, out=dW)
                    torch.addmm(dW, z.mT, x[part], **how)
                else:
                    dW += z.mT @ x[part]
            del z  # before the next one is made
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        by_triton = runs_triton(grads[0])
        for each in grads:  # in its place: PyTorch then refuses to go backwards again
            multiply_by_triton(each, grad) if by_triton else each.mul_(grad)
        return *grads, None, None, None


def capped_loss(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, fp8: bool = False
) -> Tensor:
    """() summed loss in nats of x (tokens, width) and targets (tokens); weight, bias: float32."""
    return CappedLoss.apply(x, weight, bias, targets, torch.is_grad_enabled(), fp8)
