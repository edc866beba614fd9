"""records/progress.py and the console of records/writer.py: what a person sees during a run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import train_gpt
from records import progress, writer
from records.progress import Progress


class Terminal:
    """A stream that says it is a terminal, and keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_terminal_has_one_line_that_is_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    shown = Progress(steps=100, batch_tokens=1000, world_size=2)
    shown.show(10, 5.0, torch.tensor(1500.0), 1.0)
    shown.show(50, 25.0, torch.tensor(1000.0), 0.5)
    lines = terminal.text.split("\r")
    assert lines[1] == "step 10/100  train loss 3.0000  lr x 1.000  2,000 tokens/s  0:45 left"
    assert lines[2].rstrip() == (
        "step 50/100  train loss 2.0000  lr x 0.500  2,000 tokens/s  0:25 left"
    )
    assert "\n" not in terminal.text and len(lines[2]) >= len(lines[1])
    shown.clear()
    assert terminal.text.endswith("\r" + " " * len(lines[2].rstrip()) + "\r")


def test_elsewhere_a_line_comes_after_a_pause_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A log of the console grew by a line for each of 3,250 steps."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(steps=100, batch_tokens=1000, world_size=1)
    for step in range(1, 91):
        now[0] += 1
        shown.show(step, float(step), torch.tensor(1.0), 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 30/100", "step 60/100", "step 90/100"]


def test_a_loss_on_a_gpu_is_shown_once_its_copy_has_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading it at once would make the CPU wait for the GPU in every step."""

    class Event:
        arrived = False

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return Event.arrived

    class Loss:
        is_cuda, dtype, shape = True, torch.float32, ()

        def detach(self) -> "Loss":
            return self

        def tolist(self) -> float:
            raise AssertionError("waits for the GPU")

    class Copy:
        def copy_(self, loss: Loss, non_blocking: bool) -> None:
            assert non_blocking

        def tolist(self) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *_, pin_memory, **__: Copy() if pin_memory else None)
    shown = Progress(steps=10, batch_tokens=100, world_size=1)
    shown.show(1, 1.0, Loss(), 1.0)
    shown.show(2, 2.0, Loss(), 1.0)
    assert shown.loss is None and len(shown.losses.coming) == 1
    Event.arrived = True
    shown.show(3, 3.0, Loss(), 1.0)
    assert shown.loss == 2.5


def test_the_console_says_at_the_start_what_runs_and_at_the_end_what_comes_next(
    tiny, capsys: pytest.CaptureFixture
) -> None:
    assert train_gpt.main(tiny("--log", "a.txt", "--target", "5.5")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, muon, seed 1: 4 steps of 512 tokens"
    assert lines[1:4] == [
        "on 1 x cpu; log: a.txt",
        "trunk: plain PyTorch: device cpu",
        "head: PyTorch: device cpu",
    ]
    assert lines[4].startswith("optimizer: eager")
    assert re.fullmatch(r"expected training time: about \d+ s", lines[5])
    reached = [line for line in lines if line.startswith("target 5.5 reached at step ")]
    assert len(reached) == 1 and "by interpolation at " in reached[0]
    assert lines[-2].startswith("muon, seed 1: complete, 4 steps in ")
    show, compare = "python -m records show a.txt", "python -m records compare a.txt OTHER_LOG"
    assert lines[-1] == f"next: {show}; {compare}"
    assert not any(line.startswith(("optim:", "end:", "target:", "train:")) for line in lines)
    written = Path("a.txt").read_text().split("=" * 100)[-1]
    assert all(f"\n{key}: {{" in written for key in ("optim", "end", "target", "train"))


def test_a_quiet_run_prints_how_it_ended_and_nothing_else(
    tiny, capsys: pytest.CaptureFixture
) -> None:
    assert train_gpt.main(tiny("--log", "a.txt", "--target", "5.5", "--quiet")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("muon, seed 1: complete, 4 steps in ") and line.endswith("a.txt")
    assert "\nstep:4/4 " in Path("a.txt").read_text()


def test_a_run_without_a_target_says_none(tiny, capsys: pytest.CaptureFixture) -> None:
    """It said `target 0.00000 missed`."""
    assert train_gpt.main(tiny("--log", "a.txt")) == 0
    assert ", no target; the log is a.txt" in capsys.readouterr().out


def test_default_logs_are_named_after_preset_optimizer_seed_and_time(tiny) -> None:
    assert train_gpt.main(tiny("--optimizer", "adamw", "--seed", "7", "--trials", "2")) == 0
    names = sorted(path.name for path in Path("logs").iterdir())
    stamp = r"_\d{8}_\d{6}\.txt"
    assert len(names) == 2
    for seed, name in zip((7, 8), names, strict=True):
        assert re.fullmatch(rf"tiny_adamw_seed{seed}{stamp}", name)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--log", "x.pt", "--checkpoint", "x.pt"], "x.pt is both --log and --checkpoint"),
        (["--log", "x.pt", "--checkpoint", "./sub/../x.pt"], "is both --log and --checkpoint"),
    ],
)
def test_a_checkpoint_does_not_overwrite_the_log(
    tiny, capsys: pytest.CaptureFixture, flags: list[str], said: str
) -> None:
    assert train_gpt.main(tiny(*flags)) == 2
    assert said in capsys.readouterr().err and not Path("x.pt").exists()


@pytest.mark.parametrize("flag", ["--log", "--checkpoint"])
def test_an_output_that_cannot_be_written_is_found_before_warm_up(
    tiny, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """The run had warmed up, and for a checkpoint trained, before it failed with a traceback."""
    Path("locked").mkdir()
    access = os.access
    monkeypatch.setattr(
        writer.os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode)
    )
    assert train_gpt.main(tiny(flag, "locked/new/x")) == 2
    assert f"locked/new/x cannot be written in locked: choose another {flag}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("saves", [True, False])
def test_ctrl_c_says_what_was_saved_and_how_to_go_on(
    corpus: Path, tmp_path: Path, saves: bool
) -> None:
    """It ended with a traceback."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n"
        f"train_gpt.PRESETS['tiny'] = {dict(TINY, steps=100_000)!r}\n"
        "sys.exit(train_gpt.main(sys.argv[1:]))\n"
    )
    words = ["--preset", "tiny", "--data", str(corpus), "--device", "cpu", "--log", "a.txt"]
    words += ["--checkpoint", "run.pt"] * saves
    process = subprocess.Popen(
        [sys.executable, str(driver), *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs, such as CI, with SIGINT ignored; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until, log = time.monotonic() + 120, tmp_path / "a.txt"
    try:
        while not (log.exists() and "step:4/" in log.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()  # it would train on for hours
    assert process.returncode == 130 and "Traceback" not in error
    expected = "run.pt saved: the same command with another --log resumes"
    nothing = "nothing saved: --checkpoint FILE saves at each validation"
    assert f"train_gpt.py: interrupted; {expected if saves else nothing}" in error
