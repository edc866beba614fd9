"""Muon: momentum, then the polar factor.

    m <- mu m + (1 - mu) g
    u = (1 - mu) g + mu m
    W <- (1 - lr wd) W - lr sqrt(max(1, out/in)) polar(u)

Source: https://kellerjordan.github.io/posts/muon/; defaults of track-3 entry #36.
Memory: 4 bytes per parameter (momentum). FLOPs of an m x n matrix, m >= 2 n: 9 m n^2 + 15 n^3, for
squares 24 n^3, as counted in gram.py; in other ways 4 m n^2 + 2 n^3 a step, as in polar.py.
"""

import torch
from torch import Tensor

from .polar import POLAR, polar
from .slot import MatrixOptimizer, nesterov


class Muon(MatrixOptimizer):
    """Orthogonalised momentum.

    Hyperparameters: lr, weight_decay (decoupled, times lr), momentum (Nesterov), polar (a name in
    polar.POLAR; entry #36 has quintic12) and dtype (of the polar factor's products).
    """

    defaults = dict(lr=0.025, weight_decay=0.05, momentum=0.95, polar="gram6", dtype=torch.bfloat16)
    choices = {"polar": POLAR}

    def update(self, grad: Tensor, state: dict, group: dict) -> Tensor:
        X = nesterov(grad, state, group["momentum"])
        return polar(X, group["polar"], group["dtype"])
