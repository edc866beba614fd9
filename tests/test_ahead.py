"""kernels/ahead.py: where Triton's compilations are kept, and that threads make them in time."""

import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, in_fresh_python

import kernels
from kernels.ahead import compiled_ahead

triton = pytest.importorskip("triton", reason="Triton is not installed: it compiles nothing")


class Kernel:
    """As Triton's, of which Python sees: the hook is asked before each compilation."""

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
        return SimpleNamespace(run=None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices that threads were given, on a machine that seems to have the third of some."""
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", given.append)
    return given


def test_what_would_be_launched_is_compiled_while_the_body_runs(gpu: list[int]) -> None:
    kernel = Kernel()

    def work() -> None:
        for described in ("a", "b", "a"):
            kernel.launch(described)

    with compiled_ahead(work):
        assert kernel.made == kernel.launched == []
        assert triton.knobs.runtime.jit_cache_hook is None, "the body launches"
        kernel.may_end.set()
    assert sorted(kernel.made) == ["a", "b"] and kernel.launched == []
    work()
    assert kernel.launched == ["a", "b", "a"]
    assert gpu and set(gpu) == {2}


def test_what_does_not_compile_is_an_error_and_so_is_one_of_the_work(gpu: list[int]) -> None:
    kernel = Kernel()
    kernel.may_end.set()
    with pytest.raises(ValueError), compiled_ahead(lambda: kernel.launch("refused")):
        pass
    with pytest.raises(ZeroDivisionError), compiled_ahead(lambda: 1 / 0):
        raise AssertionError("the body must not run")
    assert triton.knobs.runtime.jit_cache_hook is None


def test_without_a_gpu_only_the_body_runs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the test below shows what it does there")
    ran = []
    with compiled_ahead(lambda: ran.append("work")):
        ran.append("body")
    assert ran == ["body"]


def test_on_a_gpu_nothing_is_left_to_compile() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: Triton's part is played by a stand-in above")
    z = torch.randn(64, 512, device="cuda").bfloat16()
    targets, asked = torch.zeros(64, dtype=torch.int64, device="cuda"), []
    with compiled_ahead(lambda: kernels.capped_loss_by_triton(z, targets)):
        pass
    triton.knobs.runtime.jit_cache_hook = lambda **about: asked.append(about) is not None
    losses, log_sums = kernels.capped_loss_by_triton(z, targets)
    triton.knobs.runtime.jit_cache_hook = None
    assert not asked
    assert torch.allclose(losses, kernels.capped_loss_by_torch(z, targets)[0], atol=1e-3)


def test_compilations_are_kept_where_they_were_whatever_inductor_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are part of Triton's key, and inductor sets them in some processes."""
    for name in ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"):
        monkeypatch.delenv(name, raising=False)
    show = "import kernels; from os import environ as e; "
    show += "print(e['TRITON_CACHE_DIR'], e['TRITON_PTXAS_PATH'])"
    kept = dict(cwd=ROOT, TRITON_HOME="/somewhere")
    folder, ptxas = in_fresh_python("-c", show, **kept)[1].split()
    assert folder == "/somewhere/.triton/cache"
    assert ptxas.endswith("triton/backends/nvidia/bin/ptxas")
    chosen = dict(TRITON_CACHE_DIR="mine", TRITON_PTXAS_PATH="my_ptxas")
    assert in_fresh_python("-c", show, **kept, **chosen)[1] == "mine my_ptxas\n"
