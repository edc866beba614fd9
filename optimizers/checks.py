"""Checks of the hyperparameters of an optimizer, by its defaults, choices and least values."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_names(optimizer: type, names: Iterable[str]) -> None:
    for name in sorted(set(names) - optimizer.defaults.keys()):
        raise ValueError(
            f"{optimizer.__name__} has no hyperparameter {name!r}: it takes "
            f"{', '.join(sorted(optimizer.defaults))}"
        )


def check_values(optimizer: type, group: dict) -> None:
    """Raise ValueError unless rates and decays are 0 or more, momenta below 1, counts 1 or more."""
    for name, default in {**optimizer.defaults, "neuron_axis": None}.items():
        value, expected = group.get(name, default), ""
        numeric = isinstance(value, int | float | Tensor)
        if name in optimizer.choices or name == "neuron_axis":
            known = tuple(optimizer.choices.get(name, (0, 1, None)))
            expected = "" if value in known else f"one of {', '.join(map(str, known))}"
        elif isinstance(default, float):
            limit = 1.0 if name.startswith(("momentum", "beta")) else math.inf
            least = optimizer.least.get(name, 0)
            inside = numeric and least <= value < limit
            expected = "" if inside else f"{least} or more, below {limit}"
        elif isinstance(default, torch.dtype):
            known = isinstance(value, torch.dtype) and value.is_floating_point
            expected = "" if known else "a floating torch.dtype"
        elif isinstance(default, int):
            expected = "" if isinstance(value, int) and value >= 1 else "1 or more"
        if expected:
            raise ValueError(f"{optimizer.__name__}: {name} is {value!r}, expected {expected}")
