"""Time whole optimizer steps on all matrices of a model, and measure how exact they are.

    python tools/bench_optimizers.py                # prints rows, appends a line to logs/bench/
    python tools/bench_optimizers.py --shapes 1.1B --momentum momentum.pt
    python tools/bench_optimizers.py --out records/bench/optimizers.jsonl   # for the pages

Times are medians of CUDA events after warm-up, with fp32 weights, gradients and momentum. The
hyperparameters change in every step; a recompilation or a host sync is an error. peak_mib is the
peak memory of a step beyond weights, gradients and state, plus the pools of CUDA graphs, which stay
reserved between steps. These columns measure the update direction:

    rms_sigma     root mean square of its singular values minus 1, the worst of 3072 x 768 and
                  768 x 768 with spectra 1/i and log-spaced to a condition number of 100
    rms_sigma_800 the same, log-spaced to a condition number of 800
    row_sq_cv     coefficient of variation of its squared row norms, for a 3072 x 768 momentum with
                  spectrum 1/i and log-normal rows (sigma 1)
    real_sq_cv    the same for real momenta: --momentum FILE holds {name: (m, n) tensor}
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "logs/bench"  # records/ is committed: its pages must agree with what it holds
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from records.missing import explain_missing

    explain_missing()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from optimizers import OPTIMIZERS, Aspect  # noqa: E402
from optimizers.replay import Replay  # noqa: E402

SHAPES = {  # name: group, shape, matrices, neuron axis
    "124M": [
        ("attn", (768, 768), 48, None),
        ("fc", (3072, 768), 12, 0),
        ("proj", (768, 3072), 12, 1),
    ],
    "1.1B": [
        ("attn", (2048, 2048), 96, None),
        ("up", (5504, 2048), 48, 0),
        ("down", (2048, 5504), 24, 1),
    ],
    "tiny": [("attn", (96, 96), 4, None), ("fc", (384, 96), 2, 0), ("proj", (96, 384), 2, 1)],
}
VARIANTS = {name: (name, {}) for name in OPTIMIZERS if name != "riemannian"} | {
    f"{name}, quintic12": (name, dict(polar="quintic12")) for name in ("muon", "aurora")
}
# As in a loop of one's own; all others share storage, as in the trainer.
VARIANTS |= {
    f"{name}, own storage": (name, dict(share_storage=False)) for name in ("muon", "aurora")
}


def make_groups(shapes: str, device: torch.device) -> list[dict]:
    """Return fp32 parameters with gradients, grouped as in train_gpt.py."""
    groups = []
    for name, shape, count, axis in SHAPES[shapes]:
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        groups.append(dict(name=name, neuron_axis=axis, params=params))
    return groups


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
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


def spectra(n: int) -> dict[str, Tensor]:
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return {"1/i": 1 / torch.arange(1, n + 1), "100": 100**-ramp, "800": 800**-ramp}


def with_spectrum(m: int, n: int, sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64))[0]
        for k in (m, n)
    )
    return U * sigma @ V.T


def uneven_momentum(m: int, n: int) -> Tensor:
    """Return an m x n matrix with column spectrum 1/i and log-normal rows: Aurora's hard case."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(m, n, generator=generator, dtype=torch.float64)
    rows = torch.randn(m, 1, generator=generator, dtype=torch.float64).exp()
    return rows * X / torch.arange(1, n + 1)


def rms_sigma(U: Tensor) -> float:
    return (torch.linalg.svdvals(U.double()) - 1).square().mean().sqrt().item()


def row_sq_cv(U: Tensor) -> float:
    squares = U.double().square().sum(dim=1)
    return (squares.std(correction=0) / squares.mean()).item()


def exactness(
    optimizer: type, options: dict, n: int, device: torch.device, real: dict
) -> dict[str, float]:
    """Measure the directions for random and real momenta, if the optimizer has a polar factor."""
    if "polar" not in optimizer.defaults:
        return {}
    params = [torch.nn.Parameter(torch.zeros(1, 1, device=device))]
    opt = optimizer(params, compile=False, **options)

    def direction(X: Tensor, axis: int | None) -> Tensor:
        U, group = X.float().to(device)[None], opt.param_groups[0] | dict(neuron_axis=axis)
        weight, state = torch.zeros_like(U), opt.init_state(U)
        for technique in opt.techniques:
            if not isinstance(technique, Aspect):  # which changes the size only
                U = technique.before(U, weight, state, group).to(weight.dtype)
        return U[0]

    rms = {
        name: max(rms_sigma(direction(with_spectrum(m, n, sigma), None)) for m in (4 * n, n))
        for name, sigma in spectra(n).items()
    }
    facts = dict(
        rms_sigma=max(rms["1/i"], rms["100"]),
        rms_sigma_800=rms["800"],
        row_sq_cv=row_sq_cv(direction(uneven_momentum(4 * n, n), 0)),
    )
    tall = [X if X.size(0) > X.size(1) else X.T for X in real.values() if X.size(0) != X.size(1)]
    if tall:
        facts["real_sq_cv"] = max(row_sq_cv(direction(X, 0)) for X in tall)
    return facts


def reserved_by_graphs() -> dict[tuple, int]:
    """Return the bytes of each memory pool except the default one."""
    found: dict[tuple, int] = {}
    for segment in torch.cuda.memory_snapshot():
        pool = tuple(segment["segment_pool_id"])
        found[pool] = found.get(pool, 0) + segment["total_size"]
    return {pool: size for pool, size in found.items() if pool != (0, 0)}


def timing(opt: torch.optim.Optimizer, device: torch.device, repeats: int) -> dict[str, float]:
    """Return the ms of a step, the compile time, and the peak memory of a step."""
    Replay.pool = None  # the graphs of this row get their own pool
    others = reserved_by_graphs() if device.type == "cuda" else {}
    first = seconds_of(opt.step, device)
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    compile_s, times = first + time.perf_counter() - started, []
    for i in range(3 + repeats):
        for group in opt.param_groups:
            group["lr"] = 1e-3 / (i + 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            times.append(seconds_of(opt.step, device))
    facts = dict(
        ms=1000 * statistics.median(times[3:]), ms_worst=1000 * max(times[3:]), compile_s=compile_s
    )
    if device.type == "cuda":
        pools = sum(size for pool, size in reserved_by_graphs().items() if pool not in others)
        facts["peak_mib"] = (torch.cuda.max_memory_allocated() - before + pools) / 2**20
        torch.cuda.set_sync_debug_mode("error")  # a host sync inside the step raises
        opt.step()
        torch.cuda.set_sync_debug_mode("default")
    return facts


def measure(name: str, shapes: str, device: torch.device, repeats: int, real: dict) -> dict:
    groups = make_groups(shapes, device)
    if name == "torch.optim.Muon":
        opt, facts = torch.optim.Muon([p for g in groups for p in g["params"]], lr=1e-3), {}
    else:
        optimizer, options = VARIANTS[name]
        opt = OPTIMIZERS[optimizer](groups, **dict(share_storage=True) | options)
        n = min(768, *SHAPES[shapes][0][1])
        facts = exactness(OPTIMIZERS[optimizer], options, n, device, real)
    facts = timing(opt, device, repeats) | facts
    return {"name": name} | {key: float(f"{value:.4g}") for key, value in facts.items()}


def append_line(path: Path, line: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main() -> None:
    names = (*VARIANTS, "torch.optim.Muon")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shapes", choices=SHAPES, default="124M")
    parser.add_argument("--momentum", type=Path, help="file with real momenta, see the docstring")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=names, help="measure only these"
    )
    parser.add_argument("--out", type=Path, default=OUT / "optimizers.jsonl")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    real = torch.load(args.momentum, weights_only=True) if args.momentum else {}
    rows = []
    for name in args.only or names:
        rows.append(measure(name, args.shapes, device, args.repeats, real))
        print(rows[-1], flush=True)
    command = "python tools/bench_optimizers.py"
    command += f" --only {shlex.join(args.only)}" if args.only else ""
    command += " --momentum FILE" if real else ""
    line = dict(
        bench="optimizers",
        shapes=args.shapes,
        torch=torch.__version__,
        commit=commit(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        command=command + (f" --shapes {args.shapes}" if args.shapes != "124M" else ""),
        momentum=sorted(real),
        rows=rows,
    )
    append_line(args.out, line)


if __name__ == "__main__":
    main()
