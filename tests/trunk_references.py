"""The kernels of models/trunk.py in plain PyTorch, with their signatures, for any dtype and device.

They are what each kernel is compared with. In place of the kernels they let the trunk's Functions
run on a CPU, so that the algebra of these is tested without a GPU.
"""

import pytest
import torch
from torch import Tensor

from models import trunk
from models.passes import EPS, LEAST_GAIN


def replace_zeros(gain: Tensor) -> Tensor:
    return gain.masked_fill(gain.abs() < LEAST_GAIN, LEAST_GAIN)


def norm_by_torch(h: Tensor, shift: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    v = h + shift  # in float32 at least, as shift is
    scales = (v.square().mean(dim=1) + EPS).rsqrt()
    return (v * scales[:, None] * replace_zeros(gain)).to(h.dtype), scales


def unscale(d: Tensor, u: Tensor, scales: Tensor) -> Tensor:
    """Return the gradient of v (tokens, width) from d, that of u = v scales = v / rms(v)."""
    return (d - u * (d * u).mean(dim=1, keepdim=True)) * scales[:, None]


def norm_gradient_by_torch(
    dh: Tensor | None, dn: Tensor, n: Tensor, gain: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    u = n / replace_zeros(gain)
    dx = unscale(dn * replace_zeros(gain), u, scales)
    dx = dx if dh is None else dx + dh
    return dx.to(n.dtype), (dn * u).sum(dim=0), dx.sum(dim=0)


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
    dtable = torch.zeros_like(table, dtype=u.dtype).index_add_(0, ids, unscale(dh * gain, u, s))
    return dtable.to(table.dtype), (dh * u).sum(dim=0), next_dgain


def matmul_by_torch(x: Tensor, W: Tensor, y: Tensor | None = None) -> Tensor:
    return (x if y is None else torch.cat([x, y], dim=1)) @ W


def weight_gradient_by_torch(dy: Tensor, x: Tensor) -> Tensor:
    return (dy.mT @ x).to(torch.promote_types(x.dtype, torch.float32))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (tokens, ..., head_dim) by cos and sin (row_tokens, 1, head_dim / 2)."""
    a, b = x.unflatten(0, (-1, len(cos))).chunk(2, dim=-1)
    cos, sin = (table.view(len(cos), *[1] * (x.ndim - 2), -1) for table in (cos, sin))
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(0, 1)


def qkv_by_torch(
    x: Tensor, W: Tensor, b: Tensor, cos: Tensor, sin: Tensor, angles: Tensor | None
) -> tuple[Tensor, Tensor]:
    qkv = torch.addmm(b.type_as(x), x, W.mT).unflatten(1, (3, -1, 2 * cos.size(-1)))
    wide = qkv[:, :2].to(torch.promote_types(qkv.dtype, torch.float32))
    scales = (wide.square().mean(dim=-1) + EPS).rsqrt()
    qkv[:, :2] = turn(wide * scales[..., None], cos, sin)
    return qkv, scales


def rotary_gradient_by_torch(
    dq: Tensor, dk: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    d, y = torch.stack([dq, dk], dim=1).to(scales.dtype), qkv[:, :2]
    d = (d - y * (d * y).mean(dim=-1, keepdim=True)) * scales[..., None]
    d = turn(d, cos, -sin)
    return d.to(qkv.dtype), d.sum(dim=0).flatten()


def relu_square_by_torch(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None = None, dtype=torch.bfloat16
) -> Tensor:
    if scale is not None:  # emulates 8 bits
        x, W, b = x.float() * scale, W.float(), b.float()
        return torch.addmm(b, x, W.mT).relu().square().to(dtype)
    return torch.addmm(b.type_as(x), x, W.mT).relu().square()


def relu_square_gradient_by_torch(dy: Tensor, V: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    root = post * post.clamp_min(torch.finfo(post.dtype).tiny).rsqrt()  # sqrt(0) is slow on CPUs
    dpre = (dy @ V) * (2 * root)
    return dpre, dpre.sum(dim=0, dtype=torch.promote_types(post.dtype, torch.float32))


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Make no weight zero and no gain one, so that nothing drops out of a comparison."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("gain"):
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise * (1 if "embed" in name else p.size(1) ** -0.5))


def run_trunk_by_torch(patch: pytest.MonkeyPatch) -> None:
    """Replace every kernel that models/trunk.py calls."""
    references = dict(
        embed_by_triton=embed_by_torch,
        embed_gradient_by_triton=embed_gradient_by_torch,
        matmul_by_gluon=matmul_by_torch,
        norm_by_triton=norm_by_torch,
        norm_gradient_by_triton=norm_gradient_by_torch,
        qkv_by_gluon=qkv_by_torch,
        relu_square_by_gluon=relu_square_by_torch,
        relu_square_gradient_by_gluon=relu_square_gradient_by_torch,
        rotary_gradient_by_triton=rotary_gradient_by_torch,
        weight_gradient=weight_gradient_by_torch,
    )
    assert all(name in references for name in vars(trunk) if name.endswith(("_triton", "_gluon")))
    for name, reference in references.items():
        patch.setattr(trunk, name, reference)
