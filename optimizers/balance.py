"""Aurora's direction: a polar factor that is also even over the hidden neurons of an MLP.

The polar factor U of a tall matrix has orthonormal columns but rows of any norm: a neuron (row)
that is small in the momentum gets a small update and starves. Aurora rescales the momentum's rows
x_i until the rows of its polar factor have equal norms. X is m x n, m > n; beta is the exponent:

    d_i = 1 / |x_i|
    repeat K times:  U = polar(diag(d) X);  except after the last:  d_i *= ((n/m) / |u_i|^2)^beta

At beta = 1/2 this is Tyler's fixed-point iteration; every further round shrinks the unevenness by
|1 - 2 beta (1 - n/m)| (1/4 for a 4x MLP; exponent 0 chooses the beta that makes it 0, at most 0.9).
Only row directions matter: A(diag(c) X) = A(X), c > 0. Rows that share a subspace with too little
room would drive d apart for ever: so d_i |x_i| stays within [1/clamp, clamp], a bound that no row
reaches at K = 2, beta = 1/2 and n <= clamp^2 = 4096 columns.

Source: arXiv 2606.27715 and github.com/tilde-research/aurora-release (src/aurora.py, vanilla).
FLOPs: K polar factors where balanced, fewer with gram6 (gram.py).
"""

import torch
from torch import Tensor

from .checks import check_names, check_values
from .gram import LEVERAGE4, gram_polar, length
from .polar import NORM, Polar, entry_type, factor

BALANCED_AXES = {"fc": (0,), "proj": (1,), "both": (0, 1)}


def best_exponent(m: int, n: int) -> float:
    """Return the fastest stable exponent for m x n, m > n: 2/3 for a 4x MLP."""
    return min(0.9, 0.5 / (1 - n / m))


def balanced_polar(
    X: Tensor,
    rounds: int = 2,
    exponent: float | Tensor = 0.5,
    clamp: float | Tensor = 64.0,
    method: str = "quintic12",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return orthogonal and row-even matrices: tall X (k, m, n), m > n -> (k, m, n) in `dtype`.

    |u_i|^2 tends to n/m. Zero rows stay zero; rows that share too small a subspace stay short.
    """
    m, n = X.shape[-2:]
    beta = exponent + (exponent == 0) * best_exponent(m, n)
    norms, unit = length(X, -1), NORM / m**0.5
    alive, tiny = norms > 0, NORM * torch.finfo(norms.dtype).tiny  # for 0 / 0
    rows = unit / norms.clamp_min(tiny) * X.to(norms.dtype)  # of length `unit`, or 0
    rows, c = rows.to(entry_type(method, dtype, X)), alive.to(norms.dtype)  # c is d |x|
    X, norm = rows, unit * length(c).clamp_min(1)
    for _ in range(rounds - 1):  # only U's row norms are needed: gram6 takes fewer steps
        U = gram_polar(X, LEVERAGE4) if method == "gram6" else factor(X, norm, method, dtype)
        squares = U.to(c.dtype).square().sum(dim=-1, keepdim=True)
        c = c * (n / m / squares.clamp_min(1e-14)) ** beta
        c = torch.where(c < clamp, torch.where(c * clamp > 1, c, 1 / clamp), clamp) * alive
        X, norm = (rows * (c / length(c).clamp_min(tiny) * (NORM / unit))).to(rows.dtype), NORM
    return factor(X, norm, method, dtype)


class Balance(Polar):
    """U <- the polar factor of U, evened out over the neurons of MLP matrices.

    Hyperparameters: those of Polar; rounds (K), exponent (beta; 0: the best for the shape), clamp,
    and balance: the MLP matrices to even out, "fc" (neurons are rows), "proj" (columns) or "both".
    A group's neuron_axis says where the neurons are: 0 (rows), 1 (columns) or None (no MLP matrix,
    plain polar factor); a group without it gets its longer side, as in the authors' code.
    """

    defaults = Polar.defaults | dict(rounds=2, exponent=0.5, clamp=64.0, balance="both")
    choices = Polar.choices | {"balance": BALANCED_AXES}
    least = {"clamp": 1.0}

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        axis = self.balanced_axis(U.shape, group)
        if axis is None:
            return super().before(U, W, state, group)
        return self.even(U.mT, group).mT if axis == 1 else self.even(U, group)

    def even(self, X: Tensor, group: dict) -> Tensor:
        """Return the direction of tall matrices (k, m, n) whose rows are neurons."""
        names = ("rounds", "exponent", "clamp", "polar", "dtype")
        return balanced_polar(X, *(group[name] for name in names))

    def balanced_axis(self, shape: torch.Size, group: dict) -> int | None:
        """Return the axis to even out, or None where the plain polar factor is right: along its
        shorter side it is even already, and a square one leaves no freedom."""
        longer = None if shape[-2] == shape[-1] else int(shape[-1] > shape[-2])
        axis = group.get("neuron_axis", longer)
        return axis if axis == longer and axis in BALANCED_AXES[group["balance"]] else None

    def cost(self, shape: torch.Size, group: dict) -> float:
        balanced = self.balanced_axis(shape, group) is not None
        return super().cost(shape, group) * (self.polar_factors(group) if balanced else 1)

    def polar_factors(self, group: dict) -> float:
        """Return an upper bound of the cost of `even`, in polar factors."""
        return group["rounds"]


def direction(X: Tensor, neuron_axis: int | None, **settings) -> Tensor:
    """Return Aurora's direction of whole matrices, for optimizers outside the slot (engines.md).

    X is the Nesterov momentum: a matrix (m, n) or a stack of equal ones (k, m, n), k = 0 too, of
    any scale. The result U has its shape, in float32 or better. `neuron_axis` says where the hidden
    neurons of an MLP matrix are: 0 (rows), 1 (columns), or None for any other matrix, which gets
    its polar factor. `settings` are Balance's. A step of Aurora is

        W <- (1 - lr weight_decay) W - lr sqrt(max(1, m/n)) U

    Source: arXiv 2606.27715. Raises ValueError for other shapes, shards and settings.
    """
    if X.ndim not in (2, 3) or hasattr(X, "placements"):
        kind = f"{type(X).__name__} of shape {tuple(X.shape)}"
        raise ValueError(f"direction takes a whole matrix or a stack of them, found a {kind}")
    check_names(Balance, settings)
    group = Balance.defaults | settings | {"neuron_axis": neuron_axis}
    check_values(Balance, group)
    wide = X.to(torch.promote_types(X.dtype, torch.float32))
    stack = wide if X.ndim == 3 else wide[None]
    U = Balance().before(stack, stack, {}, group).to(wide.dtype) if len(stack) else stack
    return U.view_as(X) if X.ndim == 2 else U
