"""tools/sample.py: text from a checkpoint, drawn by the loop that the trainer's demo uses."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import train_gpt
from models.generate import generate
from train_gpt import Config

sys.path.append(str(ROOT / "tools"))
import sample  # noqa: E402

SMALL = {name: TINY[name] for name in Config().scoped("model") if name in TINY}
ROW = SMALL["row_tokens"]


def write_checkpoint(path: Path, spread: float = 0.3, **changes: object) -> train_gpt.GPT:
    """A model with random weights, head included, saved as the trainer saves it."""
    config = Config(**SMALL | changes)
    model = train_gpt.build_model(config, torch.device("cpu"))
    model.initialise(seed=5)
    with torch.no_grad():
        model.head.weight.normal_(std=spread, generator=torch.Generator().manual_seed(6))
    saved = dict(config=train_gpt.asdict(config), model=model.state_dict(), step=4, seed=1)
    torch.save(saved, path)
    return model


def need_gpt2() -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    try:
        tiktoken.get_encoding("gpt2")
    except OSError:
        pytest.skip("tiktoken's gpt2 tables are not here: set TIKTOKEN_CACHE_DIR")


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert sample.main([*words, "--device", "cpu"]) == 0
    return capsys.readouterr().out


@torch.no_grad()
def demo_loop(model: train_gpt.GPT, prompt: bytes, count: int, seed: int) -> list[int]:
    """What the trainer did before it shared its loop with this tool."""
    generator, ids = torch.Generator().manual_seed(seed), [256, *prompt]
    width = len(model.rotary[0])
    for _ in range(count):
        recent = torch.tensor([ids[-width:]])
        padding = width - recent.size(1)
        x = model.hidden(torch.nn.functional.pad(recent, (0, padding)))[:, -1 - padding]
        p = (model.logits(x)[0, :256] / 0.7).softmax(-1)
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
    return ids


def test_the_shared_loop_draws_what_the_demo_always_drew(tmp_path: Path) -> None:
    """To the last byte, and beyond the context of 32 tokens."""
    model = write_checkpoint(tmp_path / "run.pt")
    for seed in (1, 2):
        drawn = generate(model, [256, *b"def "], 50, ROW, seed)
        assert drawn == demo_loop(model, b"def ", 50, seed)


def test_every_input_has_the_same_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without dynamic shapes, a model would compile anew for each other length."""
    model, shapes = write_checkpoint(tmp_path / "run.pt"), set()
    honest = model.hidden
    monkeypatch.setattr(model, "hidden", lambda row: (shapes.add(row.shape), honest(row))[1])
    generate(model, [256, 65], 40, ROW, seed=1)
    assert shapes == {(1, 32)}


def test_the_tool_repeats_the_sample_that_ends_a_run(
    tiny: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", TINY | {"sample_tokens": 40})
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt", "--seed", "3")) == 0
    out = capsys.readouterr().out
    words = ("--prompt", "def ", "--tokens", "40", "--seed", "3")
    text = said(capsys, "run.pt", *words)
    assert text.startswith("def ") and f"A sample of the model's text:\n{text}" in out


def test_a_seed_settles_the_text_and_another_changes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_checkpoint(path := tmp_path / "run.pt")
    first, again, other = (
        said(capsys, str(path), "--seed", seed, "--tokens", "40") for seed in ("7", "7", "8")
    )
    assert first == again != other


def test_temperature_0_and_top_k_1_take_the_likeliest(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, path = write_checkpoint(tmp_path / "run.pt"), str(tmp_path / "run.pt")
    with torch.no_grad():
        likeliest = int(model.logits(model.hidden(torch.tensor([[256, 97]])))[0, -1, :256].argmax())
    expected = bytes([97, likeliest]).decode(errors="replace")
    for flags in (["--temperature", "0"], ["--temperature", "1e-9"], ["--top-k", "1"]):
        words = (path, "--prompt", "a", "--tokens", "1", *flags)
        assert said(capsys, *words) == expected + "\n"


def test_top_k_draws_from_the_k_likeliest_only(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "run.pt")
    with torch.no_grad():
        allowed = model.logits(model.hidden(torch.tensor([[256]])))[0, -1, :256].topk(3).indices
    drawn = {generate(model, [256], 1, ROW, seed, 5.0, 3)[1] for seed in range(40)}
    assert drawn == set(allowed.tolist())


def test_the_end_of_text_is_never_drawn(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "run.pt")
    with torch.no_grad():
        model.head.bias[256] = 100
    assert max(generate(model, [256], 60, ROW, seed=1)[1:]) < 256


def test_a_vocabulary_of_50304_is_that_of_gpt2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Ids from 50257 up pad the head and are no tokens: they must not be drawn either."""
    need_gpt2()
    write_checkpoint(path := tmp_path / "run.pt", vocab_size=50304, dtype="bfloat16")
    words = ("--prompt", "Hello wörld", "--tokens", "30", "--temperature", "9")
    text = said(capsys, str(path), *words)
    assert text.startswith("Hello wörld") and len(text) > 40


def test_what_is_not_a_checkpoint_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_checkpoint(good := tmp_path / "good.pt")
    saved = torch.load(good, weights_only=True)
    spoilt = dict(
        missing=None,
        text=b"no checkpoint",
        cut=good.read_bytes()[:3000],
        weights={"config": saved["config"], "model": {}},
        settings={"config": {"layers": 2}, "model": saved["model"]},
        shape={**saved, "config": saved["config"] | {"width": 64}},
        vocabulary={**saved, "config": saved["config"] | {"vocab_size": 300}},
        nothing={"config": saved["config"]},
    )
    for name, content in spoilt.items():
        path = tmp_path / f"{name}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            torch.save(content, path)
        assert sample.main([str(path), "--device", "cpu"]) == 2, name
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and f"{name}.pt" in err, err


@pytest.mark.parametrize(
    "value, name", [("nan", "head.bias"), ("inf", "head.bias"), ("1e38", "logits")]
)
def test_a_model_that_did_not_survive_its_training_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, value: str, name: str
) -> None:
    """It was a traceback of torch.multinomial. Finite weights may still give infinite logits."""
    model = write_checkpoint(path := tmp_path / "run.pt")
    with torch.no_grad():
        model.head.bias[3] = float(value)
    torch.save(torch.load(path, weights_only=True) | {"model": model.state_dict()}, path)
    assert sample.main([str(path), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{path} holds {name} that are not finite: its run diverged" in err


def test_a_model_of_an_unknown_vocabulary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_checkpoint(path := tmp_path / "run.pt", vocab_size=300)
    assert sample.main([str(path), "--device", "cpu"]) == 2
    assert "no tokenizer has 300 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--tokens -1", "--temperature nan", "--top-k -2", "--seed -1"])
def test_numbers_out_of_range_are_refused(flags: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        sample.main(["run.pt", *flags.split()])
    assert stop.value.code == 2 and "0 or more" in capsys.readouterr().err


def test_it_runs_as_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_checkpoint(path := tmp_path / "run.pt")
    words = [str(path), "--tokens", "3", "--prompt", "x", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools/sample.py"), run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("x")
