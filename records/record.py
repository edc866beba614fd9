"""Compute the pages of a record folder from its logs; pack writes them and verify compares.

A record claims the first validated step at which the mean over all its runs passes the precision
rule of records/stats.py, or the last step if none does.
"""

import hashlib
import json
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from records.bundle import script_of
from records.caveats import warnings
from records.compare import interval, pair_table
from records.figures import gpus, look
from records.groups import Group, group, target_of
from records.run import Run
from records.stats import PRECISION, Precision, Summary, precision, summary
from records.table import markdown, number, p_value

RECORDS = Path(__file__).resolve().parent
FACTS = ("name", "date", "what", "baseline")  # people give these; all else is computed


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def problems_of(runs: list[Run]) -> list[str]:
    """Return the reasons why these runs make no record, one sentence each."""
    found = []
    for run in runs:
        if not {"config", "code_sha256", "argv"} <= run.meta.keys() or run.optim is None:
            return [
                f"{run.path}: found a log without config, code hash, arguments or optim line, "
                "expected one of train_gpt.py"
            ]
        if run.status != "complete" or run.final.step != run.total_steps:
            found.append(
                f"{run.path}: the run is {run.status} at step {run.final.step} of "
                f"{run.total_steps}, expected complete"
            )
        if "resumed" in run.extra:
            found.append(
                f"{run.path}: the run went on from a checkpoint, expected the log of a whole run"
            )
        if not all(isfinite(point.val_loss) for point in run.points):
            found.append(f"{run.path}: found a loss that is not finite")
        if sha256(run.script) != run.meta["code_sha256"]:
            found.append(f"{run.path}: code_sha256 is not the hash of the script above it")
    first, seeds = runs[0], [run.seed for run in runs]
    if not first.meta["config"]["target"]:
        found.append(f"{first.path}: found no target, expected a run with --target")
    found += [
        f"seed {seed} occurs {seeds.count(seed)} times, expected distinct seeds"
        for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1})
    ]
    curves = [[point.val_loss for point in run.points] for run in runs]
    found += [
        f"{run.path}: has the losses of another run, expected one log of each run"
        for i, run in enumerate(runs)
        if curves[i] in curves[:i]
    ]
    for run in runs[1:]:
        mine, others = (_settings(one) for one in (run, first))
        differ = [key for key in mine if mine[key] != others.get(key)]
        if differ:
            found.append(
                f"{run.path} and {first.path} differ in {', '.join(differ)}; expected the "
                "same code and settings apart from the seed"
            )
    return found


def _settings(run: Run) -> dict[str, Any]:
    return run.settings | {
        "code": run.meta["code_sha256"],
        "shards": run.meta.get("shards"),
        "hyperparameters": run.optim,
        "steps of validations": [point.step for point in run.points],
    }


def claim(runs: list[Run]) -> int:
    """Return the first validated step at which all runs' mean passes the rule, else the last."""
    target = runs[0].meta["config"]["target"]
    steps = [point.step for point in runs[0].points]
    passing = (
        step for step in steps if precision([run.loss_at(step) for run in runs], target).passes
    )
    return next(passing, steps[-1])


def baseline_of(name: str) -> tuple[Group, int]:
    """Return the runs and the claimed step of track_3#N or of a record folder below records/."""
    if "#" in name:
        return (found := group(name)), found.last_step()
    steps = json.loads((RECORDS / name / "record.json").read_text(encoding="utf-8"))["steps"]
    return Group(name, group(str(RECORDS / name)).runs), steps


def contents(logs: dict[str, Run], facts: dict, hashes: dict[str, str]) -> dict[str, str]:
    """Return the texts of README.md, record.json and submission.py.

    `logs` has the runs by their file names in the record, `facts` the name, date, what and baseline
    (or ""), and `hashes` the sha256 of the picture and of each log.
    """
    runs = list(logs.values())
    step, target = claim(runs), runs[0].meta["config"]["target"]
    losses = [run.loss_at(step) for run in runs]
    total, rule = summary(losses), precision(losses, target)
    record = {
        "format": 1,
        **{key: facts[key] for key in FACTS},
        "optimizer": runs[0].meta["optimizer"],
        "target": target,
        "steps": step,
        "n": total.n,
        "mean_loss": round(total.mean, 6),
        "sd": None if isnan(total.sd) else round(total.sd, 6),
        "statistic": round(rule.statistic, 6),
        "passes": rule.passes,
        "code_sha256": runs[0].meta["code_sha256"],
        "curves_sha256": hashes["curves.png"],
        "logs": {
            name: {
                "seed": run.seed,
                "code_sha256": run.meta["code_sha256"],
                "final_loss": run.final.val_loss,
                "sha256": hashes[name],
            }
            for name, run in logs.items()
        },
    }
    return {
        "README.md": _readme(logs, record, losses),
        "submission.py": script_of(runs[0]),
        "record.json": json.dumps(record, indent=1) + "\n",
    }


def _readme(logs: dict[str, Run], record: dict, losses: list[float]) -> str:
    run, step, target = next(iter(logs.values())), record["steps"], record["target"]
    total, rule = summary(losses), precision(losses, target)
    runs = f"{total.n} run{'s' if total.n > 1 else ''}"
    figures = [
        ["runs", f"{total.n}"],
        ["step", f"{step} of {run.total_steps}"],
        *_statistics(total, rule, target),
    ]
    torch = " and ".join(sorted({str(one.meta.get("torch", "unknown")) for one in logs.values()}))
    return "\n".join(
        [
            f"# {record['name']}",
            "",
            *([record["what"], ""] if record["what"] else []),
            f"{look(record['optimizer'])[0]}, {record['date']}: mean validation loss "
            f"{total.mean:.5f} at step {step}, {runs}; this {_verdict(rule)} the precision rule "
            f"of track 3 for a target of {target:.6g}.",
            "",
            "![Validation loss against steps](curves.png)",
            "",
            "## Statistics",
            "",
            markdown(["figure", "value"], figures),
            "## Runs",
            "",
            _run_table(logs, step, target),
            "## Settings",
            "",
            "Read back from the optimizers after step 1.",
            "",
            _hyperparameters(run),
            *_comparison(logs, record),
            "## Repeat",
            "",
            "[submission.py](submission.py) is the whole source with its arguments; `DIR` holds "
            f"the shards. Code sha256 `{record['code_sha256']}`, torch {torch}.",
            "",
            "```sh",
            *_commands(list(logs.values())),
            "```",
            "",
            "Written by `python -m records pack` from the logs that [record.json](record.json) "
            "names; `python -m records verify` compares.",
            "",
        ]
    )


def _statistics(total: Summary, rule: Precision, target: float) -> list[list[str]]:
    return [
        ["mean loss", f"{total.mean:.5f}"],
        ["sd", number(total.sd, ".5f")],
        ["95% t interval of the mean", interval(total, ".5f")],
        [f"({target:.6g} - mean) * sqrt(n)", f"{rule.statistic:.5f}"],
        [f"rule of track 3: {PRECISION} or more", _verdict(rule)],
        ["p (z, assumed sigma 0.0013)", p_value(rule.p)],
        ["p (Student's t)", p_value(rule.p_t)],
    ]


def _verdict(rule: Precision) -> str:
    return "passes" if rule.passes else "does **not** pass"


def _run_table(logs: dict[str, Run], step: int, target: float) -> str:
    rows = [
        [
            str(run.seed),
            f"{run.loss_at(step):.5f}",
            f"{run.final.val_loss:.5f}",
            _crossing(run, target),
            f"{run.final.train_time_s:.3f}",
            f"{run.final.step_avg_ms:.2f}",
            gpus(run.meta),
            f"[log]({name})",
        ]
        for name, run in logs.items()
    ]
    header = [
        "seed",
        f"loss at {step}",
        f"final ({next(iter(logs.values())).total_steps})",
        "steps to target (interpolated)",
        "train time (s)",
        "ms per step",
        "GPUs",
        "log",
    ]
    return markdown(header, rows)


def _comparison(logs: dict[str, Run], record: dict) -> list[str]:
    """Return the lines that compare the record with its baseline, if any, and its caveats."""
    target, lines = record["target"], []
    sized = [(Group(record["name"], list(logs.values())), record["steps"])]
    if record["baseline"]:
        sized.insert(0, baseline_of(record["baseline"]))
        target_of([one for one, _ in sized])  # refuses mixed targets
        header, (row,) = pair_table(sized, target)
        known = [list(pair) for pair in zip(header, row, strict=True) if pair[1] != "-"][1:]
        lines = [
            f"## Against {record['baseline']}",
            "",
            "Gains of this record are positive.",
            "",
            markdown(["figure", "value"], known),
        ]
    caveats = [f"- {warning}" for warning in warnings(sized, target)]
    return lines + (["## Caveats", "", *caveats, ""] if caveats else [])


def _hyperparameters(run: Run) -> str:
    rows = []
    for one in run.optim["groups"]:
        others = {
            key: value
            for key, value in one.items()
            if key not in ("name", "optimizer", "initial_lr")
        }
        text = ", ".join(
            f"{key} {value}"
            for key, value in others.items()
            if value is not None and value is not False
        )
        rows.append([one["name"], one["optimizer"], text])
    return markdown(["group", "optimizer", "hyperparameters"], rows)


def _crossing(run: Run, target: float) -> str:
    crossing = run.crossing(target)
    return "-" if crossing is None else (f"{crossing.step} ({number(crossing.exact_step, '.1f')})")


def _commands(runs: list[Run]) -> list[str]:
    size = runs[0].meta["world_size"]
    start = "python" if size == 1 else f"torchrun --standalone --nproc_per_node={size}"
    return [f"{start} submission.py --data DIR --seed {run.seed}" for run in runs]
