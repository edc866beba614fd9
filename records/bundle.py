"""Extract the source that a log holds: `python -m records extract LOG [--out DIR]`.

The script above a log's first rule joins a tree of files: each begins with a line
`# ==================== path ====================`, and '#| ' comments out the imports between them
(`flatten` of records/writer.py does this). A script without such lines is written as script.py.
"""

import argparse
import re
import tempfile
from pathlib import Path, PurePosixPath

from records.log import Run, read_runs

TITLE = re.compile(r"^# ={20} (\S+) ={20}\n", re.MULTILINE)
START = re.compile(r"^    sys\.exit\(main\((\[.*\] \+ )?sys\.argv\[1:\]\)\)\n\Z", re.MULTILINE)


def files_of(script: str) -> dict[str, str]:
    """Split a script into {name: text}; ValueError if a name leads out of the folder."""
    if not script.strip():
        raise ValueError("the log holds no source; expected one that begins with its script")
    head, *parts = TITLE.split(script)
    if head:
        return {"script.py": script}
    files: dict[str, str] = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or name in files:
            raise ValueError(f"found a section {name}, expected each file once, within its folder")
        files[name] = re.sub(r"^#\| ", "", text, flags=re.MULTILINE)
    return files


def script_of(run: Run) -> str:
    """Return the one file that repeats a run. Its arguments are constants; more may follow.

    Arguments for the fields that change no loss (Run.free) are left to the command line.
    """
    if not START.search(run.script) or "argv" not in run.meta:
        raise ValueError(
            f"{run.path}: found a script with another end than train_gpt.py's, or a log without "
            "its arguments; expected a log of train_gpt.py"
        )
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in sorted(run.free):
        switch = isinstance(run.meta.get("config", {}).get(name), bool)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            *["--log-file"] * (name == "log"),
            action=(argparse.BooleanOptionalAction if switch else "store"),
        )
    _, constants = parser.parse_known_args(run.meta["argv"])
    start = f"{constants!r} + sys.argv[1:]" if constants else "sys.argv[1:]"
    return START.sub(lambda _: f"    sys.exit(main({start}))\n", run.script)


def write_folder(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write all files or none: `folder` must not exist and appears once it is complete."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: delete it or choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as parent:
        for name, text in files.items():
            path = Path(parent, "new", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        Path(parent, "new").rename(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, help="new folder (default: LOG_source here)")


def run(args: argparse.Namespace) -> None:
    if args.log.is_dir():
        raise ValueError(f"{args.log} is a folder, expected one log; name one of those in it")
    out = args.out or Path(f"{args.log.stem}_source")
    if any((parent / "record.json").is_file() for parent in out.resolve().parents):
        raise ValueError(f"{out} is inside a record and would not belong to it: name another --out")
    files = files_of(read_runs([args.log])[0].script)
    write_folder(out, files)
    print(f"{len(files)} files in {out}: {', '.join(files)}")
