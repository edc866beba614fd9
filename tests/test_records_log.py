"""The log parser against made-up logs that hold every trap we know of."""

import json
import os
from pathlib import Path
from time import time

import pytest

from records.log import RULE, parse_log

META = {
    "format": 1,
    "optimizer": "muon",
    "seed": 1,
    "world_size": 1,
    "device": "NVIDIA H200",
    "config": {"target": 3.42, "batch_tokens": 131072},
}
SCRIPT = '''import json
META = """
meta: {"format": 1, "optimizer": "a decoy"}
step:0/9 val_loss:1.00000 train_time:0.000s step_avg:nanms
end: {"status": "a decoy"}
"""
print("=" * 100)
print(f"Running PyTorch {version}")
print(f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{seconds:.3f}s step_avg:{ms:.2f}ms")
print("end: " + json.dumps({"status": "complete"}))
'''
ENVIRONMENT = "Running PyTorch 2.11.0+cu130 on NVIDIA H200\n| NVIDIA-SMI 580.1   é |"
STEPS = [
    "step:0/1200 val_loss:10.82584 train_time:0.000s step_avg:nanms",
    'optim: {"step": 1, "groups": [{"name": "embed", "lr": 0.7}]}',
    "step:125/1200 val_loss:4.64419 train_time:66.065s step_avg:528.52ms",
    'target: {"loss": 3.42, "step": 1150, "crossing_step": 1139.2}',
    "step:1200/1200 val_loss:3.40831 train_time:503.177s step_avg:419.31ms",
]
END = 'end: {"status": "complete", "peak_gib": 29.0}'


def write_log(path: Path, body: list[str], meta: dict | None = META) -> Path:
    lines = [ENVIRONMENT, *([] if meta is None else ["meta: " + json.dumps(meta)]), RULE, *body]
    path.write_text(SCRIPT + "\n".join([RULE, *lines, ""]), encoding="utf-8")
    return path


def test_a_complete_log_gives_every_field(tmp_path: Path) -> None:
    run = parse_log(write_log(tmp_path / "a.txt", [*STEPS, END]))
    assert run.meta == META
    assert [point.step for point in run.points] == [0, 125, 1200]
    assert run.points[1][1:] == (1200, 4.64419, 66.065, 528.52)
    assert run.optim is not None and run.optim["groups"][0]["lr"] == 0.7
    assert run.target is not None and run.target["crossing_step"] == 1139.2
    assert run.status == "complete"
    assert run.loss_at(1200) == 3.40831 and run.loss_at(1199) is None


def test_the_log_lists_its_own_free_fields(tmp_path: Path) -> None:
    """Readers had lists of Config's fields; a field that the trainer gained was missing there."""
    config = {"seed": 1, "prefetch": 2, "steps": 1200, "log": "x"}
    meta = META | {"config": config, "kernels": {"trunk": "plain PyTorch: device cpu"}}
    run = parse_log(write_log(tmp_path / "a.txt", STEPS, meta | {"free": ["seed", "prefetch"]}))
    assert run.free == {"seed", "prefetch"} and run.settings == {"steps": 1200, "log": "x"}
    old = parse_log(write_log(tmp_path / "b.txt", STEPS, meta))
    assert old.settings == {"prefetch": 2, "steps": 1200}


def test_look_alikes_in_the_embedded_script_are_not_results(tmp_path: Path) -> None:
    """Track-3 readers searched whole logs and hit f-strings of the source first."""
    run = parse_log(write_log(tmp_path / "a.txt", STEPS))
    assert run.script == SCRIPT
    assert run.meta["optimizer"] == "muon" and len(run.points) == 3


def test_a_log_without_end_is_a_crash(tmp_path: Path) -> None:
    """A leaderboard accepted a score whose only log was a crash (parameter-golf#1133)."""
    run = parse_log(write_log(tmp_path / "a.txt", STEPS[:3]))
    assert run.status == "crashed" and run.end is None and run.points[-1].step == 125


@pytest.mark.parametrize(
    ("apart", "idle", "state"),
    [
        (66, 500, "running"),
        (66, 700, "stopped at step 125"),
        (900, 2600, "running"),
        (900, 2800, "stopped at step 125"),
    ],
)
def test_a_run_whose_log_still_grows_is_running(
    tmp_path: Path, apart: int, idle: int, state: str
) -> None:
    """Every run was called crashed until its last line was written."""
    steps = [*STEPS[:2], STEPS[2].replace("66.065", f"{apart}.065")]
    path = write_log(tmp_path / "a.txt", steps)
    os.utime(path, (time() - idle,) * 2)
    assert parse_log(path).state == state
    assert parse_log(write_log(path, [*STEPS, END])).state == "complete"
    path.unlink()
    assert parse_log(write_log(path, STEPS[:1])).state == "running", "one validation is enough"


def test_the_reason_of_an_early_end_is_the_status(tmp_path: Path) -> None:
    end = 'end: {"status": "non-finite loss at step 37"}'
    assert parse_log(write_log(tmp_path / "a.txt", [*STEPS, end])).status.startswith("non-finite")


def test_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    unix = write_log(tmp_path / "a.txt", [*STEPS, END])
    (tmp_path / "b.txt").write_bytes(unix.read_bytes().replace(b"\n", b"\r\n"))
    first, second = parse_log(unix), parse_log(tmp_path / "b.txt")
    assert first.script == second.script and first.extra == second.extra
    assert repr(first.points) == repr(second.points)  # nan is not equal to itself


def test_unknown_lines_are_kept_or_passed_over(tmp_path: Path) -> None:
    body = [
        'diag: {"step": 125, "dead_neurons": 0.0}',
        'diag: {"step": 250, "dead_neurons": 0.1}',
        "KeyError: {'not': json}",
        "odd: {",
        "step:1/1200 train_time:0.5s step_avg:500.00ms",
    ]
    run = parse_log(write_log(tmp_path / "a.txt", [*STEPS, *body, END]))
    assert [entry["step"] for entry in run.extra["diag"]] == [125, 250]
    assert set(run.extra) == {"diag"} and len(run.points) == 3


@pytest.mark.parametrize(
    ("body", "meta", "line", "found"),
    [
        ([STEPS[0], STEPS[2].replace("4.64419", "4.6e1")], META, 17, "4.6e1"),
        ([STEPS[0], STEPS[2].replace("s step_avg", " step_avg")], META, 17, "66.065 step_avg"),
        ([STEPS[2], STEPS[0]], META, 17, "step 0"),
        ([STEPS[0], f"[rank0] {STEPS[2]}"], META, 17, "[rank0] step:125"),  # such lines were lost
        ([STEPS[0], f"  {STEPS[2]}"], META, 17, "'  step:125"),
        ([STEPS[0], f"99%|##|{STEPS[2]}"], META, 17, "99%|##|step:125"),
        ([STEPS[2], STEPS[4].replace(":503", ":3")], META, 17, "train_time 3.177 s"),
        ([STEPS[0], STEPS[2].replace("step:125/", "step:1250/")], META, 17, "step 1250 of 1200"),
        ([STEPS[0], STEPS[2].replace("125", "9" * 5000)], META, 17, "9999"),
        ([END], META, 17, "without any step: line"),
        ([STEPS[0], END[:-1]], META, 17, END[:-1]),
        ([STEPS[0], 'end: {"state": "complete"}'], META, 17, "state"),
        (STEPS, None, 14, "format missing"),
        (STEPS, META | {"format": 2}, 15, "format 2"),
        (STEPS, {"format": 1}, 14, 'meta: {"format": 1}'),
    ],
)
def test_a_broken_line_is_named(
    tmp_path: Path, body: list[str], meta: dict | None, line: int, found: str
) -> None:
    path = write_log(tmp_path / "a.txt", body, meta)
    with pytest.raises(ValueError, match="expected") as caught:
        parse_log(path)
    assert str(caught.value).startswith(f"{path} line {line}: ") and found in str(caught.value)


@pytest.mark.parametrize("text", ["", SCRIPT, f"{SCRIPT}{RULE}\nstep:0/9 val_loss:1.00000\n"])
def test_a_log_needs_both_rule_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="a.txt line .*100 '='"):
        parse_log(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"seed": "1"}, 'meta with seed "1"'),
        ({"config": "x"}, 'meta with config "x"'),
        ({"device": None}, "meta with device null"),
        ({"world_size": True}, "world_size true"),
        ({"config": {"target": "3.28"}}, 'meta with target "3.28"'),
        ({"torch": 2}, "torch 2"),
        ({"free": "seed"}, 'free "seed"'),
        ({"kernels": "eager"}, 'kernels "eager"'),
        ({"config": {"target": float("nan")}}, "meta with target NaN"),
        ({"config": {"batch_tokens": None}}, "meta with batch_tokens null"),
    ],
)
def test_a_damaged_meta_line_is_one_sentence(tmp_path: Path, changes: dict, found: str) -> None:
    """The keys were looked for and not their types: show and compare ended in a traceback."""
    with pytest.raises(ValueError, match="expected") as caught:
        parse_log(write_log(tmp_path / "a.txt", [*STEPS, END], META | changes))
    assert str(caught.value).startswith(f"{tmp_path / 'a.txt'} line 14: found ")
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('optim: {"step": 1, "groups": ["embed"]}', 'a group "embed"'),
        ('optim: {"step": 1, "groups": [{"lr": 0.7}]}', 'a group {"lr": 0.7}'),
        ('optim: {"step": 1, "groups": {"name": "embed"}}', "optim with groups"),
        ('target: {"loss": "3.42", "step": 1, "crossing_step": 1.0}', 'loss "3.42"'),
        ('end: {"status": null}', "end with status null"),
        ('end: {"status": 5}', "status 5"),
        ('end: {"status": ' + "9" * 5000 + "}", "'end: {"),
        ("end: " + "[" * 99999, "'end: ["),
    ],
)
def test_a_damaged_line_of_results_is_one_sentence(tmp_path: Path, line: str, found: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        parse_log(write_log(tmp_path / "a.txt", [STEPS[0], line]))
    assert str(caught.value).startswith(f"{tmp_path / 'a.txt'} line 17: found ")
    assert found in str(caught.value)


def test_a_number_of_5000_digits_elsewhere_harms_nothing(tmp_path: Path) -> None:
    """json.loads refuses such a number with another error than other bad JSON."""
    odd = "odd: " + "9" * 5000
    assert len(parse_log(write_log(tmp_path / "a.txt", [*STEPS, odd, END])).points) == 3
