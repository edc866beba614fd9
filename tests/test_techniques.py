"""optimizers/technique.py: techniques that are pasted, composed, inherited and refused."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
import torch
import torch.distributed as dist
from conftest import ROOT, on_ranks
from torch import Tensor, nn

import train_gpt
from optimizers import (
    OPTIMIZERS,
    Adam,
    AdamW,
    Aspect,
    Balance,
    CautiousDecay,
    Decay,
    EvenRows,
    MatrixOptimizer,
    Muon,
    Nesterov,
    NorMuon,
    Polar,
    Technique,
    ramp,
)
from records.log import parse_log


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stepped(optimizer: type, steps: int = 3, shape: tuple = (12, 4), **how: Any) -> Tensor:
    """The weights of one matrix after some steps with random gradients."""
    p = nn.Parameter(tensor(*shape))
    opt = optimizer([p], **how)
    for step in range(steps):
        p.grad = tensor(*shape, seed=1 + step)
        opt.step()
    return p.detach()


def made(*techniques: Technique, **more: Any) -> type[MatrixOptimizer]:
    return type("Made", (MatrixOptimizer,), dict(techniques=techniques) | more)


# ---- pasted from the documents -----------------------------------------------------------------


@pytest.fixture
def pasted() -> type[MatrixOptimizer]:
    """The README's class, as its file in optimizers/ would have it."""
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(class Cubic\(.*?)```", readme, re.DOTALL)
    imports = re.findall(r"`(from \.\w+ import [\w, ]+)`", readme)
    assert len(imports) == 2 and "`optimizers/cubic.py`" in readme
    names: dict[str, Any] = dict(__package__="optimizers", __name__="optimizers.cubic")
    exec("\n".join(imports) + "\n\n\n" + block, names)
    return names["CubicMuon"]


def test_the_readmes_technique_works_when_pasted(pasted: type[MatrixOptimizer]) -> None:
    """The steps are those of its formula at lr 0.02, weight decay 0.05, to float32 rounding."""
    p, W = nn.Parameter(tensor(12, 4)), tensor(12, 4).double()
    opt = pasted([p])
    m = torch.zeros(12, 4, dtype=torch.float64)
    for step in range(5):
        p.grad = tensor(12, 4, seed=1 + step)
        opt.step()
        m = 0.95 * m + 0.05 * p.grad.double()
        X = 0.05 * p.grad.double() + 0.95 * m
        X = X / X.norm()
        U = (1.5 * X - 0.5 * X @ X.T @ X) * 3**0.5
        W = W * (1 - 0.02 * 0.05) - 0.02 * U
    assert (p.detach() - W).norm() < 1e-5 * (W - tensor(12, 4)).norm()


def test_a_run_with_the_readmes_optimizer_learns(
    pasted: type[MatrixOptimizer], tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "cubic", pasted)
    changed = ["--set", "cubic.lr=0.01", "--set", "fc.momentum=0.5"]
    assert train_gpt.main(tiny("--optimizer", "cubic", "--log", "log.txt", *changed)) == 0
    run = parse_log("log.txt")
    assert run.points[-1].val_loss < run.points[0].val_loss - 0.01
    groups = {g["name"]: g for g in run.optim["groups"]}
    assert groups["fc"]["optimizer"] == "cubicmuon" and groups["fc"]["lr"] == 0.01
    assert groups["fc"]["momentum"] == 0.5 and groups["proj"]["momentum"] == 0.95


def test_the_averaged_muon_of_the_docs_works_when_pasted() -> None:
    """Its techniques and its schedule; `around` and `schedules` are tried in test_whole.py."""
    page = (ROOT / "docs/optimizers.md").read_text()
    (block,) = re.findall(r"```python\n(class AveragedMuon\(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec("from optimizers import *\n" + block, names)  # noqa: S102
    kind = names["AveragedMuon"]
    assert kind.defaults == Muon.defaults and kind.around[0].span == 150
    assert kind.schedules["momentum"](150, 3000) == pytest.approx(0.95)
    assert torch.equal(stepped(kind, weight_decay=0.0), stepped(Muon, weight_decay=0.0))
    assert not torch.equal(stepped(kind, weight_decay=2.0), stepped(Muon, weight_decay=2.0))


# ---- the step ----------------------------------------------------------------------------------


def test_a_step_calls_all_before_then_all_decay_then_all_after() -> None:
    """Each technique gets what the last one returned, and W as it was before the step."""
    seen: list[tuple] = []

    class Watch(Technique):
        def __init__(self, name: str) -> None:
            self.name = name

        def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
            seen.append(("before", self.name, U.sum().item(), W.sum().item()))
            return U + 1

        def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
            seen.append(("decay", self.name, V.sum().item(), U.sum().item()))
            return V * 2

        def after(self, V: Tensor, W: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
            seen.append(("after", self.name, V.sum().item(), W.sum().item(), U.sum().item()))
            return V + 8

    p = nn.Parameter(torch.full((1, 1), 3.0))
    opt = made(Watch("a"), Watch("b"))([p], lr=0.5)
    p.grad = torch.ones(1, 1)
    opt.step()
    assert seen == [
        ("before", "a", 1, 3),
        ("before", "b", 2, 3),
        ("decay", "a", 3, 3),
        ("decay", "b", 6, 3),
        ("after", "a", 12 - 0.5 * 3, 3, 3),
        ("after", "b", 12 - 0.5 * 3 + 8, 3, 3),
    ]
    assert p.item() == 12 - 0.5 * 3 + 16


def test_a_technique_that_acts_after_the_step_can_pin_the_norm_of_each_matrix() -> None:
    class Pinned(Technique):
        def after(self, V: Tensor, W: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
            assert V.ndim == 3, "a stack"
            size = [X.norm(dim=(-2, -1), keepdim=True) for X in (V, W)]
            return V * (size[1] / size[0])

    params = [nn.Parameter(tensor(6, 4, seed=i) * (1 + i)) for i in range(3)]
    start = [p.detach().clone() for p in params]
    opt = made(Nesterov(), Pinned())(params, lr=0.5)
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = tensor(6, 4, seed=10 * step + i)
        opt.step()
    for p, W in zip(params, start, strict=True):
        assert (p - W).norm() > 0.1 and p.norm().item() == pytest.approx(W.norm().item(), rel=1e-5)


def test_techniques_see_float32_where_parameters_are_bfloat16_or_another_works_in_half() -> None:
    seen: list[torch.dtype] = []

    class Looks(Technique):
        def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
            seen.extend([U.dtype, W.dtype])
            return U

        def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
            seen.extend([V.dtype, U.dtype])
            return V

    class Coarse(Technique):
        def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
            return U.half()

    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(tensor(6, 4).to(dtype))
        p.grad = tensor(6, 4, seed=1).to(dtype)
        made(Looks(), Coarse(), Looks(), Coarse())([p]).step()
    assert len(seen) == 2 * 8 and set(seen) == {torch.float32}


def test_a_class_with_its_own_update_and_init_state_works() -> None:
    """Its techniques then act after the update only; `group` has its own hyperparameters, too."""

    class Signs(MatrixOptimizer):
        techniques, defaults = (Decay(), Aspect()), dict(lr=0.1, keep=0.5)

        def init_state(self, grad: Tensor) -> dict[str, Tensor]:
            return {"average": torch.zeros_like(grad)}

        def update(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
            return state["average"].lerp_(U, 1 - group["keep"]).sign() + W

    assert Signs.defaults == dict(lr=0.1, weight_decay=0.05, keep=0.5)
    p, m, W = nn.Parameter(tensor(12, 4)), torch.zeros(12, 4), tensor(12, 4)
    opt = Signs([p], weight_decay=0.2, keep=0.75)
    for step in range(4):
        p.grad = tensor(12, 4, seed=1 + step)
        opt.step()
        m = 0.75 * m + 0.25 * p.grad
        W = W * (1 - 0.1 * 0.2) - 0.1 * (m.sign() + W)
    assert torch.allclose(p.detach(), W, atol=1e-6)
    (saved,) = opt.state_dict()["state"].values()
    assert saved.keys() == {"average"} and torch.allclose(saved["average"], m, atol=1e-6)


# ---- defaults ----------------------------------------------------------------------------------


def test_a_class_inherits_defaults_and_overrides_those_of_its_techniques() -> None:
    class MyMuon(Muon):
        defaults = dict(lr=0.3)

    class Slower(MyMuon):
        defaults = dict(momentum=0.5)

    class Rows(MyMuon):
        techniques = Nesterov(), Polar(), EvenRows(), CautiousDecay()

    before = dict(Muon.defaults)
    assert MyMuon.defaults == before | dict(lr=0.3)
    assert Slower.defaults == before | dict(lr=0.3, momentum=0.5)
    assert Rows.defaults == before | dict(lr=0.3, beta2=0.95)
    assert (
        before
        == Muon.defaults
        == dict(lr=0.025, momentum=0.95, polar="gram6", dtype=torch.bfloat16, weight_decay=0.05)
    )
    assert torch.equal(stepped(MyMuon), stepped(Muon, lr=0.3))
    assert torch.equal(stepped(Slower), stepped(Muon, lr=0.3, momentum=0.5))

    class Short(AdamW):
        techniques = (Adam(),)

    assert AdamW.defaults["weight_decay"] == Short.defaults["weight_decay"] == 0.1
    assert "weight_decay" not in made(Adam()).defaults and made().defaults == dict(lr=0.02)


def test_choices_and_least_values_of_techniques_are_those_of_the_optimizer() -> None:
    kind = made(Nesterov(), Balance())
    assert kind.choices.keys() == {"polar", "balance"} and kind.least == {"clamp": 1.0}
    assert made(Nesterov()).choices == made(Nesterov()).least == {}
    for wrong in (dict(polar="nope"), dict(balance="none"), dict(clamp=0.5)):
        with pytest.raises(ValueError, match=f"Made: {next(iter(wrong))} is .* expected "):
            kind([nn.Parameter(tensor(6, 4))], **wrong)


def test_a_hyperparameter_of_no_technique_is_refused() -> None:
    """MN#279: a weight decay that no code read. Here that of Muon without Decay is an error."""

    class Undecayed(Muon):
        techniques = Nesterov(), Polar(), Aspect()

    p = nn.Parameter(tensor(6, 4))
    with pytest.raises(ValueError, match="Undecayed has no hyperparameter 'weight_decay'"):
        Undecayed([p], weight_decay=0.1)
    with pytest.raises(ValueError, match="has no hyperparameter 'beta2': it takes dtype, lr, mom"):
        Undecayed([p], beta2=0.9)


def test_a_schedule_of_no_hyperparameter_is_refused() -> None:
    """It would be followed by nobody, and the run would be another one than its code says."""
    with pytest.raises(ValueError, match="Misspelt has no hyperparameter 'momentun': it takes"):

        class Misspelt(Muon):
            schedules = dict(momentun=ramp(0.9, 10))


def test_two_techniques_that_share_the_name_of_a_state_are_refused() -> None:
    """Both would write into one tensor."""
    p = nn.Parameter(tensor(6, 4))
    p.grad, opt = tensor(6, 4, seed=1), made(Nesterov(), Adam())([p])
    with pytest.raises(AssertionError, match="two techniques have a state .*momentum"):
        opt.step()
    assert torch.equal(p.detach(), tensor(6, 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_techniques_hold_nothing_so_that_two_optimizers_may_share_them(name: str) -> None:
    """Both optimizers of a class have the same technique objects; state is in the slot."""
    alone = stepped(OPTIMIZERS[name])
    p = nn.Parameter(tensor(12, 4))
    opt = OPTIMIZERS[name]([p])
    for step in range(3):
        stepped(OPTIMIZERS[name], shape=(4, 12))
        p.grad = tensor(12, 4, seed=1 + step)
        opt.step()
    assert torch.equal(p.detach(), alone)
    assert all(not vars(technique) for technique in OPTIMIZERS[name].techniques)


def test_normuon_is_muon_with_one_more_technique() -> None:
    kinds = [type(t) for t in NorMuon.techniques]
    assert [kind for kind in kinds if kind is not EvenRows] == [type(t) for t in Muon.techniques]
    assert not torch.equal(stepped(NorMuon), stepped(Muon))


# ---- cautious decay ----------------------------------------------------------------------------

CautiousMuon = made(Nesterov(), Polar(), Aspect(), CautiousDecay())
Elementwise = made(Nesterov(), CautiousDecay())  # rounds the same in stacks of any size


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (6, 6)], ids=str)
def test_cautious_decay_is_that_of_an_independent_loop(shape: tuple[int, int]) -> None:
    """W <- W (1 - lr wd) where U W > 0; twenty float64 steps of a Muon, written in numpy."""
    weight, grads, lrs = references.problem(shape, steps=20)
    p, W, plain = nn.Parameter(torch.from_numpy(weight.copy())), weight.copy(), weight.copy()
    how = dict(weight_decay=0.5, polar="exact", dtype=torch.float64)
    opt, shares = CautiousMuon([p], **how), []
    for lr, grad, X in zip(lrs, grads, references.momenta(grads, 0.95), strict=True):
        U = references.polar(X) * max(1, shape[0] / shape[1]) ** 0.5
        shrinks = np.sign(U) * np.sign(W) > 0
        W = np.where(shrinks, W - lr * 0.5 * W, W) - lr * U
        plain = plain - lr * 0.5 * plain - lr * U
        shares.append(shrinks.mean())
        opt.param_groups[0]["lr"], p.grad = lr, torch.from_numpy(grad)
        opt.step()
    moved = np.linalg.norm(W - weight)
    assert np.linalg.norm(p.detach().numpy() - W) < 1e-12 * moved
    assert np.linalg.norm(plain - W) > 0.05 * moved and 0.1 < np.mean(shares) < 0.9


def cut(rank: int, size: int, path: str | None) -> dict[str, Any]:
    """Ten steps of five matrices, saved after four; or the last six, loaded from a file."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    saved = torch.load(path, weights_only=True) if path else None
    params = [nn.Parameter(tensor(6, 4, seed=i)) for i in range(5)]
    opt = Elementwise(params, lr=0.1, weight_decay=0.5, reduce=False)
    if saved:
        with torch.no_grad():
            for p, W in zip(params, saved["weights"], strict=True):
                p.copy_(W)
        opt.load_state_dict(saved["state"])
    for step in range(4 if saved else 0, 10):
        if step == 4:
            saved = dict(weights=[p.detach().clone() for p in params], state=opt.state_dict())
        for i, p in enumerate(params):
            p.grad = tensor(6, 4, seed=100 * step + i)
        opt.step()
    return saved | dict(end=[p.detach().clone() for p in params])


def test_a_run_with_cautious_decay_is_cut_and_goes_on_with_one_to_three_ranks(
    tmp_path: Path,
) -> None:
    """Saved by two ranks, bit for bit: it has no state of its own, but it reads W and U."""
    whole = cut(0, 1, None)
    two = on_ranks(2, cut, tmp_path / "two", None)
    torch.save(two[0], tmp_path / "state.pt")
    path = str(tmp_path / "state.pt")
    ends = [*two, cut(0, 1, path), *on_ranks(3, cut, tmp_path / "three", path)]
    assert len(ends) == 6
    for found in ends:
        for W, a, b in zip(two[0]["weights"], found["end"], whole["end"], strict=True):
            assert torch.equal(a, b) and (a - W).norm() > 0.1


# ---- schedules ---------------------------------------------------------------------------------


def test_a_ramp_rises_from_its_start_to_one_and_stays() -> None:
    factor = ramp(0.9, 10)
    assert [factor(step, 40) for step in (0, 5, 10, 39)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert factor(10, 40) == factor(39, 40) == 1.0
    assert ramp(0.0, 4)(1, 2) == 0.25


# ---- sides and signs -----------------------------------------------------------------------------


def test_rows_or_the_longer_side_are_evened_out_as_chosen() -> None:
    """By default rows, as in the paper; speedruns and nanochat even out the longer side."""

    class LongNorMuon(MatrixOptimizer):
        techniques = (Nesterov(), Polar(), EvenRows(longer_side=True), Aspect(), Decay())

    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 40, generator=generator) * torch.logspace(-2, 2, 40)
    for turned in (False, True):
        spreads, sizes = {}, {}
        for kind in (OPTIMIZERS["normuon"], LongNorMuon):
            p = torch.nn.Parameter(torch.zeros(40, 8) if turned else torch.zeros(8, 40))
            opt = kind([p], lr=1.0, weight_decay=0.0, dtype=torch.float32)
            p.grad = grad.T.clone() if turned else grad.clone()
            opt.step()
            lengths = p.detach().norm(dim=1 if turned else 0)  # along the longer side
            spreads[kind.__name__] = (lengths.std() / lengths.mean()).item()
            sizes[kind.__name__] = opt.state[p]["row_square"].shape
        if turned:
            assert spreads["NorMuon"] == spreads["LongNorMuon"] < 1e-3
            assert sizes["NorMuon"] == sizes["LongNorMuon"] == (40, 1)
        else:
            assert spreads["LongNorMuon"] < 1e-3 < 0.3 < spreads["NorMuon"]
            assert sizes["NorMuon"] == (8, 1) and sizes["LongNorMuon"] == (1, 40)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_on_a_column_riemannian_aurora_takes_the_sign(seed: int, turned: bool) -> None:
    """Both constraints leave only signs there: climbing from the polar factor ended uphill in some
    cases. Zeros stay."""
    g = torch.randn(30, 1, generator=torch.Generator().manual_seed(seed)).exp()
    g *= torch.randn(30, 1, generator=torch.Generator().manual_seed(100 + seed)).sign()
    g[3] = 0
    p = torch.nn.Parameter(torch.zeros(1, 30) if turned else torch.zeros(30, 1))
    p.grad = g.T.clone() if turned else g
    how = dict(lr=1.0, weight_decay=0.0, dtype=torch.float32)
    OPTIMIZERS["riemannian"]([dict(params=[p], neuron_axis=int(turned))], **how).step()
    expected = -g.sign() if not turned else -g.T.sign() / 30**0.5
    assert torch.allclose(p.detach(), expected, atol=1e-6)
