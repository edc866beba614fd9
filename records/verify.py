"""Compute records and pages again and compare: `python -m records verify [PATH ...]`.

A record is a folder with record.json, a page is a Markdown file (.md), and a log is a .txt or .log
file. Without arguments, verify checks all records, all pages of README.md, docs/ and records/, the
tables of records.pages, and the code hashes of the committed logs. It prints one sentence per
problem and exits with 2 if there are any.
"""

import argparse
import json
import re
from itertools import zip_longest
from math import isfinite
from pathlib import Path

from records import pages
from records.log import parse_log
from records.record import FACTS, contents, problems_of, sha256
from records.run import Run

LINK = re.compile(r"\]\(<?([^)\s>]+)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def dead_links(page: Path) -> list[str]:
    """Return a sentence for each relative link of a Markdown file that leads to nothing."""
    try:
        text = CODE.sub("", page.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return [f"{page}: found bytes that are no UTF-8, expected a page of text"]
    links = [
        link.partition("#")[0] for link in LINK.findall(text) if not re.match(r"[a-z]+:|#", link)
    ]
    return [
        f"{page}: the link {link} leads to nothing"
        for link in dict.fromkeys(links)
        if not (page.parent / link).exists()
    ]


def verify_page(page: Path, root: Path) -> list[str]:
    """Check a page's links and, if records.pages writes its tables, each line of these."""
    if not page.is_file():
        return [f"{page}: found no such file, expected a page or a folder with record.json"]
    problems = dead_links(page)
    names = [name for name in pages.PAGES if (root / name).resolve() == page.resolve()]
    try:
        pages.check(root, names)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    return problems


def verify_log(path: Path, complete: bool = True) -> list[str]:
    """Check that the code hash is that of the script and, if asked, that the run is complete."""
    try:
        run = parse_log(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    found = (
        []
        if run.meta.get("code_sha256") == sha256(run.script)
        else [f"{path}: code_sha256 is not the hash of the script above it"]
    )
    if complete and run.status != "complete":
        found.append(
            f"{path}: the run is {run.status} at step {run.final.step} of "
            f"{run.total_steps}, expected complete"
        )
    if complete and not all(isfinite(point.val_loss) for point in run.points):
        found.append(f"{path}: found a loss that is not finite")
    return found


def verify_path(path: Path, root: Path) -> list[str]:
    """Check a record, a page or a log."""
    if path.is_dir():
        return verify_record(path)
    if path.is_file() and path.suffix in (".txt", ".log"):
        return verify_log(path)
    if path.is_file() and path.suffix != ".md":
        return [
            f"{path}: found a file of another kind, expected a record's folder, a page (.md) "
            "or a log (.txt, .log)"
        ]
    return verify_page(path, root)


def verify_record(folder: Path) -> list[str]:
    """Check everything that pack promises. A problem that hides others is reported alone."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        facts = {key: str(record[key]) for key in FACTS}
        named = sorted(map(str, record["logs"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / 'record.json'}: found no record ({error!r}), expected what pack wrote"]
    expected = {"README.md", "record.json", "submission.py", "curves.png", *named}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems = [f"{folder / name}: missing" for name in sorted(expected - found)]
    problems += [
        f"{folder / name}: record.json does not name it, expected no other files in a record"
        for name in sorted(found - expected)
    ]
    if problems or not named:
        return problems or [f"{folder / 'record.json'}: names no log"]
    try:
        logs = {name: parse_log(folder / name) for name in named}
        return problems_of(list(logs.values())) or _compare(folder, logs, facts)
    except (OSError, ValueError) as error:
        return [f"{folder}: {error}"]


def _compare(folder: Path, logs: dict[str, Run], facts: dict[str, str]) -> list[str]:
    """Compare the written pages with the logs; report the first difference of each file."""
    problems = [
        f"{folder / name}: holds the run of seed {run.seed}, expected another file name"
        for name, run in logs.items()
        if name != f"logs/seed_{run.seed:02}.txt"
    ]
    hashes = {name: sha256((folder / name).read_bytes()) for name in ("curves.png", *logs)}
    for name, text in contents(logs, facts, hashes).items():
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        pairs = enumerate(zip_longest(lines, text.split("\n")), 1)
        differ = [(number, *pair) for number, pair in pairs if pair[0] != pair[1]]
        if differ:
            number, found, expected = differ[0]
            problems.append(
                f"{folder / name} line {number}: found '{found}', the logs say '{expected}'"
            )
    return problems + dead_links(folder / "README.md")


def verify_all(root: Path) -> list[str]:
    records = sorted(path.parent for path in root.glob("records/*/*/record.json"))
    texts = [
        root / "README.md",
        *sorted(root.glob("docs/*.md")),
        *sorted(path for path in root.glob("records/**/*.md") if path.parent not in records),
    ]
    logs = sorted([*root.glob("records/prose/*.txt"), *root.glob("records/demo/*.txt")])
    return [
        problem
        for some in (
            *map(verify_record, records),
            *(verify_page(page, root) for page in texts),
            *(verify_log(path, complete=False) for path in logs),
        )
        for problem in some
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", type=Path, help="folders of records, pages or logs")


def run(args: argparse.Namespace) -> None:
    problems = [] if args.paths else verify_all(pages.ROOT)
    for path in args.paths:
        problems += verify_path(path, pages.ROOT)
    if problems:
        raise ValueError("\n".join(problems))
    print(f"verified: {', '.join(map(str, args.paths)) or 'all records and pages'}")
