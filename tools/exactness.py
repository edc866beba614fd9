"""Measure how exact the polar methods are, and how close the optimizers are to their references.

    python tools/exactness.py               # prints two tables, appends to logs/bench/
    python tools/exactness.py --large       # polar factors of 3072 x 768 in place of 768 x 192
    python tools/exactness.py --out records/bench/exactness.jsonl      # for the pages

Table `polar` takes matrices with log-spaced singular values from 1 to 1/condition. For a method's U
it shows |U^T U - I| / sqrt(n) (orthogonality) and |U - exact| / |exact| (error), in Frobenius
norms, with exact computed in float64. Table `parity` makes 50 random steps beside
tests/references.py and shows the largest |W - reference| / |reference - start| of any step. Nothing
here measures time.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

if __name__ == "__main__":
    from records.missing import explain_missing

    explain_missing()

import references  # noqa: E402
import torch  # noqa: E402
from bench_optimizers import OUT, append_line, commit  # noqa: E402
from torch import Tensor  # noqa: E402

from optimizers import OPTIMIZERS  # noqa: E402
from optimizers.polar import POLAR, polar  # noqa: E402

CONDITIONS = (3, 10, 30, 100, 300, 1000, 3000)
PRODUCTS = (torch.bfloat16, torch.float16, torch.float32)
PARITY = {  # each shape comes with the axis of its neurons
    "tall or wide": (((24, 6), 0), ((6, 24), 1), ((24, 6), None), ((10, 4), 1)),
    "m = n + 1": (((9, 8), 0),),
    "square": (((8, 8), 0),),
}


def spectrum(m: int, n: int, condition: float) -> tuple[Tensor, Tensor]:
    """Return a matrix of this condition and its polar factor, in float64."""
    generator, r = torch.Generator().manual_seed(0), min(m, n)
    U, V = (
        torch.linalg.qr(torch.randn(k, r, dtype=torch.float64, generator=generator))[0]
        for k in (m, n)
    )
    sigma = condition ** -torch.linspace(0, 1, r, dtype=torch.float64)
    return U * sigma @ V.T, U @ V.T


def polar_rows(m: int, n: int, device: torch.device) -> list[dict]:
    """Return a row for each method and dtype of its matmuls, for m > n; "exact" has no matmuls."""
    rows: dict[tuple, dict] = {}
    for condition in CONDITIONS:
        X, exact = (A.to(device) for A in spectrum(m, n, condition))
        for method in POLAR:
            for dtype in PRODUCTS if POLAR[method][1] else (torch.float32,):
                made = polar(X.float(), method, dtype)  # gram6 never uses bfloat16
                U = made.double()
                unit = (U.T @ U - torch.eye(n, dtype=U.dtype, device=device)).norm() / n**0.5
                error = (U - exact).norm() / n**0.5
                products = name(made.dtype)
                row = rows.setdefault((method, products), {"method": method, "products": products})
                row[str(condition)] = f"{unit:.1e} / {error:.1e}"
    return list(rows.values())


def parity(
    optimizer: str, dtype: torch.dtype, shape: tuple[int, int], axis: int | None, **options
) -> float:
    """Return the largest deviation from the reference; float64 runs use exact polar factors."""
    our_options = dict(options)
    if "dtype" in OPTIMIZERS[optimizer].defaults:
        our_options |= dict(dtype=dtype, polar="exact" if dtype == torch.float64 else "quintic12")
    weight, grads, lrs = references.problem(shape)
    expected = references.run(optimizer, weight, grads, lrs, axis, **options)
    start = torch.from_numpy(weight)
    p = torch.nn.Parameter(start.to(torch.promote_types(dtype, torch.float32), copy=True))
    opt = OPTIMIZERS[optimizer]([dict(params=[p], neuron_axis=axis)], **our_options)
    worst = 0.0
    for grad, lr, W in zip(grads, lrs, map(torch.from_numpy, expected), strict=True):
        opt.param_groups[0]["lr"] = lr
        p.grad = torch.from_numpy(grad).to(p.dtype)
        opt.step()
        worst = max(worst, ((p.detach().double() - W).norm() / (W - start).norm()).item())
    return worst


def parity_row(optimizer: str) -> dict:
    row = {"optimizer": optimizer}
    for where, shapes in PARITY.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and "dtype" not in OPTIMIZERS[optimizer].defaults:
                continue
            worst = max(parity(optimizer, dtype, shape, axis) for shape, axis in shapes)
            row[f"{name(dtype)}, {where}"] = float(f"{worst:.2g}")
    return row


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--large", action="store_true", help="use 3072 x 768, for a GPU")
    parser.add_argument("--out", type=Path, default=OUT / "exactness.jsonl")
    args = parser.parse_args()
    cuda, command = torch.cuda.is_available(), "python tools/exactness.py"
    shape = (3072, 768) if args.large else (768, 192)
    tables = {
        "polar": polar_rows(*shape, torch.device("cuda" if cuda else "cpu")),
        "parity": [parity_row(optimizer) for optimizer in OPTIMIZERS],
    }
    for bench, rows in tables.items():
        print(*rows, sep="\n")
        line = dict(
            bench=bench,
            shape=f"{shape[0]} x {shape[1]}" if bench == "polar" else "small",
            device=torch.cuda.get_device_name() if cuda and bench == "polar" else "cpu",
            torch=torch.__version__,
            commit=commit(),
            command=command + (" --large" if args.large else ""),
            rows=rows,
        )
        append_line(args.out, line)


if __name__ == "__main__":
    main()
