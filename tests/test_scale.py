"""docs/scale.md: its tables come from the slot, built of meta tensors in a world that is not there.

`python tests/test_scale.py` writes them anew.
"""

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from optimizers import Aurora, direction, gram  # noqa: E402

PAGE = ROOT / "docs/scale.md"
MODELS = {  # layers, width, rows of k and v, hidden neurons: TinyLlama, Llama 2
    "1.1B": (22, 2048, 256, 5632),
    "7B": (32, 4096, 4096, 11008),
    "70B": (80, 8192, 1024, 28672),
}
WORLDS = (64, 256, 1024)
H200 = 8.55e-3  # seconds: README, Aurora's step in the trainer on one H200, GPT-2 of 124M
LINK = 50e9  # bytes a second that a GPU sends to other machines: one port of 400 Gbit/s


@contextmanager
def world(ranks: int) -> Iterator[None]:
    """Be rank 0 of so many; collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def stacks(name: str) -> list[tuple[tuple[int, int], int | None, int]]:
    """Return shape, neuron_axis and number of the model's matrices."""
    layers, width, kv, hidden = MODELS[name]
    attention = [((width, width), None, 2 * layers), ((kv, width), None, 2 * layers)]
    if kv == width:
        attention = [((width, width), None, 4 * layers)]
    return [*attention, ((hidden, width), 0, 2 * layers), ((width, hidden), 1, layers)]


@functools.cache
def flops(shape: tuple[int, int], axis: int | None) -> int:
    """Count those of matmuls, half of them where the result is symmetric, as on Hopper GPUs."""
    symmetric = 0

    def count(A: torch.Tensor, B: torch.Tensor, *others, **scales) -> torch.Tensor:
        nonlocal symmetric
        symmetric += A.numel() * B.size(-2)
        return A.new_empty(len(A), A.size(-2), B.size(-2))

    with patch.object(gram, "symmetric_matmul", count), FlopCounterMode(display=False) as others:
        direction(torch.empty(1, *shape, device="meta"), axis)
    return symmetric + others.get_total_flops()


def rate() -> float:
    """Return FLOPs a second: those of GPT-2's matrices by the measured time."""
    attention, mlp = flops((768, 768), None), flops((3072, 768), 0)
    return 12 * (4 * attention + 2 * mlp) / H200


def slot(name: str, ranks: int) -> tuple[float, ...]:
    """Return padding, GB sent to sum gradients and to gather weights, GB of state on the busiest
    rank, its seconds, and the mean of all ranks'."""
    groups = [
        dict(params=[nn.Parameter(torch.empty(shape, device="meta")) for _ in range(count)])
        | dict(neuron_axis=axis)
        for shape, axis, count in stacks(name)
    ]
    with world(ranks):
        opt = Aurora(groups, reduce_dtype=torch.bfloat16, compile=False)
        sent, per_rank, state = opt.traffic(), [0.0] * ranks, [0] * ranks
    padded = real = 0
    for bucket in opt._buckets:
        like = bucket.params[0]
        kept = sum(t.nbytes for t in opt.init_state(like.detach()[None]).values())
        axes = {p: g["neuron_axis"] for g in opt.param_groups for p in g["params"]}
        each = flops(tuple(like.shape), axes[like])
        for rank, owned in enumerate(bucket.owned):
            per_rank[rank] += len(owned) * each
            state[rank] += len(owned) * kept
        padded += ranks * bucket.slots * like.numel()
        real += len(bucket.params) * like.numel()
    busiest, mean = max(per_rank) / rate(), sum(per_rank) / ranks / rate()
    return (
        padded / real,
        sent["reduce"] / 1e9,
        sent["gather"] / 1e9,
        max(state) / 1e9,
        busiest,
        mean,
    )


class Sent(TorchDispatchMode):
    """Count the bytes that rank 0 sends in DTensor's all-to-alls."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes = ranks, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_dtensor.shard_dim_alltoall" in str(func):
            self.bytes += args[0].nbytes * (self.ranks - 1) / self.ranks
        else:
            assert "c10d" not in str(func), f"another collective: {func}"
        return func(*args, **(kwargs or {}))


def sharded(name: str, ranks: int) -> tuple[float, ...]:
    """Return rank 0's GB of momentum, GB sent and seconds for the directions of FSDP2 shards by
    `shared` of docs/engines.md; no rank has more."""
    text = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    names = dict(DTensor=DTensor, Replicate=Replicate, Shard=Shard, direction=direction)
    exec(
        re.search(r"^def shared\(.*?(?=^\S)", text[text.index("def shared") :], re.S | re.M)[0],
        names,
    )
    total = work = momentum = 0.0
    with world(ranks):
        mesh = DeviceMesh("meta", torch.arange(ranks))
        for (m, n), axis, count in stacks(name):
            local = torch.empty(count, -(-m // ranks), n, device="meta")
            size = dict(shape=torch.Size((count, m, n)), stride=(m * n, n, 1), run_check=False)
            X = DTensor.from_local(local, mesh, [Shard(1)], **size)
            with Sent(ranks) as sent:
                assert names["shared"](X, axis).placements == X.placements
            total, momentum = total + sent.bytes, momentum + local.nbytes
            work += -(-count // ranks) * flops((m, n), axis)
    return momentum / 1e9, total / 1e9, work / rate()


def tables() -> dict[str, str]:
    """Return the page's tables by name."""
    whole = ["| model | GPUs | padding | sums (GB) | gathers (GB) | at 50 GB/s (ms) | state (GB) "]
    whole[0] += "| busiest rank (ms) | even shares (ms) |"
    parts = ["| model | GPUs | momentum (GB) | sent (GB) | at 50 GB/s (ms) | busiest rank (ms) "]
    parts[0] += "| `full_tensor()`: received (GB) | at 50 GB/s (ms) | every rank (ms) |"
    size = ["| model | matrices | parameters in them | weights and gradients (GB) |"]
    for rows in (whole, parts, size):
        rows.append("|" + " --- |" * (rows[0].count("|") - 1))
    for name in MODELS:
        counts = [(count, shape[0] * shape[1] * count) for shape, _, count in stacks(name)]
        matrices, elements = map(sum, zip(*counts, strict=True))
        size.append(f"| {name} | {matrices} | {elements / 1e9:.2f}e9 | {8 * elements / 1e9:.1f} |")
        for ranks in WORLDS:
            padding, reduce, gather, state, busiest, mean = slot(name, ranks)
            wire = (reduce + gather) * 1e9 / LINK
            whole.append(
                f"| {name} | {ranks} | {padding:.2f} | {reduce:.1f} | {gather:.1f} "
                f"| {1e3 * wire:.0f} | {state:.2f} | {1e3 * busiest:.0f} | {1e3 * mean:.1f} |"
            )
            momentum, sent, busiest = sharded(name, ranks)
            received = 4e-9 * elements * (ranks - 1) / ranks
            parts.append(
                f"| {name} | {ranks} | {momentum:.2f} | {sent:.2f} | {1e12 * sent / LINK:.0f} "
                f"| {1e3 * busiest:.0f} | {received:.1f} | {1e12 * received / LINK:.0f} "
                f"| {1e3 * mean * ranks:.0f} |"
            )
    return {"size": "\n".join(size), "slot": "\n".join(whole), "fsdp2": "\n".join(parts)}


def with_tables(page: str, found: dict[str, str]) -> str:
    for name, table in found.items():
        marks = f"<!-- table:{name} -->\n", f"<!-- /table:{name} -->"
        head, _, rest = page.partition(marks[0])
        page = head + marks[0] + table + "\n" + marks[1] + rest.partition(marks[1])[2]
    return page


def test_the_tables_of_the_page_are_what_the_code_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    expected = with_tables(page, tables())
    assert page == expected, "docs/scale.md is stale: run python tests/test_scale.py"


@pytest.mark.parametrize("m, n, factor", [(1024, 256, 88), (256, 256, 24)], ids=str)
def test_flops_are_those_of_the_table_of_optimizers(m: int, n: int, factor: int) -> None:
    """docs/optimizers.md: 2 F - 3 m n^2 - 2 n^3, F = 9 m n^2 + 15 n^3, or 24 n^3 for squares."""
    assert flops((m, n), 0) == pytest.approx(factor * n**3)
    assert flops((n, m), 1) == flops((m, n), 0)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
