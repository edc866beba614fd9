"""Sums gradients over ranks, piece by piece, as soon as the last backward pass has them.

Gradients of matrices in the slot are summed onto their owners, in pieces of a bucket's neighbours;
gradients of all other parameters are summed on every rank. A hook of each parameter says when its
gradient is complete. All ranks launch all pieces in one order, last layers first, in whatever order
the hooks run: collectives that meet in different orders wait for each other for ever.

All collectives are asynchronous; their inputs and Work handles are held until waited for.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .buckets import Bucket, even_parts

PIECE_BYTES = 25 * 2**20  # sent in one reduction: DDP's bucket_cap_mb; large enough for bandwidth
IN_FLIGHT = 4  # pieces whose inputs are in memory at a time


def all_gather(weights: Tensor, mine: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Bring every rank's part of `weights` (ranks, slots, *shape) to all; `mine` is this rank's."""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13
    return gather(weights.flatten(0, 1), mine, group=group, async_op=True)


@dataclass(eq=False)
class Piece:
    """Gradients that are summed together, on all ranks."""

    params: list[Tensor]
    depth: float  # pieces are launched from the greatest depth to the least
    group: dist.ProcessGroup | None = None
    missing: set[Tensor] = field(default_factory=set)  # parameters whose gradient is to come
    flight: tuple[dist.Work, Tensor] | None = None  # and its buffer, until waited for
    grads: list[Tensor] = field(default_factory=list)  # that were sent, until the step ends

    def launch(self, dtype: torch.dtype | None) -> None:
        """Pack the gradients where there are several, and start the all-reduce."""
        grads = [p.grad for p in self.params]
        alone = len(grads) == 1 and grads[0].is_contiguous()
        buffer = grads[0] if alone else torch.cat([grad.flatten() for grad in grads])
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        self.flight, self.grads = (work, buffer), grads

    def wait(self) -> None:
        """Wait for the sums; the gradients then hold them."""
        if self.flight is None:
            return
        (work, buffer), self.flight, grads = self.flight, None, self.grads
        work.wait()
        if buffer is not grads[0]:
            sums = buffer.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [s.view_as(g) for s, g in zip(sums, grads, strict=True)])

    def changed(self) -> Tensor | None:
        """Return a parameter whose gradient is no longer what was sent, if there is one."""
        for p, grad in zip(self.params, self.grads, strict=True):
            if p.grad is not grad:  # its version says nothing: the sums are written into it
                return p
        return None


@dataclass(eq=False)
class OwnedPiece(Piece):
    """Slots [first, last) of a bucket on all ranks: each owner gets the sums of its matrices."""

    bucket: Bucket = None
    first: int = 0
    last: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)  # rank and slot of each parameter
    sent: list[tuple[Tensor | None, int]] = field(default_factory=list)  # and their versions

    def launch(self, dtype: torch.dtype | None) -> None:
        """Copy the gradients into one buffer, in `dtype`, and start the reduce-scatter.

        A parameter without gradient on this rank adds 0.
        """
        bucket, like = self.bucket, self.params[0]
        ranks, slots, shape = len(bucket.owned), self.last - self.first, like.shape
        pairs = list(zip(self.places, (p.grad for p in self.params), strict=True))
        filled = [(send_to, grad) for send_to, grad in pairs if grad is not None]
        make = like.new_zeros if len(filled) < ranks * slots else like.new_empty
        send = make(ranks, slots, *shape, dtype=dtype)
        if filled:
            places, grads = zip(*filled, strict=True)
            torch._foreach_copy_([send[r, slot - self.first] for r, slot in places], grads)
        if bucket.received is None:
            bucket.received = send.new_empty(bucket.slots, *shape)
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # torch 2.13
        received = bucket.received[self.first : self.last]
        self.flight = scatter(received, send.flatten(0, 1), group=self.group, async_op=True), send
        self.sent = [(grad, grad._version if grad is not None else 0) for _, grad in pairs]

    def wait(self) -> None:
        if self.flight:
            self.flight[0].wait()
            self.flight = None

    def changed(self) -> Tensor | None:
        for p, (grad, version) in zip(self.params, self.sent, strict=True):
            if p.grad is not grad or grad is not None and grad._version != version:
                return p
        return None


def owned_pieces(
    bucket: Bucket, dtype: torch.dtype | None, group: dist.ProcessGroup | None
) -> list[OwnedPiece]:
    """Split a bucket into pieces of about PIECE_BYTES, neighbours in layer order."""
    like, places = bucket.params[0], bucket.places()
    slot_bytes = len(bucket.owned) * like.numel() * (dtype or like.dtype).itemsize
    pieces = []
    for first, last in even_parts(bucket.slots, slot_bytes, PIECE_BYTES):
        inside = {i: place for i, place in places.items() if first <= place[1] < last}
        params, depth = [bucket.params[i] for i in inside], min(inside) / len(bucket.params)
        slots = dict(bucket=bucket, first=first, last=last, places=[*inside.values()])
        pieces.append(OwnedPiece(params, depth, group, **slots))
    return pieces


class Reducer:
    """Launches all pieces in one order, when they are complete or when told to.

    Args:
        buckets: their gradients go to the owners of the matrices, in `dtype` (None: their own).
        others: further parameters in the order in which a forward pass uses them. The first of
            those with two dimensions or more completes last, as an input embedding does; the
            others complete first, as an output head does. Vectors travel together.
        group: of the ranks that sum; None: all.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        dtype: torch.dtype | None,
        others: Sequence[Tensor] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.buckets, self.dtype, self.hooks = buckets, dtype, []
        self.launched = 0  # pieces[:launched] are under way or received
        self.pieces = [piece for bucket in buckets for piece in owned_pieces(bucket, dtype, group)]
        vectors: dict[torch.dtype, list[Tensor]] = {}
        for p in others:
            if p.ndim < 2:
                vectors.setdefault(p.dtype, []).append(p)
        large = [p for p in others if p.ndim >= 2]
        self.pieces += [Piece(params, -1.0, group) for params in vectors.values()]
        self.pieces += [Piece([p], -1.0 if p is large[0] else 2.0, group) for p in large]
        self.pieces.sort(key=lambda piece: -piece.depth)  # as a backward pass completes them
        self.piece_of = {p: piece for piece in self.pieces for p in piece.params}

    def expect(self) -> None:
        """Launch pieces from hooks of the next backward pass, which completes the gradients."""
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
        """Launch every piece that no hook has launched, after a check of those that were."""
        for piece in self.pieces[: self.launched]:
            if (p := piece.changed()) is not None:
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
        """Wait for the gradients of a bucket's slots from `first` on."""
        for piece in self.pieces:
            if isinstance(piece, OwnedPiece) and piece.bucket is bucket and piece.last > first:
                piece.wait()

    @torch.no_grad()
    def wait_all(self) -> None:
        """Wait for everything launched."""
        for piece in self.pieces:
            piece.wait()

    def clear(self) -> None:
        """Wait for everything launched and forget it: it has been used, or no step follows."""
        self.remove_hooks()
        self.wait_all()
        for piece in self.pieces:
            piece.grads = []
            if isinstance(piece, OwnedPiece):
                piece.sent = []
        for bucket in self.buckets:
            bucket.received = None
        self.launched = 0

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
