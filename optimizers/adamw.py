"""AdamW on matrices: the elementwise baseline, behind the same slot as the others.

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
    W <- (1 - lr wd) W - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

It is torch.optim.AdamW to the last rounding, with its state sharded. The update is no polar factor
and gets no aspect factor. Gradients whose squares leave the range of float32 (beyond about 1e+19 or
below 1e-19) give no update; eps is absolute, as everywhere.

Source: arXiv 1711.05101. Memory: 8 bytes per parameter. FLOPs: 12 m n.
"""

import torch
from torch import Tensor

from .slot import MatrixOptimizer


class AdamW(MatrixOptimizer):
    """Hyperparameters: lr, weight_decay (decoupled, times lr), beta1, beta2, eps."""

    defaults = dict(lr=0.002, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-10)

    def init_state(self, grad: Tensor) -> dict[str, Tensor]:
        steps = grad.new_zeros(len(grad), 1, 1)
        return super().init_state(grad) | {"square": torch.zeros_like(grad), "steps": steps}

    def update(self, grad: Tensor, state: dict, group: dict) -> Tensor:
        beta1, beta2, t = group["beta1"], group["beta2"], state["steps"].add_(1)
        m = state["momentum"].lerp_(grad, 1 - beta1) / (1 - beta1**t)
        v = state["square"].lerp_(grad.square(), 1 - beta2) / (1 - beta2**t)
        return m / (v.sqrt() + group["eps"])

    def scale(self, direction: Tensor, weight: Tensor, group: dict) -> float:
        return 1.0

    def cost(self, shape: torch.Size, group: dict) -> float:
        return shape[-2] * shape[-1]
