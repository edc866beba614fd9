"""The output head, its soft-capped cross-entropy and all their gradients, in chunks of tokens.

    z = x W^T + b,    f = 15 z / sqrt(z^2 + 225),    loss = logsumexp(f) - f[target]
    dz = (softmax(f) - onehot(target)) s^3,    s = 15 / sqrt(z^2 + 225)

PyTorch would save z, f and softmax(f) of all tokens: 200 kB each for a token of GPT-2, in float32.
Here the z of one chunk is written once, in the dtype of x, and dz overwrites it; the gradients are
ready at the end of the forward pass. f is below 15, so no exponential overflows. On Hopper the
matmul for z also sums exp(f), if the vocabulary is a multiple of 128. With fp8, x and W are rounded
to e4m3 for z alone, with one scale each, and exp(f) is summed in a pass over z.

Without Triton the same loss runs in PyTorch, on any device.
"""

import torch
from torch import Tensor

from .gemm import compute_capability, gemm_obstacle, logits_by_gluon, round_to_e4m3
from .passes import (
    CAP,
    capped_gradient_by_triton,
    capped_loss_by_triton,
    loss_from_sums_by_triton,
    multiply_by_triton,
    triton_obstacle,
)

CHUNK = 16384  # tokens whose logits are in memory at once: 1.6 GB in bf16 for 50304 words


def fused_logits_obstacle(x: Tensor, vocab_size: int, fp8: bool) -> str:
    """Return why the Gluon matmul cannot compute the logits of x (tokens, width), or ''."""
    if obstacle := gemm_obstacle(x):
        return obstacle
    if fp8:
        return "fp8"
    if (width := x.size(1)) % 8:
        return f"width {width} is not a multiple of 8"
    if vocab_size % 128:
        return f"vocab_size {vocab_size} is not a multiple of 128"
    return ""


def e4m3_obstacle(x: Tensor) -> str:
    """Return why no 8-bit matmul runs on the device of x, or ''; PyTorch then emulates it."""
    if not x.is_cuda:
        return f"device {x.device.type}"
    if (found := compute_capability(x.device)) < (8, 9):
        return f"compute capability {found}, needs (8, 9)"
    return ""


def head_path(embed: Tensor, vocab_size: int, fp8: bool) -> str:
    """Return which implementation `capped_loss` runs with, and why not the fastest, for the log.

    x has the device, dtype and width of the embeddings (words, width).
    """
    path = "Gluon matmul, Triton loss"
    if obstacle := triton_obstacle(embed):
        path = f"PyTorch: {obstacle}"
    elif fp8:
        path = "Triton loss"
    elif obstacle := fused_logits_obstacle(embed, vocab_size, fp8):
        path = f"Triton loss (no Gluon: {obstacle})"
    if fp8 and (obstacle := e4m3_obstacle(embed)):
        return f"emulated 8-bit matmul ({obstacle}), {path}"
    return f"8-bit matmul, {path}" if fp8 else path


def capped_loss_by_torch(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and log sum exp(f) of each row of logits z (rows, n)."""
    f = z.float()
    f = f * torch.rsqrt(f.square() / CAP**2 + 1)
    log_sums = f.logsumexp(dim=1)
    return log_sums - f.gather(1, targets[:, None])[:, 0], log_sums


def capped_gradient_by_torch(z: Tensor, targets: Tensor, log_sums: Tensor) -> Tensor:
    """Overwrite z with its gradient, and return that gradient's sum over rows."""
    wide = z.float()
    s = torch.rsqrt(wide.square() / CAP**2 + 1)
    p = (wide * s - log_sums[:, None]).exp()
    p.scatter_add_(1, targets[:, None], -torch.ones_like(log_sums)[:, None])
    z.copy_(dz := p * s**3)
    return dz.sum(dim=0)


class ChunkedLogits:
    """Computes z = x W^T + b and its losses for slices of x, in 8 bits with fp8."""

    def __init__(self, x: Tensor, W: Tensor, b: Tensor, fp8: bool) -> None:
        self.x, self.W, self.fp8 = x, W, fp8
        self.by_triton = not triton_obstacle(x)
        self.by_gluon = not fused_logits_obstacle(x, len(W), fp8)
        self.b = b if self.by_gluon else b.type_as(x)
        if fp8:
            (self.x, self.scale_x), (self.W, self.scale_W) = round_to_e4m3(x), round_to_e4m3(W)

    def matmul(self, part: slice) -> Tensor:
        """Return z of these rows of x, by cuBLAS where it can."""
        if not self.fp8:
            return torch.addmm(self.b, self.x[part], self.W.mT)
        if not e4m3_obstacle(self.x):
            options = dict(bias=self.b, out_dtype=self.b.dtype, use_fast_accum=True)
            return torch._scaled_mm(self.x[part], self.W.mT, self.scale_x, self.scale_W, **options)
        x, W = self.x[part].float() * self.scale_x, self.W.float() * self.scale_W
        return torch.addmm(self.b.float(), x, W.mT).to(self.b.dtype)

    def losses(self, part: slice, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z (rows, n), and the loss and log sum exp(f) of each row."""
        if self.by_gluon:
            z, sums = logits_by_gluon(self.x[part], self.W, self.b, CAP)
            return z, *loss_from_sums_by_triton(z, targets, sums)
        z = self.matmul(part)
        compute = capped_loss_by_triton if self.by_triton else capped_loss_by_torch
        return z, *compute(z, targets)


class CappedLoss(torch.autograd.Function):
    """Computes gradients in the forward pass; those of weight and bias are summed in float32."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, learns: bool, fp8: bool
    ) -> Tensor:
        W = weight.type_as(x)
        logits = ChunkedLogits(x, W, bias, fp8)
        gradient = capped_gradient_by_triton if logits.by_triton else capped_gradient_by_torch
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        if learns:
            dx, db = torch.empty_like(x), torch.zeros_like(bias)
            dW = (torch.empty_like if logits.by_triton else torch.zeros_like)(weight)
            ctx.save_for_backward(dx, dW, db)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            z, losses, log_sums = logits.losses(part, targets[part])
            loss += losses.sum()
            if learns:
                db += gradient(z, targets[part], log_sums)
                torch.mm(z, W, out=dx[part])
                if logits.by_triton:  # cuBLAS adds to dW in float32, without another pass
                    options = dict(beta=int(start > 0), out_dtype=dW.dtype, out=dW)
                    torch.addmm(dW, z.mT, x[part], **options)
                else:
                    dW += z.mT @ x[part]
            del z  # frees the memory for the next chunk
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        by_triton = not triton_obstacle(grads[0])
        for saved in grads:  # in place, so that PyTorch refuses a second backward pass
            multiply_by_triton(saved, grad) if by_triton else saved.mul_(grad)
        return *grads, None, None, None


def capped_loss(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, fp8: bool = False
) -> Tensor:
    """Return the summed loss () in nats of x (tokens, width) and targets (tokens).

    weight (vocab_size, width) and bias (vocab_size) are float32.
    """
    return CappedLoss.apply(x, weight, bias, targets, torch.is_grad_enabled(), fp8)
