"""
data/cached_fineweb10B.py against a small copy of the hub on this machine.

The server answers as huggingface.co does: HEAD and GET of /datasets/.../resolve/main/NAME redirect
to another host, with the sha256, size and commit in X-Linked-Etag, X-Linked-Size, X-Repo-Commit;
that host serves the bytes, and honours Range. The script runs as a user runs it, with HF_ENDPOINT.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data.shards import read_manifest, verify, write_shard

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
VAL, TRAIN = "fineweb_val_000000.bin", "fineweb_train_000001.bin"
STEP = 10 * 1024 * 1024  # the hub's client writes to disk in such steps


class Hub(ThreadingHTTPServer):
    """Files by name, what the server has been asked, and what is to go wrong."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.facts: dict[str, tuple[str, int]] = {}  # sha256 and size, as the hub states them
        self.asked: list[tuple[str, str, str | None]] = []  # method, name, Range
        self.cut: dict[str, int] = {}  # the next GET of this name ends after so many bytes
        self.broken: set[str] = set()  # every GET of this name is refused
        self.ignores_range = False
        self.stall = threading.Event()  # a GET that is cut waits for this before it ends
        self.stall.set()

    def add(self, name: str, content: bytes) -> None:
        self.files[name] = content
        self.facts[name] = hashlib.sha256(content).hexdigest(), len(content)

    def gets(self, name: str) -> list[str | None]:
        """The Range of every GET that reached the host of the bytes."""
        return [span for method, asked, span in self.asked if (method, asked) == ("GET", name)]

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of these tests."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Silence: the tests print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith(PREFIX) and name in self.server.files:
            sha256, size = self.server.facts[name]
            if self.command == "HEAD":
                self.server.asked.append(("HEAD", name, None))
            self.reply(
                302,
                Location=f"http://localhost:{self.server.server_port}/bytes/{name}",
                X_Linked_Etag=f'"{sha256}"',
                X_Linked_Size=size,
                X_Repo_Commit="c" * 40,
            )
        elif self.path == f"/bytes/{name}" and name in self.server.files:
            self.serve(name)
        else:
            self.reply(404, X_Error_Code="EntryNotFound")

    def serve(self, name: str) -> None:
        span = self.headers["Range"]
        self.server.asked.append((self.command, name, span))
        if name in self.server.broken:
            return self.reply(403)
        content, begin = self.server.files[name], 0
        if span and not self.server.ignores_range:
            begin = int(span.removeprefix("bytes=").partition("-")[0])
            self.reply(
                206,
                len(content) - begin,
                Content_Range=f"bytes {begin}-{len(content) - 1}/{len(content)}",
            )
        else:
            self.reply(200, len(content))
        end = self.server.cut.pop(name, None)
        self.wfile.write(content[begin:end])
        if end is not None:
            self.server.stall.wait(60)
            self.close_connection = True
        return None

    def reply(self, status: int, length: int = 0, **headers: object) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()


def shard_bytes(folder: Path, tokens: int, seed: int) -> bytes:
    path = folder / "temporary.bin"
    write_shard(path, np.random.default_rng(seed).integers(0, 50257, tokens, dtype=np.uint16))
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    for number, name in enumerate([VAL, TRAIN, "fineweb_train_000002.bin"]):
        server.add(name, shard_bytes(tmp_path, 1000 + number, number))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fineweb10B"


def command(folder: Path, *arguments: object) -> list[str]:
    script = ROOT / "data" / "cached_fineweb10B.py"
    return [sys.executable, str(script), *map(str, arguments), "--dir", str(folder)]


def environment(folder: Path, endpoint: str) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder.parent / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }


def fetch(folder: Path, hub: Hub | str, *arguments: object) -> subprocess.CompletedProcess[str]:
    endpoint = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_port}"
    return subprocess.run(
        command(folder, *arguments),
        env=environment(folder, endpoint),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def names(folder: Path) -> set[str]:
    """The files a user, or the trainer's glob, would see."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_fresh_download_is_complete_and_recorded(hub: Hub, folder: Path) -> None:
    result = fetch(folder, hub, 1)
    assert result.returncode == 0, result.stderr
    assert names(folder) == {VAL, TRAIN, "manifest.json"}
    manifest = read_manifest(folder)
    assert (manifest["tokenizer"], manifest["vocab_size"]) == ("gpt2", 50257)
    assert manifest["shards"][TRAIN] == {"tokens": 1001, "sha256": hub.facts[TRAIN][0]}
    assert (folder / VAL).read_bytes() == hub.files[VAL]
    assert verify(folder) == []


def test_a_second_run_asks_the_hub_nothing(hub: Hub, folder: Path) -> None:
    assert fetch(folder, hub, 1).returncode == 0
    hub.asked.clear()
    result = fetch(folder, hub, 1)
    assert result.returncode == 0 and result.stdout.startswith("2 shards are complete")
    assert hub.asked == []


def test_more_shards_are_added_to_those_that_are_there(hub: Hub, folder: Path) -> None:
    assert fetch(folder, hub, 1).returncode == 0
    hub.asked.clear()
    assert fetch(folder, hub, 2).returncode == 0
    assert {name for _, name, _ in hub.asked} == {"fineweb_train_000002.bin"}
    assert len(read_manifest(folder)["shards"]) == 3 and verify(folder) == []


def test_a_download_that_failed_half_way_is_continued_by_the_next_run(
    hub: Hub, folder: Path
) -> None:
    """huggingface_hub 1.33 and 2.4 delete a partial file when they fail; we must not."""
    hub.add(TRAIN, shard_bytes(folder.parent, 12_000_000, 7))
    hub.cut[TRAIN] = 15_000_000
    fail_after_cut = threading.Thread(target=refuse_once_cut, args=(hub,))
    fail_after_cut.start()
    first = fetch(folder, hub, 1)
    fail_after_cut.join()
    assert first.returncode == 2 and "run this again" in first.stderr
    assert names(folder) - {"manifest.json", VAL} == {f"{TRAIN}.{hub.facts[TRAIN][0][:12]}.part"}

    hub.broken.clear()
    hub.asked.clear()
    second = fetch(folder, hub, 1)
    assert second.returncode == 0, second.stderr
    assert hub.gets(TRAIN) == [f"bytes={STEP}-"]
    assert (folder / TRAIN).read_bytes() == hub.files[TRAIN]
    assert names(folder) == {VAL, TRAIN, "manifest.json"} and verify(folder) == []


def refuse_once_cut(hub: Hub) -> None:
    """As soon as the connection is cut, every other try is refused: an expired address, say."""
    while hub.cut:
        time.sleep(0.01)
    hub.broken.add(TRAIN)


def test_a_connection_that_breaks_once_is_continued_by_the_same_run(hub: Hub, folder: Path) -> None:
    hub.add(TRAIN, shard_bytes(folder.parent, 12_000_000, 7))
    hub.cut[TRAIN] = 15_000_000
    result = fetch(folder, hub, 1)
    assert result.returncode == 0, result.stderr
    assert hub.gets(TRAIN) == [None, f"bytes={STEP}-"]
    assert verify(folder) == []


def test_a_server_that_ignores_range_is_read_from_the_start(hub: Hub, folder: Path) -> None:
    folder.mkdir()
    (folder / f"{TRAIN}.{hub.facts[TRAIN][0][:12]}.part").write_bytes(hub.files[TRAIN][:900])
    hub.ignores_range = True
    assert fetch(folder, hub, 1).returncode == 0
    assert hub.gets(TRAIN) == ["bytes=900-"] and verify(folder) == []


def test_an_interrupted_run_ends_at_once_and_is_continued(hub: Hub, folder: Path) -> None:
    """Ctrl-C while a file is on its way: nothing may look like a shard, nothing may be lost."""
    hub.add(TRAIN, shard_bytes(folder.parent, 12_000_000, 7))
    hub.cut[TRAIN] = 15_000_000
    hub.stall.clear()
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    process = subprocess.Popen(
        command(folder, 1),
        env=environment(folder, endpoint),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part = folder / f"{TRAIN}.{hub.facts[TRAIN][0][:12]}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size >= STEP):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert TRAIN not in names(folder)

    hub.stall.set()
    hub.asked.clear()
    assert fetch(folder, hub, 1).returncode == 0
    assert hub.gets(TRAIN) == [f"bytes={STEP}-"]
    assert names(folder) == {VAL, TRAIN, "manifest.json"} and verify(folder) == []


def test_corrupted_content_is_refused_and_leaves_nothing(hub: Hub, folder: Path) -> None:
    damaged = bytearray(hub.files[TRAIN])
    damaged[2000] ^= 1
    hub.files[TRAIN] = bytes(damaged)
    result = fetch(folder, hub, 1)
    assert result.returncode == 2 and f"{TRAIN}: the download has sha256" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert names(folder) <= {VAL, "manifest.json"}

    hub.add(TRAIN, hub.files[TRAIN])  # the server's own statement is repaired
    assert fetch(folder, hub, 1).returncode == 0 and verify(folder) == []


def test_a_file_of_other_length_than_stated_is_refused(hub: Hub, folder: Path) -> None:
    hub.files[TRAIN] = hub.files[TRAIN][:-100]
    result = fetch(folder, hub, 1)
    assert result.returncode == 2 and TRAIN not in names(folder)


def test_a_server_that_states_no_sha256_is_refused(hub: Hub, folder: Path) -> None:
    hub.facts[VAL] = "d41d8cd98f00b204e9800998ecf8427e", len(hub.files[VAL])
    result = fetch(folder, hub, 0)
    assert result.returncode == 2 and "names no sha256" in result.stderr
    assert hub.gets(VAL) == []


def test_a_truncated_shard_is_fetched_again(hub: Hub, folder: Path) -> None:
    """The original script looks only whether the name exists, and an assert fails in the loader."""
    assert fetch(folder, hub, 1).returncode == 0
    os.truncate(folder / TRAIN, 1500)
    hub.asked.clear()
    assert fetch(folder, hub, 1).returncode == 0
    assert hub.gets(TRAIN) == [None] and hub.gets(VAL) == []
    assert verify(folder) == []


def test_verify_finds_and_mends_a_flipped_bit(hub: Hub, folder: Path) -> None:
    assert fetch(folder, hub, 1).returncode == 0
    with open(folder / VAL, "r+b") as file:
        file.seek(1500)
        file.write(bytes([hub.files[VAL][1500] ^ 1]))
    hub.asked.clear()
    assert fetch(folder, hub, 1).returncode == 0 and hub.asked == []  # the length is right
    assert fetch(folder, hub, 1, "--verify", "--offline").returncode == 2
    assert fetch(folder, hub, 1, "--verify").returncode == 0
    assert hub.gets(VAL) == [None] and hub.gets(TRAIN) == [] and verify(folder) == []


def test_shards_from_elsewhere_are_checked_and_kept(hub: Hub, folder: Path) -> None:
    """Files that another script fetched are hashed against the hub, and not fetched again."""
    folder.mkdir()
    for name in (VAL, TRAIN):
        (folder / name).write_bytes(hub.files[name])
    os.truncate(folder / TRAIN, 1500)
    assert fetch(folder, hub, 1).returncode == 0
    assert hub.gets(VAL) == [] and hub.gets(TRAIN) == [None] and verify(folder) == []


def test_offline_mode_says_complete_without_asking(hub: Hub, folder: Path) -> None:
    assert fetch(folder, hub, 1).returncode == 0
    hub.asked.clear()
    for flags in (["--offline"], ["--offline", "--verify"]):
        result = fetch(folder, hub, 1, *flags)
        assert (result.returncode, result.stderr) == (0, "")
    assert hub.asked == []


def test_offline_mode_names_what_is_missing(hub: Hub, folder: Path) -> None:
    assert fetch(folder, hub, 1).returncode == 0
    os.truncate(folder / VAL, 1500)
    hub.asked.clear()
    result = fetch(folder, hub, 2, "--offline")
    assert result.returncode == 2 and hub.asked == []
    reason, sentence = result.stderr.splitlines()
    assert "truncated: 1500 bytes" in reason
    assert f"2 of 3 shards are missing or damaged in {folder}" in sentence
    assert f"{VAL}, fineweb_train_000002.bin. Run python data/cached_fineweb10B.py 2" in sentence


def test_offline_mode_admits_that_it_knows_no_sha256(hub: Hub, folder: Path) -> None:
    folder.mkdir()
    (folder / VAL).write_bytes(hub.files[VAL])
    result = fetch(folder, hub, 0, "--offline")
    assert result.returncode == 0 and "no sha256 was compared" in result.stdout


def test_no_server_is_one_sentence_within_seconds(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        started = time.monotonic()
        result = fetch(folder, f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert time.monotonic() - started < 20
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "Could not fetch the shards: ConnectError" in result.stderr
    assert names(folder) == set()


def test_a_server_that_never_answers_is_given_up_within_seconds(folder: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        result = fetch(folder, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - started < 20
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "Timeout" in result.stderr and names(folder) == set()


def test_a_disk_that_is_too_small_is_named_before_the_download(hub: Hub, folder: Path) -> None:
    hub.facts[TRAIN] = hub.facts[TRAIN][0], 10**18
    result = fetch(folder, hub, 1)
    assert result.returncode == 2 and "GB free, 1000000000.0 GB are needed" in result.stderr
    assert hub.gets(VAL) == hub.gets(TRAIN) == []


def test_two_downloads_into_one_folder_do_not_mix(hub: Hub, folder: Path) -> None:
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir()
    with WeakFileLock(folder / ".lock"):
        result = fetch(folder, hub, 1)
    assert result.returncode == 2 and "lock" in result.stderr and hub.asked == []


@pytest.mark.parametrize("count", [-1, 104])
def test_a_count_out_of_range_is_an_error(folder: Path, count: int) -> None:
    result = fetch(folder, "http://127.0.0.1:9", count)
    assert result.returncode == 2 and f"N is {count}, but there are 103" in result.stderr
