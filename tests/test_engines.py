"""`direction`, and docs/engines.md: Aurora in other engines, by the code of the page."""

import pytest
import torch
from torch import Tensor

from optimizers import Aurora, direction


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (20, 20)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_step_by_hand_with_direction_is_a_step_of_the_slot(
    shape: tuple[int, int], axis: int | None
) -> None:
    """Bit for bit, from a stack and one by one, with the settings that the group has."""
    chosen = dict(rounds=3, dtype=torch.float32)
    p, q = (torch.nn.Parameter(gaussian(*shape)) for _ in "ab")
    opt = Aurora([p, q], lr=0.1, weight_decay=0.2, reduce=False, **chosen)
    opt.param_groups[0]["neuron_axis"] = axis
    W, m = (torch.stack([p.detach(), q.detach()]) for _ in "Wm")
    m.zero_()
    for step in range(3):
        G = gaussian(2, *shape, seed=step)
        p.grad, q.grad = G
        opt.step()
        m.lerp_(G, 0.05)
        X = G.lerp(m, 0.95)
        U = direction(X, axis, **chosen)
        W = W * (1 - 0.1 * 0.2) - 0.1 * (U * max(1.0, shape[0] / shape[1]) ** 0.5)
        assert torch.equal(W, torch.stack([p.detach(), q.detach()]))
        alone = torch.stack([direction(x, axis, **chosen) for x in X])
        assert error(alone, U) < 1e-6 and alone.shape == U.shape


def test_direction_takes_empty_stacks_and_half_precision() -> None:
    assert direction(torch.zeros(0, 48, 12), 0).shape == (0, 48, 12)
    X = gaussian(48, 12).bfloat16()
    assert direction(X, 0).dtype == torch.float32
    assert torch.equal(direction(X, 0), direction(X.float(), 0))


def test_direction_refuses_what_is_no_whole_matrix_and_unknown_settings() -> None:
    for X in (torch.zeros(3), torch.zeros(8, 4, 3, 3)):
        with pytest.raises(ValueError, match="takes a whole matrix or a stack of them, found"):
            direction(X, 0)
    shard = torch.zeros(8, 4)
    shard.placements = ()  # as a DTensor has
    with pytest.raises(ValueError, match="takes a whole matrix or a stack of them, found"):
        direction(shard, 0)
    X = gaussian(48, 12)
    with pytest.raises(ValueError, match="neuron_axis is 2, expected one of 0, 1, None"):
        direction(X, 2)
    with pytest.raises(ValueError, match="has no hyperparameter 'lr'"):
        direction(X, 0, lr=0.1)
    with pytest.raises(ValueError, match="polar is 'svd', expected one of"):
        direction(X, 0, polar="svd")
