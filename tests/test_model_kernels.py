"""kernels/: each kernel, in the interpreter of Triton, and its PyTorch, against the formula."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import in_fresh_python
from test_model import randomise
from torch import Tensor

import kernels
import train_gpt
from kernels import capped_loss, capped_loss_by_torch, runs_triton, squared_relu_mlp

ROOT = Path(__file__).resolve().parent.parent
CAPPED = """
import torch
from kernels import capped_loss_by_torch, capped_loss_by_triton
for rows, n in ((3, 5000), (5, 4096), (2, 257), (1, 3)):
    generator = torch.Generator().manual_seed(n)
    z = (20 * torch.randn(rows, n, generator=generator)).half()  # bfloat16 is misread by it
    targets = torch.randint(0, n, (rows,), generator=generator)
    targets[0], targets[-1] = 0, n - 1
    wide, kept, found = z.float(), z.clone(), z.clone()
    expected = capped_loss_by_torch(wide, targets, True)  # wide holds dz now
    for write in (False, True):
        losses = capped_loss_by_triton(found, targets, write)
        assert losses.dtype == torch.float32
        assert (losses - expected).abs().max() < 1e-5 * expected.abs().max(), (rows, n)
        assert write or torch.equal(found, kept)
    error = (found.float() - wide).abs().max() / wide.abs().max()
    assert error < torch.finfo(torch.float16).eps, (rows, n, error)
print("compared")
"""

MLP = """
import torch
from torch import nn
import kernels
from kernels import *
def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()
half = torch.float16
for m, k, n in ((128, 64, 256), (200, 40, 136), (3, 8, 24)):
    torch.manual_seed(m)
    x, W, V, dy = (torch.randn(*s).to(half) for s in ((m, k), (n, k), (k, n), (m, k)))
    W, b = W / k**0.5, torch.randn(n)
    post = relu_square_by_triton(x, W, b)
    exact = relu_square_by_torch(x.double(), W.double(), b.double())
    assert post.dtype == half and error(post, exact) < 1e-3 and 0.2 < (post > 0).float().mean()
    dpre, db = relu_square_gradient_by_triton(dy, V, post)
    wide, db_wide = relu_square_gradient_by_torch(dy.double(), V.double(), post.double())
    assert dpre.dtype == half and error(dpre, wide) < 1e-3
    assert db.dtype == torch.float32 and error(db, db_wide) < 1e-5, error(db, db_wide)
    torch.library.opcheck(relu_square_by_triton, (x, W, b))
    torch.library.opcheck(relu_square_gradient_by_triton, (dy, V, post))
x[0, 0] = float("nan")
assert relu_square_by_triton(x, W, b)[0].isnan().all()

x = x[1:].clone().requires_grad_()
fc, proj = nn.Linear(k, n), nn.Linear(n, k)
def gradients(mlp):
    for p in (x, *fc.parameters(), *proj.parameters()):
        p.grad = None
    mlp(x, fc, proj).backward(dy[1:])
    return [p.grad.clone() for p in (x, *fc.parameters(), *proj.parameters())]
expected = gradients(squared_relu_mlp)
kernels.runs_triton = lambda x: torch.version.hip is None
torch.cuda.get_device_capability = lambda: (9, 0)
compiled = torch.compile(squared_relu_mlp, backend="aot_eager", fullgraph=True)
for found in (gradients(squared_relu_mlp), gradients(compiled)):
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and error(a, b.double()) < 2e-3
print("compared")
"""
HOPPER = """
import kernels, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
def build(kernel, types, constants, warps):
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    options = dict(num_warps=warps, num_stages=3)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
for write in (False, True):
    types = dict(Z="*bf16", targets="*i64", losses="*fp32", cap="fp32", bend="fp32")
    constants = dict(n=50304, WRITE=write, BLOCK=4096)
    assert "ex2.approx" in build(kernels.capped_loss_kernel, types, constants, 16)
for backward in (False, True):
    tiles = dict(A=(128, 64), B=(64, 128) if backward else (128, 64), C=(128, 128), post=(128, 128))
    types = {name: f"tensordesc<bf16[{a}, {b}]>" for name, (a, b) in tiles.items()}
    types |= dict(sums="*fp32") | ({} if backward else dict(bias="*fp32"))
    constants = dict(n=3072, k=768, BACKWARD=backward, ROWS=128, COLUMNS=128, DEPTH=64)
    constants |= dict(bias=None) if backward else {}
    ptx = build(kernels.relu_square_kernel, types, constants, 4)
    assert "wgmma" in ptx and "cp.async.bulk.tensor" in ptx
print("compiled")
"""


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    z = F.linear(x, weight, bias)
    logits = 15 * z * torch.rsqrt(z.square() + 15**2)
    return F.cross_entropy(logits, targets, reduction="sum")


def head(tokens: int, n: int, width: int = 24) -> tuple[list[Tensor], Tensor]:
    """x, weight and bias in float64, logits beyond the cap; targets with both ends."""
    parts = [random(tokens, width, seed=1), random(n, width, seed=2, scale=3), random(n, seed=3)]
    targets = torch.randint(0, n, (tokens,), generator=torch.Generator().manual_seed(4))
    targets[0], targets[-1] = 0, n - 1
    return [part.double().requires_grad_() for part in parts], targets


def as_model(parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Activations in `dtype`, weights in float32, with the values that x has in `dtype`."""
    x, *weights = (part.detach() for part in parts)
    return [x.to(dtype).requires_grad_(), *(w.float().requires_grad_() for w in weights)]


@pytest.mark.parametrize("name", ["CAPPED", "MLP"])
def test_a_kernel_gives_what_its_pytorch_gives(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be tried")
    code, out, err = in_fresh_python("-c", globals()[name], cwd=ROOT, TRITON_INTERPRET="1")
    assert (code, out) == (0, "compared\n"), err


def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter takes what the compiler refuses: the loss once had a name of two types."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be tried")
    code, out, err = in_fresh_python("-c", HOPPER, cwd=ROOT)
    assert (code, out) == (0, "compiled\n"), err


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_loss_and_gradients_of_the_head_are_the_plain_ones_in_chunks_of_any_size(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 to 1e-5; a backward pass from 3 x the loss gives 3 x the gradients."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    plain, targets = head(16, 300)
    parts = as_model(plain, torch.float32)
    expected, found = plain_loss(*plain, targets), capped_loss(*parts, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (3 * expected).backward()
    (3 * found).backward()
    for a, b in zip(parts, plain, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm()


def test_in_bfloat16_the_heads_gradients_stay_within_a_hundredth(monkeypatch) -> None:
    """z and dz are rounded to 8 bits, sums over tokens and chunks are not."""
    monkeypatch.setattr(kernels, "CHUNK", 64)
    plain, targets = head(512, 300)
    parts = as_model(plain, torch.bfloat16)
    expected, found = plain_loss(*plain, targets), capped_loss(*parts, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    expected.backward()
    found.backward()
    assert [part.grad.dtype for part in parts] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(parts, plain, strict=True):
        assert (a.grad - b.grad).norm() < 0.01 * b.grad.norm()


def test_without_gradients_the_head_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Function is told which inputs need a gradient, also where none is recorded: under no_grad
    it once did the work of a backward pass in every validation."""
    written = []

    def spy(z: Tensor, targets: Tensor, write: bool) -> Tensor:
        written.append(write)
        return capped_loss_by_torch(z, targets, write)

    monkeypatch.setattr(kernels, "capped_loss_by_torch", spy)
    plain, targets = head(8, 30)
    parts = as_model(plain, torch.float32)
    with torch.no_grad():
        without = capped_loss(*parts, targets)
    learning = capped_loss(*parts, targets)
    assert written == [False, True]
    assert torch.equal(without, learning) and not without.requires_grad
    assert learning.requires_grad


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.01)])
def test_the_mlp_and_its_gradients_are_the_plain_ones(dtype: str, tolerance: float) -> None:
    fc, proj = torch.nn.Linear(24, 96), torch.nn.Linear(96, 24)
    parts = [random(2, 16, 24).requires_grad_(), *fc.parameters(), *proj.parameters()]
    for i, p in enumerate(parts[1:]):
        p.data = random(*p.shape, seed=i + 1, scale=0.2)
    wide = [p.detach().to(getattr(torch, dtype)).double().requires_grad_() for p in parts]
    x, W, b, V, c = wide
    expected = F.linear(F.linear(x, W, b).relu().square(), V, c)
    found = squared_relu_mlp(parts[0].to(getattr(torch, dtype)), fc, proj)
    assert (found - expected).norm() < tolerance * expected.norm()
    dy = random(2, 16, 24, seed=9)
    expected.backward(dy.double())
    found.backward(dy.type_as(found))
    for a, exact in zip(parts, wide, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - exact.grad).norm() < tolerance * exact.grad.norm()


def test_a_pass_without_gradients_still_calls_the_mlps_layers() -> None:
    """--diagnostics watches what comes out of fc, in trunk(..., eager=True) under no_grad."""
    mlp, x = train_gpt.MLP(8), random(3, 8)
    randomise(mlp)
    seen = []
    mlp.fc.register_forward_hook(lambda *_: seen.append(1))
    fused = mlp(x)
    assert not seen
    with torch.no_grad():
        assert torch.allclose(mlp(x), fused, rtol=1e-5)
    assert seen


def test_on_the_cpu_and_in_full_precision_pytorch_computes_it() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert not runs_triton(torch.zeros(1, 4, dtype=dtype))


def test_without_triton_the_kernels_have_their_pytorch() -> None:
    """A CPU build of torch comes without it."""
    hide = "import sys; sys.modules['triton'] = None\nimport torch, kernels\n"
    use = "print(kernels.capped_loss(*torch.eye(2)[None].expand(2, 2, 2), torch.zeros(2),"
    use += " torch.zeros(2, dtype=torch.long)) > 1)"
    code, out, err = in_fresh_python("-c", hide + use, cwd=ROOT)
    assert (code, out) == (0, "tensor(True)\n"), err
