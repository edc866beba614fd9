"""Techniques: the parts of which optimizers are made. Each sees a stack of equal-shaped matrices.

With techniques t1, t2, ... one step of a stack W (k, m, n) is

    U <- grad;      U <- t.before(U, W)    for each: the update, its direction and size
    V <- W;         V <- t.decay(V, U)     for each: the decayed weights
    V <- V - lr U;  V <- t.after(V, W, U)  for each: for what acts on the new weights; then W <- V

All tensors are float32 or better. A technique returns new tensors: it never changes U, V or W. Its
own state it changes in place, so that recorded CUDA graphs find it again. Nothing here knows about
ranks, parameter names or models (slot.py does).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[int, int], float]  # (step, steps) -> factor of a hyperparameter; step from 0


class Technique:
    """Base of all techniques: changes nothing.

    `state` maps names to tensors with leading size k, `group` maps hyperparameters to values;
    compiled, float hyperparameters are 0-D tensors. State names are shared within one optimizer.
    """

    defaults: dict = {}  # hyperparameter: its default value
    choices: dict = {}  # hyperparameter: the values that it may have
    least: dict = {}  # hyperparameter: its least value, where that is not 0
    worth_compiling = True  # False if unrolled loops would compile for minutes

    def init(self, grad: Tensor) -> dict[str, Tensor]:
        """Return the state of a stack before its first step, for gradients like `grad`."""
        return {}

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        return U

    def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        return V

    def after(self, V: Tensor, W: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        return V

    def cost(self, shape: torch.Size, group: dict) -> float:
        """Return the cost of one matrix in multiply-adds, by which owners are chosen."""
        return 0.0

    def kernel(self, weight: Tensor, group: dict) -> str:
        """Return which kernels the technique runs with and why, for the log; "" if it has none."""
        return ""


class Nesterov(Technique):
    """m <- mu m + (1 - mu) g;  U = (1 - mu) g + mu m. An average, not a sum: no bias correction.

    Source: https://kellerjordan.github.io/posts/muon/. Memory: 4 bytes per parameter.
    """

    defaults = dict(momentum=0.95)

    def init(self, grad: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(grad)}

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        momentum = group["momentum"]
        return U.lerp(state["momentum"].lerp_(U, 1 - momentum), momentum)


class Aspect(Technique):
    """U sqrt(max(1, m/n)): the root mean square of a tall update's rows becomes 1.

    Source: https://kellerjordan.github.io/posts/muon/.
    """

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        return U * max(1.0, U.size(-2) / U.size(-1)) ** 0.5


class Decay(Technique):
    """V (1 - lr wd): decoupled weight decay. Source: arXiv 1711.05101."""

    defaults = dict(weight_decay=0.05)

    def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        return V * (1 - group["lr"] * group["weight_decay"])


class CautiousDecay(Decay):
    """Decay of those elements that the step shrinks as well: where U V > 0.

    Source: modded-nanogpt's track 1 (cautious weight decay); arXiv 2510.12402.
    """

    def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        return torch.where(U * V > 0, super().decay(V, U, state, group), V)


class EvenRows(Technique):
    """Rows divided by their running root mean square, at the Frobenius norm of U.

        v_i <- beta2 v_i + (1 - beta2) mean_j U_ij^2;   E_i = U_i / sqrt(v_i);   U <- E |U| / |E|

    After a polar factor the rows of a tall U have norms near sqrt(n/m). Dividing rows costs
    orthogonality: uneven rows and orthonormal columns exclude each other. With `longer_side` the
    columns of wide matrices are evened out in their place, as speedruns and nanochat do; the rows
    of a wide polar factor are even already.

    Source: NorMuon, arXiv 2510.05491, with the norm kept as the speedruns do. Memory: 4 bytes per
    row. FLOPs: 5 m n.
    """

    defaults = dict(beta2=0.95)
    longer_side = False

    def __init__(self, longer_side: bool = False) -> None:
        if longer_side:
            self.longer_side = True

    def mean_over(self, U: Tensor) -> int:
        """Return the axis over which squares are averaged: that of columns, for each row."""
        return -2 if self.longer_side and U.size(-1) > U.size(-2) else -1

    def init(self, grad: Tensor) -> dict[str, Tensor]:
        return {"row_square": torch.zeros_like(grad.narrow(self.mean_over(grad), 0, 1))}

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        square = U.square().mean(dim=self.mean_over(U), keepdim=True)
        v = state["row_square"].lerp_(square, 1 - group["beta2"])
        tiny = torch.finfo(U.dtype).tiny  # v >= (1 - beta2) square: only zero rows meet it
        even = U * v.clamp_min(tiny).rsqrt()
        norms = [matrix.norm(dim=(-2, -1), keepdim=True) for matrix in (U, even)]
        return even * (norms[0] / norms[1].clamp_min(tiny))


class Adam(Technique):
    """m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), with averages m of g and v of g^2.

    With Decay this is torch.optim.AdamW to the last rounding. Gradients whose squares leave the
    range of float32 (beyond about 1e+19 or below 1e-19) give no update; eps is absolute.

    Source: arXiv 1412.6980. Memory: 8 bytes per parameter. FLOPs: 12 m n.
    """

    defaults = dict(beta1=0.9, beta2=0.95, eps=1e-10)

    def init(self, grad: Tensor) -> dict[str, Tensor]:
        zeros = {name: torch.zeros_like(grad) for name in ("momentum", "square")}
        return zeros | {"steps": grad.new_zeros(len(grad), 1, 1)}

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        beta1, beta2, t = group["beta1"], group["beta2"], state["steps"].add_(1)
        m = state["momentum"].lerp_(U, 1 - beta1) / (1 - beta1**t)
        v = state["square"].lerp_(U.square(), 1 - beta2) / (1 - beta2**t)
        return m / (v.sqrt() + group["eps"])
