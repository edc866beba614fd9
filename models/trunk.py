"""The blocks of train_gpt.py's GPT as autograd Functions over fused kernels, for Hopper GPUs.

Run as plain modules, a block passes over its activations many times between its matmuls. Here each
step is one pass (passes.py) or the epilogue of a matmul (gemm.py). Attention stays with cuDNN, and
cuBLAS runs the matmuls that add to the residual and those for the gradients of weights. Nothing is
compiled but the kernels, which takes Triton a few seconds.

EmbedNorms        Gathers rows of the embedding, and computes their norm h and its norm n. The
                  backward pass goes over the tokens once, sorted by word: it differentiates both
                  norms and sums the gradients of each word.
QKV               Computes q, k and v in one matmul, whose epilogue divides each head of q and k by
                  its rms and rotates it. The backward pass takes the gradients of q and k to the
                  matmul's output and sums them over tokens. That of v needs no such pass: it enters
                  the next matmul as it is, and the gradient of v's bias comes from AddProjection.
AddProjection     Adds attention's projection to the residual h in place, and computes the norm
                      n = gain v / rms(v),  v = h + shift,
                  where shift is the sum of all biases so far, which h leaves out. The backward pass
                  starts from n = gain u, and sums the gradients of bias and gain over tokens.
AddSquaredReluMLP Adds the MLP in the same way. The epilogue of its first matmul writes
                      post = relu(n W^T + b)^2,
                  that of the gradient (dy V) 2 sqrt(post) and its sum over tokens; as relu(pre) is
                  sqrt(post), only post is saved.

Weights, biases, gains and shifts are float32; activations are bfloat16 or float16. tests/ has these
kernels in PyTorch (trunk_references.py) and compares both with the plain modules.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .gemm import (
    HEAD_DIM,
    gemm_obstacle,
    matmul_by_gluon,
    pack_angles,
    qkv_by_gluon,
    relu_square_by_gluon,
    relu_square_gradient_by_gluon,
    round_to_e4m3,
)
from .passes import (
    embed_by_triton,
    embed_gradient_by_triton,
    norm_by_triton,
    norm_gradient_by_triton,
    rotary_gradient_by_triton,
)


def trunk_obstacle(embed: Tensor, head_dim: int) -> str:
    """Return why `fused_trunk` cannot take a model with these embeddings (words, width), or ''."""
    if obstacle := gemm_obstacle(embed):
        return obstacle
    if head_dim != HEAD_DIM:
        return f"head_dim {head_dim}, needs {HEAD_DIM}"
    if (width := embed.size(1)) % 16:
        return f"width {width} is not a multiple of 16"
    return ""


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy^T x for (tokens, m) and (tokens, n), in float32 without rounding on the way."""
    return torch.mm(dy.mT, x, out_dtype=torch.float32)


class EmbedNorms(torch.autograd.Function):
    """Return h, the norm of table[ids] (tokens, width), and n, the norm of h.

    Later Functions add to h in place, so the backward pass uses n and table only.
    """

    @staticmethod
    def forward(
        ctx, ids: Tensor, table: Tensor, gain: Tensor, next_gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, n, scales = embed_by_triton(ids, table, gain, next_gain)
        ctx.save_for_backward(n, ids, table, gain, next_gain, scales)
        return h, n

    @staticmethod
    def backward(ctx, dh: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
        return None, *embed_gradient_by_triton(dh, dn, *ctx.saved_tensors)


class QKV(torch.autograd.Function):
    """Return q, k and v (tokens, heads, head_dim) of x (tokens, width), q and k rotated.

    `layers` are the weights (width, width) of q, k and v, then their biases (width). No gradient
    of v's bias is returned: AddProjection returns it.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, cos: Tensor, sin: Tensor, angles: Tensor, *layers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        W, b = x.new_empty(3, *layers[0].shape), torch.stack(layers[3:])
        torch._foreach_copy_([*W], layers[:3])  # casts all three in one launch
        W, b = W.flatten(0, 1), b.flatten()
        qkv, scales = qkv_by_gluon(x, W, b, cos, sin, angles)
        ctx.save_for_backward(x, W, qkv, cos, sin, scales)
        return qkv.unbind(dim=1)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        (dqk, sums), dv = rotary_gradient_by_triton(dq, dk, *rest), dv.flatten(1)
        dqk = dqk.flatten(1)
        dx = matmul_by_gluon(dqk, W, dv)
        dW = *weight_gradient(dqk, x).chunk(2), weight_gradient(dv, x)
        return dx, None, None, None, *dW, *sums.chunk(2), None


class AddProjection(torch.autograd.Function):
    """Return h + x W^T, computed in place of h, and the norm of it and shift.

    h and x are (tokens, width). shift already holds this projection's bias. x_bias is a vector that
    every token of x contains: v's bias, as the attention weights of a token sum to 1. Its gradient
    is that of bias times W, so it needs no sum over tokens.
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
        n, scales = norm_by_triton(h.addmm_(x, W.mT), shift, gain)
        ctx.save_for_backward(x, W, n, gain, scales)
        return h, n

    @staticmethod
    def backward(ctx, dh: Tensor | None, dn: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        dh, dgain, dbias = norm_gradient_by_triton(dh, dn, *rest)
        dx_bias = dbias @ W.to(dbias.dtype)
        return dh, matmul_by_gluon(dh, W), weight_gradient(dh, x), dbias, dx_bias, None, dgain


class AddSquaredReluMLP(torch.autograd.Function):
    """Return h + relu(x W^T + b)^2 V^T, computed in place of h, and the norm of it and shift.

    With x_gain, the gain of the norm that made x, x and W are rounded to 8 bits for x W^T. The
    gradients are those without rounding.
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
        inputs = x, W, b
        if x_gain is not None:  # |x| <= |gain| sqrt(width), as |v| <= rms(v) sqrt(width)
            x8, scale_x = round_to_e4m3(x, x_gain.abs().amax() * len(x_gain) ** 0.5)
            W8, scale_W = round_to_e4m3(W)
            inputs = x8, W8, b, scale_x * scale_W, x.dtype
        post = relu_square_by_gluon(*inputs)
        n, scales = norm_by_triton(h.addmm_(post, V.mT), shift, gain)
        ctx.save_for_backward(x, W, V, post, n, gain, scales)
        return h, n

    @staticmethod
    def backward(ctx, dh: Tensor | None, dn: Tensor) -> tuple[Tensor | None, ...]:
        x, W, V, post, *rest = ctx.saved_tensors
        dh, dgain, dbias = norm_gradient_by_triton(dh, dn, *rest)
        dpre, db = relu_square_gradient_by_gluon(dh, V, post)
        dW, dV = weight_gradient(dpre, x), weight_gradient(dh, post)
        return dh, matmul_by_gluon(dpre, W), dW, db, dV, dbias, None, dgain, None


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
    """Return the head's input for ids (rows, row_tokens), embedded by table (words, width).

    norm1, blocks and norm2 are the modules of train_gpt.py's GPT: they lend their parameters and
    `attend`. cos and sin are (row_tokens, 1, head_dim / 2).
    """
    angles = pack_angles(cos, sin)
    biases = [b.detach() for block in blocks for b in (block.attn.proj.bias, block.mlp.proj.bias)]
    shifts = torch.stack(biases).cumsum(dim=0).unbind()
    h, n = EmbedNorms.apply(ids.flatten(), table, norm1.gain, blocks[0].norm1.gain)
    for i, block in enumerate(blocks):
        attn, mlp = block.attn, block.mlp
        layers = attn.q, attn.k, attn.v
        qkv = QKV.apply(n, cos, sin, angles, *(p.weight for p in layers), *(p.bias for p in layers))
        a, p = attn.attend(*(t.unflatten(0, ids.shape) for t in qkv)).flatten(0, 1), attn.proj
        parts = p.weight, p.bias, attn.v.bias, shifts[2 * i]
        h, n = AddProjection.apply(h, a, *parts, block.norm2.gain)
        parts = mlp.fc.weight, mlp.fc.bias, mlp.proj.weight, mlp.proj.bias, shifts[2 * i + 1]
        gain = block.norm2.gain.detach() if fp8 else None
        after = blocks[i + 1].norm1 if i + 1 < len(blocks) else norm2
        h, n = AddSquaredReluMLP.apply(h, n, *parts, after.gain, gain)
    return n.view(*ids.shape, -1)
