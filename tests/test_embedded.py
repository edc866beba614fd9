"""data/embedded.py: the corpus is reproducible, and its target is the loss it says it is."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import embedded
from data.shards import read_shard, verify

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["embedded_train_000001.bin", "embedded_val_000000.bin", "manifest.json"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("embedded")
    return folder, embedded.make(folder)


def slow_trigram_loss(train: list[int], val: list[int]) -> float:
    """The definition, token by token: p(c|ab) = (n(abc) + 1) / (n(ab) + 257), from val[2] on."""
    triples = Counter(zip(train, train[1:], train[2:], strict=False))
    pairs: Counter[tuple[int, int]] = Counter()
    for (a, b, _), count in triples.items():
        pairs[a, b] += count
    losses = [
        -math.log((triples[a, b, c] + 1) / (pairs[a, b] + 257))
        for a, b, c in zip(val, val[1:], val[2:], strict=False)
    ]
    assert len(losses) == len(val) - 2
    return math.fsum(losses) / len(losses)


def test_the_loss_is_that_of_a_slow_trigram_model() -> None:
    """Few letters, so that most pairs are seen and one ends the shard; also the ids 0 and 256."""
    rng = np.random.default_rng(0)
    train, val = (
        rng.choice([0, 97, 98, 99, 255, 256], size, p=[0.1, 0.3, 0.3, 0.1, 0.1, 0.1]).astype(
            np.uint16
        )
        for size in (3000, 700)
    )
    assert embedded.trigram_loss(train, val) == pytest.approx(
        slow_trigram_loss(train.tolist(), val.tolist()), abs=1e-12
    )
    assert embedded.trigram_loss(train, val) != pytest.approx(
        slow_trigram_loss(train[:-1].tolist(), val.tolist()), abs=1e-12
    )


def test_unseen_text_costs_the_uniform_loss() -> None:
    train, val = np.full(50, 7, np.uint16), np.full(20, 8, np.uint16)
    assert embedded.trigram_loss(train, val) == pytest.approx(math.log(257), abs=1e-12)


def test_probabilities_of_every_context_sum_to_one() -> None:
    """A count of pairs that includes the shard's last one would make a model that leaks mass."""
    train = np.array([1, 2, 3, 1, 2, 4, 1, 2], np.uint16)
    for a, b in ((1, 2), (2, 3), (9, 9)):
        total = sum(
            math.exp(-embedded.trigram_loss(train, np.array([a, b, c], np.uint16)))
            for c in range(257)
        )
        assert total == pytest.approx(1, abs=1e-12)


def test_the_target_is_the_loss_on_the_trainers_slice(corpus: tuple[Path, dict]) -> None:
    """Recomputed from the files by the slow model on all 9 million tokens would take a minute, so
    the first 300,000 validate the slice: its length and offset, not the counting, are at stake."""
    folder, manifest = corpus
    train = read_shard(folder / NAMES[0])
    val = read_shard(folder / NAMES[1])[: 131_072 + 1]
    assert len(val) == 131_073
    assert manifest["target"] == embedded.trigram_loss(train, val)
    short, few = train[:300_000], val[:20_000]
    assert embedded.trigram_loss(short, few) == pytest.approx(
        slow_trigram_loss(short.tolist(), few.tolist()), abs=1e-10
    )
    assert 1.5 < manifest["target"] < 2.5  # nats; 1.90365 on 3.11.7, 1.81924 on 3.12.1


def test_manifest_and_sizes_are_as_promised(corpus: tuple[Path, dict]) -> None:
    folder, manifest = corpus
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert (manifest["tokenizer"], manifest["vocab_size"]) == ("bytes", 257)
    assert manifest["target_source"] == "add-one byte trigram"
    assert verify(folder) == []
    assert 6_000_000 < manifest["shards"][NAMES[0]]["tokens"] < 16_000_000
    assert 131_073 <= manifest["shards"][NAMES[1]]["tokens"] < 1_000_000


def test_documents_are_whole_library_files_and_none_is_in_both(corpus: tuple[Path, dict]) -> None:
    folder, _ = corpus
    library = {
        path.read_bytes()
        for path in Path(os.__file__).parent.rglob("*.py")
        if "site-packages" not in path.parts
    }
    splits = []
    for name in NAMES[:2]:
        tokens = read_shard(folder / name)
        starts = np.flatnonzero(tokens == 256)
        assert starts[0] == 0
        splits.append([bytes(part[1:].astype(np.uint8)) for part in np.split(tokens, starts[1:])])
    train, val = splits
    assert set(train) | set(val) <= library
    assert not {text for text in val if text} & set(train)  # empty __init__.py are all alike
    assert len(train) > 300 and len(val) >= 5


def test_two_makes_are_equal_bit_for_bit(corpus: tuple[Path, dict], tmp_path: Path) -> None:
    embedded.make(tmp_path)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (corpus[0] / name).read_bytes()


def test_a_second_make_writes_nothing(corpus: tuple[Path, dict]) -> None:
    folder, manifest = corpus
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert embedded.make(folder) == manifest
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["shard", "version", "manifest", "interrupted"])
def test_what_is_not_sound_is_made_anew(corpus: tuple[Path, dict], damage: str) -> None:
    """A folder copied from another Python, or left by a kill between two files, is no corpus."""
    folder, manifest = corpus
    if damage == "shard":
        os.truncate(folder / NAMES[0], 5000)
    elif damage == "version":
        (folder / NAMES[2]).write_text(json.dumps(manifest | {"python": "3.0.0"}))
    elif damage == "manifest":
        (folder / NAMES[2]).write_text("{")
    else:
        (folder / NAMES[2]).unlink()
        (folder / NAMES[1]).unlink()
    assert embedded.make(folder) == manifest
    assert verify(folder) == []


def test_a_library_without_sources_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.py").write_text("pass")
    monkeypatch.setattr(
        embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")}
    )
    with pytest.raises(ValueError, match="too little source code"):
        embedded.make(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_excluded_folders_and_bad_encodings_stay_out(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "site-packages/b.py",
        "pkg/test/c.py",
        "encodings/cp1.py",
        "pkg/d.py",
        "_sysconfigdata_x.py",
        "e.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = embedded.library_files(tmp_path)
    assert sorted(path.name for path in paths) == ["a.py", "d.py"]
    (tmp_path / "a.py").write_bytes(b"\xff\xfe")
    documents = embedded.read_documents([tmp_path / "a.py", tmp_path / "pkg" / "d.py"])
    assert [document.tolist() for document in documents] == [[256, *b"pkg/d.py"]]


def test_the_script_runs_from_any_folder_and_prints_one_line(tmp_path: Path) -> None:
    """A copy of data/ in another place: the checkout's own data/embedded is not touched."""
    for name in ("data/embedded.py", "data/shards.py", "records/missing.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    result = subprocess.run(
        [sys.executable, tmp_path / "data" / "embedded.py"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1 and " target 1." in result.stdout
    assert sorted(path.name for path in (tmp_path / "data" / "embedded").iterdir()) == NAMES
