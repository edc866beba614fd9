"""Muon: momentum, then the polar factor.

    m <- mu m + (1 - mu) g
    u = (1 - mu) g + mu m
    W <- (1 - lr wd) W - lr sqrt(max(1, out/in)) polar(u)

Source: https://kellerjordan.github.io/posts/muon/; defaults of track-3 entry #36.
Memory: 4 bytes per parameter (momentum). FLOPs: those of the polar factor (see polar.py).
"""

import torch
from torch import Tensor

from .polar import polar
from .slot import MatrixOptimizer, nesterov


class Muon(MatrixOptimizer):
    """Orthogonalised momentum.

    Hyperparameters: lr, weight_decay (decoupled, times lr), momentum (Nesterov), polar_steps, and
    dtype (of the polar factor's products).
    """

    defaults = dict(
        lr=0.025, weight_decay=0.05, momentum=0.95, polar_steps=12, dtype=torch.bfloat16
    )

    def update(self, grad: Tensor, state: dict, group: dict) -> Tensor:
        direction = nesterov(grad, state, group["momentum"])
        return polar(direction, group["polar_steps"], group["dtype"])
