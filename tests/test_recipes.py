"""optimizers/recipes.py: each published stack against a reference in float64, from its formulas.

The reference knows nothing of techniques, slots or stacks: it steps one matrix after another, with
numpy-like loops over named weights, and exact polar factors by the SVD.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import Tensor

import train_gpt
from optimizers import RECIPES, Nesterov
from optimizers.soap import Soap
from records.log import parse_log

STEPS, WORDS = 50, ["--set", "model.layers=2", "--set", "model.width=24", "--seed", "3"]
HIDDEN = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc", "mlp.proj")


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """Return the same gradient in every process: noise around a drift, so that momenta matter."""
    seed = 1000 * step + sum(map(ord, name)) % 997
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drift = torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64
    )
    return drift + noise


# ---- the reference ----------------------------------------------------------------------------


def ramped(step: int, *points: tuple[float, float]) -> float:
    """Linear between points (step, value), constant outside."""
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if step <= a:
            return low
        if step <= b:
            return low + (high - low) * (step - a) / (b - a)
    return points[-1][1]


def s4(X: Tensor) -> Tensor:
    return torch.linalg.svdvals(X).pow(4).sum().sqrt().sqrt()


def exact(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def aurora(X: Tensor, rounds: int, beta: float) -> Tensor:
    """Aurora of a tall X by its definition; the clamp of 64 is out of reach here."""
    m, n = X.shape
    d = 1 / X.norm(dim=1)
    for _ in range(rounds - 1):
        Y = exact(d[:, None] * X)
        d = d * (n / m / Y.square().sum(1)) ** beta
    return exact(d[:, None] * X)


def power_norm(X: Tensor) -> Tensor:
    v = torch.ones(X.size(1), dtype=X.dtype)
    for _ in range(5):
        v = X.T @ (X @ v)
        v = v / v.norm()
    return (X @ v).norm()


class Matrix:
    """One hidden matrix of an entry, stepped by the order that the entry's text gives."""

    def __init__(self, entry: int, name: str, W: Tensor) -> None:
        self.entry, self.name, self.W, self.m = entry, name, W.double(), 0.0
        r, c = W.shape
        zeros = [torch.zeros(n, n, dtype=torch.float64) for n in (r, r, c, c)]
        self.A, self.QA, self.B, self.QB = zeros
        self.V = torch.zeros(r, c, dtype=torch.float64)

    @property
    def soap(self) -> str:
        if hasattr(self, "kind"):
            return self.kind
        kind = self.name.split(".", 2)[-1]
        if self.entry >= 44:
            return "gated" if kind.startswith("attn.proj") else "full"
        if self.entry in (12, 17, 36) or kind.startswith(("attn.q", "attn.k", "attn.proj")):
            return "off"
        return "floored" if kind.startswith("attn.v") else "full"

    def in_bases(self, U: Tensor, G: Tensor, t: float) -> Tensor:
        P = self.QA.T @ U @ self.QB
        self.V = 0.9 * self.V + 0.1 * P**2
        root = self.V.clamp_min(1e-16).sqrt()
        if self.soap == "floored":
            root = root.maximum(0.55 * self.V.mean().sqrt())
        S = self.QA @ (P / root) @ self.QB.T
        if self.soap == "floored":
            S = 0.95 * S + 0.05 * U
        S = S * s4(U) / s4(S)
        if self.soap == "gated":
            cos = lambda X, Y: (X * Y).sum() / X.norm() / Y.norm()  # noqa: E731
            a = ((cos(S, U) - 0.2) / 0.8).clamp(0, 1)
            b = (cos(S, G) / cos(U, G).clamp_min(1e-8)).clamp(0, 1)
            floor = ramped(t, (1375, 0.45), (1625, 0.0))
            mixed = U + (a * b).clamp(floor, 0.85 if t < 1625 else 1.0) * (S - U)
            S = mixed * s4(U) / s4(mixed)
        return S

    def refresh(self, G: Tensor, step: int) -> None:
        self.A, self.B = 0.9 * self.A + 0.1 * G @ G.T, 0.9 * self.B + 0.1 * G.T @ G
        if step % (10 if self.entry < 44 else 1):
            return
        for which, X in (("QA", self.A), ("QB", self.B)):
            Q = getattr(self, which)
            if step == 0:
                setattr(self, which, torch.linalg.eigh(X)[1].flip(1))
                continue
            order = (Q.T @ X @ Q).diagonal().argsort(descending=True)
            setattr(self, which, torch.linalg.qr(X @ Q[:, order])[0])
            self.V = self.V[order] if which == "QA" else self.V[:, order]

    def step(self, G: Tensor, step: int, at: dict) -> None:
        entry, W, lr, mu = self.entry, self.W, at["lr"], at["mu"]
        self.m = mu * self.m + (1 - mu) * G
        U = (1 - mu) * G + mu * self.m
        if self.soap != "off":
            S = self.in_bases(U, G, at["t"]) if step else U
            self.refresh(G, step)
            U = S
        even = "mlp" in self.name and entry < 44 and entry not in (12, 36)
        even = even and W.size(0) != W.size(1)  # square ones have no freedom
        if even and entry >= 30:
            even = "mlp.proj" in self.name
        how = (3, 0.25) if entry >= 30 else (2, 0.5)
        wide = W.size(0) < W.size(1)
        X = (aurora(U.T, *how).T if wide else aurora(U, *how)) if even else exact(U)
        if entry == 17:
            Y = X - 0.2 * U / power_norm(U)
            X = Y * X.norm() / Y.norm()
        elif entry in (30, 34, 38, 40, 42):
            Y = X - at["contra"] * U / s4(U)
            X = Y * s4(X) / s4(Y)
        U = X * max(1, W.size(0) / W.size(1)) ** 0.5
        if entry >= 30 and entry != 36:
            a = (U * W).sum() / W.norm() ** 2 if W.any() else 0.0
            U = U - (1 - at["brake"]) * a * W if a < 0 else U
        if entry == 46:
            scale = (0.3825 * W.norm(dim=1) / U.norm(dim=1)).clamp_min(1)
            U = U * scale[:, None]
        elif entry not in (12, 36):
            U = U * max(1, at["tau"] * W.norm() / U.norm())
        if entry in (12, 36):
            self.W = (1 - lr * (0.025 if entry == 12 else 0.05)) * W - lr * U
        elif entry == 17:
            self.W = W - lr * U
        else:
            size = W.norm().clamp_min(1e-8)
            R, mask = size - lr * (U * W).sum() / size, U * W > 0
            self.W = W - lr * U
            self.W = self.W * R / self.W.norm()
            if entry == 46:
                self.W = torch.where(mask, self.W * (1 - 0.025 * lr), self.W)


def values_at(entry: int, step: int) -> dict:
    """Return an entry's hyperparameters, its steps stretched over STEPS, from its table."""
    T, ends = {
        12: (3350, 0), 36: (3250, 0), 17: (3200, 0), 30: (3020, 3050), 34: (3020, 3050),
        38: (2900, 3020), 40: (2900, 2980), 42: (2900, 2980),
    }.get(entry, (2900, 2900))  # fmt: skip
    t = step * T / STEPS
    if entry in (12, 36, 17):
        lr = {12: 0.035, 36: 0.025, 17: 0.0375}[entry] * min(1, (1 - t / T) / 0.7)
        return dict(t=t, lr=lr, mu=0.95, adam=min(1, (1 - t / T) / 0.7), tau=0.35)
    cool = lambda before: min(1, max(0, (ends - t) / before) ** 1.2)  # noqa: E731
    fall = 100 if entry < 44 else 200
    end = 2750 if entry == 38 else 2500
    return dict(
        t=t,
        lr=0.0375 * cool(2386.4),
        adam=cool(1413),
        mu=ramped(t, (0, 0.85), (300, 0.95), (T - fall, 0.95), (T, 0.85)),
        contra=0.2 * max(0, 1 - t / end),
        brake=ramped(t, (2400, 0.5), (2900, 0.4)) if entry == 38 else 0.5,
        tau=ramped(t, (2400, 0.3825), (2800, 0.4)) if entry == 38 else 0.3825,
    )


def reference(entry: int, weights: dict[str, Tensor]) -> tuple[dict, dict]:
    """Return all weights after STEPS, and those that a validation sees then."""
    matrices = {name: Matrix(entry, name, W) for name, W in weights.items() if name[9:-7] in HIDDEN}
    first = {12: (0.3, 1 / 320, 0.01), 36: (0.7, 0.004, 0.015)}.get(entry, (0.3, 1 / 320, 0.01))
    b2, wd = (0.99 if entry >= 30 and entry != 36 else 0.95), (0.001 if entry == 36 else 0.0)
    rest = {name: W.double() for name, W in weights.items() if name not in matrices}
    moments = {name: [torch.zeros_like(W), torch.zeros_like(W)] for name, W in rest.items()}
    drift = {name: torch.zeros_like(W.double()) for name, W in weights.items()}
    history, average, kept = [], None, None
    for step in range(STEPS):
        now = {name: m.W.clone() for name, m in matrices.items()} | {
            name: W.clone() for name, W in rest.items()
        }
        if entry in (40, 42, 44, 45, 46) and STEPS * 300 // 2900 <= step < STEPS * 1950 // 2900:
            beta = 0.3 * values_at(entry, max(step - 1, 0))["adam"]
            for name in now:
                if name in matrices:
                    matrices[name].W = now[name] + beta * drift[name]
                else:
                    rest[name] = now[name] + beta * drift[name]
        at = values_at(entry, step)
        for name, matrix in matrices.items():
            matrix.step(gradient(name, matrix.W.shape, step), step, at)
        for name, W in rest.items():
            rate = first[0 if "embed" in name else 1 if name == "head.weight" else 2] * at["adam"]
            G, (m, v) = gradient(name, W.shape, step), moments[name]
            m.mul_(0.8).add_(0.2 * G)
            v.mul_(b2).add_((1 - b2) * G**2)
            mean, square = m / (1 - 0.8 ** (step + 1)), v / (1 - b2 ** (step + 1))
            rest[name] = W * (1 - rate * wd) - rate * mean / (square.sqrt() + 1e-10)
        if entry == 34 and step + 1 >= STEPS * 2820 // 3020:
            history.append([m.W.clone() for m in matrices.values()])
            if (step + 1) % 5 == 0 and step + 1 > STEPS * 2820 // 3020:
                extrapolate(matrices, history)
        after = {name: m.W for name, m in matrices.items()} | rest
        for name in drift:
            drift[name] = 0.99 * drift[name] + 0.01 * (after[name] - now[name])
        if entry in (45, 46):
            begin = STEPS * (2000 if entry == 45 else 2400) // 2900
            share = 1 / max(1, 150 * STEPS / 2900) if step >= begin and average else 1.0
            average = average or {k: W.clone() for k, W in after.items()}
            average = {k: (1 - share) * average[k] + share * W for k, W in after.items()}
        if entry == 42 and step + 1 == STEPS * 2375 // 2900:
            kept = {name: W.clone() for name, W in after.items()}
    seen = dict(after)
    if entry in (45, 46):
        seen |= {k: 0.4 * after[k] + 0.6 * average[k] for k in after if "embed" not in k}
    if entry == 42:
        seen = {k: W - 0.075 * (W - kept[k]) for k, W in after.items()}
    return after, seen


def extrapolate(matrices: dict[str, Matrix], history: list) -> None:
    """Reduced-rank extrapolation with four iterates; unfilled ones are the initial weights'."""
    last = history[-4:]
    if len(last) < 4:
        return
    x = [torch.cat([W.flatten() for W in one]) for one in last]
    d = torch.stack([x[3] - x[2], x[2] - x[1], x[1] - x[0]])
    K = d @ d.T
    K = K + (1e-6 * K.trace() / 3 + 1e-10) * torch.eye(3, dtype=K.dtype)
    a = torch.linalg.solve(K, torch.ones(3, dtype=K.dtype))
    a = a / a.sum()
    move = -0.875 * sum(a[i:].sum() * d[i] for i in range(3))
    move = move * min(1, 0.001 * x[3].norm() / move.norm())
    parts = move.split([m.W.numel() for m in matrices.values()])
    for m, part in zip(matrices.values(), parts, strict=True):
        m.W = m.W + part.view_as(m.W)
    history[-1] = [m.W.clone() for m in matrices.values()]


# ---- ours ------------------------------------------------------------------------------------


def trained(rank: int, world: int, name: str, path: str | None = None) -> dict:
    """Train a recipe on given gradients; with a path, from the state saved there after step 13."""
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    words = ["--preset", "demo", "--recipe", name, "--steps", str(STEPS), *WORDS]
    polar = "muon" if RECIPES[name].kind == "muon" else "aurora"
    expansion = 1 if RECIPES[name].apart else 4  # SOAP on tall matrices: see below
    words += ["--set", f"{polar}.polar=exact", "--set", f"model.expansion={expansion}"]
    config = train_gpt.parse_config(words)
    model = train_gpt.build_model(config, torch.device("cpu")).double()
    opt = train_gpt.build_optimizer(model, config)
    model.initialise(3)
    train_gpt.INITIAL[config.init](model, 3)
    opt.reset()
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    saved = torch.load(path, weights_only=True) if path else None
    if saved:
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
    for step in range(13 if saved else 0, STEPS):
        if step == 13 and not saved:
            saved = dict(model={k: p.detach().clone() for k, p in model.named_parameters()})
            saved["optimizer"] = copy.deepcopy(opt.state_dict())
        opt.before_forward(step)
        for k, p in model.named_parameters():
            p.grad = gradient(k, p.shape, step).to(p.dtype) / (world if world > 1 else 1)
        opt.step(step)
    found = {k: p.detach().clone() for k, p in model.named_parameters()}
    with opt.readout():
        seen = {k: p.detach().clone() for k, p in model.named_parameters()}
    return dict(start=start, found=found, seen=seen, saved=saved)


def difference(found: dict, expected: dict, start: dict) -> float:
    """Return the largest difference of a parameter, in shares of its movement."""
    return max(
        ((found[k].double() - W).norm() / (W - start[k].double()).norm()).item()
        for k, W in expected.items()
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_does_what_its_formulas_say(name: str, capsys: pytest.CaptureFixture) -> None:
    ours = trained(0, 1, name)
    after, seen = reference(int(name.partition("#")[2]), ours["start"])
    apart = difference(ours["found"], after, ours["start"])
    apart_seen = difference(ours["seen"], seen, ours["start"])
    with capsys.disabled():
        print(f" {name}: {apart:.1e}, as validated {apart_seen:.1e}", end="")
    assert apart < 1e-5 and apart_seen < 1e-5


@pytest.mark.parametrize("name", ["track_3#34", "track_3#42", "track_3#46"])
def test_a_recipe_is_cut_and_goes_on_with_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    whole = trained(0, 1, name)
    torch.save(whole["saved"], tmp_path / "state.pt")
    ends = [trained(0, 1, name, str(tmp_path / "state.pt"))]
    for world in (2, 3):
        ends += on_ranks(world, trained, tmp_path / str(world), name, str(tmp_path / "state.pt"))
    assert len(ends) == 6
    for end in ends:
        for part in ("found", "seen"):
            expected = {k: W.double() for k, W in whole[part].items()}
            assert difference(end[part], expected, whole["start"]) < 1e-5


# ---- from the command line ----------------------------------------------------------------------


def test_a_recipe_brings_its_settings_and_flags_override_them(tiny: Callable) -> None:
    config = train_gpt.parse_config(["--recipe", "track_3#17"])
    assert (config.optimizer, config.steps, config.recipe) == ("aurora", 3200, "track_3#17")
    assert "embed.lr=0.3" in config.set and config.preset == "track3"
    config = train_gpt.parse_config(["--recipe", "track_3#44"])
    assert (config.init, config.power) == ("entry44", 1.2)
    assert config.cooldown == pytest.approx(1413 / 2900)
    words = tiny("--recipe", "track_3#46", "--steps", "4", "--log", "a.txt", "--seed", "5")
    assert train_gpt.main(words) == 0
    log = parse_log("a.txt")
    assert log.meta["config"]["recipe"] == "track_3#46" and log.meta["config"]["steps"] == 4
    groups = {g["name"]: g for g in log.optim["groups"]}
    assert (groups["attn_proj"]["soap"], groups["attn_q"]["soap"]) == ("gated", "full")
    assert groups["head"]["lr"] == pytest.approx(1 / 320)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipe", "track_3#71"], "no recipe track_3#71: did you mean track_3#17"),
        (["--recipe", "aurora"], "no recipe aurora: did you mean track_3#"),
        (
            ["--recipe", "track_3#17", "--optimizer", "muon"],
            "track_3#17 is a recipe of aurora, found optimizer muon",
        ),
    ],
)
def test_a_wrong_recipe_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert train_gpt.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_list_names_steps_losses_and_what_is_left_out(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        train_gpt.parse_config(["--recipe", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert not left.value.code and len(lines) >= len(RECIPES)
    assert "track_3#17: aurora, 3175 steps to 3.2789 as published; left out: nothing" in lines


def test_published_losses_and_steps_are_those_of_the_records() -> None:
    from records.published import track_3

    for name, recipe in RECIPES.items():
        entry = track_3()[int(name.partition("#")[2])]
        assert (recipe.claimed, recipe.loss) == (entry.steps, pytest.approx(entry.mean_loss))


def test_a_recipe_that_splits_a_group_needs_it(tiny: Callable) -> None:
    from optimizers import OPTIMIZERS, cooked

    with pytest.raises(ValueError, match="track_3#44 needs a group attn, which the model does"):
        cooked("track_3#44", OPTIMIZERS["muon"], [dict(name="fc", params=[])])


def test_the_average_momentum_falls_at_the_end() -> None:
    schedules = RECIPES["track_3#44"].optimizer.schedules
    factors = [schedules["momentum"](step, 2900) for step in (0, 150, 300, 2700, 2800)]
    assert [0.95 * x for x in factors] == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.9])
    assert math.isclose(schedules["lr"](2690, 2900) * 100, 5.4, abs_tol=0.05)


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (6, 6)])
@pytest.mark.parametrize("kind", ["full", "floored", "gated"])
def test_soap_does_what_its_formulas_say_for_any_shape(kind: str, shape: tuple[int, int]) -> None:
    """From averages of full rank on: before, the bases of a tall matrix are arbitrary in part."""
    names = dict(full="blocks.0.mlp.fc", floored="blocks.0.attn.v", gated="blocks.0.attn.proj")
    expected = Matrix(44 if kind == "gated" else 30, names[kind], torch.zeros(shape))
    soap, group = Soap(Nesterov()), dict(momentum=0.95, soap=kind, soap_every=1)
    group |= dict(gate_floor=0.45, gate_cap=0.85)
    state = soap.init(torch.zeros(1, *shape, dtype=torch.float64))
    for side, A, Q in (("left", "A", "QA"), ("right", "B", "QB")):
        X = gradient(side, torch.Size([len(getattr(expected, A))] * 2), 0)
        setattr(expected, A, X @ X.T)
        setattr(expected, Q, torch.linalg.eigh(X @ X.T)[1].flip(1))
        state[side].copy_(getattr(expected, A))
        state[f"{side}_basis"].copy_(getattr(expected, Q))
    expected.entry = 44  # a refresh in every step
    expected.kind = kind
    for step in range(1, 6):
        G = gradient("soap", torch.Size(shape), step)
        expected.m = 0.95 * expected.m + 0.05 * G
        U = 0.05 * G + 0.95 * expected.m
        S = expected.in_bases(U, G, 0.0)
        expected.refresh(G, step)
        found = soap.before(G[None], torch.zeros(1, *shape), state, group | dict(soap_age=step))
        assert (found[0] - S).norm() < 1e-9 * S.norm()
        assert (S - U).norm() > 0.01 * U.norm()
