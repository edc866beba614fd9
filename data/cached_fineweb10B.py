"""
Fetch the GPT-2 tokens of FineWeb-10B: the validation shard and N training shards of 100M tokens.

    python data/cached_fineweb10B.py 20            # 21 files, 4.2 GB, into data/fineweb10B
    python data/cached_fineweb10B.py               # all 103 training shards, 20.8 GB
    python data/cached_fineweb10B.py 20 --offline  # checks without a network; exits with 0 or 2
    python data/cached_fineweb10B.py 20 --verify   # hashes all files again, fetches damaged ones

A file gets its name once it has the hub's sha256, and manifest.json records it, so that a second
run only compares lengths. The download may be interrupted at any time; a partial file continues.
For a machine without internet, copy the folder there and run with --offline --verify. The hub's
variables HF_ENDPOINT (a mirror), HF_TOKEN and HF_HUB_DISABLE_PROGRESS_BARS have their usual effect.
"""

import argparse
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from records.missing import explain_missing

    explain_missing()

from data import shards

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103
VOCAB_SIZE = 50257
PARALLEL = 4  # files at once: one stream from the hub seldom fills a data centre's line


def shard_names(count: int) -> list[str]:
    return ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1)
    ]


def damage(path: Path, entry: dict[str, Any] | None, rehash: bool) -> str | None:
    """Return one sentence on why a shard is unusable, or None. Only `rehash` reads its tokens."""
    if entry and rehash:
        return shards.check(path, entry, VOCAB_SIZE)
    try:
        tokens = shards.read_header(path)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if entry and tokens != entry["tokens"]:
        return f"{path}: {tokens} tokens, but the manifest says {entry['tokens']}."
    return None


def look_up(name: str, retry: bool = True) -> tuple[str, str, int]:
    """Return the url, the sha256 and the size in bytes of a file on the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
    metadata = get_hf_file_metadata(url, retry_on_errors=retry)
    sha256 = metadata.etag or ""  # the hub's etag of a large file is its sha256
    if not re.fullmatch("[0-9a-f]{64}", sha256) or metadata.size is None:
        raise ValueError(
            f"{url}: the server names no sha256 and size (etag {metadata.etag}, size "
            f"{metadata.size}), so the file cannot be checked. Use another HF_ENDPOINT."
        )
    return url, sha256, metadata.size


def fetch(path: Path, url: str, sha256: str, size: int) -> dict[str, Any]:
    """Make `path` the hub's file unless it is already, and return its manifest entry."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # hf_hub_download deletes a partial file when it fails (seen in hub 1.33 and 2.4). http_get
    # continues one, in steps of 10 MB; the sha256 in the name ties it to one content.
    part = path.with_name(f"{path.name}.{sha256[:12]}.part")
    if path.exists() and shards.sha256_of(path) != sha256:
        path.unlink()
    if not path.exists():
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        with open(part, "ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                expected_size=size,
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                displayed_filename=path.name,
            )
        if (found := shards.sha256_of(part)) != sha256:
            part.unlink()
            raise ValueError(
                f"{path.name}: the download has sha256 {found}, the hub says {sha256}. "
                "It was deleted; run this again."
            )
        os.replace(part, path)
    return {"tokens": len(shards.read_shard(path, VOCAB_SIZE)), "sha256": sha256}


def fetch_all(folder: Path, names: list[str], manifest: dict[str, Any]) -> None:
    """Fetch a few at a time, and record each in the manifest as soon as it is verified."""
    # The first look-up runs alone and without retries, so that it fails within seconds if there is
    # no network. The others are retried, as one of a hundred may well fail.
    found = [look_up(names[0], retry=False)]
    with ThreadPoolExecutor(PARALLEL) as pool:
        found += pool.map(look_up, names[1:])
        needed, free = sum(size for _, _, size in found), shutil.disk_usage(folder).free
        print(f"Fetching {len(names)} files, {needed / 1e9:.1f} GB, into {folder}", flush=True)
        if needed > free:
            raise ValueError(
                f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are "
                "needed: fetch fewer shards, or use --dir on another disk."
            )
        futures = {
            pool.submit(fetch, folder / name, *facts): name
            for name, facts in zip(names, found, strict=True)
        }
        try:
            for future in as_completed(futures):
                manifest["shards"][futures[future]] = future.result()
                shards.save_manifest(folder, manifest)
        finally:
            pool.shutdown(cancel_futures=True)


def load_manifest(folder: Path) -> dict[str, Any]:
    if (folder / shards.MANIFEST).exists():
        return shards.read_manifest(folder)
    return {
        "format": 1,
        "tokenizer": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "source": REPOSITORY,
        "shards": {},
    }


def download(folder: Path, names: list[str], rehash: bool) -> None:
    """Fetch the files that are missing or damaged."""
    from huggingface_hub.errors import HTTPError  # httpx's in hub 1, httpx2's in hub 2
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(folder / ".lock", timeout=1):
            manifest = load_manifest(folder)
            entries = manifest["shards"]
            missing = [
                name
                for name in names
                if name not in entries or damage(folder / name, entries[name], rehash)
            ]
            if missing:
                fetch_all(folder, missing, manifest)
    except (OSError, HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Could not fetch the shards: {type(error).__name__}: {reason}. Complete files are "
            "kept; check the network (HF_ENDPOINT may name a mirror) and run this again, or copy "
            f"the files into {folder} from another machine."
        ) from error


def check_offline(folder: Path, names: list[str], rehash: bool) -> None:
    entries = load_manifest(folder)["shards"]
    bad = {
        name: problem
        for name in names
        if (problem := damage(folder / name, entries.get(name), rehash))
    }
    for name, problem in bad.items():
        if (folder / name).exists():
            print(problem, file=sys.stderr)
    if bad:
        raise FileNotFoundError(
            f"{len(bad)} of {len(names)} shards are missing or damaged in {folder}: "
            f"{', '.join(bad)}. Run python data/cached_fineweb10B.py {len(names) - 1} where there "
            "is a network."
        )
    if unknown := [name for name in names if name not in entries]:
        print(f"Not in the manifest, so no sha256 was compared: {', '.join(unknown)}.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch FineWeb-10B as GPT-2 tokens.")
    parser.add_argument(
        "count",
        metavar="N",
        nargs="?",
        type=int,
        default=TRAINING_SHARDS,
        help=f"number of training shards, 0 to {TRAINING_SHARDS} (default: all)",
    )
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / "fineweb10B")
    parser.add_argument("--offline", action="store_true", help="only check the files here")
    parser.add_argument("--verify", action="store_true", help="hash the files again")
    args = parser.parse_args()
    if not 0 <= args.count <= TRAINING_SHARDS:
        parser.error(f"N is {args.count}, but there are {TRAINING_SHARDS} training shards.")
    # Ctrl-C ends the process at once, with all its threads: files are placed by renaming, so any
    # moment is safe.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    names = shard_names(args.count)
    try:
        (check_offline if args.offline else download)(args.dir, names, args.verify)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(names)} shards are complete in {args.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
