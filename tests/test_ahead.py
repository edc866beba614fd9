"""models/ahead.py: threads compile Triton's kernels in time, and its cache keeps its key."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, in_fresh_python

from models.ahead import compiled_ahead, keep_cache_key
from models.head import capped_loss_by_torch
from models.passes import capped_loss_by_triton

triton = pytest.importorskip("triton", reason="Triton is not installed: it compiles nothing")


GPU = torch.device("cuda", 2)
TRITON = """
import torch, triton
from triton.backends.compiler import GPUTarget
from models import gemm, passes
from models.ahead import compiled_ahead

class Driver:  # stands for a Hopper GPU, loads nothing
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)
    @property
    def launcher_cls(self):
        raise RuntimeError("launched")

triton.runtime.driver.set_active(Driver())
torch.cuda.set_device = gemm.count_sms = lambda _: 132
x, W, b = torch.zeros(512, 64).bfloat16(), torch.zeros(256, 64).bfloat16(), torch.zeros(256)
targets, post, losses = torch.zeros(256, dtype=torch.int64), torch.zeros(512, 256).bfloat16(), b
qkv, tables = torch.zeros(384, 64).bfloat16(), torch.zeros(256, 1, 64)
q, turned = torch.zeros(256, 1, 128).bfloat16(), torch.zeros(256, 3, 1, 128).bfloat16()
calls = [lambda: passes.norm_by_triton(x, b[:64], b[:64]),
         lambda: passes.norm_gradient_by_triton(x, x, x, b[:64], losses),
         lambda: passes.embed_by_triton(targets, W, b[:64], b[:64]),
         lambda: passes.embed_gradient_by_triton(W, W, W, targets, W, b[:64], b[:64], losses),
         lambda: passes.rotary_gradient_by_triton(q, q, turned, tables, tables, losses),
         lambda: passes.multiply_by_triton(x, b[0]),
         lambda: gemm.relu_square_by_gluon(x, W, b),
         lambda: gemm.relu_square_gradient_by_gluon(x, W.mT.contiguous(), post),
         lambda: gemm.matmul_by_gluon(x, W.mT.contiguous()),
         lambda: gemm.qkv_by_gluon(x, qkv, b, tables, tables, gemm.pack_angles(tables, tables)),
         lambda: gemm.logits_by_gluon(x, W, b, 15.0),
         lambda: passes.capped_loss_by_triton(W, targets),
         lambda: passes.capped_gradient_by_triton(W, targets, losses)]
with compiled_ahead(torch.device("cuda", 0), lambda: [call() for call in calls + calls]):
    pass
triton.knobs.runtime.jit_cache_hook = lambda **_: print("compiles again")
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


class Kernel:
    """Behaves as Triton's kernels do: asks the hook before each compilation."""

    def __init__(self) -> None:
        self.made, self.launched, self.may_end = [], [], threading.Event()

    def launch(self, described: str) -> None:
        if described in self.made:
            self.launched.append(described)
        elif not self.compile(described, by_hand=False):
            raise AssertionError("the main thread compiles")

    def compile(self, described: str, by_hand: bool) -> bool:
        compile = {"specialization_data": described}
        about = dict(fn=SimpleNamespace(jit_function=self), compile=compile)
        hook = triton.knobs.runtime.jit_cache_hook
        return hook is not None and hook(**about, is_manual_warmup=by_hand, already_compiled=False)

    def preload(self, described: str) -> SimpleNamespace:
        assert not self.compile(described, by_hand=True), "a thread leaves it to a thread"
        assert self.may_end.wait(10)
        if described == "refused":
            raise ValueError(described)
        self.made.append(described)
        return Made() if described == "full" else SimpleNamespace(run=None)


class Made:
    @property
    def run(self) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Collect the devices that threads select, on a machine without any."""
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for name in ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"):
        monkeypatch.setenv(name, "anywhere")
    return devices


def test_what_would_be_launched_is_compiled_while_the_body_runs(given: list) -> None:
    kernel = Kernel()

    def work() -> None:
        for described in ("a", "b", "a"):
            kernel.launch(described)

    with compiled_ahead(GPU, work):
        assert kernel.made == kernel.launched == []
        assert triton.knobs.runtime.jit_cache_hook is None, "the body launches"
        kernel.may_end.set()
    assert sorted(kernel.made) == ["a", "b"] and kernel.launched == []
    work()
    assert kernel.launched == ["a", "b", "a"]
    assert set(given) == {GPU}


def test_what_does_not_compile_is_an_error_and_so_is_one_of_the_work(given: list) -> None:
    kernel = Kernel()
    kernel.may_end.set()
    with pytest.raises(ValueError), compiled_ahead(GPU, lambda: kernel.launch("refused")):
        pass
    with pytest.raises(ZeroDivisionError), compiled_ahead(GPU, lambda: 1 / 0):
        raise AssertionError("the body must not run")
    assert triton.knobs.runtime.jit_cache_hook is None


def test_what_cannot_be_loaded_now_is_loaded_by_its_launch(given: list) -> None:
    kernel = Kernel()
    kernel.may_end.set()
    with compiled_ahead(GPU, lambda: kernel.launch("full")):
        pass
    assert kernel.made == ["full"]


def test_triton_launches_what_was_compiled_ahead(tmp_path: Path) -> None:
    """Its real hook and compiler, without a GPU: a launch asks for no compilation any more."""
    code, out, err = in_fresh_python("-c", TRITON, cwd=ROOT, TRITON_CACHE_DIR=str(tmp_path))
    assert (code, out) == (0, 13 * "launched\n"), err
    assert len(list(tmp_path.rglob("*.cubin"))) == 15, "two gradients have sums of their own"


def test_elsewhere_only_the_body_runs() -> None:
    """Also on a machine with a GPU, where a run was told to use the CPU."""
    ran = []
    with compiled_ahead(torch.device("cpu"), lambda: ran.append("work")):
        ran.append("body")
    assert ran == ["body"]


def test_on_a_gpu_nothing_is_left_to_compile() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: Triton's part is played by a stand-in above")
    z = torch.randn(64, 512, device="cuda").bfloat16()
    targets, asked = torch.zeros(64, dtype=torch.int64, device="cuda"), []
    with compiled_ahead(z.device, lambda: capped_loss_by_triton(z, targets)):
        pass
    triton.knobs.runtime.jit_cache_hook = lambda **about: asked.append(about) is not None
    losses, log_sums = capped_loss_by_triton(z, targets)
    triton.knobs.runtime.jit_cache_hook = None
    assert not asked
    assert torch.allclose(losses, capped_loss_by_torch(z, targets)[0], atol=1e-3)


def test_compilations_are_kept_where_they_were_whatever_inductor_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It leaves alone what is set."""
    names = "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"
    for name in names:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_HOME", "/somewhere")
    keep_cache_key()
    folder, ptxas = (os.environ[name] for name in names)
    assert folder == "/somewhere/.triton/cache"
    assert ptxas.endswith("triton/backends/nvidia/bin/ptxas") and Path(ptxas).is_file()
    for name in names:
        monkeypatch.setenv(name, "mine")
    keep_cache_key()
    assert [os.environ[name] for name in names] == ["mine", "mine"]


def test_importing_changes_no_variable() -> None:
    show = "import os; before = dict(os.environ); import models.ahead, models.head, models.trunk"
    show += "; print(before == os.environ)"
    assert in_fresh_python("-c", show, cwd=ROOT)[1] == "True\n"
