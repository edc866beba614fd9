"""Train each optimizer with each seed: one process per run, one run at a time on every visible GPU.

    python tools/run_many.py --optimizers adamw muon --seeds 1 2 --out logs/first -- --preset prose
    python tools/run_many.py --optimizers muon --seeds 1 --grid lr-scale=0.7,1 --grid fc.lr=.02,.03
    python tools/run_many.py --plan records/prose/plan.json --minutes 20 -- --data data/prose

Arguments after -- go to the trainer, with {run} replaced by the run's name, for example in
--checkpoint {run}.pt. A run writes its log to OUT/muon_seed1.txt and its output to
OUT/muon_seed1.console. A second start skips complete runs, renames the logs of the others
(muon_seed1.txt.1) and trains these again. Ctrl-C ends all runs; if the reader of a pipe leaves, as
in `| head`, the runs go on in silence. The exit code is 1 if some logs are incomplete, 2 for bad
input and 130 after Ctrl-C.

--grid NAME=VALUE,VALUE trains with each value, and several with each combination. NAME is a flag of
the trainer without its dashes, or with a dot a hyperparameter for --set. A name that begins with an
optimizer, such as muon.lr, counts for the runs of this optimizer only; adamw. is for all, as it
steps the embedding of every run. Logs are named by the values: muon_lr-scale0.7_lr.02_seed1.txt.

A plan is a JSON file of comparisons, worked off in their order and seed by seed, so that the arms
of a seed run beside each other. Logs are NAME/ARM_seed1.txt beside it; complete ones are skipped:

    {"flags": "--preset prose", "comparisons": [{"name": "rates", "question": "...",
     "flags": "--steps 600", "seeds": [1, 2], "arms": {"muon": "--optimizer muon"}}]}

--minutes starts no run that would end later, by the longest so far, and then ends those that are
left; with --checkpoint {run}.pt these are resumed the next time.
"""

import argparse
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from records.missing import explain_missing

    explain_missing()

import torch  # noqa: E402

from optimizers import OPTIMIZERS  # noqa: E402
from records.log import Run, parse_log  # noqa: E402
from records.writer import flatten  # noqa: E402

TRAINER = ROOT / "train_gpt.py"
GRID = re.compile(r"([a-zA-Z][\w.-]*)=([\w.+-]+(?:,[\w.+-]+)*)")
OURS = {"--optimizer", "--seed", "--trials", "--log", "--log-file", "--eval"}  # refused after --


def complete(log: Path) -> Run | None:
    """Return the run of a log if it is complete, otherwise None."""
    try:
        return run if (run := parse_log(log)).status == "complete" else None
    except (FileNotFoundError, ValueError):
        return None


def say(*words: object) -> None:
    """Print a line; if the reader of the pipe has left, print nothing from now on."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_grid(texts: list[str], optimizers: list[str], rest: list[str]) -> dict[str, list[str]]:
    """Return the values by name; ValueError if a text is not as above, or sets something twice."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        if not (match := GRID.fullmatch(text)):
            raise ValueError(f"--grid {text}: expected NAME=VALUE,VALUE, as in lr-scale=0.7,1")
        name, values = match[1], match[2].split(",")
        name = name if "." in name else name.replace("_", "-")
        if f"--{name}" in OURS | {"--checkpoint", "--set"}:
            raise ValueError(f"--grid {text}: --{name} cannot be swept; see run_many.py --help")
        if name in grid or len({*values}) < len(values):
            raise ValueError(f"--grid {text}: a name or a value is there twice, drop one of them")
        given = {word.removeprefix("--set=").partition("=")[0] for word in rest}
        if given & {name, f"--{name}"}:
            raise ValueError(f"--grid {text}: {name} stands after -- as well, drop one of them")
        if (owner := name.partition(".")[0]) in OPTIMIZERS and owner not in ("adamw", *optimizers):
            raise ValueError(f"--grid {text}: {owner} is not among --optimizers, add it there")
        grid[name] = values
    return grid


def points(grid: dict[str, list[str]], optimizer: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a part of the log's name and the trainer's arguments for each point of the grid."""
    others = {*OPTIMIZERS} - {optimizer, "adamw"}
    names = [name for name in grid if name.partition(".")[0] not in others]
    for values in product(*(grid[name] for name in names)):
        pairs = [*zip(names, values, strict=True)]
        label = "".join(f"_{name.removeprefix(f'{optimizer}.')}{value}" for name, value in pairs)
        words = [["--set", f"{n}={v}"] if "." in n else [f"--{n}", v] for n, v in pairs]
        yield label, sum(words, [])


def cross(args: argparse.Namespace, rest: list[str]) -> dict[Path, list[str]]:
    """Return the trainer's arguments by log; ValueError if flags or a complete log are wrong."""
    from train_gpt import parse_config  # imported here: a plan may be for another trainer

    runs, source = {}, flatten(TRAINER)
    grid = read_grid(args.grid, args.optimizers, rest)
    cases = [(name, *point) for name in args.optimizers for point in points(grid, name)]
    for (name, label, swept), seed in product(cases, args.seeds):
        log = args.out / f"{name}{label}_seed{seed}.txt"
        words = ["--optimizer", name, "--seed", str(seed), "--log", str(log), *swept]
        runs[log] = words = words + [word.replace("{run}", log.stem) for word in rest]
        parse_config(words)  # ValueError now, rather than after the runs before it
        if (run := complete(log)) and (run.meta.get("argv"), run.script) != (words, source):
            raise ValueError(f"{log} is of other arguments or code: choose another --out")
    return runs


def check_trainer_flags(rest: list[str]) -> None:
    """Raise ValueError if flags after -- are set by run_many.py, or name one file for all runs."""
    flags = {word.partition("=")[0] for word in rest}
    if clash := flags & OURS:
        raise ValueError(f"{', '.join(sorted(clash))} after --: run_many.py sets these itself")
    if "--checkpoint" in flags and "{run}" not in " ".join(rest):
        raise ValueError("--checkpoint is one file for all runs: write {run} into its name")


def read_plan(path: Path, rest: list[str]) -> dict[Path, list[str]]:
    """Return the trainer's arguments by log, in the plan's order.

    ValueError if the plan is not as described above, or if a complete log had other arguments.
    """
    try:
        plan = json.loads(path.read_text())
        cases = [
            (
                one["name"],
                arm,
                seed,
                f"{plan['flags']} {one['flags']} {flags} --seed {seed}".split(),
            )
            for one in plan["comparisons"]
            for seed in one["seeds"]
            for arm, flags in one["arms"].items()
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no plan ({found}); see run_many.py --help") from None
    runs = {}
    for comparison, arm, seed, words in cases:
        log = path.parent / comparison / f"{arm}_seed{seed}.txt"
        if (run := complete(log)) and run.meta.get("argv", [])[: len(words)] != words:
            raise ValueError(f"{log} had other arguments than the plan has now: rename one of them")
        log.parent.mkdir(exist_ok=True)
        name = f"{comparison}_{log.stem}"
        runs[log] = [*words, "--log", str(log), *(word.replace("{run}", name) for word in rest)]
    return runs


def start(log: Path, words: list[str], gpu: str) -> subprocess.Popen:
    """Start a run on one GPU ("" is the CPU). Files of an earlier run are renamed, not deleted."""
    for path in (log, console := log.with_suffix(".console")):
        if path.exists():
            names = (path.with_name(f"{path.name}.{n}") for n in count(1))
            path.rename(next(name for name in names if not name.exists()))
    say(time.strftime("%X"), "start", log.stem, "on", f"GPU {gpu}" if gpu else "CPU")
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    command = [sys.executable, "-u", str(TRAINER), *words]
    with console.open("x") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)


def train(runs: dict[Path, list[str]], gpus: list[str], minutes: float = math.inf) -> bool:
    """Train all incomplete runs; True if exit code 2 (bad flags or data) ended the queue."""
    waiting, running, refused = [log for log in runs if not complete(log)], {}, False
    until, longest = time.monotonic() + 60 * minutes, 0.0
    try:
        while waiting or running:
            if time.monotonic() + longest > until:
                waiting = []
            if time.monotonic() > until:
                break
            for gpu in [gpu for gpu in gpus if gpu not in running][: len(waiting)]:
                log = waiting.pop(0)
                running[gpu] = log, start(log, runs[log], gpu), time.monotonic()
            time.sleep(0.1)
            for gpu, (log, process, since) in list(running.items()):
                if (code := process.poll()) is not None:
                    waiting, refused = ([], True) if code == 2 else (waiting, refused)
                    longest = max(longest, time.monotonic() - since)
                    said = log.with_suffix(".console").read_text(errors="replace").splitlines()
                    seconds = f"{time.monotonic() - since:.0f} s:"
                    about = f"{time.strftime('%X')} end {log.stem}, exit code {code},"
                    say(about, seconds, *[line for line in said if "next: " not in line][-1:])
                    del running[gpu]
    finally:
        for _, process, _ in running.values():
            process.terminate()  # this ends the trainer at once
        for _, process, _ in running.values():
            process.wait()
    return refused


def main(argv: list[str]) -> int:
    cut, found = [*argv, "--"].index("--"), torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="-- FLAGS go to the trainer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument(
        "--grid", action="append", default=[], help="NAME=VALUE,VALUE, repeatable: sweep a setting"
    )
    parser.add_argument("--plan", type=Path, help="a file of comparisons, instead of these three")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end all runs after that")
    parser.add_argument(
        "--gpus", type=int, choices=range(1, found + 1), help="use only so many of the visible GPUs"
    )
    parser.add_argument("--out", type=Path, default=Path("logs/run_many"), help="folder of logs")
    args, ids = parser.parse_args(argv[:cut]), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (ids.split(",") if ids else [str(n) for n in range(found)])[:found][: args.gpus]
    if bool(args.plan) == bool(args.optimizers and args.seeds):
        parser.error("give --plan, or both --optimizers and --seeds")
    if args.plan and args.grid:
        parser.error("--grid needs --optimizers and --seeds; a plan names its runs itself")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out, rest = args.plan.parent if args.plan else args.out, argv[cut + 1 :]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") as lock:  # a second run_many.py would rename our logs
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check_trainer_flags(rest)
            runs = read_plan(args.plan, rest) if args.plan else cross(args, rest)
            refused = train(runs, gpus or [""], args.minutes)
    except (ValueError, OSError) as error:
        busy = isinstance(error, BlockingIOError)
        print("run_many.py:", f"{out} is in use" if busy else error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run_many.py: stopped; the same command trains what is missing", file=sys.stderr)
        return 130
    for log, run in (ended := {log: complete(log) for log in runs}).items():
        began = not args.plan or log.with_suffix(".console").exists()
        loss = f"{run.points[-1].val_loss:.5f}" if run else "failed" if began else "waiting"
        say(f"{log.parent.name}/{log.stem}" if args.plan else f"{log.stem:24}", loss)
    return 0 if all(ended.values()) else 2 if refused else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
