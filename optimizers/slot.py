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

Parameters stay where they are: a part is stepped in a stack of its own, and the results are copied
back. With `share_storage` the parameters of a bucket become views of one buffer, with each rank's
matrices side by side, so that updates and gathers happen in place; a parameter that was moved
elsewhere (p.data = ...) is brought back. Compiled on a GPU, each part is replayed as a CUDA graph
(replay.py): its stacks and its state stay in place, too.

Momentum lives on the owner only (ZeRO-1); state.py saves and loads it. Without a process group the
same code runs without collectives.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .averages import Around
from .buckets import Bucket, even_parts, owners_by_cost
from .checks import check_group_names, check_names, check_values, matrix_shape, plain
from .lowbits import narrow, widened
from .ranks import Gathering, check_alike, check_same_values, ranks_of
from .reducer import Reducer, all_gather
from .replay import Replay, Scalars
from .state import DealtState, State
from .technique import Schedule, Technique

# fp32 gradients that are staged and stepped at a time: half of the 124M model's largest bucket, so
# that a step needs little memory beyond it and batched matmuls still fill the GPU. Tall and square
# parts on two streams gained nothing on an H100: their kernels slowed each other down. In larger
# models a part is an eighth of the largest bucket, as recording each part takes time.
PART_BYTES, PARTS = 60 * 2**20, 8


class MatrixOptimizer(DealtState):
    """Base of all matrix optimizers: a list of techniques (technique.py), stepped on all ranks.

    A subclass lists `techniques` and may set `defaults`, which override theirs; `around` lists
    techniques on all weights of a model, `schedules` functions (step, steps) -> factor of a
    hyperparameter (both need whole.py's ModelOptimizer). Instead of techniques that act before the
    step it may define `update` and `init_state`.

    Args:
        params: parameters (m, n), or stacks of matrices (e, m, n), or groups of them (dicts with
            "params", optional "name" and "neuron_axis", and any hyperparameter of `defaults`);
            also (name, parameter) pairs.
        lr: the learning rate; None: the default.
        reduce: True: gradients differ by rank and the slot sums them. False: they are already
            reduced (DDP), the slot only shares the work.
        reduce_dtype: the type in which gradients travel and are summed; None: their own.
            torch.bfloat16 halves the bytes and rounds every partial sum to 8 bits.
        compile: compile the update of each bucket; None: on CUDA, where it pays.
        share_storage: make equal shapes views of one buffer. This saves copies, but tools that
            save one tensor for each storage (safetensors) lose weights.
        process_group: the ranks that hold these parameters; None: all.
        extra_bits: keep the 16 bits that bfloat16 weights lack as state, so that small steps add
            up as in float32.
        convolutions: take parameters (out, in, ...) as matrices (out, in x ...); also in groups.
        hyperparameters: as in `defaults` of the class; an unknown one raises ValueError.

    Every rank must build it with the same parameters, in the same order, and the same settings; a
    difference raises ValueError on every rank, as do weights that differ in the first step.
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
        lr: float | Tensor | None = None,
        *,
        reduce: bool = True,
        reduce_dtype: torch.dtype | None = None,
        compile: bool | None = None,
        share_storage: bool = False,
        process_group: dist.ProcessGroup | None = None,
        extra_bits: bool = False,
        convolutions: bool = False,
        **hyperparameters,
    ) -> None:
        check_names(type(self), hyperparameters)
        self._known = {**type(self).defaults}
        given = {**self._known, **hyperparameters} | ({} if lr is None else {"lr": lr})
        self.reduce, self.reduce_dtype = reduce, reduce_dtype
        self.share_storage, self.extra_bits = share_storage, extra_bits
        self.process_group = process_group
        self.world_size, self.rank = ranks_of(process_group)
        self._buckets: list[Bucket] = []
        self._dealt: list[tuple[dict, list[Tensor]]] = []  # groups as deal() saw them
        self._compared = False  # with other ranks, since the last deal
        self._reducer = Reducer([], reduce_dtype, (), process_group)
        self._others: list[Tensor] | None = None  # of another optimizer, in a whole model
        self._staging: dict[tuple, Tensor] = {}  # by use, type and device: stacks of one part
        self._build(params, given | ({"convolutions": True} if convolutions else {}))
        on_cuda = any(p.is_cuda for p in self._parameters())
        pays = on_cuda and all(technique.worth_compiling for technique in self.techniques)
        self.compiled = pays if compile is None else compile
        self._maths = self._step_weights
        if self.compiled:
            self._maths = torch.compile(self._step_weights, dynamic=False, fullgraph=True)

    def _build(self, params, defaults: dict) -> None:
        """Deal the parameters, and compare them with other ranks: all raise, or none."""
        wrong = None
        try:
            params = params if isinstance(params, Tensor) else list(params) or [{"params": []}]
            super().__init__(params, defaults)
        except (TypeError, ValueError) as error:
            wrong = error
        if self.world_size > 1:
            self._compare([f"an error: {wrong}"] if wrong else self._described())
            self._gathering = Gathering(self.process_group)
        if wrong:
            raise wrong

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
        low_bits = state.get("low_bits")
        # bfloat16 would round the decay away
        W = weight.to(grad.dtype) if low_bits is None else widened(weight, low_bits)
        U = self.update(grad, W, state, group).to(grad.dtype)
        V = W
        for technique in self.techniques:
            V = technique.decay(V, U, state, group)
        V = V - group["lr"] * U
        for technique in self.techniques:
            V = technique.after(V, W, U, state, group)
        if low_bits is None:
            weight.copy_(V)
        else:
            narrow(V, weight, low_bits)

    # ---- the step ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step all parameters that have a gradient on any rank; return the closure's loss.

        The others keep weights and state. What changed in `param_groups` is taken up.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        self._check_gradients()
        self._unscale()
        if self._reduces:
            self._reducer.launch_rest()
        try:
            if self.world_size > 1 and not self._compared:
                self._compare(self._described(), values=True)
            if not self._overflows():
                self._step_all()
        finally:
            self._reducer.clear()
        return loss

    def _step_all(self) -> None:
        gathers = []
        for bucket in self._buckets:
            if self.share_storage:
                bucket.hold_weights()
            self._advance(bucket)
            if self.world_size > 1:
                shared = self.share_storage
                mine = bucket.weights[self.rank] if shared else bucket.send_weights(self.rank)
                work = all_gather(bucket.weights, mine, self.process_group)
                gathers.append((work, mine, bucket))
        for work, _held, bucket in gathers:
            work.wait()
            if not self.share_storage:
                bucket.receive_weights(self.rank)
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
        in which a forward pass uses them. From then on all parameters must have gradients.
        """
        self._others = others
        self._reducer = Reducer(self._buckets, self.reduce_dtype, others, self.process_group)

    def summed_gradients(self) -> list[list[Tensor]]:
        """Return the summed gradients of the matrices that this rank owns, by group.

        Every rank must call it, after the last backward pass; it waits for the sums, those of
        reduce_also() too. The next step uses what is then written into these tensors.
        """
        self._check_gradients()
        if self._reduces:
            self._reducer.launch_rest()
            self._reducer.wait_all()
        found: dict[int, list[Tensor]] = {id(group): [] for group in self.param_groups}
        for bucket in self._buckets:
            mine = bucket.owned[self.rank]
            params = [bucket.params[i] for i in mine]
            grads, _ = self._gradients(bucket, slice(0, len(mine)), params)
            for i, grad in zip(mine, grads, strict=True):
                found[id(bucket.groups[i])].append(grad)
        return list(found.values())

    def kernel(self) -> str:
        """Return how the maths runs: eager or compiled, and which kernels, for the log."""
        parts = ["compiled" if self.compiled else "eager"]
        for bucket in self._buckets:
            parts += ["CUDA graphs"] * self._records(bucket)
            group = self._group(bucket.groups[0])
            parts += [t.kernel(bucket.params[0], group) for t in self.techniques]
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

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True if torch's GradScaler leaves it to step() to skip: all ranks must, or none."""
        return self._reduces

    def _unscale(self) -> None:
        scale, grads = getattr(self, "grad_scale", None), [p.grad for p in self._parameters()]
        if scale is not None and (grads := [grad for grad in grads if grad is not None]):
            torch._foreach_div_(grads, scale.to(grads[0].device))

    def _overflows(self) -> bool:
        """True if GradScaler found an overflow on any rank. Only then it waits for the device."""
        if (found := getattr(self, "found_inf", None)) is None:
            return False
        found = torch.as_tensor(found, dtype=torch.float32, device=self._parameters()[0].device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.process_group)
        return bool(found)

    def _advance(self, bucket: Bucket) -> None:
        """Step the matrices that this rank owns, last layers first: these arrive first."""
        if bucket.state:
            self._take_state(bucket)
        else:
            self._begin(bucket)
        for part in self._parts(bucket)[::-1]:
            self._advance_part(bucket, slice(*part))
        if self._reduces:
            self._reducer.wait(bucket)
            bucket.received = None

    def _parts(self, bucket: Bucket) -> list[tuple[int, int]]:
        """Return [first, last) of the slots of this rank that are stepped together."""
        item_bytes = bucket.params[0].numel() * bucket.wide.itemsize
        largest = max(b.params[0].numel() * b.wide.itemsize * len(b.params) for b in self._buckets)
        limit = max(PART_BYTES, largest // (PARTS * self.world_size))
        return [
            (start + first, start + last)
            for start, end in bucket.runs(self.rank)
            for first, last in even_parts(end - start, item_bytes, limit)
        ]

    def _advance_part(self, bucket: Bucket, part: slice) -> None:
        """Step some of the owned parameters. The next part reuses the room of their stacks."""
        mine, e = bucket.owned[self.rank][part], bucket.each
        params, group = [bucket.params[i] for i in mine], bucket.groups[mine[0]]
        grads, absent = self._gradients(bucket, part, params)
        if len(absent) == len(mine):
            return
        state = {key: value[part.start * e : part.stop * e] for key, value in bucket.state.items()}
        given, maths = dict(state), self._maths
        if self._records(bucket):
            maths = bucket.replays.setdefault(part.start, Replay(maths))
        if self.share_storage:
            weights = bucket.weights[self.rank, part]
        else:
            weights = self._stack(bucket, params, bucket.params[0].dtype, "weights")
        stack = self._stack(bucket, grads, bucket.wide, "gradients")
        kept = [t for j in absent for t in (weights[j], *bucket.views[part.start + j].values())]
        copies = [t.clone() for t in kept]
        inputs = [t.view(-1, *bucket.matrix) for t in (weights, stack)]
        self._call(maths, *inputs, state, self._hyperparameters(bucket, group))
        same = state.keys() == given.keys() and all(state[key] is given[key] for key in given)
        assert same, f"{type(self).__name__} must change its state in place"
        if kept:
            torch._foreach_copy_(kept, copies)
        if not self.share_storage:
            torch._foreach_copy_(params, list(weights))

    def _call(self, maths: Callable, *inputs: Tensor | dict) -> None:
        if self.compiled:
            with torch._dynamo.config.patch(recompile_limit=64):  # one for each shape, 8 by default
                maths(*inputs)
        else:
            maths(*inputs)

    def _records(self, bucket: Bucket) -> bool:
        """True if its steps are replayed as CUDA graphs, which change tensors in place."""
        return self.compiled and bucket.params[0].is_cuda

    def _stack(
        self, bucket: Bucket, values: Tensor | list[Tensor], dtype: torch.dtype, use: str
    ) -> Tensor:
        """Return values of a part as one tensor: for graphs, at the same address in each step."""
        if not self._records(bucket):
            values = values if isinstance(values, Tensor) else torch.stack(values).contiguous()
            return values.to(dtype)
        like, place = bucket.params[0], (use, dtype, bucket.params[0].device)
        if place not in self._staging:
            sizes = [
                (last - first) * b.params[0].numel()
                for b in self._buckets
                if (bucket.wide, like.device) == (b.wide, b.params[0].device)
                for first, last in self._parts(b)
            ]
            self._staging[place] = torch.empty(max(sizes), dtype=dtype, device=like.device)
        room = self._staging[place][: len(values) * like.numel()].view(len(values), *like.shape)
        torch._foreach_copy_(list(room), list(values))
        return room

    def _gradients(
        self, bucket: Bucket, part: slice, params: list[Tensor]
    ) -> tuple[Tensor | list[Tensor], list[int]]:
        """Return the gradients of a part, a tensor if they were summed, and which are absent.

        A gradient is absent if this rank has none and the others have none or 0, which is found
        out only then, as it waits for the device.
        """
        missing = [j for j, p in enumerate(params) if p.grad is None]
        if not self._reduces:
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in params], missing
        self._reducer.wait(bucket, part.start)
        received = bucket.received[part]
        return received, [j for j in missing if not received[j].any()]

    def _empty_state(self, bucket: Bucket) -> State:
        one = super()._empty_state(bucket)
        if self.extra_bits and bucket.params[0].dtype == torch.bfloat16:
            one["low_bits"] = bucket.params[0].new_zeros(1, *bucket.matrix, dtype=torch.int16)
        return one

    def _group(self, group: dict) -> dict:
        """Return the hyperparameters of a group, numbers as Python's."""
        return {k: plain(group[k]) for k in (*self._known, "neuron_axis") if k in group}

    def _hyperparameters(self, bucket: Bucket, group: dict) -> dict:
        """Return them as the maths sees them: compiled, floats are 0-D tensors, so that a new
        value recompiles nothing."""
        chosen = self._group(group)
        if not self.compiled:
            return chosen
        floats = [k for k, default in self._known.items() if isinstance(default, float)]
        scalars = bucket.scalars.setdefault(id(group), Scalars())
        return chosen | scalars.hold(chosen, floats, bucket.params[0].device)

    # ---- parameters and their owners ----------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, also between steps; the state of the others is kept. All ranks must."""
        check_group_names(type(self), param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key, value in group.items():  # a tensor of several groups would be changed for each
            if isinstance(value, Tensor) and any(
                g.get(key) is value for g in self.param_groups[:-1]
            ):
                group[key] = value.clone()
        try:
            self.deal()
        except ValueError:
            self.param_groups.pop()  # the others go on as they were
            raise

    def deal(self) -> None:
        """Deal all parameters to ranks anew; their state moves along. All ranks must call it."""
        buckets: dict[tuple, Bucket] = {}
        for group in self.param_groups:
            check_values(type(self), group)
            for p in group["params"]:
                matrix = matrix_shape(type(self), p, group.get("convolutions", False))
                bucket = buckets.setdefault((p.shape, p.dtype, p.device, matrix), Bucket(matrix))
                bucket.params.append(p)
                bucket.groups.append(group)
        if len(params := self._parameters()) > len(set(params)):
            raise ValueError(
                f"{type(self).__name__} found a parameter twice: list each once, tied ones too"
            )
        self._assign_owners(new := list(buckets.values()))
        held = self._gathered()
        self.reset()
        same = {bucket: old for bucket in new for old in self._buckets if old.deals_as(bucket)}
        self._reducer.clear()
        self._buckets = [same.get(bucket, bucket) for bucket in new]
        if len(same) < len(new):  # otherwise recorded graphs stay good
            self._staging = {}
        self._reducer = Reducer(
            self._buckets, self.reduce_dtype, self._others or (), self.process_group
        )
        self._dealt = [(group, list(group["params"])) for group in self.param_groups]
        self._compared = False
        if held:
            self._put(held)

    def _assign_owners(self, buckets: list[Bucket]) -> None:
        costs, kinds = [], []
        for number, bucket in enumerate(buckets):
            shape = torch.Size(bucket.matrix)
            costs += [bucket.each * self.cost(shape, group) for group in bucket.groups]
            kinds += [number] * len(bucket.params)
            bucket.owned = [[] for _ in range(self.world_size)]
        owners = iter(owners_by_cost(costs, self.world_size, kinds))
        for bucket in buckets:
            for i in range(len(bucket.params)):
                bucket.owned[next(owners)].append(i)

    def _described(self) -> list[str]:
        """Return what must be the same on all ranks, in sentences."""
        lines = [f"{type(self).__name__} with reduce={self.reduce} in {self.reduce_dtype}"]
        for number, group in enumerate(self.param_groups):
            chosen = self._group(group) | {"name": group.get("name")}
            values = {k: float(v) if isinstance(v, Tensor) else v for k, v in chosen.items()}
            lines.append(f"group {number} with {values}")
        found = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names", [""] * len(group["params"]))
            for p, name in zip(group["params"], names, strict=True):
                what = f"{name} {tuple(p.shape)} {p.dtype} in group {number}".lstrip()
                lines.append(f"parameter {found}, {what}")
                found += 1
        return lines

    def _compare(self, lines: list[str], values: bool = False) -> None:
        """Raise ValueError on all ranks if these lines differ, or the weights."""
        advice = "build it from the same parameters in the same order and with the same settings "
        advice += "on all ranks, or pass process_group= of the ranks that share them"
        check_alike(lines, self.process_group, advice)
        if values:
            check_same_values(self._parameters(), self.process_group, grads=not self.reduce)
            self._compared = True

    def _check_groups(self) -> None:
        """Deal anew if groups were changed by hand, as wrappers do."""
        if (size := ranks_of(self.process_group)[0]) != self.world_size:
            raise ValueError(f"{size} ranks, {self.world_size} when this was built: build it again")
        now = self.param_groups
        same = len(now) == len(self._dealt) and all(
            group is old
            and len(group["params"]) == len(params)
            and all(p is q for p, q in zip(group["params"], params, strict=True))
            for group, (old, params) in zip(now, self._dealt, strict=True)
        )
        if not same:
            self.deal()

    def _check_gradients(self) -> None:
        whole = [] if self._others is None else self._others + self._parameters()
        for p in whole:
            if p.grad is None:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has no gradient: call backward() "
                    "before step(), or leave unused parameters out"
                )
        for p in self._parameters():
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"{type(self).__name__} takes dense gradients, found one of {p.grad.layout} "
                    f"for {tuple(p.shape)}: set sparse=False in the layer, or use torch.optim"
                    ".SparseAdam"
                )
