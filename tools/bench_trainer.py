"""Times whole training steps of a preset: data, forward, backward, optimizer, logging of steps.

    python tools/bench_trainer.py [--optimizer aurora] [--preset track3]
    torchrun --standalone --nproc_per_node=2 tools/bench_trainer.py

    python tools/bench_trainer.py --profile 2                       # a trace, the top 15 kernels
    python tools/bench_trainer.py --expansions 4 8 16 --widths 768 1024 1536   # how a step grows

Tokens are random, in shards of the real format, made in a temporary folder. Prints one line (for
each size) and appends it to records/bench/trainer.jsonl (or --out FILE):

    start_s         from the start of the process to the first timed step
    optimizer_ms    the optimizer's part of the step, with gradients that are there already
    comm_ms         exposed communication of the matrix optimizer: a step's time less that of steps
                    in which its collectives are replaced by nothing (blocks of both in turn)
    bytes_per_rank  what each rank sends for it in a step
    ranks_agree     whether all ranks hold the same parameters, bit for bit, after `steps` steps;
                    where they do not, the bench fails. --check-ranks makes at least 200 steps
    graphs          whether microbatches were replayed as CUDA graphs; peak_gib counts their memory
    caches          whether compiled code was there at the start, of any size: "cold" or "warm"
    kernels         with --profile: milliseconds in a step, calls in a step and name of the top 15;
                    kernels_ms of all
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from getpass import getuser
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import train_gpt  # noqa: E402, I001 (first: its clock starts before torch is imported)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from bench_optimizers import append_line, commit, seconds_of  # noqa: E402
from data.shards import write_shard  # noqa: E402
from torch import Tensor  # noqa: E402

from optimizers import collectives, slot  # noqa: E402


def caches() -> str:
    """Whether compiled code lies in Triton's or Inductor's cache: "cold" or "warm"."""
    usual = {
        "TRITON_CACHE_DIR": Path.home() / ".triton/cache",
        "TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir(), f"torchinductor_{getuser()}"),
    }
    folders = (Path(os.environ.get(name, folder)) for name, folder in usual.items())
    return "warm" if any(f.is_dir() and any(f.iterdir()) for f in folders) else "cold"


def make_shards(folder: Path, config: train_gpt.Config, steps: int) -> None:
    """Random tokens: enough for the steps and one validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", (steps + 1) * config.batch_tokens), ("val", config.val_tokens)):
        tokens = rng.integers(0, min(config.vocab_size, 50257), count + 2, dtype=np.uint16)
        write_shard(folder / f"random_{split}_000000.bin", tokens)


class Done:
    """The work handle of a collective that never was."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def without_communication(rank: int) -> Iterator[None]:
    """The slot's collectives are over at once: a rank keeps its gradients and its weights."""

    def keep(received: Tensor, send: Tensor) -> Done:
        received.copy_(send[rank])
        return Done()

    with (
        mock.patch.object(collectives, "reduce_scatter", keep),
        mock.patch.object(slot, "all_gather", lambda *_: Done()),
    ):
        yield


def seconds_per_step(trainer: train_gpt.Trainer, batches: Iterator[Tensor], steps: range) -> float:
    trainer.world.synchronize()
    started = time.perf_counter()
    for step in steps:
        trainer.step(step, next(batches))
    trainer.world.synchronize()
    return (time.perf_counter() - started) / len(steps)


def exposed_seconds(trainer: train_gpt.Trainer, batches: Iterator[Tensor], steps: int) -> float:
    """Of communication, in a step; afterwards the ranks hold different parameters."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(5):
        for silent in times:
            how = without_communication(trainer.world.rank) if silent else contextlib.nullcontext()
            with how:
                times[silent].append(seconds_per_step(trainer, batches, range(1, steps + 1)))
    return statistics.median(times[False]) - statistics.median(times[True])


def measure(config: train_gpt.Config, world: train_gpt.World, args: argparse.Namespace) -> dict:
    trainer = train_gpt.Trainer(config, world, *train_gpt.check_data(config))
    trainer.warm_up()
    trainer.reset(config.seed)
    start_s = time.perf_counter() - train_gpt.STARTED
    batches = train_gpt.train_batches(trainer.shards, config, world.rank, world.size)
    steps = max(args.bench_steps, 200 * args.check_ranks)
    trainer.step(0, next(batches))
    step_s = seconds_per_step(trainer, batches, range(1, steps + 1))
    peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
    if not torch.isfinite(trainer.step(steps, next(batches))):
        raise SystemExit(f"bench_trainer.py: the loss is not finite after {steps} steps")
    if not (agree := trainer.ranks_agree()):
        raise SystemExit(f"bench_trainer.py: ranks hold different parameters after {steps} steps")
    kernels = {}
    if args.profile:
        step = functools.partial(trainer.step, 1)
        rows = profile(lambda: step(next(batches)), args.profile, world, args.trace)
        kernels = dict(
            kernels=[(round(ms, 3), calls, name) for ms, calls, name in rows[:15]],
            kernels_ms=round(sum(ms for ms, _, _ in rows), 2),
        )
    optimizer_s = []
    for _ in range(7):
        for p in trainer.model.parameters():
            p.grad = torch.randn_like(p)
        world.synchronize()
        optimizer_s.append(seconds_of(lambda: trainer.optimizer_step(1), world.device))
    optimizer_ms = 1000 * sorted(optimizer_s)[3]
    comm_s = exposed_seconds(trainer, batches, min(steps, 8)) if world.size > 1 else 0.0
    facts = dict(
        tokens_per_s=config.batch_tokens / step_s,
        step_ms=1000 * step_s,
        peak_gib=peak,
        start_s=start_s,
        optimizer_ms=optimizer_ms,
        comm_ms=1000 * comm_s,
        microbatch_rows=trainer.rows,
    )
    facts = {key: float(f"{value:.6g}") for key, value in facts.items()}
    sent = sum(trainer.matrix.traffic().values())
    facts |= dict(bytes_per_rank=sent, steps=steps + 2, ranks_agree=agree)
    return facts | dict(graphs=trainer.graphs is not None) | kernels


Row = tuple[float, float, str]  # ms in a step, calls in a step, name


def profile(step: Callable[[], None], steps: int, world: train_gpt.World, trace: Path) -> list[Row]:
    """Runs steps; rank 0 writes their trace (chrome://tracing) and prints what took most time."""
    on_gpu, kinds = world.device.type == "cuda", torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]
    recorder = torch.profiler.profile(activities=activities)
    with recorder if world.rank == 0 else contextlib.nullcontext():
        for _ in range(steps):
            step()
        world.synchronize()
    if world.rank > 0:
        return []
    trace.parent.mkdir(parents=True, exist_ok=True)
    recorder.export_chrome_trace(str(trace))
    rows = kernel_rows(recorder.key_averages(), steps, on_gpu)
    print(f"{sum(ms for ms, _, _ in rows):.2f} ms of kernels in a step, the trace is {trace}")
    print(f"{'ms a step':>10} {'calls':>8}  kernel")
    for ms, calls, kernel in rows[:15]:
        print(f"{ms:10.3f} {calls:8.1f}  {kernel[:90]}")
    return rows


def kernel_rows(averages: Iterable, steps: int, on_gpu: bool) -> list[Row]:
    """The GPU's kernels, without a GPU the operators of the CPU; the most time first."""
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found = [event for event in averages if event.device_type == kind]
    found = [event for event in found if not event.is_user_annotation]  # they contain kernels
    rows = [(getattr(e, key) / 1000 / steps, e.count / steps, e.key) for e in found]
    return sorted(rows, reverse=True)


@contextlib.contextmanager
def mlp_expansion(expansion: int) -> Iterator[None]:
    """Models built inside have MLPs of `expansion` times their width."""
    usual = train_gpt.MLP
    train_gpt.MLP = functools.partial(usual, expansion=expansion)
    try:
        yield
    finally:
        train_gpt.MLP = usual


def grow(config: train_gpt.Config, world: train_gpt.World, args: argparse.Namespace) -> None:
    """A line for each MLP expansion at the preset's width, then for each width at expansion 4."""
    sizes = [(expansion, config.width) for expansion in args.expansions]
    for expansion, width in sizes + [(4, width) for width in args.widths]:
        torch.compiler.reset()
        grown = dataclasses.replace(config, width=width)
        with mlp_expansion(expansion):
            facts = measure(grown, world, args)
        del facts["start_s"]  # of the process, not of this model
        facts |= dict(expansion=expansion, width=width, layers=config.layers)
        share = facts["optimizer_ms"] / facts["step_ms"]
        report("growth", config, world, args, facts | dict(optimizer_share=float(f"{share:.3g}")))
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def report(
    bench: str,
    config: train_gpt.Config,
    world: train_gpt.World,
    args: argparse.Namespace,
    facts: dict,
) -> None:
    if world.rank > 0:
        return
    torchrun = f"torchrun --standalone --nproc_per_node={world.size}"
    launcher = torchrun if dist.is_initialized() else "python"
    line = dict(
        bench=bench,
        device=world.device_name,
        gpus=world.size,
        torch=torch.__version__,
        commit=commit(),
        command=" ".join([launcher, "tools/bench_trainer.py", *args.given]),
        preset=config.preset,
        optimizer=config.optimizer,
        batch_tokens=config.batch_tokens,
        caches=args.caches,
        **facts,
    )
    print(line)
    append_line(args.out, line)


def parse() -> tuple[argparse.Namespace, train_gpt.Config]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench-steps", type=int, default=20)
    parser.add_argument("--check-ranks", action="store_true", help="make 200 steps or more")
    parser.add_argument("--out", type=Path, default=ROOT / "records/bench/trainer.jsonl")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    parser.add_argument("--trace", type=Path, help="default: --out with .trace.json.gz")
    parser.add_argument("--expansions", type=int, nargs="+", default=[])
    parser.add_argument("--widths", type=int, nargs="+", default=[])
    args, rest = parser.parse_known_args()
    args.trace = args.trace or args.out.with_suffix(".trace.json.gz")
    args.given = ["--check-ranks"] if args.check_ranks else []
    for name in ("profile", "bench_steps"):
        if (value := getattr(args, name)) != parser.get_default(name):
            args.given += ["--" + name.replace("_", "-"), str(value)]
    for name in ("expansions", "widths"):
        sizes = getattr(args, name)
        args.given += [f"--{name}", *map(str, sizes)] if sizes else []
    args.given += rest
    args.caches = caches()
    return args, train_gpt.parse_config(rest)


def main() -> None:
    args, config = parse()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = train_gpt.World(rank, size, train_gpt.choose_device(config.device))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"bench_trainer_{run_id}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        make_shards(folder, config, min(args.bench_steps, 40) + 2)  # read again if more are made
    world.synchronize()
    config = dataclasses.replace(config, data=str(folder), wrap=True)
    if args.expansions or args.widths:
        grow(config, world, args)
    else:
        report("trainer", config, world, args, measure(config, world, args))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
