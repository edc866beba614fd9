"""The model's own kernels, each with the PyTorch that computes the same where it cannot run.

Capped loss: the output head, its cross-entropy and all gradients of both in the forward pass.

    z = x W^T + b,    f = 15 z / sqrt(z^2 + 225),    loss = sum of logsumexp(f) - f[target]
    dz = (softmax(f) - onehot(target)) s^3,    s = 15 / sqrt(z^2 + 225)

PyTorch would keep z, f and softmax(f) of all tokens, in float32 200 kB each for a token of GPT-2.
Here z of some thousand tokens at a time is written once in half precision; a Triton kernel reads a
row of it, adds up exp(f - 15) (f is below 15, so nothing can overflow) and writes dz in its place.

Kernels need a half-precision dtype on an NVIDIA GPU. Not here: the optimizers' (optimizers/).
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

CAP = 15.0
CHUNK = 8192  # tokens whose logits are in memory at once: 0.8 GB in bf16 for 50304 of them

if triton is not None:

    @triton.jit
    def capped_loss_kernel(
        Z, targets, losses, cap, bend, n: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Program i: row i of Z (rows, n), dense: its loss, dz in its place. bend: cap^-2."""
        row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        target, at = tl.load(targets + row), Z + row * n
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            inside = start + columns < n
            z = tl.load(at + start + columns, mask=inside, other=0.0).to(tl.float32)
            f = z * tl.rsqrt(z * z * bend + 1.0)
            sums += tl.where(inside, tl.exp(f - cap), 0.0)
        log_sum = cap + tl.log(tl.sum(sums, axis=0))
        hit = tl.load(at + target).to(tl.float32)
        tl.store(losses + row, log_sum - hit * tl.rsqrt(hit * hit * bend + 1.0))
        if WRITE:
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                z = tl.load(at + start + columns, mask=inside, other=0.0).to(tl.float32)
                s = tl.rsqrt(z * z * bend + 1.0)
                p = tl.exp(z * s - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
                dz = p * s * s * s
                tl.store(at + start + columns, dz.to(Z.dtype.element_ty), mask=inside)


def runs_triton(x: Tensor) -> bool:
    """Whether kernels take this tensor: half precision on an NVIDIA GPU."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return triton is not None and half and x.is_cuda and torch.version.hip is None


def capped_loss_by_triton(z: Tensor, targets: Tensor, write: bool) -> Tensor:
    losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
    capped_loss_kernel[(len(z),)](
        z, targets, losses, CAP, CAP**-2, n=z.size(1), WRITE=write, BLOCK=4096, num_warps=16
    )  # fmt: skip
    return losses


def capped_loss_by_torch(z: Tensor, targets: Tensor, write: bool) -> Tensor:
    wide = z.float()
    s = torch.rsqrt(wide.square() / CAP**2 + 1)
    f = wide * s
    log_sum = f.logsumexp(dim=1, keepdim=True)
    losses = log_sum[:, 0] - f.gather(1, targets[:, None])[:, 0]
    if write:
        p = (f - log_sum).exp()
        p.scatter_add_(1, targets[:, None], -torch.ones_like(log_sum))
        z.copy_(p * s**3)
    return losses


class CappedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, those of weight and bias summed in float32."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, learns: bool
    ) -> Tensor:  # fmt: skip
        W, b, half = weight.type_as(x), bias.type_as(x), runs_triton(x)
        capped = capped_loss_by_triton if half else capped_loss_by_torch
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        if learns:
            dx, dW, db = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
            ctx.save_for_backward(dx, dW, db)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            z = torch.addmm(b, x[part], W.mT)
            loss += capped(z, targets[part], learns).sum()
            if learns:
                torch.mm(z, W, out=dx[part])
                if half:  # neither rounds the product nor takes a pass of its own to add it
                    torch.addmm(dW, z.mT, x[part], out_dtype=dW.dtype, out=dW)
                else:
                    dW += z.mT @ x[part]
                db += z.sum(dim=0, dtype=db.dtype)
            del z  # before the next one is made
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad.to(saved.dtype) * saved for saved in ctx.saved_tensors), None, None


def capped_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """() summed loss in nats of x (tokens, width) and targets (tokens); weight, bias: float32."""
    return CappedLoss.apply(x, weight, bias, targets, torch.is_grad_enabled())
