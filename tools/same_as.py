"""Checks that this checkout trains exactly as another commit does, on the CPU.

    python tools/same_as.py 90801fc [--optimizers muon aurora] [--presets demo tiny] [--ranks 1 2]
    python tools/same_as.py 90801fc --compiled --jobs 4             # the optimizers, compiled
    python tools/same_as.py path/to/another/checkout

For each optimizer, preset and number of ranks both trees train the same steps on the same tokens.
The weights must be equal bit for bit, and so must the loss columns of the logs. This checkout then
resumes the other's checkpoint from before the last ten steps, and must end at the same weights.
"tiny" is a bfloat16 model of two layers. Exit code 1 says that something differs.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from records.missing import explain_missing

    explain_missing()

import torch

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = ["adamw", "muon", "normuon", "unormuon", "aurora", "riemannian"]
TINY = dict(layers=2, width=64, head_dim=32, row_tokens=64, batch_tokens=512, dtype="bfloat16")
DRIVER = """
import shutil
import sys
from pathlib import Path
sys.path.insert(0, {tree!r})
import train_gpt
from optimizers.slot import MatrixOptimizer
train_gpt.PRESETS["tiny"] = dict(train_gpt.PRESETS["demo"], **{tiny!r})
if {compiled!r}:
    plain = MatrixOptimizer.__init__
    def compiled(self, params, **arguments):
        plain(self, params, **(arguments | dict(compile=True)))
    MatrixOptimizer.__init__ = compiled
replace = Path.replace
def keep(part, checkpoint):  # copies of all checkpoints: 0.saved, 1.saved, ...
    count = len(list(checkpoint.parent.glob("*.saved")))
    shutil.copy(part, checkpoint.with_name(f"{{count}}.saved"))
    return replace(part, checkpoint)
Path.replace = keep
sys.exit(train_gpt.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Yield a folder with the commit, or the folder that `commit` names."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    git, tree = ["git", "-C", str(ROOT), "worktree"], folder / "other"
    subprocess.run([*git, "add", "-q", "--detach", str(tree), commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def train(tree: Path, out: Path, ranks: int, compiled: bool, *flags: str) -> None:
    """Run the trainer of a tree; the log and the checkpoint are `out` with .txt and .pt."""
    out.parent.mkdir(parents=True, exist_ok=True)
    driver, log = out.with_suffix(".py"), out.with_suffix(".txt")
    driver.write_text(DRIVER.format(tree=str(tree), tiny=TINY, compiled=compiled))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
    outputs = ["--log-file", str(log), "--checkpoint", str(out.with_suffix(".pt"))]
    command = [sys.executable, *(launch if ranks > 1 else []), str(driver), *flags, *outputs]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        cwd=tree,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{tree} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def loss_column(log: Path) -> list[str]:
    """Return the validation losses of a log, as printed."""
    lines = [line.split() for line in log.read_text().splitlines() if line.startswith("step:")]
    return [words[1] for words in lines if words[1].startswith("val_loss:")]


def differences(before: Path, after: Path) -> list[str]:
    """Return the differences between two runs: names of weights, or the losses."""
    old, new = (torch.load(path.with_suffix(".pt"), mmap=True)["model"] for path in (before, after))
    found = sorted(old.keys() ^ new.keys())
    found += [name for name in old if name in new and not torch.equal(old[name], new[name])]
    columns = [loss_column(path.with_suffix(".txt")) for path in (before, after)]
    assert columns[1], f"{after} has no losses"
    tail = columns[0][-len(columns[1]) :]  # a resumed run has the last losses only
    return found + ([f"losses {columns}"] if tail != columns[1] else [])


def compare(tree: Path, folder: Path, args: argparse.Namespace, *case: object) -> str:
    """Train a case in both trees and resume; returns "equal" or the differences."""
    preset, optimizer, ranks = case
    before, after, resumed = (folder / name / "run" for name in ("before", "after", "resumed"))
    flags = ["--preset", preset, "--optimizer", optimizer, "--data", args.data, "--rows", "2"]
    flags += ["--val-tokens", "8192", "--val-every", "10", "--steps", "20"]
    train(tree, before, ranks, args.compiled, *flags)
    train(ROOT, after, ranks, args.compiled, *flags)
    resumed.parent.mkdir()
    shutil.copy(before.with_name("1.saved"), resumed.with_suffix(".pt"))  # of step 10
    train(ROOT, resumed, ranks, args.compiled, *flags)
    found = [
        f"{run.parent.name}: {name}"
        for run in (after, resumed)
        for name in differences(before, run)
    ]
    return ", ".join(found) or "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="the commit to compare with, or a folder that holds it")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--presets", nargs="+", default=["demo", "tiny"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--compiled", action="store_true", help="compile the matrix optimizers")
    parser.add_argument("--data", default=str(ROOT / "data/embedded"), help="a folder of shards")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    args = parser.parse_args()
    cases = list(product(args.presets, args.optimizers, args.ranks))
    failed = 0
    with tempfile.TemporaryDirectory() as name, checkout(args.commit, Path(name)) as tree:
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [
                pool.submit(compare, tree, Path(name, *map(str, case)), args, *case)
                for case in cases
            ]
            for case, future in zip(cases, futures, strict=True):
                verdict = future.result()
                failed += verdict != "equal"
                print(*case, "ranks:", verdict, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
