"""Triton's compilations: kept in one place, and made by threads while other work goes on.

Most of a compilation is done without Python's lock, but one after the other each kernel waits for
the one before it. A pass over the model that does not wait for them finds out which it needs.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.resources import files

import torch

try:
    from triton import knobs
except ImportError:  # a CPU build of torch comes without it
    knobs = None


def keep_in_one_place() -> None:
    """Where Triton looks, and the tool whose version is in its key: inductor changes both where it
    compiles, and not where it finds all in its own cache. The second run then compiled all other
    kernels once more, 7 s on an H100."""
    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
    if (ptxas := files("triton") / "backends/nvidia/bin/ptxas").is_file():
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


def make(kernel: object, described: str) -> None:
    """Compiles and loads a kernel (JITFunction) for the arguments described."""
    made = kernel.preload(described)
    with suppress(RuntimeError):  # the memory may be full: then the launch loads it
        _ = made.run


@contextmanager
def compiled_ahead(device: torch.device, work: Callable[[], object]) -> Iterator[None]:
    """On a GPU calls `work`, but launches no kernel of Triton that is not compiled: threads compile
    these while the body runs. What `work` computes is meaningless."""
    if knobs is None or device.type != "cuda":
        yield
        return
    keep_in_one_place()
    made: dict[str, Future] = {}

    def hook(*, fn: object, compile: dict, is_manual_warmup: bool, **_: object) -> bool:
        if is_manual_warmup:  # of a thread
            return False
        described = compile["specialization_data"]
        if described not in made:
            made[described] = pool.submit(make, fn.jit_function, described)
        return True  # no launch

    with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        usual, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
        try:
            work()
        finally:
            knobs.runtime.jit_cache_hook = usual
        yield
    for future in made.values():
        future.result()
