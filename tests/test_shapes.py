"""Parameters of any shape and type: stacks of experts, convolutions, bfloat16 weights with the bits
that they lack; and split_parameters, which finds matrices and neurons in the modules of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from torch import Tensor, nn

from optimizers import OPTIMIZERS, Aurora, Muon, split_parameters
from optimizers.lowbits import narrow, widened

every = pytest.mark.parametrize("name", OPTIMIZERS)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def precise(name: str) -> dict[str, Any]:
    return dict(dtype=torch.float32) if "dtype" in OPTIMIZERS[name].defaults else {}


def close(a: Tensor, b: Tensor) -> bool:
    return ((a - b).norm() <= 1e-5 * b.norm()).item()


# ---- stacks and convolutions ---------------------------------------------------------------------


@pytest.mark.parametrize("shape, axis", [((3, 12, 4), 0), ((3, 4, 12), 1), ((1, 6, 6), None)])
@every
def test_a_stack_of_experts_is_stepped_as_its_matrices(
    name: str, shape: tuple[int, ...], axis: int | None
) -> None:
    stack = nn.Parameter(tensor(*shape))
    apart = [nn.Parameter(W.clone()) for W in stack.detach()]
    opts = [
        OPTIMIZERS[name]([dict(params=params, neuron_axis=axis)], **precise(name))
        for params in ([stack], apart)
    ]
    for step in range(3):
        stack.grad = tensor(*shape, seed=step + 1)
        for p, grad in zip(apart, stack.grad, strict=True):
            p.grad = grad
        for opt in opts:
            opt.step()
    assert all(close(a, b) for a, b in zip(stack, apart, strict=True))
    saved, states = opts[0].state_dict()["state"][0], opts[1].state_dict()["state"]
    for key, value in saved.items():
        assert value.shape[0] == shape[0] and torch.equal(value, opts[0].state[stack][key])
        assert all(close(v, states[i][key]) for i, v in enumerate(value))
    again = OPTIMIZERS[name]([dict(params=[nn.Parameter(tensor(*shape))], neuron_axis=axis)])
    again.load_state_dict(opts[0].state_dict())
    assert torch.equal(again.state_dict()["state"][0][key], saved[key])


@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (8, 4, 3), (6, 2, 2, 2, 2)], ids=str)
@every
def test_a_convolution_is_the_matrix_of_its_outputs_by_all_else(
    name: str, shape: tuple[int, ...]
) -> None:
    """Also channels_last: the parameter keeps its strides."""
    for layout in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
        conv = nn.Parameter(tensor(*shape).to(memory_format=layout))
        flat = nn.Parameter(conv.detach().reshape(shape[0], -1).clone())
        opts = [
            OPTIMIZERS[name]([conv], convolutions=True, **precise(name)),
            OPTIMIZERS[name]([flat], **precise(name)),
        ]
        strides = conv.stride()
        for step in range(2):
            conv.grad = tensor(*shape, seed=step + 1).to(memory_format=layout)
            flat.grad = conv.grad.reshape(shape[0], -1)
            for opt in opts:
                opt.step()
        assert close(conv.detach().reshape(flat.shape), flat) and conv.stride() == strides
        assert opts[0].state_dict()["param_groups"][0]["convolutions"] is True


def test_convolutions_may_be_one_group_of_several() -> None:
    conv, matrix = nn.Parameter(tensor(4, 3, 2, 2)), nn.Parameter(tensor(4, 12))
    opt = Muon([dict(params=[conv], convolutions=True), dict(params=[matrix])])
    conv.grad, matrix.grad = tensor(4, 3, 2, 2, seed=1), tensor(4, 12, seed=2)
    opt.step()
    assert not torch.equal(conv, tensor(4, 3, 2, 2)) and not torch.equal(matrix, tensor(4, 12))
    with pytest.raises(ValueError, match=r"\(4, 3, 2, 2\): .*AdamW.*convolutions=True"):
        Muon([conv])


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_what_holds_no_matrix_is_sent_to_adamw(shape: tuple[int, ...]) -> None:
    for options in ({}, dict(convolutions=True)):
        with pytest.raises(ValueError, match="takes matrices.*AdamW") as caught:
            Muon([nn.Parameter(torch.zeros(shape))], **options)
        assert str(shape) in str(caught.value)


def experts_on_ranks(rank: int, size: int) -> list[Tensor]:
    if size > 1:
        dist.init_process_group("gloo")
    params = [nn.Parameter(tensor(2, 8, 4, seed=i)) for i in range(3)]
    params += [nn.Parameter(tensor(8, 4, seed=9))]
    opt = Aurora([dict(params=params, neuron_axis=0)], dtype=torch.float32)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = tensor(*p.shape, seed=10 * step + i) / size
        opt.step()
    return [p.detach().clone() for p in params]


def test_stacks_are_dealt_to_ranks_whole(tmp_path) -> None:
    alone = experts_on_ranks(0, 1)
    for found in on_ranks(3, experts_on_ranks, tmp_path):
        assert all(close(a, b) for a, b in zip(found, alone, strict=True))


# ---- bfloat16 with 16 more bits ------------------------------------------------------------------


def test_a_bfloat16_and_its_low_bits_hold_every_float32() -> None:
    """Random patterns, ties, denormals, infinities and signed zeros, bit for bit; nan stays nan."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    ties = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + 2**15
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4028234e38, 1e-45, -1e-45])
    W = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special]).view(1, 1, -1)
    weight = torch.empty_like(W, dtype=torch.bfloat16)
    low = torch.empty_like(W, dtype=torch.int16)
    narrow(W, weight, low)
    back, real = widened(weight, low), ~W.isnan()
    assert torch.equal(back.view(torch.int32)[real], W.view(torch.int32)[real])
    assert torch.equal(weight.isnan(), W.isnan()) and torch.equal(back.isnan(), W.isnan())
    finite = real & (W.abs() < 3e38)
    nearest, error = W.bfloat16().float(), (weight.float() - W).abs()
    assert (error <= (nearest - W).abs())[finite].all()


@every
def test_with_extra_bits_bfloat16_weights_are_the_rounded_weights_of_float32(name: str) -> None:
    """Steps smaller than half of a weight's last bit add up: without the bits most are lost."""
    rate = 1e-4
    start = tensor(12, 4).bfloat16()
    p, q, r = (nn.Parameter(start.clone()) for _ in range(3))
    full = nn.Parameter(start.float())
    how = dict(lr=rate, weight_decay=0.1, **precise(name))
    kinds = [OPTIMIZERS[name]([p], extra_bits=True, **how), OPTIMIZERS[name]([full], **how)]
    kinds.append(OPTIMIZERS[name]([r], **how))
    for step in range(30):
        for some in (p, full, r):
            some.grad = tensor(12, 4, seed=step % 3).bfloat16().to(some.dtype)
        for opt in kinds:
            opt.step()
        if step == 14:  # a state that is saved and loaded goes on
            with torch.no_grad():
                q.copy_(p)
            loaded = OPTIMIZERS[name]([q], extra_bits=True, **how)
            loaded.load_state_dict(kinds[0].state_dict())
    for step in range(15, 30):
        q.grad = tensor(12, 4, seed=step % 3).bfloat16()
        loaded.step()
    assert torch.equal(p, full.bfloat16()) and torch.equal(p, q) and not torch.equal(p, r)
    assert kinds[0].state[p]["low_bits"].dtype == torch.int16
    moved = [(x.detach().float() - start.float()).norm() for x in (full, r)]
    assert moved[1] < 0.7 * moved[0], "the task does not need the bits"


def test_weights_that_others_overwrite_are_taken_as_they_are() -> None:
    """To half of a weight's last bit: a copy in float32 would have brought the old ones back."""
    p = nn.Parameter(tensor(8, 4).bfloat16())
    opt = Muon([p], extra_bits=True, lr=1e-3)
    for _ in range(3):
        p.grad = tensor(8, 4, seed=1).bfloat16()
        opt.step()
    with torch.no_grad():
        p.fill_(2.0)
    opt.param_groups[0].update(lr=0.0)
    opt.step()
    assert torch.equal(p, torch.full_like(p, 2.0))


def test_extra_bits_change_nothing_for_float32_weights() -> None:
    p, q = (nn.Parameter(tensor(8, 4)) for _ in range(2))
    for some, opt in ((p, Muon([p], extra_bits=True)), (q, Muon([q]))):
        some.grad = tensor(8, 4, seed=1)
        opt.step()
    assert torch.equal(p, q)


# ---- split_parameters ----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, mlp: nn.Module, d: int, kv: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.attn = nn.ModuleDict(
            dict(q=linear(d, 2 * d), k=linear(d, kv), v=linear(d, kv), o=linear(2 * d, d))
        )
        self.mlp = mlp


def linear(m: int, n: int) -> nn.Linear:
    return nn.Linear(m, n, bias=False)


def model(mlp: Any, d: int = 8, vocab: int = 50, layers: int = 2) -> nn.Module:
    net = nn.Module()
    net.embed = nn.Embedding(vocab, d)
    net.blocks = nn.ModuleList(Block(mlp(d), d, d // 2) for _ in range(layers))
    net.lm_head = linear(d, vocab)
    return net


class Stacked(nn.Module):
    """Experts as x @ W (transformers' GPT-OSS) or as F.linear (torchtitan)."""

    def __init__(self, d: int, h: int, transposed: bool) -> None:
        super().__init__()
        self.gate = linear(d, 4)
        self.experts = nn.Module()
        for name, (m, n) in dict(w1=(h, d), w2=(d, h), w3=(h, d)).items():
            shape = (4, n, m) if transposed else (4, m, n)
            self.experts.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def mlp(**layers: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: linear(*sizes) for name, sizes in layers.items()})


MLPS = {  # a module by width: the axis of each of its parameters
    "gpt-2": (lambda d: mlp(c_fc=(d, 4 * d), c_proj=(4 * d, d)), dict(c_fc=0, c_proj=1)),
    "unknown names": (lambda d: mlp(a=(d, 3 * d), b=(3 * d, d)), dict(a=0, b=1)),
    "swiglu": (
        lambda d: mlp(gate_proj=(d, 20), up_proj=(d, 20), down_proj=(20, d)),
        dict(gate_proj=0, up_proj=0, down_proj=1),
    ),
    "llama": (lambda d: mlp(w1=(d, 20), w2=(20, d), w3=(d, 20)), dict(w1=0, w2=1, w3=0)),
    "fused": (lambda d: mlp(gate_up_proj=(d, 40), down_proj=(20, d)), dict(gate_up=0, down=1)),
    "square": (lambda d: mlp(fc1=(d, d), fc2=(d, d)), dict(fc1=0, fc2=1)),
    "narrow": (lambda d: mlp(up_proj=(d, 4), down_proj=(4, d)), dict(up=0, down=1)),
    "hidden as wide as the vocabulary": (lambda d: mlp(a=(d, 50), b=(50, d)), dict(a=0, b=1)),
    "sequential": (
        lambda d: nn.Sequential(linear(d, 20), nn.GELU(), linear(20, d)),
        {"mlp.0.": 0, "mlp.2.": 1},
    ),
    "experts": (
        lambda d: nn.ModuleDict(
            dict(
                gate=linear(d, 4),
                experts=nn.ModuleList(mlp(w1=(d, 20), w2=(20, d)) for _ in range(4)),
            )
        ),
        dict(w1=0, w2=1),
    ),
    "stacked experts": (lambda d: Stacked(d, 20, False), dict(w1=0, w2=1, w3=0)),
    "transposed experts": (lambda d: Stacked(d, 20, True), dict(w1=1, w2=0, w3=1)),
}


@pytest.mark.parametrize("kind", MLPS)
def test_the_neurons_of_an_mlp_are_found_by_its_shapes(kind: str) -> None:
    make, axes = MLPS[kind]
    net = model(make)
    split = split_parameters(net)
    found = {n: g["neuron_axis"] for g in split.matrices for n, _ in g["params"]}
    for name, axis in found.items():
        if ".attn." in name:
            assert axis is None, name
        else:
            assert [axis] == [a for part, a in axes.items() if f".{part}" in name], name
    for part in axes:
        assert any(f".{part}" in name for name in found)
    others = {n for g in split.others for n, _ in g["params"]}
    assert {"embed.weight", "lm_head.weight", "blocks.0.norm.bias"} <= others
    assert all("gate.weight" not in name for name in found)
    assert len(found) + len(others) == len(list(net.parameters()))
    for name in ("neurons in rows", "no MLP neurons", "lm_head.weight", "vectors"):
        assert name in split.report
    Aurora(split.matrices), torch.optim.AdamW(split.others)


def test_the_last_layer_of_a_plain_network_is_its_head_and_frozen_ones_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 5), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    split = split_parameters(net)
    assert [(g["neuron_axis"], [n for n, _ in g["params"]]) for g in split.matrices] == [
        (1, ["2.weight"])
    ]
    assert "frozen: left out: 1 (*.weight)" in split.report
    assert "3.weight" in [n for g in split.others for n, _ in g["params"]]


def test_tied_heads_attention_of_torch_and_models_without_matrices_are_split() -> None:
    net = model(lambda d: mlp(fc=(d, 20), proj=(20, d)))
    net.lm_head.weight = net.embed.weight
    split = split_parameters(net)
    names = [n for g in split.matrices + split.others for n, _ in g["params"]]
    assert names.count("embed.weight") == 1 and "lm_head.weight" not in names
    encoder = split_parameters(nn.TransformerEncoderLayer(8, 2, 32))
    axes = {n: g["neuron_axis"] for g in encoder.matrices for n, _ in g["params"]}
    assert axes == {
        "linear1.weight": 0,
        "linear2.weight": 1,
        "self_attn.in_proj_weight": None,
        "self_attn.out_proj.weight": None,
    }
    vectors = split_parameters(nn.LayerNorm(3))
    assert vectors.matrices == [] and Aurora(vectors.matrices).step() is None


def test_models_of_transformers_are_split() -> None:
    """GPT-2's layers have transposed weights; Mixtral's experts are stacks."""
    tf = pytest.importorskip("transformers", reason="transformers is not installed")
    small = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, vocab_size=256)
    small |= dict(num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=32, n_head=2))
        mixtral = tf.MixtralForCausalLM(tf.MixtralConfig(**small, num_local_experts=4))
        bert = tf.BertForMaskedLM(tf.BertConfig(**small))
    axes = [
        {n: g["neuron_axis"] for g in split_parameters(m).matrices for n, _ in g["params"]}
        for m in (gpt2, mixtral, bert)
    ]
    h = "transformer.h.0."
    assert axes[0] == {
        h + "attn.c_attn.weight": None,
        h + "attn.c_proj.weight": None,
        h + "mlp.c_fc.weight": 1,
        h + "mlp.c_proj.weight": 0,
    }
    experts = {n.rpartition(".")[2]: axis for n, axis in axes[1].items() if "expert" in n}
    assert experts == dict(gate_up_proj=0, down_proj=1)
    layer = "bert.encoder.layer.0."
    assert axes[2][layer + "intermediate.dense.weight"] == 0
    assert axes[2][layer + "output.dense.weight"] == 1
    assert axes[2][layer + "attention.output.dense.weight"] is None


def sharded(rank: int, world: int) -> str:
    """What a slot says to a matrix of fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = fully_shard(nn.Linear(8, 8, bias=False), mesh=init_device_mesh("cpu", (world,)))
    try:
        Muon(model.parameters())
    except ValueError as error:
        return str(error)
    return "taken"


def test_the_shards_of_fsdp2_are_refused_in_one_sentence_on_every_rank(tmp_path: Path) -> None:
    """One rank failed inside the first step, the other died of the closed connection."""
    for said in on_ranks(2, sharded, tmp_path):
        assert "takes whole matrices, found a DTensor (8, 8) with (Shard(dim=0),)" in said
        assert "docs/engines.md" in said and "\n" not in said
