"""State where torch looks for it: opt.state, and torch.distributed.checkpoint on 1 to 4 ranks.

The helpers of torch.distributed.checkpoint take an optimizer whose `state` is empty for one that
was never stepped, and step it with gradients of 0 and lr 0. Here `state` was always empty: momentum
shrank by 5% in every save.
"""

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optimizers import OPTIMIZERS, Muon, ranks
from optimizers.slot import MatrixOptimizer

every = pytest.mark.parametrize("name", OPTIMIZERS)
WAYS = {
    "plain": dict(),
    "full": dict(full_state_dict=True),
    "offloaded": dict(full_state_dict=True, cpu_offload=True),
    "flat": dict(flatten_optimizer_state_dict=True),
}  # flat and full together fail in torch 2.13, with its own optimizers too


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Three shapes, one of them once only: of four ranks some own nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(6, 24, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 6, bias=False) for _ in range(3))
        self.out = nn.Linear(6, 6, bias=False)


def built(name: str, **how: Any) -> tuple[Net, MatrixOptimizer]:
    net = Net()
    groups = [
        dict(params=net.up.parameters(), neuron_axis=0, lr=0.03),
        dict(params=net.down.parameters(), neuron_axis=1),
        dict(params=net.out.parameters(), neuron_axis=None),
    ]
    precise = dict(dtype=torch.float32) if "dtype" in OPTIMIZERS[name].defaults else {}
    return net, OPTIMIZERS[name](groups, reduce=False, **precise, **how)


def steps(net: Net, opt: MatrixOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for i, p in enumerate(net.parameters()):
            p.grad = tensor(*p.shape, seed=100 * step + i)
        opt.step()
        opt.zero_grad()


def same(a: Any, b: Any) -> bool:
    """Equal nests, tensors bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


# ---- opt.state ---------------------------------------------------------------------------------


@every
def test_opt_state_is_the_state_of_each_parameter(name: str) -> None:
    net, opt = built(name)
    steps(net, opt, 0, 2)
    saved = opt.state_dict()["state"]
    assert set(opt.state) == set(net.parameters())
    for i, p in enumerate(net.parameters()):
        assert same(dict(opt.state[p]), saved[i])
    steps(net, opt, 2, 3)
    assert not same(dict(opt.state[net.out.weight]), saved[6]), "it is no copy"


def owned_bytes(rank: int, size: int) -> tuple[int, list[set[str]], list[int]]:
    dist.init_process_group("gloo")
    net, opt = built("muon")
    steps(net, opt, 0, 1)
    names = [set(opt.state[p]) for p in net.parameters()]
    sizes = [sum(v.nbytes for v in opt.state[p].values()) for p in net.parameters()]
    return sum(sizes), names, [n for n in sizes if n]


def test_each_rank_shows_its_own_state_and_the_names_of_all(tmp_path: Path) -> None:
    found = on_ranks(3, owned_bytes, tmp_path)
    assert sum(total for total, _, _ in found) == sum(4 * p.numel() for p in Net().parameters())
    assert all(names == [{"momentum"}] * 7 for _, names, _ in found)
    assert all(0 < len(own) < 7 for _, _, own in found)


MOVES = {
    "to the CPU and back": lambda s: {k: v.to("cpu", copy=True) for k, v in s.items()},
    "by .data": lambda s: [setattr(v, "data", v.data.clone()) for v in s.values()] and s,
    "replaced by copies": lambda s: copy.deepcopy(dict(s)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@every
def test_state_that_others_move_elsewhere_is_used_from_there(name: str, move: Any) -> None:
    """As libraries do that keep it off the GPU between steps."""
    (net, opt), (plain, control) = built(name), built(name)
    for step in range(4):
        steps(net, opt, step, step + 1)
        steps(plain, control, step, step + 1)
        for p in net.parameters():
            opt.state[p] = move(opt.state[p])
    assert same(weights(net), weights(plain))
    assert same(opt.state_dict(), control.state_dict())


def test_state_that_others_change_is_used_by_the_next_step() -> None:
    (net, opt), (plain, control) = built("muon"), built("muon")
    steps(net, opt, 0, 2)
    steps(plain, control, 0, 2)
    saved = control.state_dict()
    for i, p in enumerate(net.parameters()):
        opt.state[p]["momentum"] = 2 * opt.state[p]["momentum"]
        saved["state"][i]["momentum"] *= 2
    control.load_state_dict(saved)
    steps(net, opt, 2, 3)
    steps(plain, control, 2, 3)
    assert same(weights(net), weights(plain))


@pytest.mark.parametrize("how", ["clear", "delete", "replace"])
def test_state_that_others_remove_begins_anew(how: str) -> None:
    (net, opt), (plain, control) = built("adamw"), built("adamw")
    for some, one in ((net, opt), (plain, control)):
        steps(some, one, 0, 2)
    if how == "clear":
        opt.state.clear()
    elif how == "replace":
        opt.state = {}
    else:
        for p in net.parameters():
            del opt.state[p]
    control.reset()
    for some, one in ((net, opt), (plain, control)):
        steps(some, one, 2, 4)
    assert same(weights(net), weights(plain)) and same(opt.state_dict(), control.state_dict())


def test_a_state_of_other_shapes_is_refused_at_the_next_step() -> None:
    net, opt = built("muon")
    steps(net, opt, 0, 1)
    opt.state[net.out.weight] = {"momentum": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"opt.state of parameter 0 .*\(6, 6\).*\(3,\)"):
        steps(net, opt, 1, 2)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stepped", [0, 3])
@every
def test_saving_changes_nothing(name: str, stepped: int, way: str) -> None:
    (net, opt), (plain, control) = built(name), built(name)
    for some, one in ((net, opt), (plain, control)):
        steps(some, one, 0, stepped)
    get_optimizer_state_dict(net, opt, options=StateDictOptions(**WAYS[way]))
    assert all(p.grad is None for p in net.parameters())
    for some, one in ((net, opt), (plain, control)):
        steps(some, one, stepped, stepped + 2)
    assert same(opt.state_dict(), control.state_dict()) and same(weights(net), weights(plain))


def saved_and_loaded(rank: int, size: int) -> dict[str, Any]:
    """In groups of 1 to 4 ranks: three steps, saved in all ways, and three more. Each group then
    loads what each other saved, and goes on."""
    dist.init_process_group("gloo")
    groups = {n: dist.new_group(range(n)) for n in range(1, size + 1)}
    kept: dict[tuple, dict] = {}
    for n, name in itertools.product(groups, ("muon", "adamw")):
        for way, options in WAYS.items() if rank < n else ():
            net, opt = built(name, process_group=groups[n])
            steps(net, opt, 0, 3)
            saved = get_optimizer_state_dict(net, opt, options=StateDictOptions(**options))
            at = weights(net)
            steps(net, opt, 3, 6)
            kept[n, name, way] = dict(saved=saved, at=at, end=weights(net))
    everyone = [kept]
    dist.broadcast_object_list(everyone, 0)  # torch saves full states on rank 0 only
    loaded = {}
    for (n, name, way), m in itertools.product(everyone[0], groups):
        if rank < m:
            net, opt = built(name, process_group=groups[m])
            found = copy.deepcopy(everyone[0][n, name, way])
            with torch.no_grad():
                for p, W in zip(net.parameters(), found["at"], strict=True):
                    p.copy_(W)
            options = StateDictOptions(**WAYS[way])
            set_optimizer_state_dict(net, opt, found["saved"], options=options)
            state = opt.state_dict()
            steps(net, opt, 3, 6)
            loaded[n, name, way, m] = dict(state=state, end=weights(net))
    return dict(saved=everyone[0], loaded=loaded)


def test_a_state_saved_by_torch_goes_on_at_any_number_of_ranks(tmp_path: Path) -> None:
    """In all ways of saving; the state is loaded bit for bit, with all settings of the groups."""
    names, ends = [n for n, _ in Net().named_parameters()], []
    for found in on_ranks(4, saved_and_loaded, tmp_path):
        for (n, name, way, m), values in found["loaded"].items():
            expected, key = found["saved"][n, name, way], (n, name, way, m)
            for i, parameter in enumerate(names):
                if way == "flat":
                    one = {
                        k: expected["saved"][f"state.{parameter}.{k}"]
                        for k in values["state"]["state"][i]
                    }
                else:
                    one = expected["saved"]["state"][parameter]
                assert same(values["state"]["state"][i], one), key
            assert values["state"]["param_groups"][0]["lr"] == 0.03
            for a, b in zip(values["end"], expected["end"], strict=True):
                assert (a - b).norm() < 1e-5 * b.norm(), key
            ends.append(key)
    assert len(ends) == 4 * 2 * len(WAYS) * (1 + 2 + 3 + 4)


def test_a_frozen_parameter_may_lack_a_saved_state() -> None:
    """torch.distributed.checkpoint saves none, and its state begins anew."""
    net, opt = built("muon")
    steps(net, opt, 0, 2)
    saved = get_optimizer_state_dict(net, opt)
    other, loaded = built("muon")
    other.out.weight.requires_grad_(False)
    set_optimizer_state_dict(other, loaded, saved)
    assert not loaded.state[other.out.weight]["momentum"].any()
    assert torch.equal(
        loaded.state[other.up[0].weight]["momentum"], opt.state[net.up[0].weight]["momentum"]
    )


# ---- plain types, hooks, and who is there --------------------------------------------------------


@every
def test_saved_groups_hold_plain_types_only(name: str) -> None:
    net, opt = built(name)
    steps(net, opt, 0, 1)
    for group in opt.state_dict()["param_groups"]:
        for key, value in group.items():
            assert isinstance(value, float | int | str | list | None), (key, value)
    torch.save(opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))
    assert opt.param_groups[0].get("dtype", torch.float32) is torch.float32


def test_a_state_saved_with_torchs_own_types_loads_too() -> None:
    """As 0.1.0 saved it."""
    net, opt = built("muon")
    steps(net, opt, 0, 1)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        assert group["dtype"] == "torch.float32"
        group["dtype"] = torch.bfloat16
    opt.load_state_dict(saved)
    assert {group["dtype"] for group in opt.param_groups} == {torch.bfloat16}
    saved["param_groups"][0]["dtype"] = "torch.nonsense"
    with pytest.raises(ValueError, match="dtype is 'torch.nonsense', expected a floating"):
        opt.load_state_dict(saved)


def test_hooks_of_the_state_are_called_as_torch_calls_them() -> None:
    net, opt = built("muon")
    steps(net, opt, 0, 1)
    calls: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("saves"))
    opt.register_state_dict_post_hook(lambda o, state: state | {"epoch": 3})
    opt.register_load_state_dict_pre_hook(lambda o, state: calls.append(str(state.pop("epoch"))))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert calls == ["saves", "3", "loaded"] and saved["epoch"] == 3


def alone(rank: int, size: int, caller: int) -> list[str]:
    """One rank saves alone, after which all train on, and save together."""
    dist.init_process_group("gloo")
    ranks.ALONE_S = 1.0
    net, opt = built("muon")
    steps(net, opt, 0, 1)
    found = []
    for step in (1, 2):
        if rank == caller:
            try:
                opt.state_dict()
            except ValueError as error:
                found.append(str(error))
        steps(net, opt, step, step + 1)
    return [*found, f"{len(opt.state_dict()['state'])} states"]


@pytest.mark.parametrize("caller", [0, 2])
def test_a_rank_that_saves_alone_is_told_so_and_training_can_go_on(
    caller: int, tmp_path: Path
) -> None:
    """`if rank == 0: torch.save(opt.state_dict())` waited for the others until the group's timeout,
    ten minutes with NCCL."""
    found = on_ranks(3, alone, tmp_path, caller)
    sentence = "1 of 3 ranks called state_dict() within 1 s: call it on all ranks at the same time"
    for rank, said in enumerate(found):
        assert said[-1] == "7 states"
        assert [s.startswith(sentence) for s in said[:-1]] == [True] * 2 * (rank == caller)


def late(rank: int, size: int) -> int:
    import time

    dist.init_process_group("gloo")
    net, opt = built("muon")
    steps(net, opt, 0, 1)
    time.sleep(2 * rank)
    return len(opt.state_dict()["state"])


def test_a_rank_may_come_some_seconds_later(tmp_path: Path) -> None:
    assert ranks.ALONE_S >= 10 and on_ranks(2, late, tmp_path) == [7, 7]


def test_a_tensor_as_rate_is_saved_and_loaded_as_a_copy() -> None:
    p = nn.Parameter(tensor(8, 4))
    lr = torch.tensor(0.1)
    opt, other = Muon([p], lr=lr), Muon([nn.Parameter(tensor(8, 4))])
    saved = opt.state_dict()
    other.load_state_dict(saved)
    lr.fill_(0.5)
    found = [float(o["param_groups"][0]["lr"]) for o in (saved, vars(other))]
    assert found == [pytest.approx(0.1)] * 2 and opt.param_groups[0]["lr"] is lr
