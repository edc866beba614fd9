"""records/trackers.py: TensorBoard, and what keeps Weights & Biases from working."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt
from records.log import parse_log


def test_tensorboard_has_losses_rates_and_norms_of_each_trial(tiny: Callable) -> None:
    name = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(name, reason="tensorboard is not installed: pip install it")
    flags = ["--tensorboard", "board", "--trials", "2", "--log", "a.txt", "--log-every", "2"]
    assert train_gpt.main(tiny(*flags)) == 0
    for trial in ("a.seed1", "a.seed2"):
        board = events.EventAccumulator(str(Path("board", trial)))
        board.Reload()
        run = parse_log(f"{trial}.txt")
        found = [(e.step, e.value) for e in board.Scalars("val_loss")]
        assert found == [(p.step, pytest.approx(p.val_loss, abs=1e-5)) for p in run.points]
        for key in ("lr", "grad_norm", "update_norm"):
            found = [(e.step, e.value) for e in board.Scalars(f"{key}/proj")]
            logged = [(line["step"], line[key]["proj"]) for line in run.extra["train"]]
            assert found == [(step, pytest.approx(value, rel=1e-5)) for step, value in logged]
        assert "train_loss" in board.Tags()["scalars"]


def test_a_missing_package_is_one_sentence_before_anything_is_written(
    tiny: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train_gpt.main(tiny("--tensorboard", "board", "--log", "a.txt")) == 2
    error = capsys.readouterr().err
    assert "--tensorboard needs a package that is not installed: run pip install" in error
    assert not Path("a.txt").exists() and not Path("board").exists()


def test_wandb_without_a_login_is_one_sentence_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    """A traceback came after the warm-up, and the log that it left made the next try fail."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb to run this")
    driver = "import sys; sys.path.insert(0, sys.argv.pop(1)); import train_gpt\n"
    driver += "from conftest import TINY; train_gpt.PRESETS['tiny'] = TINY\n"
    driver += "sys.exit(train_gpt.main(sys.argv[1:]))"
    words = ["--preset", "tiny", "--data", str(corpus), "--device", "cpu", "--log", "a.txt"]
    home = dict(HOME=str(tmp_path), NETRC=str(tmp_path / "none"), WANDB_DIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", driver, str(ROOT), *words, "--wandb"],
        cwd=tmp_path,
        env=home | dict(PATH="/usr/bin:/bin", PYTHONPATH=f"{ROOT}/tests", WANDB_API_KEY=""),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = "train_gpt.py: --wandb: nobody is logged in; run wandb login, or set WANDB_MODE=offline"
    assert said in done.stderr
    assert not (tmp_path / "a.txt").exists()
