"""
Tokenize your own text into shards.

    python data/tokenize_text.py books/ more.jsonl --out data/mine --val-tokens 1000000

INPUT is a file or a folder, which is searched at any depth for
    .txt      a document per file, held in memory; a line <|endoftext|> begins another
    .jsonl    a document per line, in the field "text" (or --field)
    .parquet  a document per row, in the column "text" (or --field); needs pip install pyarrow
The output is NAME_val_000000.bin, NAME_train_000001.bin, ... and manifest.json. Documents begin
with the end-of-text id (50256 for gpt2, 256 for bytes) and are never split. The first documents
fill the validation shard, the others the training shards, in the order of the inputs: shuffle them
before if that order has a meaning. Short texts need a --val-tokens of their own: without it, a
validation shard with more than half of the tokens is refused. The number of processes does not
change the shards.

It needs about four bytes of memory per token of a shard, and a few megabytes per process.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from records.missing import explain_missing

    explain_missing()

import numpy as np
from tqdm import tqdm

from data.shards import MANIFEST, write_manifest, write_shard

BATCH_CHARACTERS = 1_000_000  # 0.1 s of work, enough to send to another process
VAL_TOKENS = 2_097_153  # enough for the prose preset
UNIT = 8192  # the trainer takes multiples of it on 1, 2, 4 or 8 ranks


class Tokenizer(NamedTuple):
    encode: Callable[[str], list[int] | bytes]
    end_of_text: int
    vocab_size: int


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    if name == "bytes":
        return Tokenizer(lambda text: text.encode("utf-8", errors="replace"), 256, 257)
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        raise FileNotFoundError(
            f"tiktoken cannot load {name!r} ({type(error).__name__}): it downloads its tables "
            "at first use. Load it once where there is a network, with TIKTOKEN_CACHE_DIR set to a "
            "folder, copy that folder here and set TIKTOKEN_CACHE_DIR to it."
        ) from error
    return Tokenizer(encoding.encode_ordinary, encoding.eot_token, encoding.n_vocab)


def find_files(inputs: list[Path]) -> list[Path]:
    files = []
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder.")
        files += (
            [path]
            if path.is_file()
            else sorted(file for file in path.rglob("*") if file.suffix in READERS)
        )
    if not files:
        raise FileNotFoundError(f"{', '.join(map(str, inputs))}: no {', '.join(READERS)} files.")
    if unknown := [str(file) for file in files if file.suffix not in READERS]:
        raise ValueError(f"{', '.join(unknown)}: expected names in {', '.join(READERS)}.")
    return files


def read_txt(path: Path, field: str) -> Iterator[str]:
    lines: list[str] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.rstrip("\n") == "<|endoftext|>":
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path} line {number}: not JSON ({error}).") from error
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise ValueError(
                        f"{path} line {number}: no text in a field {field!r} (found: "
                        f"{found}). Name the field with --field."
                    )
                yield row[field]


def read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: needs pip install pyarrow") from error
    table = pyarrow.parquet.ParquetFile(path)
    if field not in (names := table.schema_arrow.names):
        raise ValueError(
            f"{path}: no column {field!r} (found: {', '.join(names)}). Name it with --field."
        )
    for rows in table.iter_batches(batch_size=1024, columns=[field]):
        for text in rows.column(0).to_pylist():
            if not isinstance(text, str):
                raise ValueError(f"{path}: column {field!r} holds {text!r}, expected text.")
            yield text


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_batches(files: list[Path], field: str) -> Iterator[list[str]]:
    batch, characters = [], 0
    for path in files:
        try:
            for text in READERS[path.suffix](path, field):
                if text:
                    batch.append(text)
                    characters += len(text)
                if characters >= BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}). Convert it first.") from error
    if batch:
        yield batch


def encode_batch(name: str, texts: list[str]) -> list[np.ndarray]:
    tokenizer = load_tokenizer(name)
    return [
        np.array([tokenizer.end_of_text, *tokenizer.encode(text)], dtype=np.uint16)
        for text in texts
    ]


def encode_all(
    batches: Iterator[list[str]], name: str, processes: int
) -> Iterator[list[np.ndarray]]:
    """Encode on several processes, in order. Pool.imap would read ahead without limit."""
    if processes == 1:
        yield from (encode_batch(name, batch) for batch in batches)
        return
    # Spawn: forking a process that has threads (tqdm's, pyarrow's) may deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(encode_batch, name, batch))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def smaller(total: int, last: int) -> str:
    """Return advice that works for texts too short for --val-tokens, whose last document is `last`.

    Validation then gets about a tenth, and the last document is left for training.
    """
    tokens = min(total // 10, total - last - 1) // UNIT * UNIT
    if 0 < total == last:
        return "separate the documents of a .txt by lines <|endoftext|>, as none is split"
    if tokens <= 0:
        return "add more text"
    return f"give --val-tokens {tokens + 1} here, and --val-tokens {tokens} to train_gpt.py"


def write_splits(
    batches: Iterator[list[np.ndarray]], stem: Path, val_tokens: int | None, shard_tokens: int
) -> None:
    """Fill the validation shard with whole documents, then one training shard after another.

    ValueError if none is left for training, or if val_tokens, None, is our choice and takes half.
    """
    wanted = VAL_TOKENS if val_tokens is None else val_tokens
    index, documents, size, total, validation = 0 if wanted else 1, [], 0, 0, 0

    def flush() -> None:
        split = "train" if index else "val"
        write_shard(f"{stem}_{split}_{index:06d}.bin", np.concatenate(documents))
        documents.clear()

    with tqdm(unit="tok", unit_scale=True, desc=stem.name) as progress:
        for document in (document for batch in batches for document in batch):
            full = size >= wanted if index == 0 else size + len(document) > shard_tokens
            if documents and full:
                flush()
                validation = validation if index else size
                index, size = index + 1, 0
            documents.append(document)
            size, total = size + len(document), total + len(document)
            progress.update(len(document))
    last = len(documents[-1]) if documents else 0
    if index == 0 or not documents:
        raise ValueError(
            f"the inputs have {total:,} tokens in whole documents, which leaves none for training "
            f"after {wanted:,} for validation: {smaller(total, last)}."
        )
    if val_tokens is None and 2 * validation > total:
        raise ValueError(
            f"{validation:,} of {total:,} tokens would be for validation, more than half: "
            f"{smaller(total, last)}."
        )
    flush()


def tokenize(
    inputs: list[Path],
    out: Path,
    *,
    name: str,
    val_tokens: int | None,
    shard_tokens: int,
    tokenizer: str,
    field: str,
    processes: int,
    force: bool,
) -> dict[str, Any]:
    """Write all shards beside the old ones, replace these at the end, and return the manifest."""
    files, vocab_size = find_files(inputs), load_tokenizer(tokenizer).vocab_size
    present = sorted(out.glob("*.bin"))
    own = [
        path
        for path in present
        if re.fullmatch(rf"{re.escape(name)}_(val|train)_\d{{6}}\.bin", path.name)
    ]
    if present and not (force and own == present):
        raise ValueError(
            f"{out} holds {len(present)} shards ({present[0].name}, ...). Choose "
            "another --out"
            + (
                ", or replace them with --force."
                if own == present
                else f": they are not all called {name}."
            )
        )
    staging = out / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        batches = encode_all(read_batches(files, field), tokenizer, processes)
        write_splits(batches, staging / name, val_tokens, shard_tokens)
        for path in [out / MANIFEST, *own]:
            path.unlink(missing_ok=True)
        for path in sorted(staging.iterdir()):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(staging)
    return write_manifest(out, tokenizer, vocab_size, inputs=[path.name for path in inputs])


def main() -> int:
    parser = argparse.ArgumentParser(description="Turn text into token shards.")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--name", help="shards are called NAME_... (default: the name of DIR)")
    parser.add_argument(
        "--val-tokens",
        metavar="N",
        type=int,
        help=f"validation tokens, at least (default: {VAL_TOKENS}, refused if over half of all)",
    )
    parser.add_argument("--shard-tokens", metavar="N", type=int, default=100_000_000)
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    parser.add_argument("--field", default="text", help="field or column (default: text)")
    parser.add_argument("--processes", metavar="N", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--force", action="store_true", help="replace the shards in DIR")
    args = vars(parser.parse_args())
    if (args["val_tokens"] or 0) < 0 or args["shard_tokens"] < 1 or args["processes"] < 1:
        parser.error("--val-tokens must be 0 or more, --shard-tokens and --processes 1 or more.")
    args["name"] = args["name"] or args["out"].resolve().name
    try:
        manifest = tokenize(**args)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    counts = {name: entry["tokens"] for name, entry in manifest["shards"].items()}
    for name, count in counts.items():
        share = count / sum(counts.values())
        print(f"{args['out'] / name} {count:,} tokens, {share:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
