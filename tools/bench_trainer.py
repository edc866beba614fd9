"""Times whole training steps of a preset: data, forward, backward, optimizer, logging of steps.

    python tools/bench_trainer.py [--optimizer aurora] [--preset track3]
    torchrun --standalone --nproc_per_node=2 tools/bench_trainer.py

Tokens are random, in shards of the real format, made in a temporary folder. Prints one line and
appends it to records/bench/trainer.jsonl (or --out FILE). `start_s` counts from the start of the
process to the first timed step, `optimizer_ms` is the optimizer's part of the step.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
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


def measure(config: train_gpt.Config, world: train_gpt.World, steps: int) -> dict:
    trainer = train_gpt.Trainer(config, world, *train_gpt.check_data(config))
    trainer.warm_up()
    start_s = time.perf_counter() - train_gpt.STARTED
    trainer.reset(config.seed)
    batches = train_gpt.train_batches(trainer.shards, config, world.rank, world.size)
    trainer.step(0, next(batches))
    world.synchronize()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        trainer.step(step, next(batches))
    world.synchronize()
    step_s = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
    optimizer_s = []
    for _ in range(7):
        for p in trainer.model.parameters():
            p.grad = torch.randn_like(p)
        world.synchronize()
        optimizer_s.append(seconds_of(lambda: trainer.optimizer_step(1), world.device))
    facts = dict(
        tokens_per_s=config.batch_tokens / step_s, step_ms=1000 * step_s, peak_gib=peak,
        start_s=start_s, optimizer_ms=1000 * sorted(optimizer_s)[3],
        microbatch_rows=trainer.rows,
    )  # fmt: skip
    return {key: float(f"{value:.6g}") for key, value in facts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "records/bench/trainer.jsonl")
    args, rest = parser.parse_known_args()
    config = train_gpt.parse_config(rest)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = train_gpt.World(rank, size, train_gpt.choose_device(config.device))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"bench_trainer_{run_id}"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        make_shards(folder, config, args.bench_steps + 2)
    world.synchronize()
    config = dataclasses.replace(config, data=str(folder), wrap=True)
    facts = measure(config, world, args.bench_steps)
    if rank == 0:
        torchrun = f"torchrun --standalone --nproc_per_node={size}"
        launcher = [torchrun if dist.is_initialized() else "python"]
        line = dict(
            bench="trainer", device=world.device_name, gpus=size, torch=torch.__version__,
            commit=commit(),
            command=" ".join([*launcher, "tools/bench_trainer.py", *rest]),
            preset=config.preset, optimizer=config.optimizer, batch_tokens=config.batch_tokens,
            **facts,
        )  # fmt: skip
        print(line)
        append_line(args.out, line)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
