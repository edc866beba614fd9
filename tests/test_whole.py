"""optimizers/whole.py and averages.py: schedules, techniques around all weights, AdamW's gradients.

Several ranks are gloo processes (conftest.on_ranks), and all that happens to one number of ranks
happens in one group (`scenario`).
"""

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import on_ranks
from torch import Tensor, nn

from optimizers import (
    OPTIMIZERS,
    Around,
    Aspect,
    Decay,
    MatrixOptimizer,
    ModelOptimizer,
    Muon,
    Nesterov,
    WeightAverage,
    polar,
    ramp,
)

LAYERS, STEPS, WIDTH, WORDS = 3, 3, 8, 11
ADAMW = dict(betas=(0.8, 0.95), eps=1e-8, weight_decay=0.01)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A small language model: embedding, residual MLPs with gains, and a head with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()

        def matrices(*shape: int) -> nn.ParameterList:
            made = [tensor(*shape, seed=i).to(dtype) / 4 for i in range(LAYERS)]
            return nn.ParameterList(map(nn.Parameter, made))

        self.embed = nn.Parameter(tensor(WORDS + 1, WIDTH, seed=1).to(dtype))  # one for padding
        self.head = nn.Parameter(tensor(WORDS, WIDTH, seed=2).to(dtype) / 4)
        self.gains = nn.Parameter(torch.ones(LAYERS, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(WORDS, dtype=dtype))
        self.fc, self.proj = matrices(3 * WIDTH, WIDTH), matrices(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed)
        for gain, fc, proj in zip(self.gains, self.fc, self.proj, strict=True):
            x = x + (gain * x @ fc.T).relu() @ proj.T
        return F.cross_entropy(x @ self.head.T + self.bias, targets, reduction="sum") / 96

    def groups(self) -> list[dict]:
        return [
            dict(name="embed", lr=0.03, params=[("embed", self.embed)]),
            dict(name="head", lr=0.01, params=[("head", self.head)]),
            dict(name="scalars", lr=0.02, params=[("gains", self.gains), ("bias", self.bias)]),
            dict(name="fc", neuron_axis=0, params=[*self.fc.named_parameters("fc")]),
            dict(name="proj", neuron_axis=1, params=[*self.proj.named_parameters("proj")]),
        ]


class Descent(MatrixOptimizer):
    """Momentum without matmuls: rounds the same in stacks of any size, on any CPU."""

    techniques, defaults = (Nesterov(), Aspect(), Decay()), dict(lr=0.05)


class Averaged(Descent):
    around = (WeightAverage(span=4, first=3, mix=0.625),)


def build(
    net: Net, matrix: type[MatrixOptimizer] = Descent, steps: int = 20, **how: Any
) -> ModelOptimizer:
    schedules = how.pop("schedules", {})
    return ModelOptimizer(
        net.groups(), "matrix", matrix, ADAMW, steps, schedules, dtype=torch.float32, **how
    )


def set_gradients(opt: ModelOptimizer, step: int, rank: int = 0) -> None:
    """Gradients by hand: those of rank 0, as all others add exact zeros."""
    for i, p in enumerate(opt.params):
        grad = tensor(*p.shape, seed=1000 * step + i).to(p.dtype)
        p.grad = grad if rank == 0 else torch.zeros_like(grad)


def steps_by_hand(opt: ModelOptimizer, first: int, last: int, rank: int = 0) -> None:
    for step in range(first, last):
        opt.before_forward(step)
        set_gradients(opt, step, rank)
        opt.step(step)


def values(opt: ModelOptimizer) -> list[Tensor]:
    return [p.detach().clone() for p in opt.params]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def groups_named(opt: ModelOptimizer) -> dict[str, dict]:
    return {group["name"]: group for group in opt.groups}


# ---- which parameters --------------------------------------------------------------------------


def test_a_parameter_without_or_with_two_owners_is_refused() -> None:
    """An embedding that no optimizer has keeps its first values, and one that two have moves
    twice as far; the loss shows neither."""
    net = Net()
    build(net).check_covers(net)
    net.forgotten = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="a parameter has no optimizer"):
        build(net).check_covers(net)
    twice = Net()
    groups = [*twice.groups(), dict(name="again", neuron_axis=None, params=[("head", twice.head)])]
    twice.groups = lambda: groups
    with pytest.raises(AssertionError, match="a parameter has two optimizers"):
        build(twice).check_covers(twice)
    with pytest.raises(ValueError, match="more than one parameter group"):  # twice in one of them
        groups[-1] = dict(name="again", params=[("head", twice.head)])
        build(twice)


@pytest.mark.parametrize("name", ["bias", "fc.1"])
def test_a_missing_gradient_is_named_and_nothing_moves(name: str) -> None:
    """In AdamW's part it was an AttributeError of None."""
    net = Net()
    opt, start = build(net), values(build(Net()))
    set_gradients(opt, 0)
    p = net.get_parameter(name)
    p.grad = None
    with pytest.raises(ValueError, match="has no gradient: call backward") as caught:
        opt.step(0)
    assert str(tuple(p.shape)) in str(caught.value) and same(values(opt), start)


def test_groups_are_read_back_with_their_optimizer_and_stay_the_same_after_loading() -> None:
    """AdamW replaces its groups when it loads a state: schedules went on with the old ones."""
    opt, other = (
        build(Net(), schedules=dict(lr=lambda step, steps: 1 - step / steps)) for _ in "ab"
    )
    assert [(g["optimizer"], g["name"]) for g in opt.read_back()] == [
        ("adamw", "embed"),
        ("adamw", "head"),
        ("adamw", "scalars"),
        ("descent", "fc"),
        ("descent", "proj"),
    ]
    steps_by_hand(opt, 0, 2)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        torch._foreach_copy_(other.params, values(opt))
    for one in (opt, other):
        steps_by_hand(one, 2, 5)
        lrs = {name: group["lr"] for name, group in groups_named(one).items()}
        first = dict(embed=0.03, head=0.01, scalars=0.02, fc=0.05, proj=0.05)
        assert lrs == pytest.approx({name: lr * (1 - 4 / 20) for name, lr in first.items()})
    assert same(values(opt), values(other)) and opt.read_back() == other.read_back()


# ---- schedules ---------------------------------------------------------------------------------


class Warm(Muon):
    schedules = dict(momentum=ramp(0.9, 10))


def test_the_momentum_follows_its_ramp_at_each_step() -> None:
    """What the groups hold is 0.95 times the ramp; AdamW has no momentum, and lr stays."""
    opt = build(Net(), Warm)
    for step in range(14):
        steps_by_hand(opt, step, step + 1)
        groups = groups_named(opt)
        for name in ("fc", "proj"):
            expected = 0.95 * (0.9 + 0.1 * min(1, step / 10))
            assert groups[name]["momentum"] == pytest.approx(expected, rel=1e-12)
            assert groups[name]["lr"] == Muon.defaults["lr"]
        assert not any("momentum" in groups[name] for name in ("embed", "head", "scalars"))


def test_a_ramp_equals_a_momentum_that_is_set_by_hand() -> None:
    ramped, by_hand, constant = (build(Net(), kind) for kind in (Warm, Muon, Muon))
    for step in range(14):
        for group in by_hand.matrix.param_groups:
            group["momentum"] = 0.95 * ramp(0.9, 10)(step, 20)
        for opt in (ramped, by_hand, constant):
            steps_by_hand(opt, step, step + 1)
    assert same(values(ramped), values(by_hand))
    assert not torch.equal(ramped.params[-1], constant.params[-1])


def test_a_ramp_scales_the_momentum_that_the_command_line_sets() -> None:
    opt = build(Net(), Warm, settings=["fc.momentum=0.5", "matrix.weight_decay=0.0"])
    for step, factor in ((0, 0.9), (5, 0.95), (10, 1.0), (19, 1.0)):
        steps_by_hand(opt, step, step + 1)
        groups = groups_named(opt)
        assert groups["fc"]["momentum"] == pytest.approx(0.5 * factor)
        assert groups["proj"]["momentum"] == pytest.approx(0.95 * factor)


def test_an_optimizers_schedule_replaces_that_of_the_run_for_its_matrices() -> None:
    class Constant(Descent):
        schedules = dict(lr=lambda step, steps: 1.0)

    falls = dict(lr=lambda step, steps: 1 - step / steps)
    opt, plain = (build(Net(), kind, schedules=falls, lr_scale=2.0) for kind in (Constant, Descent))
    for one in (opt, plain):
        steps_by_hand(one, 10, 11)
        assert groups_named(one)["embed"]["lr"] == pytest.approx(0.03)
    assert groups_named(opt)["fc"]["lr"] == pytest.approx(0.1)
    assert groups_named(plain)["fc"]["lr"] == pytest.approx(0.05)


def test_a_schedule_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shapes, two graphs, and a new momentum in each of twelve steps recompiles nothing."""
    graphs, compile = [], torch.compile

    class WarmDescent(Descent):
        schedules = dict(momentum=ramp(0.9, 10))

    def count(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend=count, **how))
    torch._dynamo.reset()
    plain, opt = (build(Net(), WarmDescent, compile=flag) for flag in (False, True))
    momenta = set()
    for step in range(12):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            steps_by_hand(opt, step, step + 1)
        steps_by_hand(plain, step, step + 1)
        momenta.add(opt.matrix.param_groups[0]["momentum"])
        assert len(graphs) == 2
    assert len(momenta) == 11
    for a, b in zip(values(opt), values(plain), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


# ---- averages of the weights -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_validation_sees_the_mix_of_weights_and_their_average(dtype: torch.dtype) -> None:
    """(1 - mix) W + mix E, E by an independent float64 loop, to the rounding of the parameters.

    E is float32: a bfloat16 average would lose W's small movements. Before `first` E is W.
    """
    opt, mix, span, first = build(Net(dtype), Averaged), 0.625, 4, 3
    E, far = [W.double() for W in values(opt)], 0.0
    for step in range(9):
        steps_by_hand(opt, step, step + 1)
        trained = values(opt)
        if step < first:
            E = [W.double() for W in trained]
        else:
            E = [e + (W.double() - e) / span for e, W in zip(E, trained, strict=True)]
        (_, state), eps = opt._around[0], torch.finfo(dtype).eps
        for average, e in zip(state["average"], E, strict=True):
            assert average.dtype == torch.float32
            assert (average - e).norm() <= 4 * torch.finfo(torch.float32).eps * e.norm()
        with opt.readout():
            assert torch.is_grad_enabled(), "the caller's own"
            seen = values(opt)
        assert same(values(opt), trained), "put back bit for bit"
        for found, W, e in zip(seen, trained, E, strict=True):
            assert found.dtype == dtype
            expected = (1 - mix) * W.double() + mix * e
            assert (found - expected).norm() <= eps * expected.norm()
            if step < first:
                assert torch.equal(found, W)
        far = max((a - W).norm() / W.norm() for a, W in zip(seen, trained, strict=True))
    assert far > 0.02


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_a_mix_of_zero_is_the_weights_and_one_the_average(mix: float) -> None:
    kind = type("Mixed", (Descent,), dict(around=(WeightAverage(span=4, mix=mix),)))
    opt = build(Net(), kind)
    steps_by_hand(opt, 0, 3)
    trained, average = values(opt), opt._around[0][1]["average"]
    assert not same(trained, average)
    with opt.readout():
        assert same(values(opt), average if mix else trained)


def test_an_average_over_one_step_is_the_weights() -> None:
    kind = type("Last", (Descent,), dict(around=(WeightAverage(span=1),)))
    opt = build(Net(), kind)
    steps_by_hand(opt, 0, 3)
    with opt.readout():
        assert same(values(opt), opt._around[0][1]["average"])
    for wrong in (dict(span=0.5), dict(span=4, first=-1), dict(span=4, mix=1.5)):
        with pytest.raises(ValueError, match="WeightAverage: found span .* expected a span of 1"):
            WeightAverage(**wrong)


def test_weights_are_put_back_when_a_validation_fails() -> None:
    opt = build(Net(), Averaged)
    steps_by_hand(opt, 0, 6)
    trained = values(opt)
    with pytest.raises(KeyboardInterrupt), opt.readout():
        assert not same(values(opt), trained)
        raise KeyboardInterrupt
    assert same(values(opt), trained)
    addresses = [p.data_ptr() for p in opt.params]
    with opt.readout():
        assert [p.data_ptr() for p in opt.params] == addresses, "recorded graphs find them again"


def test_an_average_leaves_training_as_it_was() -> None:
    plain, averaged = build(Net()), build(Net(), Averaged)
    for step in range(6):
        for opt in (plain, averaged):
            steps_by_hand(opt, step, step + 1)
            with opt.readout():
                pass
    assert same(values(plain), values(averaged))
    with plain.readout():
        assert same(values(plain), values(averaged)), "without averages validation sees the weights"


def test_a_reset_starts_the_average_anew_from_the_weights_as_they_are() -> None:
    """As a second trial does, in the same process with other weights."""
    used, fresh = build(Net(), Averaged), build(Net(), Averaged)
    steps_by_hand(used, 0, 6)
    with torch.no_grad():
        for opt in (used, fresh):
            for i, p in enumerate(opt.params):
                p.copy_(tensor(*p.shape, seed=50 + i))
            opt.reset()
    assert same(used._around[0][1]["average"], values(used))
    for opt in (used, fresh):
        steps_by_hand(opt, 0, 6)
    assert same(values(used), values(fresh))
    with used.readout(), fresh.readout():
        assert same(values(used), values(fresh))


# ---- a step from a moved point -----------------------------------------------------------------


class LookAhead(Around):
    """Takes the gradient at W + beta (W - last W), and takes the step from there."""

    beta = 0.5

    def start(self, weights: list[Tensor]) -> dict[str, list[Tensor]]:
        return {"last": [w.detach().clone() for w in weights]}

    def before_forward(self, weights: list[Tensor], state: dict, step: int) -> None:
        for w, last in zip(weights, state["last"], strict=True):
            now = w.clone()
            w += self.beta * (w - last)
            last.copy_(now)


def test_a_gradient_is_taken_where_a_look_ahead_has_moved_the_weights() -> None:
    """Nesterov's own method on a quadratic, against an independent float64 loop.

    The slot's weights are stepped by plain descent, from the point where the gradient was taken.
    """
    kind = type("Ahead", (MatrixOptimizer,), dict(around=(LookAhead(),), defaults=dict(lr=0.2)))
    net, scales = Net(), [0.1 + 0.05 * i for i in range(4 + 2 * LAYERS)]
    opt = build(net, kind)
    with torch.no_grad():
        net.bias += 0.5
    opt.reset()  # the look-ahead begins here
    W = [p.detach().double() for p in opt.params]
    last = W
    for step in range(8):
        opt.before_forward(step)
        point = [w + 0.5 * (w - before) for w, before in zip(W, last, strict=True)]
        sum(a * p.square().sum() / 2 for a, p in zip(scales, opt.params, strict=True)).backward()
        for a, p, x, w in zip(scales, opt.params, point, W, strict=True):
            assert (p.grad - a * x).norm() < 1e-5 * x.norm()
            assert step == 0 or (p.grad - a * w).norm() > 1e-3 * x.norm()
        opt.step(step)
        last, matrices = W, opt.matrix._parameters()
        in_slot = {id(p) for p in matrices}
        W = [
            x - 0.2 * a * x if id(p) in in_slot else p.detach().double()
            for a, p, x in zip(scales, opt.params, point, strict=True)
        ]
        for p, w in zip(opt.params, W, strict=True):
            assert (p - w).norm() < 1e-5 * w.norm()
        assert all(p.grad is None for p in opt.params)


# ---- state -------------------------------------------------------------------------------------


def refused(opt: ModelOptimizer, state: dict) -> str:
    """The one sentence; nothing has changed."""
    before, at = copy.deepcopy(opt.state_dict()), values(opt)
    with pytest.raises(ValueError) as caught:
        opt.load_state_dict(state)
    after = opt.state_dict()
    for part in ("adamw", "matrix"):
        assert before[part]["param_groups"] == after[part]["param_groups"]
        (old, new) = (some[part]["state"] for some in (before, after))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[i][key], new[i][key]) for i in old for key in old[i])
    for old, new in zip(before["around"], after["around"], strict=True):
        assert old.keys() == new.keys() and all(same(old[key], new[key]) for key in old)
    assert same(values(opt), at)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


class TwoAverages(Descent):
    around = WeightAverage(span=4), WeightAverage(span=8)


class Looking(Descent):
    around = (LookAhead(),)


def test_a_state_of_other_averages_is_refused_and_nothing_changes() -> None:
    """Another number of techniques, other names, other shapes; and a checkpoint before them."""

    def saved(kind: type[MatrixOptimizer], net: Net | None = None) -> dict:
        opt = build(net or Net(), kind)
        steps_by_hand(opt, 0, 2)
        return opt.state_dict()

    wider = Net()
    wider.bias = nn.Parameter(torch.zeros(WORDS + 1))
    old = {key: value for key, value in saved(Descent).items() if key != "around"}
    opt = build(Net(), Averaged)
    steps_by_hand(opt, 0, 5)
    for state, count in (
        (saved(Descent), 0),
        (old, 0),
        (saved(TwoAverages), 2),
        (saved(Looking), 1),
        (saved(Averaged, wider), 1),
    ):
        message = refused(opt, state)
        assert f"of {count} techniques around all weights, expected 1" in message
        assert "it comes from another optimizer or model" in message
    plain = build(Net())
    steps_by_hand(plain, 0, 5)
    assert "of 1 techniques around all weights, expected 0" in refused(plain, saved(Averaged))
    plain.load_state_dict(old)


def test_a_state_of_another_matrix_optimizer_or_adamw_changes_nothing() -> None:
    """AdamW had loaded its part before the slot refused the rest."""
    opt = build(Net(), Muon)
    steps_by_hand(opt, 0, 3)
    other = build(Net(), OPTIMIZERS["normuon"])
    steps_by_hand(other, 0, 2)
    assert "comes from another optimizer or model" in refused(opt, other.state_dict())
    fewer = Net()
    some = [group for group in fewer.groups() if group["name"] != "scalars"]
    fewer.groups = lambda: some
    other = build(fewer, Muon)
    steps_by_hand(other, 0, 2)
    assert "comes from another optimizer or model" in refused(opt, other.state_dict())


def averaged(path: str | None, rank: int = 0) -> dict[str, Any]:
    """Ten steps, saved after five; or the last five, loaded from a file."""
    opt, saved = build(Net(), Averaged), torch.load(path, weights_only=True) if path else None
    if saved:
        with torch.no_grad():
            torch._foreach_copy_(opt.params, saved["weights"])
        opt.load_state_dict(saved["state"])
    else:
        steps_by_hand(opt, 0, 5, rank)
        saved = dict(weights=values(opt), state=copy.deepcopy(opt.state_dict()))
    steps_by_hand(opt, 5, 10, rank)
    with opt.readout():
        validated = values(opt)
    return saved | dict(end=values(opt), validated=validated)


# ---- several ranks -----------------------------------------------------------------------------


def train(rank: int, size: int, early: bool) -> dict[str, Any]:
    """STEPS steps of two microbatches each, of a batch that is dealt to the ranks."""
    net = Net()
    opt, grads, calls = build(net), [], []
    real = opt.adamw.step

    def step_adamw() -> None:
        params = [p for group in opt.adamw.param_groups for p in group["params"]]
        grads.append([p.grad.clone() for p in params])
        calls.append("adamw")
        real()

    opt.adamw.step = step_adamw
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, calls)
        for step in range(STEPS):
            draws = torch.Generator().manual_seed(step)
            tokens, targets = torch.randint(0, WORDS, (2, 2, 48), generator=draws)
            mine = slice(rank * 48 // size, (rank + 1) * 48 // size)
            for batch in range(2):
                if early and batch:
                    opt.before_last_backward()
                net(tokens[batch, mine], targets[batch, mine]).backward()
            calls.append("backward")
            opt.step(step)
    return dict(weights=values(opt), grads=grads, calls=calls)


def watch(patch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Writes down what is summed, by its size."""
    sizes = {(WORDS + 1) * WIDTH: "embed", WORDS * WIDTH: "head", WORDS + LAYERS: "vectors"}

    def logs(real: Callable, kind: str) -> Callable:
        def call(tensor: Tensor, *more: Any, **how: Any) -> dist.Work:
            calls.append(sizes[tensor.numel()] if kind == "all_reduce" else kind)
            return real(tensor, *more, **how)

        return call

    for name in ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor"):
        if hasattr(dist, name):
            kind = "all_reduce" if name == "all_reduce" else "slot"
            patch.setattr(dist, name, logs(getattr(dist, name), kind))


def odd_gradients(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """A step with gradients whose rows are not side by side in memory, and one with copies."""
    found = []
    for contiguous in (True, False):
        opt = build(Net())
        set_gradients(opt, 7)
        for p in opt.params:
            grad = p.grad * (rank + 1)
            if not contiguous:
                grad = torch.stack([grad, grad], dim=-1)[..., 0]
                assert not grad.is_contiguous()
            p.grad = grad
        opt.step(0)
        found.append(values(opt))
    return found[0], found[1]


def nonfinite(rank: int) -> list[dict[str, int]]:
    """Four steps with gradients that one rank or both spoil."""
    net = Net()
    opt, found = build(net), []
    spoilt = [  # step: rank, parameter
        [(1, net.fc[1])],
        [(1, net.fc[1]), (0, net.head)],
        [(0, net.proj[0]), (1, net.proj[0]), (0, net.bias)],
        [(0, net.proj[0])],
    ]
    for step, some in enumerate(spoilt):
        set_gradients(opt, step, rank)
        for where, p in some:
            if where == rank:
                p.grad.view(-1)[2] = math.nan if step % 2 else math.inf
        opt.step(step)
        if step == 2:
            found += [opt.nonfinite_steps(net.named_parameters()) for _ in range(2)]
    opt.reset()
    return [*found, opt.nonfinite_steps(net.named_parameters())]


def changed(rank: int) -> list[str]:
    """What is said of a gradient that is replaced after it was sent; the next step goes well."""
    found = []
    for name in ("head", "bias", "embed"):
        net = Net()
        opt, before = build(net), values(build(Net()))
        tokens = torch.arange(WORDS)
        opt.before_last_backward()
        net(tokens, tokens).backward()
        net.get_parameter(name).grad = torch.zeros_like(net.get_parameter(name))
        try:
            opt.step(0)
            found.append("")
        except ValueError as error:
            found.append(str(error))
            assert same(values(opt), before), "nothing has moved"
            net.zero_grad()
            net(tokens, tokens).backward()
            opt.step(0)
        assert not any(piece.grads for piece in opt.matrix._reducer.pieces)
        assert all(p.isfinite().all() for p in opt.params)
    return found


def scenario(rank: int, size: int, path: str | None) -> dict[str, Any]:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    found = {early: train(rank, size, early) for early in (False, True)}
    more = dict(odd=odd_gradients(rank), nonfinite=nonfinite(rank), changed=changed(rank))
    return found | more | dict(averaged=averaged(path, rank))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What one process and two and three ranks bring home; the three resume what two saved."""
    folder = tmp_path_factory.mktemp("worlds")
    found = {1: [scenario(0, 1, None)], 2: on_ranks(2, scenario, folder / "two", None)}
    torch.save(found[2][0]["averaged"], folder / "state.pt")
    found[3] = on_ranks(3, scenario, folder / "three", str(folder / "state.pt"))
    found[0] = [dict(averaged=averaged(str(folder / "state.pt")))]
    return found


several = pytest.mark.parametrize("size", [2, 3])


@several
def test_adamws_gradients_are_summed_by_hooks_and_without_them_to_the_same_bits(
    worlds: dict, size: int
) -> None:
    """The sums are those of one process with the whole batch, up to rounding."""
    alone = worlds[1][0][False]
    assert same(alone["weights"], worlds[1][0][True]["weights"])
    for rank in worlds[size]:
        for early in (False, True):
            assert same(rank[early]["weights"], worlds[size][0][False]["weights"])
        for step in range(STEPS):
            assert same(rank[True]["grads"][step], rank[False]["grads"][step])
            pairs = zip(rank[True]["grads"][step], alone["grads"][step], strict=True)
            for found, expected in pairs:
                assert expected.norm() > 1e-3 and (found - expected).norm() < 1e-3 * expected.norm()
        first = zip(rank[True]["grads"][0], alone["grads"][0], strict=True)
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in first)


@several
@pytest.mark.parametrize("early", [False, True])
def test_the_heads_sum_starts_first_the_embeddings_last_and_vectors_travel_together(
    worlds: dict, size: int, early: bool
) -> None:
    """One order on all ranks; with hooks, all of it happens inside the last backward pass."""
    launches = ["head", "slot", "slot", "vectors", "embed"]
    step = [*launches, "backward", "adamw"] if early else ["backward", *launches, "adamw"]
    for rank in worlds[size]:
        assert rank[early]["calls"] == step * STEPS
    assert worlds[1][0][early]["calls"] == ["backward", "adamw"] * STEPS


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_gradient_that_is_not_contiguous_is_summed_like_any_other(
    worlds: dict, size: int
) -> None:
    """Vectors, matrices of AdamW and of the slot."""
    for rank in worlds[size]:
        assert same(*rank["odd"]) and same(rank["odd"][0], worlds[size][0]["odd"][0])
    start = values(build(Net()))
    assert all((a - b).norm() > 0.01 for a, b in zip(start, worlds[size][0]["odd"][1], strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_gradient_of_adamws_that_is_replaced_after_it_was_sent_is_an_error(
    worlds: dict, size: int
) -> None:
    """Each rank would step with its own gradient, and their weights would drift apart."""
    for rank in worlds[size]:
        for shape, message in zip(("(11, 8)", "(11,)", "(12, 8)"), rank["changed"], strict=True):
            said = f"a gradient {shape} has changed since it was sent: call before_last_backward()"
            assert message.startswith(said) if size > 1 else message == ""


def test_steps_with_gradients_that_are_not_finite_are_counted_and_named_on_two_ranks(
    worlds: dict,
) -> None:
    """Of the rank with the most, the first to fail first; a second look finds nothing, nor does one
    after a reset. A spoilt gradient of AdamW's is summed, so that all ranks see it."""
    for rank in worlds[2]:
        first, second, after_reset = rank["nonfinite"]
        assert first == {"fc.1": 2, "proj.0": 1, "head": 1, "bias": 1}
        assert next(iter(first)) == "fc.1" and second == after_reset == {}


@pytest.mark.parametrize("size", [0, 2, 3])
def test_a_run_with_averages_is_cut_and_goes_on_with_any_number_of_ranks(
    worlds: dict, size: int
) -> None:
    """Saved by two ranks, resumed by one process (0) and by three; whole runs by one and two."""
    whole = worlds[1][0]["averaged"]
    for rank in worlds[size]:
        found = rank["averaged"]
        for part in ("weights", "end", "validated"):
            assert same(found[part], whole[part]), part
    assert not same(whole["end"], whole["validated"]) and not same(whole["end"], whole["weights"])


# ---- what the log says -------------------------------------------------------------------------


def test_the_kernels_are_named_with_the_reason_for_pytorchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(kind: type[MatrixOptimizer], compile: bool = False, **how: Any) -> str:
        return build(Net(), kind, compile=compile, **how).matrix.kernel()

    torch_ones = "symmetric matmuls in PyTorch: "
    for name in ("muon", "normuon", "unormuon", "aurora"):
        assert said(OPTIMIZERS[name]) == f"eager, {torch_ones}no CUDA device"
        assert said(OPTIMIZERS[name], settings=["matrix.polar=quintic12"]) == "eager"
    both = said(Muon, settings=["fc.polar=quintic12"])
    assert both == f"eager, {torch_ones}no CUDA device", "proj still has gram6"
    for name in ("adamw", "riemannian"):
        assert said(OPTIMIZERS[name]) == "eager"
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    assert said(Muon, compile=True) == f"compiled, {torch_ones}no CUDA device"
    obstacles = {24: "a size is no multiple of 8", 8: ""}
    monkeypatch.setattr(polar, "symmetric_obstacle", lambda device, dtype, m, n: obstacles[m])
    monkeypatch.setattr(MatrixOptimizer, "_records", lambda self, bucket: self.compiled)
    assert said(Muon, compile=True) == (
        f"compiled, CUDA graphs, {torch_ones}a size is no multiple of 8, "
        "symmetric matmuls in Triton"
    )
