"""The published tables against themselves: what is recomputed here agrees with their own check."""

import csv

import pytest

from records.published import PUBLISHED, entry, track_3
from records.stats import pairwise, precision, summary


def rows(table: str) -> list[dict[str, str]]:
    with (PUBLISHED / f"track_3_{table}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_all_46_entries_have_runs() -> None:
    entries = track_3()
    assert list(entries) == list(range(1, 47))
    assert sum(len(one.runs) for one in entries.values()) == sum(
        row["role"] == "evidence" for row in rows("runs")
    )
    assert all(one.runs and len(one.losses) == len(one.runs) for one in entries.values())


def test_every_mean_sd_and_statistic_recomputes() -> None:
    for row in rows("verification"):
        one = track_3()[int(row["entry"])]
        found, official = summary(one.losses), precision(one.losses)
        assert found.n == int(row["recomputed_n"])
        assert found.mean == pytest.approx(float(row["recomputed_mean"]), abs=6e-7)
        assert official.statistic == pytest.approx(float(row["score"]), abs=6e-6)
        assert official.passes == (row["pass"] == "1"), row["entry"]
        if row["sd"]:
            assert found.sd == pytest.approx(float(row["sd"]), abs=6e-6)


def test_the_crossings_recompute() -> None:
    """The scored loss of entry 46 is val_ema_loss; all others cross on val_loss."""
    runs = {
        (number, f"{run.path}", run.trial): run
        for number, one in track_3().items()
        for run in one.runs
    }
    files = {(row["entry"], row["run"]): row for row in rows("runs") if row["role"] == "evidence"}
    for row in rows("crossings"):
        if (key := (row["entry"], row["run"])) in files:
            run = runs[int(row["entry"]), files[key]["file"], int(files[key]["trial"])]
            crossing = run.crossing(3.28)
            expected = float(row["cross_step"] or "nan")
            found = float("nan") if crossing is None else crossing.exact_step
            assert found == pytest.approx(expected, abs=0.06, nan_ok=True), key


def test_the_current_record_is_scored_on_its_ema_loss() -> None:
    """Its val_loss at 2690 averages 3.28243, above the target."""
    one = entry("track_3#46")
    assert {run.metric for run in one.runs} == {"val_ema_loss"}
    assert summary(one.losses).mean == pytest.approx(3.278329, abs=1e-6)


def test_entry_41_has_one_log_and_20_losses_in_a_readme() -> None:
    one = entry("track_3#41")
    assert (one.n, len(one.runs), len(one.readme_losses)) == (20, 1, 20)
    assert summary(one.readme_losses).mean == pytest.approx(one.mean_loss, abs=6e-5)


def test_pairwise_examples_of_the_rules_from_the_runs_themselves() -> None:
    for new, old, statistic in ((12, 6, 0.00674), (34, 30, 0.00125)):
        a, b = entry(f"track_3#{old}"), entry(f"track_3#{new}")
        found = pairwise(a.losses, a.steps, b.losses, b.steps)
        assert found.statistic == pytest.approx(statistic, abs=6e-6), new


@pytest.mark.parametrize("name", ["track_3#0", "track_3#47", "track_3#x", "track_3", "track_1#1"])
def test_an_unknown_entry_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"found no entry {name}, expected track_3#1 to"):
        entry(name)
