"""When the slot sums gradients: piece by piece, as soon as the last backward pass has them.

A bucket is split into pieces, neighbours in layer order. A hook of each parameter says when its
gradient is complete. All ranks launch all pieces in one order, last layers first, whatever the
order of the hooks: collectives that meet in different orders wait for each other for ever.
"""

import weakref

import torch
from torch import Tensor

from .buckets import Bucket, even_parts
from .collectives import Piece

PIECE_BYTES = 25 * 2**20  # sent in one reduction: DDP's bucket_cap_mb; large enough for bandwidth
IN_FLIGHT = 4  # pieces whose inputs are in memory at a time


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
