"""optimizers/replay.py and the slot's staging of gradients on the CPU, with a stand-in for graphs.

A stand-in calls what was recorded, on the tensors that it was recorded with.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from conftest import on_ranks
from torch import Tensor

from optimizers import OPTIMIZERS, MatrixOptimizer, Muon, slot
from optimizers.replay import Replay, Scalars

CPU = torch.device("cpu")
every = pytest.mark.parametrize("name", OPTIMIZERS)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Graph:
    """In place of CUDAGraph: replays by calling the maths on the tensors that it was recorded with.

    As on a GPU, recording itself changes no tensor.
    """

    recorded: list["Graph"] = []
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1
        self.call()


def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of the CPU: torch.cuda's names lead to them, and the slot believes it."""
    real, Graph.recorded, Graph.replays = Replay.__init__, [], 0
    recording: list[Graph] = []

    def init(self: Replay, maths: Callable) -> None:
        def watched(*inputs: object) -> None:
            if not recording:
                maths(*inputs)
                return
            weights, grads, state, group = inputs
            recording[-1].call = lambda: maths(weights, grads, dict(state), dict(group))

        real(self, watched)

    @contextmanager
    def graph(of: Graph, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert pool is not None and pool is Replay.pool and capture_error_mode == "thread_local"
        recording.append(of)
        yield
        Graph.recorded.append(recording.pop())

    monkeypatch.setattr(Replay, "__init__", init)
    monkeypatch.setattr(Replay, "pool", None)
    monkeypatch.setattr(Replay, "alive", WeakSet())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(MatrixOptimizer, "_records", lambda self, bucket: self.compiled)
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    fake(monkeypatch)
    return Graph


# ---- numbers -----------------------------------------------------------------------------------


def test_numbers_change_in_tensors_that_stay() -> None:
    scalars, names = Scalars(), ["lr", "momentum"]
    first = scalars.hold(dict(lr=0.1, momentum=0.9, polar="exact"), names, CPU)
    assert first.keys() == set(names) and first["lr"].shape == ()
    versions = {name: first[name]._version for name in names}
    again = scalars.hold(dict(lr=0.2, momentum=0.9), names, CPU)
    assert all(again[name] is first[name] for name in names)
    assert again["lr"].item() == pytest.approx(0.2) and first["lr"]._version > versions["lr"]
    assert first["momentum"]._version == versions["momentum"], "written though it was the same"


def test_a_tensor_may_be_a_number_and_is_read_each_time() -> None:
    scalars, lr = Scalars(), torch.tensor(0.5, dtype=torch.float64)
    held = scalars.hold(dict(lr=lr), ["lr"], CPU)["lr"]
    assert held is not lr and held.item() == 0.5
    lr.fill_(0.25)
    assert scalars.hold(dict(lr=lr), ["lr"], CPU)["lr"] is held and held.item() == 0.25
    for value in (0.5, torch.tensor(0.75), 0.5):  # 0.5 again: the tensor has been in between
        scalars.hold(dict(lr=value), ["lr"], CPU)
        assert held.item() == float(value)


def test_numbers_follow_their_parameters_to_another_device() -> None:
    scalars = Scalars()
    scalars.hold(dict(lr=0.5), ["lr"], torch.device("meta"))
    assert scalars.hold(dict(lr=0.5), ["lr"], CPU)["lr"].item() == 0.5


# ---- replay ------------------------------------------------------------------------------------


def descend(weights: Tensor, grads: Tensor, state: dict, group: dict) -> None:
    state["sum"] += grads
    weights -= group["lr"] * state["sum"] * group.get("times", 1)


def test_a_step_is_recorded_once_and_then_replayed_with_new_values(graphs: type[Graph]) -> None:
    weights, grads, state = (torch.zeros(2, 3, 4) for _ in range(3))
    replay, lr, expected = Replay(descend), torch.tensor(0.0), torch.zeros(2, 3, 4)
    for step in range(5):
        grads.copy_(tensor(2, 3, 4, seed=step))
        lr.fill_(1 / (step + 1))
        before = state.clone()
        replay(weights, grads, {"sum": state}, {"lr": lr, "times": 1})
        assert torch.equal(state, before + tensor(2, 3, 4, seed=step))
        expected -= lr * state
    assert (len(graphs.recorded), graphs.replays) == (1, 4)
    assert torch.equal(weights, expected) and weights.any()


def test_what_moved_or_changed_is_recorded_anew(graphs: type[Graph]) -> None:
    inputs = dict(
        weights=torch.zeros(1, 3, 4),
        grads=torch.ones(1, 3, 4),
        state={"sum": torch.zeros(1, 3, 4)},
        group={"lr": torch.tensor(0.5), "times": 1},
    )
    replay = Replay(descend)
    replay(**inputs)
    changes = [
        dict(weights=torch.zeros(1, 3, 4)),
        dict(grads=torch.full((1, 3, 4), 2.0)),
        dict(state={"sum": torch.zeros(1, 3, 4)}),
        dict(group={"lr": torch.tensor(0.5), "times": 1}),
        dict(group={"lr": inputs["group"]["lr"], "times": 2}),
    ]
    for count, change in enumerate(changes, 2):
        inputs |= change
        for _ in range(2):
            before, summed = inputs["weights"].clone(), inputs["state"]["sum"] + inputs["grads"]
            replay(**inputs)
            moved = before - inputs["weights"]
            assert torch.equal(inputs["state"]["sum"], summed)
            assert torch.equal(moved, summed * 0.5 * inputs["group"]["times"])
        assert (len(graphs.recorded), graphs.replays) == (count, count - 1)


def test_gradients_of_another_type_or_shape_are_recorded_anew(graphs: type[Graph]) -> None:
    """At one address, as in a buffer that many parts share: a graph would take them for what was
    there when it was recorded."""
    seen: list[tuple] = []
    replay = Replay(lambda weights, grads, *_: seen.append((grads.shape, grads.dtype)))
    room, weights = torch.zeros(24), torch.zeros(1, 3, 4)
    views = [room[:12].view(1, 3, 4), room.view(2, 3, 4), room.view(torch.bfloat16)[:12]]
    assert len({view.data_ptr() for view in views}) == 1
    for view in views:
        for _ in range(2):
            replay(weights, view, {}, {})
    assert seen == [(view.shape, view.dtype) for view in views for _ in range(2)]
    assert (len(graphs.recorded), graphs.replays) == (3, 3)


def test_a_recording_that_failed_is_not_replayed(
    graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the memory is full: an empty graph would skip the steps from then on."""
    inputs = torch.zeros(1, 3, 4), torch.ones(1, 3, 4), {"sum": torch.zeros(1, 3, 4)}, {"lr": 1.0}
    replay, works = Replay(descend), torch.cuda.graph

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(torch.cuda, "graph", full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            replay(*inputs)
    monkeypatch.setattr(torch.cuda, "graph", works)
    replay(*inputs)
    assert (len(graphs.recorded), graphs.replays) == (1, 0)
    assert torch.equal(inputs[0], torch.full((1, 3, 4), -6.0)), "each call is one step"


# ---- in the slot -------------------------------------------------------------------------------

SHAPES = [(12, 4)] * 5 + [(4, 12)] * 3 + [(6, 6)] * 2


def built(name: str, dtype: torch.dtype = torch.float32, **how: object) -> MatrixOptimizer:
    params = [torch.nn.Parameter(tensor(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]
    precise = dict(dtype=torch.float32) if "dtype" in OPTIMIZERS[name].defaults else {}
    return OPTIMIZERS[name](params, **precise, **how)


def steps(opt: MatrixOptimizer, first: int, last: int, rank: int = 0) -> list[Tensor]:
    params = opt.param_groups[0]["params"]
    for step in range(first, last):
        opt.param_groups[0]["lr"] = 0.1 / (step + 1)
        for i, p in enumerate(params):
            p.grad = tensor(*p.shape, seed=1000 * rank + 100 * step + i)
        opt.step()
    return [p.detach().clone() for p in params]


def restart(opt: MatrixOptimizer) -> None:
    with torch.no_grad():
        for i, p in enumerate(opt.param_groups[0]["params"]):
            p.copy_(tensor(*p.shape, seed=i))


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(found, expected, strict=True))


def addresses(opt: MatrixOptimizer) -> list[int]:
    """Of weights, state and staged gradients."""
    held = [t for b in opt._buckets for t in b.state.values()]
    held += [b.weights for b in opt._buckets if b.weights is not None]
    return [t.data_ptr() for t in (*held, *opt._staging.values())]


@every
def test_replayed_steps_are_the_steps_without_graphs(
    name: str, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "PART_BYTES", 2 * 48 * 4)
    monkeypatch.setattr(slot, "PARTS", 100)
    plain = steps(built(name, compile=False), 0, 4)
    assert not graphs.recorded
    opt = built(name, compile=True)
    assert agree(steps(opt, 0, 4), plain)
    assert (len(graphs.recorded), graphs.replays) == (6, 18), "one for each part"
    assert {b.params[0].shape: len(b.replays) for b in opt._buckets} == {
        (12, 4): 3,
        (4, 12): 2,
        (6, 6): 1,
    }


@pytest.mark.parametrize("share", [False, True])
@every
def test_a_reset_keeps_addresses_and_what_was_recorded(
    name: str, share: bool, graphs: type[Graph]
) -> None:
    """The trainer warms up, resets and starts the clock: recording would be inside it."""
    opt = built(name, compile=True, share_storage=share)
    steps(opt, 7, 8)
    count, held = len(graphs.recorded), addresses(opt)
    opt.reset()
    assert opt.state_dict()["state"] == {}, "as newly built"
    restart(opt)
    found = steps(opt, 0, 3)
    assert addresses(opt) == held and len(graphs.recorded) == count
    assert agree(found, steps(built(name, compile=True), 0, 3))


@every
def test_a_state_is_loaded_into_the_tensors_that_graphs_know(
    name: str, graphs: type[Graph]
) -> None:
    source = built(name, compile=False)
    steps(source, 0, 2)
    saved, start = source.state_dict(), [p.detach().clone() for p in source._parameters()]
    opt = built(name, compile=True)
    steps(opt, 7, 8)
    count, held = len(graphs.recorded), addresses(opt)
    opt.reset()
    opt.load_state_dict(saved)
    with torch.no_grad():
        for p, W in zip(opt._parameters(), start, strict=True):
            p.copy_(W)
    assert agree(steps(opt, 2, 4), steps(source, 2, 4))
    assert addresses(opt) == held and len(graphs.recorded) == count


def test_a_group_that_is_added_deals_anew_and_is_stepped(graphs: type[Graph]) -> None:
    opt = built("muon", compile=True)
    steps(opt, 0, 1)
    opt.reset()
    more = torch.nn.Parameter(tensor(40, 40))
    opt.add_param_group(dict(params=[more]))
    more.grad, before = tensor(40, 40, seed=1), more.detach().clone()
    assert not opt._staging, "it may be too small"
    steps(opt, 0, 2)
    assert not torch.equal(more, before) and len(graphs.recorded) == 3 + 4  # all read the new room


@pytest.mark.parametrize("share", [False, True])
def test_weights_that_were_moved_are_recorded_anew_if_they_share_storage(
    share: bool, graphs: type[Graph]
) -> None:
    opt, plain = (built("muon", compile=c, share_storage=share) for c in (True, False))
    for first in (0, 2):
        for p in (*opt._parameters(), *plain._parameters()):
            p.data = p.detach().clone()
        assert agree(steps(opt, first, first + 2), steps(plain, first, first + 2))
    assert len(graphs.recorded) == (6 if share else 3)


def test_without_graphs_nothing_is_copied_to_a_fixed_place() -> None:
    opt = built("muon")
    steps(opt, 0, 1)
    assert not opt._staging and not any(b.replays for b in opt._buckets)


def test_the_staging_buffers_hold_the_largest_part_and_all_parts_share_them(
    graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of all gradients would be 340 MB of the 124M model."""
    monkeypatch.setattr(slot, "PART_BYTES", 2 * 48 * 4)
    monkeypatch.setattr(slot, "PARTS", 100)
    opt = built("muon", compile=True)
    steps(opt, 0, 1)
    uses = ("weights", torch.float32, CPU), ("gradients", torch.float32, CPU)
    assert {place: len(room) for place, room in opt._staging.items()} == dict.fromkeys(uses, 2 * 48)
    buffer = opt._staging[uses[1]]
    read = {replay.known[1] for b in opt._buckets for replay in b.replays.values()}
    assert {address for address, _, _ in read} == {buffer.data_ptr()}
    assert {shape for _, shape, _ in read} == {(1, 12, 4), (2, 12, 4), (1, 4, 12), (2, 4, 12)} | {
        (2, 6, 6)
    }


def scattered(opt: MatrixOptimizer, step: int) -> list[Tensor]:
    """Sets gradients that are elsewhere in each step; of some, columns are neighbours in memory,
    others lie in a larger tensor."""
    for i, p in enumerate(opt._parameters()):
        grad = tensor(*p.shape, seed=100 * step + i).to(p.dtype)
        if (step + i) % 3 == 1:
            grad = grad.T.contiguous().T
        elif (step + i) % 3 == 2:
            grad = torch.cat([grad, grad], dim=1)[:, : p.size(1)]
        assert grad.is_contiguous() == ((step + i) % 3 == 0)
        p.grad = grad
    return [p.grad for p in opt._parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_replayed_steps_read_gradients_wherever_they_are(
    name: str, dtype: torch.dtype, graphs: type[Graph]
) -> None:
    """New tensors in each step, of any layout and type; one graph a part, which is never redone.

    They are staged in float32 or better, and a gradient that changed in place is read again.
    """
    plain, opt = (built(name, dtype, compile=flag) for flag in (False, True))
    kept, where = [], set()
    for step in range(4):
        for one in (plain, opt):
            grads = scattered(one, step)
            copies = [grad.clone() for grad in grads]
            one.step()
            assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))
            kept += grads  # so that the next are elsewhere
        where.add(tuple(grad.data_ptr() for grad in grads))
        assert agree(opt._parameters(), plain._parameters()), step
    assert len(where) == 4 and (len(graphs.recorded), graphs.replays) == (3, 9)
    wide = torch.promote_types(dtype, torch.float32)
    assert opt._staging.keys() == {("weights", dtype, CPU), ("gradients", wide, CPU)}
    for one in (plain, opt):
        for p in one._parameters():
            p.grad.mul_(-2)
        one.step()
    assert agree(opt._parameters(), plain._parameters()) and graphs.replays == 12


def test_parameters_of_mixed_types_are_staged_by_the_type_of_their_step(
    graphs: type[Graph],
) -> None:
    """bfloat16 and float32 matrices share float32 room, float64 has its own."""
    types = [torch.float32, torch.bfloat16, torch.float64, torch.bfloat16]
    ends = []
    for compile in (False, True):
        params = [torch.nn.Parameter(tensor(6, 4, seed=i).to(t)) for i, t in enumerate(types)]
        opt = Muon(params, lr=0.1, dtype=torch.float32, compile=compile)
        for step in range(3):
            scattered(opt, step)
            opt.step()
        ends.append([p.detach() for p in params])
    assert agree(ends[1], ends[0]) and [p.dtype for p in ends[1]] == types
    rooms = {t: len(room) for (use, t, _), room in opt._staging.items() if use == "gradients"}
    assert rooms == {torch.float32: 2 * 24, torch.float64: 24}
    assert (len(graphs.recorded), graphs.replays) == (3, 6)


# ---- several ranks -----------------------------------------------------------------------------


def summed(rank: int, size: int) -> dict:
    """Three steps of two ranks with graphs and without, and how many were recorded and replayed."""
    with pytest.MonkeyPatch.context() as patch:
        fake(patch)
        torch.distributed.init_process_group("gloo")
        plain = steps(built("muon", compile=False), 0, 3, rank)
        opt = built("muon", compile=True)
        steps(opt, 7, 8, rank)
        count = len(Graph.recorded)
        opt.reset()
        restart(opt)
        found = steps(opt, 0, 3, rank)
        parts = sum(len(b.replays) for b in opt._buckets)
        again = len(Graph.recorded) - count
        return dict(
            agree=agree(found, plain),
            parts=parts,
            recorded=count,
            again=again,
            replays=Graph.replays,
        )


def test_sums_of_two_ranks_are_replayed_though_each_step_has_new_ones(tmp_path: Path) -> None:
    """They are received in a new tensor each step, and staged as gradients are."""
    for found in on_ranks(2, summed, tmp_path, seconds=90):
        parts = found.pop("parts")
        assert found == dict(agree=True, recorded=parts, again=0, replays=3 * parts)


def test_the_default_is_a_graph_only_where_it_is_compiled_for_a_gpu() -> None:
    p = torch.nn.Parameter(tensor(4, 4))
    for compiled in (False, True):
        opt = Muon([p], compile=compiled)
        assert not opt._records(opt._buckets[0])


def test_when_all_graphs_are_gone_the_next_get_another_pool(monkeypatch) -> None:
    """CUDA's allocator refuses a pool that its last graph has left: the second model of a process
    failed to record its first step."""
    fake(monkeypatch)
    weights = torch.nn.Parameter(tensor(4, 4))
    weights.grad = torch.ones(4, 4)
    pools = []
    for _ in range(2):
        opt = Muon([weights], compile=True)
        opt.step()
        pools.append(Replay.pool)
        del opt
        Graph.recorded.clear()
        gc.collect()
    assert pools[0] is not pools[1]
