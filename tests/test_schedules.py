"""optimizers/schedules.py, clipping and measured norms: what --set schedule.* does to a run."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from test_whole import Descent, Net, build, groups_named, same, set_gradients, steps_by_hand, values

import train_gpt
from optimizers import Muon, planned, trapezoid
from records.log import parse_log

# ---- the learning rate ---------------------------------------------------------------------------


def test_the_default_schedule_is_that_of_the_records_to_the_last_bit() -> None:
    for step in range(3250):
        assert trapezoid()(step, 3250) == min(1.0, (1 - step / 3250) / 0.7)


def test_a_warm_up_rises_to_one_and_no_step_has_a_rate_of_zero() -> None:
    factor = trapezoid(warmup=4, cooldown=0.5)
    assert [factor(step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factor(75, 100) == pytest.approx(0.5) and factor(100, 100) == 0


def test_warm_up_and_cooldown_that_overlap_multiply() -> None:
    factor = trapezoid(warmup=100, cooldown=1.0)
    assert factor(49, 100) == pytest.approx(0.5 * 0.51)


@pytest.mark.parametrize(
    "how, middle",
    [
        (dict(), 0.5),
        (dict(power=2.0), 0.25),
        (dict(shape="cosine"), 0.5),
        (dict(shape="cosine", power=0.5), math.sqrt(0.5)),
        (dict(floor=0.1), 0.55),
    ],
)
def test_a_fall_has_its_shape_and_ends_at_its_floor(how: dict, middle: float) -> None:
    factor = trapezoid(cooldown=0.4, **how)
    assert factor(59, 100) == 1 and factor(80, 100) == pytest.approx(middle)
    assert factor(100, 100) == pytest.approx(how.get("floor", 0))
    falling = [factor(step, 100) for step in range(60, 101)]
    assert falling == sorted(falling, reverse=True)


def test_a_cosine_falls_slowly_at_both_ends() -> None:
    factor = trapezoid(cooldown=1.0, shape="cosine")
    assert factor(25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_without_cooldown_the_rate_stays() -> None:
    assert {trapezoid(cooldown=0.0)(step, 10) for step in range(11)} == {1.0}


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(warmup=-1), "schedule.warmup is -1, expected 0 to"),
        (dict(cooldown=1.5), "schedule.cooldown is 1.5, expected 0 to 1"),
        (dict(floor=2.0), "schedule.floor is 2.0"),
        (dict(power=0.0), "schedule.power is 0.0, expected more than 0"),
        (dict(shape="round"), "schedule.shape is 'round', expected one of linear, cosine"),
        (dict(floor=math.nan), "schedule.floor is nan"),
    ],
)
def test_a_foolish_schedule_is_one_sentence(how: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trapezoid(**how)


def test_a_plan_has_only_what_it_was_asked_for() -> None:
    plan = planned(100)
    assert plan["schedules"].keys() == {"lr"} and not plan["around"] and plan["clip"] == 0
    plan = planned(100, momentum_steps=10, momentum_start=0.5, average=8.0, average_from=0.9)
    assert plan["schedules"]["momentum"](5, 100) == 0.75
    (average,) = plan["around"]
    assert (average.span, average.first) == (8.0, 90)


# ---- clipping and norms --------------------------------------------------------------------------


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def test_the_gradients_of_a_clipped_step_have_the_norm_that_was_asked_for() -> None:
    clipped, by_hand, plain = (build(Net(), clip=clip) for clip in (0.5, 0.0, 0.0))
    for opt in (clipped, by_hand, plain):
        set_gradients(opt, 0)
    factor = 0.5 / norm([p.grad for p in by_hand.params])
    assert factor < 0.1
    for p in by_hand.params:
        p.grad *= factor
    for opt in (clipped, by_hand, plain):
        opt.step(0)
    for a, b, c in zip(values(clipped), values(by_hand), values(plain), strict=True):
        assert (a - b).norm() < 1e-6 * b.norm() and not torch.equal(a, c)


def test_a_gradient_below_the_bound_is_not_changed() -> None:
    clipped, plain = build(Net(), clip=1e6), build(Net())
    for opt in (clipped, plain):
        steps_by_hand(opt, 0, 3)
    assert same(values(clipped), values(plain))


def test_a_gradient_of_zero_is_clipped_to_zero() -> None:
    opt = build(Net(), clip=1.0)
    for p in opt.params:
        p.grad = torch.zeros_like(p)
    opt.step(0)
    assert all(p.isfinite().all() for p in opt.params)


def test_norms_are_those_of_the_mean_loss_and_the_movement() -> None:
    opt, scale = build(Net(), clip=0.5, loss_scale=64.0), 64.0
    set_gradients(opt, 0)
    grads = {p: p.grad.clone() for p in opt.params}
    before = values(opt)
    opt.step(0, measure=True)
    changes = [a - b for a, b in zip(values(opt), before, strict=True)]
    moved = dict(zip(opt.params, changes, strict=True))
    measured = opt.measured()
    assert list(measured["rates"]) == [group["name"] for group in opt.groups]
    for i, group in enumerate(opt.groups):
        assert measured["norms"][0, i].item() == pytest.approx(
            norm([grads[p] for p in group["params"]]) / scale, rel=1e-5
        )
        assert measured["norms"][1, i].item() == pytest.approx(
            norm([moved[p] for p in group["params"]]), rel=1e-4
        )


def test_measuring_changes_no_step() -> None:
    plain, measured = build(Net(), Muon), build(Net(), Muon)
    for step in range(3):
        for opt in (plain, measured):
            set_gradients(opt, step)
        plain.step(step)
        measured.step(step, measure=True)
    assert same(values(plain), values(measured))


def clipped_on_ranks(rank: int, world: int) -> list:
    """Return weights after three steps and all norms; rank 0 has the gradients."""
    if world > 1:
        dist.init_process_group("gloo")
    opt, norms = build(Net(), Descent, clip=0.5), []
    for step in range(3):
        set_gradients(opt, step, rank)
        opt.step(step, measure=True)
        norms.append(opt.measured()["norms"].tolist())
    return [[p.tolist() for p in values(opt)], norms]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_clip_and_measure_as_one_process_does(world: int, tmp_path: Path) -> None:
    expected = clipped_on_ranks(0, 1)
    for found in on_ranks(world, clipped_on_ranks, tmp_path):
        for a, b in zip(found, expected, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [-1.0, math.inf, math.nan])
def test_a_foolish_bound_is_one_sentence(clip: float) -> None:
    with pytest.raises(ValueError, match="clip is .*, expected a norm above 0, or 0 for none"):
        build(Net(), clip=clip)


# ---- from the command line -----------------------------------------------------------------------


def test_set_changes_the_schedule_of_a_run(tiny: Callable) -> None:
    flags = ["schedule.warmup=2", "schedule.shape=cosine", "schedule.floor=0.5"]
    flags = [word for flag in flags for word in ("--set", flag)]
    assert train_gpt.main(tiny("--log", "a.txt", "--log-every", "1", *flags)) == 0
    log = parse_log("a.txt")
    lines = log.extra["train"]
    expected = trapezoid(warmup=2, shape="cosine", floor=0.5)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["lr"]["fc"] == pytest.approx(0.025 * expected(line["step"] - 1, 4), rel=1e-5)
    assert (log.meta["config"]["warmup"], log.meta["config"]["set"]) == (2, [])


def test_an_average_from_the_command_line_is_what_is_validated(tiny: Callable) -> None:
    assert train_gpt.main(tiny("--log", "a.txt")) == 0
    flags = ["--set", "schedule.average=3", "--checkpoint", "run.pt"]
    assert train_gpt.main(tiny("--log", "b.txt", *flags)) == 0
    plain, averaged = parse_log("a.txt").points, parse_log("b.txt").points
    assert averaged[0].val_loss == plain[0].val_loss
    assert averaged[-1].val_loss != plain[-1].val_loss
    assert torch.load("run.pt", weights_only=True)["around"][0]["average"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--set", "schedule.warm=1"], "--set schedule.warm=1: names of schedule: warmup, "),
        (["--set", "schedule.warmup=ten"], "--set schedule.warmup=ten: found None, expected"),
        (["--set", "schedule.shape=round"], "schedule.shape is 'round'"),
        (["--set", "schedule.clip=-1"], "clip is -1.0"),
        (["--set", "schedule.average=0.5"], "span 0.5"),
        (
            ["--set", "schedule.momentum_steps=2", "--set", "schedule.momentum_start=2.0"],
            "ramp from 2.0",
        ),
        (
            ["--set", "schedule.momentum_steps=2", "--optimizer", "adamw"],
            "adamw has no momentum",
        ),
    ],
)
def test_a_foolish_setting_is_one_sentence(
    tiny: Callable, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    assert train_gpt.main(tiny(*words)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_resumed_run_keeps_its_schedule(tiny: Callable, capsys: pytest.CaptureFixture) -> None:
    assert train_gpt.main(tiny("--log", "a.txt", "--checkpoint", "run.pt")) == 0
    capsys.readouterr()
    flags = ["--set", "schedule.warmup=2", "--checkpoint", "run.pt"]
    assert train_gpt.main(tiny("--log", "b.txt", *flags)) == 2
    assert "run.pt was made with warmup 0, now it is 2" in capsys.readouterr().err


def test_a_ramp_of_the_momentum_reaches_the_matrices(tiny: Callable) -> None:
    config = train_gpt.parse_config(tiny("--set", "schedule.momentum_steps=2"))
    opt = train_gpt.build_optimizer(train_gpt.build_model(config, torch.device("cpu")), config)
    opt._follow_schedules(1)
    assert groups_named(opt)["fc"]["momentum"] == pytest.approx(0.95 * 0.95)
