"""Make the tables of measurements from records/bench/*.jsonl; records.pages writes them.

A line is one measurement, and the newest stands last. Tables show the newest line of each setup.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from records.figures import gpus, look
from records.table import markdown, number

ORIGIN = (("torch", "torch", ""), ("commit", "commit", ".7"))
OLDER = {"caches": "-", "graphs": False, "microbatch_rows": 0}  # the first lines lack these keys
COMMANDS = {
    "growth": "python tools/bench_trainer.py --expansions 4 8 16 --widths 768 1024 1536",
    "ranks": "torchrun --standalone --nproc_per_node=2 tools/bench_trainer.py --check-ranks",
}
NAME_WIDTH = 80  # a kernel's name is cut after so many characters
OPTIMIZER_MS = ("optimizer (ms)", "optimizer_ms", ".2f")
README = (  # what tells measurements apart, and a (title, key, format) for each column
    ("bench", "device", "gpus", "optimizer"),
    (
        ("tokens/s", "tokens_per_s", ",.0f"),
        ("ms per step", "step_ms", ".2f"),
        OPTIMIZER_MS,
        ("peak GiB", "peak_gib", ".1f"),
    ),
)
FULL = {  # the same for records/bench/README.md
    "slot": (
        ("device", "shapes"),
        (
            ("shapes", "shapes", ""),
            ("ms per step", "ms", ".2f"),
            ("slowest step (ms)", "ms_worst", ".2f"),
            ("first step (s)", "compile_s", ".1f"),
            ("rms of sigma - 1", "rms_sigma", ".2g"),
            ("same at condition 800", "rms_sigma_800", ".2g"),
            ("CV of squared row norms", "row_sq_cv", ".3g"),
            ("same for real momenta", "real_sq_cv", ".2g"),
            ("peak MiB", "peak_mib", ".0f"),
            *ORIGIN,
        ),
    ),
    "trainer": (
        ("device", "gpus", "preset", "optimizer", "batch_tokens", "microbatch_rows", "fp8"),
        (
            ("tokens a step", "batch_tokens", ","),
            ("rows", "microbatch_rows", ".0f"),
            ("tokens/s", "tokens_per_s", ",.0f"),
            ("ms per step", "step_ms", ".2f"),
            OPTIMIZER_MS,
            ("peak GiB", "peak_gib", ".2f"),
            *ORIGIN,
        ),
    ),
    "starts": (
        ("device", "gpus", "optimizer", "caches"),
        (
            ("rows", "microbatch_rows", ".0f"),
            ("caches", "caches", ""),
            ("start (s)", "start_s", ".1f"),
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
            OPTIMIZER_MS,
            ("share", "optimizer_share", ".1%"),
            ("peak GiB", "peak_gib", ".1f"),
            *ORIGIN,
        ),
    ),
}
MATRIX_BYTES = 84_934_656 * 4  # the 72 matrices of the 124M model in fp32
RANKS = (
    ("tokens a step", "batch_tokens", ","),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("on one GPU", "one_gpu", ",.0f"),
    ("of linear", "of_linear", ".1%"),
    ("exposed communication (ms)", "comm_ms", ".2f"),
    ("MB sent per rank", "megabytes", ",.1f"),
    ("without padding", "unpadded", ",.1f"),
    ("commit", "commit", ".7"),
)
MOST_COMMANDS = 4  # of a table; of more, the page names the file that has them


def newest(
    path: Path, keys: tuple[str, ...], bench: str, keep: Callable[[dict], bool] = bool
) -> list[dict]:
    """Return the last kept line of a bench for each value of `keys`, sorted by them."""
    found: dict[tuple, dict] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for place, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            facts = OLDER | entry
            facts["fp8"] = "--fp8" in facts.get("command", "")
            if entry["bench"] == bench and keep(entry):
                found[tuple(facts[key] for key in keys)] = entry
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {place}: found '{line[:80]}', expected a JSON object "
                f"with {', '.join(keys)}; measure again or delete it"
            ) from error
    return [found[key] for key in sorted(found)]


def is_plain(entry: dict, more: frozenset = frozenset()) -> bool:
    """True if a line was measured at the preset's own settings, with any optimizer."""
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


def unmeasured(command: str, file: str) -> str:
    return f"not measured yet: run `{command} --out records/bench/{file}.jsonl`\n"


def rows_of(entries: list[dict], columns: tuple, bench: str, made_by: str = "") -> str:
    """Return a table with a row for each entry (or each of its rows), and what made it."""
    if not entries:
        file = "trainer" if bench in COMMANDS else bench
        return unmeasured(COMMANDS.get(bench, f"python tools/bench_{bench}.py"), file)
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
    commands = list(dict.fromkeys(f"`{entry['command']}`" for entry in entries))
    if len(commands) > MOST_COMMANDS:
        commands = ["`tools/bench_trainer.py`; [trainer.jsonl](trainer.jsonl) has all commands"]
    table = markdown(["optimizer", "GPUs", *(title for title, _, _ in columns)], cells)
    return f"{table}\nMade by {made_by or ', '.join(commands)}.\n"


def readme_table(root: Path) -> str:
    """Return a table for the README: the newest measurements at track3's own settings."""
    keys, columns = README

    def keep(entry: dict) -> bool:
        return is_plain(entry) and entry["preset"] == "track3"

    entries = newest(root / "records/bench/trainer.jsonl", keys, "trainer", keep)
    page = "`tools/bench_trainer.py` ([commands and commits](records/bench/README.md))"
    return rows_of(entries, columns, "trainer", page)


def full_table(root: Path, bench: str, table: str) -> str:
    """Return the newest measurement of each setup, with more columns than the README has."""
    keys, columns = FULL[table]
    name = "growth" if table == "growth" else bench  # trainer.jsonl has both

    def keep(entry: dict) -> bool:
        return entry["commit"] != "unknown" and (table != "starts" or "caches" in entry)

    entries = newest(root / f"records/bench/{bench}.jsonl", keys, name, keep)
    return rows_of(entries, columns, name)


def ranks_table(root: Path) -> str:
    """Compare the newest measurement on N GPUs with one GPU at the same commit."""
    path, setup = root / "records/bench/trainer.jsonl", ("device", "optimizer", "batch_tokens")
    plain = partial(is_plain, more=frozenset({"--batch-tokens"}))

    def at(entry: dict) -> tuple:
        return tuple(entry[key] for key in (*setup, "commit"))

    every = newest(path, (*setup, "commit", "gpus"), "trainer", plain)
    one_gpu = {at(entry): entry["tokens_per_s"] for entry in every if entry["gpus"] == 1}

    def keep(entry: dict) -> bool:
        is_complete = plain(entry) and "bytes_per_rank" in entry
        return is_complete and entry["gpus"] > 1 and at(entry) in one_gpu

    rows = []
    for entry in newest(path, (*setup, "gpus"), "trainer", keep):
        one, count = one_gpu[at(entry)], entry["gpus"]
        linear = entry["tokens_per_s"] / (count * one)
        sent, least = entry["bytes_per_rank"] / 1e6, 2 * (count - 1) / count * MATRIX_BYTES / 1e6
        rows.append(entry | dict(one_gpu=one, of_linear=linear, megabytes=sent, unpadded=least))
    return rows_of(rows, RANKS, "ranks")


def kernels_table(root: Path) -> str:
    """List the 15 kernels that took most of a step in the newest profile."""
    path = root / "records/bench/trainer.jsonl"
    entries = newest(path, ("bench",), "trainer", lambda entry: "kernels" in entry)
    if not entries:
        return unmeasured("python tools/bench_trainer.py --profile 3", "trainer")
    (entry,) = entries
    rows = [
        [f"{ms:.2f}", f"{calls:g}", f"`{kernel[:NAME_WIDTH]}`"]
        for ms, calls, kernel in entry["kernels"]
    ]
    text = f"Commit {entry['commit'][:7]}, {look(entry['optimizer'])[0]}, {gpus(entry)}: "
    text += f"{entry['kernels_ms']:.1f} ms of kernels in a step (`{entry['command']}`).\n\n"
    return text + markdown(["ms a step", "calls", "kernel"], rows)


def exactness_table(root: Path, bench: str) -> str:
    """Return the newest rows of each device and command, as tools/exactness.py wrote them."""
    keys, text = ("bench", "device", "command"), ""
    for entry in newest(root / "records/bench/exactness.jsonl", keys, bench):
        header = list(max(entry["rows"], key=len))
        rows = [[look(str(row.get(key, "-")))[0] for key in header] for row in entry["rows"]]
        text += f"{markdown(header, rows)}\nMade by `{entry['command']}` on {entry['device']} "
        text += f"({entry['shape']}, torch {entry['torch']}, commit {entry['commit'][:7]}).\n"
    return text or unmeasured("python tools/exactness.py", "exactness")


TABLES: dict[str, Callable[[Path], str]] = {
    "bench_trainer": readme_table,
    "slot": partial(full_table, bench="optimizers", table="slot"),
    "trainer": partial(full_table, bench="trainer", table="trainer"),
    "starts": partial(full_table, bench="trainer", table="starts"),
    "growth": partial(full_table, bench="trainer", table="growth"),
    "ranks": ranks_table,
    "kernels": kernels_table,
    "polar": partial(exactness_table, bench="polar"),
    "parity": partial(exactness_table, bench="parity"),
}
