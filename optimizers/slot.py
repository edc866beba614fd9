"""The optimizer slot: everything about a matrix optimizer that is not its maths.

A matrix optimizer subclasses `MatrixOptimizer` and lists its techniques, which see stacks of
equal-shaped matrices. The slot buckets parameters by shape, deals whole matrices to ranks by cost
(largest first), sums gradients over ranks, steps the owned matrices and gathers the results.
One step, three loops:

    1. for each piece of a bucket: launch the reduce-scatter of its gradients to their owners;
       before_last_backward() lets that happen during the backward pass
    2. for each bucket: step the owned matrices, each part once its gradients have arrived, and
       launch the all-gather of the weights
    3. for each bucket: wait for it

The parameters of a bucket are views of one buffer, with each rank's matrices side by side: updates
and gathers happen in place. A parameter that was moved elsewhere (p.data = ...) is brought back.
Compiled on a GPU, each part is replayed as a CUDA graph (replay.py): its state stays in place, too.

Momentum lives on the owner only (ZeRO-1). Without a process group the same code runs without
collectives. `state_dict` gathers the state of all matrices on every rank, so that any number of
ranks can load it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .averages import Around
from .buckets import Bucket, even_parts, owners_by_cost
from .checks import check_names, check_values
from .reducer import Reducer, all_gather, grouped
from .replay import Replay
from .schedules import Schedule
from .technique import Technique

# Keys of a parameter group besides hyperparameters; the last two are torch's.
TAGS = {"params", "name", "neuron_axis", "param_names", "initial_lr"}
# fp32 gradients that are staged and stepped at a time: half of the 124M model's largest bucket, so
# that a step needs little memory beyond it and batched matmuls still fill the GPU. Tall and square
# parts on two streams gained nothing on an H100: their kernels slowed each other down. In larger
# models a part is an eighth of the largest bucket, as recording each part takes time.
PART_BYTES, PARTS = 60 * 2**20, 8


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of all matrix optimizers: a list of techniques (technique.py), stepped on all ranks.

    A subclass lists `techniques` and may set `defaults`, which override theirs; `around` lists
    techniques on all weights of a model, `schedules` functions (step, steps) -> factor of a
    hyperparameter (both need whole.py's ModelOptimizer). Instead of techniques that act before the
    step it may define `update` and `init_state`.

    Args:
        params: 2-D parameters, or groups of them (dicts with "params", optional "name" and
            "neuron_axis", and any hyperparameter of `defaults`); also (name, parameter) pairs.
        reduce: True: gradients differ by rank and the slot sums them. False: they are already
            reduced (DDP), the slot only shares the work.
        reduce_dtype: the type in which gradients travel and are summed; None: their own.
            torch.bfloat16 halves the bytes and rounds every partial sum to 8 bits.
        compile: compile the update of each bucket; None: on CUDA, where it pays.
        hyperparameters: as in `defaults` of the class; an unknown one raises ValueError.
    """

    techniques: tuple[Technique, ...] = ()
    around: tuple[Around, ...] = ()
    schedules: dict[str, Schedule] = {}
    defaults: dict = dict(lr=0.02)  # subclasses: those of the techniques, then their own
    choices: dict = {}  # hyperparameter: the values that it may have
    least: dict = {}  # hyperparameter: its least value, where that is not 0

    def __init_subclass__(cls, **keywords) -> None:
        super().__init_subclass__(**keywords)
        for name in ("defaults", "choices", "least"):
            own = getattr(cls, "_own_" + name, {}) | cls.__dict__.get(name, {})
            merged = dict(lr=0.02) if name == "defaults" else {}
            for technique in cls.techniques:
                merged |= getattr(technique, name)
            setattr(cls, "_own_" + name, own)
            setattr(cls, name, merged | own)
        check_names(cls, cls.schedules)

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
        self._reducer, self._others = Reducer([], reduce_dtype), []
        self._staging: dict[tuple, Tensor] = {}  # by type and device: gradients of one part
        self._known = {**type(self).defaults}
        check_names(type(self), hyperparameters)
        self.reduce, self.reduce_dtype = reduce, reduce_dtype
        self.world_size = dist.get_world_size() if grouped() else 1
        self.rank = dist.get_rank() if grouped() else 0
        super().__init__(params, {**self._known, **hyperparameters})
        on_cuda = any(p.is_cuda for p in self._parameters())
        pays = on_cuda and all(technique.worth_compiling for technique in self.techniques)
        self.compiled = pays if compile is None else compile
        self._maths = self._step_weights
        if self.compiled:
            self._maths = torch.compile(self._step_weights, dynamic=False, fullgraph=True)

    # ---- the seam: the maths ----------------------------------------------------------------

    def update(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        """Return the update of a stack from its gradients U and weights W, all (k, m, n).

        The caller subtracts lr times the result. Change `state` in place only: its tensors are
        views of the state of a larger stack.
        """
        for technique in self.techniques:
            U = technique.before(U, W, state, group).to(W.dtype)
        return U

    def init_state(self, grad: Tensor) -> dict[str, Tensor]:
        """Return the state of a stack before its first step, like `grad` of leading size k."""
        state: dict[str, Tensor] = {}
        for technique in self.techniques:
            new = technique.init(grad)
            assert not state.keys() & new.keys(), f"two techniques have a state {sorted(new)}"
            state |= new
        return state

    def cost(self, shape: torch.Size, group: dict) -> float:
        """Return the relative cost of one matrix, by which matrices are dealt to ranks."""
        return shape.numel() + sum(t.cost(shape, group) for t in self.techniques)

    def _step_weights(self, weight: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        W = weight.to(grad.dtype)  # bfloat16 would round the decay away
        U = self.update(grad, W, state, group).to(grad.dtype)
        V = W
        for technique in self.techniques:
            V = technique.decay(V, U, state, group)
        V = V - group["lr"] * U
        for technique in self.techniques:
            V = technique.after(V, W, U, state, group)
        weight.copy_(V)

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
        torch.autograd.graph.increment_version(self._parameters())  # tells autograd of the writes

    def before_last_backward(self) -> None:
        """Let reductions start during the next backward(), which must be the last of a step.

        Optional. All ranks must call it for the same steps and use their parameters in the same
        order.
        """
        if self._reduces:
            self._reducer.expect()

    def reduce_also(self, others: list[Tensor]) -> None:
        """Sum the gradients of these parameters as well, in place, in every step.

        They belong to another optimizer, whose step comes after this one's; list them in the order
        in which a forward pass uses them.
        """
        self._others = others
        self._reducer = Reducer(self._buckets, self.reduce_dtype, others)

    def summed_gradients(self) -> list[list[Tensor]]:
        """Return the summed gradients of the matrices that this rank owns, by group.

        Every rank must call it, after the last backward pass; it waits for the sums, those of
        reduce_also() too. The next step uses what is then written into these tensors.
        """
        self._check_gradients()
        if self._reduces:
            self._reducer.launch_rest()
            self._reducer.wait_all()
        found: list[list[Tensor]] = [[] for _ in self.param_groups]
        for bucket in self._buckets:
            number = [group is bucket.group for group in self.param_groups].index(True)
            found[number] += self._gradients(bucket, slice(0, len(bucket.owned[self.rank])))
        return found

    def kernel(self) -> str:
        """Return how the maths runs: eager or compiled, and which kernels, for the log."""
        parts = ["compiled" if self.compiled else "eager"]
        for bucket in self._buckets:
            parts += ["CUDA graphs"] * self._records(bucket)
            parts += [t.kernel(bucket.params[0], self._group(bucket)) for t in self.techniques]
        return ", ".join(dict.fromkeys(filter(None, parts)))

    def traffic(self) -> dict[str, int]:
        """Return the bytes that each rank sends in a step to sum gradients and to gather weights.

        Padding is included. N ranks send (N - 1) / N of all matrices twice, as rings and direct
        exchanges both do.
        """
        found = {"reduce": 0, "gather": 0}
        for bucket in self._buckets:
            like, ranks = bucket.params[0], self.world_size
            elements = (ranks - 1) * bucket.slots * like.numel()
            found["reduce"] += elements * (self.reduce_dtype or like.dtype).itemsize * self.reduce
            found["gather"] += elements * like.dtype.itemsize
        return found

    @property
    def _reduces(self) -> bool:
        return self.reduce and self.world_size > 1

    def reset(self) -> None:
        """Forget all state, as if newly built; compiled code and recorded graphs are kept."""
        self._reducer.clear()
        for bucket in self._buckets:
            bucket.reset()

    def _advance(self, bucket: Bucket) -> None:
        """Step the matrices that this rank owns, last layers first: these arrive first."""
        bucket.state = bucket.state or self._new_state(bucket)
        hyperparameters = self._hyperparameters(bucket)
        for part in self._parts(bucket)[::-1]:
            self._advance_part(bucket, slice(*part), hyperparameters)
        if self._reduces:
            self._reducer.wait(bucket)
            bucket.received = None

    def _parts(self, bucket: Bucket) -> list[tuple[int, int]]:
        matrix_bytes = bucket.params[0].numel() * bucket.wide.itemsize
        largest = max(b.params[0].numel() * b.wide.itemsize * len(b.params) for b in self._buckets)
        limit = max(PART_BYTES, largest // (PARTS * self.world_size))
        return even_parts(len(bucket.owned[self.rank]), matrix_bytes, limit)

    def _advance_part(self, bucket: Bucket, part: slice, hyperparameters: dict) -> None:
        """Step some of the owned matrices. The next part reuses the room of their gradients."""
        state = {key: value[part] for key, value in bucket.state.items()}
        given, grads, maths = dict(state), self._gradients(bucket, part), self._maths
        if self._records(bucket):
            maths = bucket.replays.setdefault(part.start, Replay(maths))
            stack = self._stage(bucket, len(grads))
            torch._foreach_copy_(list(stack), list(grads))
        else:
            stack = (grads if self._reduces else torch.stack(grads)).to(bucket.wide)
        inputs = bucket.weights[self.rank, part], stack, state, hyperparameters
        if self.compiled:
            with torch._dynamo.config.patch(recompile_limit=64):  # one for each shape, 8 by default
                maths(*inputs)
        else:
            maths(*inputs)
        kept = state.keys() == given.keys() and all(state[key] is given[key] for key in given)
        assert kept, f"{type(self).__name__} must change its state in place"

    def _records(self, bucket: Bucket) -> bool:
        """True if its steps are replayed as CUDA graphs, which change tensors in place."""
        return self.compiled and bucket.params[0].is_cuda

    def _stage(self, bucket: Bucket, count: int) -> Tensor:
        """Return room for the gradients of `count` matrices, at the same address in each step."""
        like, place = bucket.params[0], (bucket.wide, bucket.params[0].device)
        if place not in self._staging:
            sizes = [
                (last - first) * b.params[0].numel()
                for b in self._buckets
                if (b.wide, b.params[0].device) == place
                for first, last in self._parts(b)
            ]
            self._staging[place] = torch.empty(max(sizes), dtype=place[0], device=place[1])
        return self._staging[place][: count * like.numel()].view(count, *like.shape)

    def _gradients(self, bucket: Bucket, part: slice) -> Tensor | list[Tensor]:
        """Return the gradients of a part of the owned matrices: a tensor if they were summed."""
        if self._reduces:
            self._reducer.wait(bucket, part.start)
            return bucket.received[part]
        return [bucket.params[i].grad for i in bucket.owned[self.rank][part]]

    def _new_state(self, bucket: Bucket) -> dict[str, Tensor]:
        like = bucket.params[0].new_zeros(1, *bucket.params[0].shape, dtype=bucket.wide)
        return bucket.filled(self.init_state(like), len(bucket.owned[self.rank]))

    def _group(self, bucket: Bucket) -> dict:
        """Return the bucket's hyperparameters."""
        return {k: bucket.group[k] for k in (*self._known, "neuron_axis") if k in bucket.group}

    def _hyperparameters(self, bucket: Bucket) -> dict:
        """Return them as the maths sees them: compiled, floats are 0-D tensors, so that a new
        value recompiles nothing."""
        chosen = self._group(bucket)
        if not self.compiled:
            return chosen
        floats = [k for k, default in self._known.items() if isinstance(default, float)]
        return chosen | bucket.scalars.hold(chosen, floats, bucket.params[0].device)

    # ---- state, for any number of ranks -------------------------------------------------------

    def state_dict(self) -> dict:
        """Return {"state": {index: {key: tensor}}, "param_groups"}, as torch's do.

        Every rank must call it, and gets the state of all matrices from their owners. Indices
        count parameters in the order of the groups. Before the first step "state" is empty.
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
        """Load a state_dict of any number of ranks; each rank keeps the matrices that it owns."""
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
            check_values(type(self), group | saved)  # all groups, before anything changes
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

    # ---- checked input -------------------------------------------------------------------

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
        """Deal all parameters to ranks, without state; again after hyperparameters changed."""
        buckets: list[Bucket] = []
        for group in self.param_groups:
            check_values(type(self), group)
            alike: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.ndim != 2 or p.numel() == 0:
                    raise ValueError(
                        f"{type(self).__name__} takes matrices, found a parameter of shape "
                        f"{tuple(p.shape)}: give it to torch.optim.AdamW instead"
                    )
                alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
            buckets += [Bucket(group, params) for params in alike.values()]
        costs = [self.cost(p.shape, b.group) for b in buckets for p in b.params]
        owners = iter(owners_by_cost(costs, self.world_size))
        for bucket in buckets:
            bucket.owned = [[] for _ in range(self.world_size)]
            for i in range(len(bucket.params)):
                bucket.owned[next(owners)].append(i)
        self.reset()
        same = {bucket: old for bucket in buckets for old in self._buckets if old.deals_as(bucket)}
        self._buckets = [same.get(bucket, bucket) for bucket in buckets]
        if len(same) < len(buckets):  # otherwise recorded graphs stay good
            self._staging = {}
        self._reducer = Reducer(self._buckets, self.reduce_dtype, self._others)

    def _check_gradients(self) -> None:
        for p in self._others:
            if p.grad is None:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} outside the slot has no gradient: call "
                    "backward() before step(), or leave unused parameters out"
                )
        for bucket in self._buckets:
            for i, p in enumerate(bucket.params):
                if p.grad is None:
                    number = [g is bucket.group for g in self.param_groups].index(True)
                    name = bucket.group.get("name", number)
                    raise ValueError(
                        f"parameter {i} of group {name!r}, {tuple(p.shape)}, has no gradient: "
                        "call backward() before step(), or leave unused parameters out"
                    )
