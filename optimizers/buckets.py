"""Buckets of the slot: parameters of one shape, their owners, and the buffers they live in."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .replay import Replay, Scalars


@dataclass(eq=False)
class Bucket:
    """Parameters of one group with one shape, and their owners."""

    group: dict
    params: list[Tensor]  # K of (m, n)
    owned: list[list[int]] = field(default_factory=list)  # per rank: indices into params
    state: dict[str, Tensor] = field(default_factory=dict)  # of this rank's matrices: (k, ...)
    weights: Tensor | None = None  # (ranks, slots, m, n); `cells` are its parts, by parameter
    cells: list[Tensor] = field(default_factory=list)
    received: Tensor | None = None  # (slots, m, n): summed gradients of this rank's matrices
    spare: dict[str, Tensor] = field(default_factory=dict)  # a former state: room for the next
    scalars: Scalars = field(default_factory=Scalars)  # for compiled code
    replays: dict[int, Replay] = field(default_factory=dict)  # by the first matrix of a part

    @property
    def slots(self) -> int:
        """Matrices per rank in a communication buffer; ranks that own fewer leave padding."""
        return max(map(len, self.owned))

    @property
    def wide(self) -> torch.dtype:
        """Return the type in which this bucket is stepped: float32 or better."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    def places(self) -> dict[int, tuple[int, int]]:
        """Return the rank and slot of each parameter, by its index."""
        return {i: (r, s) for r, mine in enumerate(self.owned) for s, i in enumerate(mine)}

    def deals_as(self, other: "Bucket") -> bool:
        """True if both hold the same parameters of the same group, with the same owners."""
        params = [list(map(id, bucket.params)) for bucket in (self, other)]
        return self.group is other.group and params[0] == params[1] and self.owned == other.owned

    def reset(self) -> None:
        self.spare, self.state = self.state or self.spare, {}

    def filled(self, one: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Return the state of `count` matrices like this one, in the tensors of a former state
        where they fit: addresses then stay, and recorded graphs are good for another run."""
        state = {}
        for key, like in one.items():
            room, shape = self.spare.get(key, like), (count, *like.shape[1:])
            fits = (room.shape, room.dtype, room.device) == (shape, like.dtype, like.device)
            state[key] = (room if fits else like.new_empty(shape)).copy_(like)
        return state

    def hold_weights(self) -> None:
        """Make the parameters views of `weights`, unless they are."""
        pairs = list(zip(self.params, self.cells, strict=self.weights is not None))
        if pairs and all(p.data_ptr() == cell.data_ptr() for p, cell in pairs):
            return
        shape = (len(self.owned), self.slots, *self.params[0].shape)
        self.weights, places = self.params[0].new_zeros(shape), self.places()
        self.cells = [self.weights[places[i]] for i in range(len(self.params))]
        for p, cell in zip(self.params, self.cells, strict=True):
            p.data = cell.copy_(p)


def owners_by_cost(costs: list[float], ranks: int) -> list[int]:
    """Return the owner of each item: largest cost first, each to the rank with the least so far."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def even_parts(count: int, item_bytes: int, limit: int) -> list[tuple[int, int]]:
    """Return [first, last) of as few parts as keep `count` items of `item_bytes` below the limit.

    Their sizes differ by at most one; an item that is too large is a part of its own.
    """
    parts = min(count, -(-count * item_bytes // limit))
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
