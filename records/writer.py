"""Writes logs: the flattened source, the environment, then a line for each event.

log.py reads them and documents the grammar. Torch and the standard library only, as every log
holds this file.
"""

import ast
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from .crossing import crossing
from .progress import Arrivals, Progress
from .trackers import Trackers, check_trackers

RULE, MARKER = "=" * 100, "# ==================== "

####################################################################################################
#                                             Source                                               #
####################################################################################################


def flatten(script: Path) -> str:
    """Return the script behind the modules beside it that it imports: one text that runs alone.

    Imports of these modules stay, behind '#| ', so that the tree can be restored; a flattened
    script is returned unchanged. Raises ValueError if two modules define one name or import one
    name from two places, as in one text the second would replace the first, and if a module is
    imported in any other way than `from module import names` at the top level, without `as`.
    """
    if (text := script.read_text()).startswith(MARKER):
        return text
    sections: dict[Path, str] = {}
    origins: dict[str, tuple[str, Path]] = {}  # name: what it is, and the module that says so

    def claim(name: str, origin: str, path: Path) -> None:
        before, module = origins.setdefault(name, (origin, path))
        if before != origin:
            raise ValueError(f"{name} is {before} ({module}) and {origin} ({path}): rename one")

    def add(path: Path) -> None:
        lines = path.read_text().splitlines()
        tree = ast.parse("\n".join(lines))
        for node in ast.walk(tree):
            if imported_module(node, path, script.parent):
                plain = isinstance(node, ast.ImportFrom) and not any(a.asname for a in node.names)
                if not plain or node not in tree.body:
                    wanted = "from ... import ..., at the top level and without as"
                    raise ValueError(f"{path}, line {node.lineno}: import own modules by {wanted}")
        for node in tree.body:
            module = imported_module(node, path, script.parent)
            if module is None:
                for name, origin in top_level_names(node):
                    claim(name, origin or f"defined in {path}", path)
                continue
            if module not in sections:
                add(module)
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = "#| " + lines[i]
        title = f"{MARKER}{path.relative_to(script.parent)} ===================="
        sections[path] = "\n".join([title, *lines, ""])

    add(script)
    return "".join(sections.values())


def imported_module(node: ast.AST, path: Path, root: Path) -> Path | None:
    """Return the file beside the script from which this statement imports, if it does."""
    if isinstance(node, ast.ImportFrom):
        modules = [(path.parent if node.level else root, node.module or "")]
    else:
        modules = [(root, a.name) for a in node.names] if isinstance(node, ast.Import) else []
    for folder, name in modules:
        base = folder / name.replace(".", "/")
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def top_level_names(node: ast.AST) -> list[tuple[str, str]]:
    """Return the names that a statement of a module defines, with their origin if imported."""
    if isinstance(node, ast.Try | ast.If):  # as around imports of packages that may be missing
        handlers = [s for handler in getattr(node, "handlers", []) for s in handler.body]
        found, other = (
            [pair for statement in part for pair in top_level_names(statement)]
            for part in (node.body, [*node.orelse, *handlers])
        )
        return found + [pair for pair in other if pair[0] not in dict(found)]
    if isinstance(node, ast.ImportFrom):
        return [(a.asname or a.name, f"from {node.module} import {a.name}") for a in node.names]
    if isinstance(node, ast.Import):  # `import a.b` binds a
        whole = [a.name if a.asname else a.name.partition(".")[0] for a in node.names]
        return [(a.asname or w, f"import {w}") for a, w in zip(node.names, whole, strict=True)]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [(node.name, "")]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    names = [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]
    return [(name, "") for name in names]


def output_of(*command: str, folder: Path) -> str:
    """Return the output of a command run in a folder; nothing if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


####################################################################################################
#                                               Log                                                #
####################################################################################################


def check_outputs(config: dict) -> dict[int, tuple[Path, Path | None]]:
    """Return the log and the checkpoint of each trial, by seed.

    Default logs are named after preset, optimizer, seed and time; with one name for several trials,
    each file has its seed in its name. Raises ValueError if an output would overwrite another file
    or cannot be written.
    """
    log, checkpoint, first = config["log"], config["checkpoint"], config["seed"]
    name = f"{config['preset']}_{config['optimizer']}_seed{{}}_{time.strftime('%Y%m%d_%H%M%S')}"

    def path_of(given: str, seed: int) -> Path:
        path = Path(given or f"logs/{name.format(seed)}.txt")
        several = given and config["trials"] > 1
        return path.with_suffix(f".seed{seed}{path.suffix}") if several else path

    paths = {}
    for seed in range(first, first + config["trials"]):
        path, saved = path_of(log, seed), path_of(checkpoint, seed) if checkpoint else None
        if path.exists() or any(parent.is_file() for parent in path.parents):
            raise ValueError(f"{path} exists already or lies below a file: choose another --log")
        if saved and saved.is_dir():
            raise ValueError(f"{saved} is no file: choose another --checkpoint")
        if saved and saved.resolve() == path.resolve():
            raise ValueError(f"{path} is both --log and --checkpoint: choose two names")
        for flag, output in (("--log", path), ("--checkpoint", saved)):
            folder = output and next(parent for parent in output.parents if parent.exists())
            if folder and not os.access(folder, os.W_OK):
                raise ValueError(f"{output} cannot be written in {folder}: choose another {flag}")
        paths[seed] = path, saved
    check_trackers(config)
    return paths


def say_interrupted(paths: dict[int, tuple[Path, Path | None]], rank: int) -> int:
    """Say on rank 0 what was saved and how to go on; returns the exit code of Ctrl-C."""
    if rank > 0:
        return 130
    saved = [str(path) for _, path in paths.values() if path and path.is_file()]
    found = f"{', '.join(saved)} saved: the same command with another --log resumes"
    nothing = "nothing saved: --checkpoint FILE saves at each validation"
    print(f"\ntrain_gpt.py: interrupted; {found if saved else nothing}", file=sys.stderr)
    return 130


SENTENCES = {  # said on the console for these records
    "resumed": "resumed from {checkpoint} at step {step}",
    "nonfinite": "step {step}: gradients were not finite, in so many steps: {gradients}",
    "target": "target {loss} reached at step {step}, by interpolation at {crossing_step} "
    "after {crossing_time} s",
}


class Log:
    """One trial's file, console and, on request, pages of trackers.

    Args:
        path: the file to write, which must not exist; None: write nothing at all (other ranks).
        script, source: the running script and its flattened text.
        config: the run's settings, with "preset", "optimizer", "steps", "batch_tokens", "target".
        seed, device, world_size: of this trial and its machine.
        peak: tokens per second at which the devices' matmuls would run at their peak; 0: unknown.
        expected_s: seconds of training to expect; 0: unknown.
        facts: more values for the `meta:` line.
    """

    def __init__(
        self,
        path: Path | None,
        script: Path,
        source: str,
        config: dict,
        seed: int,
        device: str,
        world_size: int,
        peak: float = 0.0,
        expected_s: float = 0.0,
        **facts: object,
    ) -> None:
        self.path, self.config, self.seed, self.file = path, config, seed, None
        self.progress = Progress(config["steps"], config["batch_tokens"], world_size, peak)
        self.measures, self.quiet = Arrivals(), config.get("quiet", False)
        if path is None:
            return
        git = dict(folder=script.parent)
        commit = output_of("git", "rev-parse", "HEAD", f"HEAD:./{script.name}", **git).split()
        changes = output_of("git", "status", "--porcelain", "-uno", **git)
        meta = facts | dict(
            format=1,
            preset=config["preset"],
            optimizer=config["optimizer"],
            seed=seed,
            config=config,
            code_sha256=hashlib.sha256(source.encode()).hexdigest(),
            commit=commit[0] if commit else "unknown",
            dirty=bool(changes) if commit else None,
            device=device,
            world_size=world_size,
            torch=torch.__version__,
        )
        versions = f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}), Python {sys.version}"
        running = f"Running {versions} on {device} with world_size {world_size}"
        header = [RULE, running, output_of("nvidia-smi", **git), f"meta: {json.dumps(meta)}", RULE]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("x", buffering=1)
        self.file.write(source + "\n".join(filter(None, header)) + "\n")
        size = f"{config['steps']} steps of {config['batch_tokens']:,} tokens"
        self.say(f"{config['preset']}, {config['optimizer']}, seed {seed}: {size}", file=False)
        self.say(f"on {world_size} x {device}; log: {path}", file=False)
        for part, kernel in facts.get("kernels", {}).items():
            self.say(f"{part}: {kernel}", file=False)
        if expected_s:
            self.say(f"expected training time: about {duration(expected_s)}", file=False)
        self.trackers = Trackers(path.stem, meta)

    def say(self, text: str, file: bool = True, always: bool = False) -> None:
        """Print a line on the console, if that is not quiet, and write it to the log if `file`."""
        if self.file:
            self.progress.clear()
            if always or not self.quiet:
                print(text, flush=True)
            self.file.write(text + "\n" if file else "")

    def record(self, key: str, **values: object) -> None:
        """Write `key: {values as JSON}`; the console gets a sentence of SENTENCES, if any."""
        text = json.dumps(values, default=str)
        if self.file:
            self.file.write(f"{key}: {text}\n")
            if key != "train":
                self.trackers.summarise(key, text)
        if key in SENTENCES:
            self.say(SENTENCES[key].format(**values), file=False)

    def trained(self, step: int, seconds: float, loss: Tensor, lr_factor: float) -> None:
        """Show a step on the console: its summed loss on this rank, and its learning rate."""
        if self.file:
            self.write_measures()
            if not self.quiet:
                self.progress.show(step, seconds, loss, lr_factor)

    def measured(
        self, step: int, seconds: float, loss: Tensor, norms: Tensor, rates: dict[str, float]
    ) -> None:
        """Write the `train:` line of a step, once the device has computed it.

        loss () is summed over all ranks, norms (2, groups) are those of gradients and of the
        changes of weights, rates the learning rates of the groups in this order.
        """
        if self.file:
            speed = round(self.config["batch_tokens"] * step / seconds)
            facts = dict(train_time=round(seconds, 3), tokens_per_s=speed, peak_gib=peak_gib())
            values = torch.cat([loss.float().view(1), norms.flatten()])
            self.measures.expect(values, (step, facts | dict(lr=rates)))

    def write_measures(self, wait: bool = False) -> None:
        """Write the `train:` lines whose values have arrived, or wait for all of them."""
        for (loss, *norms), (step, facts) in self.measures.arrived(wait):
            rates = facts.pop("lr")
            facts = dict(train_loss=round(loss / self.config["batch_tokens"], 5)) | facts
            columns = norms[: len(rates)], norms[len(rates) :]
            for key, some in zip(("grad_norm", "update_norm"), columns, strict=True):
                facts[key] = {name: digits(x) for name, x in zip(rates, some, strict=True)}
            facts["lr"] = {name: digits(rate) for name, rate in rates.items()}
            self.record("train", step=step, **facts)
            self.trackers.log(step, facts)

    def validated(self, step: int, seconds: float, val_loss: float) -> None:
        """Write a validation, and what was measured before it."""
        self.write_measures(wait=True)
        average = 1000 * seconds / step if step else math.nan
        times = f"train_time:{seconds:.3f}s step_avg:{average:.2f}ms"
        self.say(f"step:{step}/{self.config['steps']} val_loss:{val_loss:.5f} {times}")
        if self.file:
            self.trackers.log(step, dict(val_loss=val_loss, train_time=seconds))

    def target(self, points: list[tuple[int, float, float]]) -> None:
        """Write the `target:` line if the last (step, loss, seconds) is the first to reach it."""
        target = self.config["target"]
        reached = crossing(points, target)
        if reached is None or reached.step != points[-1][0]:
            return
        step, seconds = reached.point
        self.record(
            "target",
            loss=target,
            step=reached.step,
            train_time=round(reached.seconds, 3),
            crossing_step=round(step, 1),
            crossing_time=round(seconds, 3),
        )

    def record_end(self, status: str, **facts: object) -> None:
        """Write the `end:` line, with the peak of CUDA memory (0 without CUDA)."""
        self.record("end", status=status, peak_gib=peak_gib(), **facts)

    def close(self, status: str, step: int, loss: float, seconds: float) -> None:
        """Say on the console how the trial ended and what comes next, and close the log."""
        target = self.config["target"]
        reached = f"target {target:.5f} {'reached' if loss <= target else 'missed'}"
        self.say(
            f"{self.config['optimizer']}, seed {self.seed}: {status}, {step} steps in "
            f"{seconds:.1f} s; loss {loss:.5f}, {reached if target else 'no target'}; "
            f"the log is {self.path}",
            file=False,
            always=True,
        )
        show, compare = (f"python -m records {word} {self.path}" for word in ("show", "compare"))
        self.say(f"next: {show}; {compare} OTHER_LOG", file=False)
        if self.file:
            self.file.close()
            self.trackers.close()


def digits(x: float) -> float:
    """Return a number with six significant digits."""
    return float(f"{x:.6g}")


def peak_gib() -> float:
    """Return the peak of allocated CUDA memory, 0 without CUDA."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 3)


def duration(seconds: float) -> str:
    """Return a time in the unit in which people plan."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
