"""records/options.py: flags, presets, files of settings, and --help."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train_gpt
from records.log import parse_log
from train_gpt import Config, parse_config


def printed(words: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as left:
        parse_config(words)
    assert not left.value.code
    return capsys.readouterr().out


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_a_printed_file_gives_the_same_settings(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--preset", preset, "--set", "fc.lr=0.5", "--set", "schedule.warmup=3"]
    (file := tmp_path / "my.json").write_text(printed([*words, "--print-config"], capsys))
    assert parse_config(["--config", str(file)]) == parse_config(words)


def test_flags_win_over_a_file_and_a_file_over_its_preset(tmp_path: Path) -> None:
    (file := tmp_path / "my.json").write_text('{"preset": "demo", "steps": 9, "set": ["fc.lr=1"]}')
    config = parse_config(["--config", str(file), "--seed", "3", "--set", "attn.lr=2"])
    assert (config.preset, config.steps, config.seed, config.width) == ("demo", 9, 3, 128)
    assert config.set == ("fc.lr=1", "attn.lr=2")
    assert parse_config(["--config", str(file), "--steps", "7"]).steps == 7


def test_a_file_makes_a_preset_of_ones_own_upon_another(tmp_path: Path) -> None:
    (file := tmp_path / "wide.json").write_text('{"width": 192, "lr_scale": 2}')
    config = parse_config(["--preset", "demo", "--config", str(file)])
    assert config == parse_config(["--preset", "demo", "--set", "model.width=192"]).__class__(
        **asdict(parse_config(["--preset", "demo"])) | dict(preset="wide", width=192, lr_scale=2.0)
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"stepz": 3}', "'stepz' is none of preset, optimizer"),
        ('{"steps": "3"}', "steps: found '3', expected a value like 3250"),
        ('{"steps": 3.5}', "steps: found 3.5, expected a value like 3250"),
        ('{"steps": true}', "steps: found True"),
        ('{"set": "fc.lr=1"}', "set: found 'fc.lr=1', expected a value like ()"),
        ('{"set": [1]}', "set: found [1]"),
        ('{"steps": 0}', "steps is 0, expected 1 or more"),
        ('{"optimizer": "lion"}', "optimizer is 'lion', expected one of adamw"),
        ('{"preset": "track3", "width": 64}', "track3 has model.width 768, found 64"),
        (None, "my.json"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if text is not None:
        (tmp_path / "my.json").write_text(text)
    assert train_gpt.main(["--config", str(tmp_path / "my.json")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_log_is_a_file_of_settings(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one's own preset can be repeated from its log alone, in another folder."""
    Path("mine.json").write_text('{"width": 48, "sample_tokens": 0}')
    words = tiny("--config", "mine.json", "--log", "a.txt", "--set", "schedule.clip=1.0")
    assert train_gpt.main(words) == 0
    Path("mine.json").unlink()
    again = ["--config", "a.txt", "--device", "cpu", "--log", "b.txt"]
    assert train_gpt.main(again) == 0
    a, b = parse_log("a.txt"), parse_log("b.txt")
    assert a.meta["preset"] == b.meta["preset"] == "mine" and b.meta["config"]["clip"] == 1.0
    assert [p.val_loss for p in a.points] == [p.val_loss for p in b.points]


# ---- the model's size ----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["track3", "prose"])
def test_a_fixed_track_has_one_model(preset: str) -> None:
    for change, found in (("layers=6", 6), ("width=512", 512), ("dtype=float32", "float32")):
        name = change.partition("=")[0]
        said = f"{preset} has model.{name} .*, found {found}: choose --preset demo, or a --config"
        with pytest.raises(ValueError, match=said):
            parse_config(["--preset", preset, "--set", f"model.{change}"])
    assert parse_config(["--preset", preset, "--set", "model.layers=12"]).layers == 12


def test_demo_may_have_another_model(tiny: Callable) -> None:
    assert parse_config(["--preset", "demo", "--set", "model.layers=3"]).layers == 3
    words = tiny("--set", "model.layers=1", "--set", "model.expansion=2", "--log", "a.txt")
    assert train_gpt.main(words) == 0
    config = parse_log("a.txt").meta["config"]
    assert (config["layers"], config["expansion"], config["set"]) == (1, 2, [])


@pytest.mark.parametrize(
    "words, said",
    [
        (["--set", "model.layer=3"], "--set model.layer=3: names of model: model, vocab_size"),
        (["--set", "model.layers=0"], "layers is 0, expected 1 or more"),
        (["--set", "model.layers=two"], "--set model.layers=two: found None"),
        (["--set", "model.width=3.5"], "found 3.5, expected a value like 768"),
    ],
)
def test_a_wrong_size_is_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_config(["--preset", "demo", *words])


# ---- --eval and --keep ---------------------------------------------------------------------------


def test_eval_needs_no_preset(tiny: Callable, capsys: pytest.CaptureFixture) -> None:
    """Without --preset it asked for track3's model, and said that layers were another."""
    words = tiny("--checkpoint", "run.pt", "--log", "a.txt", "--set", "schedule.average=2")
    assert train_gpt.main(words) == 0
    capsys.readouterr()
    assert train_gpt.main(["--eval", "run.pt", "--device", "cpu"]) == 0
    last = parse_log("a.txt").points[-1].val_loss
    assert capsys.readouterr().out == f"step:4 val_loss:{last:.5f} run.pt\n"
    assert train_gpt.main(["--eval", "run.pt", "--preset", "demo"]) == 2
    assert "run.pt has preset tiny, found demo: leave it out" in capsys.readouterr().err


def test_the_best_checkpoint_is_kept_beside_the_last(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one of a run whose loss rose again is not what its author wants."""
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.2] * 2)
    monkeypatch.setattr(train_gpt.Trainer, "losses", lambda self, tokens: next(losses) * 512)
    monkeypatch.setattr(
        train_gpt.Trainer, "warm_up", lambda self: self.microbatches.settle(self.val[:1])
    )
    flags = ["--val-every", "1", "--checkpoint", "run.pt"]
    assert train_gpt.main(tiny("--log", "a.txt", "--keep", "best", *flags)) == 0
    last, best = (torch.load(name, weights_only=True) for name in ("run.pt", "run.best.pt"))
    assert (last["step"], best["step"]) == (4, 2)
    flags[-1] = "other.pt"
    assert train_gpt.main(tiny("--log", "b.txt", *flags)) == 0
    assert Path("other.pt").exists() and not Path("other.best.pt").exists()


# ---- --help --------------------------------------------------------------------------------------


def test_help_is_grouped_and_has_the_defaults_of_the_preset(
    capsys: pytest.CaptureFixture,
) -> None:
    text = " ".join(printed(["--help"], capsys).split())
    heads = ["what is trained", "how it is run and measured", "seeds, devices and files"]
    places = [text.index(head) for head in heads]
    assert places == sorted(places)
    assert places[0] < text.index("reaches zero there (default: 3250)") < places[1]
    demo = " ".join(printed(["--preset", "demo", "--help"], capsys).split())
    assert "reaches zero there (default: 260)" in demo and "data/embedded)" in demo
    for word in ("--config", "--print-config", "--log-every", "--tensorboard", "--keep"):
        assert word in demo
    assert Config().data in text
