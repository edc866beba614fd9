"""`direction`, and docs/engines.md: Aurora in other engines, by the code of the page.

CI has none of the engines: their tests are skipped there. The environments in which they ran:

    python3.11 -m venv /tmp/engines311
    /tmp/engines311/bin/pip install torch==2.13.0 triton==3.9.0 numpy pytest \
        muonium==0.2.0 torchtitan==0.3.0 lightning==2.6.6 accelerate==1.15.0
    /tmp/engines311/bin/python -m pytest tests/test_engines.py

    python3.12 -m venv /tmp/engines312
    /tmp/engines312/bin/pip install torch==2.14.1 numpy pytest \
        megatron-core==0.19.2 emerging-optimizers==0.3.0
    /tmp/engines312/bin/python -m pytest tests/test_engines.py

muonium imports triton, which torch for CPUs does not bring along.
"""

import functools
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, on_ranks
from torch import Tensor, nn

import optimizers
from optimizers import Aurora, direction

STEPS = 5
MLP = {0: 0, 2: 1}  # layers of `network`: where their hidden neurons are
MATRICES = MLP | {3: None}


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f"no {' and '.join(missing)} here: the docstring of test_engines.py installs it"
    return pytest.mark.skipif(bool(missing), reason=reason)


@functools.cache
def code_of(section: str) -> dict:
    """Run the Python of a section of docs/engines.md; returns the names that it defines."""
    sys.modules.setdefault("aurora_optim", optimizers)
    page = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.M)[1]
    names: dict = {"__name__": f"engines_{section}"}
    sys.modules[names["__name__"]] = torch  # dataclasses look up the module of a class
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, f"docs/engines.md, {section}", "exec"), names)
    return names


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Linear(16, 16))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = gaussian(32, 16, seed=100 * step + rank)
    return x, x.roll(1, dims=1).argmax(dim=1)


def train(net: nn.Module, optimizers: list, ranks: list[int]) -> None:
    """Train on the mean of the gradients of these ranks' batches."""
    for step in range(STEPS):
        batches = [batch(rank, step) for rank in ranks]
        losses = [nn.functional.cross_entropy(net(x), y) for x, y in batches]
        (sum(losses) / len(ranks)).backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad()


def whole(net: nn.Module) -> list[Tensor]:
    """Return copies of all parameters; every rank must call it."""
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return [p.detach().clone() for p in found]


def by_slot(ranks: int, matrices: dict[int, int | None], **adamw) -> list[Tensor]:
    """Return `network` after training by our Aurora, and AdamW for the rest, in one process."""
    net = network()
    groups = [dict(params=[net[i].weight], neuron_axis=axis) for i, axis in matrices.items()]
    mine = [group["params"][0] for group in groups]
    rest = [p for p in net.parameters() if not any(p is weight for weight in mine)]
    aurora = Aurora(groups, lr=0.02, weight_decay=0.05, reduce=False)
    train(net, [aurora, torch.optim.AdamW(rest, lr=3e-3, **adamw)], list(range(ranks)))
    return whole(net)


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (20, 20)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_step_by_hand_with_direction_is_a_step_of_the_slot(
    shape: tuple[int, int], axis: int | None
) -> None:
    """Bit for bit, from a stack and one by one, with the settings that the group has."""
    chosen = dict(rounds=3, dtype=torch.float32)
    p, q = (torch.nn.Parameter(gaussian(*shape)) for _ in "ab")
    opt = Aurora([p, q], lr=0.1, weight_decay=0.2, reduce=False, **chosen)
    opt.param_groups[0]["neuron_axis"] = axis
    W, m = (torch.stack([p.detach(), q.detach()]) for _ in "Wm")
    m.zero_()
    for step in range(3):
        G = gaussian(2, *shape, seed=step)
        p.grad, q.grad = G
        opt.step()
        m.lerp_(G, 0.05)
        X = G.lerp(m, 0.95)
        U = direction(X, axis, **chosen)
        W = W * (1 - 0.1 * 0.2) - 0.1 * (U * max(1.0, shape[0] / shape[1]) ** 0.5)
        assert torch.equal(W, torch.stack([p.detach(), q.detach()]))
        alone = torch.stack([direction(x, axis, **chosen) for x in X])
        assert error(alone, U) < 1e-6 and alone.shape == U.shape


def test_direction_takes_empty_stacks_and_half_precision() -> None:
    assert direction(torch.zeros(0, 48, 12), 0).shape == (0, 48, 12)
    X = gaussian(48, 12).bfloat16()
    assert direction(X, 0).dtype == torch.float32
    assert torch.equal(direction(X, 0), direction(X.float(), 0))


def test_direction_refuses_what_is_no_whole_matrix_and_unknown_settings() -> None:
    for X in (torch.zeros(3), torch.zeros(8, 4, 3, 3)):
        with pytest.raises(ValueError, match="takes a whole matrix or a stack of them, found"):
            direction(X, 0)
    shard = torch.zeros(8, 4)
    shard.placements = ()  # as a DTensor has
    with pytest.raises(ValueError, match="takes a whole matrix or a stack of them, found"):
        direction(shard, 0)
    X = gaussian(48, 12)
    with pytest.raises(ValueError, match="neuron_axis is 2, expected one of 0, 1, None"):
        direction(X, 2)
    with pytest.raises(ValueError, match="has no hyperparameter 'lr'"):
        direction(X, 0, lr=0.1)
    with pytest.raises(ValueError, match="polar is 'svd', expected one of"):
        direction(X, 0, polar="svd")


# ---- muonium, FSDP2 and torchtitan ------------------------------------------------------------


def with_muonium(net: nn.Sequential) -> torch.optim.Optimizer:
    rows, columns, others = ([net[i].weight] for i in MATRICES)
    rest = [p for p in net.parameters() if p.ndim == 1]
    return code_of("PyTorch's FSDP2, through muonium")["optimizer"](rows, columns, others, rest)


def under_fsdp2(
    rank: int, size: int, batched: bool, mesh: dict[str, int]
) -> tuple[list[Tensor], list[Tensor], list[tuple[int, ...]]]:
    """Return the weights of all ranks' and of one process's training, and the momentum's shapes."""
    import muonium.optim.optim as driver
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
    from torch.distributed.tensor.parallel import parallelize_module as split

    driver.move_tensors_to_device = lambda tensors, *devices: tensors  # it would move to CUDA
    alone, net = network(), network()
    dist.init_process_group("gloo")
    over = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    columns = mesh.get("columns", 1)  # of the mesh: ranks that share a batch
    if columns > 1:
        split(net, over["columns"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        over = over["shard"]
    for module in (*net[::2], net):
        fully_shard(module, mesh=over)
    for model, ranks in ((alone, list(range(size // columns))), (net, [rank // columns])):
        opt = with_muonium(model)
        for group in opt.param_groups[:3]:
            group["foreach"] = batched
        train(model, [opt], ranks)
    local = [tuple(s["momentum_buffer"].to_local().shape) for s in momenta(opt)]
    return whole(net), whole(alone), local


def momenta(opt: torch.optim.Optimizer) -> list[dict]:
    return [state for state in opt.state.values() if "momentum_buffer" in state]


@needs("muonium", "triton")
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "in stacks"])
def test_muonium_under_fsdp2_equals_one_process_bit_for_bit_and_the_slot_by_rounding(
    batched: bool, tmp_path: Path
) -> None:
    """Two ranks hold half of each momentum. Without training, weights are 0.05 away."""
    first, second = on_ranks(2, under_fsdp2, tmp_path, batched, dict(shard=2))
    slot = by_slot(2, MATRICES, weight_decay=0.0, betas=(0.9, 0.95))
    for found, alone, local in (first, second):
        assert furthest(found, alone) == 0
        assert furthest(found, slot) < 2e-5 < 0.05 < furthest(found, whole(network()))
        assert local == [(32, 16), (8, 64), (8, 16)]


@needs("muonium", "triton")
@pytest.mark.parametrize(
    "mesh",
    [dict(shard=3), dict(replicate=2, shard=2), dict(shard=2, columns=2)],
    ids=["3 ranks, uneven", "HSDP", "tensor parallel"],
)
def test_muonium_under_fsdp2_equals_one_process_by_rounding_on_other_meshes(
    mesh: dict[str, int], tmp_path: Path
) -> None:
    """More than two ranks average gradients, and tensor parallel ones add, in another order."""
    results = on_ranks(math.prod(mesh.values()), under_fsdp2, tmp_path, True, mesh)
    for found, alone, _ in results:
        assert furthest(found, alone) < 2e-5 < 0.05 < furthest(found, whole(network()))
        assert furthest(found, results[0][0]) == 0


def resumed(rank: int, size: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights after training, a checkpoint and more training, and with a resumption."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as of
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    runs = [(net, with_muonium(net)) for net in (fully_shard(network()), fully_shard(network()))]
    train(runs[0][0], [runs[0][1]], [rank])
    states = [
        dict(model=of.get_model_state_dict(net), optim=of.get_optimizer_state_dict(net, opt))
        for net, opt in runs
    ]
    dcp.save(states[0], checkpoint_id=folder)
    dcp.load(states[1], checkpoint_id=folder)
    of.set_model_state_dict(runs[1][0], states[1]["model"])
    of.set_optimizer_state_dict(*runs[1], states[1]["optim"])
    for net, opt in runs:
        train(net, [opt], [rank])
    return whole(runs[0][0]), whole(runs[1][0])


@needs("muonium", "triton")
def test_a_run_with_muonium_resumes_from_a_distributed_checkpoint_bit_for_bit(
    tmp_path: Path,
) -> None:
    for went_on, resumption in on_ranks(2, resumed, tmp_path, str(tmp_path / "saved")):
        assert furthest(went_on, resumption) == 0


@needs("muonium", "triton")
def test_aurora_in_muonium_refuses_what_it_does_not_do() -> None:
    opt = with_muonium(network())
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.param_groups[0]["use_cautious_wd"] = True
    with pytest.raises(ValueError, match="aurora takes use_cautious_wd=False"):
        opt.step()


def in_torchtitan(rank: int, size: int) -> tuple[list[Tensor], list[str]]:
    """Return the weights and the keys of the saved state, which another container loads."""
    from torch.distributed.fsdp import fully_shard
    from torchtitan.components.optimizer import ParamGroupConfig

    code_of("PyTorch's FSDP2, through muonium")
    container = code_of("torchtitan")["Optimizers"]
    dist.init_process_group("gloo")
    fully_shard(net := network())
    groups = [
        ParamGroupConfig(
            pattern=rf"^{i}\.weight$",
            optimizer_name="Aurora",
            optimizer_kwargs=dict(lr=0.02, wd=0.05, neuron_axis=axis),
        )
        for i, axis in MATRICES.items()
    ]
    settings = dict(lr=3e-3, weight_decay=0.0)
    groups.append(ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=settings))
    config = container.Config(implementation="for-loop", param_groups=groups)
    opt = config.build(model_parts=[net])
    train(net, [opt], [rank])
    trained, saved = whole(net), opt.state_dict()
    again = config.build(model_parts=[net])
    again.load_state_dict(saved)
    assert all(
        torch.equal(a["momentum_buffer"].to_local(), b["momentum_buffer"].to_local())
        for a, b in zip(momenta(opt.optimizers[0]), momenta(again.optimizers[0]), strict=True)
    )
    return trained, sorted(saved)


@needs("torchtitan", "muonium", "triton")
def test_torchtitans_container_trains_as_the_slot_and_keeps_state_by_name(tmp_path: Path) -> None:
    slot = by_slot(2, MATRICES, weight_decay=0.0)
    for found, keys in on_ranks(2, in_torchtitan, tmp_path):
        assert furthest(found, slot) < 2e-5 < 0.05 < furthest(found, whole(network()))
        assert {f"state.{i}.weight.momentum_buffer" for i in MATRICES} <= set(keys)


# ---- Megatron-core ----------------------------------------------------------------------------


class OnCPU(torch.overrides.TorchFunctionMode):
    """Megatron's wrappers make their scalars on CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def in_megatron(rank: int, size: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Return the weights of a tensor-parallel MLP before and after training, joined, and the
    types of the optimizers."""
    names = code_of("Megatron-core")
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    shape = dict(num_layers=1, hidden_size=16, num_attention_heads=2)
    config = TransformerConfig(
        **shape, tensor_model_parallel_size=size, use_cpu_initialization=True
    )
    common = dict(config=config, init_method=nn.init.xavier_normal_, skip_bias_add=False)
    torch.manual_seed(0)
    net = nn.Module()
    net.linear_fc1 = ColumnParallelLinear(16, 64, gather_output=False, bias=True, **common)
    net.linear_fc2 = RowParallelLinear(64, 16, input_is_parallel=True, bias=False, **common)
    net.config = config

    def joined() -> list[Tensor]:
        found = []
        for weight, dim in ((net.linear_fc1.weight, 0), (net.linear_fc2.weight, 1)):
            shards = [torch.empty_like(weight) for _ in range(size)]
            dist.all_gather(shards, weight.detach())
            found.append(torch.cat(shards, dim))
        return found

    before, settings = joined(), dict(optimizer="aurora", lr=0.02, weight_decay=0.05)
    with OnCPU():
        config = OptimizerConfig(**settings, clip_grad=0.0)
        opt = get_megatron_optimizer(config, [net], names["neurons"])
        for step in range(STEPS):
            x, _ = batch(0, step)
            hidden = torch.tanh(net.linear_fc1(x)[0])
            (net.linear_fc2(hidden)[0] - x).square().mean().backward()
            for p in net.parameters():
                p.main_grad = p.grad
            opt.step()
            opt.zero_grad()
            for p in net.parameters():
                p.grad = None
    return before, joined(), [type(o.optimizer).__name__ for o in opt.chained_optimizers]


@needs("megatron", "emerging_optimizers")
def test_megatron_steps_tensor_parallel_matrices_as_the_slot_steps_whole_ones(
    tmp_path: Path,
) -> None:
    """Biases, at zero before, go to Adam: the reference does the same with torch's AdamW."""
    (before, found, kinds), (_, other, _) = on_ranks(2, in_megatron, tmp_path)
    assert kinds == ["Aurora", "AdamW"] and furthest(found, other) == 0
    up, down = (nn.Parameter(p.clone()) for p in before)
    bias = nn.Parameter(torch.zeros(64))
    groups = [dict(params=[up], neuron_axis=0), dict(params=[down], neuron_axis=1)]
    aurora = Aurora(groups, lr=0.02, weight_decay=0.05, reduce=False)
    adamw = torch.optim.AdamW([bias], lr=0.02, weight_decay=0.05)
    for step in range(STEPS):
        x, _ = batch(0, step)
        (torch.tanh(x @ up.T + bias) @ down.T - x).square().mean().backward()
        for opt in (aurora, adamw):
            opt.step()
            opt.zero_grad()
    expected = [up.detach(), down.detach()]
    assert furthest(found, expected) < 2e-5 < 0.05 < furthest(found, before)


# ---- Lightning and accelerate -----------------------------------------------------------------


def in_lightning(rank: int, size: int, folder: str) -> tuple[list[Tensor], int]:
    import lightning

    module = code_of("Lightning")["Training"](network())
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches = [batch(rank, step) for step in range(2 * STEPS)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return whole(module.net), trainer.global_step


@needs("lightning")
@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning_trains_as_a_plain_loop_and_counts_batches(ranks: int, tmp_path: Path) -> None:
    for found, steps in on_ranks(ranks, in_lightning, tmp_path, str(tmp_path)):
        assert steps == STEPS
        assert (
            furthest(found, by_slot(ranks, MLP)) < 2e-5 < 0.05 < furthest(found, whole(network()))
        )


def in_accelerate(rank: int, size: int, folder: str) -> list[Tensor]:
    net = network()
    batches = [batch(rank, step) for step in range(STEPS)]
    code_of("accelerate")["train"](net, batches, folder, cpu=True)
    return whole(net)


@needs("accelerate", "safetensors")
@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerate_trains_as_a_plain_loop_and_saves_it(ranks: int, tmp_path: Path) -> None:
    found = on_ranks(ranks, in_accelerate, tmp_path, str(tmp_path / "saved"))
    for weights in found:
        assert (
            furthest(weights, by_slot(ranks, MLP))
            < 2e-5
            < 0.05
            < furthest(weights, whole(network()))
        )
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved/model.safetensors")
    names = [name for name, _ in network().named_parameters()]
    assert furthest([saved[name] for name in names], found[0]) == 0
