"""NorMuon: Muon whose rows are divided by their running root mean square.

    O = polar(u), with momentum and u as in Muon
    v_i <- beta2 v_i + (1 - beta2) mean_j O_ij^2        one number per output neuron
    O^_i = O_i / sqrt(v_i), then O^ <- O^ |O| / |O^|    the Frobenius norm of the polar factor stays
    W <- (1 - lr wd) W - lr sqrt(max(1, out/in)) O^

So the rows of a tall m x n update have norms near sqrt(n/m) before the aspect factor and near 1
after it. Dividing rows costs orthogonality: uneven rows and orthonormal columns exclude each other.

Source: arXiv 2510.05491, with the norm kept as the speedruns do (aurora.md 1.3).
Memory: Muon's, and 4 bytes per row. FLOPs: Muon's, and 5 m n.
"""

import torch
from torch import Tensor

from .muon import Muon


class NorMuon(Muon):
    """Muon with evened-out output neurons. Hyperparameters: Muon's, and beta2 of the statistic."""

    defaults = Muon.defaults | dict(beta2=0.95)

    def init_state(self, grad: Tensor) -> dict[str, Tensor]:
        return super().init_state(grad) | {"row_square": grad.new_zeros(*grad.shape[:-1], 1)}

    def update(self, grad: Tensor, state: dict, group: dict) -> Tensor:
        U = super().update(grad, state, group).to(grad.dtype)
        square = U.square().mean(dim=-1, keepdim=True)
        v = state["row_square"].lerp_(square, 1 - group["beta2"])
        tiny = torch.finfo(U.dtype).tiny  # v >= (1 - beta2) of the square: only zero rows meet it
        even = U * v.clamp_min(tiny).rsqrt()
        norms = [matrix.norm(dim=(-2, -1), keepdim=True) for matrix in (U, even)]
        return even * (norms[0] / norms[1].clamp_min(tiny))
