"""Lanes: streams on which the graphs of some buckets run while those of the others run, too.

Kernels of tall matrices and those of the others leave parts of the GPU idle at different times.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch


class Lane:
    """A stream and the memory of its graphs, which run one after the other.

    A stream has a cuBLAS workspace, too: graphs are recorded on the stream on which they will run.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


@cache
def lane_of(device: torch.device, tall: bool) -> Lane:
    """That of the tall buckets of all optimizers, or that of all others."""
    return Lane(device)


def on(lane: Lane | None) -> AbstractContextManager:
    """What is launched inside is launched on this lane; None: where it is anyway."""
    return torch.cuda.stream(lane.stream) if lane else nullcontext()


@contextmanager
def side_by_side(lanes: Iterable[Lane | None]) -> Iterator[None]:
    """Lanes start after what the current stream has to do so far, which then waits for them.

    In between nothing may be allocated on the current stream: it could be memory that was freed
    there, though a lane, or NCCL for it, has yet to read it.
    """
    streams = [lane.stream for lane in dict.fromkeys(lanes) if lane]
    pairs = [(stream, torch.cuda.current_stream(stream.device)) for stream in streams]
    for stream, current in pairs:
        stream.wait_stream(current)
    try:
        yield
    finally:
        for stream, current in pairs:
            current.wait_stream(stream)
