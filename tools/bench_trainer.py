"""Times whole training steps of a preset: data, forward, backward, optimizer, logging of steps.

    python tools/bench_trainer.py [--optimizer aurora] [--preset track3]
    torchrun --standalone --nproc_per_node=2 tools/bench_trainer.py

Tokens are random, in shards of the real format, made in a temporary folder. Prints one line and
appends it to records/bench/trainer.jsonl (or --out FILE):

    start_s         from the start of the process to the first timed step
    optimizer_ms    the optimizer's part of the step, with gradients that are there already
    comm_ms         exposed communication of the matrix optimizer: a step's time less that of steps
                    in which its collectives are replaced by nothing (blocks of both in turn)
    bytes_per_rank  what each rank sends for it in a step
    ranks_agree     whether all ranks hold the same parameters, bit for bit, after `steps` steps;
                    where they do not, the bench fails. --check-ranks makes at least 200 steps
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
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


def measure(config: train_gpt.Config, world: train_gpt.World, steps: int) -> dict:
    trainer = train_gpt.Trainer(config, world, *train_gpt.check_data(config))
    trainer.warm_up()
    start_s = time.perf_counter() - train_gpt.STARTED
    trainer.reset(config.seed)
    batches = train_gpt.train_batches(trainer.shards, config, world.rank, world.size)
    trainer.step(0, next(batches))
    step_s = seconds_per_step(trainer, batches, range(1, steps + 1))
    peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
    if not (agree := trainer.ranks_agree()):
        raise SystemExit(f"bench_trainer.py: ranks hold different parameters after {steps} steps")
    optimizer_s = []
    for _ in range(7):
        for p in trainer.model.parameters():
            p.grad = torch.randn_like(p)
        world.synchronize()
        optimizer_s.append(seconds_of(lambda: trainer.optimizer_step(1), world.device))
    comm_s = exposed_seconds(trainer, batches, min(steps, 8)) if world.size > 1 else 0.0
    facts = dict(
        tokens_per_s=config.batch_tokens / step_s, step_ms=1000 * step_s, peak_gib=peak,
        start_s=start_s, optimizer_ms=1000 * sorted(optimizer_s)[3], comm_ms=1000 * comm_s,
        microbatch_rows=trainer.rows,
    )  # fmt: skip
    facts = {key: float(f"{value:.6g}") for key, value in facts.items()}
    sent = sum(trainer.matrix.traffic().values())
    return facts | dict(bytes_per_rank=sent, steps=steps + 1, ranks_agree=agree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench-steps", type=int, default=20)
    parser.add_argument("--check-ranks", action="store_true", help="make 200 steps or more")
    parser.add_argument("--out", type=Path, default=ROOT / "records/bench/trainer.jsonl")
    args, rest = parser.parse_known_args()
    steps = max(args.bench_steps, 200 * args.check_ranks)
    config = train_gpt.parse_config(rest)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = train_gpt.World(rank, size, train_gpt.choose_device(config.device))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"bench_trainer_{run_id}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        make_shards(folder, config, min(steps, 40) + 2)  # read again where there are more
    world.synchronize()
    config = dataclasses.replace(config, data=str(folder), wrap=True)
    facts = measure(config, world, steps)
    if rank == 0:
        torchrun = f"torchrun --standalone --nproc_per_node={size}"
        checks = ["--check-ranks"] if args.check_ranks else []
        launcher = [torchrun if dist.is_initialized() else "python"]
        line = dict(
            bench="trainer", device=world.device_name, gpus=size, torch=torch.__version__,
            commit=commit(),
            command=" ".join([*launcher, "tools/bench_trainer.py", *checks, *rest]),
            preset=config.preset, optimizer=config.optimizer, batch_tokens=config.batch_tokens,
            **facts,
        )  # fmt: skip
        print(line)
        append_line(args.out, line)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
