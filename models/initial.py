"""Initial weights of published entries: changes of those that a model draws by itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def entry30(model: nn.Module, seed: int, signs: float = 0.14, biases: bool = True) -> None:
    """Draw q, k, v, fc as nn.Linear does, shrink fc with depth, and pair the gains of a layer.

    fc's weights of layer l of L are multiplied by 1 - 0.3 l/(L - 1). With a random vector of signs
    for each layer, gains are 1 - signs of attention's norm and 1 + signs of the MLP's. Source:
    track_3#30.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(p: Tensor, fan_in: int) -> None:
        bound = fan_in**-0.5
        p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)

    last = max(1, len(model.blocks) - 1)
    for layer, block in enumerate(model.blocks):
        for linear in (block.attn.q, block.attn.k, block.attn.v, block.mlp.fc):
            draw(linear.weight, linear.in_features)
            if biases:
                draw(linear.bias, linear.in_features)
        block.mlp.fc.weight.mul_(1 - 0.3 * layer / last)
        sign = torch.randint(2, block.norm1.gain.shape, generator=generator) * 2.0 - 1
        block.norm1.gain.copy_(1 - signs * sign)
        block.norm2.gain.copy_(1 + signs * sign)


def entry42(model: nn.Module, seed: int) -> None:
    """As entry30, with gains of 1 and biases of 0. Source: track_3#42."""
    entry30(model, seed, signs=0.0, biases=False)


def entry44(model: nn.Module, seed: int) -> None:
    """As entry30, with 0.125 for 0.14. Source: track_3#44."""
    entry30(model, seed, signs=0.125)


INITIAL: dict[str, Callable[[nn.Module, int], None]] = {
    "plain": lambda model, seed: None,
    "entry30": entry30,
    "entry42": entry42,
    "entry44": entry44,
}
