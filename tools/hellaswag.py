"""Print the accuracy of a checkpoint on HellaSwag: which of four endings fits a context?

    python tools/hellaswag.py run.pt                     # 10,042 examples, from the hub's cache
    python tools/hellaswag.py run.pt --data val.jsonl    # ctx, endings and label in every line

The method is llm.c's: the model reads ctx, a space and an ending, zero-shot, and the ending with
the least cross-entropy is its answer. acc compares the sum over the ending's tokens, acc_norm the
mean; the first of equal endings wins. For a model of bytes a token is a byte. Rows that exceed the
model's context lose tokens on the left, so that the last tokens keep as much context as fits; the
printed line counts these examples as cut. +- is the standard error of a share, sqrt(p (1 - p) / n).
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from records.missing import explain_missing

    explain_missing()

import torch
import torch.nn.functional as F
from bench_optimizers import append_line, commit  # puts the root on the path
from sample import load_model, tokenizer_of
from torch import nn
from tqdm import tqdm

from data.tokenize_text import Tokenizer
from models.world import choose_device
from train_gpt import Config

REPOSITORY, FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
SHA256 = "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"


class Example(NamedTuple):
    context: str
    endings: list[str]
    label: int  # index of the right ending


class Row(NamedTuple):
    """A context with one ending. Only the losses of the last `scored` tokens count."""

    tokens: list[int]
    scored: int


def fetch() -> Path:
    """Return the validation split from the hub's cache or the hub, after checking its sha256.

    Raise ValueError with one sentence if that fails. A partial download is never used.
    """
    other = f"or name a copy of {FILE} or of hellaswag_val.jsonl with --data"
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HTTPError  # httpx's in hub 1, httpx2's in hub 2
    except ImportError:
        raise ValueError(f"run pip install huggingface_hub, {other}") from None
    what = dict(repo_id=REPOSITORY, filename=FILE, repo_type="dataset", revision=REVISION)
    try:
        try:
            path = Path(hf_hub_download(**what, local_files_only=True))
        except FileNotFoundError:  # no retries: without a network this fails within seconds
            get_hf_file_metadata(hf_hub_url(**what), retry_on_errors=False)
            path = Path(hf_hub_download(**what))
    except (OSError, HTTPError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        where = f"{REPOSITORY} from the hub ({reason})"
        raise ValueError(f"cannot fetch {where}: try again with a network, {other}") from error
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{path} has sha256 {found}, expected {SHA256}: delete it, {other}")
    return path


def raw_examples(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the place of each example and its unchecked content."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path, columns=["ctx", "endings", "label"])
        except ImportError:
            raise ValueError(f"{path}: run pip install pyarrow") from None
        except (ValueError, OSError) as error:  # pyarrow's errors are of these kinds
            raise ValueError(f"{path} is no parquet file: {str(error)!r:.99}") from None
        yield from ((f"{path} row {n}", row) for n, row in enumerate(table.to_pylist(), 1))
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except ValueError as error:  # no UTF-8 either
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """Read the first `limit` examples of a .jsonl or .parquet file.

    An example needs a text `ctx`, a list `endings` of two or more texts, and a `label`, the index
    of the right one. ValueError names the line or row of another; FileNotFoundError if there is no
    such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: name one with --data")
    examples = [check(*raw) for raw in raw_examples(path)]
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples[:limit]


def check(where: str, raw: object) -> Example:
    """Return an Example if the fields are those of HellaSwag; label is a number or its digits."""
    row = raw if isinstance(raw, dict) else {}
    context, endings, label = (row.get(key) for key in ("ctx", "endings", "label"))
    if isinstance(label, str) and label.isascii() and label.isdigit():
        label = int(label)
    if not isinstance(context, str):
        raise ValueError(f'{where}: "ctx" is {context!r:.50}, expected a text')
    if not (
        isinstance(endings, list)
        and all(isinstance(ending, str) for ending in endings)
        and len(endings) > 1
    ):
        raise ValueError(f'{where}: "endings" is {endings!r:.50}, expected several texts')
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f'{where}: "label" is {label!r:.50}, expected 0 to {len(endings) - 1}')
    return Example(context, endings, label)


def render(example: Example, tokenizer: Tokenizer, row_tokens: int) -> tuple[list[Row], bool]:
    """Return a row of 2 to row_tokens + 1 tokens for each ending, and True if one was cut.

    An empty context becomes the end-of-text token, as the first scored token needs one before it.
    """
    context = list(tokenizer.encode(example.context)) or [tokenizer.end_of_text]
    rows, cut = [], False
    for ending in example.endings:
        scored = list(tokenizer.encode(" " + ending))
        tokens = context + scored
        cut = cut or len(tokens) > row_tokens + 1
        rows.append(Row(tokens[-row_tokens - 1 :], min(len(scored), row_tokens)))
    return rows, cut


@torch.no_grad()
def losses(model: nn.Module, rows: list[Row], batch: int, width: int) -> list[float]:
    """Return the summed cross-entropy of each row's scored tokens, in nats.

    Every input is (batch, width): rows are padded on the right, which causal attention ignores, and
    the last batch is padded with rows that score nothing.
    """
    device, sums = next(model.parameters()).device, []
    for start in tqdm(range(0, len(rows), batch), unit="batch", disable=None):
        some = rows[start : start + batch]
        inputs, targets = torch.zeros(2, batch, width, dtype=torch.long)
        scored = torch.zeros(batch, width, dtype=torch.bool)
        for i, (tokens, count) in enumerate(some):
            end = len(tokens) - 1
            inputs[i, :end], targets[i, :end] = torch.tensor([tokens[:-1], tokens[1:]])
            scored[i, end - count : end] = True
        x = model.hidden(inputs.to(device))[scored.to(device)]  # (scored tokens, model width)
        nats = F.cross_entropy(model.logits(x), targets[scored].to(device), reduction="none")
        by_row = nats.cpu().double().split(scored.sum(1).tolist())
        sums += [row.sum().item() for row in by_row[: len(some)]]
    return sums


def evaluate(
    model: nn.Module,
    config: Config,
    examples: list[Example],
    tokenizer: Tokenizer,
    batch: int,
) -> dict[str, float]:
    """Return the shares of right answers (acc, acc_norm) and the numbers of examples and cuts."""
    rendered = [render(example, tokenizer, config.row_tokens) for example in examples]
    rows = [row for some, _ in rendered for row in some]
    width = max(len(row.tokens) for row in rows) - 1
    sums = losses(model, rows, batch, width)
    if not all(map(math.isfinite, sums)):
        raise ValueError("the model's losses are not finite: it did not survive its training")
    right, right_norm, start = 0, 0, 0
    for example in examples:
        span = range(start, start := start + len(example.endings))
        right += min(span, key=lambda i: sums[i]) == span[example.label]
        right_norm += min(span, key=lambda i: sums[i] / rows[i].scored) == span[example.label]
    facts = dict(examples=len(examples), cut=sum(cut for _, cut in rendered))
    return dict(acc=right / len(examples), acc_norm=right_norm / len(examples), **facts)


def report(args: argparse.Namespace) -> None:
    """Print the result, and append it to --out with its checkpoint, step, seed and commit."""
    parents = args.out.absolute().parents if args.out else []
    if parents and (args.out.is_dir() or not next(p for p in parents if p.exists()).is_dir()):
        raise ValueError(f"cannot append to --out {args.out}: name a file, in a folder")
    device = choose_device(args.device)
    model, config, saved = load_model(args.checkpoint, device)
    tokenizer, _ = tokenizer_of(config)
    path = args.data or fetch()
    found = evaluate(model, config, read_examples(path, args.limit), tokenizer, args.rows)
    n, facts = found["examples"], {key: saved.get(key) for key in ("step", "seed")}
    shares = " ".join(
        f"{key}:{found[key]:.4f} +- {math.sqrt(found[key] * (1 - found[key]) / n):.4f}"
        for key in ("acc_norm", "acc")
    )
    print(
        f"hellaswag {shares} examples:{n} cut:{found['cut']} step:{facts['step']} {args.checkpoint}"
    )
    if args.out:
        line = dict(bench="hellaswag", checkpoint=str(args.checkpoint), data=str(path), **found)
        optimizer = saved["config"].get("optimizer")
        facts |= dict(optimizer=optimizer, torch=torch.__version__, commit=commit())
        append_line(args.out, line | facts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument("--data", metavar="FILE", type=Path, help=".jsonl or .parquet")
    parser.add_argument("--limit", metavar="N", type=int, help="use the first N examples only")
    parser.add_argument("--rows", type=int, default=64, help="endings per batch (default: 64)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu (default: first here)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="append the result as a JSON line")
    args = parser.parse_args(argv)
    if args.rows < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--rows and --limit must be 1 or more")
    try:
        report(args)
    except (FileNotFoundError, ValueError) as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
