"""models/gemm.py: compiled for a Hopper GPU anywhere, compared with PyTorch where there is one."""

import pytest
import torch
from conftest import ROOT, in_fresh_python
from trunk_references import (
    matmul_by_torch,
    qkv_by_torch,
    relu_square_by_torch,
    relu_square_gradient_by_torch,
)

from models import gemm
from models.head import capped_loss_by_torch
from models.passes import CAP, loss_from_sums_by_triton

COMPILE = """
import re, subprocess, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from models import gemm as P
def block(kind, *shape):
    layout = P.shared_layout(shape, getattr(torch, kind))
    short = dict(bfloat16="bf16", float8_e4m3fn="fp8e4nv")[kind]
    return f"tensordesc<{short}{list(shape)},{layout!r}>"
numbers = "m n k groups row_tokens"
kinds = "relu_square", "relu_square 8 bits", "relu_square_gradient", "qkv", "logits", "matmul"
for kind in kinds:
    kind, _, scaled = kind.partition(" ")
    of, depth = ("float8_e4m3fn", 128) if scaled else ("bfloat16", 64)
    half = block("bfloat16", 128, 64)
    types = dict(A=block(of, 128, depth), C=half, extra=half, eps="fp32")
    if kind == "logits":
        types["eps"] = "fp32", "fp32"
    deep = kind in ("relu_square_gradient", "matmul")
    types["B"] = block(of, *((depth, 128) if deep else (128, depth)))
    types |= dict.fromkeys("bias scale out".split(), "*fp32")
    types |= dict.fromkeys(numbers.split(), "i32")
    given = dict(KIND=kind, SCALED=bool(scaled), STAGES_A=P.STAGES_A, STAGES_B=P.STAGES_B)
    types |= dict.fromkeys(given, "constexpr")
    types = {name: types[name] for name in P.gemm_kernel.arg_names}
    source = GluonASTSource(P.gemm_kernel, types, given)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=P.launch_options(kind))
    assert made.metadata.shared <= 227 * 1024, "more than an SM has"
    text = made.asm["ptx"]
    assert f".entry {kind}_kernel(" in text, "profiles show this name"
    assert "wgmma" in text and "cp.async.bulk.tensor" in text and "setmaxnreg" in text
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = map(int, re.findall(r"STACK:(\\d+)", said))
    assert stack <= 16, said  # bytes of a thread: 0 with Triton 3.6 and 3.7, 8 with 3.9
print("compiled")
"""
SIZES = [(40000, 768, 3072), (1000, 128, 768), (300, 64, 256), (200, 40, 136), (3, 16, 24)]

needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and gemm.compute_capability("cuda")[0] == 9),
    reason="no Hopper GPU: these matmuls run on one only",
)


def parts(m: int, k: int, n: int) -> list[torch.Tensor]:
    """Return x (m, k), W (n, k), V (k, n), dy (m, k) in bfloat16 on the GPU, and b (n)."""
    generator = torch.Generator("cuda").manual_seed(m)
    options = dict(device="cuda", generator=generator)
    x, W, V, dy = (torch.randn(*s, **options) for s in ((m, k), (n, k), (k, n), (m, k)))
    return [*(t.bfloat16() for t in (x, W / k**0.5, V, dy)), torch.randn(n, **options)]


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def test_they_compile_for_a_gpu_that_is_not_there_and_keep_to_their_registers() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: nothing to compile with")
    code, out, err = in_fresh_python("-c", COMPILE, cwd=ROOT)
    assert (code, out) == (0, "compiled\n"), err


def test_a_triton_without_gluon_has_the_plain_model() -> None:
    hide = "import sys; sys.modules['triton.experimental'] = None\n"
    hide += "import torch, models.gemm as P\nP.triton_obstacle = lambda x: ''\n"
    use = "print(P.gluon, P.gemm_obstacle(torch.zeros(1)))"
    code, out, err = in_fresh_python("-c", hide + use, cwd=ROOT)
    assert (code, out) == (0, "None Gluon missing in this Triton\n"), err


@needs_hopper
@pytest.mark.parametrize("m, k, n", SIZES)
def test_relu_square_and_its_gradient_are_those_of_pytorch(m: int, k: int, n: int) -> None:
    """They agree with float64 on the same inputs up to the rounding of bfloat16."""
    x, W, V, dy, b = parts(m, k, n)
    post = gemm.relu_square_by_gluon(x, W, b)
    assert 0.2 < (post > 0).float().mean()
    assert apart(post, relu_square_by_torch(*(t.double() for t in (x, W, b)))) < 3e-3
    dpre, db = gemm.relu_square_gradient_by_gluon(dy, V, post)
    exact = relu_square_gradient_by_torch(*(t.double() for t in (dy, V, post)))
    assert apart(dpre, exact[0]) < 3e-3 and apart(db, exact[1]) < 1e-5


@needs_hopper
def test_nan_stays_in_its_row() -> None:
    x, W, *_, b = parts(300, 64, 256)
    x[7, 3] = float("nan")
    post = gemm.relu_square_by_gluon(x, W, b)
    assert post[7].isnan().all() and post.isnan().sum() == 256


@needs_hopper
@pytest.mark.parametrize("m, k, n", [size for size in SIZES if size[1] % 16 == 0])
def test_8_bit_matmuls_are_those_of_pytorch(m: int, k: int, n: int) -> None:
    """Tensor cores add 8-bit products with fewer bits than float32 has."""
    x, W, *_, b = parts(m, k, n)
    (x8, scale_x), (W8, scale_W) = gemm.round_to_e4m3(x), gemm.round_to_e4m3(W)
    post = gemm.relu_square_by_gluon(x8, W8, b, scale_x * scale_W)
    exact = relu_square_by_torch(x8, W8, b, scale_x * scale_W, torch.float32)
    assert post.dtype == torch.bfloat16 and apart(post, exact) < 5e-3


@needs_hopper
@pytest.mark.parametrize("tokens, row_tokens, heads", [(8192, 1024, 6), (900, 300, 5), (80, 40, 1)])
def test_qkv_is_that_of_pytorch(tokens: int, row_tokens: int, heads: int) -> None:
    dim = gemm.HEAD_DIM
    x, W, *_, b = parts(tokens, 48, 3 * heads * dim)
    rotation = torch.randn(row_tokens, 1, dim // 2, device="cuda")
    tables = rotation.cos(), rotation.sin()
    found = gemm.qkv_by_gluon(x, W, b, *tables, gemm.pack_angles(*tables))
    exact = qkv_by_torch(*(t.double() for t in (x, W, b, *tables)), None)
    assert apart(found[0], exact[0]) < 3e-3 and apart(found[1], exact[1]) < 1e-5


@needs_hopper
@pytest.mark.parametrize("m, k, n", SIZES)
def test_plain_matmuls_are_those_of_pytorch(m: int, k: int, n: int) -> None:
    """[x y] W is right as well, also if x ends within a block."""
    x, _, V, y, _ = parts(m, k, n)
    assert apart(gemm.matmul_by_gluon(x, V), x.double() @ V.double()) < 3e-3
    y = y[:, : k - 8]
    W = torch.cat([V, V[: k - 8].flip(0)])
    exact = matmul_by_torch(x.double(), W.double(), y.double())
    assert apart(gemm.matmul_by_gluon(x, W, y), exact) < 3e-3


@needs_hopper
@pytest.mark.parametrize("tokens, n", [(2000, 50304), (300, 256), (5, 128)])
def test_logits_come_with_their_sums_of_exponentials(tokens: int, n: int) -> None:
    """z is that of float64 up to rounding; loss and log sums are those of the rounded z."""
    x, W, *_, b = parts(tokens, 64, n)
    z, sums = gemm.logits_by_gluon(x, 4 * W, b, CAP)
    assert apart(z, 4 * x.double() @ W.double().mT + b.double()) < 3e-3
    targets = torch.randint(n, (tokens,), device="cuda")
    found = loss_from_sums_by_triton(z, targets, sums)
    for one, exact in zip(found, capped_loss_by_torch(z, targets), strict=True):
        assert apart(one, exact) < 1e-5


@needs_hopper
def test_twice_the_same_gives_the_same_bits() -> None:
    x, W, V, dy, b = parts(*SIZES[0])
    post = gemm.relu_square_by_gluon(x, W, b)
    for _ in range(5):
        assert torch.equal(gemm.relu_square_by_gluon(x, W, b), post)
        sums = [gemm.matmul_by_gluon(dy, torch.cat([V, -V]), x) for _ in range(2)]
        assert torch.equal(*sums)
        z = gemm.logits_by_gluon(dy, W, b, CAP)
        assert all(map(torch.equal, z, gemm.logits_by_gluon(dy, W, b, CAP)))
        both = [gemm.relu_square_gradient_by_gluon(dy, V, post) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
