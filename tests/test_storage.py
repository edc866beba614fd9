"""Weights of other people's models stay where they are: storage, ties, views, shared memory.

accelerate and safetensors keep one weight for each storage; the slot had put all equal shapes into
one. Each program below ran with torch.optim.Muon and not with the slot.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import on_ranks
from torch import Tensor, nn

from optimizers import OPTIMIZERS, MatrixOptimizer, Muon

every = pytest.mark.parametrize("name", OPTIMIZERS)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(count)))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        model(tensor(4, 16, seed=step)).square().sum().backward()
        opt.step()
        opt.zero_grad()


def storages(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Address, address of the storage and its bytes, by name."""
    return {
        name: (p.data_ptr(), p.untyped_storage().data_ptr(), p.untyped_storage().nbytes())
        for name, p in model.named_parameters()
    }


@every
def test_a_step_leaves_every_parameter_in_its_own_storage(name: str) -> None:
    model = layers()
    before, start = storages(model), [p.detach().clone() for p in model.parameters()]
    train(model, OPTIMIZERS[name](model.parameters()))
    assert storages(model) == before
    assert all(size == 16 * 16 * 4 for _, _, size in before.values())
    assert not any(torch.equal(p, W) for p, W in zip(model.parameters(), start, strict=True))


def two_steps(share: bool, compile: bool = False, name: str = "aurora") -> list[Tensor]:
    params = [nn.Parameter(tensor(12, 4, seed=i)) for i in range(5)]
    opt = OPTIMIZERS[name](params, share_storage=share, compile=compile)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = tensor(12, 4, seed=10 * step + i)
        opt.step()
    return [p.detach() for p in params]


@every
def test_sharing_storage_changes_no_bit(name: str) -> None:
    pairs = zip(two_steps(True, name=name), two_steps(False, name=name), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def stepped_on_ranks(rank: int, size: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for share in (False, True):
        model = layers(5)
        before = storages(model)
        train(model, Muon(model.parameters(), reduce=False, share_storage=share))
        found[f"weights {share}"] = [p.detach().clone() for p in model.parameters()]
        found[f"stay {share}"] = storages(model) == before
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_weights_that_are_gathered_stay_in_their_storage_too(size: int, tmp_path) -> None:
    """5 matrices, so that ranks own different numbers of them."""
    model = layers(5)
    train(model, Muon(model.parameters()))
    for found in on_ranks(size, stepped_on_ranks, tmp_path):
        assert found["stay False"] and not found["stay True"]
        for key in ("weights False", "weights True"):
            for a, b in zip(found[key], model.parameters(), strict=True):
                assert (a - b).norm() < 1e-5 * b.norm()


def test_no_copy_of_the_weights_is_kept_between_steps() -> None:
    model = layers()
    opt = Muon(model.parameters())
    train(model, opt)
    assert all(b.weights is None and not b.cells for b in opt._buckets) and not opt._staging


def test_tied_weights_stay_tied_and_are_stepped_once() -> None:
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    opt = Muon(model.parameters())
    model(tensor(4, 8)).sum().backward()
    opt.step()
    assert a.weight is b.weight and len(opt.state_dict()["state"]) == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole[:8],  # rows of a larger tensor
        lambda whole: whole[:, 4:12],  # columns: strided
        lambda whole: whole.T[:8],  # transposed
        lambda whole: whole.view(-1)[64:128].view(8, 8),  # a flat buffer, as DDP and FSDP1 make
    ],
    ids=["rows", "columns", "transposed", "flat"],
)
def test_a_parameter_that_is_a_view_writes_through(view) -> None:
    whole = tensor(16, 16)
    p, plain = nn.Parameter(view(whole)), nn.Parameter(view(whole).contiguous().clone())
    for some in (p, plain):
        some.grad = tensor(*some.shape, seed=1)
        Muon([some]).step()
    assert torch.equal(view(whole), p.detach()) and torch.equal(p, plain)
    assert not torch.equal(whole, tensor(16, 16))


def test_an_alias_made_before_the_first_step_sees_every_step() -> None:
    """Averages, EMA copies by reference, torch.func's dictionaries, numpy arrays of weights."""
    model = layers(2)
    aliases = {name: p.detach() for name, p in model.named_parameters()}
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    train(model, Muon(model.parameters()))
    for name, p in model.named_parameters():
        assert torch.equal(aliases[name], p) and torch.equal(torch.from_numpy(arrays[name]), p)


def look(weight: Tensor, gate: Any, answers: Any) -> None:
    gate.wait(60)
    answers.put(weight.detach().double().sum().item())


def test_another_process_sees_the_steps_in_shared_memory() -> None:
    model = layers(1).share_memory()
    opt, context = Muon(model.parameters(), lr=0.5), mp.get_context("fork")
    answers, gate = context.SimpleQueue(), context.Event()
    other = context.Process(target=look, args=(model[0].weight, gate, answers))
    other.start()
    train(model, opt, steps=1)
    gate.set()
    found = answers.get()
    other.join(60)
    assert found == model[0].weight.double().sum().item() and model[0].weight.is_shared()


def test_one_parameter_is_saved_without_the_others(tmp_path) -> None:
    model = layers()
    train(model, Muon(model.parameters()))
    torch.save(model[0].weight, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 2 * 16 * 16 * 4 + 2000


def test_safetensors_writes_all_weights(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, other = layers(), layers()
    train(model, Muon(model.parameters()))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_accelerate_writes_all_weights(tmp_path) -> None:
    """Of four layers it wrote one."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from safetensors.torch import load_file

    accelerator = accelerate.Accelerator(cpu=True)
    model = layers()
    model, opt = accelerator.prepare(model, Muon(model.parameters()))
    accelerator.backward(model(tensor(4, 16)).square().sum())
    opt.step()
    accelerator.save_model(model, tmp_path / "a")
    accelerator.save_state(tmp_path / "b")
    for folder in ("a", "b"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert len(saved) == 4
        for name, p in model.named_parameters():
            assert torch.equal(saved[name], p)


def test_the_trainers_optimizer_shares_storage() -> None:
    """It stays as fast as it was: updates and gathers happen in place."""
    from optimizers import ModelOptimizer

    p, q = nn.Parameter(tensor(8, 4)), nn.Parameter(tensor(3))
    groups = [dict(name="a", neuron_axis=0, params=[p]), dict(name="b", params=[q])]
    opt = ModelOptimizer(groups, "muon", Muon, {}, 10, {})
    assert isinstance(opt.matrix, MatrixOptimizer) and opt.matrix.share_storage
