"""Source out of logs: extract gives the tree back, script_of the one file that repeats a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, TINY, in_fresh_python

import train_gpt
from records.__main__ import main
from records.bundle import files_of, script_of
from records.log import RULE, parse_log

Tiny = Callable[..., list[str]]


def test_an_extracted_tree_is_the_repositorys_and_flattens_to_the_same_script(tiny: Tiny) -> None:
    assert train_gpt.main(tiny("--steps", "1", "--log", "a.txt")) == 0
    main(["extract", "a.txt", "--out", "tree"])
    files = sorted(path for path in Path("tree").rglob("*") if path.is_file())
    names = [path.relative_to("tree").as_posix() for path in files]
    assert "train_gpt.py" in names and "optimizers/slot.py" in names
    for path, name in zip(files, names, strict=True):
        assert path.read_bytes() == (ROOT / name).read_bytes(), name
    code = (
        "from pathlib import Path; from train_gpt import flatten; import sys; "
        "sys.stdout.write(flatten(Path('train_gpt.py').resolve()))"
    )
    status, text, error = in_fresh_python("-c", code, cwd=Path("tree").resolve())
    assert (status, error) == (0, "") and text == parse_log("a.txt").script


def test_the_folder_is_named_after_the_log_unless_it_is_given(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_gpt.main(tiny("--steps", "1", "--log", "a.txt")) == 0
    capsys.readouterr()
    main(["extract", "a.txt"])
    assert (
        "files in a_source: records/missing.py, data/loader.py, models/" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="2"):
        main(["extract", "a.txt"])
    assert capsys.readouterr().err.startswith("a_source exists already")
    assert not list(Path().glob(".new-*"))


def test_extract_writes_no_folder_into_a_record_and_takes_one_log(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source of a record's log went into its logs/, after which verify refused the record."""
    assert train_gpt.main(tiny("--steps", "1", "--log", "record/logs/seed_01.txt")) == 0
    Path("record/record.json").write_text('{"logs": {"logs/seed_01.txt": {}}}')
    capsys.readouterr()
    for argv, sentence in (
        (["record/logs/seed_01.txt", "--out", "record/x"], "inside a record"),
        (["record"], "record is a folder, expected one log"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["extract", *argv])
        assert sentence in capsys.readouterr().err
    main(["extract", "record/logs/seed_01.txt"])
    assert Path("seed_01_source/train_gpt.py").is_file()
    assert [path.name for path in Path("record/logs").iterdir()] == ["seed_01.txt"]


def test_a_script_without_sections_is_one_file() -> None:
    assert files_of("print(1)\n") == {"script.py": "print(1)\n"}


@pytest.mark.parametrize("name", ["../a.py", "/tmp/a.py", "a/../../b.py", "a\\b.py"])
def test_no_section_leaves_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="within its folder"):
        files_of(f"# {'=' * 20} {name} {'=' * 20}\nprint()\n")


def test_a_log_without_source_or_with_a_file_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = f"# {'=' * 20} a.py {'=' * 20}\nprint()\n" * 2
    meta = (
        'meta: {"format": 1, "optimizer": "", "seed": 1, "world_size": 1, "device": "cpu", '
        '"config": {}}'
    )
    body = f"{meta}\n{RULE}\nstep:0/1 val_loss:1.0 train_time:0.0s step_avg:nanms\n"
    for source, message in ((twice, "each file once"), ("", "holds no source")):
        (tmp_path / "a.txt").write_text(f"{source}{RULE}\n{body}")
        with pytest.raises(SystemExit, match="2"):
            main(["extract", str(tmp_path / "a.txt")])
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_script_of_a_run_repeats_it_without_its_arguments(tiny: Tiny, corpus: Path) -> None:
    argv = tiny("--trials=2", "--optimizer", "aurora", "--set", "fc.lr=0.03", "--seed", "5")
    assert train_gpt.main([*argv, "--log", "a.txt"]) == 0
    run = parse_log("a.seed6.txt")
    script = script_of(run)
    assert script == script_of(parse_log("a.seed5.txt")), "seeds do not change it"
    constants = [*argv[:2], *argv[7:11]]
    changed = set(script.splitlines()) - set(run.script.splitlines())
    assert changed == {f"    sys.exit(main({constants} + sys.argv[1:]))"}
    assert "--set" in constants and "--seed" not in constants and str(corpus) not in constants
    preset = script.replace(
        "PRESETS = dict(", f"PRESETS = dict(tiny={TINY}, "
    )  # not of the trainer
    Path("submission.py").write_text(preset)
    own = ["--data", str(corpus), "--device", "cpu", "--seed", "6", "--log", "b.txt"]
    status, _, error = in_fresh_python("submission.py", *own, cwd=Path().resolve())
    assert (status, error) == (0, "")
    again = parse_log("b.txt")
    assert [point.val_loss for point in again.points] == [p.val_loss for p in run.points]
    assert script_of(again) == preset, "of a run of the submission it is the same again"


def test_a_submission_holds_nothing_of_its_authors_machine(tiny: Tiny, corpus: Path) -> None:
    """It had --checkpoint /home/me/run.pt, --device and --wandb: those of the author, not ours."""
    folder = Path().resolve()
    mine = ["--checkpoint", str(folder / "c.pt"), "--diagnostics", "--no-wandb", "--trials=1"]
    argv = tiny("--optimizer", "aurora", *mine, f"--log-file={folder / 'a.txt'}", "--seed=1")
    assert train_gpt.main(argv) == 0
    script = script_of(parse_log("a.txt"))
    (start,) = [line for line in script.splitlines() if "+ sys.argv[1:]" in line and "main" in line]
    assert start == (
        "    sys.exit(main(['--preset', 'tiny', '--optimizer', 'aurora'] + sys.argv[1:]))"
    )
    assert str(folder) not in script and str(corpus) not in script
    Path("new").mkdir()
    preset = script.replace("PRESETS = dict(", f"PRESETS = dict(tiny={TINY}, ")
    Path("new/submission.py").write_text(preset)
    own = ["--data", str(corpus), "--device", "cpu", "--seed", "2", "--log", "b.txt"]
    status, _, error = in_fresh_python("submission.py", *own, cwd=folder / "new")
    assert (status, error) == (0, "")
    assert parse_log("new/b.txt").seed == 2
    assert sorted(path.name for path in Path("new").iterdir()) == ["b.txt", "submission.py"]


def test_a_script_with_another_end_is_no_submission(tiny: Tiny) -> None:
    assert train_gpt.main(tiny("--steps", "1", "--log", "a.txt")) == 0
    run = parse_log("a.txt")
    assert "+ sys.argv" in script_of(run)
    assert script_of(replace(run, meta=run.meta | {"argv": []})) == run.script
    with pytest.raises(ValueError, match="expected a log of train_gpt.py"):
        script_of(replace(run, script="print()\n"))


def test_the_log_says_which_arguments_a_submission_leaves_out(tiny: Tiny) -> None:
    assert train_gpt.main(tiny("--steps", "1", "--log", "a.txt")) == 0
    run = parse_log("a.txt")
    config = run.meta["config"] | {"keep_warm": True, "cache_dir": "x"}
    argv = ["--cache-dir", "/home/me", "--no-keep-warm", "--steps", "1", "--seed", "1"]
    meta = run.meta | {"config": config, "argv": argv, "free": ["cache_dir", "keep_warm", "seed"]}
    assert "main(['--steps', '1'] + sys.argv[1:])" in script_of(replace(run, meta=meta))
