"""pack makes a record that verify accepts; verify finds each kind of damage, also in tables."""

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import train_gpt
from records import pack, pages
from records import record as record_module
from records.__main__ import main
from records.bundle import script_of
from records.log import parse_log
from records.pack import TRACK, TRACK_3_RULES
from records.stats import precision
from records.verify import verify_all, verify_page, verify_record

Tiny = Callable[..., list[str]]
TARGET = "--target=5.52"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which a command ends; it left nothing behind."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1, err
    assert sorted(Path().rglob("*")) == before
    return err


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs of three seeds, and the record packed from them."""
    folder = tmp_path_factory.mktemp("made")
    argv = ["--preset", "tiny", "--data", str(corpus), "--device", "cpu", "--trials", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_gpt.PRESETS, "tiny", TINY)
        assert train_gpt.main([*argv, TARGET, "--log", str(folder / "logs/a.txt")]) == 0
    main(
        [
            "pack",
            str(folder / "logs"),
            "--name",
            "tiny",
            "--what",
            "Nothing changed.",
            "--out",
            str(folder / "record"),
        ]
    )
    return folder


@pytest.fixture
def logs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made / "logs", "logs"))


@pytest.fixture
def record(logs: Path, made: Path) -> Path:
    return Path(shutil.copytree(made / "record", "record"))


def replace(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, count))


def step_of(path: Path) -> str:
    """The first step: line of a log, in the middle of its results."""
    return next(line for line in path.read_text().splitlines() if line.startswith("step:2/4 "))


# ---- pack ------------------------------------------------------------------------------------


def test_verify_accepts_what_pack_made(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(record)])
    assert capsys.readouterr().out == "verified: record\n"
    names = {path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "record.json",
        "submission.py",
        "curves.png",
        "logs/seed_01.txt",
        "logs/seed_02.txt",
        "logs/seed_03.txt",
    }


def test_the_record_says_what_the_logs_say(record: Path, logs: Path) -> None:
    facts = json.loads((record / "record.json").read_text())
    runs = [parse_log(path) for path in sorted(logs.iterdir())]
    step = next(
        point.step
        for point in runs[0].points
        if precision([run.loss_at(point.step) for run in runs], 5.52).passes
    )
    losses = [run.loss_at(step) for run in runs]
    assert 0 < facts["steps"] == step <= 4 and facts["passes"] is True and facts["n"] == 3
    assert facts["mean_loss"] == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert facts["statistic"] == pytest.approx(precision(losses, 5.52).statistic, abs=1e-6)
    assert [log["final_loss"] for log in facts["logs"].values()] == [
        run.final.val_loss for run in runs
    ]
    for name, run in zip(facts["logs"], runs, strict=True):
        assert (record / name).read_bytes() == run.path.read_bytes()
    readme = (record / "README.md").read_text()
    assert "Nothing changed." in readme and f"{sum(losses) / 3:.5f} at step {step}" in readme
    assert f"| {runs[2].seed} | {losses[2]:.5f} | {runs[2].final.val_loss:.5f} |" in readme
    assert (record / "submission.py").read_text() == script_of(runs[0])


def test_a_record_that_misses_the_target_says_so(tiny: Tiny) -> None:
    assert train_gpt.main(tiny("--target=3", "--trials", "2", "--log", "logs/a.txt")) == 0
    main(["pack", "logs", "--name", "slow", "--out", "record"])
    facts = json.loads(Path("record/record.json").read_text())
    assert facts["passes"] is False and facts["steps"] == 4
    assert "does **not** pass" in Path("record/README.md").read_text()
    assert verify_record(Path("record")) == []


def test_runs_of_another_size_are_no_record_of_track_3(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "pack", "logs", "--name", "tiny")
    assert "target 5.52 instead of 3.28, batch_tokens 512 instead of 524288" in message
    assert not TRACK.exists() or not list(TRACK.glob("*_tiny"))
    message = refused(capsys, "pack", "logs", "--name", "../tiny", "--out", "record")
    assert refused(capsys, "pack", "logs", "--name", "a", "--what", "a | b", "--out", "record")
    assert message.startswith("name '../tiny': expected --name with lower case letters")


def test_an_existing_folder_is_kept(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "pack", "logs", "--name", "tiny", "--out", "record")
    assert message.startswith("record exists already")


def as_track_3(logs: Path) -> None:
    """Changes the config of the logs to that of the benchmark."""
    for path in logs.iterdir():
        config = parse_log(path).meta["config"]
        for key, value in TRACK_3_RULES.items():
            replace(path, f'"{key}": {config[key]}', f'"{key}": {value}')


def test_a_record_of_track_3_goes_to_its_folder_and_may_name_a_baseline(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_track_3(logs)
    monkeypatch.setattr(pack, "TRACK", tmp_path / "track_3")
    for module in (pack, record_module):
        monkeypatch.setattr(module, "RECORDS", tmp_path)
    main(["pack", "logs", "--name", "one", "--baseline", "track_3#36"])
    (folder,) = Path("track_3").iterdir()
    assert folder.name == f"{date.today()}_one"
    readme = (folder / "README.md").read_text()
    assert "## Against track_3#36" in readme and "| better | not shown |" in readme
    assert "- hardware differs, seconds do not compare: track_3#36 on 8 x H100" in readme
    main(["pack", "logs", "--name", "two", "--baseline", str(folder)])
    two = folder.with_name(f"{date.today()}_two")
    assert f"## Against track_3/{folder.name}" in (two / "README.md").read_text()
    assert verify_record(folder) == verify_record(two) == []
    replace(two / "README.md", "| loss gained | 0.", "| loss gained | 1.")
    assert len(verify_record(two)) == 1
    message = refused(capsys, "pack", "logs", "--name", "c", "--baseline", "logs")
    assert message.startswith("baseline logs: found no record")
    message = refused(capsys, "pack", "logs", "--name", "c", "--baseline", "track_3#77")
    assert message.startswith("found no entry track_3#77")


def test_a_baseline_with_another_target_is_refused(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(
        capsys, "pack", "logs", "--name", "a", "--out", "new", "--baseline", "track_3#36"
    )
    assert message.startswith("found mixed targets")


def test_update_writes_the_pages_again_after_a_change_of_the_program(record: Path) -> None:
    texts = [(record / name).read_text() for name in ("README.md", "record.json", "submission.py")]
    replace(record / "README.md", "Validation loss", "An older sentence")
    facts = json.loads(texts[1])
    del facts["statistic"]
    (record / "record.json").write_text(json.dumps(facts))
    main(["pack", str(record), "--update"])
    assert verify_record(record) == []
    assert texts == [
        (record / name).read_text() for name in ("README.md", "record.json", "submission.py")
    ]


@pytest.mark.parametrize(
    "text", ["[1]", '{"logs": 5}', '{"logs": {}}', "{", "{}", None, '{"logs": {"gone.txt": {}}}']
)
def test_update_of_no_record_is_a_sentence(
    text: str | None, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was a traceback, or an errno without advice."""
    path = record / "record.json"
    path.unlink() if text is None else path.write_text(text)
    assert "restore it" in refused(capsys, "pack", "record", "--update")


def test_pack_says_one_log_of_one(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """It said "1 logs in record"."""
    assert train_gpt.main(tiny(TARGET, "--log", "logs/a.txt")) == 0
    capsys.readouterr()
    main(["pack", "logs", "--name", "one", "--out", "record"])
    assert capsys.readouterr().out == "1 log in record\n"


SPOIL = {
    'found meta with seed "x", expected a value of its type': lambda logs: replace(
        logs / "a.seed2.txt", '"seed": 2, "config"', '"seed": "x", "config"'
    ),
    "seed 1 occurs 2 times": lambda logs: shutil.copy(logs / "a.seed1.txt", logs / "b.txt"),
    "the run is crashed at step 4": lambda logs: replace(logs / "a.seed2.txt", '\nend: {"', "\nX"),
    "is ranks hold different parameters": lambda logs: replace(
        logs / "a.seed2.txt",
        'end: {"status": "complete"',
        'end: {"status": "ranks hold different parameters"',
    ),
    "a.seed2.txt: has the losses of another run": lambda logs: (logs / "a.seed2.txt").write_text(
        (logs / "a.seed1.txt").read_text().replace('"seed": 1, "config"', '"seed": 2, "config"')
    ),
    "a loss that is not finite": lambda logs: replace(
        logs / "a.seed2.txt", step_of(logs / "a.seed2.txt").split()[1], "val_loss:nan"
    ),
    "differ in target": lambda logs: replace(
        logs / "a.seed2.txt", '"target": 5.52', '"target": 5.53'
    ),
    "differ in lr_scale": lambda logs: replace(
        logs / "a.seed2.txt", '"lr_scale": 1.0', '"lr_scale": 1.5'
    ),
    "differ in hyperparameters": lambda logs: replace(
        logs / "a.seed2.txt", '"lr": 0.025', '"lr": 0.026'
    ),
    "code_sha256 is not the hash": lambda logs: replace(
        logs / "a.seed2.txt", "import math\n", "import math  # really\n"
    ),
    "went on from a checkpoint": lambda logs: replace(
        logs / "a.seed2.txt", "\noptim: {", '\nresumed: {"step": 2, "checkpoint": "x"}\noptim: {'
    ),
    "found no *.txt": lambda logs: [path.unlink() for path in logs.iterdir()],
    "expected one of train_gpt.py": lambda logs: replace(
        logs / "a.seed1.txt", '"code_sha256"', '"hash"'
    ),
}


@pytest.mark.parametrize("sentence", SPOIL)
def test_what_is_no_record_is_refused(
    sentence: str, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SPOIL[sentence](logs)
    assert sentence in refused(capsys, "pack", "logs", "--name", "tiny", "--out", "new/record")


# ---- verify ----------------------------------------------------------------------------------


def swap(record: Path) -> None:
    """The logs of two seeds under each other's name."""
    one, two = (record / f"logs/seed_0{seed}.txt" for seed in (1, 2))
    text = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(text)


DAMAGE = {  # the sentence of verify, and what was done to a record
    "README.md line 5": lambda record: replace(record / "README.md", " loss 5.", " loss 4."),
    "README.md line 29": lambda record: replace(record / "README.md", "| 3 | 5.", "| 3 | 4."),
    "record.json line 9": lambda record: replace(record / "record.json", '"steps": ', '"steps": 1'),
    "record.json line 21": lambda record: replace(
        record / "record.json", '"final_loss": 5', '"final_loss": 4', 2
    ),
    "seed_02.txt: missing": lambda record: (record / "logs/seed_02.txt").unlink(),
    "submission.py: missing": lambda record: (record / "submission.py").unlink(),
    "does not name it": lambda record: shutil.copy(
        record / "logs/seed_02.txt", record / "logs/seed_04.txt"
    ),
    "holds the run of seed 2": swap,
    "seed 1 occurs 2 times": lambda record: shutil.copy(
        record / "logs/seed_01.txt", record / "logs/seed_02.txt"
    ),
    "the run is crashed": lambda record: replace(
        record / "logs/seed_02.txt", '\nend: {"', '\nfin: {"'
    ),
    'found \'   "sha256": ': lambda record: replace(
        record / "logs/seed_02.txt", "step:0/4 val_loss:5.54908", "step:0/4 val_loss:5.54909"
    ),
    "code_sha256 is not": lambda record: replace(
        record / "logs/seed_02.txt", "import math\n", "import math \n"
    ),
    "submission.py line": lambda record: replace(record / "submission.py", "0.05", "0.06"),
    "curves_sha256": lambda record: (record / "curves.png").write_bytes(b"\x89PNG"),
    "found no record": lambda record: (record / "record.json").write_text("{"),
    "expected a JSON object": lambda record: replace(
        record / "logs/seed_02.txt", '\nend: {"', '\nend: ["'
    ),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_verify_finds_each_kind_of_damage(
    sentence: str, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[sentence](record)
    problems = verify_record(record)
    assert any(sentence in problem for problem in problems), problems
    with pytest.raises(SystemExit) as caught:
        main(["verify", "record"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "\n".join([*problems, ""])


def test_verify_reports_every_problem_of_several_records(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(record, "second")
    for folder in ("record", "second"):
        replace(Path(folder, "README.md"), "loss", "lass")
        (Path(folder) / "submission.py").write_text("")
    with pytest.raises(SystemExit):
        main(["verify", "record", "second", "third"])
    problems = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in problems] == [
        "record/README.md",
        "record/submission.py",
        "second/README.md",
        "second/submission.py",
        "third:",
    ]


def test_a_link_that_leads_to_nothing_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[a](page.md) [b](https://example.org) ![c](#d) [e](page.md#f) `[g](h)`\n"
        "```\n[i](j)\n```\n[k](gone.md) ![l](gone.png)\n"
    )
    assert verify_page(page, tmp_path) == [
        f"{page}: the link gone.md leads to nothing",
        f"{page}: the link gone.png leads to nothing",
    ]


BAD_LOGS = {
    "code_sha256 is not the hash": lambda log: replace(log, "import math\n", "import math \n"),
    "the run is crashed at step 4 of 4": lambda log: replace(log, '\nend: {"', "\nX"),
    "a loss that is not finite": lambda log: replace(log, step_of(log).split()[1], "val_loss:nan"),
    "2 of them": lambda log: log.write_text("hello\n"),
}


@pytest.mark.parametrize("sentence", BAD_LOGS)
def test_verify_reads_a_log_as_a_log(
    sentence: str, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said "verified" of any text file: as a page without dead links."""
    log = logs / "a.seed2.txt"
    main(["verify", str(log)])
    assert capsys.readouterr().out == f"verified: {log}\n"
    BAD_LOGS[sentence](log)
    assert sentence in refused(capsys, "verify", str(log))


def test_verify_of_other_files_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PNG was "'utf-8' codec can't decode byte 0x89"."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.md", "a.txt"):
        Path(name).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "a.png: found a file of another kind" in refused(capsys, "verify", "a.png")
    assert "a.md: found bytes that are no UTF-8" in refused(capsys, "verify", "a.md")
    assert "a.txt line 3: found the end" in refused(capsys, "verify", "a.txt")
    assert "found no such file" in refused(capsys, "verify", "gone.txt")


# ---- leaderboard -----------------------------------------------------------------------------


@pytest.fixture
def root(record: Path) -> Path:
    """A repository with one record, and pages without data for the other tables."""
    folder = Path("repository/records/track/2026-01-02_tiny")
    folder.parent.mkdir(parents=True)
    record.rename(folder)
    for page, tables in pages.PAGES.items():
        path = Path("repository", page)
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"<!-- table:{t} -->\n<!-- /table:{t} -->\n" for t in tables))
    pages.main([], Path("repository"))
    return Path("repository")


def test_the_leaderboard_has_a_row_for_each_record(root: Path) -> None:
    assert verify_all(root) == []
    row = (root / "records/README.md").read_text().splitlines()[3].strip("| ").split(" | ")
    facts = json.loads((root / "records/track/2026-01-02_tiny/record.json").read_text())
    assert row[:5] == [
        "track",
        f"{facts['steps']}",
        f"{facts['mean_loss']:.5f}",
        f"{facts['sd']:.5f}",
        "3",
    ]
    assert row[-1] == "[tiny](track/2026-01-02_tiny/README.md)"


def test_verify_sees_a_changed_digit_of_the_leaderboard(root: Path) -> None:
    page = root / "records/README.md"
    replace(page, "| 5.", "| 4.")
    (problem,) = verify_all(root)
    assert problem.startswith("records/README.md line 4: found '| track")
    assert verify_page(page, root) == [problem]


def test_the_page_on_submitting_writes_the_leaderboard_before_it_verifies(root: Path) -> None:
    """In its order verify refused every new record: the leaderboard lacked the row."""
    words = ("records pack", "records.pages", "records verify")
    page = (ROOT / "docs/submit.md").read_text().partition("## 5.")[2]
    places = [page.index(f"python -m {word}") for word in words]
    assert places == sorted(places)
    first = root / "records/track/2026-01-02_tiny"
    shutil.copytree(first, first.with_name("2026-01-03_tiny"))
    assert "run python -m records.pages" in verify_all(root)[0]
    pages.main([], root)
    assert verify_all(root) == []


def test_a_broken_record_json_is_a_sentence_for_the_leaderboard_too(root: Path) -> None:
    path = root / "records/track/2026-01-02_tiny/record.json"
    for text in ("{", "[]", '{"passes": true}'):
        path.write_text(text)
        problems = verify_all(root)
        assert len(problems) == 2 and all("found no record (" in problem for problem in problems)


def test_records_that_pass_stand_above_those_that_do_not(root: Path) -> None:
    first = root / "records/track/2026-01-02_tiny"
    for name, change in (("faster", {"steps": 1}), ("missed", {"steps": 1, "passes": False})):
        shutil.copytree(first, first.with_name(name))
        path = first.with_name(name) / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change | {"name": name}))
    rows = pages.leaderboard(root).splitlines()[2:]
    assert [row.split("[")[1].split("]")[0] for row in rows] == ["faster", "tiny", "missed"]


def test_every_record_and_page_of_this_repository_verifies() -> None:
    assert verify_all(ROOT) == []
