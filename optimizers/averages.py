"""Techniques around all weights of a model: averages, look-ahead, extrapolation.

They see lists of parameters, called before each forward pass, after each step and for each
validation (whole.py calls them). Their state is part of the checkpoint; as all ranks hold all
weights, all ranks hold the same state.
"""

import torch
from torch import Tensor

AroundState = dict[str, list[Tensor]]  # by name one tensor for each parameter


class Around:
    """Base of the techniques around all weights: changes nothing."""

    def start(self, weights: list[Tensor]) -> AroundState:
        """Return the state for these initial weights."""
        return {}

    def before_forward(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        """Move the weights, in place, to where the gradient of this step (from 0) is taken."""

    def after_step(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        """Update the state, in place, after the step with this number (from 0)."""

    def readout(self, weights: list[Tensor], state: AroundState) -> list[Tensor]:
        """Return the weights with which the model is validated; `weights` stay as they are."""
        return weights


class WeightAverage(Around):
    """E <- E + (W - E) / span after each step from `first` on; validation sees (1 - mix) W + mix E.

    Before `first`, E is W. E is float32, 4 bytes per parameter. Source: the tail averages of
    modded-nanogpt's track-3 entries #45 and #46.
    """

    def __init__(self, span: float, first: int = 0, mix: float = 1.0) -> None:
        if not (span >= 1 and first >= 0 and 0 <= mix <= 1):
            raise ValueError(
                f"WeightAverage: found span {span}, first {first}, mix {mix}, expected a span of "
                "1 or more, a first step of 0 or more and a mix from 0 to 1"
            )
        self.span, self.first, self.mix = span, first, mix

    def start(self, weights: list[Tensor]) -> AroundState:
        return {"average": [w.detach().float().clone() for w in weights]}

    def after_step(self, weights: list[Tensor], state: AroundState, step: int) -> None:
        share = 1 / self.span if step >= self.first else 1.0
        torch._foreach_lerp_(state["average"], [w.detach().float() for w in weights], share)

    def readout(self, weights: list[Tensor], state: AroundState) -> list[Tensor]:
        return torch._foreach_lerp(
            [w.detach().float() for w in weights], state["average"], self.mix
        )
