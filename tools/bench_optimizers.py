"""Times whole optimizer steps on the 72 matrices of the 124M model, and says how exact they are.

    python tools/bench_optimizers.py                # prints a table, appends to records/bench/
    python tools/bench_optimizers.py --out FILE     # appends elsewhere

GPU time from events, median after warm-up; fp32 weights, gradients and momentum. Exactness is that
of the direction for a 3072 x 768 momentum with column spectrum 1/i and log-normal rows (sigma 1):
`rms_sigma` is the rms of its singular values minus 1, `row_sq_cv` the coefficient of variation of
its squared row norms.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from optimizers import OPTIMIZERS  # noqa: E402

SHAPES = [("attn", (768, 768), 48, None), ("fc", (3072, 768), 12, 0), ("proj", (768, 3072), 12, 1)]


def make_groups(device: torch.device) -> list[dict]:
    """The matrices as fp32 parameters with gradients, grouped as in train_gpt.py."""
    groups = []
    for name, shape, count, axis in SHAPES:
        params = [torch.randn(shape, device=device) * 0.02 for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        groups.append(dict(name=name, neuron_axis=axis, params=params))
    return groups


def seconds_of(call, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def uneven_momentum(m: int, n: int) -> Tensor:
    """m x n with column spectrum 1/i and log-normal rows, the hard case of aurora.md 1.4."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(m, n, generator=generator, dtype=torch.float64)
    rows = torch.randn(m, 1, generator=generator, dtype=torch.float64).exp()
    return rows * X / torch.arange(1, n + 1)


def exactness(direction: Tensor) -> dict[str, float]:
    sigma = torch.linalg.svdvals(direction.cpu().double())
    rows = direction.cpu().double().square().sum(dim=1)
    return {
        "rms_sigma": (sigma - 1).square().mean().sqrt().item(),
        "row_sq_cv": (rows.std(correction=0) / rows.mean()).item(),
    }


def measure(name: str, device: torch.device, repeats: int) -> dict:
    groups = make_groups(device)
    if name == "torch.optim.Muon":
        params = [p for group in groups for p in group["params"]]
        opt, facts = torch.optim.Muon(params, lr=1e-3), {}
    else:
        opt = OPTIMIZERS[name](groups)
        momentum = uneven_momentum(3072, 768).float().to(device)[None]
        group = next(g for g in opt.param_groups if g["name"] == "fc")
        facts = exactness(opt.update(momentum, opt.init_state(momentum), group)[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    first = time.perf_counter()
    opt.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    facts["compile_s"] = time.perf_counter() - first
    times = [seconds_of(opt.step, device) for _ in range(3 + repeats)][3:]
    facts |= {"ms": 1000 * statistics.median(times), "ms_worst": 1000 * max(times)}
    if device.type == "cuda":
        facts["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"name": name} | {key: float(f"{value:.4g}") for key, value in facts.items()}


def append_line(path: Path, line: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "records/bench/optimizers.jsonl")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    rows = [measure(name, device, args.repeats) for name in (*OPTIMIZERS, "torch.optim.Muon")]
    for row in rows:
        print(row)
    line = dict(
        bench="optimizers", device=torch.cuda.get_device_name() if cuda else "cpu",
        torch=torch.__version__, commit=commit(), command="python tools/bench_optimizers.py",
        rows=rows,
    )  # fmt: skip
    append_line(args.out, line)


if __name__ == "__main__":
    main()
