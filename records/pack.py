"""Make a record folder from logs: `python -m records pack FOLDER --name NAME [--what TEXT]`.

    README.md       the change, results, statistics, runs, settings, commands that repeat the runs
    record.json     the facts, and the logs that count with seeds, losses and hashes
    submission.py   one file that repeats the runs (for upstream), arguments included
    curves.png      loss against steps
    logs/seed_00.txt ...

People give the name, the date and a text. records/record.py computes the rest from the logs, and
verify computes it again.
"""

import argparse
import json
import re
from datetime import date
from pathlib import Path

from records.bundle import write_folder
from records.figures import group_runs, rendered
from records.log import parse_log, read_runs
from records.plot import draw_loss
from records.record import FACTS, RECORDS, contents, problems_of, sha256
from records.run import Run

TRACK = RECORDS / "track_3_optimization"
TRACK_3_RULES = {  # the rules of track 3 prescribe these values; no list of Config's fields
    "target": 3.28,
    "batch_tokens": 524_288,
    "val_tokens": 10_485_760,
    "row_tokens": 1024,
    "layers": 12,
    "width": 768,
    "head_dim": 128,
    "vocab_size": 50304,
}


def pack(runs: list[Run], folder: Path, facts: dict) -> None:
    """Write the record; ValueError with the first reason why the runs make none."""
    if problems := problems_of(runs):
        raise ValueError(problems[0])
    runs = sorted(runs, key=lambda run: run.seed)
    logs = {f"logs/seed_{run.seed:02}.txt": run for run in runs}
    files: dict[str, str | bytes] = {name: run.path.read_bytes() for name, run in logs.items()}
    target = runs[0].meta["config"]["target"]
    files["curves.png"] = rendered(draw_loss(group_runs(runs), target), "png")
    hashes = {name: sha256(data) for name, data in files.items()}
    write_folder(folder, files | contents(logs, facts, hashes))


def update(folder: Path) -> None:
    """Write README.md, record.json and submission.py from the logs and facts of the record."""
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        facts = {key: str(record.get(key, "")) for key in FACTS}
        if not (names := [str(name) for name in record["logs"]]):
            raise ValueError("no log")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: found no record ({error!r}), expected what pack wrote; restore "
            "it or pack its logs again"
        ) from error
    if missing := [name for name in ("curves.png", *names) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder / missing[0]}: missing, expected all files of the record; restore it"
        )
    logs = {name: parse_log(folder / name) for name in names}
    if problems := problems_of(list(logs.values())):
        raise ValueError(problems[0])
    hashes = {name: sha256((folder / name).read_bytes()) for name in ("curves.png", *logs)}
    for name, text in contents(logs, facts, hashes).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="it holds the logs that count and no others")
    parser.add_argument("--name", default="", help="of lower case letters, digits, - and _")
    parser.add_argument("--what", default="", help="one sentence on the change")
    parser.add_argument("--baseline", default="", help="track_3#36 or a record's folder")
    parser.add_argument(
        "--update",
        action="store_true",
        help="rewrite the pages of the record FOLDER after a change of this program",
    )
    parser.add_argument("--out", type=Path, help=f"new folder (default: {TRACK.name}/DATE_NAME)")


def run(args: argparse.Namespace) -> None:
    if args.update:
        update(Path(args.folder))
        print(f"rewrote the pages of {args.folder}")
        return
    today, runs = f"{date.today()}", read_runs([args.folder])
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", args.name):
        raise ValueError(
            f"name '{args.name}': expected --name with lower case letters, digits, - and _"
        )
    if re.search(r"[|\n]", args.what):
        raise ValueError(f"what {args.what!r}: expected one sentence without | and line breaks")
    for one in runs:
        config = one.meta.get("config", {})
        wrong = [
            f"{key} {config.get(key)} instead of {value}"
            for key, value in TRACK_3_RULES.items()
            if config.get(key) != value
        ]
        if wrong and args.out is None:
            raise ValueError(
                f"{one.path}: found {', '.join(wrong)}, which is no run of track 3; "
                "name a folder with --out"
            )
    folder = args.out or TRACK / f"{today}_{args.name}"
    pack(
        runs,
        folder,
        {"name": args.name, "date": today, "what": args.what, "baseline": _baseline(args.baseline)},
    )
    print(f"{len(runs)} log{'s' if len(runs) > 1 else ''} in {folder}")


def _baseline(name: str) -> str:
    """Check a baseline: return track_3#N as it is, a record as its folder below records/."""
    if not name or "#" in name:
        return name
    record = Path(name).resolve()
    if not (record / "record.json").is_file() or RECORDS not in record.parents:
        raise ValueError(
            f"baseline {name}: found no record, expected a folder with record.json "
            f"below {RECORDS}, or track_3#N"
        )
    return record.relative_to(RECORDS).as_posix()
