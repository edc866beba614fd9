"""The state of a slot, where torch looks for it: opt.state, state_dict() and load_state_dict().

Each rank holds the state of the matrices that it owns, in stacks. `opt.state[p]` has views of them
for these parameters, and empty tensors for those of other ranks, so that every rank knows the
names. `state_dict` gathers all of it, so that any number of ranks can load it.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .buckets import Bucket
from .checks import check_values, plain
from .ranks import Gathering

State = dict[str, Tensor]


def saved_value(value: object) -> object:
    """Return a setting of a group as plain types, without ties to the group."""
    if isinstance(value, torch.dtype):
        return str(value)
    return value.detach().clone() if isinstance(value, Tensor) else plain(value)


def loaded_value(value: object, default: object) -> object:
    """Return a setting from a saved group. Types are names; before 0.2 they were torch's own."""
    if isinstance(default, torch.dtype) and isinstance(value, str):
        return getattr(torch, value.removeprefix("torch."), value)
    return value.detach().clone() if isinstance(value, Tensor) else value


class DealtState(torch.optim.Optimizer):
    """The half of MatrixOptimizer that holds, saves and loads state."""

    _buckets: list[Bucket]
    _gathering: Gathering | None = None  # with several ranks
    _known: dict  # hyperparameters and their defaults
    _shown = False  # whoever has seen opt.state may change it
    rank: int
    world_size: int
    deal: Callable[[], None]
    init_state: Callable[[Tensor], State]

    @property
    def state(self) -> dict[Tensor, State]:
        """Return the state by parameter. It is made here if there was no step.

        What is put into it, or removed from it, is taken up by the next step on this rank, the
        owner: a removed state begins anew.
        """
        for bucket in getattr(self, "_buckets", ()):
            if not bucket.state:
                self._begin(bucket)
        self._shown = True
        return self._state

    @state.setter
    def state(self, value: dict) -> None:
        self._state = defaultdict(dict, value)
        self._shown = bool(getattr(self, "_buckets", ()))  # torch sets it before there are any

    def _empty_state(self, bucket: Bucket) -> State:
        """Return the state of one matrix before its first step, (1, ...)."""
        m, n = bucket.matrix
        return self.init_state(bucket.params[0].new_zeros(1, m, n, dtype=bucket.wide))

    def _begin(self, bucket: Bucket) -> None:
        """Make the state of a bucket, and show it in opt.state."""
        one, mine = self._empty_state(bucket), bucket.owned[self.rank]
        bucket.state = bucket.filled(one, len(mine) * bucket.each)
        for p in bucket.params:
            self._state[p] = {key: like.new_empty(0) for key, like in one.items()}
        views = {key: bucket.apart(stack, len(mine)) for key, stack in bucket.state.items()}
        bucket.views = [{key: views[key][s] for key in views} for s in range(len(mine))]
        bucket.at = [{key: view.data_ptr() for key, view in some.items()} for some in bucket.views]
        for i, some in zip(mine, bucket.views, strict=True):
            self._state[bucket.params[i]] = dict(some)

    def _take_state(self, bucket: Bucket) -> None:
        """Take over what was changed in opt.state by hand, moved elsewhere or removed."""
        if not self._shown:
            return
        for slot, i in enumerate(bucket.owned[self.rank]):
            views, at = bucket.views[slot], bucket.at[slot]
            held = self._state.get(bucket.params[i]) or {}
            same = held.keys() == views.keys() and all(held[k] is v for k, v in views.items())
            if same and all(view.data_ptr() == at[key] for key, view in views.items()):
                continue
            shapes = [{k: tuple(v.shape) for k, v in some.items()} for some in (held, views)]
            if held and shapes[0] != shapes[1]:
                raise ValueError(
                    f"opt.state of parameter {i} of shape {tuple(bucket.params[i].shape)} has "
                    f"shapes {shapes[0]}, expected {shapes[1]}: remove it or mend it"
                )
            values = held or bucket.of_one(self._empty_state(bucket))
            for key, stack in bucket.state.items():
                views[key] = bucket.apart(stack, len(bucket.owned[self.rank]))[slot]
                views[key].copy_(values[key])
            self._state[bucket.params[i]] = dict(views)

    def _gathered(self) -> dict[Tensor, State]:
        """Return copies of the state of all parameters, from their owners."""
        found: dict[Tensor, State] = {}
        for bucket in self._buckets:
            if bucket.state:
                self._take_state(bucket)
            for key, mine in bucket.state.items():
                for owner, indices in enumerate(bucket.owned):
                    shape = (len(indices) * bucket.each, *mine.shape[1:])
                    stack = mine if owner == self.rank else mine.new_empty(shape)
                    if self.world_size > 1 and indices:
                        dist.broadcast(stack, group=self.process_group, group_src=owner)
                    for i, value in zip(indices, bucket.apart(stack, len(indices)), strict=True):
                        found.setdefault(bucket.params[i], {})[key] = value.clone()
        return found

    def _put(self, state: dict[Tensor, State]) -> None:
        """Begin anew with these values; each rank keeps the matrices that it owns."""
        for bucket in self._buckets:
            self._begin(bucket)
            for i, views in zip(bucket.owned[self.rank], bucket.views, strict=True):
                for key, saved in state.get(bucket.params[i], {}).items():
                    views[key].copy_(saved)

    def state_dict(self) -> dict:
        """Return {"state": {index: {key: tensor}}, "param_groups"}, as torch's do.

        Every rank must call it, and gets the state of all matrices from their owners. Indices
        count parameters in the order of the groups. Before the first step "state" is empty.
        Raises ValueError after some seconds if other ranks do not call it.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        params = self._parameters()
        if self._gathering is not None:
            if params and params[0].is_cuda:
                torch.cuda.synchronize(params[0].device)  # ranks meet in the step before
            self._gathering.wait("state_dict()")
        order = {p: i for i, p in enumerate(params)}
        state = {order[p]: values for p, values in self._gathered().items()}
        groups = []
        for group in self.param_groups:
            saved = {k: saved_value(v) for k, v in group.items() if k != "params"}
            groups.append(saved | {"params": [order[p] for p in group["params"]]})
        found = {"state": dict(sorted(state.items())), "param_groups": groups}
        for hook in self._optimizer_state_dict_post_hooks.values():
            found = changed if (changed := hook(self, found)) is not None else found
        return found

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state_dict of any number of ranks; each rank keeps the matrices that it owns.

        A state of another optimizer or model raises ValueError and changes nothing. A frozen
        parameter may have no saved state: it begins anew.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups, state = state_dict["param_groups"], state_dict["state"]
        found, expected = ([len(g["params"]) for g in some] for some in (groups, self.param_groups))
        if found != expected:
            raise ValueError(f"the state has groups of {found} parameters, expected {expected}")
        names = [name for group in groups for name in group["params"]]  # numbers, or names
        loaded = dict(zip(self._parameters(), (state.get(name, {}) for name in names), strict=True))
        if state:
            self._check_loaded(loaded)
        merged = []
        for group, saved in zip(self.param_groups, groups, strict=True):
            new = {k: loaded_value(v, self._known.get(k)) for k, v in saved.items()}
            merged.append({k: v for k, v in new.items() if k != "params"})
            check_values(type(self), group | merged[-1])  # all groups, before anything changes
        for group, new in zip(self.param_groups, merged, strict=True):
            group.update(new)
        self.reset()
        self.deal()
        if state:
            self._put(loaded)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_loaded(self, loaded: dict[Tensor, State]) -> None:
        """Raise ValueError unless all states have this optimizer's names and shapes, or none."""
        bucket_of = {p: bucket for bucket in self._buckets for p in bucket.params}
        for i, (p, state) in enumerate(loaded.items()):
            bucket = bucket_of[p]
            one = self._empty_state(bucket)
            views = {
                k: bucket.apart(v.expand(bucket.each, *v.shape[1:]), 1) for k, v in one.items()
            }
            expected = {key: tuple(value.shape) for key, (value,) in views.items()}
            found = {key: tuple(value.shape) for key, value in state.items()}
            if found != expected and (state or p.requires_grad):
                raise ValueError(
                    f"the saved state of parameter {i} has shapes {found}, expected {expected}: it "
                    "comes from another optimizer or model"
                )

    def reset(self) -> None:
        """Forget all state, as if newly built; compiled code and recorded graphs are kept."""
        self._state = defaultdict(dict)
        for bucket in self._buckets:
            bucket.reset()

    def __reduce_ex__(self, protocol) -> None:
        raise TypeError("an optimizer is not copied: build a new one and load state_dict() into it")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
