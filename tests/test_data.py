"""The shard format, its manifest, the trainer's loader and data/tokenize_text.py.

What is written is what is read, and every kind of damage is named.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.loader import manifest_target, open_shard, open_shards, train_batches
from data.shards import (
    read_header,
    read_manifest,
    read_shard,
    verify,
    write_manifest,
    write_shard,
)
from data.tokenize_text import encode_all

ROOT = Path(__file__).resolve().parent.parent
TIKTOKEN_CACHE = ROOT.parent / "shared" / "tiktoken_cache"


def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        text=True,
        timeout=120,
        capture_output=True,
        env=os.environ | environment,
    )


def poke(path: Path, offset: int, value: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(value)


def int32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "mine_train_000001.bin"
    write_shard(path, np.arange(1000) % 257)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        rng = np.random.default_rng(number)
        write_shard(tmp_path / f"mine_train_{number:06d}.bin", rng.integers(0, 257, 500))
    write_manifest(tmp_path, "bytes", 257)
    return tmp_path


# --------------------------------------------------------------------------------- the shard format


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: type) -> None:
    tokens = np.array([0, 1, 256, 50256, 65535]).astype(dtype)
    write_shard(tmp_path / "a.bin", tokens)
    assert read_header(tmp_path / "a.bin") == 5
    assert np.array_equal(read_shard(tmp_path / "a.bin"), tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_the_bytes_are_those_of_llm_c(shard: Path) -> None:
    """Byte for byte and without our own reader: anything else would not be the published format."""
    raw = shard.read_bytes()
    assert raw[:12] == bytes.fromhex("88d8340101000000e8030000")
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:1030] == b"\x00\x00\x01\x00\x02\x00" and len(raw) == 1024 + 2000


def test_ids_that_do_not_fit_uint16_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    for tokens in ([0, 65536], [-1, 5]):
        with pytest.raises(ValueError, match="uint16"):
            write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def test_what_is_no_vector_of_integers_is_refused(tmp_path: Path) -> None:
    for tokens in (np.zeros(0, int), np.zeros((2, 2), int), np.zeros(3)):
        with pytest.raises(ValueError, match="a shard is a vector"):
            write_shard(tmp_path / "a.bin", tokens)


def test_a_failed_write_keeps_the_old_shard(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in mid-write must not cost the shard that was there."""
    before = shard.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "ascontiguousarray", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(shard, np.arange(7))
    assert shard.read_bytes() == before
    assert list(shard.parent.iterdir()) == [shard]


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, int32(20240801), "no token shard: it begins with 20240801, expected 20240520"),
        (4, int32(2), "shard version 2, expected 1"),
        (8, int32(1001), "truncated: 3024 bytes, but its header counts 1001 tokens, which is 3026"),
        (8, int32(999), "too long: 3024 bytes, but its header counts 999 tokens, which is 3022"),
        (8, int32(0), "too long"),
        (8, int32(-1), "too long"),
    ],
)
def test_a_damaged_header_is_named(shard: Path, offset: int, value: bytes, message: str) -> None:
    poke(shard, offset, value)
    with pytest.raises(ValueError, match=message):
        read_header(shard)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2000, "truncated: 2000 bytes, but its header counts 1000 tokens"),
        (3023, "truncated: 3023 bytes"),
        (1000, "truncated: 1000 bytes, less than the header's 1024"),
        (0, "truncated: 0 bytes"),
        (4000, "too long: 4000 bytes"),
    ],
)
def test_a_file_of_the_wrong_length_is_named(shard: Path, size: int, message: str) -> None:
    os.truncate(shard, size)
    with pytest.raises(ValueError, match=message):
        read_shard(shard)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fineweb_train_000001.bin", "python data/cached_fineweb10B.py"),
        ("embedded_val_000000.bin", "python data/embedded.py"),
        ("mine_val_000000.bin", "python data/tokenize_text.py"),
    ],
)
def test_errors_say_which_command_makes_the_shard(tmp_path: Path, name: str, command: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no such shard. Run {command}"):
        read_header(tmp_path / name)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"Delete it and run {command}"):
        read_header(tmp_path / name)


def test_an_id_beyond_the_vocabulary_is_named(shard: Path) -> None:
    assert len(read_shard(shard, 257)) == 1000
    with pytest.raises(ValueError, match="token id 256 is beyond the vocabulary of 256"):
        read_shard(shard, 256)


# ----------------------------------------------------------------------------- the trainer's loader


def test_the_trainer_opens_what_is_written(shard: Path) -> None:
    tokens = open_shard(shard, 257)
    assert np.array_equal(tokens.numpy(), read_shard(shard)) and len(tokens) == 1000
    with pytest.raises(ValueError, match="holds token id 256, the vocabulary has 256"):
        open_shard(shard, 256)


def opened(folder: Path, steps: int, batch_tokens: int, wrap: bool = False) -> tuple:
    write_shard(folder / "mine_val_000000.bin", np.arange(101))
    return open_shards(str(folder), "python make.py", steps, batch_tokens, 100, 257, wrap)


def test_a_run_opens_the_shards_that_it_reads_and_one_token_more_to_validate(folder: Path) -> None:
    """500 tokens last 4 steps of 100: the last token is a target only, one more must follow."""
    for steps, count in ((1, 1), (4, 1), (5, 2), (12, 3)):
        shards, validation = opened(folder, steps, 100)
        assert [*shards] == [f"mine_train_{i:06d}.bin" for i in range(count)]
        assert len(validation) == 101
    with pytest.raises(
        ValueError, match="12 of 13 steps of 100 tokens: lower --steps to 12, or run"
    ):
        opened(folder, 13, 100)
    assert len(opened(folder, 13, 100, wrap=True)[0]) == 3
    with pytest.raises(ValueError, match="lasts 0 of 13 steps"):
        opened(folder, 13, 600, wrap=True)


@pytest.mark.parametrize("size", [1, 2])
def test_batches_from_a_later_step_are_those_of_a_run_that_was_never_cut(
    folder: Path, size: int
) -> None:
    """Through all shards and their second reading."""
    shards, _ = opened(folder, 12, 100)
    for rank in range(size):
        whole = train_batches(shards, 100, rank, size)
        for first in range(26):
            later = next(train_batches(shards, 100, rank, size, first))
            assert later.tolist() == next(whole).tolist() and len(later) == 100 // size + 1


def test_what_the_loader_advises_works_when_followed(tmp_path: Path) -> None:
    """It advised to make the same shards again, or to lower --steps where one step was too many."""
    write_shard(tmp_path / "x_train_000001.bin", np.arange(20_000) % 257)
    write_shard(tmp_path / "x_val_000000.bin", np.arange(30_000) % 257)
    sizes = [str(tmp_path), "python make.py", 4, 131_072, 2_097_152, 257, True]
    with pytest.raises(ValueError, match="30000 of 2097153 .*: lower --val-tokens to 24576, or"):
        open_shards(*sizes)
    sizes[4] = 24_576
    with pytest.raises(ValueError, match="lasts 0 of 4 .*: lower --batch-tokens to 16384, or"):
        open_shards(*sizes)
    sizes[3] = 16_384
    assert len(open_shards(*sizes)[1]) == 24_577
    with pytest.raises(ValueError, match="lasts 1 of 4 .*: lower --steps to 1, or run python make"):
        open_shards(*sizes[:6], False)
    sizes[2] = 1
    assert len(open_shards(*sizes[:6], False)[0]) == 1
    write_shard(tmp_path / "x_val_000000.bin", np.arange(8192) % 257)
    with pytest.raises(ValueError, match="8192 of 24577 .*: tokenize more text, or"):
        open_shards(*sizes)


def test_a_manifest_may_hold_a_target(folder: Path) -> None:
    assert manifest_target(str(folder), "") == manifest_target(str(folder / "none"), "") == 0
    write_manifest(folder, "bytes", 257, target=1.5)
    assert manifest_target(str(folder), "") == 1.5


# ------------------------------------------------------------------------------------- the manifest


def test_a_sound_folder_has_no_problems(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (manifest["format"], manifest["tokenizer"], manifest["vocab_size"]) == (1, "bytes", 257)
    assert [entry["tokens"] for entry in manifest["shards"].values()] == [500] * 3
    assert verify(folder) == []


def test_sha256_is_that_of_the_whole_file(folder: Path) -> None:
    out = subprocess.run(
        ["sha256sum", folder / "mine_train_000000.bin"], capture_output=True, text=True, check=True
    ).stdout
    shards = read_manifest(folder)["shards"]
    assert shards["mine_train_000000.bin"]["sha256"] == out.split()[0]


def test_extra_fields_stay_in_the_manifest(folder: Path) -> None:
    write_manifest(folder, "bytes", 257, target=1.5)
    assert read_manifest(folder)["target"] == 1.5


def break_nothing_but(defect: str, path: Path) -> None:
    if defect == "missing":
        path.unlink()
    elif defect == "extra":
        write_shard(path.with_name("mine_train_000009.bin"), np.arange(5))
    elif defect == "truncated":
        os.truncate(path, 1500)
    elif defect == "header":
        poke(path, 0, int32(7))
    elif defect == "tokens":
        write_shard(path, np.arange(400) % 257)
    elif defect == "sha256":
        poke(path, 1024 + 100, bytes([path.read_bytes()[1124] ^ 1]))
    elif defect == "vocabulary":
        poke(path, 1024 + 101, b"\xff")


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", "mine_train_000001.bin: there is no such shard"),
        ("extra", "mine_train_000009.bin: not in the manifest"),
        ("truncated", "mine_train_000001.bin: truncated"),
        ("header", "mine_train_000001.bin: no token shard"),
        ("tokens", "mine_train_000001.bin: tokens 400, but the manifest says 500"),
        ("sha256", "mine_train_000001.bin: sha256 "),
        ("vocabulary", "mine_train_000001.bin: token id "),
    ],
)
def test_each_defect_is_one_sentence(folder: Path, defect: str, message: str) -> None:
    break_nothing_but(defect, folder / "mine_train_000001.bin")
    problems = verify(folder)
    assert len(problems) == 1 and message in problems[0]
    result = run(ROOT / "data" / "shards.py", "verify", folder, cwd=folder)
    assert result.returncode == 2 and result.stderr == problems[0] + "\n"
    bad = [line for line in result.stdout.splitlines() if line.startswith("BAD")]
    assert len(result.stdout.splitlines()) == 3 and len(bad) == (defect != "extra")


def test_several_defects_are_several_sentences(folder: Path) -> None:
    break_nothing_but("missing", folder / "mine_train_000000.bin")
    break_nothing_but("sha256", folder / "mine_train_000002.bin")
    assert len(verify(folder)) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "shards": {}}'])
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="Delete it and run python data/shards.py manifest"):
        read_manifest(folder)


def test_a_manifest_is_refused_for_another_tokenizers_shards(folder: Path) -> None:
    with pytest.raises(ValueError, match="beyond the vocabulary of 100"):
        write_manifest(folder, "small", 100)
    assert read_manifest(folder)["tokenizer"] == "bytes"


def test_the_command_line_records_and_verifies(folder: Path) -> None:
    """Both as a module and as a script from elsewhere, as the README shows both."""
    (folder / "manifest.json").unlink()
    missing = run("-m", "data.shards", "verify", folder)
    assert missing.returncode == 2 and "shards.py manifest" in missing.stderr
    command = ("manifest", folder, "--tokenizer", "bytes", "--vocab-size", 257)
    assert run("-m", "data.shards", *command).returncode == 0
    again = run(ROOT / "data" / "shards.py", *command, cwd=folder)
    assert again.returncode == 2 and "has a manifest" in again.stderr
    sound = run(ROOT / "data" / "shards.py", "verify", folder, cwd=folder)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert sound.stdout.splitlines()[0] == "ok  mine_train_000000.bin 500 tokens"


# ------------------------------------------------------------------------------------ tokenize_text


DOCUMENTS = [f"Document {i}: " + "naïve café — 日本 🙂\n" * (i % 7 + 1) for i in range(60)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty documents: 20 in .txt files, then 20 in a .jsonl, then 20 in a .parquet."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "texts"
    (folder / "a").mkdir(parents=True)
    for number, text in enumerate(DOCUMENTS[:10]):
        (folder / "a" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    joined = "<|endoftext|>\n".join(DOCUMENTS[10:20])
    (folder / "a" / "10.txt").write_text(joined, encoding="utf-8")
    lines = [json.dumps({"id": 1, "text": text}) for text in DOCUMENTS[20:40]]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    table = pyarrow.table({"id": list(range(20)), "text": DOCUMENTS[40:]})
    parquet.write_table(table, folder / "c.parquet")
    (folder / "README.md").write_text("not a document")
    return folder


def tokenize(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return run(ROOT / "data" / "tokenize_text.py", *arguments, **environment)


def split_documents(tokens: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    starts = np.flatnonzero(tokens == end_of_text)
    assert starts[0] == 0
    return [part[1:] for part in np.split(tokens, starts[1:])]


def load(folder: Path, pattern: str) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(pattern))])


def test_every_document_comes_back_in_order_from_all_formats(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    result = tokenize(
        texts,
        "--out",
        out,
        "--tokenizer",
        "bytes",
        "--val-tokens",
        600,
        "--shard-tokens",
        2000,
        "--processes",
        1,
    )
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names[0] == "manifest.json" and names[-1] == "mine_val_000000.bin" and len(names) > 4
    val = split_documents(load(out, "mine_val_*"), 256)
    train = [
        document
        for path in sorted(out.glob("mine_train_*"))
        for document in split_documents(read_shard(path), 256)
    ]
    assert [bytes(d.astype(np.uint8)).decode() for d in val + train] == DOCUMENTS
    # Validation is the fewest whole documents that reach 600 tokens.
    sizes = [len(document) + 1 for document in val]
    assert sum(sizes) >= 600 > sum(sizes[:-1])
    assert all(read_header(path) <= 2000 for path in out.glob("mine_train_*"))
    assert verify(out) == [] and read_manifest(out)["vocab_size"] == 257


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Long and short documents mixed, so that a race between two processes would show."""
    lines = [json.dumps({"body": f"{i} " * (400_000 if i % 3 == 0 else 200)}) for i in range(9)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    for processes in (1, 2):
        result = tokenize(
            tmp_path / "in.jsonl",
            "--out",
            tmp_path / str(processes),
            "--name",
            "x",
            "--tokenizer",
            "bytes",
            "--field",
            "body",
            "--val-tokens",
            1000,
            "--shard-tokens",
            1_500_000,
            "--processes",
            processes,
        )
        assert result.returncode == 0, result.stderr
    one, two = (read_manifest(tmp_path / name)["shards"] for name in "12")
    assert one == two and len(one) == 3


def test_batches_keep_their_order_and_are_not_read_far_ahead() -> None:
    """Pool.imap, the usual way to do this, reads the whole corpus into memory if one process lags
    or the disk is slow. At most four batches may wait for two processes, and one is being read."""
    drawn = 0

    def batches() -> Iterator[list[str]]:
        nonlocal drawn
        for number in range(40):
            drawn += 1
            yield [f"{number}", "x" * (300_000 if number % 5 == 0 else 10)]

    for number, (first, second) in enumerate(encode_all(batches(), "bytes", 2)):
        assert bytes(first[1:].astype(np.uint8)).decode() == f"{number}"
        assert len(second) == (300_001 if number % 5 == 0 else 11)
        assert drawn <= number + 1 + 4
    assert drawn == 40 and number == 39


def test_gpt2_tokens_decode_to_the_text(texts: Path, tmp_path: Path) -> None:
    if not TIKTOKEN_CACHE.is_dir():
        pytest.skip(f"needs tiktoken's GPT-2 tables, and there is no {TIKTOKEN_CACHE}")
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    out = tmp_path / "mine"
    result = tokenize(
        texts,
        "--out",
        out,
        "--val-tokens",
        100,
        "--processes",
        2,
        TIKTOKEN_CACHE_DIR=str(TIKTOKEN_CACHE),
    )
    assert result.returncode == 0, result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
        encoding = tiktoken.get_encoding("gpt2")
    tokens = np.concatenate([load(out, "mine_val_*"), load(out, "mine_train_*")])
    documents = split_documents(tokens, 50256)
    assert [encoding.decode(document.tolist()) for document in documents] == DOCUMENTS
    assert read_manifest(out)["tokenizer"] == "gpt2" and verify(out) == []


def test_end_of_text_inside_a_line_is_only_text(tmp_path: Path) -> None:
    """Text from the web that quotes the marker must not become the control token 50256."""
    if not TIKTOKEN_CACHE.is_dir():
        pytest.skip(f"needs tiktoken's GPT-2 tables, and there is no {TIKTOKEN_CACHE}")
    (tmp_path / "in.jsonl").write_text('{"text": "say <|endoftext|> twice"}\n')
    result = tokenize(
        tmp_path / "in.jsonl",
        "--out",
        tmp_path / "out",
        "--val-tokens",
        0,
        "--processes",
        1,
        TIKTOKEN_CACHE_DIR=str(TIKTOKEN_CACHE),
    )
    assert result.returncode == 0, result.stderr
    assert (load(tmp_path / "out", "*.bin") == 50256).sum() == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"a,b", "expected names in .txt, .jsonl, .parquet"),
        (
            "in.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}',
            "line 2: no text in a field 'text' (found: body, id). Name the field with",
        ),
        ("in.jsonl", b'{"text": null}', "line 1: no text in a field 'text'"),
        ("in.jsonl", b'["text"]', "line 1: no text in a field 'text' (found: list)"),
        ("in.jsonl", b'{"text": "a"', "line 1: not JSON"),
        ("in.txt", b"", "the inputs have 0 tokens"),
        ("in.txt", b"all goes to validation", "separate the documents of a .txt by lines <|end"),
        ("in.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    result = tokenize(tmp_path / name, "--out", out, "--tokenizer", "bytes", "--processes", 1)
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists() or not list(out.iterdir())


def test_a_short_text_keeps_most_tokens_for_training_once_the_advice_is_followed(
    tmp_path: Path,
) -> None:
    """2.10 of 2.34 million tokens went into validation without a word."""
    lines = [json.dumps({"text": "x" * size}) for size in [99_999] * 23 + [199_999]]
    (path := tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = [path, "--out", tmp_path / "out", "--tokenizer", "bytes", "--processes", 1]
    result = tokenize(*words)
    assert result.returncode == 2 and not list((tmp_path / "out").iterdir())
    sentence = "2,100,000 of 2,500,000 tokens would be for validation, more than half: "
    assert sentence + "give --val-tokens 245761 here, and --val-tokens 245760 to" in result.stderr
    result = tokenize(*words, "--val-tokens", 245_761)
    assert result.returncode == 0, result.stderr
    assert "300,000 tokens, 12.0%\n" in result.stdout
    assert len(open_shards(str(tmp_path / "out"), "", 4, 8192, 245_760, 257, True)[1]) == 245_761


@pytest.mark.parametrize("sizes", [[20_000, 500_000], [500_000, 20_000]])
def test_two_documents_of_any_sizes_can_be_split_as_advised(
    tmp_path: Path, sizes: list[int]
) -> None:
    """A tenth of the text would need both documents, if the first one is short."""
    (path := tmp_path / "in.jsonl").write_text(
        "\n".join(json.dumps({"text": "x" * size}) for size in sizes)
    )
    words = [path, "--out", tmp_path / "out", "--tokenizer", "bytes", "--processes", 1]
    result = tokenize(*words)
    advice = 16_384 if sizes[0] < sizes[1] else 49_152
    assert result.returncode == 2 and f"--val-tokens {advice} to train_gpt.py" in result.stderr
    assert tokenize(*words, "--val-tokens", advice + 1).returncode == 0
    assert [len(read_shard(p)) for p in sorted((tmp_path / "out").glob("*.bin"))] == [
        sizes[1] + 1,
        sizes[0] + 1,
    ]


def test_inputs_that_are_not_there_are_named(tmp_path: Path) -> None:
    arguments = ("--out", tmp_path / "out", "--tokenizer", "bytes")
    assert "no such file or folder" in tokenize(tmp_path / "none", *arguments).stderr
    (tmp_path / "empty").mkdir()
    result = tokenize(tmp_path / "empty", *arguments)
    assert result.returncode == 2 and "no .txt, .jsonl, .parquet files" in result.stderr


def test_a_missing_parquet_column_is_named(texts: Path, tmp_path: Path) -> None:
    result = tokenize(
        texts / "c.parquet", "--out", tmp_path / "out", "--tokenizer", "bytes", "--field", "body"
    )
    assert result.returncode == 2 and "no column 'body' (found: id, text)" in result.stderr


def test_tiktoken_without_network_names_the_cache_variable(tmp_path: Path) -> None:
    """openai/tiktoken#513: GPT-2's tables come from the network at first use."""
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    (tmp_path / "in.txt").write_text("hello")
    result = tokenize(
        tmp_path / "in.txt",
        "--out",
        tmp_path / "out",
        TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"),
        HTTPS_PROXY="http://127.0.0.1:9",
        NO_PROXY="",
        no_proxy="",
    )
    assert result.returncode == 2 and "TIKTOKEN_CACHE_DIR" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


def test_shards_are_replaced_only_with_force_and_only_ones_own(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    (tmp_path / "in.jsonl").write_text('{"text": "aaaa"}\n' * 9)
    command = (
        tmp_path / "in.jsonl",
        "--out",
        out,
        "--tokenizer",
        "bytes",
        "--processes",
        1,
        "--val-tokens",
        5,
    )
    assert tokenize(*command, "--shard-tokens", 5).returncode == 0
    assert len(list(out.glob("*.bin"))) == 9
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    refused = tokenize(*command)
    assert refused.returncode == 2 and "replace them with --force" in refused.stderr
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert tokenize(tmp_path / "bad.txt", *command[1:], "--force").returncode == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    assert tokenize(*command, "--force").returncode == 0
    assert len(list(out.glob("*.bin"))) == 2 and verify(out) == []

    write_shard(out / "fineweb_train_000001.bin", np.arange(5))
    foreign = tokenize(*command, "--force")
    assert foreign.returncode == 2 and "they are not all called mine" in foreign.stderr
