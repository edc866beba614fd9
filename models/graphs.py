"""CUDA graphs of a microbatch: one launch for the hundreds of kernels of its forward and backward.

With few rows the GPU runs these kernels faster than the CPU launches them. A graph is recorded
once, on tensors that stay where they are: weights, tokens, gradients and loss. Two graphs are
recorded: each replay of the first overwrites the gradients, the second adds to them.

A replay consists of kernels only: it runs no Python, no autograd and no hooks of parameters.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# The most tokens of a microbatch for which graphs pay. On an H100, 8 rows of 1024 tokens (124M
# model) run for 16 ms, but the CPU takes 33 to 47 ms to launch them: replays make a step two to
# three times as fast. For 32 rows (56 ms) graphs gained nothing on four GPUs, as no reduction of
# gradients begins before the end of a replay.
MOST_TOKENS = 16 * 1024


class MicrobatchGraphs:
    """Replays the forward and backward pass for microbatches of one shape (rows, row_tokens).

    `model(inputs, targets)` must return a summed loss in float32, and reach every parameter.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int]) -> None:
        self.model, self.params = model, list(model.parameters())
        device = self.params[0].device
        self.inputs, self.targets = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        self.total = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream()  # kept: libraries hold a workspace for each stream
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.grads: list[Tensor] = []
        self.known: list[int] = []  # addresses of the weights when recorded

    @staticmethod
    def worth(shape: tuple[int, int], device: torch.device) -> bool:
        """True if launching such a microbatch takes longer than running it (tried on Hopper)."""
        if device.type != "cuda" or math.prod(shape) > MOST_TOKENS:
            return False
        return torch.cuda.get_device_capability(device)[0] == 9

    def run(self) -> None:
        """Add the loss to `total` and its gradient to p.grad; each graph records one such call."""
        loss = self.model(self.inputs, self.targets)
        loss.backward()
        self.total += loss.detach()

    def record(self) -> None:
        """Record both graphs. Weights keep their values, gradients are cleared.

        The model runs once before, on the same stream: kernels are then loaded, algorithms chosen
        and workspaces allocated, and autograd's accumulators remember this stream.
        """
        self.graphs, self.grads, self.known = [], [], []  # frees the memory of earlier graphs
        self.model.zero_grad()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.model.zero_grad()
        graphs, pool = [], torch.cuda.graph_pool_handle()  # shared, as they never run at once
        for _ in ("first", "more"):
            graphs.append(graph := torch.cuda.CUDAGraph())
            options = dict(pool=pool, stream=self.stream, capture_error_mode="thread_local")
            with torch.cuda.graph(graph, **options):  # NCCL's threads may call CUDA meanwhile
                self.run()  # the second time it adds to the gradients in place
        self.graphs, self.grads = graphs, [p.grad for p in self.params]
        self.known = self.addresses()
        self.model.zero_grad()

    def addresses(self) -> list[int]:
        """Return where the weights are now."""
        return [p.data_ptr() for p in self.params]

    def gradients(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the summed loss of a step's microbatches; p.grad becomes its gradient."""
        assert all(p.grad is None for p in self.params), "a replay would not add to these gradients"
        if self.addresses() != self.known:
            self.record()
        self.total.zero_()
        for i, batch in enumerate(batches):
            for place, tokens in zip((self.inputs, self.targets), batch, strict=True):
                assert tokens.shape == place.shape, "a microbatch of another shape"
                place.copy_(tokens)
            self.graphs[min(i, 1)].replay()
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad
        return self.total.clone()
