"""Writes logs: the flattened source, the environment, then a line for each event.

log.py reads them and documents the grammar. Torch and the standard library only, as every log
holds this file.
"""

import ast
import hashlib
import importlib.util
import json
import math
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from .crossing import crossing

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


def check_outputs(
    log: str, checkpoint: str, seeds: Sequence[int], wandb: bool
) -> dict[int, tuple[Path, Path | None]]:
    """Return the log and the checkpoint of each seed; of several trials, names hold the seeds.

    Raises ValueError if a log would be overwritten, or an output cannot be written.
    """

    def path_of(name: str, seed: int) -> Path:
        path = Path(name)
        return path.with_suffix(f".seed{seed}{path.suffix}") if len(seeds) > 1 else path

    log, paths = log or f"logs/{uuid.uuid4()}.txt", {}
    for seed in seeds:
        path, saved = path_of(log, seed), path_of(checkpoint, seed) if checkpoint else None
        if path.exists() or any(parent.is_file() for parent in path.parents):
            raise ValueError(f"{path} exists already or lies below a file: choose another --log")
        if saved and saved.is_dir():
            raise ValueError(f"{saved} is no file: choose another --checkpoint")
        paths[seed] = path, saved
    if wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs a package that is not installed: run pip install wandb")
    return paths


class Log:
    """One trial's file, console and, on request, Weights & Biases page.

    Args:
        path: the file to write, which must not exist; None: write nothing at all (other ranks).
        script, source: the running script and its flattened text.
        config: the run's settings, with "preset", "optimizer", "steps" and "target".
        seed, device, world_size: of this trial and its machine.
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
        wandb: bool = False,
        **facts: object,
    ) -> None:
        self.path, self.config, self.seed, self.file, self.wandb = path, config, seed, None, None
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
        if wandb:
            import wandb as client

            self.wandb = client.init(project="aurora-speedrun", name=path.stem, config=meta)

    def say(self, text: str, file: bool = True, console: bool = True) -> None:
        if self.file:
            if console:
                print(text, flush=True)
            self.file.write(text + "\n" if file else "")

    def record(self, key: str, console: bool = True, **values: object) -> None:
        """Write `key: {values as JSON}`."""
        text = json.dumps(values, default=str)
        self.say(f"{key}: {text}", console=console)
        if self.wandb:
            self.wandb.summary[key] = text

    def step(self, step: int, seconds: float, val_loss: float | None = None) -> None:
        """Write a validated step; a step without a loss goes to the console only, with the time
        left in minutes and seconds."""
        average, steps = seconds / step if step else math.nan, self.config["steps"]
        times = f"train_time:{seconds:.3f}s step_avg:{1000 * average:.2f}ms"
        if val_loss is None:
            left = round(average * (steps - step))
            self.say(f"step:{step}/{steps} {times} left:{left // 60}:{left % 60:02}", file=False)
            return
        self.say(f"step:{step}/{steps} val_loss:{val_loss:.5f} {times}")
        if self.wandb:
            self.wandb.log({"val_loss": val_loss, "train_time": seconds}, step=step)

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
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.record("end", status=status, peak_gib=peak, **facts)

    def close(self, status: str, step: int, loss: float, seconds: float) -> None:
        """Say on the console how the trial ended, and close the log."""
        target = self.config["target"]
        verdict = "reached" if loss <= target else "missed"
        self.say(
            f"{self.config['optimizer']}, seed {self.seed}: {status}, {step} steps in "
            f"{seconds:.1f} s; loss {loss:.5f}, target {target:.5f} {verdict}; "
            f"the log is {self.path}",
            file=False,
        )
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()
