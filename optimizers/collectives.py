"""Collectives of the slot: gradients are summed onto their owners, weights come back to all ranks.

All are asynchronous; their inputs and Work handles are held until waited for. When pieces start is
decided in reducer.py.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .buckets import Bucket


def grouped() -> bool:
    """Whether this process is a rank of a group."""
    return dist.is_available() and dist.is_initialized()


def reduce_scatter(received: Tensor, send: Tensor) -> dist.Work:
    """Sums `send` (ranks, slots, m, n) over ranks; `received` (slots, m, n) gets this rank's."""
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # torch 2.13
    return scatter(received, send.flatten(0, 1), async_op=True)


def all_gather(weights: Tensor, mine: Tensor) -> dist.Work:
    """Brings every rank's part of `weights` (ranks, slots, m, n) to all; `mine` is this rank's."""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13
    return gather(weights.flatten(0, 1), mine, async_op=True)


@dataclass
class Piece:
    """Slots [first, last) of a bucket on all ranks: the gradients that are summed together."""

    bucket: Bucket
    first: int
    last: int
    missing: set[Tensor] = field(default_factory=set)  # parameters whose gradient is to come
    sent: list[tuple[Tensor, int]] = field(default_factory=list)  # gradients and their versions
    flight: tuple[dist.Work, Tensor] | None = None  # and its input, until waited for

    def __post_init__(self) -> None:
        places = self.bucket.places().items()
        self.places = {i: at for i, at in places if self.first <= at[1] < self.last}
        self.params = [self.bucket.params[i] for i in self.places]
        self.depth = min(self.places) / len(self.bucket.params)  # of its first layer, 0 to 1

    def launch(self, dtype: torch.dtype | None) -> None:
        """Copies the gradients into one buffer and starts to sum it."""
        bucket, grads = self.bucket, [p.grad for p in self.params]
        ranks, size, shape = len(bucket.owned), self.last - self.first, grads[0].shape
        padded = len(grads) < ranks * size
        make = grads[0].new_zeros if padded else grads[0].new_empty
        send = make(ranks, size, *shape, dtype=dtype)
        torch._foreach_copy_([send[r, s - self.first] for r, s in self.places.values()], grads)
        if bucket.received is None:
            bucket.received = send.new_empty(bucket.slots, *shape)
        self.flight = reduce_scatter(bucket.received[self.first : self.last], send), send
        self.sent = [(grad, grad._version) for grad in grads]

    def wait(self) -> None:
        if self.flight:
            self.flight[0].wait()
            self.flight = None
