"""Hyperparameters that an optimizer takes, and their values: by its defaults, choices, least."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_names(kind: type, names: Iterable[str]) -> None:
    for name in sorted(set(names) - kind.defaults.keys()):
        raise ValueError(
            f"{kind.__name__} has no hyperparameter {name!r}: it takes "
            f"{', '.join(sorted(kind.defaults))}"
        )


def check_values(kind: type, group: dict) -> None:
    """Rates and decays are 0 or more, momenta below 1, counts 1 or more, words are known."""
    for name, default in {**kind.defaults, "neuron_axis": None}.items():
        value, expected = group.get(name, default), ""
        numeric = isinstance(value, int | float | Tensor)
        if name in kind.choices or name == "neuron_axis":
            known = tuple(kind.choices.get(name, (0, 1, None)))
            expected = "" if value in known else f"one of {', '.join(map(str, known))}"
        elif isinstance(default, float):
            limit = 1.0 if name.startswith(("momentum", "beta")) else math.inf
            least = kind.least.get(name, 0)
            inside = numeric and least <= value < limit
            expected = "" if inside else f"{least} or more, below {limit}"
        elif isinstance(default, torch.dtype):
            known = isinstance(value, torch.dtype) and value.is_floating_point
            expected = "" if known else "a floating torch.dtype"
        elif isinstance(default, int):
            expected = "" if isinstance(value, int) and value >= 1 else "1 or more"
        if expected:
            raise ValueError(f"{kind.__name__}: {name} is {value!r}, expected {expected}")
