"""The optimizer slot: everything about a matrix optimizer that is not its maths.

A matrix optimizer subclasses `MatrixOptimizer` and writes one method, `update`, on stacks of
equal-shaped matrices. The slot buckets parameters by shape, deals whole matrices to ranks by cost
(largest first), sums gradients over ranks, steps the owned matrices and gathers the results.
One step, three loops:

    1. for each bucket: launch the reduce_scatter of its gradients to their owners
    2. for each bucket: wait for it, update the owned matrices, launch the all_gather of the weights
    3. for each bucket: wait for it

The parameters of a bucket are views of one buffer, each rank's side by side: what is updated and
gathered is in place. A parameter that was moved elsewhere (p.data = ...) is brought back.

Momentum lives on the owner only (ZeRO-1). Without a process group the same code runs without
collectives. Inputs and Work handles of asynchronous collectives are held until waited for.
`state_dict` gathers the state of all matrices on every rank: any number of ranks can load it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# What a parameter group may carry besides hyperparameters; the last two are torch's.
TAGS = {"params", "name", "neuron_axis", "param_names", "initial_lr"}


@dataclass
class Bucket:
    """Parameters of one group with one shape, and who owns which."""

    group: dict
    params: list[Tensor]  # K of (m, n)
    owned: list[list[int]] = field(default_factory=list)  # per rank: indices into params
    state: dict[str, Tensor] = field(default_factory=dict)  # of this rank's matrices: (k, ...)
    weights: Tensor | None = None  # (ranks, slots, m, n); `cells` are its parts, by parameter
    cells: list[Tensor] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """Matrices per rank in a communication buffer; ranks that own fewer leave padding."""
        return max(map(len, self.owned))


def grouped() -> bool:
    """Whether this process is a rank of a group."""
    return dist.is_available() and dist.is_initialized()


def owners_by_cost(costs: list[float], ranks: int) -> list[int]:
    """The owner of each item: largest cost first, each to the rank with the least so far."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def nesterov(grad: Tensor, state: dict, momentum: float | Tensor) -> Tensor:
    """m <- mu m + (1 - mu) g, then (1 - mu) g + mu m; `grad` itself is not touched."""
    buffer = state["momentum"].lerp_(grad, 1 - momentum)
    return grad.lerp(buffer, momentum)


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of all matrix optimizers: W <- decay(W) - lr * scale * update(grad).

    Args:
        params: 2-D parameters, or groups of them (dicts with "params", optional "name" and
            "neuron_axis", and any hyperparameter of `defaults`); also (name, parameter) pairs.
        reduce: True: gradients differ by rank and the slot sums them. False: they are already
            reduced (DDP), the slot only shares the work.
        compile: compile the update of each bucket; None: on CUDA, where it is worth it.
        hyperparameters: as in `defaults` of the class; an unknown one raises ValueError.
    """

    defaults = dict(lr=0.02, weight_decay=0.0, momentum=0.95)
    choices: dict = {}  # hyperparameter: the values that it may have
    least: dict = {}  # hyperparameter: its least value, where that is not 0
    worth_compiling = True  # False where unrolled loops would compile for minutes

    def __init__(
        self, params, *, reduce: bool = True, compile: bool | None = None, **hyperparameters
    ) -> None:
        self._buckets: list[Bucket] = []
        self._known = {**type(self).defaults}
        self._check_names(hyperparameters)
        self.reduce = reduce
        self.world_size = dist.get_world_size() if grouped() else 1
        self.rank = dist.get_rank() if grouped() else 0
        super().__init__(params, {**self._known, **hyperparameters})
        on_cuda = any(p.is_cuda for group in self.param_groups for p in group["params"])
        self.compiled = on_cuda and self.worth_compiling if compile is None else compile
        self._maths = self._step_weights
        if self.compiled:
            self._maths = torch.compile(self._step_weights, dynamic=False, fullgraph=True)

    # ---- the seam: what an optimizer writes -------------------------------------------------

    def update(self, grad: Tensor, state: dict, group: dict) -> Tensor:
        """Direction of a stack: grad (k, m, n) -> (k, m, n); may change `state`, never `grad`."""
        raise NotImplementedError

    def scale(self, direction: Tensor, weight: Tensor, group: dict) -> float | Tensor:
        """Factor of the direction, broadcast against (k, m, n)."""
        return max(1.0, weight.size(-2) / weight.size(-1)) ** 0.5

    def decay(self, weight: Tensor, direction: Tensor, group: dict) -> Tensor:
        """The weights (k, m, n) after decoupled decay."""
        return weight * (1 - group["lr"] * group["weight_decay"])

    def init_state(self, grad: Tensor) -> dict[str, Tensor]:
        """State of a stack before its first step; leading size k, as in grad (k, m, n)."""
        return {"momentum": torch.zeros_like(grad)}

    def cost(self, shape: torch.Size, group: dict) -> float:
        """Relative cost of one matrix, for dealing: a polar factor is long side x short side^2."""
        return max(shape) * min(shape) ** 2

    def before_forward(self) -> None:
        """Called before each step's forward pass (for look-ahead methods)."""

    @contextmanager
    def readout(self) -> Iterator[None]:
        """Around validation (for weight averages): may move the weights, must put them back."""
        yield

    # ---- the step ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise ValueError("closures are not supported: call backward() first, then step()")
        if (size := dist.get_world_size() if grouped() else 1) != self.world_size:
            raise ValueError(f"{size} ranks, {self.world_size} when this was built: build it again")
        self._check_gradients()
        reductions = [self._launch_reduce(bucket) for bucket in self._buckets]
        gathers = []
        for bucket in self._buckets:
            grads, work, _held = reductions.pop(0)
            if work is not None:
                work.wait()
            self._hold_weights(bucket)
            self._advance(bucket, grads)
            gathers.append(self._launch_gather(bucket))
        for work, _held in gathers:
            if work is not None:
                work.wait()
        torch.autograd.graph.increment_version(self._parameters())  # autograd sees what was written

    def reset(self) -> None:
        """Forgets all state, as if newly built; compiled code is kept."""
        for bucket in self._buckets:
            bucket.state = {}

    def _hold_weights(self, bucket: Bucket) -> None:
        """Makes the parameters views of bucket.weights, unless they are."""
        pairs = list(zip(bucket.params, bucket.cells, strict=bucket.weights is not None))
        if pairs and all(p.data_ptr() == cell.data_ptr() for p, cell in pairs):
            return
        bucket.weights = self._buffer(bucket, bucket.params[0].dtype)
        bucket.cells = self._cells(bucket, bucket.weights)
        for p, cell in zip(bucket.params, bucket.cells, strict=True):
            p.data = cell.copy_(p)

    def _advance(self, bucket: Bucket, grads: Tensor) -> None:
        """Steps the matrices that this rank owns, with their gradients (k, m, n); k may be 0."""
        mine = bucket.owned[self.rank]
        grads = grads.to(torch.promote_types(grads.dtype, torch.float32))
        if not bucket.state:
            bucket.state = self.init_state(grads)
        if not mine:
            return
        weights = bucket.weights[self.rank, : len(mine)]
        inputs = (weights, grads, bucket.state, self._hyperparameters(bucket.group))
        if not self.compiled:
            self._maths(*inputs)
            return
        with torch._dynamo.config.patch(recompile_limit=64):  # one for each shape, 8 by default
            self._maths(*inputs)

    def _step_weights(self, weight: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        direction = self.update(grad, state, group).to(grad.dtype)
        wide = weight.to(direction.dtype)  # decay of a bfloat16 weight would be rounded away
        direction = direction * self.scale(direction, wide, group)
        weight.copy_(self.decay(wide, direction, group) - group["lr"] * direction)

    def _hyperparameters(self, group: dict) -> dict:
        """As the maths sees them; compiled, as 0-D tensors: then a new value recompiles nothing."""
        chosen = {k: group[k] for k in (*self._known, "neuron_axis") if k in group}
        if not self.compiled:
            return chosen
        numbers = [k for k, default in self._known.items() if isinstance(default, float)]
        return chosen | {k: torch.as_tensor(chosen[k], dtype=torch.float32) for k in numbers}

    # ---- the collectives --------------------------------------------------------------------

    def _launch_reduce(self, bucket: Bucket) -> tuple[Tensor, dist.Work | None, Tensor | None]:
        """Gradients of the owned matrices (k, m, n), valid once the Work was waited for."""
        grads, mine = [p.grad for p in bucket.params], bucket.owned[self.rank]
        shape = grads[0].shape
        if self.world_size == 1 or not self.reduce:
            owned = torch.stack([grads[i] for i in mine]) if mine else grads[0].new_empty(0, *shape)
            return owned, None, None
        send = self._buffer(bucket)
        torch._foreach_copy_(self._cells(bucket, send), grads)
        received = torch.empty_like(send[0])
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # torch 2.13
        work = scatter(received, send.flatten(0, 1), async_op=True)
        return received[: len(mine)], work, send

    def _launch_gather(self, bucket: Bucket) -> tuple[dist.Work | None, Tensor]:
        """Brings every rank's part of bucket.weights to all; padding travels, but is never read."""
        mine = bucket.weights[self.rank]
        if self.world_size == 1:
            return None, mine
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13
        return gather(bucket.weights.flatten(0, 1), mine, async_op=True), mine

    def _buffer(self, bucket: Bucket, dtype: torch.dtype | None = None) -> Tensor:
        shape = (self.world_size, bucket.slots, *bucket.params[0].shape)
        return bucket.params[0].new_zeros(shape, dtype=dtype or bucket.params[0].grad.dtype)

    def _cells(self, bucket: Bucket, buffer: Tensor) -> list[Tensor]:
        """Where each parameter's matrix stands in a (world, slots, m, n) buffer."""
        place = {i: (r, s) for r, mine in enumerate(bucket.owned) for s, i in enumerate(mine)}
        return [buffer[place[i]] for i in range(len(bucket.params))]

    # ---- state, for any number of ranks -------------------------------------------------------

    def state_dict(self) -> dict:
        """As torch's: {"state": {index: {key: tensor}}, "param_groups"}; every rank must call it.

        The state of all matrices, from their owners, on each rank; indices count parameters in the
        order of the groups. Before the first step "state" is empty.
        """
        order = {p: i for i, p in enumerate(self._parameters())}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        for group, full in zip(groups, self.param_groups, strict=True):
            group["params"] = [order[p] for p in full["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for bucket in self._buckets:
            for key, mine in bucket.state.items():
                for owner, indices in enumerate(bucket.owned):
                    shape = (len(indices), *mine.shape[1:])
                    stack = mine if owner == self.rank else mine.new_empty(shape)
                    if self.world_size > 1 and indices:
                        dist.broadcast(stack, owner)
                    for i, value in zip(indices, stack, strict=True):
                        state.setdefault(order[bucket.params[i]], {})[key] = value.clone()
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes a state_dict of any number of ranks; each rank keeps what it owns."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        found, expected = ([len(g["params"]) for g in some] for some in (groups, self.param_groups))
        if found != expected:
            raise ValueError(f"the state has groups of {found} parameters, expected {expected}")
        for i, p in enumerate(self._parameters()) if state else ():
            empty = self.init_state(p.new_zeros(1, *p.shape))
            expected = {key: tuple(value.shape[1:]) for key, value in empty.items()}
            found = {key: tuple(value.shape) for key, value in state.get(i, {}).items()}
            if found != expected:
                raise ValueError(
                    f"the saved state of parameter {i} has shapes {found}, expected {expected}: it "
                    "comes from another optimizer or model"
                )
        for group, saved in zip(self.param_groups, groups, strict=True):
            self._check_values(group | saved)  # of all groups, before anything changes
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        self.deal()
        order = {p: i for i, p in enumerate(self._parameters())}
        for bucket in self._buckets if state else ():
            owned = [state[order[bucket.params[i]]] for i in bucket.owned[self.rank]]
            like = bucket.params[0]
            dtype = torch.promote_types(like.dtype, torch.float32)
            empty = self.init_state(like.new_zeros(0, *like.shape, dtype=dtype))
            for key, like in empty.items():
                stack = [saved[key].to(like) for saved in owned]
                bucket.state[key] = torch.stack(stack) if stack else like

    def __reduce_ex__(self, protocol) -> None:
        raise TypeError("an optimizer is not copied: build a new one and load state_dict() into it")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # ---- what may come in -------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        self._check_names({k: v for k, v in param_group.items() if k not in TAGS})
        if any(bucket.state for bucket in self._buckets):
            raise ValueError("a group cannot be added after the first step: momentum would be lost")
        super().add_param_group(param_group)
        try:
            self.deal()
        except ValueError:
            self.param_groups.pop()  # the others go on as they were
            self.deal()
            raise

    def deal(self) -> None:
        """Deals all parameters to ranks, without state; again if hyperparameters were replaced."""
        self._buckets = []
        for group in self.param_groups:
            self._check_values(group)
            by_kind: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.ndim != 2 or p.numel() == 0:
                    raise ValueError(
                        f"{type(self).__name__} takes matrices, found a parameter of shape "
                        f"{tuple(p.shape)}: give it to torch.optim.AdamW instead"
                    )
                by_kind.setdefault((p.shape, p.dtype, p.device), []).append(p)
            self._buckets += [Bucket(group, params) for params in by_kind.values()]
        costs = [self.cost(p.shape, b.group) for b in self._buckets for p in b.params]
        owners = iter(owners_by_cost(costs, self.world_size))
        for bucket in self._buckets:
            bucket.owned = [[] for _ in range(self.world_size)]
            for i in range(len(bucket.params)):
                bucket.owned[next(owners)].append(i)

    def _check_names(self, hyperparameters: dict) -> None:
        for name in hyperparameters.keys() - self._known.keys():
            raise ValueError(
                f"{type(self).__name__} has no hyperparameter {name!r}: it takes "
                f"{', '.join(sorted(self._known))}"
            )

    def _check_values(self, group: dict) -> None:
        """Rates and decays are 0 or more, momenta below 1, counts 1 or more, words are known."""
        for name, default in {**self._known, "neuron_axis": None}.items():
            value, expected = group.get(name, default), ""
            numeric = isinstance(value, int | float | Tensor)
            if name in self.choices or name == "neuron_axis":
                known = tuple(self.choices.get(name, (0, 1, None)))
                expected = "" if value in known else f"one of {', '.join(map(str, known))}"
            elif isinstance(default, float):
                limit = 1.0 if name.startswith(("momentum", "beta")) else math.inf
                least = self.least.get(name, 0)
                inside = numeric and least <= value < limit
                expected = "" if inside else f"{least} or more, below {limit}"
            elif isinstance(default, torch.dtype):
                known = isinstance(value, torch.dtype) and value.is_floating_point
                expected = "" if known else "a floating torch.dtype"
            elif isinstance(default, int):
                expected = "" if isinstance(value, int) and value >= 1 else "1 or more"
            if expected:
                raise ValueError(f"{type(self).__name__}: {name} is {value!r}, expected {expected}")

    def _check_gradients(self) -> None:
        for bucket in self._buckets:
            for i, p in enumerate(bucket.params):
                if p.grad is None:
                    number = [g is bucket.group for g in self.param_groups].index(True)
                    name = bucket.group.get("name", number)
                    raise ValueError(
                        f"parameter {i} of group {name!r}, {tuple(p.shape)}, has no gradient: "
                        "call backward() before step(), or leave unused parameters out"
                    )
