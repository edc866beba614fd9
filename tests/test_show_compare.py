"""`python -m records show` and `compare` on made-up logs and on the published leaderboard."""

import json
import os
import re
from pathlib import Path

import pytest

from records.__main__ import main
from records.log import RULE
from records.stats import pairwise, precision, summary

LOSSES = {1: 3.2771, 2: 3.2799, 3: 3.2783}


def write_log(path: Path, seed: int, loss: float, pace: float = 0.4, **changes: object) -> None:
    """Of a run that crosses 3.28 half-way between its validations at 100 and 200 steps."""
    path.parent.mkdir(exist_ok=True)
    config = {
        "optimizer": "muon",
        "seed": seed,
        "steps": 300,
        "target": 3.28,
        "log": f"{path}",
        "batch_tokens": 524288,
    } | changes
    stated = {key: config.pop(key) for key in ("free", "kernels") if key in config}
    meta = {
        "format": 1,
        "optimizer": config["optimizer"],
        "seed": seed,
        "config": config,
        "world_size": 1,
        "device": config.pop("gpu", "NVIDIA H200"),
        "torch": "2.11.0",
    } | stated
    groups = [{"name": "fc", "lr": config.pop("lr", 0.025), "weight_decay": 0.05}]
    lines = [f"print('=')\n{RULE}", f"meta: {json.dumps(meta)}", RULE]
    for step, value in ((0, 10.82584), (100, 3.28 + 0.01), (200, 3.28 - 0.01), (300, loss)):
        average = f"{1000 * pace:.2f}" if step else "nan"
        lines.append(
            f"step:{step}/300 val_loss:{value:.5f} train_time:{pace * step:.3f}s "
            f"step_avg:{average}ms"
        )
    lines += [f"optim: {json.dumps({'step': 1, 'groups': groups})}", 'end: {"status": "complete"}']
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Group a has seeds 1 to 3; b has the same seeds, losses 0.01 lower, another learning rate."""
    for seed, loss in LOSSES.items():
        write_log(tmp_path / f"a/{seed}.txt", seed, loss)
        write_log(tmp_path / f"b/{seed}.txt", seed, loss - 0.01, pace=0.3, lr=0.03)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main([*argv])
    return capsys.readouterr().out


def tables(text: str) -> list[list[dict[str, str]]]:
    """Each Markdown table as rows of cells by their title."""
    found = []
    for block in text.split("\n\n"):
        rows = [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in block.splitlines()
            if line.startswith("| ")
        ]
        if rows:
            found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*argv])
    out, message = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and message.count("\n") == 1
    return message


def test_show_lists_every_run_with_what_it_used(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, "show", "a", "b", "--markdown")
    assert "settings read back of b/1.txt, b/2.txt, b/3.txt: fc lr 0.03 wd 0.05\n" in text
    (rows,) = tables(output(capsys, "show", "a", "--markdown"))
    assert [row["seed"] for row in rows] == ["1", "2", "3"]
    assert rows[0] == {
        "run": "1",
        "status": "complete",
        "step": "300/300",
        "final loss": "3.27710",
        "best loss (step)": "3.27000 (200)",
        "step at 3.28 (interpolated)": "200 (150.0)",
        "seconds to 3.28": "60.000",
        "ms per step": "400.00",
        "tokens/s": "1,310,720",
        "hardware": "1 x H200",
        "optimizer": "muon",
        "seed": "1",
    }


def test_a_terminal_shows_the_same_cells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", "a", "b/1.txt")
    for cell in ("b/1.txt", "3.27710", "200 (150.0)", "1,310,720", "fc lr 0.025 wd 0.05"):
        assert cell in text


def test_the_leaderboard_prints_both_numbers_where_they_differ(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = output(capsys, "show", "track_3", "--markdown")
    rows = tables(text)[0]
    assert [row["entry"] for row in rows] == [str(number) for number in range(1, 47)]
    means = {row["entry"]: row["mean loss"] for row in rows if "claimed" in row["mean loss"]}
    assert means == {
        "6": "3.27893, claimed 3.2788",
        "8": "3.27798, claimed 3.2778",
        "17": "3.27884, claimed 3.2789",
        "41": "3.27912, claimed 3.2790",
    }
    assert [row["entry"] for row in rows if "claimed" in row["n"]] == ["41"]
    assert [row["entry"] for row in rows if row["rule"] == "fails"] == ["1", "2", "3", "41"]
    assert "track_3#41: its README lists 20 losses at step 2875 without logs: mean 3.27901" in text


def test_an_entry_shows_its_runs_at_the_claimed_step(capsys: pytest.CaptureFixture[str]) -> None:
    (rows,) = tables(output(capsys, "show", "track_3#36", "--markdown"))
    assert len(rows) == 10 and rows[0]["loss at the claimed step"] == "3.27722 (3250)"
    assert {row["hardware"] for row in rows} == {"8 x H100 80GB HBM3"}
    (rows,) = tables(output(capsys, "show", "track_3#46", "--markdown"))
    assert rows[0]["loss at the claimed step"] == "3.27795 (2690)"


def test_compare_is_what_the_statistics_say(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, crossings, pairs = tables(output(capsys, "compare", "b", "a", "--markdown"))
    losses, crossings = losses[::-1], crossings[::-1]
    old = list(LOSSES.values())
    new = [loss - 0.01 for loss in old]
    found, official = summary(old), precision(old)
    assert losses[0]["mean loss"] == f"{found.mean:.5f}" and losses[0]["sd"] == f"{found.sd:.5f}"
    assert losses[0]["95% t interval"] == f"[{found.low:.5f}, {found.high:.5f}]"
    assert losses[0]["(3.28 - mean) sqrt(n)"] == f"{official.statistic:.5f}"
    assert [row["rule"] for row in losses] == ["fails", "passes"]
    assert crossings[0]["runs that reach 3.28"] == "3 of 3"
    assert (crossings[0]["steps to it"], crossings[1]["seconds to it"]) == ("150.0", "45.00")
    pair, rule = pairs[0], pairwise(old, 300, new, 300)
    assert pair["new against old"] == "b against a" and pair["better"] == "yes"
    assert pair["pairwise rule"] == f"{rule.statistic:.5f}"
    assert pair["loss gained"].startswith("0.01000 [") and pair["seconds gained"] == "15.00"
    assert pair["same seeds"] == "3" and pair["loss gained, paired"].startswith("0.01000")


def test_one_shared_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = tables(output(capsys, "compare", "a", "track_3#36", "--step", "0", "--markdown"))[0]
    assert [row["mean loss"] for row in losses] == ["10.82584", "10.82584"]
    assert "a: 1 has no validation at step 3250" in failure(
        capsys, "compare", "a", "track_3#36", "--step", "3250"
    )
    losses = tables(output(capsys, "compare", "a", "track_3#36", "--markdown"))[0]
    assert [row["step"] for row in losses] == ["300", "3250"]


def test_a_run_that_never_crosses_leaves_no_interval(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean over those that cross would be one over selected runs."""
    crossings = tables(output(capsys, "compare", "track_3#36", "b", "--markdown"))[1]
    assert crossings[0]["runs that reach 3.28"] == "8 of 10"
    assert crossings[0]["steps to it"] == "-" and crossings[1]["steps to it"] == "150.0"


def test_same_seed_repeats_and_the_same_run_twice_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A p-value of upstream stood on repeats of one seed (modded-nanogpt#358)."""
    write_log(folder / "a/4.txt", 3, 3.2781)
    message = failure(capsys, "compare", "a", "b")
    assert message.startswith("a: found 2 runs of seed 3, expected a seed of its own")
    (folder / "a/4.txt").write_bytes((folder / "a/3.txt").read_bytes())
    assert "found the same run twice: a/3 and a/4" in failure(capsys, "compare", "a", "b")
    assert "the same run twice: b/1 and b/1.txt/1" in failure(capsys, "compare", "b", "b/1.txt")
    assert "track_3#14 counts 4 runs of seed 0" in output(capsys, "compare", "track_3#14")


def test_extending_n_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds were added to a record until the rule held (modded-nanogpt#283)."""
    sentence = "the rule holds for 4 runs and not for the first 3"
    assert sentence not in output(capsys, "compare", "a")
    write_log(folder / "a/4.txt", 4, 3.2763)
    assert f"warning: a: {sentence}" in output(capsys, "compare", "a")


def test_hardware_and_settings_that_differ_are_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, "compare", "a", "b")
    assert "the runs differ in one thing: fc.lr 0.025 (a), 0.03 (b)" in text
    assert "hardware" not in text
    for seed, loss in LOSSES.items():
        write_log(
            folder / f"b/{seed}.txt",
            seed,
            loss - 0.01,
            lr=0.03,
            optimizer="aurora",
            gpu="NVIDIA H100",
        )
    text = output(capsys, "compare", "a", "b")
    assert "differ in 2 things: optimizer muon (a), aurora (b); fc.lr 0.025 (a), 0.03 (b)" in text
    assert "hardware differs, seconds do not compare: a on 1 x H200; b on 1 x H100" in text


def test_a_glob_is_a_group(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = tables(output(capsys, "compare", "a/[12].txt", "--markdown"))[0]
    assert losses[0]["group"] == "a/[12].txt" and losses[0]["n"] == "2"
    assert "found nothing that matches x*" in failure(capsys, "compare", "x*")


@pytest.mark.parametrize("command", ["show", "compare"])
def test_bad_input_is_one_sentence(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "none.txt").write_text("exit_code=1\n", encoding="utf-8")
    write_log(folder / "c/1.txt", 1, 3.2, target=3.42)
    for argument, found in (
        ("empty", "found no *.txt or *.log in empty, expected"),
        ("x", "found nothing at x, "),
        ("none.txt", "none.txt line 2: found the end without a validation, expected"),
        ("track_3#47", "found no entry track_3#47, expected track_3#1 to track_3#46"),
        ("c", "found mixed targets: 3.28 (a/1), 3.42 (c/1), expected one"),
    ):
        before = sorted(folder.rglob("*"))
        assert failure(capsys, command, "a", argument).startswith(found)
        assert sorted(folder.rglob("*")) == before
    assert output(capsys, command, "a", "c", "--target", "3.3")


def test_a_nan_is_not_averaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """show lists such a run with its status, compare refuses it."""
    write_log(folder / "a/4.txt", 4, float("nan"))
    message = failure(capsys, "compare", "a")
    assert message.startswith("a: found loss nan at step 300 of 4, expected a number")
    assert "nan" in output(capsys, "show", "a")


def test_a_public_log_needs_its_target_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "step:100/100 val_loss:2.9190 train_time:1234ms step_avg:12.34ms\n"
    (folder / "medium.txt").write_text(line, encoding="utf-8")
    assert failure(capsys, "compare", "medium.txt").startswith("found no target in these logs")
    text = output(capsys, "compare", "medium.txt", "--target", "2.92", "--markdown")
    assert tables(text)[0][0]["(2.92 - mean) sqrt(n)"] == "0.00100"
    assert "sigma measured at 3.28" in text


def test_another_scored_metric_is_shown_and_warned_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An entry scored on val_ema_loss was compared with val_loss in silence."""
    text = output(capsys, "compare", "track_3#45", "track_3#46")
    assert "scored metric val_loss (track_3#45), val_ema_loss (track_3#46)" in text
    (rows,) = tables(output(capsys, "show", "track_3#46", "--markdown"))
    assert {row["metric"] for row in rows} == {"val_ema_loss"}
    assert "metric" not in output(capsys, "show", "a")


def test_what_is_not_stated_is_not_counted_as_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of published runs "the runs differ in one thing" was said: nobody had their settings."""
    text = output(capsys, "compare", "track_3#35", "track_3#36")
    assert "settings of track_3#35, track_3#36 are not known; seen to differ: " in text
    assert "; method " in text and "; code (md5) " in text and "differ in" not in text
    text = output(capsys, "compare", "a", "track_3#36")
    assert "settings and code of track_3#36 are not known" in text and "differ in" not in text


def test_a_run_below_the_target_from_the_start_reaches_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Crossings that nobody saw were dropped before they were counted: "0 of 13"."""
    crossings = tables(output(capsys, "compare", "a", "--target", "11", "--markdown"))[1]
    assert crossings[0]["runs that reach 11"] == "3 of 3" and "steps to it" not in crossings[0]


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["compare", "a", "--target", "nan"], "found --target nan, expected a loss"),
        (["show", "a", "--target", "inf"], "found --target inf, expected a loss"),
        (["show", ""], "found an empty name, expected a log"),
        (
            ["show", "track_3", "a"],
            "found track_3, expected one of its entries here; write track_3#",
        ),
        (["compare", "track_3"], "found track_3, expected one of its entries here; write track_3#"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    folder: Path, argv: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target of nan was compared with, and an empty name was the whole working folder."""
    assert failure(capsys, *argv).startswith(found)


def test_all_settings_are_read_back_under_names_of_their_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only lr, wd and momentum were printed, and runs of two folders had the same name."""
    path = folder / "a/1.txt"
    path.write_text(
        path.read_text().replace(
            '"weight_decay": 0.05',
            '"weight_decay": 0.05, "betas": [0.8, 0.95], "polar": "gram", '
            '"rounds": 2, "exponent": 0.5, "foreach": null, "fused": true',
        )
    )
    text = output(capsys, "show", "a")
    assert "of 1: fc lr 0.025 wd 0.05 betas [0.8,0.95] polar gram rounds 2 exponent 0.5\n" in text
    (folder / "both").mkdir()
    for name in "ab":
        (folder / name).rename(folder / "both" / name)
    assert "read back of b/1.txt, b/2.txt, b/3.txt: " in output(capsys, "show", "both")


def test_seconds_of_other_hardware_are_no_gain(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gain in seconds stood beside the warning that they do not compare."""
    for seed, loss in LOSSES.items():
        write_log(folder / f"b/{seed}.txt", seed, loss - 0.01, gpu="NVIDIA H100")
    pair = tables(output(capsys, "compare", "a", "b", "--markdown"))[2][0]
    assert "steps gained" in pair and "seconds gained" not in pair


def test_a_narrow_terminal_breaks_no_number(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 80 columns "3.27710" stood as "3.2771" above "0"."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    text = output(capsys, "show", "a", "b", "--wide")
    assert all(cell in text for cell in ("3.27710", "(150.0)", "1,310,720", "300/300", "60.000"))
    assert "3.27000" in text and max(map(len, text.splitlines())) < 400


def plain(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


def test_show_fits_80_columns(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirteen columns of six characters each folded every word of the table."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    name = "muon_lr-scale0.7_weight_decay0.025_seed1"
    (folder / "a/1.txt").rename(folder / f"a/{name}.txt")
    path = folder / "a/2.txt"
    path.write_text(path.read_text().replace("end: ", "X"))
    os.utime(path, (0, 0))
    for argv in (["a"], ["a", "b"], ["track_3"], ["track_3#36"]):
        lines = plain(output(capsys, "show", *argv))
        assert max(map(len, lines)) <= 80
        assert any(line.startswith("no room for: ") for line in lines)
        assert any(line.endswith("--wide)") for line in lines)
    lines = plain(output(capsys, "show", "a"))
    (row,) = [line for line in lines if "stopped" in line]
    assert row.split("  ")[0] == "2" and "3.27990" in row and "200 (150.0)" in row
    assert "400.00" in row and re.search(r"\bms per\b", "".join(lines[:3]))
    assert "tokens/s" not in "".join(lines[:3]) and "(exact)" in "".join(lines[:3])
    monkeypatch.setenv("COLUMNS", "200")
    text = "\n".join(plain(output(capsys, "show", "a")))
    assert "1,310,720" in text and name in text and "no room" not in text


def test_compare_says_the_first_against_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README compares mine with a baseline, and was told what the baseline gains."""
    pairs = tables(output(capsys, "compare", "b", "a", "track_3#36", "--markdown"))[2]
    assert [row["new against old"] for row in pairs] == [
        "b against a",
        "b against track_3#36",
        "a against track_3#36",
    ]
    assert pairs[0]["loss gained"].startswith("0.01000") and pairs[0]["better"] == "yes"
    pair = tables(output(capsys, "compare", "a", "b", "--markdown"))[2][0]
    assert pair["new against old"] == "a against b" and pair["better"] == "not shown"
    assert pair["loss gained"].startswith("-0.01000") and pair["steps gained"].startswith("0.0")


def test_one_seed_each_has_a_difference_and_no_verdict(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two single runs were "better: yes, p 1.2e-11" by a sigma that is only assumed."""
    text = output(capsys, "compare", "b/1.txt", "a/1.txt", "--markdown")
    (pair,) = tables(text)[2]
    assert pair["loss gained"] == "0.01000" and pair["seconds gained"] == "15.00"
    assert not {"pairwise rule", "better", "p", "Welch p"} & {*pair}
    said = "warning: b/1.txt, a/1.txt: one run each, so their differences have no verdict"
    assert said in text
    text = output(capsys, "compare", "b/1.txt", "a", "--markdown")
    assert tables(text)[2][0]["better"] == "yes" and "one run each" not in text


def test_a_comparison_counts_the_runs_that_have_not_ended(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, age in ((1, None), (2, (0, 0))):
        path = folder / f"a/{seed}.txt"
        path.write_text(path.read_text().replace("end: ", "X"))
        os.utime(path, age)
    text = output(capsys, "compare", "a")
    assert "a: 1 of 3 runs: running" in text and "1 of 3 runs: stopped at step 300" in text


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["shwo"])
    assert caught.value.code == 2 and "'show', 'compare'" in capsys.readouterr().err


def test_kernels_differ_only_where_both_logs_name_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, fused = {"trunk": "plain PyTorch", "head": "PyTorch"}, {"trunk": "Gluon"}
    write_log(folder / "c/1.txt", 1, 3.2775, kernels=plain)
    write_log(folder / "d/1.txt", 1, 3.2785, kernels=fused)
    text = output(capsys, "compare", "c", "d")
    assert "the runs differ in one thing: trunk kernels plain PyTorch (c), Gluon (d)" in text
    assert "kernels" not in output(capsys, "compare", "c", "a")


def test_fields_that_a_log_calls_free_are_no_difference(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (("c", ["seed", "log", "prefetch"]), ("d", ["seed", "log"])):
        write_log(folder / f"{name}/1.txt", 1, 3.2775, prefetch=2, free=words)
        write_log(folder / f"{name}2/1.txt", 1, 3.2785, prefetch=3, free=words)
    assert "differ in" not in output(capsys, "compare", "c", "c2")
    text = output(capsys, "compare", "d", "d2")
    assert "the runs differ in one thing: prefetch 2 (d), 3 (d2)" in text
