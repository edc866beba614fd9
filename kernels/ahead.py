"""Triton's compilations: kept in one place, and made by threads while other work goes on.

Most of a compilation is done without Python's lock, but one after the other each kernel waits for
the one before it. A pass over the model that launches nothing finds out which kernels it needs.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files

import torch

try:
    from triton import knobs
except ImportError:  # a CPU build of torch comes without it
    knobs = None


def keep_in_one_place() -> None:
    """Inductor changes both for a process in which it compiles, and not where it finds all in its
    own cache: the second run then compiled all other kernels once more, 8 s on an H100."""
    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
    if (ptxas := files("triton") / "backends/nvidia/bin/ptxas").is_file():
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


@contextmanager
def compiled_ahead(work: Callable[[], object]) -> Iterator[None]:
    """Calls `work`, without the kernels of Triton that it would launch: threads compile these while
    the body runs. What `work` computes is meaningless."""
    if knobs is None or not torch.cuda.is_available():
        yield
        return
    made: dict[str, Future] = {}

    def hook(*, fn: object, compile: dict, is_manual_warmup: bool, **_: object) -> bool:
        if is_manual_warmup:  # of a thread
            return False
        kernel, described = fn.jit_function, compile["specialization_data"]
        if described not in made:  # .run loads it
            made[described] = pool.submit(lambda: kernel.preload(described).run)
        return True  # no launch

    device = torch.cuda.current_device()
    with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        usual, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
        try:
            work()
        finally:
            knobs.runtime.jit_cache_hook = usual
        yield
    for future in made.values():
        future.result()


if knobs is not None:
    keep_in_one_place()
