"""Tables of measurements, from the lines of records/bench/*.jsonl; written by records.report.

A line is one measurement, newest last; of several of one kind the newest is shown.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from records.figures import gpus, look
from records.table import markdown, number

ORIGIN = (("torch", "torch", ""), ("commit", "commit", ".7"))
OLDER = {"caches": "-", "graphs": False, "microbatch_rows": 0}  # what the first lines lack
HOW = {
    "growth": "python tools/bench_trainer.py --expansions 4 8 16 --widths 768 1024 1536",
    "ranks": "torchrun --standalone --nproc_per_node=2 tools/bench_trainer.py --check-ranks",
}
KERNELS = 80  # characters of a kernel's name
BENCHES = {  # of the README: what tells measurements apart, then a column per (title, key, format)
    "optimizers": (
        ("device",),
        (
            ("ms per step", "ms", ".2f"),
            ("rms of sigma - 1", "rms_sigma", ".2g"),
            ("CV of squared row norms", "row_sq_cv", ".2g"),
            ("peak MiB", "peak_mib", ".0f"),
        ),
    ),
    "trainer": (
        ("bench", "device", "gpus", "preset", "optimizer"),
        (
            ("rows", "microbatch_rows", ".0f"),
            ("tokens/s", "tokens_per_s", ",.0f"),
            ("ms per step", "step_ms", ".2f"),
            ("of these optimizer", "optimizer_ms", ".2f"),
            ("peak GiB", "peak_gib", ".1f"),
        ),
    ),
}
FULL = {
    "slot": (
        ("device", "command"),
        (
            ("shapes", "shapes", ""),
            ("ms per step", "ms", ".2f"),
            ("slowest", "ms_worst", ".2f"),
            ("first step (s)", "compile_s", ".1f"),
            ("rms of sigma - 1", "rms_sigma", ".2g"),
            ("to condition 800", "rms_sigma_800", ".2g"),
            ("CV of squared row norms", "row_sq_cv", ".3g"),
            ("of real momenta", "real_sq_cv", ".2g"),
            ("peak MiB", "peak_mib", ".0f"),
            *ORIGIN,
        ),
    ),
    "trainer": (
        (
            "device",
            "gpus",
            "preset",
            "optimizer",
            "batch_tokens",
            "microbatch_rows",
            "fp8",
            "graphs",
            "caches",
        ),
        (
            ("tokens a step", "batch_tokens", ","),
            ("rows", "microbatch_rows", ".0f"),
            ("tokens/s", "tokens_per_s", ",.0f"),
            ("ms per step", "step_ms", ".2f"),
            ("of these optimizer", "optimizer_ms", ".2f"),
            ("peak GiB", "peak_gib", ".2f"),
            ("start (s)", "start_s", ".1f"),
            ("caches", "caches", ""),
            ("graphs", "graphs", ""),
            *ORIGIN,
        ),
    ),
    "growth": (
        ("device", "gpus", "optimizer", "expansion", "width"),
        (
            ("MLP expansion", "expansion", ""),
            ("width", "width", ""),
            ("tokens/s", "tokens_per_s", ",.0f"),
            ("ms per step", "step_ms", ".1f"),
            ("of these optimizer", "optimizer_ms", ".2f"),
            ("share", "optimizer_share", ".1%"),
            ("peak GiB", "peak_gib", ".1f"),
            *ORIGIN,
        ),
    ),
}
MATRIX_BYTES = 84_934_656 * 4  # fp32, of the 72 matrices of the 124M model (aurora.md 5)
RANKS = (
    ("tokens a step", "batch_tokens", ","),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("of linear", "of_linear", ".1%"),
    ("ms per step", "step_ms", ".2f"),
    ("of these optimizer", "optimizer_ms", ".2f"),
    ("exposed communication", "comm_ms", ".2f"),
    ("MB sent per rank", "megabytes", ",.1f"),
    ("aurora.md 5", "predicted", ",.1f"),
    ("steps", "steps", ""),
    ("ranks agree", "ranks_agree", ""),
    ("commit", "commit", ".7"),
)


def newest(
    path: Path, keys: tuple[str, ...], bench: str, keep: Callable[[dict], bool] = bool
) -> list[dict]:
    """The last kept line of a bench in a JSONL file for each value of `keys`, sorted by them."""
    found: dict[tuple, dict] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for place, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            told = OLDER | entry
            told["fp8"] = "--fp8" in told.get("command", "")
            if entry["bench"] == bench and keep(entry):
                found[tuple(told[key] for key in keys)] = entry
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {place}: found '{line[:80]}', expected a JSON object "
                f"with {', '.join(keys)}; measure again or delete it"
            ) from error
    return [found[key] for key in sorted(found)]


def is_plain(entry: dict, more: frozenset = frozenset()) -> bool:
    """Measured at the preset's own settings, the optimizer apart."""
    flags = {word for word in entry["command"].split() if word.startswith("--")} - more
    return flags <= {
        "--standalone",
        "--nproc_per_node=" + str(entry.get("gpus", 1)),
        "--optimizer",
        "--preset",
        "--check-ranks",
        "--bench-steps",
        "--profile",
        "--momentum",
    }


def rows_of(entries: list[dict], columns: tuple, bench: str, brief: bool = False) -> str:
    """A row for each entry, or for each of its rows, and the commands that made them.

    brief: a word about them, for the README.
    """
    if not entries:
        return f"not measured yet: run `{HOW.get(bench, f'python tools/bench_{bench}.py')}`\n"
    rows = [entry | row for entry in entries for row in entry.get("rows", [entry])]
    cells = [
        [
            look(row.get("name", row.get("optimizer", "-")))[0]
            + (", FP8" if "--fp8" in row["command"] else ""),
            gpus(row),
            *(number(row.get(key), form) for _, key, form in columns),
        ]
        for row in rows
    ]
    commands = ", ".join(dict.fromkeys(f"`{entry['command']}`" for entry in entries))
    page = f"`tools/bench_{bench}.py` ([commands and commits](records/bench/README.md))"
    table = markdown(["optimizer", "GPUs", *(title for title, _, _ in columns)], cells)
    return f"{table}\nMade by {page if brief else commands}.\n"


def bench_table(root: Path, bench: str) -> str:
    """README: the newest measurement of each kind at a preset's own settings."""
    keys, columns = BENCHES[bench]
    entries = newest(root / f"records/bench/{bench}.jsonl", keys, bench, is_plain)
    return rows_of(entries, columns, bench, brief=True)


def full_table(root: Path, bench: str, kind: str) -> str:
    """The newest measurement of each kind, with more columns."""
    keys, columns = FULL[kind]
    name = "growth" if kind == "growth" else bench  # trainer.jsonl has both
    entries = newest(root / f"records/bench/{bench}.jsonl", keys, name)
    return rows_of(entries, columns, name)


def ranks_table(root: Path) -> str:
    """What N GPUs do in the time of one at the same commit, and what communication costs."""
    keys = ("device", "optimizer", "batch_tokens", "commit", "gpus")
    keep = partial(is_plain, more=frozenset({"--batch-tokens"}))
    entries = newest(root / "records/bench/trainer.jsonl", keys, "trainer", keep)
    kinds = [tuple(entry[key] for key in keys[:4]) for entry in entries]
    alone = {
        kind: e["tokens_per_s"] for kind, e in zip(kinds, entries, strict=True) if e["gpus"] == 1
    }
    rows = []
    for kind, entry in zip(kinds, entries, strict=True):
        one, count = alone.get(kind), entry["gpus"]
        if one is None or "bytes_per_rank" not in entry or kinds.count(kind) == 1:
            continue
        linear = entry["tokens_per_s"] / (count * one)
        sent, least = entry["bytes_per_rank"] / 1e6, 2 * (count - 1) / count * MATRIX_BYTES / 1e6
        rows.append(entry | dict(of_linear=linear, megabytes=sent, predicted=least))
    return rows_of(rows, RANKS, "ranks")


def kernels_table(root: Path) -> str:
    """The 15 kernels that took most of a step, of each commit that was profiled."""
    text = ""
    path = root / "records/bench/trainer.jsonl"
    keys = "device", "optimizer", "commit", "command"
    entries = [entry for bench in ("profile", "trainer") for entry in newest(path, keys, bench)]
    for entry in entries:  # "profile": by code that had no --profile
        if "kernels" not in entry:
            continue
        rows = [
            [f"{ms:.2f}", f"{calls:g}", f"`{kernel[:KERNELS]}`"]
            for ms, calls, kernel in entry["kernels"]
        ]
        text += f"Commit {entry['commit'][:7]}, {look(entry['optimizer'])[0]}, {gpus(entry)}: "
        text += f"{entry['kernels_ms']:.1f} ms of kernels in a step (`{entry['command']}`).\n\n"
        text += markdown(["ms a step", "calls", "kernel"], rows) + "\n"
    return text or "not measured yet: run `python tools/bench_trainer.py --profile 3`\n"


def exactness_table(root: Path, bench: str) -> str:
    """The newest rows of each device and command, as tools/exactness.py wrote them."""
    keys, command = ("bench", "device", "command"), "python tools/exactness.py"
    text = ""
    for entry in newest(root / "records/bench/exactness.jsonl", keys, bench):
        header = list(max(entry["rows"], key=len))
        rows = [[look(str(row.get(key, "-")))[0] for key in header] for row in entry["rows"]]
        text += f"{markdown(header, rows)}\nMade by `{entry['command']}` on {entry['device']} "
        text += f"({entry['shape']}, torch {entry['torch']}, commit {entry['commit'][:7]}).\n"
    return text or f"not measured yet: run `{command}`\n"


TABLES: dict[str, Callable[[Path], str]] = {
    "bench_optimizers": partial(bench_table, bench="optimizers"),
    "bench_trainer": partial(bench_table, bench="trainer"),
    "slot": partial(full_table, bench="optimizers", kind="slot"),
    "trainer": partial(full_table, bench="trainer", kind="trainer"),
    "growth": partial(full_table, bench="trainer", kind="growth"),
    "ranks": ranks_table,
    "kernels": kernels_table,
    "polar": partial(exactness_table, bench="polar"),
    "parity": partial(exactness_table, bench="parity"),
}
