"""Collectives of the slot: gradients are summed onto their owners, weights come back to all ranks.

A bucket's reduce_scatter is split into pieces, neighbours in layer order, and each starts as soon
as the last backward pass has completed its gradients. All ranks launch the pieces in one order,
last layers first; inputs and Work handles are held until waited for.
"""

import weakref
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .buckets import Bucket, even_parts

PIECE_BYTES = 25 * 2**20  # sent in one reduction: DDP's bucket_cap_mb; large enough for bandwidth
IN_FLIGHT = 4  # pieces whose inputs are in memory at a time


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


class Reducer:
    """Launches the pieces of all buckets in one order, when they are complete or when told to."""

    def __init__(self, buckets: list[Bucket], dtype: torch.dtype | None) -> None:
        self.buckets, self.dtype, self.hooks = buckets, dtype, []
        self.launched = 0  # pieces[:launched] are under way or received
        self.pieces = []
        for bucket in buckets:
            like, ranks = bucket.params[0], len(bucket.owned)
            each = ranks * like.numel() * (dtype or like.dtype).itemsize
            parts = even_parts(bucket.slots, each, PIECE_BYTES)
            self.pieces += [Piece(bucket, *part) for part in parts]
        self.pieces.sort(key=lambda piece: -piece.depth)  # as a backward pass completes them
        self.piece_of = {p: piece for piece in self.pieces for p in piece.params}

    def expect(self) -> None:
        """The next backward pass completes the gradients; a hook of each parameter says when."""
        self.clear()
        this = weakref.ref(self)  # a hook keeps no optimizer alive

        def arrived(p: Tensor) -> None:
            if (reducer := this()) is not None:
                reducer.arrived(p)

        for piece in self.pieces:
            piece.missing = set(piece.params)
            hooked = [p for p in piece.params if p.requires_grad]
            self.hooks += [p.register_post_accumulate_grad_hook(arrived) for p in hooked]

    def arrived(self, p: Tensor) -> None:
        self.piece_of[p].missing.discard(p)
        while self.launched < len(self.pieces) and not self.pieces[self.launched].missing:
            self.launch_next()

    @torch.no_grad()
    def launch_next(self) -> None:
        if self.launched >= IN_FLIGHT:
            self.pieces[self.launched - IN_FLIGHT].wait()  # frees its input
        self.pieces[self.launched].launch(self.dtype)
        self.launched += 1

    def launch_rest(self) -> None:
        """All that no hook has launched, after a look at what was sent."""
        for piece in self.pieces[: self.launched]:
            for p, (grad, version) in zip(piece.params, piece.sent, strict=True):
                if p.grad is not grad or grad._version != version:
                    self.clear()
                    raise ValueError(
                        f"a gradient {tuple(p.shape)} has changed since it was sent: call "
                        "before_last_backward() before the last backward() of a step, and do not "
                        "clip or zero gradients between them and step()"
                    )
        self.remove_hooks()
        while self.launched < len(self.pieces):
            self.launch_next()

    def wait(self, bucket: Bucket, first: int = 0) -> None:
        """Waits for the gradients of a bucket's slots from `first` on."""
        for piece in self.pieces:
            if piece.bucket is bucket and piece.last > first:
                piece.wait()

    def clear(self) -> None:
        """Forgets what was launched: it has been used, or the step does not come."""
        self.remove_hooks()
        for piece in self.pieces:
            piece.wait()
            piece.sent = []
        for bucket in self.buckets:
            bucket.received = None
        self.launched = 0

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
