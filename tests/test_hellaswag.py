"""tools/hellaswag.py against an example-by-example computation, and against what may go wrong."""

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, in_fresh_python
from test_sample import need_gpt2, write_checkpoint

sys.path.append(str(ROOT / "tools"))
import hellaswag  # noqa: E402
from hellaswag import Example  # noqa: E402
from sample import load_model, tokenizer_of  # noqa: E402

WORDS = "a man is sitting on the roof and then he starts to sing quite loudly".split()


def made_examples(count: int) -> list[Example]:
    """Of different lengths, some of them beyond the context of 32 bytes."""
    draws = torch.Generator().manual_seed(0)

    def words(most: int) -> str:
        chosen = torch.randint(
            len(WORDS), (1 + int(torch.randint(most, (), generator=draws)),), generator=draws
        )
        return " ".join(WORDS[i] for i in chosen)

    labels = torch.randint(4, (count,), generator=draws).tolist()
    return [Example(words(6), [words(5) for _ in range(4)], label) for label in labels]


def write_jsonl(path: Path, examples: list[Example], **more: object) -> Path:
    rows = (
        dict(ind=i, ctx=e.context, endings=e.endings, label=e.label, **more)
        for i, e in enumerate(examples)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def plainly(checkpoint: Path, examples: list[Example]) -> tuple[float, float]:
    """acc and acc_norm with one row at a time, without padding, and losses by log-softmax."""
    model, config, _ = load_model(checkpoint, torch.device("cpu"))
    tokenizer, _ = tokenizer_of(config)
    right, right_norm = 0, 0
    for context, endings, label in examples:
        totals, means = [], []
        for ending in endings:
            scored = list(tokenizer.encode(" " + ending))
            ids = torch.tensor([*tokenizer.encode(context), *scored])[-config.row_tokens - 1 :]
            log_p = F.log_softmax(model.logits(model.hidden(ids[None, :-1]))[0], dim=-1)
            loss = -log_p.gather(1, ids[1:, None])[-len(scored) :, 0].double()
            totals.append(loss.sum().item())
            means.append(loss.mean().item())
        right += totals.index(min(totals)) == label
        right_norm += means.index(min(means)) == label
    return right / len(examples), right_norm / len(examples)


def scores(capsys: pytest.CaptureFixture, *words: object) -> dict[str, float]:
    """The numbers of the one line that is printed."""
    assert hellaswag.main([*map(str, words), "--device", "cpu"]) == 0
    out, _ = capsys.readouterr()
    line = re.fullmatch(
        r"hellaswag acc_norm:(\d\.\d{4}) \+- (\d\.\d{4}) acc:(\d\.\d{4}) \+- "
        r"\d\.\d{4} examples:(\d+) cut:(\d+) step:\d+ \S+\n",
        out,
    )
    assert line, out
    names = ("acc_norm", "error", "acc", "examples", "cut")
    return dict(zip(names, map(float, line.groups()), strict=True))


def fails(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one sentence of a refusal."""
    assert hellaswag.main([*map(str, words), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return err


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_accuracy_is_that_of_one_example_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture, rows: int
) -> None:
    """Whatever the batch is: 60 endings in rows of 1, 7 (the last one not full) and 64."""
    examples = made_examples(15)
    write_checkpoint(checkpoint := tmp_path / "run.pt")
    data = write_jsonl(tmp_path / "val.jsonl", examples, split="val", source_id="x")
    found = scores(capsys, checkpoint, "--data", data, "--rows", rows)
    acc, acc_norm = plainly(checkpoint, examples)
    assert (found["acc"], found["acc_norm"]) == (round(acc, 4), round(acc_norm, 4))
    assert found["examples"] == 15 and 0 < found["cut"] < 15
    assert found["error"] == round((acc_norm * (1 - acc_norm) / 15) ** 0.5, 4)


def test_losses_are_those_of_rows_alone_and_every_input_has_one_shape(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "run.pt")
    _, config, _ = load_model(tmp_path / "run.pt", torch.device("cpu"))
    tokenizer, _ = tokenizer_of(config)
    rows = [row for e in made_examples(6) for row in hellaswag.render(e, tokenizer, 32)[0]]
    honest, shapes = model.hidden, set()
    model.hidden = lambda inputs: (shapes.add(inputs.shape), honest(inputs))[1]
    together = hellaswag.losses(model, rows, 5, 32)
    assert shapes == {(5, 32)} and len(together) == 24
    alone = [hellaswag.losses(model, [row], 1, len(row.tokens) - 1)[0] for row in rows]
    assert together == pytest.approx(alone, rel=1e-5)


def fond_of_a(path: Path) -> Path:
    """A model that gives 'a' 1.6 nats, 'z' 4.6, and all other bytes about 6, whatever it reads."""
    model = write_checkpoint(path, spread=0.0)
    with torch.no_grad():
        model.head.bias[ord("a")], model.head.bias[ord("z")] = 4.6, 1.4
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"model": model.state_dict()}, path)
    return path


def test_a_model_that_prefers_the_right_ending_gets_1(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = fond_of_a(tmp_path / "run.pt")
    right = [
        Example("x", ["aa" if i == label else "qq" for i in range(4)], label) for label in range(4)
    ]
    wrong = [
        Example("x", ["qq" if i == label else "aa" for i in range(4)], label) for label in range(4)
    ]
    for examples, share in ((right, 1.0), (wrong, 0.0), (right + wrong, 0.5)):
        data = write_jsonl(tmp_path / "val.jsonl", examples)
        found = scores(capsys, checkpoint, "--data", data)
        assert found["acc"] == found["acc_norm"] == share


def test_acc_norm_forgives_a_long_ending_and_acc_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = fond_of_a(tmp_path / "run.pt")
    examples = [Example("x", ["z", "zz", "zzz", "a" * 12], 3)] * 2
    found = scores(capsys, checkpoint, "--data", write_jsonl(tmp_path / "v.jsonl", examples))
    assert (found["acc"], found["acc_norm"]) == (0.0, 1.0)


def test_the_space_belongs_to_the_ending_and_the_context_is_not_scored(tmp_path: Path) -> None:
    write_checkpoint(path := tmp_path / "run.pt")
    tokenizer, _ = tokenizer_of(load_model(path, torch.device("cpu"))[1])
    rows, cut = hellaswag.render(Example("ab", ["c", "de"], 0), tokenizer, 32)
    assert [(bytes(row.tokens), row.scored) for row in rows] == [(b"ab c", 2), (b"ab de", 3)]
    assert not cut


def test_what_is_too_long_is_cut_on_the_left(tmp_path: Path) -> None:
    """33 tokens are 32 inputs and their 32 targets; of a longer ending all 32 targets count."""
    write_checkpoint(path := tmp_path / "run.pt")
    tokenizer, _ = tokenizer_of(load_model(path, torch.device("cpu"))[1])
    for context, ending, scored, cut in (
        ("c" * 30, "ee", 3, False),
        ("c" * 31, "ee", 3, True),
        ("c", "e" * 50, 32, True),
    ):
        rows, was_cut = hellaswag.render(Example(context, [ending, "e"], 0), tokenizer, 32)
        text = f"{context} {ending}".encode()
        assert bytes(rows[0].tokens) == text[-33:] and rows[0].scored == scored
        assert was_cut == cut


def test_an_empty_context_becomes_the_end_of_text(tmp_path: Path) -> None:
    write_checkpoint(path := tmp_path / "run.pt")
    tokenizer, _ = tokenizer_of(load_model(path, torch.device("cpu"))[1])
    rows, _ = hellaswag.render(Example("", ["e", ""], 0), tokenizer, 32)
    assert rows == [([256, 32, 101], 2), ([256, 32], 1)]


def test_gpt2_tokens_are_scored_like_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    need_gpt2()
    examples = made_examples(8)
    write_checkpoint(checkpoint := tmp_path / "run.pt", vocab_size=50304)
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    found = scores(capsys, checkpoint, "--data", data, "--rows", 3)
    acc, acc_norm = plainly(checkpoint, examples)
    assert (found["acc"], found["acc_norm"]) == (round(acc, 4), round(acc_norm, 4))


def test_parquet_with_labels_as_text_is_read_like_jsonl(tmp_path: Path) -> None:
    """On the hub, labels are digits in quotes; in the original file they are numbers."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    examples = made_examples(5)
    rows = [dict(ind=1, ctx=e.context, endings=e.endings, label=str(e.label)) for e in examples]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val.parquet")
    assert hellaswag.read_examples(tmp_path / "val.parquet") == examples
    assert hellaswag.read_examples(write_jsonl(tmp_path / "v.jsonl", examples)) == examples


def test_limit_takes_the_first_and_out_appends_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    examples, out = made_examples(6), tmp_path / "new/results.jsonl"
    write_checkpoint(checkpoint := tmp_path / "run.pt")
    data = write_jsonl(tmp_path / "val.jsonl", examples)
    for _ in range(2):
        found = scores(capsys, checkpoint, "--data", data, "--limit", 3, "--out", out)
    first, second = map(json.loads, out.read_text().splitlines())
    assert first == second and (first["examples"], first["step"], first["seed"]) == (3, 4, 1)
    assert first["bench"] == "hellaswag" and first["data"] == str(data)
    assert (first["acc"], first["acc_norm"]) == plainly(checkpoint, examples[:3])
    assert found["acc"] == round(first["acc"], 4)


GOOD = dict(ctx="a", endings=["b", "c", "d", "e"], label=3)
BAD_LINES = [
    ("{", "is not JSON"),
    ("[1]", '"ctx" is None'),
    (GOOD | {"ctx": 1}, '"ctx" is 1'),
    (GOOD | {"endings": "bcde"}, "\"endings\" is 'bcde'"),
    (GOOD | {"endings": ["b"]}, "endings"),
    (GOOD | {"endings": ["b", None]}, "endings"),
    (GOOD | {"label": 4}, "expected 0 to 3"),
    (GOOD | {"label": -1}, '"label" is -1'),
    (GOOD | {"label": ""}, "\"label\" is ''"),
    (GOOD | {"label": True}, '"label" is True'),
    (GOOD | {"label": 1.0}, '"label" is 1.0'),
    ({"endings": GOOD["endings"], "label": 0}, '"ctx" is None'),
]


@pytest.mark.parametrize("bad, said", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture, bad: object, said: str
) -> None:
    write_checkpoint(checkpoint := tmp_path / "run.pt")
    text = bad if isinstance(bad, str) else json.dumps(bad)
    (data := tmp_path / "val.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    err = fails(capsys, checkpoint, "--data", data)
    assert f"{data} line 3" in err and said in err


def test_files_that_cannot_be_read_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_checkpoint(checkpoint := tmp_path / "run.pt")
    data = tmp_path / "val.jsonl"
    assert f"there is no file {data}" in fails(capsys, checkpoint, "--data", data)
    data.write_text("\n \n")
    assert "holds no examples" in fails(capsys, checkpoint, "--data", data)
    data.write_bytes(b'{"ctx": "\xff"}')
    assert f"{data} line 1 is not JSON" in fails(capsys, checkpoint, "--data", data)
    (other := tmp_path / "val.parquet").write_bytes(b"PAR1 no parquet")
    assert "val.parquet" in fails(capsys, checkpoint, "--data", other)
    assert "there is no checkpoint" in fails(capsys, tmp_path / "missing.pt", "--data", data)


@pytest.mark.parametrize("out", ["", "val.jsonl/x"])
def test_an_out_that_cannot_be_written_is_refused_before_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture, out: str
) -> None:
    """A folder was a traceback after the whole evaluation, and the result was lost."""
    write_checkpoint(checkpoint := tmp_path / "run.pt")
    data = write_jsonl(tmp_path / "val.jsonl", made_examples(1))
    assert "cannot append to --out" in fails(
        capsys, checkpoint, "--data", data, "--out", tmp_path / out
    )


def test_a_model_of_nans_has_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(checkpoint := tmp_path / "run.pt", spread=float("inf"))
    data = write_jsonl(tmp_path / "val.jsonl", made_examples(2))
    assert "not finite" in fails(capsys, checkpoint, "--data", data)


# ---- the hub ---------------------------------------------------------------------------------


class Answer(BaseHTTPRequestHandler):
    """One file, with what the hub says about it; the server counts the questions."""

    def log_message(self, *_: object) -> None:
        """Silence: the tests print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        wanted = f"/datasets/Rowan/hellaswag/resolve/{hellaswag.REVISION}/{hellaswag.FILE}"
        content = self.server.content if self.path == wanted else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", hellaswag.REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    rows = [dict(ctx=e.context, endings=e.endings, label=str(e.label)) for e in made_examples(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "made.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.content, server.asked = (tmp_path / "made.parquet").read_bytes(), []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_python(folder: Path, port: int, *words: str) -> tuple[int, str, str]:
    """What `python words...` does in this folder, with a hub at this port."""
    env = dict(
        HF_ENDPOINT=f"http://127.0.0.1:{port}",
        HF_HOME=str(folder / "hf"),
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_ETAG_TIMEOUT="2",
        HF_HUB_OFFLINE="0",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    return in_fresh_python(*words, cwd=folder, **env)


def test_data_comes_from_the_hub_once_and_is_checked(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """Asked, and fetched, by the first of three; the third expects the sha256 of the real file."""
    sha256 = hashlib.sha256(hub.content).hexdigest()
    write_checkpoint(tmp_path / "run.pt")
    program = f"""import sys; sys.path.append({str(ROOT / "tools")!r}); import hellaswag
for hellaswag.SHA256 in {[sha256, sha256, hellaswag.SHA256]!r}:
    code = hellaswag.main(["run.pt", "--device", "cpu"])
sys.exit(code)"""
    code, out, err = in_python(tmp_path, hub.server_port, "-c", program)
    first, second = out.splitlines()
    assert code == 2 and "examples:3" in first and first == second
    assert f"has sha256 {sha256}, expected 8998" in err.splitlines()[-1]
    assert [command for command, _ in hub.asked].count("GET") == 1 and len(hub.asked) == 3


def test_without_a_network_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    write_checkpoint(tmp_path / "run.pt")
    run = [str(ROOT / "tools/hellaswag.py"), "run.pt", "--device", "cpu"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        code, out, err = in_python(tmp_path, unused.getsockname()[1], *run)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "cannot fetch Rowan/hellaswag from the hub (ConnectError" in err and "--data" in err
