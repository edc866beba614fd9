"""optimizers/products.py: the Triton kernel, run by its interpreter, against PyTorch."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import in_fresh_python
from torch import Tensor

from optimizers.kernels import kernel_runs
from optimizers.products import symmetric_by_torch, symmetric_product

ROOT = Path(__file__).resolve().parent.parent
COMPARE = """
import torch
from optimizers.kernels import symmetric_by_triton
from optimizers.products import symmetric_by_torch
for dtype in (torch.float16,):  # the interpreter of Triton 3.6 misreads bfloat16
    for k, n, p in ((2, 256, 192), (1, 200, 80), (3, 136, 304), (2, 8, 16)):
        X = torch.randn(k, p, n, generator=torch.Generator().manual_seed(n)).to(dtype)
        S = (X.mT @ X) / p
        W = (X @ X.mT)[:, :n, :n] / n
        each = [torch.tensor([number, 0.5, -1.0][:k]) for number in (0.02, 0.7, 1.5)]
        cases = [(S, S, S, *each), (X.mT, X.mT, None, 0.01, 0.0, 0.0), (S, S, S, 0.3, -0.5, 2.0),
                 (X.mT.contiguous(), X.mT, None, 1.0, 0.0, -1.0)]
        for A, B, D, alpha, beta, gamma in cases:
            found = symmetric_by_triton(A, B, D, alpha, beta, gamma)
            wide = [None if T is None else T.float() for T in (A, B, D)]
            exact = symmetric_by_torch(*wide, alpha, beta, gamma)
            error = (found.float() - exact).abs().max() / exact.abs().max()
            assert error < torch.finfo(dtype).eps, (dtype, k, n, p, alpha, error)
            assert torch.equal(found, found.mT) and found.dtype == dtype
print("compared")
"""


def symmetric(k: int, n: int, seed: int = 0) -> Tensor:
    X = torch.randn(k, n, n, generator=torch.Generator().manual_seed(seed))
    return X @ X.mT / n


def test_the_kernel_gives_what_pytorch_gives() -> None:
    """Sizes that fill tiles and that do not, both layouts of A and B, with and without D."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernel cannot be tried")
    code, out, err = in_fresh_python("-c", COMPARE, cwd=ROOT, TRITON_INTERPRET="1")
    assert (code, out) == (0, "compared\n"), err


def test_a_product_is_the_sum_that_is_documented() -> None:
    A, D = symmetric(3, 8), symmetric(3, 8, seed=1)
    found = symmetric_product(A, A, D, alpha=0.5, beta=-2.0, gamma=3.0)
    assert torch.allclose(found, 0.5 * A @ A.mT - 2 * D + 3 * torch.eye(8), atol=1e-5)
    assert torch.allclose(symmetric_product(A, A), A @ A.mT, atol=1e-5)


def test_on_the_cpu_and_in_full_precision_pytorch_computes_it() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert not kernel_runs(torch.zeros(1, 4, 4, dtype=dtype))
    A = symmetric(2, 6)
    assert torch.equal(symmetric_product(A, A), symmetric_by_torch(A, A, None, 1.0, 0.0, 0.0))


def test_without_triton_the_optimizers_work() -> None:
    """A CPU build of torch comes without it."""
    hide = "import sys; sys.modules['triton'] = None\n"
    use = "import torch; from optimizers.polar import polar\n"
    use += "print(polar(torch.eye(4), 'gram6', torch.float32).diagonal().min() > 0.99)"
    code, out, err = in_fresh_python("-c", hide + use, cwd=ROOT)
    assert (code, out) == (0, "tensor(True)\n"), err
    assert "triton" not in sys.modules or sys.modules["triton"] is not None
