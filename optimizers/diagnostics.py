"""Measures what an optimizer does to the neurons of an MLP: the `diag:` lines of --diagnostics.

The last step before a validation is measured, for each matrix whose group has a neuron_axis, turned
so that its m rows are neurons of n weights:

    X           Nesterov momentum (1 - mu) g + mu m; x_i its rows
    leverage    rho_i = (m/n) x_i^T (X^T X)^+ x_i: 1 on average; below 1/16 a neuron starves, as
                Muon's update of it is shorter than 1/4 of the root mean square
    update      rho_i = |u_i|^2 / mean_j |u_j|^2, U = (1 - lr wd) W_before - W_after
    cv          standard deviation over mean of the rho_i; quantiles at 0, 1, 10, 50, 90, 99, 100%
    below       share of neurons with rho below 1/16, 0.01 and 0.0025
    persistent  {t: share of neurons with leverage below 1/16 at every check from step t to now};
                after a resumption the checks begin anew
    orthogonality     |U^T U - I|_F / sqrt(n), with U scaled to |U|_F = sqrt(n)
    update_to_weight  |W_after - W_before|_F / |W_before|_F

For each layer given to `activity`, over a batch of tokens: `silent` is the share of neurons that
never fire (pre-activation above 0), `firing` the mean share of tokens that fire one, and `mean_act`
the mean positive pre-activation.
"""

import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .buckets import Bucket
from .slot import MatrixOptimizer

QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
THRESHOLDS = (1 / 16, 0.01, 0.0025)


def leverage(X: Tensor) -> Tensor:
    """Return x_i^T (X^T X)^+ x_i of each row of X (m, n). Singular values fade near 1e-6 rms."""
    X = (X.cpu() if X.is_mps else X).double()
    X = X / X.abs().amax().clamp_min(torch.finfo(X.dtype).tiny)
    S = X.mT @ X
    ridge = 1e-12 * S.diagonal().mean() + torch.finfo(X.dtype).tiny
    L, _ = torch.linalg.cholesky_ex(S + ridge * torch.eye(len(S), dtype=S.dtype, device=S.device))
    return torch.linalg.solve_triangular(L, X.mT, upper=False).square().sum(dim=0)


def spread(rho: Tensor) -> dict:
    """Return how even the rho (m,) of neurons are; their mean is 1."""
    points = torch.tensor(QUANTILES, dtype=rho.dtype, device=rho.device)
    values = dict(cv=rho.std(correction=0) / rho.mean(), quantiles=rho.quantile(points))
    values["below"] = torch.stack([(rho < limit).float().mean() for limit in THRESHOLDS])
    return {key: rounded(value) for key, value in values.items()}


def rounded(value: Tensor) -> float | None | list[float | None]:
    """Return 4 digits for JSON, None for non-finite values (0/0 where nothing moved)."""
    numbers = [float(f"{x:.4g}") if math.isfinite(x) else None for x in value.flatten().tolist()]
    return numbers if value.ndim else numbers[0]


class Diagnostics:
    """Measures one step: call before_step(), step the optimizer, then call measure().

    The model offers neurons(), its layers by name whose outputs are MLP neurons, and
    hidden(tokens, plain=True), which calls these layers.
    """

    def __init__(self, optimizer: MatrixOptimizer, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model
        self.since: dict[str, Tensor] = {}  # per matrix: first step of a neuron's present famine
        self.checks: list[int] = []
        self.before: dict[str, tuple[Tensor, Tensor | None]] = {}

    def matrices(self) -> list[tuple[str, Bucket, int, int]]:
        """Return name, bucket, index in bucket and in stack of the MLP matrices owned here."""
        found, name_of = [], {}
        for number, group in enumerate(self.optimizer.param_groups):
            numbered = [f"{group.get('name', number)}.{i}" for i in range(len(group["params"]))]
            names = group.get("param_names", numbered)
            name_of |= dict(zip(group["params"], names, strict=True))
        for bucket in self.optimizer._buckets:
            for place, i in enumerate(bucket.owned[self.optimizer.rank]):
                if bucket.groups[i].get("neuron_axis") is not None:
                    found.append((name_of[bucket.params[i]], bucket, i, place))
        return found

    @torch.no_grad()
    def before_step(self) -> None:
        for name, bucket, i, place in self.matrices():
            momentum = bucket.state["momentum"][place].clone() if bucket.state else 0.0
            self.before[name] = bucket.params[i].detach().clone(), momentum

    @torch.no_grad()
    def measure(self, step: int, batches: Iterable[Tensor]) -> dict:
        """Return the step, the seconds this took, and measurements of matrices and of neurons.

        Matrices are those of all ranks: every rank must call it. Neurons are watched while the
        model runs on the batches of tokens.
        """
        started = time.perf_counter()
        self.checks.append(step)
        found = {name: self._of_matrix(name, *where) for name, *where in self.matrices()}
        if self.optimizer.world_size > 1:
            parts: list[dict | None] = [None] * self.optimizer.world_size
            dist.all_gather_object(parts, found)
            found = {name: values for part in parts for name, values in part.items()}
        self.before = {}
        run = partial(self.model.hidden, plain=True)
        neurons = activity(self.model.neurons(), run, batches)
        seconds = round(time.perf_counter() - started, 3)
        return dict(
            step=step, seconds=seconds, matrices=dict(sorted(found.items())), neurons=neurons
        )

    def _of_matrix(self, name: str, bucket: Bucket, i: int, place: int) -> dict:
        group, (weight, momentum), after = bucket.groups[i], self.before[name], bucket.params[i]
        mu = group.get("momentum", group.get("beta1", 0.0))
        X = (1 + mu) * bucket.state["momentum"][place] - mu * momentum
        decay = group["lr"] * group.get("weight_decay", 0.0)
        U = weight.float() * (1 - decay) - after
        moved = (after - weight).norm() / weight.norm()
        X, U = (A.mT.float() if group["neuron_axis"] == 1 else A.float() for A in (X, U))
        m, n = U.shape
        rho, rows = leverage(X) * m / min(m, n), U.square().sum(dim=1)
        never = torch.full_like(rho, torch.inf)
        since = self.since.get(name, never).clamp_max(self.checks[-1])
        self.since[name] = since = torch.where(rho < THRESHOLDS[0], since, never)
        counts = {t: rounded((since <= t).float().mean()) for t in self.checks}
        U = U * (min(m, n) ** 0.5 / U.norm())
        gram = U.mT @ U if m > n else U @ U.mT
        error = (gram - torch.eye(min(m, n), device=U.device)).norm() / min(m, n) ** 0.5
        return dict(
            leverage=spread(rho),
            update=spread(rows / rows.mean()),
            persistent={t: share for t, share in counts.items() if share},
            orthogonality=rounded(error),
            update_to_weight=rounded(moved),
        )


@torch.no_grad()
def activity(
    layers: dict[str, nn.Module], run: Callable[[Tensor], object], batches: Iterable[Tensor]
) -> dict[str, dict]:
    """Call run(tokens) on each batch and measure the outputs (..., neurons) of the layers."""
    sums = {name: [0, 0, 0] for name in layers}  # tokens, times fired, positive pre-activation

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            x = output.flatten(0, -2)
            new = len(x), (x > 0).sum(dim=0), x.relu().sum(dim=0, dtype=torch.float32)
            sums[name] = [old + more for old, more in zip(sums[name], new, strict=True)]

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for tokens in batches:
            run(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: dict(
            silent=rounded((fired == 0).float().mean()),
            firing=rounded(fired.float().mean() / tokens),
            mean_act=rounded(total.mean() / tokens),
        )
        for name, (tokens, fired, total) in sums.items()
    }
