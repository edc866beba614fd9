"""optimizers/products.py: the Triton kernel, run by its interpreter, against PyTorch."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import in_fresh_python
from torch import Tensor

from optimizers import kernels
from optimizers.kernels import kernel_runs
from optimizers.products import symmetric_by_torch, symmetric_product

ROOT = Path(__file__).resolve().parent.parent
COMPARE = """
import torch
from optimizers.kernels import symmetric_by_triton
from optimizers.products import symmetric_by_torch
def compare(k, n, p, dtype=torch.float16):  # the interpreter of Triton 3.6 misreads bfloat16
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

for k, n, p in ((2, 256, 192), (1, 200, 80), (3, 136, 304), (2, 8, 16), (1, 520, 64)):
    compare(k, n, p)
print("compared")
"""
HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimizers.kernels import DEPTH, STAGES, TILE, symmetric_kernel
tile = "tensordesc<fp16[1, 1, {}, {}]>".format
for turned, number in ((False, "fp32"), (True, "fp64")):
    A = tile(DEPTH, TILE) if turned else tile(TILE, DEPTH)
    constants = dict(p=768, A_TURNED=turned, B_TURNED=turned, HAS_D=True, EACH=False, TILE=TILE,
                     DEPTH=DEPTH)
    types = dict(A=A, B=A, D=tile(TILE, TILE), C=f"tensordesc<fp16[1, {TILE}, {TILE}]>")
    types |= dict.fromkeys(("alpha", "beta", "gamma"), number)
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(symmetric_kernel, types, constants)
    options = dict(num_warps=4, num_stages=STAGES)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in made.asm["ptx"] and "cp.async.bulk.tensor" in made.asm["ptx"]
    assert made.metadata.shared <= 113 * 1024, "two programs on each processor"
    assert made.asm["ptx"].count("f64") < 10, "numbers come as fp64 from inductor, tiles did too"
print("compiled")
"""


def symmetric(k: int, n: int, seed: int = 0) -> Tensor:
    X = torch.randn(k, n, n, generator=torch.Generator().manual_seed(seed))
    return X @ X.mT / n


def test_the_kernel_gives_what_pytorch_gives() -> None:
    """Sizes that fill tiles and that do not, both layouts of A and B."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernel cannot be tried")
    code, out, err = in_fresh_python("-c", COMPARE, cwd=ROOT, TRITON_INTERPRET="1")
    assert (code, out) == (0, "compared\n"), err


def test_the_kernel_compiles_for_hopper_and_two_programs_fit_on_a_processor() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its kernel cannot be compiled")
    code, out, err = in_fresh_python("-c", HOPPER, cwd=ROOT)
    assert (code, out) == (0, "compiled\n"), err


def test_what_reads_is_described_apart_from_what_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code once gave nan: inductor keeps one descriptor of a tensor for each shape of
    blocks, and a product that read a tensor by the one that wrote it did not wait. And a product
    without D must not name C in its place: it would seem to read what it writes."""
    pytest.importorskip("triton", reason="Triton is not installed: it has no descriptors")
    calls = []

    class Kernel:
        def __getitem__(self, grid: tuple) -> Callable:
            return lambda *described, **_: calls.append(described[:4])

    monkeypatch.setattr(kernels, "symmetric_kernel", Kernel())
    X = torch.zeros(1, 256, 256)
    for A, B in ((X, X), (X.mT, X), (X.mT, X.mT)):
        for D in (None, X):
            kernels.symmetric_by_triton(A, B, D, 1.0, 0.0, 0.0)
    assert len(calls) == 6
    for *read, C in calls:
        assert all(len(one.block_shape) == len(one.base.shape) == 4 for one in read)
        assert len(C.block_shape) == 3 and C.base.data_ptr() != X.data_ptr()
        assert all(one.base.data_ptr() == X.data_ptr() for one in read), "C for a D"


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
