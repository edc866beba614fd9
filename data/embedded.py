"""
Make a corpus without a download: the source of the running Python's standard library, as bytes.

    python data/embedded.py        # about 10M training tokens into data/embedded, in seconds

Tokens are UTF-8 bytes (0 to 255); 256 begins each document, and a document is one file. Validation
uses whole files that are not in training. The corpus is for the demo and for tests: source code is
easy to predict, and losses compare only between runs on the same Python version.

The manifest's "target" is the loss to beat: the cross-entropy, in nats per token, of a byte trigram
model counted on the training shard, p(c|ab) = (n(abc) + 1) / (n(ab) + 257). It scores the trainer's
first 131,072 validation targets, tokens[1:131073], except the first one, which has fewer than two
tokens before it. A transformer that has learned only letter statistics does not get below it.
"""

import platform
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from records.missing import explain_missing

    explain_missing()

import numpy as np

from data.shards import read_manifest, verify, write_manifest, write_shard

END_OF_TEXT, VOCAB_SIZE = 256, 257
VAL_TARGETS = 131_072  # the shard has one token more, as targets are inputs shifted by one
RECIPE = 2  # raise it if a change of this file gives the same Python other shards
# Installed packages are no part of the library; tests and lib2to3 contain odd code on purpose; the
# tables of encodings and pydoc_data nearly repeat each other, which would leak validation data.
EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def library_files(library: Path) -> list[Path]:
    """Return the library's modules in a fixed random order, which mixes its packages."""
    paths = {
        path.relative_to(library).as_posix(): path
        for path in library.rglob("*.py")
        if not EXCLUDED.intersection(path.relative_to(library).parts)
        # Whoever builds or packages Python writes these two.
        and not path.name.startswith(("_sysconfigdata", "sitecustomize"))
    }
    names = sorted(paths)
    random.Random(0).shuffle(names)
    return [paths[name] for name in names]


def read_documents(paths: list[Path]) -> list[np.ndarray]:
    documents = []
    for path in paths:
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        documents.append(np.frombuffer(bytes(1) + text, dtype=np.uint8).astype(np.uint16))
        documents[-1][0] = END_OF_TEXT
    return documents


def trigram_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Return the mean -log p of val[2:] under the add-one trigram model of `train`, in nats."""

    def pair(tokens: np.ndarray) -> np.ndarray:
        return tokens[:-1].astype(np.int64) * VOCAB_SIZE + tokens[1:]

    def triple(tokens: np.ndarray) -> np.ndarray:
        return pair(tokens)[:-1] * VOCAB_SIZE + tokens[2:]

    # The last pair of a shard has no successor and is no context: hence [:-1].
    pairs = np.bincount(pair(train)[:-1], minlength=VOCAB_SIZE**2)
    triples = np.bincount(triple(train), minlength=VOCAB_SIZE**3)
    seen, context = triples[triple(val)], pairs[pair(val)[:-1]]
    return float(np.mean(np.log(context + VOCAB_SIZE) - np.log(seen + 1)))


def make(folder: str | Path) -> dict[str, Any]:
    """Write the two shards and the manifest, unless this Python has written them already."""
    folder, version = Path(folder), platform.python_version()
    try:
        manifest = read_manifest(folder)
        if (manifest.get("python"), manifest.get("recipe")) == (version, RECIPE) and not verify(
            folder
        ):
            return manifest
    except (FileNotFoundError, ValueError):
        pass  # a missing or broken manifest is written below
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = read_documents(library_files(library))
    ends = np.cumsum([len(document) for document in documents])
    first = int(np.searchsorted(ends, VAL_TARGETS + 1)) + 1  # index of the first training document
    if first >= len(documents) or ends[-1] < 8 * VAL_TARGETS:
        raise ValueError(
            f"{library}: holds too little source code ({sum(map(len, documents)):,} "
            "bytes). Run a full Python, or use data/tokenize_text.py on other text."
        )
    val, train = np.concatenate(documents[:first]), np.concatenate(documents[first:])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # it must not describe half-written shards
    write_shard(folder / "embedded_val_000000.bin", val)
    write_shard(folder / "embedded_train_000001.bin", train)
    return write_manifest(
        folder,
        "bytes",
        VOCAB_SIZE,
        python=version,
        recipe=RECIPE,
        target=trigram_loss(train, val[: VAL_TARGETS + 1]),
        target_source="add-one byte trigram",
    )


def main() -> int:
    try:
        manifest = make(Path(__file__).parent / "embedded")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    tokens = {name.split("_")[1]: entry["tokens"] for name, entry in manifest["shards"].items()}
    print(
        f"data/embedded: {tokens['train']:,} training and {tokens['val']:,} validation tokens, "
        f"target {manifest['target']:.5f} ({manifest['target_source']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
