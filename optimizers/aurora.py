"""Aurora: Muon whose update is also even over the hidden neurons of an MLP.

The polar factor U of a tall matrix has orthonormal columns but rows of any norm: a neuron (row)
that is small in the momentum gets a small update and starves. Aurora rescales the rows of the
momentum until those of its polar factor have equal norms. m x n, m > n, x_i the rows, beta the
exponent:

    d_i = 1 / |x_i|
    repeat K times:  U = polar(diag(d) X);  except after the last:  d_i *= ((n/m) / |u_i|^2)^beta

At beta = 1/2 this is Tyler's fixed-point iteration; every further round shrinks the unevenness by
|1 - 2 beta (1 - n/m)| (1/4 for a 4x MLP). Only row directions matter: A(diag(c) X) = A(X), c > 0.

Source: arXiv 2606.27715 and github.com/tilde-research/aurora-release (src/aurora.py, vanilla).
Memory: as Muon, 4 bytes per parameter. FLOPs: K times Muon's on the balanced matrices.
"""

import torch
from torch import Tensor

from .polar import polar, unit_max
from .slot import MatrixOptimizer, nesterov

BALANCED_AXES = {"fc": (0,), "proj": (1,), "both": (0, 1)}


def balanced_polar(
    X: Tensor, rounds: int, exponent: float | Tensor, steps: int, dtype: torch.dtype
) -> Tensor:
    """Orthogonal and row-uniform: tall X (k, m, n), m > n -> (k, m, n), |u_i|^2 -> n/m.

    Zero rows stay zero. Where more rows share a subspace than it has room for, no even solution
    exists and the rows of that subspace stay short (aurora.md 1.4).
    """
    target = X.size(-1) / X.size(-2)
    X = unit_max(X)
    norms = X.norm(dim=-1, keepdim=True)
    d = torch.where(norms > 0, 1 / norms, 0)
    for last in [False] * (rounds - 1) + [True]:
        U = polar(d * X, steps, dtype)
        if not last:
            leverage = U.to(X.dtype).square().sum(dim=-1, keepdim=True)
            d = d * (target / leverage.clamp_min(1e-14)) ** exponent
    return U


class Aurora(MatrixOptimizer):
    """Muon with evened-out neurons.

    Hyperparameters: those of Muon; rounds (K), exponent (beta), and balance: which MLP matrices to
    even out, "fc" (neurons are rows), "proj" (neurons are columns) or "both". Which axis holds the
    neurons is said by the group, neuron_axis=0 (rows), 1 (columns) or None (no MLP matrix: plain
    Muon); a group that says nothing gets its longer side, as in the authors' code.
    """

    defaults = dict(
        lr=0.025, weight_decay=0.05, momentum=0.95, rounds=2, exponent=0.5, balance="both",
        polar_steps=12, dtype=torch.bfloat16,
    )  # fmt: skip

    def update(self, grad: Tensor, state: dict, group: dict) -> Tensor:
        X = nesterov(grad, state, group["momentum"])
        axis, how = self.balanced_axis(X.shape, group), (group["polar_steps"], group["dtype"])
        if axis is None:
            return polar(X, *how)
        X = X.mT if axis == 1 else X
        U = balanced_polar(X, group["rounds"], group["exponent"], *how)
        return U.mT if axis == 1 else U

    def balanced_axis(self, shape: torch.Size, group: dict) -> int | None:
        """The axis whose norms are evened out, or None where the plain polar factor is right.

        Along its shorter side a polar factor is even already; a square one leaves no freedom.
        """
        long = None if shape[-2] == shape[-1] else int(shape[-1] > shape[-2])
        axis = group.get("neuron_axis", long)
        if group["balance"] not in BALANCED_AXES or axis not in (0, 1, None) or group["rounds"] < 1:
            raise ValueError(
                f"balance {group['balance']!r}, neuron_axis {axis!r}, rounds {group['rounds']}: "
                "expected fc, proj or both; 0, 1 or None; 1 or more"
            )
        return axis if axis == long and axis in BALANCED_AXES[group["balance"]] else None

    def cost(self, shape: torch.Size, group: dict) -> float:
        """As Muon, times the rounds where rows are balanced."""
        rounds = group["rounds"] if self.balanced_axis(shape, group) is not None else 1
        return rounds * super().cost(shape, group)
