"""Buckets of the slot: parameters of one shape, their owners, and the buffers they live in."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .replay import Replay, Scalars


@dataclass(eq=False)
class Bucket:
    """Parameters with one shape, type and device, and their owners. Their groups may differ."""

    matrix: tuple[int, int]  # (m, n); a parameter holds one matrix or a stack of them
    params: list[Tensor] = field(default_factory=list)  # K of one shape
    groups: list[dict] = field(default_factory=list)  # K: of each parameter
    owned: list[list[int]] = field(default_factory=list)  # per rank: indices into params
    state: dict[str, Tensor] = field(default_factory=dict)  # of this rank's matrices: (k, ...)
    views: list[dict[str, Tensor]] = field(default_factory=list)  # of it, by slot, for opt.state
    at: list[dict[str, int]] = field(default_factory=list)  # and their addresses
    weights: Tensor | None = None  # (ranks, slots, *shape); `cells` are its parts, by parameter
    cells: list[Tensor] = field(default_factory=list)
    received: Tensor | None = None  # (slots, *shape): summed gradients of this rank's matrices
    spare: dict[str, Tensor] = field(default_factory=dict)  # a former state: room for the next
    scalars: dict[int, Scalars] = field(default_factory=dict)  # for compiled code, by group
    replays: dict[int, Replay] = field(default_factory=dict)  # by the first parameter of a part

    @property
    def slots(self) -> int:
        """Parameters per rank in a communication buffer; ranks that own fewer leave padding."""
        return max(map(len, self.owned))

    @property
    def each(self) -> int:
        """Matrices per parameter."""
        return self.params[0].numel() // (self.matrix[0] * self.matrix[1])

    @property
    def wide(self) -> torch.dtype:
        """Return the type in which this bucket is stepped: float32 or better."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    def places(self) -> dict[int, tuple[int, int]]:
        """Return the rank and slot of each parameter, by its index."""
        return {i: (r, s) for r, mine in enumerate(self.owned) for s, i in enumerate(mine)}

    def runs(self, rank: int) -> list[tuple[int, int]]:
        """Return [first, last) of the slots of a rank that hold neighbours of one group."""
        groups = [self.groups[i] for i in self.owned[rank]]
        starts = [s for s, g in enumerate(groups) if s == 0 or g is not groups[s - 1]]
        return list(zip(starts, [*starts[1:], len(groups)][: len(starts)], strict=True))

    def deals_as(self, other: "Bucket") -> bool:
        """True if both hold the same parameters of the same groups, with the same owners."""
        held = [[*map(id, bucket.params + bucket.groups)] for bucket in (self, other)]
        return held[0] == held[1] and self.matrix == other.matrix and self.owned == other.owned

    def reset(self) -> None:
        self.spare, self.state, self.views = self.state or self.spare, {}, []

    def filled(self, one: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Return the state of `count` matrices like this one, in the tensors of a former state
        where they fit: addresses then stay, and recorded graphs are good for another run."""
        state = {}
        for key, like in one.items():
            room, shape = self.spare.get(key, like), (count, *like.shape[1:])
            fits = (room.shape, room.dtype, room.device) == (shape, like.dtype, like.device)
            state[key] = (room if fits else like.new_empty(shape)).copy_(like)
        return state

    def apart(self, stack: Tensor, count: int) -> list[Tensor]:
        """Return views of a state (k, ...) for each of `count` parameters: (...) or (e, ...)."""
        stacked = self.params[0].ndim == 3 and self.params[0].shape[1:] == self.matrix
        sizes = (self.each,) if stacked else ()
        return list(stack.view(count, *sizes, *stack.shape[1:]))

    def of_one(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of one matrix, (1, ...), as that of one parameter."""
        each = {key: one.expand(self.each, *one.shape[1:]) for key, one in state.items()}
        return {key: self.apart(stack, 1)[0] for key, stack in each.items()}

    def hold_weights(self) -> None:
        """Make the parameters views of `weights`, unless they are."""
        pairs = list(zip(self.params, self.cells, strict=self.weights is not None))
        if pairs and all(p.data_ptr() == cell.data_ptr() for p, cell in pairs):
            return
        self.make_cells()
        for p, cell in zip(self.params, self.cells, strict=True):
            p.data = cell.copy_(p)

    def make_cells(self) -> None:
        """Make room for all weights, by rank and slot; padding is 0."""
        shape = (len(self.owned), self.slots, *self.params[0].shape)
        self.weights, places = self.params[0].new_zeros(shape), self.places()
        self.cells = [self.weights[places[i]] for i in range(len(self.params))]

    def send_weights(self, rank: int) -> Tensor:
        """Copy this rank's weights into new room for all, and return its part of that."""
        self.make_cells()
        mine = self.owned[rank]
        if mine:
            torch._foreach_copy_([self.cells[i] for i in mine], [self.params[i] for i in mine])
        return self.weights[rank]

    def receive_weights(self, rank: int) -> None:
        """Copy the weights of other ranks into the parameters, and free the room."""
        others = sorted({*range(len(self.params))} - {*self.owned[rank]})
        if others:
            torch._foreach_copy_([self.params[i] for i in others], [self.cells[i] for i in others])
        self.weights, self.cells = None, []


def owners_by_cost(costs: list[float], ranks: int, kinds: list[int] | None = None) -> list[int]:
    """Return the owner of each item: largest cost first, each to the rank with the least so far.

    Items of one kind are dealt evenly: a rank gets at most 1/ranks of them, rounded up.
    """
    load, owners, kinds = [0.0] * ranks, [0] * len(costs), kinds or [*range(len(costs))]
    limits = {kind: -(-count // ranks) for kind, count in Counter(kinds).items()}
    dealt: Counter[tuple[int, int]] = Counter()
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        open = [r for r in range(ranks) if dealt[r, kinds[i]] < limits[kinds[i]]]
        owners[i] = min(open, key=load.__getitem__)
        load[owners[i]] += costs[i]
        dealt[owners[i], kinds[i]] += 1
    return owners


def even_parts(count: int, item_bytes: int, limit: int) -> list[tuple[int, int]]:
    """Return [first, last) of as few parts as keep `count` items of `item_bytes` below the limit.

    Their sizes differ by at most one; an item that is too large is a part of its own.
    """
    parts = min(count, -(-count * item_bytes // limit))
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
