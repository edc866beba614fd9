"""CUDA graphs of the optimizer's maths: one launch for a hundred kernels.

Launching the kernels of a step takes the CPU longer than the GPU needs to run them. A graph is
recorded once, from the same compiled code, on tensors that stay where they are: weights and state
live in the slot, gradients are copied into a buffer that all parts share, and hyperparameters are
read from 0-D tensors on the GPU. Any other change (a tensor that moved, another method) records
anew.
"""

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor


class Scalars:
    """The float hyperparameters of a group as 0-D tensors, written only where they changed."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.tensors: dict[str, Tensor] = {}

    def hold(self, group: dict, names: list[str], device: torch.device) -> dict[str, Tensor]:
        """Return the tensors that hold these hyperparameters, brought up to date."""
        for name in names:
            value = group[name]
            if name not in self.tensors or self.tensors[name].device != device:
                self.tensors[name] = torch.empty((), dtype=torch.float32, device=device)
                self.last.pop(name, None)
            if isinstance(value, Tensor):
                self.tensors[name].copy_(value.reshape(()), non_blocking=True)
                self.last.pop(name, None)
            elif self.last.get(name) != value:
                self.tensors[name].fill_(value)
                self.last[name] = value
        return dict(self.tensors)


class Replay:
    """maths(weights, grads, state, group) on a GPU: run once, recorded, then replayed.

    All tensors among the arguments must keep their addresses from call to call, and hold the next
    values; if one does not, or another argument changed, that call runs and is recorded again.
    """

    pool: tuple[int, int] | None = None  # one for all graphs: they never run side by side
    alive: WeakSet = WeakSet()  # a pool without graphs takes no new ones

    def __init__(self, maths: Callable) -> None:
        self.maths = maths
        self.graph: torch.cuda.CUDAGraph | None = None
        self.known: list | None = None  # the arguments with which it was recorded

    def __call__(self, weights: Tensor, grads: Tensor, state: dict, group: dict) -> None:
        held = (weights, grads, *state.values(), *group.values())
        known = [(x.data_ptr(), x.shape, x.dtype) if isinstance(x, Tensor) else x for x in held]
        if self.graph is not None and known == self.known:
            self.graph.replay()
            return
        self.maths(weights, grads, state, group)  # compiles, and does the step
        self.graph, graph = None, torch.cuda.CUDAGraph()
        if Replay.pool is None or not Replay.alive:
            Replay.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.maths(weights, grads, state, group)  # is recorded, and does nothing
        self.graph, self.known = graph, known
        Replay.alive.add(graph)
