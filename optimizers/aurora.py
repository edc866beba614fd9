"""Aurora: Muon whose update is also even over the hidden neurons of an MLP.

The polar factor U of a tall matrix has orthonormal columns but rows of any norm: a neuron (row)
that is small in the momentum gets a small update and starves. Aurora rescales the momentum's rows
x_i until those of its polar factor have equal norms. X is m x n, m > n; beta is the exponent:

    d_i = 1 / |x_i|
    repeat K times:  U = polar(diag(d) X);  except after the last:  d_i *= ((n/m) / |u_i|^2)^beta

At beta = 1/2 this is Tyler's fixed-point iteration; every further round shrinks the unevenness by
|1 - 2 beta (1 - n/m)| (1/4 for a 4x MLP; exponent 0 chooses the beta that makes it 0, at most 0.9).
Only row directions matter: A(diag(c) X) = A(X), c > 0. Rows of a subspace with too little room for
them would drive d apart for ever; d_i |x_i| stays within [1/clamp, clamp], which no row meets at
K = 2, beta = 1/2 and n <= clamp^2 = 4096 columns.

Source: arXiv 2606.27715 and github.com/tilde-research/aurora-release (src/aurora.py, vanilla).
Memory: as Muon, 4 bytes per parameter. FLOPs: K times Muon's where balanced, gram6 less (gram.py).
"""

import torch
from torch import Tensor

from .gram import LEVERAGE4, gram_polar, length
from .muon import Muon
from .polar import NORM, entry_type, factor, polar
from .slot import MatrixOptimizer, nesterov

BALANCED_AXES = {"fc": (0,), "proj": (1,), "both": (0, 1)}


def best_exponent(m: int, n: int) -> float:
    """The fastest stable exponent for m x n, m > n (aurora.md 1.4): 2/3 for a 4x MLP."""
    return min(0.9, 0.5 / (1 - n / m))


def balanced_polar(
    X: Tensor,
    rounds: int = 2,
    exponent: float | Tensor = 0.5,
    clamp: float | Tensor = 64.0,
    method: str = "quintic12",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Orthogonal and row-even: tall X (k, m, n), m > n -> (k, m, n) in dtype, |u_i|^2 -> n/m.

    Zero rows stay zero. Where rows share a subspace with too little room, they stay short.
    """
    m, n = X.shape[-2:]
    beta = exponent + (exponent == 0) * best_exponent(m, n)
    norms, unit = length(X, -1), NORM / m**0.5
    alive, tiny = norms > 0, NORM * torch.finfo(norms.dtype).tiny  # where 0 is divided by 0
    rows = unit / norms.clamp_min(tiny) * X.to(norms.dtype)  # of length unit, or 0
    rows, c = rows.to(entry_type(method, dtype, X)), alive.to(norms.dtype)  # c = d |x|
    X, norm = rows, unit * length(c).clamp_min(1)
    for _ in range(rounds - 1):  # for the row norms of U alone, gram6 takes fewer steps
        U = gram_polar(X, LEVERAGE4) if method == "gram6" else factor(X, norm, method, dtype)
        squares = U.to(c.dtype).square().sum(dim=-1, keepdim=True)
        c = c * (n / m / squares.clamp_min(1e-14)) ** beta
        c = torch.where(c < clamp, torch.where(c * clamp > 1, c, 1 / clamp), clamp) * alive
        X, norm = (rows * (c / length(c).clamp_min(tiny) * (NORM / unit))).to(rows.dtype), NORM
    return factor(X, norm, method, dtype)


class Aurora(MatrixOptimizer):
    """Muon with evened-out neurons.

    Hyperparameters: those of Muon; rounds (K), exponent (beta; 0: the best for the shape), clamp,
    and balance: the MLP matrices to even out, "fc" (neurons are rows), "proj" (columns) or "both".
    A group's neuron_axis says where the neurons are: 0 (rows), 1 (columns) or None (no MLP matrix:
    plain Muon); a group that says nothing gets its longer side, as in the authors' code.
    """

    defaults = Muon.defaults | dict(rounds=2, exponent=0.5, clamp=64.0, balance="both")
    choices = Muon.choices | {"balance": BALANCED_AXES}
    least = {"clamp": 1.0}

    def update(self, grad: Tensor, state: dict, group: dict) -> Tensor:
        X = nesterov(grad, state, group["momentum"])
        axis = self.balanced_axis(X.shape, group)
        if axis is None:
            return polar(X, group["polar"], group["dtype"])
        return self.even(X.mT, group).mT if axis == 1 else self.even(X, group)

    def even(self, X: Tensor, group: dict) -> Tensor:
        """The update of tall matrices (k, m, n) whose rows are neurons."""
        how = (group[key] for key in ("rounds", "exponent", "clamp", "polar", "dtype"))
        return balanced_polar(X, *how)

    def balanced_axis(self, shape: torch.Size, group: dict) -> int | None:
        """The axis whose norms are evened out, or None where the plain polar factor is right:
        along its shorter side it is even already, and a square one leaves no freedom."""
        long = None if shape[-2] == shape[-1] else int(shape[-1] > shape[-2])
        axis = group.get("neuron_axis", long)
        return axis if axis == long and axis in BALANCED_AXES[group["balance"]] else None

    def cost(self, shape: torch.Size, group: dict) -> float:
        """As Muon, times the polar factors where rows are balanced."""
        balanced = self.balanced_axis(shape, group) is not None
        return super().cost(shape, group) * (self.polar_factors(group) if balanced else 1)

    def polar_factors(self, group: dict) -> float:
        """The cost of `even` in polar factors, at most."""
        return group["rounds"]
