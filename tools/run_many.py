"""Train each optimizer with each seed: one process per run, one run at a time on every visible GPU.

    python tools/run_many.py --optimizers adamw muon --seeds 1 2 --out logs/first -- --preset prose

Arguments after -- go to the trainer, with {run} replaced by the run's name, for example in
--checkpoint {run}.pt. A run writes its log to OUT/muon_seed1.txt and its output to
OUT/muon_seed1.console. A second start skips complete runs, renames the logs of the others
(muon_seed1.txt.1) and trains these again. Ctrl-C ends all runs. The exit code is 1 if some logs are
incomplete, 2 for bad input and 130 after Ctrl-C.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from itertools import count, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from optimizers import OPTIMIZERS  # noqa: E402
from records.log import Run, parse_log  # noqa: E402
from records.writer import flatten  # noqa: E402

TRAINER = ROOT / "train_gpt.py"
OURS = {"--optimizer", "--seed", "--trials", "--log", "--log-file", "--eval"}  # refused after --


def complete(log: Path) -> Run | None:
    """Return the run of a log if it is complete, otherwise None."""
    try:
        return run if (run := parse_log(log)).status == "complete" else None
    except (FileNotFoundError, ValueError):
        return None


def plan(args: argparse.Namespace, rest: list[str]) -> dict[Path, list[str]]:
    """Return the trainer's arguments by log; ValueError if a complete log had others."""
    flags, runs, source = {w.partition("=")[0] for w in rest}, {}, flatten(TRAINER)
    if clash := flags & OURS:
        raise ValueError(f"{', '.join(sorted(clash))} after --: run_many.py sets these itself")
    if "--checkpoint" in flags and "{run}" not in " ".join(rest):
        raise ValueError("--checkpoint is one file for all runs: write {run} into its name")
    for name, seed in product(args.optimizers, args.seeds):
        log = args.out / f"{name}_seed{seed}.txt"
        words = ["--optimizer", name, "--seed", str(seed), "--log", str(log)]
        runs[log] = words = words + [word.replace("{run}", log.stem) for word in rest]
        if (run := complete(log)) and (run.meta.get("argv"), run.script) != (words, source):
            raise ValueError(f"{log} is of other arguments or code: choose another --out")
    return runs


def start(log: Path, words: list[str], gpu: str) -> subprocess.Popen:
    """Start a run on one GPU ("" is the CPU). Files of an earlier run are renamed, not deleted."""
    for path in (log, console := log.with_suffix(".console")):
        if path.exists():
            names = (path.with_name(f"{path.name}.{n}") for n in count(1))
            path.rename(next(name for name in names if not name.exists()))
    print(time.strftime("%X"), "start", log.stem, "on", f"GPU {gpu}" if gpu else "CPU", flush=True)
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    command = [sys.executable, "-u", str(TRAINER), *words]
    with console.open("x") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)


def train(runs: dict[Path, list[str]], gpus: list[str]) -> bool:
    """Train all incomplete runs; True if exit code 2 (bad flags or data) ended the queue."""
    waiting, running, refused = [log for log in runs if not complete(log)], {}, False
    try:
        while waiting or running:
            for gpu in [gpu for gpu in gpus if gpu not in running][: len(waiting)]:
                log = waiting.pop(0)
                running[gpu] = log, start(log, runs[log], gpu), time.monotonic()
            time.sleep(0.1)
            for gpu, (log, process, since) in list(running.items()):
                if (code := process.poll()) is not None:
                    waiting, refused = ([], True) if code == 2 else (waiting, refused)
                    said = log.with_suffix(".console").read_text(errors="replace").splitlines()
                    print(
                        f"{time.strftime('%X')} end {log.stem}, exit code {code},",
                        f"{time.monotonic() - since:.0f} s:",
                        *said[-1:],
                        flush=True,
                    )
                    del running[gpu]
    finally:
        for _, process, _ in running.values():
            process.terminate()  # this ends the trainer at once
            process.wait()
    return refused


def main(argv: list[str]) -> int:
    cut, found = [*argv, "--"].index("--"), torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="-- FLAGS go to the trainer"
    )
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument(
        "--gpus", type=int, choices=range(1, found + 1), help="use only so many of the visible GPUs"
    )
    parser.add_argument("--out", type=Path, default=Path("logs/run_many"), help="folder of logs")
    args, ids = parser.parse_args(argv[:cut]), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (ids.split(",") if ids else [str(n) for n in range(found)])[:found][: args.gpus]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / ".lock").open("w") as lock:  # a second run_many.py would rename our logs
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refused = train(runs := plan(args, argv[cut + 1 :]), gpus or [""])
    except (ValueError, OSError) as error:
        busy = isinstance(error, BlockingIOError)
        print("run_many.py:", f"{args.out} is in use" if busy else error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for log, run in (ended := {log: complete(log) for log in runs}).items():
        print(f"{log.stem:24}", f"{run.points[-1].val_loss:.5f}" if run else "failed")
    return 0 if all(ended.values()) else 2 if refused else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
