"""What the trainer does before its clock starts, and what it refuses there."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import shards_of
from test_replay import Graph, fake

import optimizers
import train_gpt
from models import world
from models.microbatch import Microbatches
from optimizers import OPTIMIZERS, Around, Muon
from records.log import parse_log

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    layers=1,
    width=64,
    head_dim=32,
    row_tokens=32,
    vocab_size=64,
    dtype="float32",
    wrap=True,
    batch_tokens=512,
    val_tokens=512,
    steps=2,
    val_every=1,
    target=1.0,
    device="cpu",
)


@pytest.fixture
def config(tmp_path: Path) -> train_gpt.Config:
    from data.shards import write_shard

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        tokens = torch.randint(0, 64, (2000,), generator=generator)
        write_shard(tmp_path / f"small_{split}_000000.bin", tokens.numpy())
    return train_gpt.Config(data=str(tmp_path), log=str(tmp_path / "log.txt"), **SMALL)


def trainer_of(config: train_gpt.Config) -> train_gpt.Trainer:
    alone = train_gpt.World(0, 1, torch.device("cpu"))
    return train_gpt.Trainer(config, alone, *shards_of(config))


def run(config: train_gpt.Config) -> str:
    trainer = trainer_of(config)
    trainer.warm_up()
    return trials(trainer)


def trials(trainer: train_gpt.Trainer) -> str:
    """Train all seeds; logs begin with a source of one line."""
    config = trainer.config
    paths = train_gpt.check_outputs(dataclasses.asdict(config))
    start = dict(script=ROOT / "train_gpt.py", source="source\n", argv=[])
    return train_gpt.run_trials(trainer, {}, paths, start)


def out_of_memory_above(rows_that_fit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    tried, real = [], Microbatches.backward

    def backward(self, tokens, *more):
        tried.append(self.rows)
        if self.rows > rows_that_fit:
            raise torch.OutOfMemoryError("simulated")
        return real(self, tokens, *more)

    monkeypatch.setattr(Microbatches, "backward", backward)
    return tried


def test_the_microbatch_shrinks_until_it_fits(config, monkeypatch):
    tried = out_of_memory_above(3, monkeypatch)
    trainer = trainer_of(config)
    trainer.warm_up()
    assert tried == [8, 4, 2] and trainer.microbatches.rows == 2


def test_only_kernels_that_need_no_new_compilation_try_more_than_the_usual_rows(
    config, monkeypatch
):
    """A GPU without them would compile for 256 rows, run out of memory, and compile again."""
    tried = out_of_memory_above(0, monkeypatch)
    for obstacle in ("device cpu", ""):
        monkeypatch.setattr(train_gpt, "trunk_obstacle", lambda *_, why=obstacle: why)
        trainer = trainer_of(dataclasses.replace(config, row_tokens=4, batch_tokens=1024))
        assert trainer.model.fused == (not obstacle)
        with pytest.raises(ValueError, match="1 rows do not fit"):
            trainer.microbatches.settle(trainer.val[:1])
    assert tried == [8, 4, 2, 1, 256, 128, 64, 32, 16, 8, 4, 2, 1]


def noted(method: Callable, calls: list[str]) -> Callable:
    def call(*args, **how):
        calls.append(method.__name__)
        return method(*args, **how)

    return call


def test_the_models_kernels_are_asked_for_before_the_optimizer_compiles(config, monkeypatch):
    order = []

    @contextlib.contextmanager
    def ahead(device, work):
        order.append(device.type)
        work()
        yield
        order.append("waited for")

    monkeypatch.setattr(train_gpt, "compiled_ahead", ahead)
    trainer = trainer_of(config)
    for owner, name in ((trainer.microbatches, "backward"), (trainer.optimizer, "step")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), order))
    trainer.warm_up()
    assert order == ["cpu", "backward", "step", "waited for", "backward"]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_rows_that_were_asked_for_are_never_replaced_by_fewer(config, monkeypatch):
    out_of_memory_above(3, monkeypatch)
    with pytest.raises(ValueError, match="4 rows do not fit"):
        trainer_of(dataclasses.replace(config, rows=4)).warm_up()


def test_a_parameter_without_gradient_is_named_before_the_run(config, monkeypatch):
    monkeypatch.setattr(train_gpt.MLP, "forward", lambda self, x: self.proj(self.fc(x).detach()))
    with pytest.raises(ValueError, match="blocks.0.norm2.gain has no gradient"):
        trainer_of(config).warm_up()


def test_techniques_hear_of_each_forward_pass_and_of_each_validation(config, monkeypatch):
    """before_forward and readout are the seam of look-ahead methods and of weight averages."""
    heard = []

    class Listener(Around):
        def before_forward(self, weights, state, step):
            heard.append(f"forward {step}")

        def after_step(self, weights, state, step):
            heard.append(f"after {step}")

        def readout(self, weights, state):
            heard.append("readout")
            return super().readout(weights, state)

    class Listening(Muon):
        around = (Listener(),)

    monkeypatch.setitem(OPTIMIZERS, "listening", Listening)
    assert run(dataclasses.replace(config, optimizer="listening")) == "complete"
    warm_up = ["after 0", "forward 0", "readout"]
    steps = [f"readout forward {step} after {step}" for step in (0, 1)]
    assert " ".join(heard) == " ".join([*warm_up, *steps, "readout"])


def test_ranks_that_differ_in_one_bit_are_seen_and_fail_the_run(config, monkeypatch):
    def all_reduce(self, tensor, op="SUM"):
        """As if another rank held a parameter whose bits add up to one more."""
        return tensor + (op == "MAX") if tensor.dtype == torch.int64 and tensor.ndim else tensor

    trainer = trainer_of(config)
    weights = list(trainer.model.parameters())
    assert trainer.world.same(weights)
    monkeypatch.setattr(train_gpt.World, "all_reduce", all_reduce)
    assert not trainer.world.same(weights)
    assert run(config) == "ranks hold different parameters"
    assert parse_log(Path(config.log)).status == "ranks hold different parameters"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_of_a_run_replay_what_the_warm_up_recorded(name, config, monkeypatch):
    """Both trials too: recording is not for the clock. Graphs are simulated, see test_replay.py."""
    fake(monkeypatch)
    trainer = trainer_of(dataclasses.replace(config, optimizer=name, trials=2))
    trainer.optimizer.matrix.compiled = True
    trainer.warm_up()
    count = len(Graph.recorded)
    assert trials(trainer) == "complete"
    assert len(Graph.recorded) == count > 0
    assert Graph.replays == 2 * config.steps * count


def test_the_log_of_a_run_that_diverged_can_be_parsed(config):
    status = run(dataclasses.replace(config, lr_scale=1e30))
    log = parse_log(Path(config.log))
    assert re.fullmatch(r"non-finite loss at step [12]", status) and log.status == status


def test_the_optimizer_of_the_readme_trains(config, monkeypatch):
    """An optimizer has only its own hyperparameters: once the trainer insisted on a dtype."""
    source = re.search(r"```python\n(class Cubic.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    scope = {name: getattr(optimizers, name) for name in optimizers.__all__}
    exec(source, scope)
    monkeypatch.setitem(OPTIMIZERS, "cubic", scope["CubicMuon"])
    assert run(dataclasses.replace(config, optimizer="cubic")) == "complete"
    first, *_, last = parse_log(Path(config.log)).points
    assert last.val_loss < first.val_loss


def test_more_processes_than_gpus_is_an_error_and_no_reason_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="8 processes for 4 GPUs"):
        world.choose_device("")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="cuda.*does not work"):  # this torch has no CUDA
        world.choose_device("")
