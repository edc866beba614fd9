"""tools/export.py: weights that load elsewhere into the model that was validated."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, in_fresh_python
from test_sample import need_gpt2, write_checkpoint

import train_gpt
from optimizers import Muon, WeightAverage

sys.path.append(str(ROOT / "tools"))
import export  # noqa: E402

pytest.importorskip("safetensors", reason="safetensors is not installed")

TOKENS = torch.arange(3 * 32).reshape(3, 32) * 7 % 257
ELSEWHERE = """
import importlib.util, torch
from model import load
assert not any(map(importlib.util.find_spec, ("train_gpt", "models", "optimizers")))
torch.save(load()(torch.arange(3 * 32).reshape(3, 32) * 7 % 257), "logits.pt")
"""


def exported(checkpoint: Path, folder: Path) -> Path:
    """Export into a folder that holds nothing else."""
    assert export.main([str(checkpoint), str(folder / "out")]) == 0
    return folder / "out"


def readme_lines(out: Path) -> str:
    return re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one sentence of a refusal."""
    assert export.main([*map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("export.py: "), err
    return err


@torch.no_grad()
def test_a_fresh_process_elsewhere_computes_the_trainers_logits_and_draws_text(
    tmp_path: Path,
) -> None:
    """Bit for bit, as the file has the trainer's own modules; then the lines of its README."""
    model = write_checkpoint(tmp_path / "run.pt")
    out = exported(tmp_path / "run.pt", tmp_path)
    code, said, err = in_fresh_python("-c", ELSEWHERE + readme_lines(out), cwd=out)
    assert (code, err) == (0, ""), err
    expected = model.logits(model.hidden(TOKENS))
    assert expected.std() > 0.1
    assert torch.equal(torch.load(out / "logits.pt", weights_only=True), expected)
    assert said.startswith("def ") and len(said) > 50


@torch.no_grad()
def test_a_model_of_bfloat16_and_gpt2s_tokens_computes_the_trainers_logits(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "run.pt", vocab_size=50304, dtype="bfloat16")
    out = exported(tmp_path / "run.pt", tmp_path)
    there = runpy.run_path(str(out / "model.py"))["load"]()
    assert there.embed.weight.dtype == torch.bfloat16
    assert torch.equal(there(TOKENS), model.logits(model.hidden(TOKENS)))


def test_the_lines_of_its_readme_draw_gpt2s_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    need_gpt2()
    write_checkpoint(tmp_path / "run.pt", vocab_size=50304)
    out = exported(tmp_path / "run.pt", tmp_path)
    (out / "lines.py").write_text(readme_lines(out))
    monkeypatch.syspath_prepend(out)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    capsys.readouterr()
    runpy.run_path(str(out / "lines.py"))
    monkeypatch.delitem(sys.modules, "model")
    said = capsys.readouterr().out
    assert said.startswith("The sea") and len(said) > 50


def test_averaged_weights_are_exported_as_validation_saw_them(
    tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's own weights are those that training goes on from."""

    class Averaged(Muon):
        around = (WeightAverage(span=3),)

    monkeypatch.setitem(train_gpt.OPTIMIZERS, "averaged", Averaged)
    words = tiny("--optimizer", "averaged", "--checkpoint", "run.pt", "--log", "a.txt")
    assert train_gpt.main(words) == 0
    saved = torch.load("run.pt", weights_only=True)
    out = exported(Path("run.pt"), tmp_path)
    from safetensors.torch import load_file

    weights = load_file(out / "model.safetensors")
    name = "blocks.0.attn.q.weight"
    assert not torch.equal(weights[name], saved["model"][name])
    config = json.loads((out / "config.json").read_text())
    assert config["run"]["val_loss"] == saved["points"][-1][1]
    model = train_gpt.build_model(train_gpt.Config(**TINY, compile=False), torch.device("cpu"))
    model.load_state_dict(weights)
    corpus = Path(words[3])
    val, count = train_gpt.open_shards(str(corpus), "", 4, 512, 512, 257, True)[1], 512
    rows = val.to(torch.int64)
    with torch.no_grad():
        loss = model(rows[:-1].view(-1, 32), rows[1:].view(-1, 32)).item() / count
    assert loss == pytest.approx(config["run"]["val_loss"], abs=1e-5)


def test_the_folder_says_what_the_weights_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run.pt")
    out = exported(tmp_path / "run.pt", tmp_path)
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "model.py",
        "config.json",
        "README.md",
    }
    config = json.loads((out / "config.json").read_text())
    assert (config["tokenizer"], config["end_of_text"]) == ("bytes", 256)
    assert config["model"]["width"] == 32 and config["run"]["step"] == 4
    assert (out / "model.py").read_text().count("train_gpt") == 1  # in its first lines


def test_what_cannot_be_exported_is_one_sentence_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, full = tmp_path / "run.pt", tmp_path / "out", tmp_path / "full"
    write_checkpoint(run, spread=float("inf"))
    assert "holds head.weight that are not finite: its run diverged" in refused(capsys, run, out)
    write_checkpoint(run, vocab_size=300)
    assert "no tokenizer has 300 tokens" in refused(capsys, run, out)
    write_checkpoint(run)
    full.mkdir()
    (full / "a").touch()
    for taken in (full, run):
        assert f"{taken} exists, expected a new or an empty folder" in refused(capsys, run, taken)
    assert "there is no checkpoint" in refused(capsys, tmp_path / "none.pt", out)
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "is no whole checkpoint" in refused(capsys, tmp_path / "text.pt", out)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "run pip install safetensors" in refused(capsys, run, out)
    assert not out.exists() and [*full.iterdir()] == [full / "a"]
