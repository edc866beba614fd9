"""
Fetch the GPT-2 tokens of FineWeb-10B: the validation shard and N training shards of 100M tokens.

    python data/cached_fineweb10B.py 20            # 21 files, 4.2 GB, into data/fineweb10B
    python data/cached_fineweb10B.py               # all 103 training shards, 20.8 GB
    python data/cached_fineweb10B.py 20 --offline  # no network: is all of it here? exit code 0 or 2
    python data/cached_fineweb10B.py 20 --verify   # hash again what is here, fetch what is damaged

A file gets its name once it has the hub's sha256, and is recorded in manifest.json: a second run
only looks at lengths. Interrupt it when you like: half a file continues where it stopped. For a
machine without internet, copy the folder there and run with --offline --verify.
HF_ENDPOINT (a mirror), HF_TOKEN and HF_HUB_DISABLE_PROGRESS_BARS mean what they mean to the hub.
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

if __package__:
    from . import shards
else:
    import shards

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103
VOCAB_SIZE = 50257
PARALLEL = 4  # files at once: one stream of the hub seldom fills a data centre's line


def shard_names(count: int) -> list[str]:
    return ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1)
    ]


def damage(path: Path, entry: dict[str, Any] | None, rehash: bool) -> str | None:
    """Why a shard cannot be used as it is, in one sentence; its tokens are read only to rehash."""
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
    """The url, sha256 and size in bytes of a file on the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
    metadata = get_hf_file_metadata(url, retry_on_errors=retry)
    sha256 = metadata.etag or ""  # the hub's etag of a large file is its sha256
    if not re.fullmatch("[0-9a-f]{64}", sha256) or metadata.size is None:
        raise ValueError(
            f"{url}: the server names no sha256 and size (etag {metadata.etag}, size "
            f"{metadata.size}), so it cannot be checked. Use another HF_ENDPOINT."
        )
    return url, sha256, metadata.size


def fetch(path: Path, url: str, sha256: str, size: int) -> dict[str, Any]:
    """Make `path` the hub's file if it is not already, and return its manifest entry."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # hf_hub_download throws away what it has when it fails (seen in hub 1.33 and 2.4). Its http_get
    # continues a file, in steps of 10 MB; the name ties the half file to one content.
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
                f"{path.name}: what came has sha256 {found}, the hub says {sha256}. "
                "It was deleted; run this again."
            )
        os.replace(part, path)
    return {"tokens": len(shards.read_shard(path, VOCAB_SIZE)), "sha256": sha256}


def fetch_all(folder: Path, names: list[str], manifest: dict[str, Any]) -> None:
    """Fetch a few at a time, and record each in the manifest as soon as it is verified."""
    # The first question is asked alone and once, so that a machine without network hears of it
    # within seconds; the others are repeated, as one of a hundred may well fail.
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
    """Fetch those of the names that are not here, or not sound."""
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
            f"Could not fetch the shards: {type(error).__name__}: {reason}. What is complete is "
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
        print(f"Not in the manifest, so held against no sha256: {', '.join(unknown)}.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch FineWeb-10B as GPT-2 tokens.")
    parser.add_argument(
        "count",
        metavar="N",
        nargs="?",
        type=int,
        default=TRAINING_SHARDS,
        help=f"training shards, 0 to {TRAINING_SHARDS} (default: all)",
    )
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / "fineweb10B")
    parser.add_argument("--offline", action="store_true", help="only check what is there")
    parser.add_argument("--verify", action="store_true", help="hash again what is there")
    args = parser.parse_args()
    if not 0 <= args.count <= TRAINING_SHARDS:
        parser.error(f"N is {args.count}, but there are {TRAINING_SHARDS} training shards.")
    # Let Ctrl-C end the process at once, downloading threads and all: files are placed by renaming,
    # so no moment is a bad one.
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
