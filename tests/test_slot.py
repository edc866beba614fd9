"""optimizers/slot.py: one process and several, gradients, dealing, and what may come in.

Several ranks are processes in a gloo group. All that happens to one world size happens in one
group (`scenario`), and the tests look at what its ranks brought home.
"""

import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import Tensor

from optimizers import (
    OPTIMIZERS,
    Aspect,
    Aurora,
    CautiousDecay,
    Decay,
    MatrixOptimizer,
    Muon,
    Nesterov,
    Technique,
    ranks,
    slot,
)
from optimizers.buckets import even_parts, owners_by_cost

# 5 tall, 3 wide, 7 square and 1 alone: fewer than ranks, not divisible by ranks, and mixed groups.
SHAPES = {"fc": [(24, 6)] * 5, "proj": [(6, 24)] * 3, "attn": [(8, 8)] * 7 + [(12, 8)]}
AXES = {"fc": 0, "proj": 1, "attn": None}
STEPS = 3


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_groups() -> list[dict]:
    return [
        dict(
            name=name,
            neuron_axis=AXES[name],
            params=[torch.nn.Parameter(tensor(*s, seed=i)) for i, s in enumerate(shapes)],
        )
        for name, shapes in SHAPES.items()
    ]


def parameters(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def gradient(i: int, step: int, rank: int, shape: torch.Size) -> Tensor:
    return tensor(*shape, seed=1000 * step + 10 * i + 100_000 * rank) * 10.0 ** (rank - 2)


PARTS = 4  # every world size sums the same four parts, dealt to its ranks


def summed(i: int, step: int, shape: torch.Size, parts: range) -> Tensor:
    return sum(gradient(i, step, part, shape).double() for part in parts).float()


class Spy(Muon):
    """Muon that records what enters `update`, and divides by the norm: a padding matrix is nan."""

    seen: list[tuple[int, ...]]

    def update(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        self.seen.append(tuple(U.shape))
        norms = U.norm(dim=(-2, -1), keepdim=True)
        return super().update(U, W, state, group) * (norms / norms)


def run(kind: type, rank: int, size: int, reduce: bool, **more: Any) -> dict[str, Any]:
    """STEPS steps in a world of `size`; the gradient is the same sum for every size."""
    mine = range(rank * PARTS // size, (rank + 1) * PARTS // size)
    opt = kind(new_groups(), lr=0.05, weight_decay=0.1, reduce=reduce, dtype=torch.float32, **more)
    if isinstance(opt, Spy):
        opt.seen = []
    untouched = True
    for step in range(STEPS):
        for i, p in enumerate(parameters(opt)):
            p.grad = summed(i, step, p.shape, mine if reduce else range(PARTS))
        before = [p.grad.clone() for p in parameters(opt)]
        opt.step()
        after = [p.grad for p in parameters(opt)]
        untouched &= all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    shapes = [(b.params[0].shape, b.owned) for b in opt._buckets]
    return dict(
        weights=[p.detach().clone() for p in parameters(opt)],
        untouched=untouched,
        owned=shapes,
        seen=getattr(opt, "seen", None),
        state=sum(t.numel() for b in opt._buckets for t in b.state.values()),
    )


def scenario(rank: int, size: int, reduce: bool) -> dict[str, Any]:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    kinds = dict(muon=Muon, aurora=Aurora, spy=Spy)
    found: dict[str, Any] = {name: run(kind, rank, size, reduce) for name, kind in kinds.items()}
    return found | dict(lone=lone_matrix(rank, size, reduce))


def lone_matrix(rank: int, size: int, reduce: bool) -> Tensor:
    """One matrix, `size` ranks: the others have nothing to do, and rank r has gradient r + 1."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    opt = Plain([p], lr=1.0, reduce=reduce)
    p.grad = torch.full((4, 4), float(rank + 1 if reduce else size * (size + 1) / 2))
    opt.step()
    return p.detach().clone()


class Plain(MatrixOptimizer):
    """Gradient descent: the sums of the gradients can be read back from the weights."""

    techniques, defaults = (Aspect(), Decay()), dict(lr=1.0, weight_decay=0.0)


World = list[dict[str, Any]]  # what each rank brought home


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], World]:
    """The world of a size (0: no process group at all), made once."""

    @functools.cache
    def make(size: int, reduce: bool) -> World | AssertionError:
        if size == 0:
            return [scenario(0, 1, reduce)]
        try:
            return on_ranks(size, scenario, tmp_path_factory.mktemp("world"), reduce, seconds=60)
        except AssertionError as failure:  # kept, so that it is not made anew for each test
            return failure

    def get(size: int, reduce: bool) -> World:
        if isinstance(found := make(size, reduce), AssertionError):
            raise found
        return found

    return get


WORLDS = [(size, reduce) for reduce in (True, False) for size in (1, 2, 3, 4)]
in_worlds = pytest.mark.parametrize("size, reduce", WORLDS)


@in_worlds
def test_ranks_agree_bit_for_bit(world: Callable, size: int, reduce: bool) -> None:
    first, *others = world(size, reduce)
    for other in others:
        for name in ("muon", "aurora", "spy"):
            pairs = zip(first[name]["weights"], other[name]["weights"], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@in_worlds
@pytest.mark.parametrize("name", ["muon", "aurora"])
def test_any_number_of_ranks_gives_the_weights_of_one_process(
    world: Callable, size: int, reduce: bool, name: str
) -> None:
    """To float32 rounding, 1e-5 of the movement; gradients of one part only would be off by 0.1.

    Gradients that are reduced already (reduce=False) give the weights of those that are not.
    """
    start = [p for group in new_groups() for p in group["params"]]
    alone, here = world(0, True)[0][name]["weights"], world(size, reduce)[0][name]["weights"]
    for W, a, b in zip(start, alone, here, strict=True):
        moved = (a - W).norm()
        assert moved > 0.01 and (a - b).norm() < 1e-5 * moved


@in_worlds
def test_gradients_are_summed_once_and_not_averaged(
    world: Callable, size: int, reduce: bool
) -> None:
    """One matrix for all ranks: 1 + 2 + ... + size on every rank, summed here or before."""
    for rank in world(size, reduce):
        assert torch.equal(rank["lone"], torch.full((4, 4), -size * (size + 1) / 2))


@in_worlds
def test_every_matrix_is_owned_once_and_padding_never_enters_update(
    world: Callable, size: int, reduce: bool
) -> None:
    """D#56: zero matrices that fill the last round blow up an update that divides by a norm."""
    reports = [rank["spy"] for rank in world(size, reduce)]
    for shape, owned in reports[0]["owned"]:
        count = sum(s == tuple(shape) for shapes in SHAPES.values() for s in shapes)
        assert sorted(i for mine in owned for i in mine) == list(range(count))
    entered = [s for report in reports for s in report["seen"]]
    assert all(k > 0 for k, _, _ in entered)
    assert sum(k for k, _, _ in entered) == STEPS * sum(map(len, SHAPES.values()))
    assert all(W.isfinite().all() for report in reports for W in report["weights"])


@in_worlds
def test_momentum_lives_on_the_owner_only(world: Callable, size: int, reduce: bool) -> None:
    held = [rank["muon"]["state"] for rank in world(size, reduce)]
    assert sum(held) == sum(m * n for shapes in SHAPES.values() for m, n in shapes)


@in_worlds
def test_the_callers_gradients_are_never_overwritten(
    world: Callable, size: int, reduce: bool
) -> None:
    """The released code lerps into p.grad: gradient clipping after it read something else."""
    ranks = world(size, reduce) + world(0, reduce)
    assert all(rank[name]["untouched"] for rank in ranks for name in ("muon", "aurora", "spy"))


def test_nesterov_changes_its_buffer_and_not_the_gradient() -> None:
    """m <- mu m + (1 - mu) g, then (1 - mu) g + mu m; mu may be a tensor."""
    g, m = tensor(2, 4, 3, seed=0), tensor(2, 4, 3, seed=1)
    for mu in (0.75, torch.tensor(0.75)):
        grad, state = g.clone(), {"momentum": m.clone()}
        found = Nesterov().before(grad, grad, state, dict(momentum=mu))
        new = 0.75 * m + 0.25 * g
        assert torch.equal(grad, g)
        assert torch.allclose(state["momentum"], new, rtol=0, atol=1e-6)
        assert torch.allclose(found, 0.25 * g + 0.75 * new, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_changes_neither_the_gradient_nor_the_weights_it_is_given(name: str) -> None:
    """The gradients may be the caller's own memory one day, and float32 weights are already."""
    p, opt = ready(OPTIMIZERS[name])
    grads, weights = p.grad[None].clone(), p.detach()[None].clone()
    opt.update(grads, weights, opt.init_state(grads), opt.param_groups[0])
    assert torch.equal(grads[0], p.grad) and torch.equal(weights[0], p)


# ---- dealing ---------------------------------------------------------------------------------


def test_deal_gives_the_largest_first_each_to_the_least_loaded() -> None:
    assert owners_by_cost([1.0, 5.0, 3.0, 3.0], 2) == [0, 0, 1, 1]
    assert owners_by_cost([], 3) == [] and owners_by_cost([1.0] * 4, 1) == [0] * 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 16])
def test_no_rank_has_more_than_four_thirds_of_what_is_unavoidable(ranks: int) -> None:
    """Graham's bound for largest first; 72 matrices of the 124M model, Aurora's fc and proj x 2."""
    cost = 768**3
    costs = [float(cost)] * 48 + [float(8 * cost)] * 24
    owners = owners_by_cost(costs, ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    unavoidable = max(sum(costs) / ranks, max(costs))
    assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * unavoidable
    if ranks in (1, 2, 3, 4, 8):  # 24 divides: perfectly even
        assert max(loads) == min(loads)


def polar_cost(opt: MatrixOptimizer, *shape: int, **group: Any) -> float:
    """What is left of the cost without the elements, which every optimizer reads and writes."""
    return opt.cost(torch.Size(shape), opt.param_groups[0] | group) - math.prod(shape)


def test_balancing_costs_aurora_twice_what_muon_costs() -> None:
    params = [torch.nn.Parameter(torch.zeros(8, 2))]
    muon, aurora, tall = Muon(params), Aurora(params), (3072, 768)
    base = polar_cost(muon, *tall)
    assert base == 4 * polar_cost(muon, 768, 768) > 0
    assert base == polar_cost(muon, 768, 3072)
    assert polar_cost(aurora, *tall, neuron_axis=0) == 2 * base
    assert polar_cost(aurora, *tall, neuron_axis=0, rounds=3) == 3 * base
    assert polar_cost(aurora, *tall, neuron_axis=None) == base
    assert polar_cost(aurora, *tall, neuron_axis=0, balance="proj") == base
    assert OPTIMIZERS["adamw"](params).cost(torch.Size(tall), {}) == math.prod(tall)


def test_climbing_costs_twelve_times_what_muon_costs() -> None:
    """7 polar factors of 216 n^3, 60 products of 16 n^3 and 3 times 48 n^3 at 3072 x 768."""
    params = [torch.nn.Parameter(torch.zeros(8, 2))]
    muon, climber = Muon(params), OPTIMIZERS["riemannian"](params)
    times = polar_cost(climber, 3072, 768) / polar_cost(muon, 3072, 768)
    assert times == pytest.approx((7 * 216 + 60 * 16 + 3 * 48) / 216)


# ---- asynchronous collectives ----------------------------------------------------------------


class LateWork:
    """A collective that moves the data when waited for, as a slow network might."""

    def __init__(self, pending: list, move: Any) -> None:
        self.pending, self.move = pending, move
        pending.append(self)

    def wait(self) -> None:
        self.pending.remove(self)
        self.move()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateWork]:
    """Two ranks with the same gradients, seen from rank 0; buffers hold nan until the wait.

    The other rank's weights are unknown here, so they are gathered as -1.
    """
    pending: list[LateWork] = []

    def scatter(output: Tensor, whole: Tensor, async_op: bool = False, **_: Any) -> LateWork:
        assert async_op
        output.fill_(math.nan)
        kept = weakref.ref(whole._base)  # the buffer: whole is a view of it

        def move() -> None:
            assert kept() is not None, "the input was freed before the wait"
            output.copy_(2 * kept().flatten(0, 1)[: len(output)])

        return LateWork(pending, move)

    def gather(whole: Tensor, mine: Tensor, async_op: bool = False, **_: Any) -> LateWork:
        assert async_op
        assert mine.data_ptr() == whole.data_ptr(), "rank 0's part is in place"
        whole[len(mine) :].fill_(math.nan)
        kept, count = weakref.ref(mine), len(mine)
        del mine

        def move() -> None:
            assert kept() is not None, "the input was freed before the wait"
            whole[count:].fill_(-1)
            whole[:count].copy_(kept())

        return LateWork(pending, move)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(ranks, "from_all_ranks", lambda mine, group: [mine] * 2)
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        monkeypatch.setattr(dist, name, scatter, raising=False)
    for name in ("all_gather_single", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, name, gather, raising=False)
    return pending


def test_buffers_are_read_only_after_the_wait_and_inputs_live_until_then(late: list) -> None:
    """NC#843: an input freed before the wait is reused, and the collective sends other numbers.

    Here a collective reads its input and fills its output only when waited for, so an early read
    gives nan, and an input that is overwritten before the wait gives wrong weights.
    """
    shapes = [(4, 3)] * 3 + [(5, 5)] * 2 + [(2, 6)]
    params = [torch.nn.Parameter(tensor(*s, seed=i)) for i, s in enumerate(shapes)]
    start = [p.detach().clone() for p in params]
    opt = Plain([dict(params=params[:4]), dict(params=params[4:])], lr=0.5)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = tensor(*p.shape, seed=100 * step + i)
        start = [p.detach().clone() for p in params]
        opt.step()
        assert not late, "a collective was never waited for"
        mine = {id(b.params[i]) for b in opt._buckets for i in b.owned[0]}
        assert 0 < len(mine) < len(params)
        for p, W in zip(params, start, strict=True):
            factor = 0.5 * max(1, p.size(0) / p.size(1)) ** 0.5
            expected = W - factor * 2 * p.grad if id(p) in mine else torch.full_like(W, -1)
            assert torch.allclose(p.detach(), expected, rtol=0, atol=1e-5)


# ---- the buffer that the parameters are views of, with share_storage ---------------------------


def test_parameters_share_a_buffer_and_stay_what_they_were() -> None:
    """The same Parameter objects with the same values; a step moves them in place."""
    groups = new_groups()
    params = [p for group in groups for p in group["params"]]
    opt = Plain(groups, lr=0.5, share_storage=True)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(a is b for a, b in zip(parameters(opt), params, strict=True))
    assert all(torch.equal(p, W) for p, W in zip(params, before, strict=True))
    places = [p.data_ptr() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert places == [p.data_ptr() for p in params]
    assert len({p.untyped_storage().data_ptr() for p in params}) == len(opt._buckets)
    assert not any(torch.equal(p, W) for p, W in zip(params, before, strict=True))


def test_a_parameter_that_was_moved_elsewhere_is_brought_back() -> None:
    """As by model.to(...), a loader that assigns, or a second optimizer on the same weights."""
    p, opt = ready(Plain, lr=0.5, share_storage=True)
    opt.step()
    held = p.data_ptr()
    p.data = torch.full_like(p, 3.0)
    p.grad = torch.ones_like(p)
    opt.step()
    factor = 0.5 * max(1, p.size(0) / p.size(1)) ** 0.5
    assert torch.allclose(p.detach(), torch.full_like(p, 3.0 - factor)) and p.data_ptr() != held
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.allclose(p.detach(), torch.full_like(p, 3.0 - 2 * factor))


# ---- what may come in ------------------------------------------------------------------------


def ready(optimizer: type = Muon, **more: Any) -> tuple[torch.nn.Parameter, MatrixOptimizer]:
    p = torch.nn.Parameter(tensor(12, 4, seed=0))
    p.grad = tensor(12, 4, seed=1)
    return p, optimizer([p], **more)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), ()], ids=str)
def test_a_parameter_that_is_no_matrix_is_refused_with_a_remedy(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrices.*AdamW") as caught:
        Muon([torch.nn.Parameter(torch.zeros(shape))])
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("where", ["argument", "group"])
def test_an_unknown_hyperparameter_is_refused(where: str) -> None:
    """A misspelt weight_decay that is silently ignored costs a run (MN#279)."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="'weight_decy'.*weight_decay"):
        if where == "argument":
            Muon([p], weight_decy=0.1)
        else:
            Muon([dict(params=[p], weight_decy=0.1)])


def test_hyperparameters_of_a_group_win_over_those_of_the_optimizer() -> None:
    a, b = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    opt = Plain([dict(params=[a], lr=0.25), dict(params=[b])], lr=0.5)
    a.grad = b.grad = torch.ones(4, 4)
    opt.step()
    assert a[0, 0] == 0.75 and b[0, 0] == 0.5


def test_a_group_added_later_is_stepped_too() -> None:
    p, opt = ready(Plain)
    q = torch.nn.Parameter(torch.zeros(3, 3))
    opt.add_param_group(dict(params=[q], lr=2.0))
    q.grad = torch.ones(3, 3)
    opt.step()
    assert torch.equal(q.detach(), torch.full((3, 3), -2.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_schedulers_drive_the_learning_rate(name: str) -> None:
    p, opt = ready(OPTIMIZERS[name], lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 if step == 0 else 0.0)
    start = p.detach().clone()
    opt.step()
    scheduler.step()
    moved = p.detach().clone()
    assert not torch.equal(moved, start)
    opt.step()
    assert torch.equal(p.detach(), moved)


def test_zero_grad_clears_the_gradients() -> None:
    p, opt = ready()
    opt.zero_grad()
    assert p.grad is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_is_as_newly_built(name: str) -> None:
    def two_steps(opt: MatrixOptimizer, p: torch.nn.Parameter) -> Tensor:
        with torch.no_grad():
            p.copy_(tensor(12, 4, seed=0))
        for step in range(2):
            p.grad = tensor(12, 4, seed=10 + step)
            opt.step()
        return p.detach().clone()

    p, opt = ready(OPTIMIZERS[name])
    fresh = two_steps(opt, p)
    assert not torch.equal(two_steps(opt, p), fresh), "momentum is carried on without reset"
    opt.reset()
    assert torch.equal(two_steps(opt, p), fresh)


# ---- the seam --------------------------------------------------------------------------------


class Halve(Technique):
    """Moves half as far."""

    def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
        return 0.5 * U


class Cautious(MatrixOptimizer):
    """Decays a weight only where the step shrinks it."""

    techniques, defaults = (Halve(), CautiousDecay()), dict(lr=1.0, weight_decay=0.0)


def test_techniques_that_scale_and_decay_are_used() -> None:
    p = torch.nn.Parameter(torch.tensor([[4.0, -4.0], [2.0, -2.0], [0.0, 8.0]]))
    opt = Cautious([p], lr=0.5, weight_decay=0.5)
    p.grad = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 0.0]])
    opt.step()
    assert p.tolist() == [[2.75, -4.25], [2.25, -1.25], [-0.25, 8.0]]


def test_decay_sees_the_scaled_direction() -> None:
    seen = []

    class Looks(Technique):
        def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
            seen.append(U.clone())
            return V

    class Looking(MatrixOptimizer):
        techniques = Looks(), Halve()

    p, opt = ready(Looking)
    opt.step()
    assert torch.equal(seen[0][0], 0.5 * p.grad)


def test_decay_comes_first_and_is_decoupled() -> None:
    """W <- (1 - lr wd) W - lr s g with s = sqrt(max(1, out/in))."""
    p, opt = ready(Plain, lr=0.1, weight_decay=0.5)
    W = p.detach().clone()
    opt.step()
    assert torch.allclose(p.detach(), 0.95 * W - 0.1 * 3**0.5 * p.grad, rtol=0, atol=1e-6)


def test_state_of_a_subclass_is_kept_between_steps() -> None:
    class Counts(Plain):
        def init_state(self, grad: Tensor) -> dict[str, Tensor]:
            return {"count": torch.zeros(len(grad), 1, 1)}

        def update(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
            state["count"] += 1
            return state["count"].expand_as(U)

    p = torch.nn.Parameter(torch.zeros(2, 2))
    opt = Counts([p], lr=1.0)
    for _ in range(3):
        p.grad = torch.ones(2, 2)
        opt.step()
    assert torch.equal(p.detach(), torch.full((2, 2), -6.0))


def test_bfloat16_weights_have_float32_state() -> None:
    p = torch.nn.Parameter(tensor(8, 4, seed=0).bfloat16())
    p.grad = tensor(8, 4, seed=1).bfloat16()
    opt = Muon([p], lr=0.5)
    start = p.detach().clone()
    opt.step()
    assert p.dtype == torch.bfloat16 and (p.detach() - start).norm() > 0.5
    assert {t.dtype for b in opt._buckets for t in b.state.values()} == {torch.float32}


# ---- compiled --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_changing_hyperparameters_recompiles_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are counted, by a backend that runs them as they are (no C++ compiler needed)."""
    graphs, compile = [], torch.compile

    def count(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend=count, **how))
    torch._dynamo.reset()

    def run(compiled: bool) -> list[Tensor]:
        defaults = OPTIMIZERS[name].defaults
        how = dict(dtype=torch.float32) if "dtype" in defaults else {}
        if name == "riemannian":
            how |= dict(climbs=2, cg_steps=3)  # loops that are unrolled: tracing takes a minute
        opt = OPTIMIZERS[name](new_groups(), lr=0.1, compile=compiled, **how)
        numbers = {key: value for key, value in defaults.items() if isinstance(value, float)}
        for step in range(5):
            for group in opt.param_groups:
                group.update({key: value * (1 - 0.2 * step) for key, value in numbers.items()})
                if "exponent" in group and step == 4:
                    group["exponent"] = 0.0  # the best for the shape
            for i, p in enumerate(parameters(opt)):
                p.grad = tensor(*p.shape, seed=100 * step + i)
            opt.step()
            counts.append(len(graphs))
        return [p.detach() for p in parameters(opt)]

    counts: list[int] = []
    plain = run(False)
    assert counts == [0] * 5
    fast = run(True)
    assert counts[5] == counts[9] == 4, "one graph for each shape, all in the first step"
    for a, b in zip(plain, fast, strict=True):
        assert (a - b).norm() < 1e-4 * a.norm()


def test_nothing_is_compiled_on_the_cpu_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    ready()[1].step()
    ready(compile=False)[1].step()
    with pytest.raises(AssertionError, match="compiled"):
        ready(compile=True)


# ---- in parts --------------------------------------------------------------------------------


def stepped(name: str, **how: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and state after three steps."""
    precise = dict(dtype=torch.float32) if "dtype" in OPTIMIZERS[name].defaults else {}
    opt = OPTIMIZERS[name](new_groups(), lr=0.05, weight_decay=0.1, **precise, **how)
    for step in range(STEPS):
        for i, p in enumerate(parameters(opt)):
            p.grad = tensor(*p.shape, seed=100 * step + i)
        opt.step()
    state = opt.state_dict()["state"].values()
    return [p.detach() for p in parameters(opt)], [t for some in state for t in some.values()]


def test_parts_are_even_few_and_below_the_limit() -> None:
    shapes = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 1536)]
    with torch.device("meta"):
        opt = Muon([torch.nn.Parameter(torch.empty(*shape)) for shape in shapes])
    square, tall, twice = (opt._parts(bucket) for bucket in opt._buckets)
    assert square == [(0, 24), (24, 48)] and tall == [(0, 6), (6, 12)] and twice == [(0, 1)]
    with torch.device("meta"):
        opt = Muon([torch.nn.Parameter(torch.empty(2048, 2048)) for _ in range(96)])
    assert [last - first for first, last in opt._parts(opt._buckets[0])] == [12] * 8
    assert even_parts(7, 10, 30) == [(0, 2), (2, 4), (4, 7)]
    assert even_parts(2, 10, 3) == [(0, 1), (1, 2)] and even_parts(0, 10, 3) == []


@pytest.mark.parametrize("limit", [1, 500, 2000])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stepping_in_parts_gives_what_stepping_at_once_gives(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW bit for bit; products of stacks may round otherwise, 1e-5 of the values at most."""
    whole = stepped(name)
    monkeypatch.setattr(slot, "PART_BYTES", limit)
    monkeypatch.setattr(slot, "PARTS", 100)
    for some, parts in zip(whole, stepped(name), strict=True):
        for a, b in zip(some, parts, strict=True):
            assert torch.equal(a, b) or name != "adamw" and (a - b).norm() < 1e-5 * a.norm()


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call has allocated at a time, beyond what was there; on the CPU."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(sums, default=0)


@pytest.mark.parametrize("name, copies", [("adamw", 7), ("muon", 7), ("aurora", 9)])
def test_a_step_needs_memory_for_one_part(
    name: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stacked the gradients of all buckets, 340 MB of the 124M model, before the first update.

    Eager float32 needs some copies of a part, one of them its weights: here a bucket is 16 parts,
    all gradients are 32. 1% is for what has one number a row or a matrix: gram6 scales each
    matrix, Aurora each row.
    """
    params = [
        [torch.nn.Parameter(torch.ones(*shape)) for _ in range(16)]
        for shape in ((256, 64), (64, 256))
    ]
    precise = dict(dtype=torch.float32) if "dtype" in OPTIMIZERS[name].defaults else {}
    opt = OPTIMIZERS[name]([dict(params=some) for some in params], **precise)
    part = 256 * 64 * 4
    monkeypatch.setattr(slot, "PART_BYTES", part)
    monkeypatch.setattr(slot, "PARTS", 100)
    for p in parameters(opt):
        p.grad = torch.randn_like(p)
    opt.step()
    assert part <= peak_bytes(opt.step) <= 1.01 * copies * part
    monkeypatch.setattr(slot, "PART_BYTES", 16 * part)
    assert peak_bytes(opt.step) > 2 * 16 * part, "the count does not see stacks"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_no_number_back(name: str) -> None:
    """Each item() or nonzero() would wait for the GPU; the profiler sees them on the CPU, too."""

    def called(call: Callable[[], object]) -> set[str]:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu) as profile:
            call()
        return {event.key for event in profile.key_averages()}

    waits = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    p, opt = ready(OPTIMIZERS[name])
    for _ in range(2):
        found = called(opt.step)
        assert "aten::stack" in found and not found & waits
    assert called(lambda: p.sum().item()) & waits


def test_parts_of_one_size_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 squares in parts of 2 and 1: two graphs, though slices begin at different offsets."""
    graphs: list = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append([tuple(x.shape) for x in inputs if isinstance(x, Tensor) and x.ndim == 3])
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend=count, **how))
    monkeypatch.setattr(slot, "PART_BYTES", 2 * 5 * 5 * 4)
    monkeypatch.setattr(slot, "PARTS", 100)
    torch._dynamo.reset()
    params = [torch.nn.Parameter(tensor(5, 5, seed=i)) for i in range(7)]
    opt = Muon(params, compile=True, dtype=torch.float32)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = tensor(5, 5, seed=100 * step + i)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            opt.step()
        assert len(graphs) == 2, graphs


def test_a_state_that_is_replaced_is_an_error_and_not_forgotten() -> None:
    """Of a state that is added, too: in a recorded graph it would be that of the first step."""

    class Replaces(Nesterov):
        def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
            state["momentum"] = U.clone()
            return U

    class Adds(Technique):
        def before(self, U: Tensor, W: Tensor, state: dict, group: dict) -> Tensor:
            state["new"] = U.clone()
            return U

    for technique in (Replaces(), Adds()):
        with pytest.raises(AssertionError, match="Careless must change its state in place"):
            ready(type("Careless", (MatrixOptimizer,), dict(techniques=(technique,))))[1].step()
