"""tools/run_many.py: queues of processes, with a stub that trains at once, and once for real."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train_gpt
from records.log import parse_log
from records.writer import flatten

sys.path.append(str(ROOT / "tools"))
import run_many  # noqa: E402

STUB = '''"""Writes a log at once, and does what BEHAVIOUR says."""
import json, os, sys, time
argv = sys.argv[1:]
given = dict(zip(argv[::2], argv[1::2]))
name, seed = given["--optimizer"], int(given["--seed"])
how = os.environ.get("BEHAVIOUR", "")
print("working on", name, seed, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if how == "refuse":
    print("stub: wrong flags", file=sys.stderr)
    sys.exit(2)
source = "# ==================== stub.py ====================\\n" + open(__file__).read()
meta = dict(format=1, optimizer=name, seed=seed, world_size=1, device="cpu", config={}, argv=argv)
rule = "=" * 100
with open(given["--log"], "x") as log:
    print(source + rule, "meta: " + json.dumps(meta), rule, sep="\\n", file=log)
    loss = 3 + seed / 10
    print(f"step:4/4 val_loss:{loss:.5f} train_time:1.000s step_avg:250.00ms", file=log, flush=True)
    if how == "hang":
        time.sleep(60)
    if how == "crash" and name == "muon":
        sys.exit("stub: out of memory")
    print('end: {"status": "complete"}', file=log)
time.sleep(float(os.environ.get("SECONDS", 0)))
'''


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trainer is a stub, the current folder empty, and there is no GPU."""
    (path := tmp_path / "code" / "stub.py").parent.mkdir()
    path.write_text(STUB)
    monkeypatch.setattr(run_many, "TRAINER", path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    honest = signal.getsignal(signal.SIGTERM)
    yield path
    signal.signal(signal.SIGTERM, honest)


BOTH = "--optimizers adamw muon --seeds 1 2 --out logs/x".split()
NAMES = ["adamw_seed1", "adamw_seed2", "muon_seed1", "muon_seed2"]


def files() -> list[str]:
    return sorted(path.name for path in Path("logs/x").iterdir() if path.name != ".lock")


def test_every_optimizer_is_trained_with_every_seed(
    stub: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_many.main([*BOTH, "--", "--preset", "prose", "--steps", "4"]) == 0
    assert files() == sorted(f"{name}.{kind}" for name in NAMES for kind in ("txt", "console"))
    argv = parse_log("logs/x/muon_seed2.txt").meta["argv"]
    assert argv[:6] == "--optimizer muon --seed 2 --log logs/x/muon_seed2.txt".split()
    assert argv[6:] == "--preset prose --steps 4".split()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:8]] == ["start", "end"] * 4  # one after another
    assert "end muon_seed1, exit code 0, " in lines[5] and lines[5].endswith("muon 1 None")
    assert [line.split() for line in lines[8:]] == [
        [name, "3.10000" if name.endswith("1") else "3.20000"] for name in NAMES
    ]


def test_each_visible_gpu_has_one_run_at_a_time(
    stub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Named as the user named them; the third is not used; two runs at once on two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7,2")
    monkeypatch.setenv("SECONDS", "0.5")
    assert run_many.main([*BOTH, "--gpus", "2"]) == 0
    consoles = [Path(f"logs/x/{name}.console").read_text().split()[-1] for name in NAMES]
    assert sorted(consoles) == ["5", "5", "GPU-7", "GPU-7"]
    starts = [line.split() for line in capsys.readouterr().out.splitlines() if " start " in line]
    assert [words[2:] for words in starts[:2]] == [
        ["adamw_seed1", "on", "GPU", "5"],
        ["adamw_seed2", "on", "GPU", "GPU-7"],
    ]
    for wrong in ("4", "0"):
        with pytest.raises(SystemExit):
            run_many.main([*BOTH, "--gpus", wrong])


def test_complete_runs_are_skipped_and_others_are_set_aside_and_trained(
    stub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "crash")
    assert run_many.main(BOTH) == 1
    out = capsys.readouterr().out
    assert "end muon_seed2, exit code 1, 0 s: stub: out of memory" in out
    assert out.splitlines()[-1].split() == ["muon_seed2", "failed"]
    crashed, kept = (Path(f"logs/x/{name}_seed1.txt").read_text() for name in ("muon", "adamw"))
    assert run_many.main(BOTH) == 1  # set aside once more, under another number
    monkeypatch.delenv("BEHAVIOUR")
    capsys.readouterr()
    assert run_many.main(BOTH) == 0
    assert capsys.readouterr().out.count(" start ") == 2
    assert Path("logs/x/muon_seed1.txt.1").read_text() == crashed
    assert Path("logs/x/adamw_seed1.txt").read_text() == kept
    aside = [
        f"muon_seed{s}.{kind}.{n}" for s in (1, 2) for kind in ("txt", "console") for n in (1, 2)
    ]
    assert set(aside) <= set(files()) and len(files()) == 8 + 8
    assert run_many.main(BOTH) == 0
    assert " start " not in capsys.readouterr().out


def test_logs_of_other_arguments_or_code_are_not_mixed(
    stub: Path, capsys: pytest.CaptureFixture
) -> None:
    """Half of the seeds with the code of yesterday would look like one experiment."""
    assert run_many.main([*BOTH, "--", "--steps", "4"]) == 0
    before = files()
    assert run_many.main([*BOTH, "--", "--steps", "5"]) == 2
    stub.write_text(STUB + "# another program\n")
    assert run_many.main([*BOTH, "--", "--steps", "4"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all("other arguments or code: choose another --out" in e for e in err)
    assert files() == before


def test_a_mistake_in_the_flags_ends_the_queue_at_once(
    stub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its exit code was 1, while the docstring promises 2 for bad input."""
    monkeypatch.setenv("BEHAVIOUR", "refuse")
    assert run_many.main(BOTH) == 2
    out = capsys.readouterr().out
    assert out.count(" start ") == 1 and "exit code 2, 0 s: stub: wrong flags" in out
    assert out.count("failed") == 4 and files() == ["adamw_seed1.console"]


def write_plan(folder: Path, **changes: object) -> Path:
    arms = {"a": "--optimizer adamw", "m": "--optimizer muon --steps 9"}
    one = dict(name="first", question="?", flags="--steps 4", seeds=[1, 2], arms=arms) | changes
    (path := folder / "plan.json").write_text(json.dumps(dict(flags="--rows 2", comparisons=[one])))
    return path


def test_a_plan_runs_the_arms_of_a_seed_one_after_the_other_and_skips_what_is_complete(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_plan(tmp_path / "code", seeds=[1])
    assert run_many.main(["--plan", str(path)]) == 0
    write_plan(tmp_path / "code")
    assert run_many.main(["--plan", str(path), "--", "--checkpoint", "{run}.pt"]) == 0
    out = capsys.readouterr().out
    started = [line.split()[2] for line in out.splitlines() if " start " in line]
    assert started == ["a_seed1", "m_seed1", "a_seed2", "m_seed2"]
    assert out.splitlines()[-4:] == [
        f"first/{arm}_seed{seed} {3 + seed / 10:.5f}" for seed in (1, 2) for arm in "am"
    ]
    log = tmp_path / "code/first/m_seed2.txt"
    words = "--rows 2 --steps 4 --optimizer muon --steps 9 --seed 2".split()
    expected = [*words, "--log", str(log), "--checkpoint", "first_m_seed2.pt"]
    assert parse_log(log).meta["argv"] == expected


def test_a_plan_whose_arm_changed_after_its_run_is_refused(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_plan(tmp_path / "code")
    assert run_many.main(["--plan", str(path)]) == 0
    write_plan(tmp_path / "code", flags="--steps 5")
    assert run_many.main(["--plan", str(path)]) == 2
    assert "a_seed1.txt had other arguments than the plan has now" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"flags": ""}', '{"flags": "", "comparisons": [3]}'])
def test_a_file_that_is_no_plan_is_named_in_one_sentence(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    (path := tmp_path / "code/plan.json").write_text(text)
    assert run_many.main(["--plan", str(path)]) == 2
    assert f"{path} is no plan (" in capsys.readouterr().err


def test_no_run_starts_that_would_outlast_the_minutes(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SECONDS", "1.5")  # that each run takes
    path = write_plan(tmp_path / "code")
    started = time.monotonic()
    assert run_many.main(["--plan", str(path), "--minutes", str(2.5 / 60)]) == 1
    assert time.monotonic() - started < 15
    lines = capsys.readouterr().out.splitlines()
    assert sum(" start " in line for line in lines) == 1
    assert [line.split()[1] for line in lines[-4:]] == ["3.10000", *3 * ["waiting"]]


def test_runs_that_are_left_when_the_minutes_are_over_are_ended(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "hang")
    path = write_plan(tmp_path / "code")
    assert run_many.main(["--plan", str(path), "--minutes", str(3 / 60)]) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "first/a_seed1 failed",
        "first/m_seed1 waiting",
        "first/a_seed2 waiting",
        "first/m_seed2 waiting",
    ]


@pytest.mark.parametrize(
    "rest, said",
    [
        ("--seed 3", "--seed after --"),
        ("--log=a.txt --trials 2", "--log, --trials after --"),
        ("--checkpoint run.pt", "write {run} into its name"),
    ],
)
def test_flags_that_runs_cannot_share_are_refused(
    stub: Path, capsys: pytest.CaptureFixture, rest: str, said: str
) -> None:
    assert run_many.main([*BOTH, "--", *rest.split()]) == 2
    assert said in capsys.readouterr().err and files() == []


def test_each_run_has_its_own_checkpoint(stub: Path) -> None:
    assert run_many.main([*BOTH, "--", "--checkpoint", "c/{run}.pt"]) == 0
    assert parse_log("logs/x/muon_seed2.txt").meta["argv"][-1] == "c/muon_seed2.pt"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_children(
    stub: Path, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture
) -> None:
    """Sent to the parent alone, as kill does it; what was trained stays, the rest runs again."""
    program = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r}); import run_many, torch; "
        f"from pathlib import Path; run_many.TRAINER = Path({str(stub)!r}); "
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "torch.cuda.device_count = lambda: 2; "
        f"sys.exit(run_many.main({BOTH!r}))"
    )
    env = os.environ | {"BEHAVIOUR": "hang"}  # above: jobs of a shell's background ignore SIGINT
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    logs = [Path("logs/x/adamw_seed1.txt"), Path("logs/x/adamw_seed2.txt")]
    deadline = time.monotonic() + 60
    while not all(log.is_file() and "val_loss" in log.read_text()[-90:] for log in logs):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    assert run_many.main(BOTH) == 2  # meanwhile, here
    assert "logs/x is in use" in capsys.readouterr().err
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    parent.send_signal(number)
    assert parent.wait(20) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert files() == [f"adamw_seed{s}.{kind}" for s in (1, 2) for kind in ("console", "txt")]


def test_the_real_trainer_trains_and_is_skipped_when_complete(
    tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A flattened trainer is a trainer: here one that knows a tiny preset."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    source = flatten(ROOT / "train_gpt.py")
    preset = f'PRESETS["tiny"] = {train_gpt.PRESETS["tiny"]!r}\n\n\ndef parse_config('
    assert source.count("\ndef parse_config(") == 1
    (trainer := tmp_path / "trainer.py").write_text(source.replace("def parse_config(", preset, 1))
    monkeypatch.setattr(run_many, "TRAINER", trainer)
    words = "--optimizers muon --seeds 3 --out logs/x --".split() + tiny("--steps", "2")
    assert run_many.main(words) == 0
    run, out = parse_log("logs/x/muon_seed3.txt"), capsys.readouterr().out
    assert (run.status, run.meta["seed"], run.points[-1].step) == ("complete", 3, 2)
    assert out.splitlines()[-1].split() == ["muon_seed3", f"{run.points[-1].val_loss:.5f}"]
    assert run_many.main(words) == 0 and " start " not in capsys.readouterr().out


def test_the_page_on_submitting_is_short_and_its_command_is_understood(
    stub: Path, capsys: pytest.CaptureFixture
) -> None:
    page = (ROOT / "docs/submit.md").read_text()
    assert len(page.encode()) < 6 * 1024
    (command,) = [line for line in page.splitlines() if "tools/run_many.py --" in line]
    assert run_many.main(command.split()[2:]) == 0
    assert capsys.readouterr().out.count(" start ") == 8
    assert train_gpt.parse_config(parse_log("logs/aurora/aurora_seed8.txt").meta["argv"]).seed == 8


def test_it_has_at_most_260_lines() -> None:
    """200 before grids."""
    assert (ROOT / "tools/run_many.py").read_text().count("\n") <= 260


def test_a_grid_is_crossed_with_optimizers_and_seeds_and_names_the_runs(
    stub: Path, capsys: pytest.CaptureFixture
) -> None:
    grid = "--grid lr_scale=0.7,1 --grid muon.weight_decay=0.025,5e-2 --grid adamw.lr=.1".split()
    assert run_many.main([*BOTH, *grid, "--", "--steps", "4", "--checkpoint", "{run}.pt"]) == 0
    arms = [f"adamw_lr-scale{scale}_lr.1" for scale in ("0.7", "1")] + [
        f"muon_lr-scale{scale}_weight_decay{decay}_adamw.lr.1"
        for scale in ("0.7", "1")
        for decay in ("0.025", "5e-2")
    ]
    names = [f"{arm}_seed{seed}" for arm in arms for seed in (1, 2)]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-12:]] == names
    name = "muon_lr-scale0.7_weight_decay5e-2_adamw.lr.1_seed2"
    words = f"--optimizer muon --seed 2 --log logs/x/{name}.txt --lr-scale 0.7"
    words += " --set muon.weight_decay=5e-2 --set adamw.lr=.1 --steps 4"
    argv = [*words.split(), "--checkpoint", f"{name}.pt"]
    assert parse_log(f"logs/x/{name}.txt").meta["argv"] == argv
    config = train_gpt.parse_config(argv)
    assert config.lr_scale == 0.7 and [*config.set] == ["muon.weight_decay=5e-2", "adamw.lr=.1"]
    words = parse_log(f"logs/x/{names[0]}.txt").meta["argv"]
    assert "--set muon.weight_decay=0.025" not in " ".join(words)
    assert run_many.main([*BOTH, *grid, "--", "--steps", "4", "--checkpoint", "{run}.pt"]) == 0
    assert " start " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        ("--grid lr-scale", "--grid lr-scale: expected NAME=VALUE,VALUE"),
        ("--grid lr-scale=", "expected NAME=VALUE,VALUE"),
        ("--grid data=a/b,c", "expected NAME=VALUE,VALUE"),
        ("--grid seed=1,2", "--seed cannot be swept"),
        ("--grid checkpoint=a.pt", "--checkpoint cannot be swept"),
        ("--grid lr-scale=1,1", "a name or a value is there twice"),
        ("--grid fc.lr=1 --grid fc.lr=2", "a name or a value is there twice"),
        ("--grid normuon.lr=1", "normuon is not among --optimizers"),
        ("--grid lr-scale=1 -- --lr-scale=2", "lr-scale stands after -- as well"),
        ("--grid fc.lr=1 -- --set fc.lr=2", "fc.lr stands after -- as well"),
        ("--grid fc.lr=1 -- --set=fc.lr=2", "fc.lr stands after -- as well"),
        ("--grid lr-scale=1,x", "argument --lr-scale: invalid float value: 'x'"),
        ("--grid lr-scales=1,2", "unrecognized arguments: --lr-scales 1"),
    ],
)
def test_a_grid_that_means_nothing_is_one_sentence(
    stub: Path, capsys: pytest.CaptureFixture, words: str, said: str
) -> None:
    assert run_many.main([*BOTH, *words.split()]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == "" and files() == []


def test_a_plan_has_no_grid(stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_plan(tmp_path / "code")
    with pytest.raises(SystemExit, match="2"):
        run_many.main(["--plan", str(path), "--grid", "lr-scale=1,2"])
    assert "--grid needs --optimizers and --seeds" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [0, 3, 8])
def test_a_reader_that_leaves_ends_no_run_and_leaves_no_traceback(
    stub: Path, tmp_path: Path, lines: int
) -> None:
    """`run_many.py ... | head` ended in a BrokenPipeError, and with it the runs that were left."""
    program = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r}); import run_many, torch; "
        f"from pathlib import Path; run_many.TRAINER = Path({str(stub)!r}); "
        "torch.cuda.device_count = lambda: 0; "
        f"sys.exit(run_many.main({BOTH!r}))"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, **pipes)
    assert all(process.stdout.readline() for _ in range(lines))
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 0
    assert files() == sorted(f"{name}.{kind}" for name in NAMES for kind in ("txt", "console"))
