"""The output head's loss and its gradient in one go: logits are written once, in half precision.

    z = x W^T + b,    f = 15 z / sqrt(z^2 + 225),    loss = sum over rows of logsumexp(f) - f[target]
    dz = (softmax(f) - onehot(target)) 225 * 15 / (z^2 + 225)^(3/2)

PyTorch's own kernels keep z, f and its softmax in float32, 200 kB each for a token of GPT-2. Here a
Triton kernel reads a row of z, adds up exp(f - 15) (f is below 15, so nothing can overflow), and
writes dz over z. Where it cannot run, PyTorch computes the same in float32.
"""

import torch
from torch import Tensor

from .kernels import kernel_runs

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CAP = 15.0

if triton is not None:

    @triton.jit
    def capped_loss_kernel(
        Z, targets, losses, cap, n: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Program i: row i of Z (rows, n), dense; its loss, and dz in its place if WRITE."""
        row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        target, at = tl.load(targets + row), Z + row * n
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            z = tl.load(at + start + columns, mask=start + columns < n, other=0.0).to(tl.float32)
            f = cap * z * tl.rsqrt(z * z + cap * cap)
            sums += tl.where(start + columns < n, tl.exp(f - cap), 0.0)
        log_sum = cap + tl.log(tl.sum(sums, axis=0))
        z = tl.load(at + target).to(tl.float32)
        tl.store(losses + row, log_sum - cap * z * tl.rsqrt(z * z + cap * cap))
        if WRITE:
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                z = tl.load(at + start + columns, mask=inside, other=0.0).to(tl.float32)
                r = tl.rsqrt(z * z + cap * cap)
                p = tl.exp(cap * z * r - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
                dz = p * cap * cap * cap * r * r * r
                tl.store(at + start + columns, dz.to(Z.dtype.element_ty), mask=inside)


def capped_loss_by_triton(z: Tensor, targets: Tensor, write: bool) -> Tensor:
    losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
    capped_loss_kernel[(len(z),)](
        z, targets, losses, CAP, n=z.size(1), WRITE=write, BLOCK=4096, num_warps=8
    )
    return losses


def capped_loss_by_torch(z: Tensor, targets: Tensor, write: bool) -> Tensor:
    wide = z.float()
    r = torch.rsqrt(wide.square() + CAP**2)
    f = CAP * wide * r
    log_sum = f.logsumexp(dim=1, keepdim=True)
    losses = log_sum[:, 0] - f.gather(1, targets[:, None])[:, 0]
    if write:
        p = (f - log_sum).exp()
        p.scatter_add_(1, targets[:, None], -torch.ones_like(log_sum))
        z.copy_(p * CAP**3 * r**3)
    return losses


class CappedLoss(torch.autograd.Function):
    """The summed loss of x (tokens, width) in nats; gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        W, b = weight.type_as(x), bias.type_as(x)
        z, wanted = torch.addmm(b, x, W.mT), any(ctx.needs_input_grad)
        by = capped_loss_by_triton if kernel_runs(z) else capped_loss_by_torch
        losses = by(z, targets, wanted)
        if wanted:
            ctx.save_for_backward(z @ W, (z.mT @ x).type_as(weight), z.sum(dim=0).type_as(bias))
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad.to(saved.dtype) * saved for saved in ctx.saved_tensors), None


def capped_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """() summed cross-entropy of x (tokens, width) and targets (tokens) under a capped head."""
    return CappedLoss.apply(x, weight, bias, targets)
