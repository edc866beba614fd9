"""Every shape of public log, in made-up logs: the numbers are invented, the traps are real."""

import json
from math import isnan
from pathlib import Path
from time import process_time

import pytest

from records.log import RULE, parse_log, parse_runs, read_runs

SOURCE = '''import torch
"""
step:0/9 val_loss:1.00000 train_time:0.000s step_avg:nanms
Using seed=99
"""
print(f"Running PyTorch {version}")
print(f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{seconds:.3f}s")
'''
RUNNING = "Running PyTorch 2.10.0+cu128 compiled for CUDA 12.8 on NVIDIA H100 NVL with world_size 8"
LOGS = Path(__file__).resolve().parent.parent / "records/prose"


def steps(*pairs: tuple[int, float], total: int = 300, pace: float = 0.5) -> list[str]:
    return [
        f"step:{step}/{total} val_loss:{loss:.5f} train_time:{pace * step:.3f}s "
        f"step_avg:{f'{1000 * pace:.2f}' if step else 'nan'}ms"
        for step, loss in pairs
    ]


def write(path: Path, lines: list[str], rules: int = 2, header: str = RUNNING) -> Path:
    top = {0: [], 1: [SOURCE + RULE, header], 2: [SOURCE + RULE, header, RULE]}[rules]
    path.write_text("\n".join([*top, *lines, ""]), encoding="utf-8")
    return path


def losses(path: Path) -> list[list[float]]:
    return [[point.val_loss for point in run.points] for run in parse_runs(path)]


def message(path: Path) -> str:
    with pytest.raises(ValueError, match="expected") as caught:
        parse_runs(path)
    return str(caught.value)


@pytest.mark.parametrize("rules", [0, 1, 2])
def test_several_trials_each_start_again_at_step_0(tmp_path: Path, rules: int) -> None:
    first, second = steps((0, 10.8), (200, 3.4), (300, 3.27)), steps((0, 10.8), (300, 3.29))
    runs = parse_runs(write(tmp_path / "a.txt", [*first, *second], rules))
    assert [run.name for run in runs] == ["a", "a#1"]
    assert losses(tmp_path / "a.txt") == [[10.8, 3.4, 3.27], [10.8, 3.29]]
    assert [run.total_steps for run in runs] == [300, 300]
    assert {run.status for run in runs} == {"complete"}
    assert runs[0].script == (SOURCE if rules else "")


def test_results_count_only_below_the_last_rule(tmp_path: Path) -> None:
    """Source code holds lines that look like results."""
    path = write(tmp_path / "a.txt", steps((0, 10.8), (300, 3.27)))
    assert losses(path) == [[10.8, 3.27]]
    run = parse_runs(path)[0]
    assert run.meta == {"torch": "2.10.0+cu128", "device": "NVIDIA H100 NVL", "world_size": 8}
    assert run.seed is None


def test_milliseconds_and_four_decimals_and_training_lines(tmp_path: Path) -> None:
    lines = [
        "step:0/20 val_loss:10.8258 train_time:286ms step_avg:nanms",
        "step:1/20 train_loss:10.7 train_time:300ms step_avg:nanms",
        "step:2/20 train_time:310ms step_avg:24.00ms",
        "step:20/20 train_time:1234ms step_avg:61.70ms",
        "step:20/20 val_loss:6.1234 train_time:1250ms step_avg:62.50ms",
        "peak memory allocated: 5 MiB reserved: 6 MiB",
    ]
    (run,) = parse_runs(write(tmp_path / "a.txt", lines))
    assert run.points[-1] == (20, 20, 6.1234, 1.25, 62.5)
    assert run.points[0].train_time_s == 0.286 and isnan(run.points[0].step_avg_ms)


def test_a_repeated_line_counts_once(tmp_path: Path) -> None:
    """A console that repeats the tail of each trial before the next one starts."""
    one, two = steps((125, 4.6), (250, 3.5), (300, 3.2)), steps((125, 4.7), (250, 3.6), (300, 3.3))
    heads = [
        ["=== seed 2 start ===", "command=torchrun x.py --seed 2"],
        ["=== seed 2 exit_status=0 ===", *one[1:], "command=torchrun x.py --seed 3"],
    ]
    path = write(tmp_path / "a.txt", [*heads[0], one[0], *one, *heads[1], *two], rules=0)
    assert losses(path) == [[4.6, 3.5, 3.2], [4.7, 3.6, 3.3]]
    assert [run.seed for run in parse_runs(path)] == [2, 3]


def test_the_scored_loss_under_another_name_is_kept_with_its_name(tmp_path: Path) -> None:
    """The current record is scored on val_ema_loss; its val_loss is above 3.28."""
    line = (
        "step:{0}/300 val_loss:{1} val_avg_loss:{1} val_ema_loss:{2} train_time:5.0s step_avg:9ms"
    )
    lines = [line.format(200, 3.30, 3.29), line.format(300, 3.29, 3.27)]
    (run,) = parse_runs(write(tmp_path / "a.txt", lines))
    assert run.metric == "val_ema_loss" and run.loss_at(300) == 3.27
    assert run.extra["losses"][1] == {"step": 300, "val_loss": 3.29, "val_avg_loss": 3.29}
    mixed = [lines[0], *steps((250, 3.1)), lines[1]]
    assert "line 12: found val_loss at step 250" in message(write(tmp_path / "b.txt", mixed))


def test_llm_c_lines_have_no_length_and_no_times(tmp_path: Path) -> None:
    lines = ["s:0 tel:10.9830", "s:0 trl:10.9 lr:0.000001 norm:15.37", "s:250 tel:6.171000"]
    (run,) = parse_runs(write(tmp_path / "a.log", lines, rules=0))
    assert [(point.step, point.val_loss) for point in run.points] == [(0, 10.983), (250, 6.171)]
    assert run.metric == "tel" and run.total_steps == 0 and isnan(run.final.train_time_s)
    assert run.status == "ends at step 250 of an unknown number"


def test_extra_fields_in_a_step_line_do_no_harm(tmp_path: Path) -> None:
    lines = [
        "step:0/9 val_loss:10.82585 train_time:0.000s step_avg:0.09ms mfu:0.00%",
        "step:9/9 val_loss:9.1 train_time:3.000s step_avg:333.33ms step_time:1.00ms mfu:3.06%",
    ]
    assert losses(write(tmp_path / "a.txt", lines, rules=0)) == [[10.82585, 9.1]]


def test_a_truncated_log_says_where_it_ends(tmp_path: Path) -> None:
    """A cut '3.27' is a number too: the last line counts only when it is whole."""
    path = write(tmp_path / "a.txt", steps((0, 10.8), (200, 3.5)))
    assert parse_runs(path)[0].status == "ends at step 200 of 300"
    whole = path.read_text(encoding="utf-8")
    for cut in (2, 25, 40):
        path.write_text(whole[:-cut], encoding="utf-8")
        (run,) = parse_runs(path)
        assert len(run.points) == 1, cut
        assert run.status == "cut off in line 12, after step 0 of 300"
    path.write_text(whole[:-1], encoding="utf-8")  # only the line feed is missing
    assert len(parse_runs(path)[0].points) == 2


@pytest.mark.parametrize(
    "tail",
    [
        "step:300/300 val_loss:3.2",
        "step:300/300 val_loss:3.2\n",
        "step:300/300 val_loss:3.2\nTraceback (most recent call last):\nKeyboardInterrupt\n",
        "step:300/300 val_loss:3.27123 train_time:150.000s step_avg:500.00\nKilled\n",
        "step:300/300 val_loss:3.27123 train_time:15\nKilled\n",
    ],
)
def test_a_loss_cut_short_is_no_result_whatever_follows(tmp_path: Path, tail: str) -> None:
    """A cut 3.2 above a traceback was read as the final loss 3.2, "complete"."""
    path = write(tmp_path / "a.txt", steps((0, 10.8), (200, 3.5)))
    path.write_text(path.read_text(encoding="utf-8") + tail, encoding="utf-8")
    (run,) = parse_runs(path)
    assert run.final[:3] == (200, 300, 3.5)
    assert run.status == "cut off in line 13, after step 200 of 300"
    alone = write(tmp_path / "b.txt", ["step:300/300 val_loss:3.2", "Killed"])
    assert "without a validation" in message(alone)


def test_all_results_of_a_trial_have_the_same_fields(tmp_path: Path) -> None:
    """Cut short in the middle of a file, a result cannot be known from a whole one."""
    head, tail = steps((0, 10.8), (100, 3.5)), steps((300, 3.2))
    cut = "step:200/300 val_loss:3.2"
    assert "line 13: found 'step:200/300 val_loss:3.2', expected the fields of" in message(
        write(tmp_path / "a.txt", [*head, cut, *tail])
    )
    last = [
        f"step:{step}/9 val_loss:{loss}"
        for step, loss in ((0, "10.80000"), (9, "3.2"), (0, "10.90000"), (9, "3.21000"))
    ]
    assert "line 12: found 'step:9/9 val_loss:3.2', expected as many decimals" in message(
        write(tmp_path / "b.txt", last)
    )


def test_a_loss_cut_short_in_the_middle_of_a_curve_is_no_loss(tmp_path: Path) -> None:
    """3.2 of 3.29000 was read as 3.2 where later results of the same trial followed."""
    curve = [
        f"step:{step}/9 val_loss:{loss}"
        for step, loss in ((0, "10.80000"), (3, "3.2"), (6, "3.28000"), (9, "3.27000"))
    ]
    assert "line 12: found 'step:3/9 val_loss:3.2', expected as many decimals" in message(
        write(tmp_path / "a.txt", curve)
    )


def test_extra_fields_may_be_called_as_their_authors_like(tmp_path: Path) -> None:
    lines = [
        line.replace(" train_time", " H:1.5 acc1:0.3 train_time")
        for line in steps((0, 10.8), (300, 3.27))
    ]
    assert losses(write(tmp_path / "a.txt", lines)) == [[10.8, 3.27]]


def test_a_whole_last_line_needs_no_line_feed(tmp_path: Path) -> None:
    """The last of lines that end with their loss was dropped, as it did not end in "ms"."""
    lines = [
        f"step:{step}/300 train_time:{step}s step_avg:60ms val_loss:{loss}"
        for step, loss in ((0, "10.82584"), (200, "3.40000"), (300, "3.27712"))
    ]
    path = write(tmp_path / "a.txt", lines)
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    (run,) = parse_runs(path)
    assert run.status == "complete" and run.final.val_loss == 3.27712
    path.write_text(path.read_text(encoding="utf-8")[:-3], encoding="utf-8")
    assert parse_runs(path)[0].status == "cut off in line 13, after step 200 of 300"


@pytest.mark.parametrize("prefix", ["[rank0] ", "  ", "99%|##|", "step:299/300 train_time:1s "])
def test_a_result_behind_a_prefix_is_not_lost(tmp_path: Path, prefix: str) -> None:
    """Such lines were passed over: the run seemed to end one validation earlier, and worse."""
    path = write(tmp_path / "a.txt", [*steps((0, 10.8), (200, 3.5)), prefix + steps((300, 3.2))[0]])
    assert message(path).startswith(f"{path} line 13: found '{prefix}")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "step:300/300 val_loss:3.27123 train_time:150 step_avg:500.00ms",
            "expected times in s or ms",
        ),
        ("step:3000/300 val_loss:3.27123 train_time:150.0s step_avg:500.00ms", "step 3000 of 300"),
        ("step:300/300 val_loss:3.27123 train_time:6.000s step_avg:500.00ms", "6 s after 100 s"),
        (
            f"step:300/300 val_loss:{'3' * 5000} train_time:6.000s step_avg:500.00ms",
            "a whole valid",
        ),
        ("step:300/300 val_loss:-3.27123 train_time:150.0s step_avg:500.00ms", "a whole valid"),
        ("step:300/300 val_loss=3.27123 train_time:150.0s step_avg:500.00ms", "a whole valid"),
    ],
)
def test_a_result_that_cannot_be_true_is_refused(tmp_path: Path, line: str, found: str) -> None:
    """Times without a unit were seconds, step 31000 of 3100 was "complete", clocks ran back."""
    path = write(tmp_path / "a.txt", [*steps((0, 10.8), (200, 3.5)), line])
    assert message(path).startswith(f"{path} line 13: ") and found in message(path)


def test_line_ends_bytes_and_progress_bars_change_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", [*steps((0, 10.8)), "Fetching 4 files", *steps((300, 3.2))])
    expected = losses(path)
    data = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(data.replace(b"Fetching", b"\xff\xfe 0%\rFetching"))
    assert losses(path) == expected


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("step:200/300 val_loss:3.2e0 train_time:1.0s step_avg:5.00ms", "val_loss:3.2e0"),
        ("step:200/300 val_loss:3.20000 train_time:1.0s step:201/300 train_time", "step:201"),
        ("step:200/300 val_loss:3.2train_time:1.0s step_avg:5.00ms", "3.2train_time"),
        ("step:200/300 val_best_loss:3.2 train_time:1.0s step_avg:5.00ms", "val_best_loss"),
        ("step:100/300 val_loss:3.50001 train_time:1.0s step_avg:5.00ms", "step 100/300 after"),
        ("step:200/301 val_loss:3.50001 train_time:1.0s step_avg:5.00ms", "step 200/301 after"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_line(
    tmp_path: Path, line: str, found: str
) -> None:
    path = write(tmp_path / "a.txt", [*steps((0, 10.8), (100, 3.5)), line, *steps((300, 3.2))])
    assert message(path).startswith(f"{path} line 13: found ") and found in message(path)


def test_source_without_a_rule_and_results_above_a_rule_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SOURCE + "\n".join(steps((0, 10.8), (300, 3.2))) + "\n")
    assert "line 1: found source code" in message(tmp_path / "a.txt")
    path = write(tmp_path / "b.txt", [*steps((0, 10.8)), RULE, *steps((300, 3.2))])
    assert "line 11: found a result above" in message(path)
    assert "without a validation" in message(write(tmp_path / "c.txt", ["exit_code=1"], rules=0))


def test_seed_and_hardware_are_what_the_log_says(tmp_path: Path) -> None:
    header = (
        "Running PyTorch 2.9.1+cu128 compiled for CUDA 12.8\nRunning on device_name=NVIDIA "
        "H200 with world_size=4\nUsing seed=7\nUsing seed_offset=8"
    )
    (run,) = parse_runs(write(tmp_path / "a.txt", steps((300, 3.2)), header=header))
    assert (run.seed, run.meta["device"], run.meta["world_size"]) == (7, "NVIDIA H200", 4)
    smi = "Running pytorch 2.4.1\n|   0  NVIDIA H100 80GB HBM3          Off |   00000000:18:00.0 |"
    (run,) = parse_runs(write(tmp_path / "b.txt", steps((300, 3.2)), header=smi))
    assert run.meta == {"torch": "2.4.1", "device": "NVIDIA H100 80GB HBM3"}
    two = "Using seed=1\nUsing seed=2"
    (run,) = parse_runs(write(tmp_path / "c.txt", steps((300, 3.2)), header=two))
    assert run.seed is None


def test_best_and_crossing_interpolate_between_validations(tmp_path: Path) -> None:
    lines = steps((0, 10.8), (100, 3.4), (200, 3.2), (300, 3.25))
    (run,) = parse_runs(write(tmp_path / "a.txt", lines))
    assert run.best.step == 200 and run.final.step == 300
    assert run.crossing(3.25) == (200, 100.0, pytest.approx(175), pytest.approx(87.5))
    assert run.crossing(3.2).exact_step == 200 and run.crossing(3.1) is None
    first = run.crossing(11.0)
    assert first[:2] == (0, 0.0) and isnan(first.exact_step)  # it crossed before anyone looked
    path = write(tmp_path / "b.txt", ["step:9/9 val_loss:nan train_time:1.0s step_avg:9.0ms"])
    (run,) = parse_runs(path)
    assert run.crossing(3.28) is None and isnan(run.best.val_loss)


def test_our_own_logs_read_the_same_through_both_doors() -> None:
    for path in sorted(LOGS.glob("*.txt")):
        (run,) = parse_runs(path)
        assert repr(run) == repr(parse_log(path)) and run.trial == 0 and run.seed == 1
        crossing = run.crossing(run.target["loss"])
        assert crossing.step == run.target["step"]
        assert crossing.exact_step == pytest.approx(run.target["crossing_step"], abs=0.06)


def test_a_folder_counts_its_logs_or_those_of_its_record(tmp_path: Path) -> None:
    """Of 46 leaderboard rows 7 could not be recomputed: nobody knew which logs count (M3)."""
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.log", "deep/c.txt"):
        write(tmp_path / name, steps((300, 3.2)))
    (tmp_path / "README.md").write_text("step:1/2 val_loss:1.0\n")
    assert [run.name for run in read_runs([tmp_path])] == ["a", "b", "c"]
    (tmp_path / "record.json").write_text(json.dumps({"logs": ["deep/c.txt", "b.txt"]}))
    assert [run.name for run in read_runs([tmp_path, tmp_path / "a.log"])] == ["c", "b", "a"]
    (tmp_path / "record.json").rename(tmp_path / "deep/record.json")
    (tmp_path / "deep/record.json").write_text('{"logs": ["../b.txt"]}')  # found from above, too
    assert [run.name for run in read_runs([tmp_path])] == ["a", "b", "b"]
    for text, found in (
        ('{"logs": ["x.txt"]}', "found no "),
        ("{}", 'no list "logs"'),
        ("{", 'no list "logs"'),
    ):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(ValueError, match=found):
            read_runs([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \*.txt or \*.log in .*empty, expected"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="found nothing at .*nowhere, expected"):
        read_runs([tmp_path / "nowhere"])


def test_500_logs_of_track_1_size_take_under_10_seconds(tmp_path: Path) -> None:
    """60 are timed, on one core; each is 0.4 MB: 100 kB of source and 6000 training lines."""
    source = SOURCE + "    x = f'{step}' + 'a line of source'\n" * 2500
    body = []
    for step in range(0, 6001):
        if step % 125 == 0:
            body += steps((step, 3 + 7 / (step + 1)), total=6000)
        body.append(f"step:{step}/6000 train_time:{step}ms step_avg:60.70ms")
    text = "\n".join([source + RULE, RUNNING, RULE, *body, ""])
    for index in range(60):
        (tmp_path / f"{index:02}.txt").write_text(text, encoding="utf-8")
    start = process_time()
    runs = read_runs([tmp_path])
    assert len(runs) == 60 and len(runs[0].points) == 49
    assert (process_time() - start) * 500 / 60 < 10
