"""Time whole training steps of a preset: data, forward, backward, optimizer, logging of steps.

    python tools/bench_trainer.py [--optimizer aurora] [--preset track3]
    torchrun --standalone --nproc_per_node=2 tools/bench_trainer.py

    python tools/bench_trainer.py --profile 2                       # a trace, the top 15 kernels
    python tools/bench_trainer.py --expansions 4 8 16 --widths 768 1024 1536   # larger models

The tokens are random; shards of the real format hold them in a temporary folder. Each size prints
one line and appends it to logs/bench/trainer.jsonl. With --out records/bench/trainer.jsonl it is
for the pages, which `python -m records.pages` then writes anew.

    start_s         seconds from the start of the process to the first timed step
    optimizer_ms    time of the optimizer's part of a step, with gradients already in place
    comm_ms         exposed communication of the matrix optimizer: the time of a step minus that of
                    a step without its collectives (measured in alternating blocks)
    bytes_per_rank  bytes that each rank sends for the matrix optimizer in a step
    ranks_agree     true if all ranks hold the same parameters, bit for bit, after `steps` steps;
                    otherwise the bench fails. --check-ranks makes at least 200 steps
    graphs          true if CUDA graphs replayed the microbatches; peak_gib counts their memory
    caches          "warm" if there was any compiled code at the start, otherwise "cold"
    kernels         with --profile, the top 15: ms in a step, calls in a step, name
    kernels_ms      with --profile, the ms of all kernels in a step
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

if __name__ == "__main__":
    from records.missing import explain_missing

    explain_missing()

import train_gpt  # noqa: E402, I001 (first: its clock starts before torch is imported)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from bench_optimizers import OUT, append_line, commit, seconds_of  # noqa: E402
from data.loader import open_shards, train_batches  # noqa: E402
from data.shards import write_shard  # noqa: E402
from models.world import World, choose_device  # noqa: E402
from torch import Tensor  # noqa: E402

from optimizers import slot  # noqa: E402


def caches() -> str:
    """Return "warm" if Triton's or Inductor's cache holds compiled code, otherwise "cold"."""
    usual = {
        "TRITON_CACHE_DIR": Path.home() / ".triton/cache",
        "TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir(), f"torchinductor_{getuser()}"),
    }
    folders = (Path(os.environ.get(name, folder)) for name, folder in usual.items())
    return "warm" if any(f.is_dir() and any(f.iterdir()) for f in folders) else "cold"


def make_shards(folder: Path, config: train_gpt.Config, steps: int) -> None:
    """Write random tokens, enough for the steps and one validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", (steps + 1) * config.batch_tokens), ("val", config.val_tokens)):
        tokens = rng.integers(0, min(config.vocab_size, 50257), count + 2, dtype=np.uint16)
        write_shard(folder / f"random_{split}_000000.bin", tokens)


class Done:
    """The work handle of a collective that did not run."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def without_communication(rank: int) -> Iterator[None]:
    """Replace the slot's collectives: a rank keeps its own gradients and weights."""

    def keep(received: Tensor, send: Tensor, async_op: bool, group: object = None) -> Done:
        received.copy_(send.split(len(received))[rank])
        return Done()

    names = "reduce_scatter_single", "reduce_scatter_tensor"  # torch 2.13 and before
    with (
        mock.patch.object(dist, next(name for name in names if hasattr(dist, name)), keep),
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
    """Measure the exposed communication of a step. The ranks' parameters differ afterwards."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(5):
        for silent in times:
            rank = trainer.world.rank
            with without_communication(rank) if silent else contextlib.nullcontext():
                times[silent].append(seconds_per_step(trainer, batches, range(1, steps + 1)))
    return statistics.median(times[False]) - statistics.median(times[True])


def measure(config: train_gpt.Config, world: World, args: argparse.Namespace) -> dict:
    sizes = config.steps, config.batch_tokens, config.val_tokens, config.vocab_size
    data = open_shards(config.data, config.get_data, *sizes, config.wrap)
    trainer = train_gpt.Trainer(config, world, *data)
    trainer.warm_up()
    trainer.reset(config.seed)
    start_s = time.perf_counter() - train_gpt.STARTED
    batches = train_batches(trainer.shards, config.batch_tokens, world.rank, world.size)
    steps = max(args.bench_steps, 200 * args.check_ranks)
    trainer.step(0, next(batches))
    step_s = seconds_per_step(trainer, batches, range(1, steps + 1))
    peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
    if not torch.isfinite(trainer.step(steps, next(batches))):
        raise SystemExit(f"bench_trainer.py: the loss is not finite after {steps} steps")
    if not (agree := world.same(list(trainer.model.parameters()))):
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
        optimizer_s.append(seconds_of(lambda: trainer.optimizer.step(1), world.device))
    optimizer_ms = 1000 * sorted(optimizer_s)[3]
    comm_s = exposed_seconds(trainer, batches, min(steps, 8)) if world.size > 1 else 0.0
    facts = dict(
        tokens_per_s=config.batch_tokens / step_s,
        step_ms=1000 * step_s,
        peak_gib=peak,
        start_s=start_s,
        optimizer_ms=optimizer_ms,
        comm_ms=1000 * comm_s,
        microbatch_rows=trainer.microbatches.rows,
    )
    facts = {key: float(f"{value:.6g}") for key, value in facts.items()}
    sent = sum(trainer.optimizer.matrix.traffic().values())
    facts |= dict(bytes_per_rank=sent, steps=steps + 2, ranks_agree=agree)
    return facts | dict(graphs=trainer.microbatches.graphs is not None) | kernels


Row = tuple[float, float, str]  # ms in a step, calls in a step, name


def profile(step: Callable[[], None], steps: int, world: World, trace: Path) -> list[Row]:
    """Run steps; rank 0 writes their trace (chrome://tracing) and prints the slowest kernels."""
    on_gpu, activity = world.device.type == "cuda", torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
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
    """Return the GPU's kernels (without a GPU, the CPU's operators), slowest first."""
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    device_type = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found = [event for event in averages if event.device_type == device_type]
    found = [event for event in found if not event.is_user_annotation]  # these contain kernels
    rows = [(getattr(e, key) / 1000 / steps, e.count / steps, e.key) for e in found]
    return sorted(rows, reverse=True)


def grow(config: train_gpt.Config, world: World, args: argparse.Namespace) -> None:
    """Report each MLP expansion at the preset's width, then each width at expansion 4."""
    sizes = [(expansion, config.width) for expansion in args.expansions]
    for expansion, width in sizes + [(4, width) for width in args.widths]:
        torch.compiler.reset()
        grown = dataclasses.replace(config, width=width, expansion=expansion)
        facts = measure(grown, world, args)
        del facts["start_s"]  # it belongs to the process, not to this model
        facts |= dict(expansion=expansion, width=width, layers=config.layers)
        share = facts["optimizer_ms"] / facts["step_ms"]
        report("growth", config, world, args, facts | dict(optimizer_share=float(f"{share:.3g}")))
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def report(
    bench: str,
    config: train_gpt.Config,
    world: World,
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
    parser.add_argument("--check-ranks", action="store_true", help="make at least 200 steps")
    parser.add_argument("--out", type=Path, default=OUT / "trainer.jsonl")
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
    world = World(rank, size, choose_device(config.device))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"bench_trainer_{run_id}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        make_shards(folder, config, min(args.bench_steps, 40) + 2)  # more steps read them again
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
