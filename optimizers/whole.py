"""The optimizer of a whole model: the slot for its matrices, torch's AdamW for everything else.

It owns what happens between the last backward pass of a step and the next forward pass: gradients
are summed over ranks, hyperparameters follow their schedules, weights are stepped, and the
techniques around all weights (averages.py) are called.
"""

import ast
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .averages import Around
from .ranks import grouped
from .slot import MatrixOptimizer
from .technique import Schedule

NO_HYPERPARAMETERS = {"params", "param_names", "name", "initial_lr"}  # keys of a group


class ModelOptimizer:
    """Steps all parameters of a model.

    Args:
        groups: parameter groups in the order in which a forward pass uses them, each with a name;
            those with a neuron_axis hold matrices for the slot, the others go to AdamW.
        name: by which settings address the matrix optimizer, and `matrix`, its class.
        adamw: arguments of torch.optim.AdamW.
        steps: the length of the run, for schedules.
        schedules: hyperparameter -> function (step, steps) -> factor, for all groups that have it;
            the matrix optimizer's own schedules replace and complete them for its groups.
        settings: "where.name=value" each, where `where` is a group or an optimizer's name.
        lr_scale: multiplies all learning rates.
        around: techniques around all weights, besides the matrix optimizer's own.
        clip: the largest norm of all gradients together, to which larger ones are scaled down; 0:
            none.
        loss_scale: gradients are of this times the loss whose gradient norms are clipped and
            measured, as with losses that are summed over tokens.
        dtype: the type of the matrix optimizer's matmuls, if it has that hyperparameter.
        compile: as in MatrixOptimizer.
    """

    def __init__(
        self,
        groups: list[dict],
        name: str,
        matrix: type[MatrixOptimizer],
        adamw: dict,
        steps: int,
        schedules: dict[str, Schedule],
        settings: Iterable[str] = (),
        lr_scale: float = 1.0,
        around: Iterable[Around] = (),
        clip: float = 0.0,
        loss_scale: float = 1.0,
        dtype: torch.dtype = torch.bfloat16,
        compile: bool | None = None,
    ) -> None:
        self.name, self.steps, self.schedules = name, steps, schedules
        if not 0 <= clip < math.inf:
            raise ValueError(f"clip is {clip}, expected a norm above 0, or 0 for none")
        self.clip, self.loss_scale, self.norms = clip, loss_scale, Tensor()
        self.adamw = torch.optim.AdamW([g for g in groups if "neuron_axis" not in g], **adamw)
        types = dict(dtype=dtype) if "dtype" in matrix.defaults else {}
        matrices = [g for g in groups if "neuron_axis" in g]
        self.matrix = matrix(matrices, compile=compile, share_storage=True, **types)
        self.params = [p for group in self.groups for p in group["params"]]
        self.matrix.reduce_also([p for g in self.adamw.param_groups for p in g["params"]])
        self.nonfinite = torch.zeros(len(self.params), device=self.params[0].device)
        self._change(settings, lr_scale)
        for hyperparameter in schedules:
            if not any(hyperparameter in group for group in self.groups):
                raise ValueError(f"{name} has no {hyperparameter}, of which a schedule is given")
        self._initial = [dict(group) for group in self.groups]
        own = matrix.around(steps) if callable(matrix.around) else matrix.around
        self._started((*own, *around))

    def check_covers(self, model: nn.Module) -> None:
        """Assert that every parameter of the model has exactly one optimizer."""
        assert len(self.params) == len(set(self.params)), "a parameter has two optimizers"
        assert set(self.params) == set(model.parameters()), "a parameter has no optimizer"

    # ---- a step -----------------------------------------------------------------------------

    def before_forward(self, step: int) -> None:
        """Call before the first forward pass of each step; steps count from 0."""
        with torch.no_grad():
            for technique, state in self._around:
                technique.before_forward(self._seen_by(technique), state, step)

    def before_last_backward(self) -> None:
        """Let reductions start during the next backward pass, which must be the step's last."""
        self.matrix.before_last_backward()

    @torch.no_grad()
    def step(self, step: int, measure: bool = False) -> None:
        """Step all weights and drop the gradients; steps count from 0.

        measure: let `norms` (2, groups) hold, for each group, the norm of its gradient before
        clipping and that of the change of its weights. They stay on the device.
        """
        self._follow_schedules(step)
        if measure or self.clip:
            gradient_norms = self._gradient_norms()
        before = [p.clone() for p in self.params] if measure else []
        self.matrix.step()  # also sums the gradients of AdamW's parameters
        norms = torch._foreach_norm([p.grad.float() for p in self.params], math.inf)
        self.nonfinite += torch.stack(norms).isfinite().logical_not()
        self.adamw.step()
        for p in self.params:
            p.grad = None
        if measure:
            torch._foreach_sub_(before, [p.detach() for p in self.params])
            sizes, changes = [len(group["params"]) for group in self.groups], iter(before)
            change_norms = self._group_norms([list(islice(changes, size)) for size in sizes])
            self.norms = torch.stack([gradient_norms, change_norms])
        for technique, state in self._around:
            technique.after_step(self._seen_by(technique), state, step)

    def _seen_by(self, technique: Around) -> list[Tensor]:
        """Return the weights that a technique around all weights does not leave out."""
        if not technique.without:
            return self.params
        groups = [group for group in self.groups if group["name"] not in technique.without]
        return [p for group in groups for p in group["params"]]

    def _started(self, around: Iterable[Around]) -> None:
        """Let techniques around all weights begin with the weights as they are now."""
        self._around = [(one, one.start(self._seen_by(one))) for one in around]

    @property
    def lr_factor(self) -> float:
        """Return the learning rate of the last step over the initial one, of the first group."""
        return self.groups[0]["lr"] / self.groups[0]["initial_lr"]

    def measured(self) -> dict[str, object]:
        """Return the norms of the last step that measured, and its learning rates, by group."""
        return dict(norms=self.norms, rates={group["name"]: group["lr"] for group in self.groups})

    def _gradient_norms(self) -> Tensor:
        """Return each group's gradient norm (groups,), over all ranks; then clip the gradients."""
        owned = self.matrix.summed_gradients()  # those of AdamW are then summed as well
        adamw = [[p.grad for p in group["params"]] for group in self.adamw.param_groups]
        squares = self._group_norms(owned).square()
        if grouped():
            dist.all_reduce(squares)
        norms = torch.cat([self._group_norms(adamw), squares.sqrt()]) / self.loss_scale
        if self.clip:
            factor = (self.clip / norms.norm()).clamp_max(1.0)  # 1 for a norm of 0
            torch._foreach_mul_([grad for grads in adamw + owned for grad in grads], factor)
        return norms

    def _group_norms(self, groups: list[list[Tensor]]) -> Tensor:
        """Return the norm of the tensors of each group together, (groups,) in float32."""
        zero = torch.zeros((), device=self.nonfinite.device)
        norms = [torch._foreach_norm(some or [zero], dtype=torch.float32) for some in groups]
        return torch.stack([torch.stack(each).norm() for each in norms])

    def _follow_schedules(self, step: int) -> None:
        for group, initial in zip(self.groups, self._initial, strict=True):
            own = self.matrix.schedules if "neuron_axis" in group else {}
            for name, schedule in (self.schedules | own).items():
                if name in initial:
                    group[name] = initial[name] * schedule(step, self.steps)

    @contextmanager
    @torch.no_grad()
    def readout(self) -> Iterator[None]:
        """Hold the weights for validation inside the block, and the trained ones after it."""
        weights = [p.detach() for p in self.params]
        values = dict(zip(self.params, weights, strict=True))
        for technique, state in self._around:
            seen = self._seen_by(technique)
            found = technique.readout([values[p] for p in seen], state)
            values |= dict(zip(seen, found, strict=True))
        values = [*values.values()]
        if all(value is weight for value, weight in zip(values, weights, strict=True)):
            yield
            return
        kept = [w.clone() for w in weights]
        torch._foreach_copy_(weights, values)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def nonfinite_steps(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        """Return the parameters whose gradients were not finite, and in how many steps.

        Counts are those since the last call, of the rank with the most. Every rank must call it,
        at validations only, as it waits for the device.
        """
        counts, names = self.nonfinite.clone(), {p: name for name, p in named}
        if grouped():
            dist.all_reduce(counts, dist.ReduceOp.MAX)
        self.nonfinite.zero_()
        found = zip(counts.tolist(), (names[p] for p in self.params), strict=True)
        return {name: int(n) for n, name in sorted(found, reverse=True) if n}  # first to fail first

    # ---- a run ------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all state: as newly built, for the weights as they are now."""
        self.adamw.state.clear()
        self.matrix.reset()
        self.nonfinite.zero_()
        self._started([technique for technique, _ in self._around])

    def state_dict(self) -> dict:
        """Return the state for any number of ranks; every rank must call it."""
        around = [state for _, state in self._around]
        return dict(adamw=self.adamw.state_dict(), matrix=self.matrix.state_dict(), around=around)

    def load_state_dict(self, saved: dict) -> None:
        """Load a state_dict of any number of ranks. Checkpoints before `around` lack that key.

        A state of another optimizer or model raises ValueError and changes nothing.
        """
        sizes = [
            [len(group["params"]) for group in adamw["param_groups"]]
            for adamw in (saved["adamw"], self.adamw.state_dict())
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the saved state has AdamW groups of {sizes[0]} parameters, expected {sizes[1]}: "
                "it comes from another optimizer or model"
            )
        found = saved.get("around", [])
        shapes, expected = (
            [{name: [t.shape for t in tensors] for name, tensors in s.items()} for s in states]
            for states in (found, [state for _, state in self._around])
        )
        if shapes != expected:
            raise ValueError(
                f"the saved state is of {len(found)} techniques around all weights, expected "
                f"{len(expected)}, of equal shapes: it comes from another optimizer or model"
            )
        self.matrix.load_state_dict(saved["matrix"])  # refuses before it changes anything
        self.adamw.load_state_dict(saved["adamw"])
        for (_, state), values in zip(self._around, found, strict=True):
            for name, tensors in state.items():
                torch._foreach_copy_(tensors, values[name])

    def read_back(self) -> list[dict]:
        """Return the hyperparameters in use, from the groups and not from the plan."""
        owners = [(type(o).__name__.lower(), g) for o in self._optimizers for g in o.param_groups]
        return [{"optimizer": o} | {k: g[k] for k in g if "param" not in k} for o, g in owners]

    @property
    def groups(self) -> list[dict]:
        """Return all parameter groups. AdamW has new ones after it loaded a state."""
        return self.adamw.param_groups + self.matrix.param_groups

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.adamw, self.matrix]

    # ---- hyperparameters from the command line -----------------------------------------------

    def _change(self, settings: Iterable[str], lr_scale: float) -> None:
        """Apply settings and the scale, and raise ValueError for a wrong one."""
        adamw, matrix = self.adamw.param_groups, self.matrix.param_groups
        named = {group["name"]: [group] for group in self.groups} | {"adamw": adamw}
        named[self.name] = named.get(self.name, []) + matrix
        for setting in settings:
            where, _, text = setting.partition("=")
            name, _, key = where.partition(".")
            known = {
                name: sorted(set().union(*some) - NO_HYPERPARAMETERS)
                for name, some in named.items()
            }
            if key not in known.get(name, []):
                listed = (
                    f"names of {name}: {known[name]}" if name in named else f"groups: {list(named)}"
                )
                raise ValueError(f"--set {setting}: expected group.name=value; {listed}")
            for group in named[name]:
                if key in group:
                    group[key] = parsed_setting(setting, text, key, group[key])
        for group in self.groups:
            group["initial_lr"] = group["lr"] = group["lr"] * lr_scale
        for group in adamw:  # refuses foolish values, as deal() does for matrices
            chosen = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            torch.optim.AdamW([torch.zeros(1)], **chosen)
        self.matrix.deal()  # the cost of a matrix may have changed


def parsed_setting(setting: str, text: str, key: str, old: object) -> object:
    """Return the value of a setting, of the type of the old one."""
    try:
        value = text if isinstance(old, str) else ast.literal_eval(text)
        value = float(value) if isinstance(old, float) else value
    except (ValueError, SyntaxError, TypeError):
        value = setting  # matches no expected type
    if type(value) is not type(old) and old is not None and key != "neuron_axis":
        raise ValueError(f"--set {setting}: expected a value like {old!r}")
    return value
