"""Agreement between the ranks of a group: parameters, settings, weights, and who is calling.

A slot writes the matrices of one rank into the others, so all must mean the same matrices. These
checks run when an optimizer is built and in its first step, and wait for the device.
"""

import time
import uuid
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

ALONE_S = 10.0  # that a call of all ranks waits for the last one
APART = 0.01  # relative: gradients that are called equal, though rounded on each rank
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def grouped() -> bool:
    """True if this process is a rank of a process group."""
    return dist.is_available() and dist.is_initialized()


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the number of ranks in a group (None: all), and the number of this one."""
    if not grouped():
        return 1, 0
    if (rank := dist.get_rank(group)) < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process_group that was given: pass a group of "
            "this rank"
        )
    return dist.get_world_size(group), rank


def from_all_ranks(mine: object, group: dist.ProcessGroup | None) -> list:
    """Return the objects of all ranks; every rank must call it."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    return found


def check_alike(lines: list[str], group: dist.ProcessGroup | None, advice: str) -> None:
    """Raise ValueError on every rank if the lines differ, with the first that does."""
    digest = sha256("\n".join(lines).encode()).hexdigest()
    if len(set(from_all_ranks(digest, group))) == 1:
        return
    first, *others = from_all_ranks(lines, group)
    for i in range(max(map(len, (first, *others)))):
        mine = first[i] if i < len(first) else "no further parameter"
        for rank, other in enumerate(others, 1):
            if (theirs := other[i] if i < len(other) else "no further parameter") != mine:
                raise ValueError(f"ranks differ: rank 0 has {mine}, rank {rank} {theirs}; {advice}")


def check_same_values(params: list[Tensor], group: dist.ProcessGroup | None, grads: bool) -> None:
    """Raise ValueError on every rank if weights differ by a bit, or gradients by more than 1%."""
    bits = [p.detach().contiguous().view(BITS[p.itemsize]).sum() for p in params]
    sums = torch.stack([b.to(params[0].device) for b in bits]).tolist() if params else []
    names = [f"parameter {i}, {tuple(p.shape)}," for i, p in enumerate(params)]
    lines = [f"{name} with checksum {s}" for name, s in zip(names, sums, strict=True)]
    advice = "give all ranks the same weights, or pass process_group= of the ranks that share them"
    check_alike(lines, group, advice)
    if not grads:
        return
    norms = [None if p.grad is None else p.grad.float().norm().item() for p in params]
    for name, found in zip(names, zip(*from_all_ranks(norms, group), strict=True), strict=True):
        known = [norm for norm in found if norm is not None and norm < torch.inf]
        if known and max(known) - min(known) > APART * max(known):
            raise ValueError(
                f"ranks differ: the gradient of {name} has norms from {min(known):.4g} to "
                f"{max(known):.4g}; reduce=False expects gradients that are reduced already (DDP): "
                "use reduce=True, or pass process_group= of the ranks that share weights"
            )


class Gathering:
    """Finds out whether all ranks of a group make a call, before a collective would wait for ever.

    Ranks count themselves in the store of the process group, which needs no collective. A call
    that failed counts for nothing, so that the next may succeed.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.size, self.calls = dist.get_world_size(group), 0
        self.name = from_all_ranks(uuid.uuid4().hex, group)[0]  # the same on all ranks

    def wait(self, call: str) -> None:
        """Return when all ranks are here; raise ValueError after ALONE_S seconds."""
        store = dist.distributed_c10d._get_default_store()
        key, until = f"{self.name} {self.calls}", time.monotonic() + ALONE_S
        store.add(key, 1)
        while (here := store.add(key, 0)) < self.size:
            if time.monotonic() > until:
                if store.add(key, -1) < self.size - 1:
                    raise ValueError(
                        f"{here} of {self.size} ranks called {call} within {ALONE_S:.0f} s: call "
                        "it on all ranks at the same time, and write its result on one"
                    )
                store.add(key, 1)  # the last one came just now
            time.sleep(0.002)
        self.calls += 1
