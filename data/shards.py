"""
Read and write token shards, and the manifest that records the shards of a folder.

    python data/shards.py verify DIR                      # hashes every shard again
    python data/shards.py manifest DIR --tokenizer gpt2 --vocab-size 50257    # writes one

A shard is one .bin file: 256 little-endian int32 (20240520, 1, the number of tokens, zeros), then
the tokens as little-endian uint16. llm.c and modded-nanogpt use the same format.

The manifest, manifest.json beside the shards, records the tokenizer, the size of its vocabulary,
and the number of tokens and the sha256 of every shard. If two validation losses differ, compare the
manifests first.

Files are written under another name and renamed, so a file with its final name is complete.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from records.missing import explain_missing

    explain_missing()

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
MANIFEST = "manifest.json"


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that appears at `path` only if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: rename needs it
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    if tokens.ndim != 1 or not 0 < tokens.size < 2**31 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: a shard is a vector of 1 to 2^31 - 1 integers, "
            f"not {tokens.dtype} of shape {tokens.shape}."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"{path}: ids run from {low} to {high}, but a shard stores uint16 "
            "(0 to 65535): use a tokenizer of at most 65,536 ids."
        )
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic(Path(path)) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2"))


def _remedy(path: Path, verb: str = "Delete it and run") -> str:
    makers = {"fineweb": "cached_fineweb10B.py", "embedded": "embedded.py"}
    return f"{verb} python data/{makers.get(path.name.split('_')[0], 'tokenize_text.py')}"


def read_header(path: str | Path) -> int:
    """Return the number of tokens, after all checks that read none; the size is one of them."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such shard. {_remedy(path, 'Run')}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        fault = f"truncated: {size} bytes, less than the header's {HEADER_BYTES}"
    else:
        magic, version, tokens = (int(x) for x in np.fromfile(path, dtype="<i4", count=3))
        expected = HEADER_BYTES + 2 * tokens
        if magic != MAGIC:
            fault = f"no token shard: it begins with {magic}, expected {MAGIC}"
        elif version != VERSION:
            fault = f"shard version {version}, expected {VERSION} (uint16 tokens)"
        elif tokens < 1 or size != expected:
            fault = (
                f"{'truncated' if size < expected else 'too long'}: {size} bytes, but its "
                f"header counts {tokens} tokens, which is {expected} bytes"
            )
        else:
            return tokens
    raise ValueError(f"{path}: {fault}. {_remedy(path)}")


def read_shard(path: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """Map the tokens into memory, read-only; check that they are below `vocab_size` if given."""
    count = read_header(path)
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"{path}: token id {largest} is beyond the vocabulary of {vocab_size}: "
            f"another tokenizer wrote it, or it is corrupt. {_remedy(Path(path))}"
        )
    return tokens


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """Return the manifest's entry for one shard."""
    return {"tokens": len(read_shard(path, vocab_size)), "sha256": sha256_of(path)}


def save_manifest(folder: str | Path, manifest: dict[str, Any]) -> dict[str, Any]:
    with atomic(Path(folder, MANIFEST)) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def write_manifest(
    folder: str | Path, tokenizer: str, vocab_size: int, **extra: Any
) -> dict[str, Any]:
    """Check, hash and record every .bin file of the folder."""
    shards = {path.name: describe(path, vocab_size) for path in sorted(Path(folder).glob("*.bin"))}
    if not shards:
        raise FileNotFoundError(f"{folder}: holds no .bin files, so there is nothing to record.")
    head = {"format": 1, "tokenizer": tokenizer, "vocab_size": vocab_size}
    return save_manifest(folder, head | {"shards": shards} | extra)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found. To record the shards as they are, run python "
            f"data/shards.py manifest {folder} --tokenizer NAME --vocab-size N"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == 1 and manifest.keys() >= {"tokenizer", "vocab_size", "shards"}:
            return manifest
        fault = f"format {manifest['format']} with {', '.join(manifest)}; expected format 1"
    except (ValueError, KeyError, TypeError) as error:
        fault = f"not a manifest ({error!r})"
    raise ValueError(f"{path}: {fault}. Delete it and run python data/shards.py manifest {folder}")


def check(path: Path, entry: dict[str, Any], vocab_size: int) -> str | None:
    """Return one sentence on the first fault of a shard, or None."""
    try:
        found = describe(path, vocab_size)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    for key in ("tokens", "sha256"):
        if found[key] != entry.get(key):
            return (
                f"{path}: {key} {found[key]}, but the manifest says {entry.get(key)}. "
                f"{_remedy(path)}"
            )
    return None


def verify(folder: str | Path) -> list[str]:
    """Return a sentence for each difference between the folder and its manifest."""
    manifest = read_manifest(folder)
    shards, present = manifest["shards"], {path.name for path in Path(folder).glob("*.bin")}
    checked = (check(Path(folder, name), shards[name], manifest["vocab_size"]) for name in shards)
    return [problem for problem in checked if problem] + [
        f"{Path(folder, name)}: not in the manifest. Move it away, or delete manifest.json and run "
        "python data/shards.py manifest"
        for name in sorted(present - shards.keys())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a folder of shards, or write its manifest.")
    parser.add_argument("command", choices=["verify", "manifest"])
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--tokenizer", help="for manifest: the tokenizer's name, e.g. gpt2")
    parser.add_argument("--vocab-size", type=int, help="for manifest: e.g. 50257, above all ids")
    args = parser.parse_args()
    try:
        if args.command == "manifest":
            if not (args.tokenizer and args.vocab_size):
                raise ValueError("manifest needs --tokenizer and --vocab-size: gpt2 and 50257?")
            if Path(args.folder, MANIFEST).exists():
                raise ValueError(f"{args.folder} has a manifest: delete it to write a new one.")
            write_manifest(args.folder, args.tokenizer, args.vocab_size)
        problems = verify(args.folder) if args.command == "verify" else []
        for name, entry in read_manifest(args.folder)["shards"].items():
            bad = any(problem.startswith(f"{args.folder / name}: ") for problem in problems)
            print(f"{'BAD' if bad else 'ok':3} {name} {entry['tokens']:,} tokens")
    except (ValueError, FileNotFoundError) as error:
        problems = [str(error)]
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
