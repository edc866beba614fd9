"""The HTML report: complete in one file, and a real browser shows its pictures."""

import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from conftest import ROOT
from test_plot import write_log

from records.__main__ import main
from records.log import parse_log
from records.stats import precision, summary

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of Muon, two of Aurora, and one run that crashed."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "logs").mkdir()
    for optimizer, seed, loss in (
        ("muon", 1, 3.2),
        ("muon", 2, 3.21),
        ("aurora", 1, 3.1),
        ("aurora", 2, 3.12),
        ("aurora", 3, 3.0),
    ):
        run = write_log(folder / "logs", optimizer, seed, loss)
    run.path.write_text(run.path.read_text().replace("end: ", "X"))
    os.utime(run.path, (0, 0))  # long ago
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    main(
        [
            "report",
            str(folder / "logs"),
            "--title",
            "Muon <& Aurora>",
            "--out",
            str(folder / "report.html"),
        ]
    )
    return (folder / "report.html").read_text()


def cells(text: str) -> list[list[str]]:
    """The cells of all tables, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def test_the_file_needs_no_network_and_no_script(report: str) -> None:
    assert "<script" not in report and "<link" not in report and "url(" not in report
    assert all(
        source.startswith("data:image/svg+xml;base64,")
        for source in re.findall(r'src="([^"]*)"', report)
    )
    assert report.count("<img ") == 4 and "http" not in report
    assert "<title>Muon &lt;&amp; Aurora&gt;</title>" in report


def test_its_statistics_are_those_of_the_logs(report: str, folder: Path) -> None:
    runs = [parse_log(folder / f"logs/muon_{seed}.txt") for seed in (1, 2)]
    losses = [run.final.val_loss for run in runs]
    row = next(row for row in cells(report) if row[0] == "Muon")
    assert row[1:5] == ["400", "2", f"{summary(losses).mean:.5f}", f"{summary(losses).sd:.5f}"]
    assert f"{precision(losses).statistic:.5f}" in row
    assert any(row[0] == "Aurora against Muon" for row in cells(report))


def test_tables_have_headings_and_no_empty_columns(report: str) -> None:
    """Three tables stood below one heading, with columns of nothing but dashes."""
    assert re.findall(r"<h3>(.*?)</h3>\n<(table|ul)", report)[:3] == [
        ("Loss at one step", "table"),
        ("Steps and seconds to 3.28", "table"),
        ("Each pair of groups", "table"),
    ]
    for text in report.split("<table>")[1:]:
        for column in zip(*cells(text.split("</table>")[0]), strict=True):
            assert set(column[1:]) != {"-"}, column[0]


def test_the_settings_read_back_are_in_it(tmp_path: Path) -> None:
    """show prints them, the report did not."""
    main(
        [
            "report",
            str(ROOT / "records/prose/muon_1xH200_seed1.txt"),
            "--out",
            str(tmp_path / "report.html"),
        ]
    )
    text = (tmp_path / "report.html").read_text()
    assert "<p>settings read back of muon_1xH200_seed1: " in text


def test_a_run_that_crashed_is_listed_and_not_counted(report: str) -> None:
    assert next(row for row in cells(report) if row[0] == "Aurora")[2] == "2"
    assert next(row for row in cells(report) if row[0] == "aurora_3")[1] == "stopped at step 400"


@pytest.mark.parametrize("names", [("muon_1", "aurora_1"), ("aurora_1", "muon_1")])
def test_groups_are_compared_in_the_order_given(
    folder: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    """Of `A B` it said B against A. With one run each it called a difference of noise better."""
    paths = [str(folder / f"logs/{name}.txt") for name in names]
    main(["report", *paths, "track_3#36", "--out", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    one, other = (name.removesuffix("_1").title() for name in names)
    wanted = [f"{one} against {other}", f"{one} against track_3#36", f"{other} against track_3#36"]
    (pairs,) = [part for part in text.split("<table>") if "new against old" in part]
    header, *rows = cells(pairs.split("</table>")[0])
    assert [row[0] for row in rows] == wanted
    assert [row[header.index("better")] for row in rows] == ["-", "yes", "yes"]
    gained = {"Aurora": "0.10000", "Muon": "-0.10000"}[one]
    assert rows[0][header.index("loss gained")] == gained
    main(["report", "track_3#36", *paths, "--out", str(tmp_path / "report.html")])
    assert f"<td>track_3#36 against {one}</td>" in (tmp_path / "report.html").read_text()


def test_the_same_logs_give_the_same_file(report: str, folder: Path) -> None:
    main(
        [
            "report",
            str(folder / "logs"),
            "--title",
            "Muon <& Aurora>",
            "--out",
            str(folder / "again.html"),
        ]
    )
    assert (folder / "again.html").read_text() == report


def test_a_run_that_counts_twice_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.txt"):
        shutil.copy(folder / "logs/muon_1.txt", tmp_path / name)
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")])
    assert capsys.readouterr().err.startswith("found the same run twice")
    assert not (tmp_path / "report.html").exists()


def test_the_published_history_has_a_report(tmp_path: Path) -> None:
    main(["report", "track_3", "--out", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert text.count("<img ") == 2 and "<h2>Runs</h2>" not in text


def test_a_browser_shows_every_picture(report: str, folder: Path) -> None:
    """Headless, from a file; only the copy tested here has a script, which counts pictures."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here to open the report: none of {', '.join(BROWSERS)}")
    count = (
        "<script>addEventListener('load', () => { document.title = [...document.images]."
        "filter(i => i.complete && i.naturalWidth > 300).length + ' shown'; })</script>"
    )
    (folder / "copy.html").write_text(report.replace("</body>", f"{count}</body>"))
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}/user",
            "--virtual-time-budget=5000",
            "--dump-dom",
            (folder / "copy.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "<title>4 shown</title>" in done.stdout, done.stderr[-2000:]
    assert "Statistics</h2>" in done.stdout
