"""Splits the parameters of a model: matrices with their neuron axis, and the rest for AdamW.

An MLP is found by its shapes: layers d -> h, and a layer h -> d beside them. Names decide where
shapes cannot (h <= d), and keep attention out. Everything that is not recognised goes to AdamW.
"""

import re
from typing import NamedTuple

from torch import Tensor, nn

UP = {"fc", "fc1", "c_fc", "fc_in", "w1", "w3", "wi", "wi_0", "wi_1", "linear1", "lin1", "up"}
UP |= {"up_proj", "gate_proj", "gate_up_proj", "dense_h_to_4h", "intermediate"}
DOWN = {"fc2", "c_proj", "fc_out", "w2", "wo", "linear2", "lin2", "down", "down_proj", "proj"}
DOWN |= {"dense_4h_to_h", "output"}
HEADS = {"lm_head", "head", "output", "classifier", "score", "embed_out", "unembed"}
ROUTERS = {"gate", "router", "wg"}
ATTENTION = r"attn|attention|(^|\.)(q|k|v|o|qkv|q_proj|k_proj|v_proj|o_proj|query|key|value)$"
AXES = {0: "MLP neurons in rows", 1: "MLP neurons in columns", None: "no MLP neurons"}


class Split(NamedTuple):
    """Groups for a matrix optimizer and for torch.optim.AdamW, and a report to print."""

    matrices: list[dict]
    others: list[dict]
    report: str


class Layer(NamedTuple):
    """A linear layer; the weight of GPT-2's Conv1D is transposed: (inputs, outputs)."""

    name: str
    weight: Tensor
    transposed: bool
    attends: bool  # is part of an attention

    @property
    def sizes(self) -> tuple[int, int]:
        """Return (inputs, outputs)."""
        m, n = self.weight.shape
        return (m, n) if self.transposed else (n, m)


def split_parameters(model: nn.Module) -> Split:
    """Return the trainable parameters of a model in groups, each parameter once.

    `matrices` has up to three groups, with neuron_axis 0 (rows are MLP neurons), 1 (columns) and
    None, and `others` embeddings, output heads, routers, convolutions, vectors and what is unknown.
    Parameters are (name, parameter) pairs: Aurora(split.matrices), AdamW(split.others). Print
    `report`, which lists the choices, and correct the groups where it is wrong.
    """
    axis_of = matrix_axes(model)
    chosen: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        vector = "vectors" if p.ndim < 2 else "embeddings, heads and others"
        group = AXES[axis_of[p]] if p in axis_of else vector
        chosen.setdefault(group if p.requires_grad else "frozen: left out", []).append((name, p))
    matrices = [
        dict(name=group, neuron_axis=axis, params=chosen[group])
        for axis, group in AXES.items()
        if group in chosen
    ]
    rest = ("embeddings, heads and others", "vectors")
    others = [dict(name=group, params=chosen[group]) for group in rest if group in chosen]
    report = []
    for group, pairs in chosen.items():
        alike = dict.fromkeys(re.sub(r"\d+", "*", name) for name, _ in pairs)
        report.append(f"{group}: {len(pairs)} ({', '.join(alike)})")
    return Split(matrices, others, "\n".join(report))


def matrix_axes(model: nn.Module) -> dict[Tensor, int | None]:
    """Return the neuron axis of every parameter that is a matrix or a stack of experts."""
    layers, embeddings = linear_layers(model), embeddings_of(model)
    axes: dict[Tensor, int | None] = mlp_axes(model, layers)
    inputs = {layer.sizes[0] for layer in layers}
    routers = [la for la in layers if la.name.rpartition(".")[2] in ROUTERS]
    for layer in layers:
        ends = layer.name.rpartition(".")[2] in HEADS and not re.search(r"\d", layer.name)
        unread = layer.sizes[1] not in inputs and not layer.attends
        counts = {m.num_embeddings for m in embeddings}
        head = ends or unread and (layer is layers[-1] or layer.sizes[1] in counts)
        if not head and not (layer in routers and layer.sizes[1] < layer.sizes[0]):
            axes.setdefault(layer.weight, None)
    widths = {m.embedding_dim for m in embeddings} or {la.sizes[0] for la in routers} or inputs
    for name, p in model.named_parameters():
        if p.ndim == 3 and re.search(r"expert|moe", name.lower()):
            axes[p] = expert_axis(name, p, widths)
        elif name.endswith("in_proj_weight") and p.ndim == 2:  # of nn.MultiheadAttention
            axes[p] = None
    for embedding in embeddings:  # an output head may be tied to it
        axes.pop(embedding.weight, None)
    return axes


def embeddings_of(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def linear_layers(model: nn.Module) -> list[Layer]:
    """Return the linear layers of a model, each weight once, in order."""
    layers, attention = {}, []
    for name, module in model.named_modules():
        if re.search("attn|attention", type(module).__name__.lower()):
            attention.append(name + ".")
        conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers' own
        if isinstance(module, nn.Linear) or conv1d:
            attends = name.startswith(tuple(attention)) or re.search(ATTENTION, name.lower())
            layer = Layer(name, module.weight, conv1d, bool(attends))
            layers.setdefault(module.weight, layer)
    return list(layers.values())


def mlp_axes(model: nn.Module, layers: list[Layer]) -> dict[Tensor, int | None]:
    """Return the neuron axis of the weights of MLPs: layers d -> h (or 2 h, gate and up in one),
    and h -> d beside them or in a neighbouring module, as in BERT."""
    found: dict[Tensor, int | None] = {}
    names = sorted((name for name, _ in model.named_modules()), key=lambda n: -n.count("."))
    for container in [name for name in names if name] + [""]:
        prefix = container + "." if container else ""
        inside = [la for la in layers if la.name.startswith(prefix) and not la.attends]
        near = [la for la in inside if la.name.removeprefix(prefix).count(".") < 2]
        if any(la.weight in found for la in inside):
            continue  # its MLP is further inside
        for up in near:
            for down in near:
                if up is not down and matches(up, down):
                    found[up.weight] = int(up.transposed)
                    found[down.weight] = int(not down.transposed)
    return found


def matches(up: Layer, down: Layer) -> bool:
    """True if the second layer reads the neurons of the first."""
    (d, outputs), (h, back) = up.sizes, down.sizes
    first, second = (layer.name.rpartition(".")[2] for layer in (up, down))
    likely = first in UP and second in DOWN or outputs > d and first not in DOWN - UP
    return back == d and outputs in (h, 2 * h) and likely


def expert_axis(name: str, p: Tensor, widths: set[int]) -> int | None:
    """Return the neuron axis of stacked experts (e, m, n): the side that is not the width."""
    rows, columns = (size in widths for size in p.shape[1:])
    last = name.removesuffix(".weight").rpartition(".")[2]
    if rows != columns:
        return int(rows)
    return 0 if last in UP else 1 if last in DOWN else None
