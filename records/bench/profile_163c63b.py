"""The kernels of a step before the model had its own, as a line for trainer.jsonl; on one GPU:

git worktree add /tmp/old 163c63b && cd /tmp/old
PYTHONPATH=. python $OLDPWD/records/bench/profile_163c63b.py
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import train_gpt
from data.shards import write_shard

COMMAND = (
    "git worktree add /tmp/old 163c63b && cd /tmp/old && "
    "PYTHONPATH=. python $OLDPWD/records/bench/profile_163c63b.py"
)
STEPS = 3


def main() -> None:
    config = train_gpt.Config(optimizer="muon")
    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    for split, count in (("train", 12 * config.batch_tokens), ("val", config.val_tokens)):
        tokens = rng.integers(0, 50257, count + 2, dtype=np.uint16)
        write_shard(folder / f"random_{split}_000000.bin", tokens)
    config = dataclasses.replace(config, data=str(folder), wrap=True)
    world = train_gpt.World(0, 1, train_gpt.choose_device("cuda"))
    trainer = train_gpt.Trainer(config, world, *train_gpt.check_data(config))
    trainer.warm_up()
    trainer.reset(1)
    batches = train_gpt.train_batches(trainer.shards, config, 0, 1)
    for step in range(5):
        loss = trainer.step(step, next(batches))
    assert loss.isfinite()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as recorder:
        for step in range(STEPS):
            trainer.step(step, next(batches))
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    found = [e for e in recorder.key_averages() if e.device_type == cuda]
    rows = [
        (e.self_device_time_total / 1000 / STEPS, e.count / STEPS, e.key)
        for e in found
        if not e.is_user_annotation
    ]
    facts = dict(
        bench="profile",
        device=torch.cuda.get_device_name(),
        gpus=1,
        torch=torch.__version__,
        commit="163c63b6756a18ff544076c9f01fdac736a75e35",
        command=COMMAND,
        preset="track3",
        optimizer="muon",
        batch_tokens=config.batch_tokens,
    )
    top = [(round(ms, 3), calls, name) for ms, calls, name in sorted(rows, reverse=True)[:15]]
    print(json.dumps(facts | dict(kernels=top, kernels_ms=round(sum(r[0] for r in rows), 2))))


if __name__ == "__main__":
    main()
