"""Token shards for the trainer: opened once, checked before the first step, never shuffled.

shards.py documents and writes the format. Torch and the standard library only, as every log holds
this file.
"""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

Shards = dict[str, Tensor]  # the tokens of each file, by its name
UNIT = 8192  # divides into rows of up to 1,024 tokens on 1, 2, 4 or 8 ranks


def open_shard(path: Path, vocab_size: int) -> Tensor:
    """Return the tokens of a shard, memory-mapped: 256 int32 of header, then uint16 tokens."""
    size, header = path.stat().st_size, torch.zeros(256, dtype=torch.int32)
    if size >= 1024:
        header = torch.from_file(str(path), shared=False, size=256, dtype=torch.int32)
    magic, version, count = header[:3].tolist()
    if (magic, version, size) != (20240520, 1, 1024 + 2 * count):
        raise ValueError(
            f"{path} is damaged or no token shard: magic, version, bytes are {magic}, {version}, "
            f"{size}, expected 20240520, 1, {1024 + 2 * count}: delete it and make it again"
        )
    tokens = torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.uint16)[512:]
    parts = tokens.split(1 << 20) if count else ()
    largest = max((int(part.to(torch.int32).max()) for part in parts), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{path} holds token id {largest}, the vocabulary has {vocab_size}: it was made with "
            "another tokenizer, tokenize its text again"
        )
    return tokens


def batches_in(tokens: int, batch_tokens: int) -> int:
    """Return the steps that a shard lasts: it is left when at most batch + 1 tokens remain."""
    return max(0, (tokens - 2) // batch_tokens)


def lower(flag: str, tokens: int) -> str:
    """Return the advice to lower a flag to what `tokens` allow, a value that the trainer takes."""
    most = tokens // UNIT * UNIT
    return f"lower {flag} to {most}" if most else "tokenize more text"


def open_shards(
    data: str,
    get_data: str,
    steps: int,
    batch_tokens: int,
    val_tokens: int,
    vocab_size: int,
    wrap: bool,
) -> tuple[Shards, Tensor]:
    """Return the training shards that a run will read, and val_tokens + 1 validation tokens.

    Raises FileNotFoundError or ValueError, with what to run or to change, if shards are missing or
    damaged, or if the tokens do not last for all steps and `wrap` does not let them repeat.
    """
    folder, remedy = Path(data), f"run {get_data}, or name a folder with --data"
    train, val = (sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    if not train or not val:
        found = f"{len(train)} training, {len(val)} validation" if folder.is_dir() else "no folder"
        raise FileNotFoundError(f"shards of both kinds expected in {folder}, {found}: {remedy}")
    needed = val_tokens + 1
    validation = open_shard(val[0], vocab_size)[:needed]
    if (found := len(validation)) < needed:
        advice = f"{lower('--val-tokens', found - 1)}, or name a folder that has more with --data"
        raise ValueError(f"{val[0]} holds {found} of {needed} tokens to validate: {advice}")
    lasts, longest, shards = 0, 0, {}
    for path in train:
        if lasts < steps:
            tokens = shards[path.name] = open_shard(path, vocab_size)
            lasts, longest = (
                lasts + batches_in(len(tokens), batch_tokens),
                max(longest, len(tokens)),
            )
    if lasts == 0 or (lasts < steps and not wrap):
        fewer = f"lower --steps to {lasts}" if lasts else lower("--batch-tokens", longest - 2)
        raise ValueError(
            f"too few tokens: {folder} lasts {lasts} of {steps} steps of "
            f"{batch_tokens} tokens: {fewer}, or {remedy}"
        )
    return shards, validation


def manifest_target(data: str, get_data: str) -> float:
    """Return the "target" in the data's manifest.json; 0 if there is none."""
    manifest = Path(data, "manifest.json")
    if not manifest.is_file():
        return 0.0
    try:
        return float(json.loads(manifest.read_text()).get("target", 0))
    except (ValueError, TypeError, AttributeError):
        sentence = f'{manifest} is no JSON object with a number as "target"'
        raise ValueError(f"{sentence}: run {get_data}, or set --target") from None


def train_batches(
    shards: Shards, batch_tokens: int, rank: int, size: int, first: int = 0
) -> Iterator[Tensor]:
    """Yield for each step from `first` on this rank's L tokens and the one after.

    Ranks have contiguous slices: a step has the same tokens for any number of them.
    """
    local = batch_tokens // size
    starts = [
        (tokens, i * batch_tokens + rank * local)
        for tokens in shards.values()
        for i in range(batches_in(len(tokens), batch_tokens))
    ]
    for step in count(first):
        tokens, start = starts[step % len(starts)]
        yield tokens[start : start + local + 1]
