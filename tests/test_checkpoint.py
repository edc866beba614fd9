"""--checkpoint and --eval: a run that is cut off goes on as if nothing had happened."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import on_ranks

import train_gpt
from optimizers import OPTIMIZERS, Muon, WeightAverage, ramp
from records.log import parse_log


class CutOffError(Exception):
    pass


def cut_off_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run ends, as by a power failure, when it begins this step."""
    honest = train_gpt.Trainer.step

    def step_or_die(self: train_gpt.Trainer, now: int, tokens: torch.Tensor) -> torch.Tensor:
        if now == step:
            raise CutOffError
        return honest(self, now, tokens)

    monkeypatch.setattr(train_gpt.Trainer, "step", step_or_die)


def losses(log: str) -> list[tuple[int, float]]:
    return [(point.step, point.val_loss) for point in parse_log(log).points]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_was_cut_off_ends_where_the_whole_run_ends(tiny: Callable, name: str) -> None:
    """Cut off in step 3, saved at 2: steps 3 and 4 are done again, to the last digit."""
    base = ["--optimizer", name, "--steps", "6", "--set", "attn.lr=0.01"]
    assert train_gpt.main(tiny(*base, "--log", "whole.txt")) == 0
    with pytest.MonkeyPatch.context() as patch:
        cut_off_after(3, patch)
        with pytest.raises(CutOffError):
            train_gpt.main(tiny(*base, "--log", "first.txt", "--checkpoint", "c/run.pt"))
    assert train_gpt.main(tiny(*base, "--log", "second.txt", "--checkpoint", "c/run.pt")) == 0
    assert losses("first.txt") == losses("whole.txt")[:2]
    assert losses("second.txt") == losses("whole.txt")[2:]
    run = parse_log("second.txt")
    assert run.extra["resumed"] == [{"step": 2, "checkpoint": "c/run.pt"}]
    assert run.points[0].train_time_s > parse_log("first.txt").points[-1].train_time_s
    assert [path.name for path in Path("c").iterdir()] == ["run.pt"]


def test_a_finished_checkpoint_trains_nothing_more_and_says_complete(
    tiny: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    before = Path("run.pt").read_bytes()
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "b.txt")) == 0
    assert Path("run.pt").read_bytes() == before
    assert "complete, 4 steps" in capsys.readouterr().out.splitlines()[-2]


def test_each_trial_has_its_own_checkpoint(tiny: Callable) -> None:
    flags = ["--trials", "2", "--seed", "5", "--checkpoint", "run.pt"]
    assert train_gpt.main(tiny(*flags, "--log", "a.txt")) == 0
    assert sorted(path.name for path in Path().glob("*.pt")) == ["run.seed5.pt", "run.seed6.pt"]


def test_eval_prints_the_loss_that_the_run_logged_and_writes_nothing(
    tiny: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    final = parse_log("a.txt").points[-1]
    capsys.readouterr()
    files = sorted(Path().iterdir())
    assert train_gpt.main(tiny("--eval", "run.pt", "--rows", "4")) == 0
    found = re.fullmatch(r"step:4 val_loss:(\d\.\d{5}) run.pt\n", capsys.readouterr().out)
    assert found and float(found[1]) == pytest.approx(final.val_loss, abs=2e-5)
    assert sorted(Path().iterdir()) == files


class Averaged(Muon):
    """Validates the average of the weights of the last two steps or so."""

    around, schedules = (WeightAverage(span=2, first=1, mix=0.9),), dict(momentum=ramp(0.9, 3))


def test_eval_validates_the_averaged_weights(
    tiny: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the checkpoint's own optimizer, whichever --optimizer is the default."""
    monkeypatch.setitem(OPTIMIZERS, "averaged", Averaged)
    flags = ["--optimizer", "averaged", "--steps", "6", "--checkpoint", "run.pt"]
    assert train_gpt.main(tiny(*flags, "--log", "a.txt")) == 0
    final = parse_log("a.txt").points[-1].val_loss
    capsys.readouterr()
    assert train_gpt.main(tiny("--eval", "run.pt")) == 0
    averaged = float(re.search(r"val_loss:(\S+)", capsys.readouterr().out)[1])
    assert averaged == pytest.approx(final, abs=2e-5)
    saved = torch.load("run.pt", weights_only=True)
    saved["around"] = [{"average": [p.float() for p in weights_in(saved)]}]
    torch.save(saved, "last.pt")
    assert train_gpt.main(tiny("--eval", "last.pt")) == 0
    last = float(re.search(r"val_loss:(\S+)", capsys.readouterr().out)[1])
    assert abs(last - final) > 1e-2, "the last weights have another loss"


def weights_in(saved: dict) -> list[torch.Tensor]:
    """Return the weights of a checkpoint in the order in which the optimizer has them."""
    model = train_gpt.build_model(train_gpt.Config(**saved["config"]), torch.device("cpu"))
    model.load_state_dict(saved["model"])
    config = train_gpt.replace(train_gpt.Config(**saved["config"]), optimizer="muon")
    return [p.detach() for p in train_gpt.build_optimizer(model, config).params]


def test_averages_go_on_from_a_checkpoint(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the schedule of the momentum."""
    monkeypatch.setitem(OPTIMIZERS, "averaged", Averaged)
    base = ["--optimizer", "averaged", "--steps", "6"]
    assert train_gpt.main(tiny(*base, "--log", "whole.txt")) == 0
    with pytest.MonkeyPatch.context() as patch:
        cut_off_after(3, patch)
        with pytest.raises(CutOffError):
            train_gpt.main(tiny(*base, "--log", "first.txt", "--checkpoint", "run.pt"))
    assert train_gpt.main(tiny(*base, "--log", "second.txt", "--checkpoint", "run.pt")) == 0
    assert losses("second.txt") == losses("whole.txt")[2:]


def test_eval_of_a_checkpoint_of_an_unknown_optimizer_is_one_sentence(
    tiny: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a fork, or under a name that was changed since."""
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    saved = torch.load("run.pt", weights_only=True)
    saved["config"]["optimizer"] = "lion"
    torch.save(saved, "run.pt")
    capsys.readouterr()
    assert train_gpt.main(tiny("--eval", "run.pt")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "optimizer is 'lion', expected one of adamw, muon" in said


def spoilt(kind: str) -> None:
    saved = torch.load("run.pt", weights_only=True)
    if kind == "cut":
        Path("run.pt").write_bytes(Path("run.pt").read_bytes()[:5000])
    elif kind == "text":
        Path("run.pt").write_text("no checkpoint")
    elif kind == "other":
        torch.save({"weights": 1}, "run.pt")
    elif kind == "list":
        torch.save([1, 2], "run.pt")
    elif kind == "settings":
        torch.save(saved | {"config": ["layers", 3]}, "run.pt")
    else:
        torch.save(saved | {"config": saved["config"] | {"layers": 3}}, "run.pt")


@pytest.mark.parametrize("kind", ["cut", "text", "other", "list", "settings", "layers"])
@pytest.mark.parametrize("flag", ["--eval", "--checkpoint"])
def test_a_checkpoint_that_does_not_fit_is_one_sentence(
    tiny: Callable, capsys: pytest.CaptureFixture, kind: str, flag: str
) -> None:
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    spoilt(kind)
    capsys.readouterr()
    assert train_gpt.main(tiny(flag, "run.pt", "--log", "b.txt")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run.pt" in said
    reason = "does not fit model and optimizer" if flag == "--eval" else "layers 3, now it is 2"
    assert (reason in said) == (kind == "layers")
    assert not Path("b.txt").exists()


def without(saved: dict, key: str) -> dict:
    return {name: value for name, value in saved.items() if name != key}


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda s: without(s, "matrix"), "'matrix'"),
        (lambda s: s | dict(adamw=None), "NoneType"),
        (lambda s: s | dict(matrix=s["matrix"] | dict(state={0: {}})), "has shapes {}"),
        (lambda s: s | dict(model=without(s["model"], "head.bias")), "head.bias"),
        (lambda s: s | dict(around=[{}]), "techniques around all weights"),
    ],
)
def test_a_state_that_cannot_be_loaded_is_one_sentence(
    tiny: Callable, capsys: pytest.CaptureFixture, spoil: Callable, reason: str
) -> None:
    """A technique that keeps other state than before, for example: it was a traceback."""
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    torch.save(spoil(torch.load("run.pt", weights_only=True)), "run.pt")
    capsys.readouterr()
    for flag in ("--checkpoint", "--eval"):
        assert train_gpt.main(tiny(flag, "run.pt", "--log", "b.txt")) == 2
        out, err = capsys.readouterr()
        assert err.startswith("train_gpt.py: run.pt does not fit") and err.count("\n") == 1
        assert reason in err and not Path("b.txt").exists()


def test_a_run_with_other_settings_does_not_go_on_from_it(
    tiny: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    for flags, name in (
        (["--steps", "8"], "steps 4"),
        (["--lr-scale", "2"], "lr_scale 1.0"),
        (["--fp8"], "fp8 False"),
    ):
        assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "b.txt", *flags)) == 2
        assert f"was made with {name}, now it is" in capsys.readouterr().err
    assert train_gpt.main(tiny("--eval", "missing.pt")) == 2
    assert "there is no checkpoint missing.pt" in capsys.readouterr().err


def test_what_an_older_checkpoint_does_not_say_was_as_it_is_by_default(tiny: Callable) -> None:
    """--fp8 is younger than checkpoints."""
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    saved = torch.load("run.pt", weights_only=True)
    del saved["config"]["fp8"]
    torch.save(saved, "run.pt")
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "b.txt")) == 0


YOUNGER = {"around"}, {"model", "expansion"}  # keys of a checkpoint and of its config
OLDER = {"config", "model", "seed", "step", "points", "shards", "adamw", "matrix"}


@pytest.mark.parametrize("name", ["muon", "aurora"])
def test_a_checkpoint_from_before_models_had_names_goes_on(tiny: Callable, name: str) -> None:
    """Commit 90801fc wrote these keys and no others."""
    base = ["--optimizer", name, "--steps", "6"]
    assert train_gpt.main(tiny(*base, "--log", "whole.txt")) == 0
    with pytest.MonkeyPatch.context() as patch:
        cut_off_after(3, patch)
        with pytest.raises(CutOffError):
            train_gpt.main(tiny(*base, "--log", "first.txt", "--checkpoint", "run.pt"))
    saved = torch.load("run.pt", weights_only=True)
    for key in YOUNGER[0]:
        del saved[key]
    for key in YOUNGER[1]:
        del saved["config"][key]
    assert saved.keys() == OLDER
    torch.save(saved, "run.pt")
    assert train_gpt.main(tiny(*base, "--log", "second.txt", "--checkpoint", "run.pt")) == 0
    assert losses("second.txt") == losses("whole.txt")[2:]
    torch.save(saved, "run.pt")
    assert train_gpt.main(tiny("--eval", "run.pt")) == 0


def test_another_seed_or_other_data_do_not_go_on_from_it(
    tiny: Callable, capsys: pytest.CaptureFixture, tmp_path: Path, corpus: Path
) -> None:
    """The log of seed 2 had the losses of seed 1, and nothing said so."""
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    assert train_gpt.main(tiny("--checkpoint", "run.pt", "--log", "b.txt", "--seed", "2")) == 2
    assert "run.pt was made with seed 1, now it is 2" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    for path in corpus.iterdir():
        (other / path.name.replace("000001", "000003")).write_bytes(path.read_bytes())
    flags = ["--checkpoint", "run.pt", "--log", "b.txt", "--data", str(other)]
    assert train_gpt.main(tiny(*flags)) == 2
    assert "run.pt was made with shards {" in capsys.readouterr().err


def test_a_checkpoint_that_is_a_folder_is_refused_before_the_run(
    tiny: Callable, capsys: pytest.CaptureFixture
) -> None:
    Path("folder").mkdir()
    assert train_gpt.main(tiny("--checkpoint", "folder", "--log", "b.txt")) == 2
    assert "folder is no file" in capsys.readouterr().err and not Path("b.txt").exists()


def on_rank(rank: int, size: int, args: list[str], folder: str) -> int:
    """Ranks change into the folder, then train as torchrun would have them."""
    import os

    from conftest import TINY

    os.chdir(folder)
    train_gpt.PRESETS["tiny"] = TINY
    return train_gpt.main(args)


def test_saved_by_two_ranks_goes_on_with_one_and_back(tiny: Callable, tmp_path: Path) -> None:
    """Gradients of other numbers of ranks agree up to rounding, so do the losses after them."""
    base = ["--optimizer", "aurora", "--steps", "6"]
    assert train_gpt.main(tiny(*base, "--log", "whole.txt")) == 0
    here = str(Path().resolve())
    for part, (size, stop) in enumerate(((2, 3), (1, 5), (2, None))):
        args = tiny(*base, "--log", f"part{part}.txt", "--checkpoint", "run.pt")
        with pytest.MonkeyPatch.context() as patch:
            if size == 1:
                cut_off_after(stop, patch)
                with pytest.raises(CutOffError):
                    train_gpt.main(args)
                continue
            codes = on_ranks(
                size, dying_rank if stop else on_rank, tmp_path / f"ranks{part}", args, here
            )
            assert codes == [0] * size
    whole = dict(losses("whole.txt"))
    for part, steps in enumerate(([0, 2], [4], [6])):
        found = losses(f"part{part}.txt")
        assert [step for step, _ in found] == steps
        assert all(abs(loss - whole[step]) < 2e-4 for step, loss in found)


def dying_rank(rank: int, size: int, args: list[str], folder: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        cut_off_after(3, patch)
        try:
            return on_rank(rank, size, args, folder)
        except CutOffError:
            return 0
