"""optimizers/gather.py: its Triton kernel by the interpreter, compiled for Hopper, and in steps."""

from pathlib import Path

import pytest
from conftest import in_fresh_python

ROOT = Path(__file__).resolve().parent.parent
COMPARE = """
import torch
from optimizers.gather import BLOCK, KINDS, gather
for kind in KINDS:
    for k, m, n in ((3, 37, 53), (1, 1, 1), (2, 64, BLOCK // 32), (4, 5, 7)):
        whole = torch.randn(2 * k, m, n, generator=torch.Generator().manual_seed(m)).to(kind)
        grads = [matrix.clone() for matrix in whole][::-2]  # scattered, and in no order
        table = torch.tensor([grad.data_ptr() for grad in grads])
        for weights in (torch.empty(k, m, n), torch.empty(k, m, n, dtype=kind)):
            stack = gather(table, kind, weights)
            assert stack.dtype == torch.float32, "bfloat16 weights are stepped in it, too"
            assert torch.equal(stack, torch.stack(grads).float()), (kind, k, m, n)
        wide = gather(table, kind, torch.empty(k, m, n, dtype=torch.float64))
        assert torch.equal(wide, torch.stack(grads).double())
print("compared")
"""
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from optimizers.gather import BLOCK, KINDS, gather_kernel
for kind in range(len(KINDS)):
    constants = dict(SIZE=768 * 768, KIND=kind, BLOCK=BLOCK)
    signature = dict(table="*i64", stack="*fp32") | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    source = ASTSource(gather_kernel, signature=signature, constexprs=constants, attrs=aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32"))
"""
STEPS = """
import sys
sys.path.insert(0, "tests")
import pytest, torch
import test_replay as replayed
from optimizers import gather
with pytest.MonkeyPatch.context() as patch:
    replayed.fake(patch)
    patch.setattr(gather, "gather_runs", lambda grads: True)
    for name in ("muon", "adamw"):
        plain, opt = (replayed.built(name, compile=flag) for flag in (False, True))
        kept, seen, recorded = [], set(), len(replayed.Graph.recorded)
        for step in range(4):
            for one in (plain, opt):
                for i, p in enumerate(one._parameters()):
                    p.grad = replayed.tensor(*p.shape, seed=100 * step + i)
                    if step == 2 and i % 2:
                        p.grad = p.grad.T.contiguous().T
                    kept.append(p.grad)  # so that the next are elsewhere
                one.step()
            assert replayed.agree(opt._parameters(), plain._parameters()), (name, step)
            sources = [r.sources for b in opt._buckets for r in b.replays.values()]
            assert all(s.tensor.tolist() == s.addresses for s in sources)
            seen |= {tuple(s.addresses) for s in sources}
        assert len(seen) == 4 * 3 and len(replayed.Graph.recorded) == recorded + 3
        for i, p in enumerate(opt._parameters()):
            p.grad = replayed.tensor(*p.shape, seed=i)
        opt.step()
        versions = [s.tensor._version for s in sources]
        for p in opt._parameters():
            p.grad.mul_(-2)  # in place
        before = [p.detach().clone() for p in opt._parameters()]
        opt.step()
        assert [s.tensor._version for s in sources] == versions, "written though it was the same"
        for p, W in zip(opt._parameters(), before, strict=True):
            assert not torch.equal(p, W)
print(replayed.Graph.replays)
"""


def out_of(script: str, **env: str) -> str:
    pytest.importorskip("triton", reason="Triton is not installed: its kernel cannot be tried")
    code, out, err = in_fresh_python("-c", script, cwd=ROOT, **env)
    assert code == 0, err
    return out


def test_the_kernel_stacks_matrices_that_are_anywhere() -> None:
    """Sizes that fill blocks and that do not; the three types; stepped in float32 and float64."""
    assert out_of(COMPARE, TRITON_INTERPRET="1") == "compared\n"


def test_the_kernel_reads_and_writes_16_bytes_at_a_time_on_hopper() -> None:
    """2048 numbers are 16 for each of 128 threads: 4 loads of float32, 2 of half precision."""
    assert out_of(COMPILE, TRITON_INTERPRET="0") == "4 4\n2 4\n2 4\n"


def test_replayed_steps_read_gradients_wherever_they_are() -> None:
    """New tensors in each step, some of them crosswise; one graph a part, which is never redone."""
    assert out_of(STEPS, TRITON_INTERPRET="1") == f"{2 * 3 * 5}\n"
