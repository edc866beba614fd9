"""Reductions that start in the backward pass: 1 to 4 gloo ranks, and what may go wrong."""

import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import Tensor, nn

from optimizers import OPTIMIZERS, MatrixOptimizer, Muon, ranks, reducer
from optimizers.reducer import OwnedPiece

LAYERS, STEPS, MICROBATCHES = 5, 3, 3  # 5 layers: not divisible by 2, 3 or 4 ranks


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Descent(MatrixOptimizer):
    """Gradient descent, without techniques: the weights show the sums that arrived."""


KINDS = OPTIMIZERS | {"descent": Descent}


class Net(nn.Module):
    """Residual MLPs and square matrices, in layers."""

    def __init__(self) -> None:
        super().__init__()
        shapes = dict(attn=(8, 8), fc=(24, 8), proj=(8, 24))
        for name, shape in shapes.items():
            matrices = [nn.Parameter(tensor(*shape, seed=i) / 5) for i in range(LAYERS)]
            setattr(self, name, nn.ParameterList(matrices))

    def forward(self, x: Tensor) -> Tensor:
        for attn, fc, proj in zip(self.attn, self.fc, self.proj, strict=True):
            x = x + x @ attn.T
            x = x + (x @ fc.T).relu() @ proj.T
        return x

    def groups(self) -> list[dict]:
        rooms = (("attn", None), ("fc", 0), ("proj", 1))
        return [dict(name=n, neuron_axis=a, params=list(getattr(self, n))) for n, a in rooms]


def counting(events: list[str]) -> None:
    """Writes down each piece that is launched, and each backward pass that ends."""
    real = OwnedPiece.launch

    def launch(piece: OwnedPiece, dtype: torch.dtype | None) -> None:
        name = f"{piece.bucket.groups[0]['name']} {piece.first}"
        events.append(name)
        real(piece, dtype)

    OwnedPiece.launch = launch


def train(name: str, rank: int, early: bool, events: list[str], **how: Any) -> list[Tensor]:
    """STEPS steps of MICROBATCHES backward passes each; gradients differ by rank."""
    precise = dict(dtype=torch.float32) if "dtype" in KINDS[name].defaults else {}
    net = Net()
    opt = KINDS[name](net.groups(), lr=0.02, **precise, **how)
    for step in range(STEPS):
        for batch in range(MICROBATCHES):
            x = tensor(16, 8, seed=1000 * step + 10 * batch + 100_000 * rank)
            if early and batch == MICROBATCHES - 1:
                opt.before_last_backward()
            net(x).square().mean().backward()
            events.append("backward")
        opt.step()
        events.append("step")
        opt.zero_grad()
        assert not opt._reducer.hooks and not any(
            p._post_accumulate_grad_hooks for p in net.parameters()
        )
        assert not any(b.received is not None for b in opt._buckets)
    return [p.detach().clone() for p in net.parameters()]


def scenario(rank: int, size: int) -> dict[str, Any]:
    """Both ways, in pieces of one slot and in one piece a bucket."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for limit in (1, 10**9):
        reducer.PIECE_BYTES = limit
        for name in ("muon", "aurora", "adamw"):
            for early in (False, True):
                found[name, early, limit] = train(name, rank, early, [])
    reducer.PIECE_BYTES = 1
    found["float32"] = train("descent", rank, True, [])
    found["bfloat16"] = train("descent", rank, True, [], reduce_dtype=torch.bfloat16)
    ways = (dict(), dict(reduce_dtype=torch.bfloat16), dict(reduce=False))
    found["traffic"] = [traffic(how) for how in ways]
    counting(events := [])
    train("muon", rank, True, events)
    return found | dict(events=list(events), errors=errors(size))


def traffic(how: dict) -> tuple[dict[str, int], dict[str, int]]:
    """What the optimizer says that a step sends, and what a count of the collectives says."""
    opt, counted = Muon(Net().groups(), dtype=torch.float32, **how), {"reduce": 0, "gather": 0}
    ranks = opt.world_size

    def counts(name: str, real: Callable) -> Callable:
        def call(output: Tensor, given: Tensor, **more: Any) -> dist.Work:
            whole = max(output, given, key=Tensor.numel)
            counted[name] += whole.nbytes * (ranks - 1) // ranks
            return real(output, given, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, kinds in dict(
            reduce=("reduce_scatter_single", "reduce_scatter_tensor"),
            gather=("all_gather_single", "all_gather_into_tensor"),
        ).items():
            for kind in kinds:
                if hasattr(dist, kind):
                    patch.setattr(dist, kind, counts(name, getattr(dist, kind)))
        for p in opt._parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    return opt.traffic(), counted


def errors(size: int) -> list[str]:
    """What is said when a gradient changes after it was sent; the next steps go well."""
    found = []

    def backward(net: Net) -> None:
        net(torch.ones(2, 8)).sum().backward()

    for change in (
        backward,
        lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1e-3),
        lambda net: setattr(net.fc[0], "grad", torch.zeros(24, 8)),
    ):
        net = Net()
        opt, before = Muon(net.groups(), dtype=torch.float32), net.fc[1].detach().clone()
        opt.before_last_backward()
        backward(net)
        change(net)
        try:
            opt.step()
            found.append("")
        except ValueError as error:
            found.append(str(error))
            assert torch.equal(net.fc[1], before), "nothing has moved"
            opt.zero_grad()
            backward(net)
            opt.step()
        opt.before_last_backward()
        backward(net)
        opt.zero_grad()  # this step is left out
        opt.before_last_backward()
        backward(net)
        opt.step()
        assert net.fc[1].isfinite().all()
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return on_ranks(request.param, scenario, tmp_path_factory.mktemp("world"), seconds=120)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reducing_early_and_in_pieces_changes_no_bit(world: list[dict]) -> None:
    """Gradients are accumulated over three backward passes, 5 matrices for up to 4 ranks."""
    for name in ("muon", "aurora", "adamw"):
        expected = world[0][name, False, 10**9]
        assert not same(expected, list(Net().parameters()))
        for rank in world:
            for early in (False, True):
                for limit in (1, 10**9):
                    found = rank[name, early, limit]
                    assert same(found, rank[name, False, limit]), "early"
                    assert same(found, world[0][name, False, limit]), "ranks"
                    if len(world) < 3:  # a sum of more may be taken in another order
                        assert same(found, expected), "pieces"
                    for a, b in zip(found, expected, strict=True):
                        assert (a - b).norm() < 1e-4 * b.norm()


def test_pieces_start_in_the_last_backward_pass_in_one_order(world: list[dict]) -> None:
    """Last layers first, the same on all ranks, and none before or after that pass."""
    events = world[0]["events"]
    assert all(rank["events"] == events for rank in world)
    if len(world) == 1:
        assert set(events) == {"backward", "step"}
        return
    assert len(events) % STEPS == 0
    one = events[: len(events) // STEPS]
    assert events == one * STEPS and one[:2] == ["backward", "backward"]
    assert one[-2:] == ["backward", "step"]
    launched = one[2:-2]
    slots = -(-LAYERS // len(world))
    assert len(launched) == len(set(launched)) >= 3 * slots
    for name in ("attn", "fc", "proj"):
        order = [int(piece.split()[1]) for piece in launched if piece.startswith(name)]
        assert order == sorted(order, reverse=True)


def test_a_gradient_that_changes_after_it_was_sent_is_an_error(world: list[dict]) -> None:
    for rank in world:
        if len(world) == 1:
            assert rank["errors"] == ["", "", ""]
        for message in rank["errors"] if len(world) > 1 else ():
            assert "has changed since it was sent: call before_last_backward() before" in message


def test_traffic_is_what_the_collectives_move(world: list[dict]) -> None:
    """(N - 1) / N of the padded matrices each way: 4 bytes, or 2 of gradients in bfloat16."""
    size = len(world)
    for rank in world:
        for said, counted in rank["traffic"]:
            assert said == counted
        plain, half, reduced = (said for said, _ in rank["traffic"])
        assert plain["reduce"] == plain["gather"] == 2 * half["reduce"] == reduced["gather"]
        assert reduced["reduce"] == 0 and (plain["gather"] > 0) == (size > 1)


def test_gradients_summed_in_bfloat16_lead_to_nearly_the_same_weights(world: list[dict]) -> None:
    """8 bits: each gradient and each partial sum is off by 0.4% at most."""
    start = list(Net().parameters())
    for W, a, b in zip(start, world[0]["float32"], world[0]["bfloat16"], strict=True):
        assert (a - b).norm() < 0.01 * (a - W).norm()
        assert len(world) == 1 or not torch.equal(a, b)
    assert all(same(rank["bfloat16"], world[0]["bfloat16"]) for rank in world)


def late_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second rank with the same gradients, seen from rank 0; nothing travels."""

    class Done:
        def wait(self) -> None: ...

    def scatter(received: Tensor, send: Tensor, async_op: bool, **_: Any) -> Done:
        assert async_op
        received.copy_(send[: len(received)] * 2)
        return Done()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(ranks, "from_all_ranks", lambda mine, group: [mine] * 2)
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        monkeypatch.setattr(dist, name, scatter, raising=False)


def test_hooks_keep_no_optimizer_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    late_work(monkeypatch)
    net = Net()
    opt = Muon(net.groups())
    opt.before_last_backward()
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    net(torch.ones(2, 8)).sum().backward()  # its hooks do nothing


def test_at_most_a_few_inputs_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    late_work(monkeypatch)
    monkeypatch.setattr(reducer, "PIECE_BYTES", 1)
    monkeypatch.setattr(reducer, "IN_FLIGHT", 2)
    net = Net()
    opt, real, most = Muon(net.groups()), OwnedPiece.launch, []

    def launch(piece: OwnedPiece, dtype: torch.dtype | None) -> None:
        real(piece, dtype)
        most.append(sum(p.flight is not None for p in opt._reducer.pieces))

    monkeypatch.setattr(OwnedPiece, "launch", launch)
    opt.before_last_backward()
    net(torch.ones(2, 8)).sum().backward()
    assert len(most) == 9 and max(most) == 2


def test_without_reduction_there_are_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    late_work(monkeypatch)
    net = Net()
    opt = Muon(net.groups(), reduce=False)
    opt.before_last_backward()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
