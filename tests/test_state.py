"""State of the optimizers: saved at any number of ranks, loaded at any other, refused when wrong.

Several ranks are gloo processes (conftest.on_ranks). All feed the same gradients with reduce=False,
so that sums are the same for any number of ranks and what differs is only who owns what.
"""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import Tensor, nn

from optimizers import OPTIMIZERS
from optimizers.slot import MatrixOptimizer

SHAPES = {"fc": [(24, 6)] * 3, "proj": [(6, 24)] * 2, "attn": [(8, 8)] * 3 + [(12, 8)]}
AXES = {"fc": 0, "proj": 1, "attn": None}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, shapes: dict = SHAPES, **how: Any) -> MatrixOptimizer:
    groups = [
        dict(
            name=group,
            neuron_axis=AXES[group],
            params=[nn.Parameter(tensor(*s, seed=i)) for i, s in enumerate(some)],
        )
        for group, some in shapes.items()
    ]
    return OPTIMIZERS[name](groups, reduce=False, **how)


def parameters(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def weights(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in parameters(opt)]


def steps(opt: MatrixOptimizer, first: int, last: int) -> None:
    """The steps [first, last); gradients depend on step and parameter alone."""
    for step in range(first, last):
        for i, p in enumerate(parameters(opt)):
            p.grad = tensor(*p.shape, seed=1000 * step + i)
        opt.step()


def same(a: Any, b: Any) -> bool:
    """Equal nests, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- any number of ranks -----------------------------------------------------------------------


def saved_and_continued(rank: int, size: int, before: str | None) -> dict[str, dict]:
    """Three steps (or a state loaded from `before`), the state, ten steps, the state again."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    found = {}
    start = torch.load(before, weights_only=True) if before else None
    for name in OPTIMIZERS:
        precise = dict(dtype=torch.float32) if "dtype" in OPTIMIZERS[name].defaults else {}
        opt = build(name, lr=0.05, **precise)
        if start is None:
            steps(opt, 0, 3)
        else:
            with torch.no_grad():
                for p, W in zip(parameters(opt), start[name]["weights"], strict=True):
                    p.copy_(W)
            opt.load_state_dict(start[name]["state"])
        found[name] = dict(weights=weights(opt), state=opt.state_dict())
        steps(opt, 3, 13)
        found[name] |= dict(end=weights(opt), end_state=opt.state_dict())
        found[name]["owned"] = sum(len(b.owned[rank]) for b in opt._buckets)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What four ranks saved, and the file of the first."""
    folder = tmp_path_factory.mktemp("saved")
    ranks = on_ranks(4, saved_and_continued, folder, None, seconds=90)
    torch.save(ranks[0], folder / "state.pt")
    return ranks, folder / "state.pt"


def test_every_rank_saves_the_same_whole_state(saved: tuple[list[dict], Path]) -> None:
    ranks, _ = saved
    for name in OPTIMIZERS:
        assert sum(rank[name]["owned"] for rank in ranks) == sum(map(len, SHAPES.values()))
        assert max(rank[name]["owned"] for rank in ranks) < sum(map(len, SHAPES.values()))
        for rank in ranks[1:]:
            for part in ("state", "end", "end_state"):
                assert same(rank[name][part], ranks[0][name][part])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
def test_a_state_of_four_ranks_continues_on_any_number(
    saved: tuple[list[dict], Path], size: int, tmp_path: Path
) -> None:
    """It is loaded bit for bit (by weights_only=True), and saved again after ten steps.

    Other ranks multiply other stacks, which a BLAS may round otherwise: by 4e-6 of the movement,
    hence 2e-5. Two exchanged states cost half of it. 0 ranks: there is no process group.
    """
    (expected, *_), path = saved
    if size:
        found = on_ranks(size, saved_and_continued, tmp_path, str(path), seconds=90)[0]
    else:
        found = saved_and_continued(0, 1, str(path))
    for name in OPTIMIZERS:
        one, other = found[name], expected[name]
        for part in ("weights", "state"):
            assert same(one[part], other[part]), (name, part)
        for W, a, b in zip(one["weights"], one["end"], other["end"], strict=True):
            assert (b - W).norm() > 0.01 and (a - b).norm() < 2e-5 * (b - W).norm(), name
        assert one["end_state"]["param_groups"] == other["end_state"]["param_groups"]
        states = (some["end_state"]["state"] for some in (one, other))
        for i, (a, b) in enumerate(zip(*(state.values() for state in states), strict=True)):
            assert a.keys() == b.keys() and a
            for key in a:
                assert (a[key] - b[key]).norm() <= 2e-5 * b[key].norm() > 0, (name, i, key)


@every
def test_without_the_state_the_next_steps_differ(name: str) -> None:
    """The test above would see a state that is lost, or whose matrices are exchanged."""
    a, b, c = (build(name, lr=0.05) for _ in range(3))
    for opt in (a, b, c):
        steps(opt, 0, 3)
    b.reset()
    state = c.state_dict()
    state["state"][0], state["state"][1] = state["state"][1], state["state"][0]
    c.load_state_dict(state)
    for opt in (a, b, c):
        steps(opt, 3, 5)
    for other in (b, c):
        assert (weights(a)[0] - weights(other)[0]).norm() > 1e-3


# ---- one process -------------------------------------------------------------------------------


@every
def test_a_state_goes_through_a_file_and_is_no_view(name: str, tmp_path: Path) -> None:
    opt = build(name)
    steps(opt, 0, 2)
    state = opt.state_dict()
    torch.save(state, tmp_path / "state.pt")
    steps(opt, 2, 4)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(loaded, state), "later steps changed the state"
    other = build(name)
    other.load_state_dict(loaded)
    assert same(other.state_dict(), state)
    steps(other, 2, 4)
    assert same(loaded, state), "steps changed what was loaded"


@every
def test_before_the_first_step_there_is_no_state_and_loading_that_is_a_reset(name: str) -> None:
    fresh, used = build(name), build(name)
    state = fresh.state_dict()
    assert state["state"] == {}
    assert [g["params"] for g in state["param_groups"]] == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    steps(used, 0, 2)
    used.load_state_dict(state)
    assert used.state_dict()["state"] == {}
    start = weights(build(name))
    with torch.no_grad():
        for p, W in zip(parameters(used), start, strict=True):
            p.copy_(W)
    for opt in (fresh, used):
        steps(opt, 0, 2)
    assert same(weights(fresh), weights(used))


def test_hyperparameters_travel_with_the_state_and_deal_anew() -> None:
    opt = build("aurora", lr=0.3, rounds=3, exponent=0.25, polar="express8", momentum=0.8)
    opt.param_groups[1]["lr"] = 0.1
    steps(opt, 0, 2)
    other = build("aurora")
    other.load_state_dict(opt.state_dict())
    for group, lr in zip(other.param_groups, (0.3, 0.1, 0.3), strict=True):
        found = [group[k] for k in ("lr", "rounds", "exponent", "polar", "momentum")]
        assert found == [lr, 3, 0.25, "express8", 0.8]
    with torch.no_grad():
        for p, W in zip(parameters(other), weights(opt), strict=True):
            p.copy_(W)
    for some in (opt, other):
        steps(some, 2, 4)
    assert same(weights(opt), weights(other))


@every
def test_torchs_schedulers_continue_after_loading(name: str) -> None:
    def schedule(opt: MatrixOptimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)

    def train(opt: MatrixOptimizer, scheduler: Any, first: int, last: int) -> list[float]:
        lrs = []
        for step in range(first, last):
            lrs.append(opt.param_groups[0]["lr"])
            steps(opt, step, step + 1)
            scheduler.step()
        return lrs

    whole, first = build(name, lr=0.1), build(name, lr=0.1)
    expected = train(whole, schedule(whole), 0, 8)
    scheduler = schedule(first)
    assert train(first, scheduler, 0, 4) == expected[:4]
    second = build(name, lr=0.7)
    with torch.no_grad():
        for p, W in zip(parameters(second), weights(first), strict=True):
            p.copy_(W)
    resumed = schedule(second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert train(second, resumed, 4, 8) == expected[4:]
    assert same(weights(second), weights(whole))


# ---- what may not come in ----------------------------------------------------------------------


def refused(opt: MatrixOptimizer, state: dict) -> str:
    """The one sentence; nothing has changed."""
    before, at = copy.deepcopy(opt.state_dict()), weights(opt)
    with pytest.raises(ValueError) as caught:
        opt.load_state_dict(state)
    assert same(opt.state_dict(), before) and same(weights(opt), at)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("stepped", [False, True])
def test_a_state_of_another_model_or_optimizer_is_refused(stepped: bool) -> None:
    def state(name: str = "muon", shapes: dict = SHAPES) -> dict:
        other = build(name, shapes)
        steps(other, 0, 1)
        return other.state_dict()

    opt = build("muon")
    steps(opt, 0, int(stepped))
    fewer = {group: some for group, some in SHAPES.items() if group != "proj"}
    assert "groups of [3, 4] parameters, expected [3, 2, 4]" in refused(opt, state(shapes=fewer))
    shorter = SHAPES | {"fc": [(24, 6)] * 2}
    assert "[2, 2, 4] parameters, expected [3, 2, 4]" in refused(opt, state(shapes=shorter))
    wider = SHAPES | {"proj": [(6, 24), (8, 24)]}
    message = refused(opt, state(shapes=wider))
    assert "parameter 4" in message and "(8, 24)" in message and "(6, 24)" in message
    for name in ("adamw", "normuon", "unormuon"):
        assert "comes from another optimizer or model" in refused(opt, state(name))
    partial = state()
    del partial["state"][2]
    assert "parameter 2 has shapes {}" in refused(opt, partial)
    for changed in (dict(lr=-1.0), dict(polar="nope")):
        bad = state()
        bad["param_groups"][2].update(changed)
        assert next(iter(changed)) in refused(opt, bad)


def test_muon_and_aurora_have_the_same_state_and_may_exchange_it() -> None:
    """Momentum is momentum; hyperparameters of the other's that have no meaning are not used."""
    for one, other in (("muon", "aurora"), ("aurora", "muon"), ("aurora", "riemannian")):
        a, b = build(one), build(other)
        steps(a, 0, 2)
        b.load_state_dict(a.state_dict())
        assert same(b.state_dict()["state"], a.state_dict()["state"])
        steps(b, 2, 3)


VALUES = [
    ("muon", dict(lr=-0.1)),
    ("muon", dict(lr=float("nan"))),
    ("muon", dict(lr="0.1")),
    ("muon", dict(weight_decay=-1.0)),
    ("muon", dict(momentum=1.0)),
    ("muon", dict(polar="nope")),
    ("normuon", dict(beta2=1.0)),
    ("adamw", dict(beta1=-0.1)),
    ("adamw", dict(eps=-1e-8)),
    ("aurora", dict(rounds=0)),
    ("aurora", dict(rounds=1.5)),
    ("aurora", dict(balance="none")),
    ("aurora", dict(neuron_axis=2)),
    ("riemannian", dict(climbs=0)),
    ("riemannian", dict(cg_steps=-1)),
    ("riemannian", dict(step_size=float("inf"))),
]


@pytest.mark.parametrize("where", ["constructor", "first group", "later group"])
@pytest.mark.parametrize("name, wrong", VALUES, ids=str)
def test_impossible_values_are_refused_by_name(name: str, wrong: dict, where: str) -> None:
    kind, ((key, value),) = OPTIMIZERS[name], wrong.items()
    a, b = (nn.Parameter(tensor(8, 4, seed=seed)) for seed in range(2))
    with pytest.raises(ValueError) as caught:
        if where == "later group":
            kind([a]).add_param_group(dict(params=[b], **wrong))
        elif where == "first group" or key == "neuron_axis":
            kind([dict(params=[a], **wrong)])
        else:
            kind([a], **wrong)
    message = str(caught.value)
    assert message.startswith(f"{kind.__name__}: {key} is {value!r}, expected ")
    assert "\n" not in message


@pytest.mark.parametrize("wrong", [dict(lr=-1.0), dict(params=[nn.Parameter(torch.ones(3))])])
def test_a_refused_later_group_leaves_the_optimizer_as_it_was(wrong: dict) -> None:
    opt = build("muon")
    q = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError):
        opt.add_param_group(dict(params=[q]) | wrong)
    steps(opt, 0, 1)
    assert len(opt.param_groups) == 3 and torch.equal(q.detach(), torch.ones(4, 4))


@every
def test_values_at_the_edge_are_taken(name: str) -> None:
    """0 for rates and momenta, 1 for counts."""
    edge = {
        key: 0.0 if isinstance(value, float) else 1
        for key, value in OPTIMIZERS[name].defaults.items()
        if isinstance(value, float | int) and key not in ("eps", "clamp")
    }
    opt = build(name, **edge)
    start = weights(opt)
    steps(opt, 0, 2)
    assert same(weights(opt), start)


# ---- under DistributedDataParallel -------------------------------------------------------------


def trained(rank: int, size: int, view: bool = False) -> dict[str, list[Tensor]]:
    """Six steps of a small MLP: with ranks under DDP, each on its part of the batch."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    found = {}
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6))
        fc, proj = model[0].weight, model[2].weight
        how = dict(dtype=torch.float32) if "dtype" in OPTIMIZERS[name].defaults else {}
        groups = [dict(params=[fc], neuron_axis=0), dict(params=[proj], neuron_axis=1)]
        opt = OPTIMIZERS[name](groups, reduce=False, lr=0.02, **how)
        ddp, how = nn.parallel.DistributedDataParallel, dict(gradient_as_bucket_view=view)
        net = ddp(model, **how) if size > 1 else model
        for step in range(6):
            x, y = tensor(32, 6, seed=step), tensor(32, 6, seed=100 + step)
            mine = slice(rank * 32 // size, (rank + 1) * 32 // size)
            net.zero_grad()
            opt.before_last_backward()  # DDP reduces: this does nothing
            nn.functional.mse_loss(net(x[mine]), y[mine]).backward()
            opt.step()
        found[name] = weights(opt)
    return found


@pytest.mark.parametrize("view", [False, True])
def test_under_ddp_two_ranks_train_as_one_process_on_the_joint_batch(
    view: bool, tmp_path: Path
) -> None:
    """DDP has averaged the gradients: reduce=False. To float32 rounding, 1e-4 of the movement.

    They may be views of its buffers (gradient_as_bucket_view): the slot only reads them.
    """
    torch.manual_seed(0)
    start = [
        p.detach()
        for p in nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6)).parameters()
        if p.ndim == 2
    ]
    alone = trained(0, 1)
    first, second = on_ranks(2, trained, tmp_path, view, seconds=90)
    for name in OPTIMIZERS:
        assert same(first[name], second[name])
        for W, a, b in zip(start, alone[name], first[name], strict=True):
            assert (a - W).norm() > 0.05 and (a - b).norm() < 1e-4 * (a - W).norm(), name


# ---- types, copies, and what autograd knows ----------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_state_of_parameters_of_any_type_goes_on_after_loading(
    name: str, dtype: torch.dtype
) -> None:
    """Of float64 parameters the state came back as float32, and the next step was an error."""

    def steps(opt: torch.optim.Optimizer, p: torch.nn.Parameter, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            p.grad = torch.randn(12, 4, generator=generator, dtype=torch.float64).to(dtype)
            opt.step()

    whole = torch.nn.Parameter(torch.ones(12, 4, dtype=dtype))
    opt = OPTIMIZERS[name]([whole])
    steps(opt, whole, range(2))
    part = torch.nn.Parameter(whole.detach().clone())
    loaded = OPTIMIZERS[name]([part])
    loaded.load_state_dict(opt.state_dict())
    for one, p in ((opt, whole), (loaded, part)):
        steps(one, p, range(2, 4))
    assert torch.equal(whole, part)


def test_bfloat16_weights_decay_too() -> None:
    """W (1 - lr wd) in bfloat16 is W again for every lr wd below 2^-9: eager, they grew."""
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 64, generator=generator).mul(0.1).to(dtype))
        opt = OPTIMIZERS["muon"]([p], lr=0.002, weight_decay=0.9)
        for _ in range(400):
            p.grad = torch.randn(64, 64, generator=generator).to(dtype)
            opt.step()
        norms.append(p.detach().float().norm().item() / 6.4)
    assert norms[0] < 0.55 and norms[1] < 0.7, norms  # rounded away: 1.01


def test_autograd_sees_that_a_step_changed_the_weights() -> None:
    p = torch.nn.Parameter(torch.eye(4))
    opt = OPTIMIZERS["muon"]([p])
    p.grad = torch.ones(4, 4)
    opt.step()
    loss = (p @ p).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_is_not_copied() -> None:
    opt = OPTIMIZERS["muon"]([torch.nn.Parameter(torch.eye(4))])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="build a new one and load"):
            copied(opt)


def built_too_early(rank: int, size: int) -> str:
    p = torch.nn.Parameter(torch.eye(4))
    opt = OPTIMIZERS["muon"]([p])
    dist.init_process_group("gloo")
    p.grad = torch.ones(4, 4)
    try:
        opt.step()
    except ValueError as error:
        return str(error)
    return "stepped"


def test_an_optimizer_that_is_older_than_its_group_says_so(tmp_path: Path) -> None:
    """Each rank took itself for the only one, and their weights drifted apart."""
    found = on_ranks(2, built_too_early, tmp_path)
    assert found == ["2 ranks, 1 when this was built: build it again"] * 2


@pytest.mark.parametrize("how", [dict(clamp=0.5), dict(dtype="bfloat16"), dict(dtype=torch.int32)])
def test_more_values_that_are_refused(how: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(how))} is .* expected"):
        OPTIMIZERS["aurora"]([torch.nn.Parameter(torch.eye(4))], **how)
    with pytest.raises(ValueError, match="takes matrices"):
        OPTIMIZERS["aurora"]([torch.nn.Parameter(torch.zeros(0, 4))])
