"""optimizers/diagnostics.py: against definitions written out in float64, and in a run's log."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import Tensor, nn

import train_gpt
from models.microbatch import Microbatches
from optimizers import OPTIMIZERS, Aurora, Diagnostics, Muon, activity
from optimizers.diagnostics import leverage
from records.log import parse_log

MATRICES = [("up", (48, 12), 0), ("down", (12, 48), 1), ("attn", (12, 12), None)]


def tensor(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], 1, generator=generator).exp()
    return rows * torch.randn(*shape, generator=generator)


class Silent(nn.Module):
    """A model without layers to watch, for tests of the matrices."""

    def neurons(self) -> dict[str, nn.Module]:
        return {}

    def hidden(self, tokens: Tensor, plain: bool = False) -> Tensor:
        raise AssertionError("there are no tokens to run it on")


def measured(kind: type, steps: int = 3, **how: object) -> tuple[list[dict], dict, dict]:
    """Diagnostics after each step, and weights before and gradients of the last, by name."""
    groups = [
        dict(name=name, neuron_axis=axis, params=[(name, nn.Parameter(tensor(*shape, seed=1)))])
        for name, shape, axis in MATRICES
    ]
    opt = kind(groups, lr=0.1, weight_decay=0.2, **how)
    diagnostics, found = Diagnostics(opt, Silent()), []
    params = {group["name"]: group["params"][0] for group in opt.param_groups}
    for step in range(1, steps + 1):
        before = {name: p.detach().clone() for name, p in params.items()}
        for i, p in enumerate(params.values()):
            p.grad = tensor(*p.shape, seed=10 * step + i)
        diagnostics.before_step()
        opt.step()
        found.append(diagnostics.measure(step, [])["matrices"])
    return found, before, params


def test_leverage_is_that_of_the_pseudo_inverse() -> None:
    """Its mean is 0.1. Where the rank is 3 of 7, rounding costs 2e-4 to 1e-3, as a BLAS rounds."""
    full = tensor(30, 7, seed=0)
    for X in (full, full * 1e-20, full[:, :3] @ tensor(3, 7, seed=1), torch.zeros(30, 7)):
        exact = (X.double() @ torch.linalg.pinv(X.double(), rtol=1e-6)).diagonal()
        assert (leverage(X) - exact).abs().max() < 2e-3


@pytest.mark.parametrize("kind", [Muon, Aurora])
def test_what_is_measured_is_what_is_defined(kind: type) -> None:
    """The momentum and the update are known from outside: gradients, and weights before, after."""
    found, before, params = measured(kind, polar="exact", dtype=torch.float32)
    assert found[-1].keys() == {"up", "down"}
    for i, (name, shape, axis) in enumerate(MATRICES[:2]):
        M = torch.zeros(shape)
        for step in (1, 2, 3):
            G = tensor(*shape, seed=10 * step + i)
            M = 0.95 * M + 0.05 * G
        X, U = 0.05 * G + 0.95 * M, before[name] * (1 - 0.1 * 0.2) - params[name].detach()
        X, U = (A.T.double() if axis else A.double() for A in (X, U))
        rho = 4 * (X @ torch.linalg.pinv(X)).diagonal()
        rows = U.square().sum(1) / U.square().sum(1).mean()
        values = found[-1][name]
        for key, exact in (("leverage", rho), ("update", rows)):
            cv = (exact.std(correction=0) / exact.mean()).item()
            assert values[key]["cv"] == pytest.approx(cv, rel=2e-3, abs=1e-3)
            assert values[key]["quantiles"][3] == pytest.approx(exact.median().item(), rel=0.1)
            shares = [(exact < t).double().mean().item() for t in (1 / 16, 0.01, 0.0025)]
            assert values[key]["below"] == pytest.approx(shares, abs=1e-3)
        assert values["orthogonality"] < 1e-3
        moved = (params[name].detach() - before[name]).norm() / before[name].norm()
        assert values["update_to_weight"] == pytest.approx(moved.item(), rel=1e-3)


def test_aurora_evens_out_what_muon_starves() -> None:
    muon, aurora = (measured(kind)[0][-1]["up"] for kind in (Muon, Aurora))
    assert muon["leverage"] == aurora["leverage"], "the momentum does not know the optimizer"
    assert muon["update"]["below"][0] > 0.05 and aurora["update"]["below"][0] == 0
    assert aurora["update"]["cv"] < muon["update"]["cv"] / 5
    assert 0.01 < muon["leverage"]["cv"] == pytest.approx(muon["update"]["cv"], rel=0.05)


def test_a_neuron_persists_only_while_it_starves_at_every_check() -> None:
    """Neuron 0 never gets a gradient, neuron 1 only at the second check."""
    p = nn.Parameter(tensor(32, 4, seed=0))
    opt = Muon([dict(params=[("W", p)], neuron_axis=0)], lr=0.1, weight_decay=0.0, momentum=0.0)
    diagnostics = Diagnostics(opt, Silent())
    for step in (10, 20, 30):
        p.grad = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        p.grad[0] = 0
        p.grad[1] *= step == 20
        diagnostics.before_step()
        opt.step()
        found = diagnostics.measure(step, [])["matrices"]["W"]["persistent"]
    assert found == {
        10: pytest.approx(1 / 32, rel=1e-3),
        20: pytest.approx(1 / 32, rel=1e-3),
        30: pytest.approx(2 / 32, rel=1e-3),
    }


def test_groups_without_names_are_told_apart() -> None:
    """Both were called None.0, and one was measured with the other's weights."""
    params = [nn.Parameter(tensor(8, 2, seed=seed)) for seed in (0, 1)]
    opt = Muon([dict(params=[p], neuron_axis=0) for p in params])
    diagnostics = Diagnostics(opt, Silent())
    for p in params:
        p.grad = tensor(8, 2, seed=2)
    diagnostics.before_step()
    opt.step()
    assert sorted(diagnostics.measure(1, [])["matrices"]) == ["0.0", "1.0"]


def test_a_first_step_from_nothing_and_no_gradient_at_all_stay_json() -> None:
    p = nn.Parameter(torch.zeros(8, 2))
    opt = Muon([dict(params=[p], neuron_axis=0, name="x")])
    diagnostics = Diagnostics(opt, Silent())
    p.grad = torch.zeros(8, 2)
    diagnostics.before_step()
    opt.step()
    measured = diagnostics.measure(1, [])["matrices"]
    found = json.loads(json.dumps(measured, allow_nan=False))
    assert found["x.0"]["update"]["cv"] is None and found["x.0"]["leverage"]["below"] == [1, 1, 1]


def on_rank(rank: int, size: int) -> list[dict]:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    return measured(Aurora, reduce=False)[0]


def test_every_rank_brings_home_what_one_process_measures(tmp_path: Path) -> None:
    alone = on_rank(0, 1)
    for found in on_ranks(2, on_rank, tmp_path):
        assert found == alone


def test_silent_neurons_are_those_that_no_token_fires() -> None:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, -1.0, 0.0, 3.0]))
        layer.weight[1, 0] = 1.5  # fires where the input has a 1 there
    x = torch.zeros(2, 5, 3)
    x[0, :2, 0] = 1
    found = activity({"layer": layer}, layer, [x[:1], x[1:]])["layer"]
    expected = dict(silent=0.25, firing=(1 + 0.2 + 1) / 4, mean_act=(1 + 0.2 * 0.5 + 3) / 4)
    assert found == pytest.approx(expected, rel=1e-3)
    assert not layer._forward_hooks


def test_neurons_are_those_of_the_model_as_its_plain_modules_compute_them() -> None:
    """Fused kernels call no module, so no hook of a layer would run."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def neurons(self) -> dict[str, nn.Module]:
            return {"fc": self.fc}

        def hidden(self, tokens: Tensor, plain: bool = False) -> Tensor:
            assert plain and not torch.is_grad_enabled()
            return self.fc(tokens)

    model, batches = Model(), [tensor(10, 3, seed=i).view(2, 5, 3) for i in range(3)]
    p = nn.Parameter(tensor(8, 2, seed=0))
    opt = Muon([dict(params=[("W", p)], neuron_axis=0)])
    diagnostics, p.grad = Diagnostics(opt, model), tensor(8, 2, seed=1)
    diagnostics.before_step()
    opt.step()
    found = diagnostics.measure(7, iter(batches))
    assert found.keys() == {"step", "seconds", "matrices", "neurons"} and found["step"] == 7
    assert found["seconds"] >= 0 and found["matrices"].keys() == {"W"}
    assert found["neurons"] == activity(model.neurons(), model.fc, batches)
    assert 0 < found["neurons"]["fc"]["firing"] < 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_logs_a_diag_line_at_each_validation_and_learns_the_same(
    tiny: Callable, name: str
) -> None:
    for log, more in (("with.txt", ["--diagnostics"]), ("without.txt", [])):
        assert train_gpt.main(tiny("--optimizer", name, "--log", log, *more)) == 0
    run, plain = parse_log("with.txt"), parse_log("without.txt")
    assert [p.val_loss for p in run.points] == [p.val_loss for p in plain.points]
    assert "diag" not in plain.extra
    assert [line["step"] for line in run.extra["diag"]] == [p.step for p in run.points if p.step]
    for line in run.extra["diag"]:
        layers = [f"blocks.{i}.mlp.{part}.weight" for i in (0, 1) for part in ("fc", "proj")]
        assert sorted(line["matrices"]) == layers
        assert sorted(line["neurons"]) == ["blocks.0.mlp.fc", "blocks.1.mlp.fc"]
        assert line["seconds"] > 0


def test_a_gradient_that_is_not_finite_is_named_once_for_a_validation(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter's gradient is spoilt in step 3; all others fail in step 4, after it."""
    honest, calls = Microbatches.backward, []

    def spoilt(self: Microbatches, *args: object) -> Tensor:
        loss = honest(self, *args)
        calls.append(None)
        if len(calls) == 5:  # the first two were the warm-up's and that of the expected time
            self.model.blocks[1].attn.k.weight.grad[2, 3] = torch.nan
        return loss

    monkeypatch.setattr(Microbatches, "backward", spoilt)
    assert train_gpt.main(tiny("--log", "bad.txt")) == 1
    run = parse_log("bad.txt")
    (line,) = run.extra["nonfinite"]
    assert line["step"] == 4 and run.status == "non-finite loss at step 4"
    assert next(iter(line["gradients"].items())) == ("blocks.1.attn.k.weight", 2)
    assert set(list(line["gradients"].values())[1:]) == {1}
