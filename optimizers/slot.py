"""The optimizer slot: everything about a matrix optimizer that is not its maths.

A matrix optimizer subclasses `MatrixOptimizer` and writes one method, `update`, on stacks of
equal-shaped matrices. The slot buckets parameters by shape, deals whole matrices to ranks by cost
(largest first), sums gradients over ranks, steps the owned matrices and gathers the results.
One step, three loops:

    1. for each piece of a bucket: launch the reduce_scatter of its gradients to their owners;
       before_last_backward() lets that happen during the backward pass
    2. for each bucket: update the owned matrices, each part after its gradients have been waited
       for, and launch the all_gather of the weights
    3. for each bucket: wait for it

The parameters of a bucket are views of one buffer, each rank's side by side: what is updated and
gathered is in place. A parameter that was moved elsewhere (p.data = ...) is brought back. Compiled
on a GPU, each part is replayed as a CUDA graph (replay.py): state stays in place, too.

Momentum lives on the owner only (ZeRO-1). Without a process group the same code runs without
collectives. Inputs and Work handles of asynchronous collectives are held until waited for.
`state_dict` gathers the state of all matrices on every rank: any number of ranks can load it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .buckets import Bucket, even_parts, owners_by_cost
from .checks import check_names, check_values
from .collectives import all_gather, grouped
from .gather import gather
from .reducer import Reducer
from .replay import Replay

# What a parameter group may carry besides hyperparameters; the last two are torch's.
TAGS = {"params", "name", "neuron_axis", "param_names", "initial_lr"}
# Of fp32 gradients stacked and stepped at a time: half of the largest bucket of the 124M model, so
# that a step needs little beyond it and batched products still fill the device (issue 4). Tall and
# square parts side by side, on two streams, gained nothing on an H100: kernels slowed each other.
# Of larger models an eighth of the largest bucket: each part is recorded, which takes time.
PART_BYTES, PARTS = 60 * 2**20, 8


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
        reduce_dtype: in which gradients travel and are summed; None: their own. torch.bfloat16
            halves the bytes and rounds every partial sum to 8 bits.
        compile: compile the update of each bucket; None: on CUDA, where it is worth it.
        hyperparameters: as in `defaults` of the class; an unknown one raises ValueError.
    """

    defaults = dict(lr=0.02, weight_decay=0.0, momentum=0.95)
    choices: dict = {}  # hyperparameter: the values that it may have
    least: dict = {}  # hyperparameter: its least value, where that is not 0
    worth_compiling = True  # False where unrolled loops would compile for minutes

    def __init__(
        self,
        params,
        *,
        reduce: bool = True,
        reduce_dtype: torch.dtype | None = None,
        compile: bool | None = None,
        **hyperparameters,
    ) -> None:
        self._buckets: list[Bucket] = []
        self._reducer = Reducer([], reduce_dtype)
        self._known = {**type(self).defaults}
        check_names(type(self), hyperparameters)
        self.reduce, self.reduce_dtype = reduce, reduce_dtype
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
        """Direction of a stack: grad (k, m, n) -> (k, m, n); `grad` is never changed.

        `state` may be changed, in place: its tensors are views of the state of a larger stack.
        """
        raise NotImplementedError

    def scale(self, direction: Tensor, weight: Tensor, group: dict) -> float | Tensor:
        """Factor of the direction, broadcast against (k, m, n)."""
        return max(1.0, weight.size(-2) / weight.size(-1)) ** 0.5

    def decay(self, weight: Tensor, direction: Tensor, group: dict) -> Tensor:
        """The weights (k, m, n) after decoupled decay."""
        return weight * (1 - group["lr"] * group["weight_decay"])

    def init_state(self, grad: Tensor) -> dict[str, Tensor]:
        """State of a stack before its first step; leading size k, as in `grad` (k, m, n), zeros."""
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
        if self._reduces:
            self._reducer.launch_rest()
        gathers = []
        for bucket in self._buckets:
            bucket.hold_weights()
            self._advance(bucket)
            if self.world_size > 1:
                mine = bucket.weights[self.rank]
                gathers.append((all_gather(bucket.weights, mine), mine))
        for work, _held in gathers:
            work.wait()
        self._reducer.clear()
        torch.autograd.graph.increment_version(self._parameters())  # autograd sees what was written

    def before_last_backward(self) -> None:
        """Optional, before a step's last backward(): reductions then start while it runs.

        All ranks must call it for the same steps and use their parameters in the same order.
        """
        if self._reduces:
            self._reducer.expect()

    def traffic(self) -> dict[str, int]:
        """Bytes that each rank sends in a step, padding included: to sum gradients, and to gather.

        Of N ranks, (N - 1) / N of all matrices twice, as rings and direct exchanges both do it.
        """
        found = {"reduce": 0, "gather": 0}
        for bucket in self._buckets:
            like, ranks = bucket.params[0], self.world_size
            numbers = (ranks - 1) * bucket.slots * like.numel()
            found["reduce"] += numbers * (self.reduce_dtype or like.dtype).itemsize * self.reduce
            found["gather"] += numbers * like.dtype.itemsize
        return found

    @property
    def _reduces(self) -> bool:
        return self.reduce and self.world_size > 1

    def reset(self) -> None:
        """Forgets all state, as if newly built; compiled code and recorded graphs are kept."""
        self._reducer.clear()
        for bucket in self._buckets:
            bucket.reset()

    def _advance(self, bucket: Bucket) -> None:
        """Steps the matrices that this rank owns, in parts, last layers first: so they arrive."""
        bucket.state = bucket.state or self._new_state(bucket)
        hyperparameters = self._hyperparameters(bucket)
        for part in self._parts(bucket)[::-1]:
            self._advance_part(bucket, slice(*part), hyperparameters)
        if self._reduces:
            self._reducer.wait(bucket)
            bucket.received = None

    def _parts(self, bucket: Bucket) -> list[tuple[int, int]]:
        each = bucket.params[0].numel() * bucket.wide.itemsize
        largest = max(b.params[0].numel() * b.wide.itemsize * len(b.params) for b in self._buckets)
        limit = max(PART_BYTES, largest // (PARTS * self.world_size))
        return even_parts(len(bucket.owned[self.rank]), each, limit)

    def _advance_part(self, bucket: Bucket, part: slice, hyperparameters: dict) -> None:
        """Steps some of the owned matrices; what it stacks makes room for the next."""
        state = {key: value[part] for key, value in bucket.state.items()}
        given, grads, maths = dict(state), self._gradients(bucket, part), self._maths
        if self._graphs(bucket):
            maths = bucket.replays.setdefault(part.start, Replay(maths))
        else:
            grads = (grads if self._reduces else torch.stack(grads)).to(bucket.wide)
        inputs = bucket.weights[self.rank, part], grads, state, hyperparameters
        if self.compiled:
            with torch._dynamo.config.patch(recompile_limit=64):  # one for each shape, 8 by default
                maths(*inputs)
        else:
            maths(*inputs)
        kept = state.keys() == given.keys() and all(state[key] is given[key] for key in given)
        assert kept, f"{type(self).__name__}.update must change its state in place"

    def _graphs(self, bucket: Bucket) -> bool:
        """Whether its steps are replayed as CUDA graphs: then what they change stays in place."""
        return self.compiled and bucket.params[0].is_cuda

    def _gradients(self, bucket: Bucket, part: slice) -> Tensor | list[Tensor]:
        """Of a part of the owned matrices, k of (m, n): one tensor where they were summed here."""
        if self._reduces:
            self._reducer.wait(bucket, part.start)
            return bucket.received[part]  # new in each step: graphs read it as if it were p.grad
        return [bucket.params[i].grad for i in bucket.owned[self.rank][part]]

    def _new_state(self, bucket: Bucket) -> dict[str, Tensor]:
        like = bucket.params[0].new_zeros(1, *bucket.params[0].shape, dtype=bucket.wide)
        return bucket.filled(self.init_state(like), len(bucket.owned[self.rank]))

    def _step_weights(
        self,
        weight: Tensor,
        grad: Tensor,
        state: dict,
        group: dict,
        kind: torch.dtype | None = None,
    ) -> None:
        if kind is not None:  # recorded: `grad` has the addresses of gradients of this type
            grad = gather(grad, kind, weight)
        direction = self.update(grad, state, group).to(grad.dtype)
        wide = weight.to(direction.dtype)  # decay of a bfloat16 weight would be rounded away
        direction = direction * self.scale(direction, wide, group)
        weight.copy_(self.decay(wide, direction, group) - group["lr"] * direction)

    def _hyperparameters(self, bucket: Bucket) -> dict:
        """As the maths sees them; compiled, as 0-D tensors: then a new value recompiles nothing."""
        group = bucket.group
        chosen = {k: group[k] for k in (*self._known, "neuron_axis") if k in group}
        if not self.compiled:
            return chosen
        numbers = [k for k, default in self._known.items() if isinstance(default, float)]
        return chosen | bucket.numbers.of(chosen, numbers, bucket.params[0].device)

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
            check_values(type(self), group | saved)  # of all groups, before anything changes
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        self.deal()
        order = {p: i for i, p in enumerate(self._parameters())}
        for bucket in self._buckets if state else ():
            owned = [state[order[bucket.params[i]]] for i in bucket.owned[self.rank]]
            bucket.state = self._new_state(bucket)
            for key, stack in bucket.state.items():
                for place, saved in zip(stack, owned, strict=True):
                    place.copy_(saved[key])

    def __reduce_ex__(self, protocol) -> None:
        raise TypeError("an optimizer is not copied: build a new one and load state_dict() into it")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # ---- what may come in -------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        check_names(type(self), param_group.keys() - TAGS)
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
        buckets: list[Bucket] = []
        for group in self.param_groups:
            check_values(type(self), group)
            by_kind: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.ndim != 2 or p.numel() == 0:
                    raise ValueError(
                        f"{type(self).__name__} takes matrices, found a parameter of shape "
                        f"{tuple(p.shape)}: give it to torch.optim.AdamW instead"
                    )
                by_kind.setdefault((p.shape, p.dtype, p.device), []).append(p)
            buckets += [Bucket(group, params) for params in by_kind.values()]
        costs = [self.cost(p.shape, b.group) for b in buckets for p in b.params]
        owners = iter(owners_by_cost(costs, self.world_size))
        for bucket in buckets:
            bucket.owned = [[] for _ in range(self.world_size)]
            for i in range(len(bucket.params)):
                bucket.owned[next(owners)].append(i)
        self.reset()
        same = {bucket: old for bucket in buckets for old in self._buckets if old.deals_as(bucket)}
        self._buckets = [same.get(bucket, bucket) for bucket in buckets]
        self._reducer = Reducer(self._buckets, self.reduce_dtype)

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
