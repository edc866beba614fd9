"""Triton's compilations, moved into threads that run while other work goes on.

A compilation holds Python's lock for little of its time, yet each kernel waits for the one before
it, as its launch does. Here one pass over the model launches nothing and finds the kernels that it
needs; threads compile them at the same time. optimizers/ has no part in this.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.resources import files

import torch

try:
    from triton import knobs
except ImportError:  # CPU builds of torch come without Triton
    knobs = None


def keep_cache_key() -> None:
    """Fix the folder of Triton's cache and the ptxas whose version is part of its key.

    Inductor changes both when it compiles, but not when its own cache has everything: the second
    run of a program then compiled all other kernels again (7 s on an H100).
    """
    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
    if (ptxas := files("triton") / "backends/nvidia/bin/ptxas").is_file():
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


def compile_kernel(kernel: object, arguments: str) -> None:
    """Compile and load a kernel (JITFunction) for arguments as Triton describes them."""
    compiled = kernel.preload(arguments)
    with suppress(RuntimeError):  # if memory is full, the launch loads it
        _ = compiled.run


@contextmanager
def compiled_ahead(device: torch.device, work: Callable[[], object]) -> Iterator[None]:
    """Compile the Triton kernels of `work` in threads while the body runs, then wait for them.

    On a GPU `work` is called with every launch skipped whose kernel is not compiled, so its results
    are meaningless. On other devices only the body runs.
    """
    if knobs is None or device.type != "cuda":
        yield
        return
    keep_cache_key()
    compilations: dict[str, Future] = {}

    def hook(*, fn: object, compile: dict, is_manual_warmup: bool, **_: object) -> bool:
        if is_manual_warmup:  # a thread of ours compiles
            return False
        arguments = compile["specialization_data"]
        if arguments not in compilations:
            compilations[arguments] = pool.submit(compile_kernel, fn.jit_function, arguments)
        return True  # skips the launch

    with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        usual, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
        try:
            work()
        finally:
            knobs.runtime.jit_cache_hook = usual
        yield
    for future in compilations.values():
        future.result()
