"""CUDA graphs of a microbatch: its forward and backward pass, hundreds of kernels, launched as one.

The kernels of few rows run faster than the CPU launches them. A graph is recorded once, on tensors
that stay where they are: weights, tokens, gradients and loss. Two are recorded. The first makes the
gradients in tensors of its own, and each replay overwrites them; the other adds to these.

A replay is kernels only: no Python runs, no autograd, no hook of a parameter.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Of a microbatch. On an H100, 8 rows of 1024 tokens of the 124M model run for 16 ms, and the CPU
# takes 33 to 47 ms to launch them: replayed, a step is two to three times faster. Of 32 rows, which
# run for 56 ms, graphs gained nothing on four GPUs: no reduction begins before the end of a replay.
MOST_TOKENS = 16 * 1024


class MicrobatchGraphs:
    """Forward and backward of microbatches of one shape (rows, row_tokens), replayed.

    `model(inputs, targets)` returns a summed loss in float32; every parameter has a gradient.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int]) -> None:
        self.model, self.params = model, list(model.parameters())
        device = self.params[0].device
        self.inputs, self.targets = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        self.total = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream()  # one: libraries keep a workspace for each
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.grads: list[Tensor] = []
        self.known: list[int] = []  # where the weights were that these are recorded with

    @staticmethod
    def worth(shape: tuple[int, int], device: torch.device) -> bool:
        """Whether launching such a microbatch takes longer than running it, where it was tried."""
        if device.type != "cuda" or math.prod(shape) > MOST_TOKENS:
            return False
        return torch.cuda.get_device_capability(device)[0] == 9

    def run(self) -> None:
        """What is recorded, twice."""
        loss = self.model(self.inputs, self.targets)
        loss.backward()
        self.total += loss.detach()

    def record(self) -> None:
        """Weights stay as they are; no gradient is left.

        Run first, on the stream that records: what loads, chooses or allocates once is then done,
        and autograd's accumulators, which remember a stream, belong to this one.
        """
        self.graphs, self.grads, self.known = [], [], []  # makes room
        self.model.zero_grad()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.run()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.model.zero_grad()
        graphs, pool = [], torch.cuda.graph_pool_handle()  # one: they never run side by side
        for _ in ("first", "more"):
            graphs.append(graph := torch.cuda.CUDAGraph())
            how = dict(pool=pool, stream=self.stream, capture_error_mode="thread_local")
            with torch.cuda.graph(graph, **how):  # other threads, as NCCL's, may call CUDA
                self.run()  # the second time there are gradients: it adds in place
        self.graphs, self.grads = graphs, [p.grad for p in self.params]
        self.known = self.addresses()
        self.model.zero_grad()

    def addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.params]

    def gradients(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The summed loss of all microbatches of a step; its gradient becomes p.grad of each."""
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
