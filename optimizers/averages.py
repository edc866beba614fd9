"""Techniques around all weights of a model: averages, look-ahead, extrapolation.

They see lists of parameters, called before each forward pass, after each step and for each
validation (whole.py calls them). Their state is part of the checkpoint; as all ranks hold all
weights, all ranks hold the same state.
"""

import torch
from torch import Tensor

from .technique import Schedule

AroundState = dict[str, list[Tensor]]  # by name one tensor for each parameter


def float_of(weight: Tensor) -> Tensor:
    """Return a weight in float32 or better: in bfloat16 small movements would be lost."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


class Around:
    """Base of the techniques around all weights: changes nothing.

    `without` names groups of parameters that a technique does not see.
    """

    without: tuple[str, ...] = ()

    def start(self, weights: list[Tensor]) -> AroundState:
        """Return the state for these initial weights."""
        return {}

    def before_forward(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        """Move the weights, in place, to where the gradient of this step (from 0) is taken."""

    def after_step(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        """Update the state and, at will, the weights in place after this step (from 0)."""

    def readout(self, weights: list[Tensor], state: AroundState) -> list[Tensor]:
        """Return the weights with which the model is validated; `weights` stay as they are."""
        return weights


class WeightAverage(Around):
    """E <- E + (W - E) / span after each step from `first` on; validation sees (1 - mix) W + mix E.

    Before `first`, E is W. E is float32, 4 bytes per parameter. Source: the tail averages of
    modded-nanogpt's track-3 entries #45 and #46.
    """

    def __init__(
        self, span: float, first: int = 0, mix: float = 1.0, without: tuple[str, ...] = ()
    ) -> None:
        if not (span >= 1 and first >= 0 and 0 <= mix <= 1):
            raise ValueError(
                f"WeightAverage: found span {span}, first {first}, mix {mix}, expected a span of "
                "1 or more, a first step of 0 or more and a mix from 0 to 1"
            )
        self.span, self.first, self.mix, self.without = span, first, mix, without

    def start(self, weights: list[Tensor]) -> AroundState:
        return {"average": [float_of(w).clone() for w in weights]}

    def after_step(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        share = 1 / self.span if step >= self.first else 1.0
        torch._foreach_lerp_(state["average"], [float_of(w) for w in weights], share)

    def readout(self, weights: list[Tensor], state: AroundState) -> list[Tensor]:
        return torch._foreach_lerp([float_of(w) for w in weights], state["average"], self.mix)


class EmaNesterov(Around):
    """Gradients are taken ahead: W <- W + beta D before the forward pass, from `first` to `rest`.

        D <- decay D + (1 - decay) (W' - W), with W before the shift and W' after the step

    The step starts from the shifted weights; the shift is not taken back. beta follows `factor`
    (step, steps) of the step before. D is float32. Source: track_3#39, #40. Memory: 8 bytes per
    parameter.
    """

    def __init__(
        self, steps: int, first: int, rest: int, factor: Schedule, beta: float = 0.3
    ) -> None:
        self.steps, self.first, self.rest = steps, first, rest
        self.factor, self.beta, self.decay = factor, beta, 0.99

    def start(self, weights: list[Tensor]) -> AroundState:
        zeros = [torch.zeros_like(float_of(w)) for w in weights]
        return {"drift": zeros, "before": [w.detach().clone() for w in weights]}

    def before_forward(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        torch._foreach_copy_(state["before"], [w.detach() for w in weights])
        if self.first <= step < self.rest:
            beta = self.beta * self.factor(max(step - 1, 0), self.steps)
            shifts = torch._foreach_mul(state["drift"], beta)
            torch._foreach_add_([w.detach() for w in weights], shifts)

    def after_step(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        moved = torch._foreach_sub([float_of(w) for w in weights], state["before"])
        torch._foreach_lerp_(state["drift"], moved, 1 - self.decay)


class ReadBack(Around):
    """Validations from step `first` on see W + share (R - W), R the weights after step `kept`.

    Source: track_3#38, #42. Memory: 4 bytes per parameter.
    """

    def __init__(self, kept: int, first: int, share: float = 0.075) -> None:
        self.kept, self.first, self.share = kept, first, share

    def start(self, weights: list[Tensor]) -> AroundState:
        return {"kept": [float_of(w).clone() for w in weights], "steps": [torch.zeros(1)]}

    def after_step(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        state["steps"][0].fill_(step + 1)
        if step + 1 == self.kept:
            torch._foreach_copy_(state["kept"], [w.detach() for w in weights])

    def readout(self, weights: list[Tensor], state: AroundState) -> list[Tensor]:
        if state["steps"][0].item() < self.first:
            return weights
        return torch._foreach_lerp([float_of(w) for w in weights], state["kept"], self.share)


class Extrapolation(Around):
    """Matrices jump towards the limit of their last steps: reduced-rank extrapolation.

        d_1, d_2, d_3: differences of the last 4 iterates as one vector x, the newest first
        K = d d^T + (1e-6 tr K / 3 + 1e-10) I;  a = K^-1 1 / sum(K^-1 1);  g_i = sum_{j >= i} a_j
        x <- x - 0.875 sum g_i d_i, by at most 0.001 |x|; the iterates restart there

    After every fifth step from `first` + 5 on. Source: track_3#34. Memory: 16 bytes per parameter.
    """

    without = ("embed", "head", "scalars")
    kept = 4

    def __init__(self, first: int, every: int = 5) -> None:
        self.first, self.every = first, every

    def start(self, weights: list[Tensor]) -> AroundState:
        return {f"back{i}": [float_of(w).clone() for w in weights] for i in range(self.kept)}

    def after_step(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        done, x = step + 1, [w.detach() for w in weights]
        if done < self.first:
            return
        back = [state[f"back{i}"] for i in range(self.kept)]  # the newest first
        for newer, older in zip(back[-2::-1], back[:0:-1], strict=True):
            torch._foreach_copy_(older, newer)
        torch._foreach_copy_(back[0], x)
        if done % self.every or done - self.first < self.kept - 1:
            return
        d = [torch._foreach_sub(a, b) for a, b in zip(back, back[1:], strict=False)]
        K = torch.stack([torch.stack([dot(a, b) for b in d]) for a in d])
        eye = torch.eye(len(d), dtype=K.dtype, device=K.device)
        a, _ = torch.linalg.solve_ex(K + (1e-6 * K.trace() / 3 + 1e-10) * eye, eye.sum(1))
        g = (a / a.sum()).flip(0).cumsum(0).flip(0)
        moves = torch._foreach_mul(d[0], -0.875 * g[0])
        for share, difference in zip(g[1:], d[1:], strict=True):
            torch._foreach_add_(moves, torch._foreach_mul(difference, -0.875 * share))
        size, most = dot(moves, moves).sqrt(), 0.001 * dot(back[0], back[0]).sqrt()
        torch._foreach_mul_(moves, (most / size.clamp_min(1e-30)).clamp_max(1))
        torch._foreach_add_(x, moves)
        torch._foreach_copy_(back[0], x)


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return the inner product () of lists of tensors, each list as one vector."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
