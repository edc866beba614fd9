"""CUDA graphs of the optimizer's maths: one launch for a hundred kernels.

Launching the kernels of a step takes the CPU longer than the GPU needs to run them. A graph is
recorded once, from the same compiled code, on tensors that stay where they are: weights and state
live in the slot, gradients are copied into one buffer, and hyperparameters are read from 0-D
tensors on the GPU. Whatever else changes (a tensor that moved, another method) records anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Numbers:
    """The float hyperparameters of a group as 0-D tensors, written only where they changed."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.tensors: dict[str, Tensor] = {}

    def of(self, group: dict, names: list[str], device: torch.device) -> dict[str, Tensor]:
        for name in names:
            value = group[name]
            if name not in self.tensors or self.tensors[name].device != device:
                self.tensors[name] = torch.empty((), dtype=torch.float32, device=device)
                self.last.pop(name, None)
            if isinstance(value, Tensor):
                self.tensors[name].copy_(value, non_blocking=True)
                self.last.pop(name, None)
            elif self.last.get(name) != value:
                self.tensors[name].fill_(value)
                self.last[name] = value
        return dict(self.tensors)


class Staging:
    """Where the gradients of one part after the other stand, at one address for each type."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def put(self, grads: list[Tensor], dtype: torch.dtype, most: int) -> Tensor:
        """These (k of (m, n)) as a stack; `most`: numbers in the largest that will come."""
        key, size = (grads[0].device, dtype), sum(grad.numel() for grad in grads)
        if key not in self.buffers or self.buffers[key].numel() < most:
            self.buffers[key] = torch.empty(most, dtype=dtype, device=grads[0].device)
        stack = self.buffers[key][:size].view(len(grads), *grads[0].shape)
        torch._foreach_copy_(list(stack), grads)
        return stack


class Replay:
    """maths(weights, grads, state, group) for tensors on a GPU: run once, recorded, then replayed.

    All tensors among the arguments must keep their addresses from call to call, and hold the next
    values; where they do not, or another argument changed, that call runs and is recorded again.
    """

    pool: tuple[int, int] | None = None  # one for all graphs: they never run side by side

    def __init__(self, maths: Callable) -> None:
        self.maths = maths
        self.graph: torch.cuda.CUDAGraph | None = None
        self.known: list | None = None  # of the arguments that it was recorded with

    def __call__(self, weights: Tensor, grads: Tensor, state: dict, group: dict) -> None:
        held = (weights, grads, *state.values(), *group.values())
        known = [(x.data_ptr(), x.shape, x.dtype) if isinstance(x, Tensor) else x for x in held]
        if self.graph is not None and known == self.known:
            self.graph.replay()
            return
        inputs = weights, grads, state, group
        self.maths(*inputs)  # compiles, and does the step
        Replay.pool = Replay.pool or torch.cuda.graph_pool_handle()
        self.graph, graph = None, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.maths(*inputs)  # is recorded, and does nothing
        self.graph, self.known = graph, known
