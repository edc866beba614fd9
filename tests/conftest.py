"""Offer all test files small shards, a tiny preset, and processes that are ranks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; threads that spin on busy cores cost x 60

import multiprocessing
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train_gpt
from data.loader import Shards, open_shards
from data.shards import write_shard

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    train_gpt.PRESETS["demo"],
    vocab_size=257,
    layers=2,
    width=32,
    head_dim=16,
    row_tokens=32,
    batch_tokens=512,
    val_tokens=512,
    val_every=2,
    steps=4,
    rows=2,
    sample_tokens=0,
)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two training shards and one for validation: byte tokens, partly predictable."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for name, size in (("train_000001", 9000), ("train_000002", 7000), ("val_000000", 5000)):
        tokens = np.cumsum(rng.integers(1, 4, size)) % 257
        write_shard(folder / f"tiny_{name}.bin", tokens.astype(np.uint16))
    return folder


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return arguments of a short run and append more; the current folder is empty."""
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    return lambda *more: ["--preset", "tiny", "--data", str(corpus), "--device", "cpu", *more]


def shards_of(config: train_gpt.Config) -> tuple[Shards, torch.Tensor]:
    """Return the training shards and the validation tokens of a run, as main opens them."""
    sizes = config.steps, config.batch_tokens, config.val_tokens, config.vocab_size
    return open_shards(config.data, config.get_data, *sizes, config.wrap)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank_main(task: Callable, rank: int, size: int, port: int, out: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        result = task(rank, size, *args)
    except BaseException:
        (out / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
    torch.save(result, out / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def on_ranks(size: int, task: Callable, out: Path, *args: Any, seconds: float = 120) -> list[Any]:
    """Run task(rank, size, *args) in `size` processes with torchrun's variables, return results.

    The processes are forked from a server that imported torch once. The task joins the group.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "pytest"])
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(task, rank, size, port, out, args))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
        if process.is_alive():
            process.kill()
    errors = "\n".join(path.read_text() for path in sorted(out.glob("error*")))
    if errors or any(process.exitcode for process in ranks):
        raise AssertionError(f"exit codes {[p.exitcode for p in ranks]}\n{errors}")
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(size)]


def in_fresh_python(*words: str, cwd: Path, **env: str) -> tuple[int, str, str]:
    """Run `python words...` without the variables of torchrun; returns code, stdout, stderr."""
    import subprocess

    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=kept | env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=170,
    )
    return done.returncode, done.stdout, done.stderr
