"""Pictures of runs: which are drawn, what their lines are, the same bytes from the same data."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import train_gpt
from records.__main__ import main
from records.figures import group_runs, looks, rendered
from records.history import draw_entries, draw_history
from records.log import RULE, parse_log, read_runs
from records.plot import (
    draw_crossings,
    draw_diagnostics,
    draw_loss,
    draw_times,
    draw_training,
    pictures,
    read_groups,
)
from records.published import track_3
from records.run import Run
from records.stats import precision

Tiny = Callable[..., list[str]]
STEPS = (0, 100, 200, 300, 400)


def write_log(folder: Path, optimizer: str, seed: int, loss: float, **config: object) -> Run:
    """A log whose loss falls by 1 every 100 steps, down to `loss`, in 0.5 s a step."""
    meta = {
        "format": 1,
        "optimizer": optimizer,
        "seed": seed,
        "world_size": 1,
        "device": "cpu",
        "config": {"target": 3.28, "seed": seed} | config,
    }
    lines = [RULE, f"meta: {json.dumps(meta)}", RULE]
    for step in STEPS:
        lines.append(
            f"step:{step}/400 val_loss:{loss + (400 - step) / 100:.5f} "
            f"train_time:{step / 2:.3f}s step_avg:{500.0 if step else float('nan'):.2f}ms"
        )
    path = folder / f"{optimizer}_{seed}.txt"
    path.write_text("\n".join([*lines, 'end: {"status": "complete"}', ""]))
    return parse_log(path)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two seeds of Muon, one of Aurora."""
    return [
        write_log(tmp_path, "muon", 1, 3.2),
        write_log(tmp_path, "muon", 2, 3.3),
        write_log(tmp_path, "aurora", 1, 3.1),
    ]


def test_runs_that_differ_in_their_seed_only_are_one_group(runs: list[Run], tmp_path: Path) -> None:
    groups = group_runs(runs)
    assert {label: len(some) for label, some in groups.items()} == {"Muon": 2, "Aurora": 1}
    more = write_log(tmp_path, "muon", 3, 3.2, lr_scale=2.0)
    assert [*group_runs([*runs, more])] == [
        "Muon",
        "Aurora",
        "Muon, lr_scale 2.0",
    ]


def test_runs_of_two_codes_are_never_averaged(runs: list[Run]) -> None:
    """Upstream's curve of entry 23 averages 40 runs of two scripts."""
    one, two, aurora = runs
    two = replace(two, meta=two.meta | {"code_sha256": "0123456789"})
    assert [*group_runs([one, two])] == ["Muon, code unknown", "Muon, code 0123456"]
    public = [
        replace(run, path=Path(folder, "a.txt"), meta={})
        for run, folder in ((one, "x/logs"), (two, "y/logs"))
    ]
    assert [*group_runs(public)] == ["x/logs", "y/logs"]


def test_groups_of_one_optimizer_share_its_colour_and_not_the_line_style(
    runs: list[Run], tmp_path: Path
) -> None:
    found = looks(group_runs([*runs, write_log(tmp_path, "muon", 3, 3.2, lr_scale=2.0)]))
    one, aurora, two = found.values()
    assert one["color"] == two["color"] != aurora["color"]
    assert one["linestyle"] != two["linestyle"]
    assert one["label"].endswith("(mean of 2, band: sd)") and "mean" not in two["label"]


def test_the_runs_of_a_sweep_are_labelled_by_what_differs(tmp_path: Path) -> None:
    """A label was "set ['wrap=1', 'muon.lr=0.02']", and the fifth line looked like the first."""
    runs = [
        write_log(
            tmp_path, "muon", seed, 3.2, lr_scale=scale, set=["fc.rounds=2", f"muon.lr={rate}"]
        )
        for seed, (scale, rate) in enumerate(
            [(scale, rate) for scale in (0.7, 1.0) for rate in (0.02, 0.03, 0.05)]
        )
    ]
    groups = group_runs([*runs, write_log(tmp_path, "aurora", 9, 3.1, lr_scale=1.0)])
    assert [*groups][:2] == [
        "Muon, lr_scale 0.7, fc.rounds 2, muon.lr 0.02",
        "Muon, lr_scale 0.7, fc.rounds 2, muon.lr 0.03",
    ]
    assert [*groups][-1] == "Aurora, lr_scale 1.0"
    assert [*group_runs(runs)][-1] == "Muon, lr_scale 1.0, muon.lr 0.05", "rounds are the same"
    found = looks(groups).values()
    assert len({(one["color"], one["linestyle"]) for one in found}) == 7
    assert len({one["color"] for one in looks(groups, styles=1).values()}) == 7
    dots = draw_crossings(groups, 3.28).axes[0].lines[::2]
    assert len({line.get_color() for line in dots}) == 7


def test_groups_whose_labels_agree_are_both_drawn(tmp_path: Path) -> None:
    """The order of --set counts where both name one group; the second group was lost."""
    given = ["muon.lr=0.02", "fc.lr=0.03"]
    runs = [
        write_log(tmp_path, "muon", seed, 3.2, set=words)
        for seed, words in enumerate((given, given[::-1]))
    ]
    assert [*group_runs(runs)] == ["Muon", "Muon (1)"]


def test_diagnostics_tell_groups_of_one_optimizer_apart(tmp_path: Path) -> None:
    """The line style tells fc from proj, so that both groups had the same two lines."""
    values = {"update": {"cv": 1.0}, "leverage": {"below": [0.5]}, "orthogonality": 0.1}
    line = {"step": 100, "matrices": {"a.fc.w": values, "a.proj.w": values}, "neurons": {}}
    runs = [
        replace(write_log(tmp_path, "muon", seed, 3.2, lr_scale=scale), extra={"diag": [line]})
        for seed, scale in enumerate((0.7, 1.0))
    ]
    lines = draw_diagnostics(group_runs(runs)).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 4


def test_a_line_is_the_mean_over_seeds_with_a_band_of_one_sd(runs: list[Run]) -> None:
    full, end = draw_loss(group_runs(runs), 3.28).axes
    muon = full.lines[0]
    assert list(muon.get_xdata()) == [100, 200, 300, 400]
    assert list(muon.get_ydata()) == pytest.approx([6.25, 5.25, 4.25, 3.25])
    (band,) = full.collections
    low, high = band.get_datalim(full.transData).intervaly
    sd = statistics.stdev([3.2, 3.3])
    assert (low, high) == pytest.approx((3.25 - sd, 6.25 + sd))
    assert [list(line.get_xdata()) for line in end.lines[:2]] == [[300, 400], [300, 400]]
    assert full.lines[-1].get_label() == "target 3.28"
    time = draw_loss(group_runs(runs), None, time=True).axes[0]
    assert list(time.lines[0].get_xdata()) == [50, 100, 150, 200] and len(time.lines) == 2


def test_each_run_is_a_dot_where_it_crosses_the_target(runs: list[Run]) -> None:
    (axes,) = draw_crossings(group_runs(runs), 3.28).axes
    assert list(axes.lines[0].get_xdata()) == pytest.approx([392])  # seed 2 ends above the target
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["Muon\n1 of 2", "Aurora\n1 of 1"]
    assert draw_crossings(group_runs(runs), 1.0) is None


def test_a_crossing_that_is_not_bracketed_is_no_dot(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """track_3#43 has one validation a run, below the target: its picture was empty."""
    late = replace(runs[0], points=runs[0].points[-1:])
    (axes,) = draw_crossings({"x": [late, runs[0]]}, 3.28).axes
    assert list(axes.lines[0].get_xdata()) == pytest.approx([392])
    assert list(axes.lines[1].get_xdata()) == pytest.approx([392]), "the mean, of numbers only"
    assert axes.get_yticklabels()[0].get_text() == "x\n1 of 2, 1 not bracketed"
    assert draw_crossings({"x": [late]}, 3.28) is None
    main(["plot", "track_3#43", "--out", str(tmp_path / "out")])
    assert "no picture of steps to a target" in capsys.readouterr().out
    assert not (tmp_path / "out/steps_to_target.png").exists()


def test_a_run_given_twice_is_refused(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plot records/prose records/prose` drew a mean of 2 with a band of width 0."""
    with pytest.raises(SystemExit, match="2"):
        main(["plot", str(runs[0].path), str(tmp_path), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("found the same run twice")
    assert not (tmp_path / "out").exists()


def test_the_histogram_counts_the_intervals_between_validations(runs: list[Run]) -> None:
    (axes,) = draw_times(group_runs(runs)).axes
    assert axes.get_ylim()[1] >= 8, "two runs of four intervals of 500 ms a step each"


def test_diagnostics_are_drawn_where_they_were_logged(tiny: Tiny) -> None:
    assert train_gpt.main(tiny("--diagnostics", "--optimizer", "aurora", "--log", "a.txt")) == 0
    (run,) = read_runs(["a.txt"])
    panels = draw_diagnostics(group_runs([run])).axes
    lines = [{line.get_label(): line for line in axes.lines} for axes in panels]
    assert [len(some) for some in lines] == [2, 2, 2, 1], "fc and proj; neurons belong to fc"
    last = run.extra["diag"][-1]
    proj = [matrix["update"]["cv"] for name, matrix in last["matrices"].items() if ".proj." in name]
    curve = lines[0]["Aurora, proj"]
    assert list(curve.get_xdata()) == [2, 4]
    assert curve.get_ydata()[-1] == pytest.approx(sum(proj) / 2) and len(proj) == 2
    silent = [layer["silent"] for layer in last["neurons"].values()]
    assert list(lines[3].values())[0].get_ydata()[-1] == pytest.approx(sum(silent) / 2)
    assert draw_diagnostics(group_runs([run])) is not None
    assert "diagnostics" in pictures(group_runs([run]), None)


def test_losses_rates_and_norms_are_drawn_on_request(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in ("1", "2"):
        assert (
            train_gpt.main(tiny("--log", f"a{seed}.txt", "--seed", seed, "--log-every", "1")) == 0
        )
    main(["plot", "a1.txt", "a2.txt", "--out", "plain"])
    main(["plot", "a1.txt", "a2.txt", "--out", "all", "--training"])
    new = {path.stem for path in Path("all").iterdir()} - {p.stem for p in Path("plain").iterdir()}
    groups = ("embed", "head", "scalars", "attn", "fc", "proj")
    assert new == {"train_loss", *(f"train_{name}" for name in groups)}
    (runs,) = [one.runs for one in read_groups(["a1.txt", "a2.txt"])]
    rates, norms, changes = draw_training({"Muon": runs})["train_fc"].axes
    for axes, key in ((rates, "lr"), (norms, "grad_norm"), (changes, "update_norm")):
        x, y = axes.lines[0].get_data()
        lines = [run.extra["train"] for run in runs]
        assert list(x) == [1, 2, 3, 4]
        expected = [(a[key]["fc"] + b[key]["fc"]) / 2 for a, b in zip(*lines, strict=True)]
        assert list(y) == pytest.approx(expected)
    capsys.readouterr()


def test_a_log_without_train_lines_has_no_such_pictures(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As logs from before these lines."""
    main(["plot", str(runs[0].path), "--out", str(tmp_path / "out"), "--training"])
    assert "no pictures of the training: no group of runs has train: lines" in (
        capsys.readouterr().out
    )


def test_plot_writes_png_and_svg_and_the_same_bytes_again(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("one", "two"):
        main(["plot", str(tmp_path), "--out", str(tmp_path / out)])
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {
        f"{name}.{kind}"
        for kind in ("png", "svg")
        for name in ("loss_steps", "loss_time", "steps_to_target", "step_time")
    }
    assert len(capsys.readouterr().out.splitlines()) == 16
    for name in names:
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_runs_that_did_not_complete_are_left_out_unless_all_did_not(
    runs: list[Run], tmp_path: Path
) -> None:
    from records.plot import read_groups

    path = runs[0].path
    path.write_text(path.read_text().replace("end: ", "X"))
    assert {one.name: len(one.runs) for one in read_groups([str(tmp_path)])} == {
        "Aurora": 1,
        "Muon": 1,
    }
    assert len(read_groups([str(path)])[0].runs) == 1


def test_the_history_shows_every_published_entry() -> None:
    (axes,) = draw_history().axes
    *kinds, best = axes.lines
    assert sum(len(kind.get_xdata()) for kind in kinds) == len(track_3()) == 46
    assert axes.get_ylabel() == "claimed steps to 3.28"
    (hollow,) = [kind for kind in kinds if kind.get_markerfacecolor() == "white"]
    fail = [e.steps for e in track_3().values() if e.record and not precision(e.losses).passes]
    assert list(hollow.get_ydata()) == fail and fail and "fail the rule" in hollow.get_label()
    assert list(best.get_ydata()) == sorted(best.get_ydata(), reverse=True)
    assert best.get_ydata()[-1] == min(entry.steps for entry in track_3().values())


def test_legends_name_all_and_are_not_cut_off(runs: list[Run], tmp_path: Path) -> None:
    """That of step_time.png was; it said "band: sd" of a histogram; 20 grey curves had no name."""
    groups = {f"track_3#{n}": runs[:2] for n in (36, 40, 43, 46)}
    for figure in (draw_times(groups), draw_loss(groups, 3.28), draw_entries()):
        assert figure.get_suptitle()
        rendered(figure, "png")
        (box,) = [legend.get_window_extent() for legend in figure.legends]
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
    (labels,) = [legend.get_texts() for legend in draw_times(groups).legends]
    assert [text.get_text() for text in labels][0] == "track_3#36 (2 runs)"
    drawn = {entry.label for entry in track_3().values() if entry.record and entry.runs}
    assert drawn <= {text.get_text() for text in draw_entries().legends[0].get_texts()}


def test_the_curves_of_entries_are_means_of_their_runs() -> None:
    entry = track_3()[46]
    axes = draw_entries().axes[1]
    line = next(line for line in axes.lines if line.get_label() == "track_3#46")
    where = list(line.get_xdata()).index(entry.steps)
    assert line.get_ydata()[where] == pytest.approx(statistics.fmean(entry.losses))


def test_published_entries_stand_beside_own_runs(runs: list[Run], tmp_path: Path) -> None:
    main(["plot", str(tmp_path), "track_3#36", "track_3", "--out", str(tmp_path / "out")])
    assert "track_3#36" in (tmp_path / "out/loss_steps.svg").read_text()
    assert (tmp_path / "out/history.png").exists()


def with_nan(path: Path) -> str:
    path.write_text(path.read_text().replace("val_loss:5.20000", "val_loss:nan"))
    return str(path.parent)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["plot", "--out", "file"], "file is a file, expected a folder"),
        (["plot", "--out", "file/x"], "file is a file, expected a folder"),
        (["report", "--out", "file/x"], "file is a file, expected a folder"),
        (["report", "--out", "logs"], "logs is a folder, expected the name of an HTML file"),
    ],
)
def test_an_out_of_the_wrong_kind_is_a_sentence(
    argv: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was "[Errno 17] File exists", after all the drawing."""
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    Path("file").write_text("mine")
    write_log(tmp_path / "logs", "muon", 1, 3.2)
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "logs"])
    assert sentence in capsys.readouterr().err and Path("file").read_text() == "mine"


BAD = {
    "found loss nan at step 200, expected numbers": lambda folder: [
        with_nan(folder / "logs/muon_1.txt")
    ],
    "found no *.txt or *.log": lambda folder: ["empty"],
    "mixed targets: 3.28": lambda folder: [
        "logs",
        str(write_log(folder / "empty", "muon", 9, 3.2, target=3.4).path),
    ],
    "no entry track_3#99": lambda folder: ["logs", "track_3#99"],
    "nowhere": lambda folder: ["nowhere"],
    "expected a whole step: line": lambda folder: [
        (folder / "logs/b.txt").write_text(
            f"{RULE}\n"
            + (folder / "logs/muon_1.txt")
            .read_text()
            .split("\n", 1)[1]
            .replace("val_loss:3.2", "val_loss:x")
        )
        and "logs"
    ],
}


@pytest.mark.parametrize("command", ["plot", "report"])
@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    sentence: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("logs", "empty"):
        Path(name).mkdir()
    write_log(tmp_path / "logs", "muon", 1, 3.2)
    with pytest.raises(SystemExit) as caught:
        main([command, *BAD[sentence](tmp_path), "--out", "out"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    assert sentence in err and not Path("out").exists()
