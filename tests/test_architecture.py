"""A second architecture costs one file and one line of train_gpt.MODELS.

`Bare` is that file: no biases, no gains, values that flow from the first layer into all others, and
one matrix as input embedding and output head. It shares no module with the GPT.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, on_ranks
from torch import Tensor, nn

import train_gpt
from records.log import Run, parse_log

sys.path.append(str(ROOT / "tools"))
import sample  # noqa: E402

# ---- the file ----------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Layer(nn.Module):
    def __init__(self, width: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, expansion * width, bias=False)
        self.down = nn.Linear(expansion * width, width, bias=False)

    def forward(self, x: Tensor, first: Tensor | None, mix: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.qkv(norm(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = norm(heads[0]), norm(heads[1]), heads[2]
        first = v if first is None else first
        y = F.scaled_dot_product_attention(q, k, v.lerp(first, mix), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(norm(x)))), first


class Bare(nn.Module):
    def __init__(self, vocab_size, layers, width, head_dim, expansion, row_tokens, dtype, device):
        super().__init__()
        with torch.device(device):
            self.table = nn.Embedding(vocab_size, width, dtype=dtype)
            self.places = nn.Embedding(row_tokens, width, dtype=dtype)
            self.layers = nn.ModuleList(Layer(width, head_dim, expansion) for _ in range(layers))
            self.mixes = nn.Parameter(torch.zeros(layers))  # of the first layer's values

    def flops_per_token(self) -> float:
        return 6.0 * sum(p.numel() for p in self.parameters())

    def choose_kernels(self, compile: bool, fp8: bool) -> None:
        if fp8:
            raise ValueError("the model bare has no 8-bit matmuls: run it without --fp8")
        self.rows, self.kernels = 4, dict(trunk="plain PyTorch", head="plain PyTorch")

    def hidden(self, tokens: Tensor, plain: bool = False) -> Tensor:
        x, first = norm(self.table(tokens) + self.places.weight[: tokens.size(1)]), None
        for layer, mix in zip(self.layers, self.mixes, strict=True):
            x, first = layer(x, first, mix)
        return norm(x)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table.weight).float()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        z = self.logits(self.hidden(inputs)).flatten(0, 1)
        return F.cross_entropy(z, targets.flatten(), reduction="sum")

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            std = 0.0 if name == "mixes" or "down" in name else 0.2 if "layers" in name else 0.05
            p.copy_(torch.randn(p.shape, generator=draws) * std)

    def groups(self) -> list[dict]:
        def named(*parts: str) -> list[tuple[str, Tensor]]:
            ends = tuple(f".{part}.weight" for part in parts)
            return [(name, p) for name, p in self.named_parameters() if name.endswith(ends)]

        return [
            dict(name="tables", lr=0.01, params=[self.table.weight, self.places.weight]),
            dict(name="mixes", lr=0.01, params=[self.mixes]),
            dict(name="attention", neuron_axis=None, params=named("qkv", "out")),
            dict(name="up", neuron_axis=0, params=named("up")),
            dict(name="down", neuron_axis=1, params=named("down")),
        ]

    def neurons(self) -> dict[str, nn.Module]:
        return {f"layers.{i}.up": layer.up for i, layer in enumerate(self.layers)}


# ---- what it must be able to do ------------------------------------------------------------------

SMALL = dict(model="bare", steps=20, val_every=5, expansion=3, target=5.0)
BARE = TINY | SMALL


def register(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(train_gpt.MODELS, "bare", Bare)  # the line
    patch.setitem(train_gpt.PRESETS, "bare", BARE)


@pytest.fixture
def bare(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Arguments of a run of that model; further ones are appended."""
    register(monkeypatch)
    return lambda *more: [*tiny()[2:], "--preset", "bare", *more]


def column(log: Path | str) -> list[tuple[int, float]]:
    return [(point.step, point.val_loss) for point in parse_log(log).points]


def check(log: Path, ranks: int) -> Run:
    run = parse_log(log)
    assert run.status == "complete" and run.end["ranks_agree"] is True
    assert (run.meta["world_size"], run.meta["config"]["model"]) == (ranks, "bare")
    assert {"trunk": "plain PyTorch", "head": "plain PyTorch"}.items() <= run.meta[
        "kernels"
    ].items()
    return run


def main_on_rank(rank: int, size: int, args: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        return train_gpt.main(args)


@pytest.mark.parametrize("optimizer", ["muon", "aurora"])
def test_it_trains_on_one_rank_and_on_two(bare: Callable, tmp_path: Path, optimizer: str) -> None:
    """Losses of two ranks are those of one but for rounding, and fall by a nat and more."""
    logs = [tmp_path / f"{ranks}.txt" for ranks in (1, 2)]
    args = bare("--optimizer", optimizer, "--diagnostics", "--log")
    assert train_gpt.main([*args, str(logs[0])]) == 0
    assert on_ranks(2, main_on_rank, tmp_path / "ranks", [*args, str(logs[1])]) == [0, 0]
    one, two = (check(log, ranks) for ranks, log in enumerate(logs, 1))
    assert [step for step, _ in column(logs[0])] == [0, 5, 10, 15, 18, 19, 20]
    for (_, a), (_, b) in zip(column(logs[0]), column(logs[1]), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert one.points[-1].val_loss < one.points[0].val_loss - 1
    names = {group["name"]: group["optimizer"] for group in one.optim["groups"]}
    assert names == dict(tables="adamw", mixes="adamw") | dict.fromkeys(
        ("attention", "up", "down"), optimizer
    )
    for run in (one, two):
        diags = run.extra["diag"]
        assert [diag["step"] for diag in diags] == [5, 10, 15, 18, 19, 20]
        assert {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("up", "down")} == set(
            diags[-1]["matrices"]
        )
        assert diags[-1]["neurons"].keys() == {"layers.0.up", "layers.1.up"}
        assert all(0 < layer["firing"] < 1 for layer in diags[-1]["neurons"].values())


class CutOffError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["muon", "aurora"])
def test_it_goes_on_from_a_checkpoint(
    bare: Callable, optimizer: str, capsys: pytest.CaptureFixture
) -> None:
    """Equal losses to the last digit; the checkpoint is of this architecture and no other."""
    base = bare("--optimizer", optimizer)
    assert train_gpt.main([*base, "--log", "whole.txt"]) == 0
    honest = train_gpt.Trainer.step

    def step(self: train_gpt.Trainer, now: int, tokens: Tensor) -> Tensor:
        if now == 12:
            raise CutOffError
        return honest(self, now, tokens)

    saving = [*base, "--checkpoint", "run.pt", "--log"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "step", step)
        with pytest.raises(CutOffError):
            train_gpt.main([*saving, "first.txt"])
    assert train_gpt.main([*saving, "second.txt"]) == 0
    assert column("first.txt") + column("second.txt") == column("whole.txt")
    assert parse_log("second.txt").extra["resumed"][0]["step"] == 10
    capsys.readouterr()
    assert train_gpt.main([*bare(), "--eval", "run.pt"]) == 0
    found = re.search(r"^step:20 val_loss:(\S+)", capsys.readouterr().out)
    assert float(found[1]) == pytest.approx(column("whole.txt")[-1][1], abs=2e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_gpt.PRESETS, "bare", BARE | dict(model="gpt"))
        assert train_gpt.main([*saving, "third.txt"]) == 2
    assert "run.pt was made with model bare, now it is gpt" in capsys.readouterr().err


def test_its_run_ends_with_a_sample_and_tools_sample_repeats_it(
    bare: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(train_gpt.PRESETS, "bare", BARE | dict(sample_tokens=40, steps=2))
    assert train_gpt.main(bare("--checkpoint", "run.pt", "--log", "a.txt")) == 0
    out = capsys.readouterr().out
    words = ["run.pt", "--prompt", "def ", "--tokens", "40", "--device", "cpu"]
    assert sample.main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("def ") and f"A sample of the model's text:\n{text}" in out


def test_a_setting_that_it_does_not_have_is_one_sentence(
    bare: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert train_gpt.main(bare("--fp8", "--log", "a.txt")) == 2
    said = capsys.readouterr().err
    assert said == "train_gpt.py: the model bare has no 8-bit matmuls: run it without --fp8\n"
    assert not os.path.exists("a.txt")


def test_the_trainer_asks_a_model_for_nothing_but_the_contract(
    bare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of the model train_gpt.py, the microbatches, the optimizer and the sampler use."""
    asked: set[str] = set()

    class Watched(Bare):
        def __getattribute__(self, name: str) -> object:
            caller = sys._getframe(1).f_globals["__name__"]
            if caller != __name__ and not caller.startswith("torch.nn.modules"):
                asked.add(name)
            return super().__getattribute__(name)

    monkeypatch.setitem(train_gpt.MODELS, "bare", Watched)
    preset = BARE | dict(sample_tokens=3, steps=4, val_every=2)
    monkeypatch.setitem(train_gpt.PRESETS, "bare", preset)
    flags = ["--diagnostics", "--checkpoint", "run.pt", "--log", "a.txt"]
    assert train_gpt.main(bare(*flags)) == 0
    module = {name for name in asked if hasattr(nn.Module, name) or name.startswith("_")}
    contract = {"initialise", "groups", "neurons", "hidden", "logits", "rows", "kernels"}
    assert asked - module == contract | {"choose_kernels", "flops_per_token"}
