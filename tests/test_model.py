"""The model, its initialisation, its optimizers and its gradients for any world and microbatch.

`plain` is the specification (docs of the fixed model) written a second time, in float64 and
without anything clever: complex numbers rotate, loops go over blocks and heads.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, on_ranks, shards_of
from torch import Tensor
from trunk_references import randomise

import train_gpt
from data.loader import batches_in, train_batches
from optimizers import OPTIMIZERS
from optimizers.slot import MatrixOptimizer
from optimizers.technique import Technique
from train_gpt import Config, build_model, build_optimizer

CPU = torch.device("cpu")
SMALL = Config(**TINY)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- the specification, again ----------------------------------------------------------------


def plain(w: dict[str, Tensor], config: Config, inputs: Tensor, targets: Tensor, without: str = ""):
    """Summed loss in float64; `without` one ingredient, to see that the comparison notices."""
    size = config.head_dim

    def norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt() * gain

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[name + ".weight"].T + (w[name + ".bias"] if without != "bias" else 0)

    turns = (1 / 1024) ** torch.linspace(0, 1, size // 4, dtype=torch.float64)
    angles = torch.arange(inputs.size(1), dtype=torch.float64)[:, None] * turns
    still = torch.zeros(inputs.size(1), size // 4, dtype=torch.float64)
    angles = torch.cat([angles, still], dim=1) * (without != "rotary")

    def rotate(head: Tensor) -> Tensor:
        """The first half of a head is the real part, the second the imaginary one."""
        if without != "qk-norm":
            head = norm(head)
        z = torch.complex(head[:, : size // 2], head[:, size // 2 :])
        z = z * torch.polar(torch.ones_like(angles), -angles)
        return torch.cat([z.real, z.imag], dim=1)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (linear(x, f"{name}.{part}").split(size, dim=1) for part in "qkv")
        heads = []
        for h in range(len(q)):
            scores = 0.12 * rotate(q[h]) @ rotate(k[h]).T
            if without != "causal":
                ahead = torch.ones_like(scores).triu(1).bool()
                scores = scores.masked_fill(ahead, -math.inf)
            heads.append(scores.softmax(1) @ v[h])
        return linear(torch.cat(heads, dim=1), f"{name}.proj")

    total = torch.zeros((), dtype=torch.float64)
    for row, goal in zip(inputs, targets, strict=True):
        x = norm(w["embed.weight"][row], w["norm1.gain"])
        for i in range(config.layers):
            b = f"blocks.{i}"
            x = x + attention(norm(x, w[f"{b}.norm1.gain"]), f"{b}.attn")
            hidden = linear(norm(x, w[f"{b}.norm2.gain"]), f"{b}.mlp.fc").clamp_min(0)
            x = x + linear(hidden if without == "square" else hidden**2, f"{b}.mlp.proj")
        z = linear(norm(x, w["norm2.gain"]), "head")
        logits = z if without == "softcap" else 15 * z / (z * z + 225).sqrt()
        chosen = logits.gather(1, goal[:, None])[:, 0]
        total = total + (logits.exp().sum(1).log() - chosen).sum()
    return total


def small_model(**changes: Any) -> tuple[torch.nn.Module, Config]:
    config = Config(**TINY | changes)
    model = build_model(config, CPU)
    randomise(model)
    return model, config


def doubles(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "dtype, of_loss, of_gradient", [("float32", 1e-6, 1e-5), ("bfloat16", 2e-3, 0.06)]
)
def test_the_forward_pass_and_all_gradients_follow_the_specification(
    dtype: str, of_loss: float, of_gradient: float
) -> None:
    """Relative errors of the loss and of each gradient; bfloat16 rounds to 8 bits in two blocks."""
    model, config = small_model(dtype=dtype)
    inputs, targets = tokens(3, 32), tokens(3, 32, seed=1)
    weights = doubles(model)
    expected = plain(weights, config, inputs, targets)
    expected.backward()
    loss = model(inputs, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=of_loss)
    for name, p in model.named_parameters():
        wanted = weights[name].grad
        assert wanted.norm() > 0, name
        assert (p.grad.double() - wanted).norm() < of_gradient * wanted.norm(), name


PARTS = ["bias", "rotary", "qk-norm", "causal", "square", "softcap"]


@pytest.mark.parametrize("without", PARTS)
def test_the_comparison_notices_each_missing_part(without: str) -> None:
    model, config = small_model()
    inputs, targets, weights = tokens(3, 32), tokens(3, 32, seed=1), doubles(model)
    whole, less = (plain(weights, config, inputs, targets, w).item() for w in ("", without))
    assert abs(whole - less) > 1e-4 * whole


def test_a_short_row_sees_the_same_positions() -> None:
    """The sampler reads rows of any length: position 0 is where a row begins."""
    model, config = small_model()
    inputs, targets = tokens(2, 7), tokens(2, 7, seed=1)
    expected = plain(doubles(model), config, inputs, targets).item()
    assert model(inputs, targets).item() == pytest.approx(expected, rel=1e-6)


def test_a_token_changes_no_logits_before_it() -> None:
    model, _ = small_model()
    first, second = tokens(1, 32), tokens(1, 32)
    second[0, 20] = (second[0, 20] + 1) % 257
    a, b = (model.logits(model.hidden(t)) for t in (first, second))
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20], b[:, 20])


def test_activations_are_bfloat16_and_logits_float32() -> None:
    model, _ = small_model(dtype="bfloat16")
    seen: list[tuple[str, torch.dtype]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.append((name, out.dtype)))
    loss = model(tokens(2, 32), tokens(2, 32, seed=1))
    inside = {dtype for name, dtype in seen if name}
    assert inside == {torch.bfloat16} and len(seen) > 12
    assert loss.dtype == torch.float32
    assert model.logits(model.hidden(tokens(1, 4))).dtype == torch.float32
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("embed.weight") == torch.bfloat16 and set(kinds.values()) == {torch.float32}


# ---- the real size ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> Iterator[torch.nn.Module]:
    model = build_model(Config(), CPU)
    model.initialise(seed=1)
    yield model


def test_the_benchmark_model_has_162354816_parameters(full: torch.nn.Module) -> None:
    matrices = [p for p in full.blocks.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in full.parameters()) == 162_354_816
    assert len(matrices) == 72 and sum(p.numel() for p in matrices) == 84_934_656
    assert full.embed.weight.numel() == full.head.weight.numel() == 38_633_472
    assert sum(p.numel() for p in full.parameters() if p.ndim == 1) == 153_216
    assert not any(p.numel() == 1 for p in full.parameters())


def test_the_first_loss_is_the_logarithm_of_the_vocabulary(full: torch.nn.Module) -> None:
    """The head starts at zero, so all 50304 tokens are equally likely, to the last digit."""
    row = torch.arange(64).remainder(50257)[None]
    with torch.no_grad():
        loss = full(row, row.flip(1)).item() / 64
    assert f"{loss:.5f}" == "10.82584" == f"{math.log(50304):.5f}"


def test_the_benchmarks_sizes_are_those_of_the_track() -> None:
    c = Config()
    assert (c.layers, c.width, c.head_dim, c.vocab_size) == (12, 768, 128, 50304)
    assert c.row_tokens == 1024
    assert (c.batch_tokens, c.val_tokens, c.steps, c.val_every) == (524_288, 10_485_760, 3250, 125)
    assert (c.target, c.cooldown, c.dtype, c.wrap) == (3.28, 0.7, "bfloat16", False)


def test_the_initial_weights_have_the_specified_distribution(full: torch.nn.Module) -> None:
    """Means within 5 standard errors of zero, deviations within 1% (or 5 standard errors)."""
    for name, p in full.named_parameters():
        p = p.detach().float()
        if name.endswith(("q.weight", "k.weight", "v.weight", "fc.weight")) or "embed" in name:
            std, count = 1.0 if "embed" in name else (0.33 / 768) ** 0.5, p.numel()
            assert abs(p.mean().item()) < 5 * std / count**0.5, name
            assert p.std().item() == pytest.approx(std, rel=max(5 / (2 * count) ** 0.5, 2e-3)), name
        else:
            value = 1.0 if name.endswith("gain") else 0.0
            assert torch.equal(p, torch.full_like(p, value)), name


# ---- initialisation --------------------------------------------------------------------------


def initial(seed: int, **changes: Any) -> dict[str, Tensor]:
    model = build_model(Config(**TINY | changes), CPU)
    model.initialise(seed)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    first = initial(3)
    torch.manual_seed(99)
    torch.rand(10)
    again, other = initial(3), initial(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, p in first.items():
        assert p.unique().numel() == 1 or not torch.equal(p, other[name]), name


def test_layers_differ_from_each_other() -> None:
    weights = initial(1)
    assert not torch.equal(weights["blocks.0.attn.q.weight"], weights["blocks.1.attn.q.weight"])
    assert not torch.equal(weights["blocks.0.attn.q.weight"], weights["blocks.0.attn.k.weight"])


def test_a_parameter_without_an_initialisation_is_an_error() -> None:
    model, _ = small_model()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="extra"):
        model.initialise(1)


# ---- optimizers of the model -----------------------------------------------------------------


def names_by_group(model: torch.nn.Module, config: Config) -> dict[str, set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return {
        group["name"]: {names[p] for p in group["params"]}
        for group in build_optimizer(model, config).groups
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_has_its_optimizer(optimizer: str) -> None:
    model, config = small_model(optimizer=optimizer)
    groups = names_by_group(model, config)
    assert set(groups) == {"embed", "head", "scalars", "attn", "fc", "proj"}
    assert groups["embed"] == {"embed.weight"} and groups["head"] == {"head.weight"}
    assert groups["fc"] == {f"blocks.{i}.mlp.fc.weight" for i in range(2)}
    assert groups["proj"] == {f"blocks.{i}.mlp.proj.weight" for i in range(2)}
    attn = {f"blocks.{i}.attn.{part}.weight" for i in range(2) for part in ("q", "k", "v", "proj")}
    assert groups["attn"] == attn
    small = {name for name, p in model.named_parameters() if p.ndim == 1}
    assert groups["scalars"] == small


def test_the_groups_say_where_their_neurons_are() -> None:
    model, config = small_model()
    groups = {g["name"]: g for g in build_optimizer(model, config).groups}
    axes = {name: groups[name]["neuron_axis"] for name in ("attn", "fc", "proj")}
    assert axes == dict(attn=None, fc=0, proj=1)


def test_the_hyperparameters_are_those_of_entry_36_but_for_its_polar_factor() -> None:
    """quintic12: `--set muon.polar=quintic12` brings it back."""
    model, config = small_model()
    groups = {g["name"]: g for g in build_optimizer(model, config).groups}
    for name, lr in (("embed", 0.7), ("head", 0.004), ("scalars", 0.015)):
        g = groups[name]
        assert (g["lr"], g["betas"], g["eps"], g["weight_decay"]) == (lr, (0.8, 0.95), 1e-10, 0.001)
    for name in ("attn", "fc", "proj"):
        g = groups[name]
        assert (g["lr"], g["weight_decay"], g["momentum"], g["polar"]) == (
            0.025,
            0.05,
            0.95,
            "gram6",
        )


@pytest.mark.parametrize("where", ["top", "block"])
def test_a_parameter_without_an_optimizer_is_an_error(where: str) -> None:
    model, config = small_model()
    owner = model if where == "top" else model.blocks[0]
    owner.extra = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(AssertionError, match="no optimizer"):
        build_optimizer(model, config)


def test_a_parameter_with_two_optimizers_is_an_error() -> None:
    """Tied: sets alone do not notice one that is owned twice."""
    model, config = small_model()
    model.head.weight = model.embed.weight
    with pytest.raises((AssertionError, ValueError), match="two optimizers|more than one"):
        build_optimizer(model, config)


def test_the_embedding_and_its_moments_are_bfloat16() -> None:
    model, config = small_model(dtype="bfloat16")
    optimizer = build_optimizer(model, config)
    model(tokens(2, 32), tokens(2, 32, seed=1)).backward()
    grads = {p: p.grad.dtype for p in model.parameters()}
    optimizer.step(0)
    state = optimizer.adamw.state

    def types(p: Tensor) -> set[torch.dtype]:
        return {state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} | {grads[p]}

    assert types(model.embed.weight) == {torch.bfloat16}
    assert types(model.head.weight) == types(model.head.bias) == {torch.float32}


# ---- gradients for any microbatch and world --------------------------------------------------


class Forget(Technique):
    def decay(self, V: Tensor, U: Tensor, state: dict, group: dict) -> Tensor:
        return torch.zeros_like(V)


class Keep(MatrixOptimizer):
    """Leaves minus the gradient in the weights, so that it can be read from any rank."""

    techniques, defaults = (Forget(),), dict(lr=1.0)


def gradients(rank: int, size: int, argv: list[str]) -> list[Tensor]:
    """What the optimizers were given in the one step of a run, in the order of their groups."""
    found: dict[type, list[Tensor]] = {}

    def before(opt: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(opt, torch.optim.AdamW):
            found[type(opt)] = [p.grad.clone() for g in opt.param_groups for p in g["params"]]

    def after(opt: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(opt, Keep):
            found[Keep] = [-p.detach().clone() for g in opt.param_groups for p in g["params"]]

    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    usual, train_gpt.GPT.initialise = train_gpt.GPT.initialise, randomise
    train_gpt.PRESETS["tiny"], OPTIMIZERS["keep"] = TINY, Keep
    try:
        argv = ["--preset", "tiny", "--optimizer", "keep", "--set", "keep.lr=1.0", *argv]
        assert train_gpt.main(argv) != 2
    finally:
        train_gpt.GPT.initialise = usual
        del train_gpt.PRESETS["tiny"], OPTIMIZERS["keep"]
        for hook in hooks:
            hook.remove()
    return found[torch.optim.AdamW] + found[Keep]


def gradient_run(corpus: Path, folder: Path, size: int, rows: int) -> list[list[Tensor]]:
    argv = [
        "--steps",
        "1",
        "--device",
        "cpu",
        "--data",
        str(corpus),
        "--rows",
        str(rows),
        "--log",
        str(folder / f"log{size}.{rows}"),
    ]
    if size == 0:
        return [gradients(0, 1, argv)]
    return on_ranks(size, gradients, folder / str(size), argv)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """One process, one microbatch of all 16 rows."""
    return gradient_run(corpus, tmp_path_factory.mktemp("reference"), 0, 16)[0]


def agree(found: list[Tensor], reference: list[Tensor]) -> bool:
    """To 1e-5 of each parameter's gradient, float32 rounding in a sum of 512 tokens."""
    assert len(found) == len(reference)
    return all((a - b).norm() <= 1e-5 * b.norm() > 0 for a, b in zip(found, reference, strict=True))


def test_the_step_gets_the_gradient_of_the_sum_over_all_tokens(
    corpus: Path, reference: list[Tensor]
) -> None:
    """Against one backward pass over the first 512 tokens, outside of the trainer."""
    model, config = small_model()
    randomise(model, seed=1)
    shards, _ = shards_of(replace(config, data=str(corpus)))
    row = next(train_batches(shards, config.batch_tokens, 0, 1)).long()
    model(row[:-1].view(16, 32), row[1:].view(16, 32)).backward()
    params = build_optimizer(model, config).params
    assert agree([p.grad for p in params], reference)
    assert not agree([p.grad / 2 for p in params], reference)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_microbatch_changes_no_gradient(
    corpus: Path, tmp_path: Path, reference: list[Tensor], rows: int
) -> None:
    assert agree(gradient_run(corpus, tmp_path, 0, rows)[0], reference)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_number_of_ranks_changes_no_gradient(
    corpus: Path, tmp_path: Path, reference: list[Tensor], size: int
) -> None:
    ranks = gradient_run(corpus, tmp_path, size, 2)
    for rank in ranks:
        assert agree(rank, reference)
        assert all(torch.equal(a, b) for a, b in zip(rank, ranks[0], strict=True))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_same_tokens_reach_the_same_step_whatever_the_number_of_ranks(
    corpus: Path, size: int
) -> None:
    """Through both shards and their start again; each rank also has the token after its slice."""
    shards, _ = shards_of(replace(SMALL, data=str(corpus), steps=30))
    assert len(shards) == 2
    alone = train_batches(shards, 512, 0, 1)
    ranks = [train_batches(shards, 512, rank, size) for rank in range(size)]
    steps = sum(batches_in(count, 512) for count in (9000, 7000))
    for _ in range(steps + 2):
        parts = [next(rank) for rank in ranks]
        assert all(len(part) == 512 // size + 1 for part in parts)
        whole = torch.cat([part[:-1] for part in parts] + [parts[-1][-1:]])
        assert torch.equal(whole, next(alone))
        for part, following in zip(parts, parts[1:], strict=False):
            assert part[-1] == following[0]
