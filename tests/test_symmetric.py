"""optimizers/symmetric.py: the Triton kernel, run by its interpreter, against PyTorch."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import in_fresh_python
from torch import Tensor

from optimizers import symmetric
from optimizers.gram import gram_polar
from optimizers.symmetric import symmetric_by_torch, symmetric_matmul, symmetric_obstacle

ROOT = Path(__file__).resolve().parent.parent
COMPARE = """
import torch
from optimizers.symmetric import TILE, symmetric_by_torch, symmetric_by_triton
def compare(k, n, p, dtype=torch.float16):  # the interpreter of Triton 3.6 misreads bfloat16
    X = torch.randn(k, p, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    S = (X.mT @ X) / p
    W = (X @ X.mT)[:, :n, :n] / n
    each = [torch.tensor([number, 0.5, -1.0][:k]) for number in (0.02, 0.7, 1.5)]
    cases = [(S, S, S, *each), (X.mT, X.mT, None, 0.01, 0.0, 0.0), (S, S, S, 0.3, -0.5, 2.0),
             (X.mT.contiguous(), X.mT, None, 1.0, 0.0, -1.0)]
    for A, B, D, alpha, beta, gamma in cases:
        numbers, each = [alpha, beta, gamma], None
        if isinstance(alpha, torch.Tensor):
            numbers, each = [0.0] * 3, torch.stack(numbers)
        found = symmetric_by_triton(A, B, D, numbers, each)
        wide = [None if T is None else T.float() for T in (A, B, D)]
        exact = symmetric_by_torch(*wide, alpha, beta, gamma)
        error = (found.float() - exact).abs().max() / exact.abs().max()
        assert error < torch.finfo(dtype).eps, (dtype, k, n, p, alpha, error)
        tile = torch.arange(n) // TILE
        beside = tile[:, None] != tile  # the diagonal; where it is, a BLAS may sum in any order
        assert torch.equal(found[:, beside], found.mT[:, beside]) and found.dtype == dtype

S = torch.eye(8, dtype=torch.float16)[None]
torch.library.opcheck(symmetric_by_triton, (S, S, None, [1.0, 0.0, 0.0], None))
for k, n, p in ((2, 256, 192), (1, 200, 80), (3, 136, 304), (2, 8, 16), (1, 520, 64)):
    compare(k, n, p)
print("compared")
"""
HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimizers.symmetric import DEPTH, STAGES, TILE, symmetric_jit
tile = "tensordesc<fp16[1, {}, {}]>".format
for turned, given in ((False, ["D"]), (True, []), (False, ["D", "coefficients"])):
    A, C = tile(DEPTH, TILE) if turned else tile(TILE, DEPTH), tile(TILE, TILE)
    constants = dict(p=768, A_TURNED=turned, B_TURNED=turned, TILE=TILE, DEPTH=DEPTH)
    constants |= dict.fromkeys({"D", "coefficients"} - {*given})
    types = dict(A=A, B=A, D=C, C=C, alpha="fp32", beta="fp32", gamma="fp32")
    types |= dict(coefficients="*fp32")
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(symmetric_jit(), types, constants)
    options = dict(num_warps=4, num_stages=STAGES)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in made.asm["ptx"] and "cp.async.bulk.tensor" in made.asm["ptx"]
    assert made.metadata.shared <= 113 * 1024, "two programs on each processor"
print("compiled")
"""


def symmetric_stack(k: int, n: int, seed: int = 0) -> Tensor:
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


def test_compiled_code_sees_one_operator_for_each_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the kernel, which inductor translates again and again, nor its parts in PyTorch."""
    monkeypatch.setattr(symmetric, "symmetric_obstacle", lambda *_: "")
    X, graphs = torch.zeros(2, 24, 8, dtype=torch.float16), []

    def backend(module: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(module.graph)
        return lambda *inputs: (X,)

    torch.compile(gram_polar, backend=backend, fullgraph=True, dynamic=False)(X)
    (graph,) = graphs
    called = [str(node.target) for node in graph.nodes if node.op.startswith("call")]
    operator = "aurora.symmetric_matmul.default"
    assert called.count(operator) == 18
    others = [name for name in called if "matmul" in name and name != operator]
    assert len(others) == 3  # X <- Q X, after every second step


def test_a_matmul_is_the_sum_that_is_documented() -> None:
    A, D = symmetric_stack(3, 8), symmetric_stack(3, 8, seed=1)
    found = symmetric_matmul(A, A, D, alpha=0.5, beta=-2.0, gamma=3.0)
    assert torch.allclose(found, 0.5 * A @ A.mT - 2 * D + 3 * torch.eye(8), atol=1e-5)
    assert torch.allclose(symmetric_matmul(A, A), A @ A.mT, atol=1e-5)


def test_on_the_cpu_and_in_full_precision_pytorch_computes_it() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert symmetric_obstacle(torch.device("cpu"), dtype, 4, 4) == "no CUDA device"
    A = symmetric_stack(2, 6)
    assert torch.equal(symmetric_matmul(A, A), symmetric_by_torch(A, A, None, 1.0, 0.0, 0.0))


def test_the_obstacle_of_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU; the log says which matmuls run and why."""
    half, cuda, capability = torch.float16, torch.device("cuda"), [(9, 0)]
    monkeypatch.setattr(symmetric, "HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert symmetric_obstacle(cuda, half, 768, 3072) == ""
    assert symmetric_obstacle(cuda, torch.bfloat16, 8, 8) == ""
    assert symmetric_obstacle(cuda, torch.float32, 768, 768) == "not in half precision"
    assert symmetric_obstacle(cuda, half, 768, 12) == "a size is no multiple of 8"
    capability[0] = (8, 0)
    assert symmetric_obstacle(cuda, half, 768, 768) == "a GPU before Hopper"
    for module, name, value in ((torch.version, "hip", "6.4"), (symmetric, "HAS_TRITON", False)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert symmetric_obstacle(cuda, half, 768, 768) == "no Triton for NVIDIA GPUs"


def test_without_triton_the_optimizers_work() -> None:
    """A CPU build of torch comes without it."""
    hide = "import sys; sys.modules['triton'] = None\n"
    use = "import torch; from optimizers.polar import polar\n"
    use += "print(polar(torch.eye(4), 'gram6', torch.float32).diagonal().min() > 0.99)"
    code, out, err = in_fresh_python("-c", hide + use, cwd=ROOT)
    assert (code, out) == (0, "tensor(True)\n"), err
    assert "triton" not in sys.modules or sys.modules["triton"] is not None
