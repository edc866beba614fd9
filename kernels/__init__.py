"""The model's own kernels, each with the PyTorch that computes the same where it cannot run.

Capped loss: the output head, its cross-entropy and all gradients of both in the forward pass.

    z = x W^T + b,    f = 15 z / sqrt(z^2 + 225),    loss = sum of logsumexp(f) - f[target]
    dz = (softmax(f) - onehot(target)) s^3,    s = 15 / sqrt(z^2 + 225)

PyTorch would keep z, f and softmax(f) of all tokens, in float32 200 kB each for a token of GPT-2.
Here z of some thousand tokens at a time is written once in half precision; a Triton kernel reads a
row of it, adds up exp(f - 15) (f is below 15, so nothing can overflow) and writes dz in its place.

Squared-ReLU MLP: y = relu(x W^T + b)^2 V^T + c, with one pass each way beyond the matrix products.

    post = relu(x W^T + b)^2          written by the product itself
    dpre = (dy V) 2 sqrt(post)        as well, and db, its sums over tokens: relu(pre) = sqrt(post),
                                      so that of the two only post is kept

Kernels need a half-precision dtype on an NVIDIA GPU. Not here: the optimizers' (optimizers/).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch comes without it
    triton = None

CAP = 15.0
CHUNK = 8192  # tokens whose logits are in memory at once: 0.8 GB in bf16 for 50304 of them
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 128, 128, 64  # of the MLP's products

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

    @triton.jit
    def relu_square_kernel(
        A, B, C, post, bias, sums, n: tl.constexpr, k: tl.constexpr, BACKWARD: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """A tile of C (m, n) = relu(A B^T + bias)^2; BACKWARD: of (A B) 2 sqrt(post), its sums."""
        across = tl.cdiv(n, COLUMNS)
        i, j = tl.program_id(0) // across, tl.program_id(0) % across
        row, column = i * ROWS, j * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, k, DEPTH):
            left = A.load([row, depth])
            if BACKWARD:
                product = tl.dot(left, B.load([depth, column]), product)
            else:
                product = tl.dot(left, B.load([column, depth]).T, product)
        columns = column + tl.arange(0, COLUMNS)
        if BACKWARD:
            product *= 2 * tl.sqrt(post.load([row, column]).to(tl.float32))
            tl.store(sums + i * n + columns, tl.sum(product, axis=0), mask=columns < n)
        else:
            product += tl.load(bias + columns, mask=columns < n, other=0.0)
            product = tl.where(product < 0, 0.0, product * product)  # as relu, keeps what is NaN
        C.store([row, column], product.to(C.dtype))


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


@torch.compiler.assume_constant_result
def loads_tiles() -> bool:
    """Whether the GPU has the unit for it (TMA): without, the kernel would wait for each load."""
    return torch.cuda.get_device_capability() >= (9, 0)


def relu_square_tiles(
    A: Tensor, B: Tensor, C: Tensor, post: Tensor, bias: Tensor | None, sums: Tensor,
    backward: bool,
) -> None:  # fmt: skip
    """Runs the kernel, which fills C and, in the backward pass, sums (tiles down C, n)."""
    rows, columns, depth = TILE_ROWS, TILE_COLUMNS, TILE_DEPTH
    of_B, of_C = [depth, columns] if backward else [columns, depth], [rows, columns]
    tiles = [
        TensorDescriptor.from_tensor(whole.contiguous(), block)
        for whole, block in ((A, [rows, depth]), (B, of_B), (C, of_C), (post, of_C))
    ]
    relu_square_kernel[(triton.cdiv(len(C), rows) * triton.cdiv(C.size(1), columns),)](
        *tiles, bias, sums, n=C.size(1), k=A.size(1), BACKWARD=backward, ROWS=rows,
        COLUMNS=columns, DEPTH=depth, num_warps=4, num_stages=3,
    )  # fmt: skip


def relu_square_by_torch(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b.type_as(x), x, W.mT).relu().square()


def relu_square_gradient_by_torch(dy: Tensor, V: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    root = post * post.clamp_min(torch.finfo(post.dtype).tiny).rsqrt()  # CPUs: sqrt(0) is slow
    dpre = (dy @ V) * (2 * root)
    return dpre, dpre.sum(dim=0, dtype=torch.float32)


@torch.library.custom_op("speedrun::relu_square", mutates_args=())
def relu_square_by_triton(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    post = x.new_empty(len(x), len(W))
    relu_square_tiles(x, W, post, post, b, b, backward=False)
    return post


@torch.library.custom_op("speedrun::relu_square_gradient", mutates_args=())
def relu_square_gradient_by_triton(
    dy: Tensor, V: Tensor, post: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dpre = torch.empty_like(post)
    sums = post.new_empty(-(-len(dy) // TILE_ROWS), post.size(1), dtype=torch.float32)
    relu_square_tiles(dy, V, dpre, post, None, sums, backward=True)
    return dpre, sums.sum(dim=0)


# What torch.compile takes the two for.
relu_square_by_triton.register_fake(lambda x, W, b: x.new_empty(len(x), len(W)))
relu_square_gradient_by_triton.register_fake(
    lambda dy, V, post: (torch.empty_like(post), post.new_empty(post.size(1), dtype=torch.float32))
)


class SquaredReluMLP(torch.autograd.Function):
    """x (tokens, width), W and V as x, biases in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> Tensor:
        ctx.tiles = runs_triton(x) and loads_tiles()
        post = (relu_square_by_triton if ctx.tiles else relu_square_by_torch)(x, W, b)
        ctx.save_for_backward(x, W, V, post)
        return torch.addmm(c.type_as(x), post, V.mT)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        x, W, V, post = ctx.saved_tensors
        by = relu_square_gradient_by_triton if ctx.tiles else relu_square_gradient_by_torch
        dpre, db = by(dy, V, post)
        return dpre @ W, dpre.mT @ x, db, dy.mT @ post, dy.sum(dim=0, dtype=torch.float32)


def joint_linear(x: Tensor, layers: tuple[nn.Linear, ...]) -> Tensor:
    """What each layer makes of x, side by side: one product, and one for the gradient of x."""
    W = torch.cat([layer.weight.type_as(x) for layer in layers])
    return F.linear(x, W, torch.cat([layer.bias.type_as(x) for layer in layers]))


def squared_relu_mlp(x: Tensor, fc: nn.Linear, proj: nn.Linear) -> Tensor:
    """proj(fc(x).relu().square()) of x (..., width); biases are float32."""
    W, V = fc.weight.type_as(x), proj.weight.type_as(x)
    y = SquaredReluMLP.apply(x.flatten(0, -2), W, fc.bias, V, proj.bias)
    return y.unflatten(0, x.shape[:-1])
