"""models/: Triton's kernels run in its interpreter, trunk and head against the plain modules.

The kernels are compared with their PyTorch (trunk_references.py, head.py), and that PyTorch, in the
Functions of trunk.py and head.py, with the plain GPT of train_gpt.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trunk_references
from conftest import ROOT, in_fresh_python
from torch import Tensor
from trunk_references import norm_by_torch, randomise, run_trunk_by_torch

from models import gemm, head, passes, trunk
from models.gemm import compute_capability
from models.head import capped_loss, head_path
from models.passes import triton_obstacle
from models.trunk import trunk_obstacle
from train_gpt import GPT

START = """
import sys, torch
sys.path.append("tests")
from triton.runtime.interpreter import InterpreterBuilder
splat = InterpreterBuilder.create_splat
def create_splat(self, block, scalar):  # 3.9 makes integers of booleans
    made = splat(self, block, scalar)
    made.data = made.data.astype(scalar.data.dtype)
    return made
InterpreterBuilder.create_splat = create_splat
import models.passes
from models.head import *
from models.passes import *
from trunk_references import *
models.passes.PROGRAMS = 27
half = torch.float16  # the interpreter misreads bfloat16
def compare(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < tolerance, (a.shape, error)
"""
CAPPED = """
for rows, n in ((3, 5000), (5, 4096), (40, 257), (1, 3)):
    generator = torch.Generator().manual_seed(n)
    z = (20 * torch.randn(rows, n, generator=generator)).to(half)
    targets = torch.randint(0, n, (rows,), generator=generator)
    targets[0], targets[-1] = 0, n - 1
    wide, kept = z.float(), z.clone()
    expected, found = capped_loss_by_torch(wide, targets), capped_loss_by_triton(z, targets)
    assert torch.equal(z, kept) and found[0].dtype == torch.float32
    compare(found, expected, 1e-5)
    powers = (wide * (wide.square() / CAP**2 + 1).rsqrt() - CAP).exp()
    sums = torch.stack([part.sum(dim=1) for part in powers.split(100, dim=1)])
    compare(loss_from_sums_by_triton(z, targets, sums), expected, 1e-5)
    sums = capped_gradient_by_triton(z, targets, found[1])
    compare([sums], [capped_gradient_by_torch(wide, targets, expected[1])], 1e-5)
    compare([z], [wide], 5e-4)
print("compared")
"""
NORM = """
for tokens, width in ((70, 48), (5, 128)):
    torch.manual_seed(width)
    h, dh, dn = torch.randn(3, tokens, width).to(half)
    shift, gain = torch.randn(2, width)
    expected, found = norm_by_torch(h, shift, gain), norm_by_triton(h, shift, gain)
    compare(found, expected, 1e-4)
    n, scales = found
    for passed in (dh, None):
        wide = [t if t is None else t.double() for t in (passed, dn, n, gain, scales)]
        found = norm_gradient_by_triton(passed, dn, n, gain, scales)
        exact = norm_gradient_by_torch(*wide)
        compare(found[:1], exact[:1], 5e-4)
        compare(found[1:], exact[1:], 1e-6)
    n, gain[5] = n.float(), 0.0  # a gain of 0 loses no gradient
    n[:, 5], dn = 2.0**-60, dn.float()
    compare([norm_gradient_by_triton(None, dn, n, gain, scales)[1][5]], [dn[:, 5].sum()], 1e-5)
    assert 0 < norm_by_triton(h.float(), shift, gain)[0][:, 5].abs().max() < 1e-16
print("compared")
"""
EMBED = """
for tokens, words, width in ((70, 9, 48), (5, 40, 128), (200, 3, 16)):
    torch.manual_seed(width)
    dh, dn = torch.randn(2, tokens, width).to(half)
    table, gains = torch.randn(words, width).to(half), torch.randn(2, width)
    ids = torch.randint(words - 1, (tokens,))  # the last word does not occur
    ids[-1] = gains[0, 3] = gains[1, 5] = 0
    gains[1, 7] = -1e-30
    found, exact = embed_by_triton(ids, table, *gains), embed_by_torch(ids, table.double(), *gains)
    compare(found, exact, 1e-3)
    (n, scales), wide = found[1:], [t.double() for t in (table, *gains)]
    found = embed_gradient_by_triton(dh, dn, n, ids, table, *gains, scales)
    exact = embed_gradient_by_torch(dh.double(), dn.double(), n.double(), ids, *wide, scales)
    compare(found, exact, 5e-4)
    compare(found[1:], exact[1:], 1e-6)
    assert not found[0][-1].any()
print("compared")
"""
MULTIPLY = """
for count, factor in ((70000, 3.0), (5, -0.5), (300, 1.0), (300, float("nan"))):
    x = torch.randn(count).to(half)
    kept, version = x.clone(), x._version
    multiply_by_triton(x, torch.tensor(factor))
    assert torch.equal(x, kept * factor) or (factor != factor and x.isnan().all())
    assert x._version > version, "what was saved for a backward pass has changed"
print("compared")
"""
ROTARY = """
sizes = (24, 6, 3, 16), (30, 6, 3, 16), (6, 6, 3, 16), (80, 40, 1, 128), (280, 140, 5, 32)
for tokens, row_tokens, heads, head_dim in sizes:
    torch.manual_seed(heads)
    rotation = torch.randn(row_tokens, 1, head_dim // 2)
    tables = rotation.cos(), rotation.sin()
    x, W, b = (torch.randn(*s) for s in ((tokens, 48), (3 * heads * head_dim, 48), (1,)))
    found, scales = qkv_by_torch(x, W / 48**0.5, b.expand(len(W)), *tables, None)
    found = found.to(half)
    grads = [g.to(half) for g in torch.randn(2, heads, tokens, head_dim).transpose(1, 2)]
    exact = rotary_gradient_by_torch(*(t.double() for t in (*grads, found, *tables, scales)))
    dqk, sums = rotary_gradient_by_triton(*grads, found, *tables, scales)
    compare([dqk], exact[:1], 5e-4)
    compare([sums], exact[1:], 1e-6)
print("compared")
"""
HOPPER = """
import triton
import models.passes as K
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
def build(kernel, pointers, numbers, warps=4, **constants):
    types = {name: kind for kind, names in pointers.items() for name in names.split()} | numbers
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    assert made.metadata.shared <= 227 * 1024, "more than an SM has"
half, wide, i32 = "*bf16", "*fp32", dict(tokens="i32")
head = dict(HEADS=6, BLOCK=8, HALF=64)
least = i32 | dict(least="fp32")
eps = least | dict(eps="fp32")
build(K.norm_kernel, {half: "h n", wide: "shift gain scales"}, eps,
      width=768, ROWS=2, BLOCK=1024)
build(K.norm_gradient_kernel, {half: "dh dn n dx", wide: "gain scales sums"}, least, 1,
      iterations=249, width=768, PASSED=True, ROWS=1, BLOCK=1024)
build(K.embed_kernel, {"*i64": "ids", half: "table h n", wide: "gain next_gain scales"}, eps,
      width=768, ROWS=2, BLOCK=1024)
build(K.embed_gradient_kernel,
      {half: "dh dn n table", "*i32": "ids", "*i64": "order",
       wide: "gain next_gain scales dtable sums"},
      eps, 1, iterations=249, width=768, BLOCK=1024)
build(K.multiply_kernel, {half: "x", wide: "factor"}, dict(count="i32"), BLOCK=8192)
build(K.rotary_gradient_kernel, {half: "dq dk qkv dqk", wide: "cos sin scales sums"},
      i32 | dict(row_tokens="i32"), 1, **head, iterations=256)
for rows in (1024, 1056):
    build(K.sum_kernel, {wide: "x total"}, dict(n="i32"), rows=rows, ROWS=128, BLOCK=16)
losses = {half: "Z", wide: "losses log_sums", "*i64": "targets"}
build(K.capped_loss_kernel, losses, dict(cap="fp32", bend="fp32"), n=50304, BLOCK=2048)
losses = {half: "Z", wide: "log_sums sums", "*i64": "targets"}
build(K.loss_from_sums_kernel, {half: "Z", wide: "sums losses log_sums", "*i64": "targets"},
      dict(rows="i32", cap="fp32", bend="fp32"), parts=393, n=50304, ROWS=32, PARTS=64)
sizes = dict(n=50304, PART=128, BLOCK=512)
build(K.capped_gradient_kernel, losses, dict(rows="i32", bend="fp32"), **sizes)
print("compiled")
"""


HOPPER_HERE = torch.cuda.is_available() and compute_capability("cuda")[0] == 9


@pytest.mark.skipif(
    not HOPPER_HERE, reason="no Hopper GPU: the interpreter above runs one iteration after another"
)
def test_on_a_gpu_loops_of_many_iterations_give_what_pytorch_gives() -> None:
    """There, loads run ahead of the iterations that use them, and programs share words."""
    generator = torch.Generator("cuda").manual_seed(1)
    tokens, width, heads = 5000, 768, 6
    options = dict(device="cuda", generator=generator)
    dh, dn, h = torch.randn(3, tokens, width, **options).bfloat16()
    table, gains = (
        torch.randn(40, width, **options).bfloat16(),
        torch.rand(2, width, **options) + 0.5,
    )
    ids = torch.randint(40, (tokens,), **options)
    n, scales = passes.norm_by_triton(h, gains[1], gains[0])
    qkv = torch.randn(tokens, 3, heads, 128, **options).bfloat16()
    angle, s = torch.rand(500, 1, 64, **options), torch.rand(tokens, 2, heads, **options)
    calls = dict(
        norm_gradient=(dh, dn, n, gains[0], scales),
        embed=(ids, table, *gains),
        embed_gradient=(dh, dn, n, ids, table, *gains, scales),
        rotary_gradient=(
            *(d.view(tokens, heads, 128) for d in (dh, dn)),
            qkv,
            angle.cos(),
            angle.sin(),
            s,
        ),
    )
    for name, args in calls.items():
        wide = [t.double() if t.is_floating_point() else t for t in args]
        found = getattr(passes, f"{name}_by_triton")(*args)
        exact = getattr(trunk_references, f"{name}_by_torch")(*wide)
        for a, b in zip(found, exact, strict=True):
            rounded = a.dtype == dh.dtype or name == "embed"  # its scales are those of a rounded h
            assert (a.double() - b).norm() < (4e-3 if rounded else 1e-5) * b.norm(), name


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    z = F.linear(x, weight, bias)
    logits = 15 * z * torch.rsqrt(z.square() + 15**2)
    return F.cross_entropy(logits, targets, reduction="sum")


def head_inputs(tokens: int, n: int, width: int = 24) -> tuple[list[Tensor], Tensor]:
    """Return x, weight, bias in float64 with logits beyond the cap, targets with both ends."""
    parts = [random(tokens, width, seed=1), random(n, width, seed=2, scale=3), random(n, seed=3)]
    targets = torch.randint(0, n, (tokens,), generator=torch.Generator().manual_seed(4))
    targets[0], targets[-1] = 0, n - 1
    return [part.double().requires_grad_() for part in parts], targets


def as_model(parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies with gradients, x in `dtype` and weights in float32."""
    x, *weights = (part.detach() for part in parts)
    return [x.to(dtype).requires_grad_(), *(w.float().requires_grad_() for w in weights)]


@pytest.mark.parametrize("name", ["CAPPED", "EMBED", "MULTIPLY", "NORM", "ROTARY"])
def test_a_kernel_gives_what_its_pytorch_gives(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be tried")
    code, out, err = in_fresh_python("-c", START + globals()[name], cwd=ROOT, TRITON_INTERPRET="1")
    assert (code, out) == (0, "compared\n"), err


def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter accepts more: a name in the loss once had two types."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be tried")
    code, out, err = in_fresh_python("-c", HOPPER, cwd=ROOT)
    assert (code, out) == (0, "compiled\n"), err


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_loss_and_gradients_of_the_head_are_the_plain_ones_in_chunks_of_any_size(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They agree to 1e-5 in float32; 3 x the loss has 3 x the gradients."""
    monkeypatch.setattr(head, "CHUNK", chunk)
    plain, targets = head_inputs(16, 300)
    parts = as_model(plain, torch.float32)
    expected, found = plain_loss(*plain, targets), capped_loss(*parts, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (3 * expected).backward()
    (3 * found).backward()
    for a, b in zip(parts, plain, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm()


def test_going_backwards_twice_through_the_head_is_refused() -> None:
    """The gradients are multiplied in place: the second time, twice."""
    plain, targets = head_inputs(8, 30)
    loss = capped_loss(*as_model(plain, torch.float32), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_bfloat16_the_heads_gradients_stay_within_a_hundredth(monkeypatch) -> None:
    """z and dz are rounded to 8 bits of mantissa, sums over tokens and chunks are not."""
    monkeypatch.setattr(head, "CHUNK", 64)
    plain, targets = head_inputs(512, 300)
    parts = as_model(plain, torch.bfloat16)
    expected, found = plain_loss(*plain, targets), capped_loss(*parts, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    expected.backward()
    found.backward()
    assert [part.grad.dtype for part in parts] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(parts, plain, strict=True):
        assert (a.grad - b.grad).norm() < 0.01 * b.grad.norm()


def test_without_gradients_the_head_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctx.needs_input_grad is true under no_grad as well: every validation once computed gradients
    in vain."""
    made = []
    gradient = head.capped_gradient_by_torch
    monkeypatch.setattr(
        head, "capped_gradient_by_torch", lambda *args: made.append(1) or gradient(*args)
    )
    plain, targets = head_inputs(8, 30)
    parts = as_model(plain, torch.float32)
    with torch.no_grad():
        without = capped_loss(*parts, targets)
    assert not made and not without.requires_grad
    learning = capped_loss(*parts, targets)
    assert made and learning.requires_grad and torch.equal(without, learning)


def test_logits_of_8_bits_change_the_loss_a_little_and_the_gradients_by_their_rounding() -> None:
    """e4m3 has 3 bits of mantissa: each number is off by up to 1/16. The loss moves by less than
    1%, gradients move by less than 10%, and both do move."""
    plain, targets = head_inputs(64, 300)
    losses, grads = {}, {}
    for fp8 in (False, True):
        parts = as_model(plain, torch.float32)
        losses[fp8] = loss = capped_loss(*parts, targets, fp8)
        loss.backward()
        grads[fp8] = [part.grad for part in parts]
    assert 0 < abs(losses[True] / losses[False] - 1) < 0.01
    for rounded, exact in zip(grads[True], grads[False], strict=True):
        assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1


def small_model(dtype: torch.dtype, device: str = "cpu", fp8: bool = False) -> tuple[GPT, Tensor]:
    """Return a model with all weights away from zero, and 3 rows of tokens."""
    sizes = dict(vocab_size=257, layers=2, width=64, head_dim=16, expansion=4, row_tokens=32)
    if device == "cuda":  # sizes that the Gluon matmuls take
        sizes |= dict(vocab_size=384, width=256, head_dim=128)
    model = GPT(**sizes, dtype=dtype, device=torch.device(device))
    model.choose_kernels(compile=False, fp8=fp8)
    randomise(model)
    tokens = torch.randint(0, 257, (3, 32), generator=torch.Generator().manual_seed(5))
    return model, tokens.to(device)


def loss_and_gradients(model: GPT, tokens: Tensor, fused: bool) -> tuple[Tensor, dict]:
    model.fused = fused
    model.zero_grad()
    loss = model(tokens, tokens.roll(1))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_the_fused_trunk_is_the_plain_one_and_so_is_every_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They agree to 1e-5 in float32: the formulas are the same, only the order of sums differs.
    Zero gains are no exception, though the backward pass divides by gains."""
    run_trunk_by_torch(monkeypatch)
    model, tokens = small_model(torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gain"):
                p[:3] = 0
    loss, grads = loss_and_gradients(model, tokens, fused=True)
    expected, exact = loss_and_gradients(model, tokens, fused=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, grad in grads.items():
        assert grad.dtype == exact[name].dtype
        assert (grad - exact[name]).norm() < 1e-5 * exact[name].norm(), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_in_bfloat16_the_fused_gradients_are_no_further_from_float32_than_the_plain_ones(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is within 5% of float32's and within 1.3 times the plain model's rounding error. On a
    Hopper GPU the kernels themselves run."""
    if device == "cpu":
        run_trunk_by_torch(monkeypatch)
    elif not HOPPER_HERE:
        pytest.skip("no Hopper GPU: some of the kernels run in Triton's interpreter above")
    monkeypatch.setattr(head, "CHUNK", 64)  # two chunks for 96 tokens
    exact = loss_and_gradients(*small_model(torch.float32, device), fused=False)[1]
    model, tokens = small_model(torch.bfloat16, device)
    errors = {}
    for fused in (True, False):
        grads = loss_and_gradients(model, tokens, fused)[1]
        errors[fused] = {
            n: ((g.float() - exact[n]).norm() / exact[n].norm()).item() for n, g in grads.items()
        }
    for name, error in errors[True].items():
        assert error < max(0.05, 1.3 * errors[False][name]), (name, error, errors[False][name])
    assert sum(errors[True].values()) < 1.1 * sum(errors[False].values())


def test_8_bits_in_the_mlps_change_their_outputs_and_gradients_a_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in the head. The scale follows from the norm, so a row with one large number is finite."""
    run_trunk_by_torch(monkeypatch)
    width, gain = 64, random(64, seed=1).abs() + 0.5
    x = random(96, width)
    x[0] = torch.eye(width)[3]
    x = norm_by_torch(x, torch.zeros(width), gain)[0]
    weights = random(256, width, seed=2) / 8, random(256, seed=3), random(width, 256, seed=4) / 16
    outputs, grads = {}, {}
    for given in (None, gain):
        parts = [part.clone().requires_grad_() for part in (x, *weights)]
        rest = torch.zeros(width), torch.zeros(width), torch.ones(width)
        h = torch.zeros(96, width)
        y, n = trunk.AddSquaredReluMLP.apply(h, *parts, *rest, given)
        outputs[given is None] = y
        (y * random(96, width, seed=5) + n * random(96, width, seed=6)).sum().backward()
        grads[given is None] = [part.grad for part in parts]
    for rounded, exact in ((outputs[False], outputs[True]), *zip(*grads.values(), strict=True)):
        assert rounded.isfinite().all()
        assert 1e-3 < min(1, (rounded - exact).norm() / exact.norm()) < 0.1


def test_fp8_reaches_the_mlps_of_a_fused_trunk_and_of_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_trunk_by_torch(monkeypatch)
    hidden = {}
    for fp8 in (True, False):
        model, tokens = small_model(torch.float32, fp8=fp8)
        for model.fused in (True, False):
            hidden[model.fused, fp8] = model.hidden(tokens)
    assert torch.equal(hidden[False, True], hidden[False, False])
    apart = (hidden[True, True] - hidden[True, False]).norm() / hidden[True, False].norm()
    assert 1e-4 < apart < 0.1


def test_the_plain_trunk_calls_the_mlps_layers_also_in_a_fused_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--diagnostics watches the outputs of fc, in hidden(..., plain=True)."""
    run_trunk_by_torch(monkeypatch)
    model, tokens = small_model(torch.float32)
    seen = []
    model.blocks[1].mlp.fc.register_forward_hook(lambda *_: seen.append(1))
    model.fused = True
    with torch.no_grad():
        fused = model.hidden(tokens)
        assert not seen
        assert torch.allclose(model.hidden(tokens, plain=True), fused, rtol=1e-4, atol=1e-5)
    assert seen == [1]


# ---- which implementation runs, and why --------------------------------------------------------


def tensor_like(
    patch: pytest.MonkeyPatch, capability=(9, 0), dtype=torch.bfloat16, shape=(50304, 768)
) -> SimpleNamespace:
    """Return what the predicates read of a tensor on a GPU of this compute capability."""
    for module in (gemm, head):
        patch.setattr(module, "compute_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    return SimpleNamespace(is_cuda=True, device=device, dtype=dtype, size=lambda dim: shape[dim])


def test_on_the_cpu_no_kernel_runs_and_the_reason_is_the_device() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        embed = torch.zeros(256, 768, dtype=dtype)
        assert triton_obstacle(embed) == trunk_obstacle(embed, 128) == "device cpu"
        assert head_path(embed, 256, fp8=False) == "PyTorch: device cpu"
        path = "emulated 8-bit matmul (device cpu), PyTorch: device cpu"
        assert head_path(embed, 256, fp8=True) == path


@pytest.mark.skipif(gemm.gluon is None, reason="Triton is not installed, or without Gluon")
@pytest.mark.parametrize(
    "given, head_dim, trunk_reason, path",
    [
        ({}, 128, "", "Gluon matmul, Triton loss"),
        (
            dict(capability=(8, 0)),
            128,
            "compute capability (8, 0), needs 9",
            "Triton loss (no Gluon: compute capability (8, 0), needs 9)",
        ),
        (
            dict(dtype=torch.float32),
            128,
            "dtype float32, needs bfloat16 or float16",
            "PyTorch: dtype float32, needs bfloat16 or float16",
        ),
        ({}, 64, "head_dim 64, needs 128", "Gluon matmul, Triton loss"),
        (
            dict(shape=(50304, 200)),
            128,
            "width 200 is not a multiple of 16",
            "Gluon matmul, Triton loss",
        ),
        (
            dict(shape=(50304, 100)),
            128,
            "width 100 is not a multiple of 16",
            "Triton loss (no Gluon: width 100 is not a multiple of 8)",
        ),
        (
            dict(shape=(257, 768)),
            128,
            "",
            "Triton loss (no Gluon: vocab_size 257 is not a multiple of 128)",
        ),
    ],
)
def test_other_gpus_dtypes_and_sizes_are_told_why_they_run_without_kernels(
    monkeypatch: pytest.MonkeyPatch, given: dict, head_dim: int, trunk_reason: str, path: str
) -> None:
    embed = tensor_like(monkeypatch, **given)
    assert trunk_obstacle(embed, head_dim) == trunk_reason
    assert head_path(embed, given.get("shape", (50304, 768))[0], fp8=False) == path


@pytest.mark.skipif(passes.triton is None, reason="Triton is not installed")
def test_8_bit_logits_are_emulated_on_gpus_without_8_bit_matmuls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embed = tensor_like(monkeypatch)
    assert head_path(embed, 50304, fp8=True) == "8-bit matmul, Triton loss"
    embed = tensor_like(monkeypatch, capability=(8, 0))
    reason = "compute capability (8, 0), needs (8, 9)"
    assert head_path(embed, 50304, fp8=True) == f"emulated 8-bit matmul ({reason}), Triton loss"


def test_builds_without_triton_or_without_gluon_and_rocm_are_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embed = tensor_like(monkeypatch)
    monkeypatch.setattr(passes, "triton", passes.triton or object())
    monkeypatch.setattr(gemm, "gluon", None)
    assert trunk_obstacle(embed, 128) == "Gluon missing in this Triton"
    monkeypatch.setattr(passes, "triton", None)
    assert trunk_obstacle(embed, 128) == "Triton missing"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert trunk_obstacle(embed, 128) == "ROCm"


def test_without_triton_the_head_runs_in_pytorch() -> None:
    """A CPU build of torch comes without it."""
    hide = "import sys; sys.modules['triton'] = None\nimport torch\n"
    use = "from models.head import capped_loss\nimport models.trunk\n"
    use += "print(capped_loss(*torch.eye(2)[None].expand(2, 2, 2), torch.zeros(2),"
    use += " torch.zeros(2, dtype=torch.long)) > 1)"
    code, out, err = in_fresh_python("-c", hide + use, cwd=ROOT)
    assert (code, out) == (0, "tensor(True)\n"), err
