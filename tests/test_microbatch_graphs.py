"""models/graphs.py and microbatch.py on the CPU: a stand-in replaces CUDA's graphs."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_warm_up
import torch
import torch.distributed as dist
from conftest import on_ranks, shards_of
from test_warm_up import trainer_of, trials
from torch import Tensor, nn

import train_gpt
from data.loader import train_batches
from models.graphs import MicrobatchGraphs
from optimizers import ModelOptimizer

config = test_warm_up.config  # a fixture
ROWS = 16  # of a step of it
COUNTS = pytest.mark.parametrize("count", [1, 2, 4])


class Graph:
    """In place of CUDAGraph: replays by running the model on the memory that it was recorded with.

    As on a GPU, recording computes nothing: what it would write holds NaN. A replay sees no
    attribute of a parameter or of the class, only the memory that these were at when recorded.
    """

    recorded: list["Graph"] = []
    replays: list[str] = []

    def capture(self, of: MicrobatchGraphs, run: Callable) -> None:
        assert not of.graphs and not of.grads, "the memory of those before is not free"
        self.of, self.run = of, run
        self.weights, before = [p.data for p in of.params], [p.grad for p in of.params]
        self.kind = "first" if all(grad is None for grad in before) else "more"
        run()
        self.held = [tensor.detach() for tensor in (of.inputs, of.targets, of.total)]
        self.grads = [p.grad for p in of.params]
        assert self.kind == "first" or all(a is b for a, b in zip(before, self.grads, strict=True))
        for grad in (*self.grads, of.total):
            grad.fill_(torch.nan)
        Graph.recorded.append(self)

    def replay(self) -> None:
        of, adds = self.of, self.kind == "more"
        now = [(p.data, p.grad) for p in of.params], (of.inputs, of.targets, of.total)
        of.inputs, of.targets, of.total = self.held
        for p, weight, grad in zip(of.params, self.weights, self.grads, strict=True):
            p.data, p.grad = weight, grad if adds else None
        self.run()
        for p, grad, (weight, current) in zip(of.params, self.grads, now[0], strict=True):
            grad.copy_(p.grad)
            p.data, p.grad = weight, current
        of.inputs, of.targets, of.total = now[1]
        Graph.replays.append(self.kind)


class Stream:
    """Says who waits for whom; `at` is where kernels are launched now."""

    at: list["Stream"] = []
    events: list[tuple] = []

    def wait_stream(self, other: "Stream") -> None:
        Stream.events.append(("wait", self, other))


def fake(patch: pytest.MonkeyPatch) -> None:
    """Graphs of the CPU: torch.cuda's names lead to them, and all microbatches are worth one."""
    real, pools, recording = MicrobatchGraphs.run, [], []
    Graph.recorded, Graph.replays, Stream.at, Stream.events = [], [], [Stream()], []

    def run(self: MicrobatchGraphs) -> None:
        Stream.events.append(("run", Stream.at[-1]))
        if recording:
            recording[-1].capture(self, lambda: real(self))
        else:
            real(self)

    @contextmanager
    def stream(of: Stream) -> Iterator[None]:
        Stream.at.append(of)
        yield
        Stream.at.pop()

    @contextmanager
    def graph(of: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert pool is pools[-1] and capture_error_mode == "thread_local"
        recording.append(of)
        with torch.cuda.stream(stream):
            yield
        recording.pop()

    patch.setattr(MicrobatchGraphs, "run", run)
    patch.setattr(MicrobatchGraphs, "worth", lambda shape, device: True)
    names = dict(
        CUDAGraph=Graph,
        graph=graph,
        Stream=Stream,
        stream=stream,
        current_stream=lambda: Stream.at[-1],
        reset_peak_memory_stats=lambda: None,
        graph_pool_handle=lambda: pools.append(object()) or pools[-1],
    )
    for name, value in names.items():
        patch.setattr(torch.cuda, name, value)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    fake(monkeypatch)
    return Graph


class Model(nn.Module):
    """Two parameters, of which one gradient is a part of what the other's is a part of."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        weights = torch.randn(2, 7, 5, generator=draws)
        self.a, self.b = (nn.Parameter(w.clone()) for w in weights)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        both = torch.stack([self.a, self.b])
        return (both[0][inputs] * both[1][targets]).sin().sum()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(0, 7, (2, 3, 4), generator=draws)
    return inputs, targets


def eager(model: Model, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """The summed loss and its gradients; the model keeps the gradients that it has."""
    copy = Model()
    copy.load_state_dict(model.state_dict())
    total = torch.zeros(())
    for inputs, targets in batches:
        (loss := copy(inputs, targets)).backward()
        total += loss.detach()
    return total, [p.grad for p in copy.parameters()]


def gradients_of(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- the class ---------------------------------------------------------------------------------


def recorded(model: Model) -> MicrobatchGraphs:
    found = MicrobatchGraphs(model, (3, 4))
    found.record()
    return found


def test_recording_leaves_weights_as_they_are_and_no_gradients(graphs: type[Graph]) -> None:
    model = Model()
    model.a.grad = given = torch.ones(7, 5)
    recorded(model)
    assert torch.equal(given, torch.ones(7, 5))
    assert agree(list(model.parameters()), list(Model().parameters()))
    assert gradients_of(model) == [None, None]
    assert [graph.kind for graph in graphs.recorded] == ["first", "more"] and not graphs.replays


def test_what_records_has_run_on_its_stream_and_the_streams_wait_for_each_other(
    graphs: type[Graph],
) -> None:
    usual = Stream.at[0]
    side = recorded(Model()).stream
    assert Stream.events == [
        ("wait", side, usual),
        ("run", side),
        ("wait", usual, side),
        ("run", side),
        ("run", side),
    ]
    assert side is not usual and Stream.at == [usual]


@COUNTS
def test_gradients_are_those_of_the_step_and_not_added_to_the_step_before(
    graphs: type[Graph], count: int
) -> None:
    model = Model()
    replayed, losses, places = recorded(model), [], set()
    for step in range(4):
        batches = [batch(10 * step + i) for i in range(count)]
        expected = eager(model, batches)
        losses.append((replayed.gradients(batches), expected[0]))
        assert agree(gradients_of(model), expected[1])
        places.add(tuple(grad.data_ptr() for grad in gradients_of(model)))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in losses), "a loss was written over by a later step"
    assert len(places) == 1 and len(graphs.recorded) == 2
    assert graphs.replays == (["first"] + ["more"] * (count - 1)) * 4


def test_gradients_that_a_replay_would_write_over_are_refused(graphs: type[Graph]) -> None:
    model = Model()
    replayed = recorded(model)
    model.b.grad = torch.ones(7, 5)
    for _ in range(2):
        with pytest.raises(AssertionError, match="would not add to these gradients"):
            replayed.gradients([batch(0)])
        assert not graphs.replays and torch.equal(model.b.grad, torch.ones(7, 5))
        model.a.data = model.a.detach().clone()  # nor does recording anew drop them


def test_a_microbatch_of_another_shape_is_refused(graphs: type[Graph]) -> None:
    """One row would be copied into all."""
    replayed = recorded(Model())
    inputs, targets = batch(0)
    for pair in ((inputs[:1], targets), (inputs, targets[:1])):
        with pytest.raises(AssertionError, match="another shape"):
            replayed.gradients([pair])
    assert not graphs.replays


def test_a_parameter_that_moved_is_recorded_anew(graphs: type[Graph]) -> None:
    model = Model()
    replayed = recorded(model)
    for moves in range(3):
        for _ in range(2):
            with torch.no_grad():
                model.b += 1
            expected = eager(model, [batch(1), batch(2)])
            assert torch.equal(replayed.gradients([batch(1), batch(2)]), expected[0])
            assert agree(gradients_of(model), expected[1])
            assert len(graphs.recorded) == 2 + 2 * moves
            model.zero_grad()
        model.b.data = model.b.detach().clone()


def test_a_recording_that_failed_is_not_replayed(
    graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the memory is full while it is recorded anew: an empty graph computes nothing."""
    model, works = Model(), torch.cuda.graph
    replayed = recorded(model)
    model.a.data = model.a.detach().clone()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(torch.cuda, "graph", full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            replayed.gradients([batch(0)])
    monkeypatch.setattr(torch.cuda, "graph", works)
    assert torch.equal(replayed.gradients([batch(0)]), eager(model, [batch(0)])[0])


# ---- in the trainer ----------------------------------------------------------------------------

Config = train_gpt.Config


def trained(
    config: Config, steps: int = 5, between: Callable = lambda trainer, step: None
) -> tuple[list[Tensor], list[Tensor], train_gpt.Trainer]:
    """Losses of the steps, and the weights after them."""
    trainer = trainer_of(config)
    trainer.warm_up()
    trainer.reset(1)
    batches = train_batches(trainer.shards, config.batch_tokens, 0, 1)
    losses = []
    for step in range(steps):
        between(trainer, step)
        losses.append(trainer.step(step, next(batches)))
    return losses, [p.detach().clone() for p in trainer.model.parameters()], trainer


def plainly(config: Config, **how: object) -> tuple[list[Tensor], list[Tensor]]:
    """The same without graphs."""
    *found, trainer = trained(dataclasses.replace(config, compile=False), **how)
    assert trainer.microbatches.graphs is None
    return found


@COUNTS
def test_replayed_steps_are_the_steps_without_graphs(
    count: int, config: Config, graphs: type[Graph]
) -> None:
    """Losses and weights, bit for bit."""
    config = dataclasses.replace(config, rows=ROWS // count, steps=8)
    expected = plainly(config)
    assert not graphs.recorded
    *found, trainer = trained(config)
    assert agree(found[0], expected[0]) and agree(found[1], expected[1])
    assert len({loss.item() for loss in found[0]}) == 5, "the same loss again and again"
    assert len(graphs.recorded) == 2 and len(graphs.replays) == 5 * count


def test_weights_that_were_loaded_or_moved_are_those_that_replays_use(
    config: Config, graphs: type[Graph]
) -> None:
    """A checkpoint is loaded in place. The slot brings moved matrices back, to another place."""
    config = dataclasses.replace(config, steps=8)
    saved = {}

    def between(trainer: train_gpt.Trainer, step: int) -> None:
        if step == 1:
            for name in ("model", "optimizer"):
                state = getattr(trainer, name).state_dict()
                saved[name] = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, state)
        if step == 3:
            for name, state in saved.items():
                getattr(trainer, name).load_state_dict(state)
        if step == 5:
            for p in trainer.model.parameters():
                p.data = p.detach().clone()

    expected = plainly(config, steps=7, between=between)
    *found, trainer = trained(config, steps=7, between=between)
    assert agree(found[0], expected[0]) and agree(found[1], expected[1])
    assert len(graphs.recorded) == 2 * 3, "at first, when all moved, and when matrices moved back"


@COUNTS
def test_only_steps_without_graphs_announce_their_last_backward_pass(
    count: int, config: Config, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks that it sets do not run in a replay."""
    heard = []
    monkeypatch.setattr(ModelOptimizer, "before_last_backward", lambda self: heard.append(None))
    config = dataclasses.replace(config, rows=ROWS // count)
    trained(config, steps=2)
    assert not heard
    plainly(config, steps=2)
    assert len(heard) == 2


def test_small_microbatches_are_worth_a_graph_and_only_on_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worth, cuda, capability = MicrobatchGraphs.worth, torch.device("cuda"), [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    assert [worth((rows, 1024), cuda) for rows in (1, 16, 17, 64)] == [True, True, False, False]
    assert [worth((rows, 256), cuda) for rows in (64, 65)] == [True, False]
    assert not any(worth((1, 1), torch.device(kind)) for kind in ("cpu", "mps"))
    capability[0] = 8
    assert not worth((1, 1), cuda)


def test_the_trainer_asks_for_its_microbatch_on_its_device(
    config: Config, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(MicrobatchGraphs, "worth", lambda *args: asked.append(args))
    *_, trainer = trained(dataclasses.replace(config, rows=4), steps=1)
    assert asked == [((4, config.row_tokens), torch.device("cpu"))]
    assert trainer.microbatches.graphs is None
    assert not graphs.recorded


def test_nothing_is_recorded_on_the_cpu(config: Config) -> None:
    """With the real torch.cuda, which would fail."""
    assert trained(config, steps=1)[-1].microbatches.graphs is None


def test_recording_is_part_of_the_warm_up_and_serves_all_trials(
    config: Config, graphs: type[Graph]
) -> None:
    trainer = trainer_of(dataclasses.replace(config, trials=2))
    trainer.warm_up()
    assert len(graphs.recorded) == 2 and not graphs.replays
    assert not any(p.grad is not None for p in trainer.model.parameters())
    assert trials(trainer) == "complete"
    assert len(graphs.recorded) == 2
    timed = 2  # one microbatch of each trial, for the expected time
    assert len(graphs.replays) == 2 * config.steps * ROWS // trainer.microbatches.rows + timed


def test_the_peak_of_the_memory_counts_what_was_recorded(
    config: Config, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between replays a graph's memory is not counted as allocated, though no one else has it."""
    resets = []

    def reset() -> None:
        resets.append(len(Graph.recorded))

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    for compiled, expected in ((True, [0]), (False, [2])):
        trainer = trainer_of(dataclasses.replace(config, compile=compiled))
        trainer.warm_up()
        trainer.world.device = SimpleNamespace(type="cuda")
        trainer.reset(1)
        assert resets == expected
        resets.clear()


@pytest.mark.parametrize("here", [True, False])
def test_where_one_rank_lacks_the_memory_none_has_graphs(
    here: bool, config: Config, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, works, agreed = plainly(config), torch.cuda.graph, train_gpt.World.all_reduce

    def graph(of: Graph, **how: object) -> object:
        if here and Graph.recorded:
            raise torch.OutOfMemoryError("simulated")
        return works(of, **how)

    def all_reduce(self: train_gpt.World, tensor: Tensor, op: str = "SUM") -> Tensor:
        other = torch.zeros(()) if op == "MIN" and Graph.recorded and not here else tensor
        return agreed(self, torch.minimum(tensor, other), op)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(train_gpt.World, "all_reduce", all_reduce)
    *found, trainer = trained(config)
    assert trainer.microbatches.graphs is None and len(graphs.recorded) == (1 if here else 2)
    assert agree(found[0], expected[0]) and agree(found[1], expected[1]) and not graphs.replays


def test_graphs_beside_which_no_validation_fits_are_dropped(
    config: Config, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they keep, eager code cannot use: the first validation ended the run."""
    expected, forward, lacks = plainly(config), train_gpt.GPT.forward, [True]

    def tight(self: train_gpt.GPT, *batch: Tensor) -> Tensor:
        if graphs.recorded and lacks and not torch.is_grad_enabled():
            lacks.pop()
            raise torch.OutOfMemoryError("simulated")
        return forward(self, *batch)

    monkeypatch.setattr(train_gpt.GPT, "forward", tight)
    *found, trainer = trained(config)
    assert trainer.microbatches.graphs is None and len(graphs.recorded) == 2 and not lacks
    assert agree(found[0], expected[0]) and agree(found[1], expected[1]) and not graphs.replays


def watch(patch: pytest.MonkeyPatch, trainer: train_gpt.Trainer, events: list[str]) -> None:
    """Write down what is summed over ranks, in the order of the launches."""
    model = trainer.model
    found = dict(head=model.head.weight, embed=model.embed.weight)
    scatters = [n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n)]

    def noting(name: str) -> Callable:
        real = getattr(dist, name)

        def call(*args: Tensor, **options: object) -> object:
            sent = [n for n, p in found.items() if args[0] is p.grad]
            events.append("matrices" if name in scatters else sent[0] if sent else "vectors")
            return real(*args, **options)

        return call

    for name in ("all_reduce", *scatters):
        patch.setattr(dist, name, noting(name))


def both_ways(
    rank: int, size: int, config: Config
) -> Iterator[tuple[pytest.MonkeyPatch, train_gpt.Trainer, Iterator[Tensor]]]:
    """A rank's trainer, ready, and its batches: without graphs, then with them."""
    world = train_gpt.World(rank, size, torch.device("cpu"))
    for replayed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            fake(patch)
            mine = dataclasses.replace(config, compile=replayed, steps=8)
            trainer = train_gpt.Trainer(mine, world, *shards_of(mine))
            trainer.warm_up()
            trainer.reset(1)
            yield patch, trainer, train_batches(trainer.shards, mine.batch_tokens, rank, size)


def sums_of_a_step(rank: int, size: int, config: Config) -> list[list[str]]:
    """What is summed over ranks in one step, in order, without graphs and with them."""
    found = []
    for patch, trainer, batches in both_ways(rank, size, config):
        patch.setattr(train_gpt, "measures", lambda step, config: False)  # its norms are summed
        trainer.step(0, next(batches))
        found.append([])
        watch(patch, trainer, found[-1])
        trainer.step(1, next(batches))
    return found


def test_the_heads_gradient_is_summed_once_and_first_where_hooks_run(
    config: Config, tmp_path: Path
) -> None:
    """It waited for the whole backward pass, whose first gradient it is."""
    for plain, replayed in on_ranks(2, sums_of_a_step, tmp_path / "ranks", config):
        assert plain == replayed, "all ranks launch in one order, with hooks or without"
        assert plain[0] == "head" and plain[-2:] == ["vectors", "embed"] and len(plain) > 3
        assert set(plain[1:-2]) == {"matrices"}


def three_steps(rank: int, size: int, config: Config) -> list[tuple]:
    """Losses of three steps of a rank, the weights after them and how many replays they took."""
    found = []
    for _, trainer, batches in both_ways(rank, size, config):
        losses = [trainer.step(step, next(batches)).item() for step in range(3)]
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        found.append((losses, weights, len(Graph.replays)))
    return found


def test_two_ranks_train_as_without_graphs(config: Config, tmp_path: Path) -> None:
    """All reductions are then launched by the step itself."""
    for plainly, replayed in on_ranks(2, three_steps, tmp_path / "ranks", config):
        (plain, expected, none), (losses, weights, replays) = plainly, replayed
        assert losses == plain and agree(weights, expected) and (none, replays) == (0, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs are faked above")
@pytest.mark.parametrize("fp8", [False, True])
def test_on_a_gpu_replays_give_what_eager_code_gives(fp8: bool) -> None:
    """As near as two eager runs are to each other, whose attention sums in any order, and another
    way of cuBLAS to split a sum: 1e-4 on an H100."""
    config, device = train_gpt.Config(fp8=fp8, layers=2), torch.device("cuda", 0)
    model = train_gpt.build_model(config, device)
    model.initialise(1)
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.02)  # zeros would hide gradients
    shape, count = (8, config.row_tokens), config.vocab_size
    steps = [
        [torch.randint(count, (2, *shape), device=device).unbind() for _ in range(n)]
        for n in (1, 2, 4, 1)
    ]

    def gradients() -> list[Tensor]:
        found = [p.grad.clone().float() for p in model.parameters()]
        model.zero_grad()
        return found

    def eager(batches: list) -> list[Tensor]:
        for batch in batches:
            model(*batch).backward()
        return gradients()

    expected = [(eager(batches), eager(batches)) for batches in steps]
    graphs = MicrobatchGraphs(model, shape)
    graphs.record()
    for batches, (once, again) in zip(steps, expected, strict=True):
        assert graphs.gradients(batches).isfinite()
        for a, b, c in zip(gradients(), once, again, strict=True):
            assert (a - b).norm() <= 3 * (b - c).norm() + 5e-4 * b.norm()
