"""Times whole training steps of a preset: data, forward, backward, optimizer, logging of steps.

    python tools/bench_trainer.py [--optimizer aurora] [--preset track3]
    torchrun --standalone --nproc_per_node=2 tools/bench_trainer.py

    python tools/bench_trainer.py --profile 2                       # a trace, the top 15 kernels
    python tools/bench_trainer.py --expansions 4 8 16 --widths 768 1024 1536   # how a step grows

Tokens are random, in shards of the real format, made in a temporary folder. Prints one line (for
each size) and appends it to records/bench/trainer.jsonl (or --out FILE). `start_s` counts from the
start of the process to the first timed step, `optimizer_ms` is the optimizer's part of the step.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import train_gpt  # noqa: E402, I001 (first: its clock starts before torch is imported)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from bench_optimizers import append_line, commit, seconds_of  # noqa: E402
from data.shards import write_shard  # noqa: E402


def make_shards(folder: Path, config: train_gpt.Config, steps: int) -> None:
    """Random tokens: enough for the steps and one validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", (steps + 1) * config.batch_tokens), ("val", config.val_tokens)):
        tokens = rng.integers(0, min(config.vocab_size, 50257), count + 2, dtype=np.uint16)
        write_shard(folder / f"random_{split}_000000.bin", tokens)


def measure(config: train_gpt.Config, world: train_gpt.World, args: argparse.Namespace) -> dict:
    trainer = train_gpt.Trainer(config, world, *train_gpt.check_data(config))
    trainer.warm_up()
    start_s = time.perf_counter() - train_gpt.STARTED
    trainer.reset(config.seed)
    batches = train_gpt.train_batches(trainer.shards, config, world.rank, world.size)
    steps, passed = args.bench_steps, itertools.count()

    def step() -> None:
        trainer.step(next(passed), next(batches))

    step()
    world.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    world.synchronize()
    step_s = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
    if args.profile:
        profile(step, args.profile, world, args.trace)
    optimizer_s = []
    for _ in range(7):
        for p in trainer.model.parameters():
            p.grad = torch.randn_like(p)
        world.synchronize()
        optimizer_s.append(seconds_of(lambda: trainer.optimizer_step(1), world.device))
    optimizer_ms = 1000 * sorted(optimizer_s)[3]
    facts = dict(
        tokens_per_s=config.batch_tokens / step_s, step_ms=1000 * step_s, peak_gib=peak,
        start_s=start_s, optimizer_ms=optimizer_ms, microbatch_rows=trainer.rows,
    )  # fmt: skip
    return {key: float(f"{value:.6g}") for key, value in facts.items()}


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
    bench: str, config: train_gpt.Config, world: train_gpt.World, args: argparse.Namespace,
    facts: dict,
) -> None:  # fmt: skip
    if world.rank > 0:
        return
    torchrun = f"torchrun --standalone --nproc_per_node={world.size}"
    launcher = torchrun if dist.is_initialized() else "python"
    line = dict(
        bench=bench, device=world.device_name, gpus=world.size, torch=torch.__version__,
        commit=commit(), command=" ".join([launcher, "tools/bench_trainer.py", *args.given]),
        preset=config.preset, optimizer=config.optimizer, batch_tokens=config.batch_tokens, **facts,
    )  # fmt: skip
    print(line)
    append_line(args.out, line)


def parse() -> tuple[argparse.Namespace, train_gpt.Config]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "records/bench/trainer.jsonl")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    parser.add_argument("--trace", type=Path, help="default: --out with .trace.json.gz")
    parser.add_argument("--expansions", type=int, nargs="+", default=[])
    parser.add_argument("--widths", type=int, nargs="+", default=[])
    args, rest = parser.parse_known_args()
    args.trace = args.trace or args.out.with_suffix(".trace.json.gz")
    args.given = [
        word for name in ("expansions", "widths") if getattr(args, name)
        for word in (f"--{name}", *map(str, getattr(args, name)))
    ] + rest  # fmt: skip
    return args, train_gpt.parse_config(rest)


def main() -> None:
    args, config = parse()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = train_gpt.World(rank, size, train_gpt.choose_device(config.device))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"bench_trainer_{run_id}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        make_shards(folder, config, args.bench_steps + args.profile + 2)
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
