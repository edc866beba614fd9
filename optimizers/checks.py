"""Checks of the parameters and hyperparameters of an optimizer, by its defaults and choices."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real

import torch
from torch import Tensor

# Keys of a parameter group besides hyperparameters.
TAGS = {"params", "name", "neuron_axis", "convolutions", "param_names", "initial_lr"}
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REMEDIES = {  # arguments of torch.optim's that have no meaning here, and what to do instead
    "maximize": "negate the loss",
    "differentiable": "a step cannot be differentiated",
    "foreach": "equal shapes are always stepped together",
    "fused": "compile=True fuses kernels",
    "capturable": "compiled steps are replayed as CUDA graphs anyway",
}


def check_names(optimizer: type, names: Iterable[str]) -> None:
    for name in sorted(set(names) - optimizer.defaults.keys()):
        remedy = f" ({REMEDIES[name]})" if name in REMEDIES else ""
        raise ValueError(
            f"{optimizer.__name__} has no hyperparameter {name!r}{remedy}: it takes "
            f"{', '.join(sorted(optimizer.defaults))}"
        )


def check_group_names(optimizer: type, group: dict) -> None:
    """Raise ValueError for misspelt hyperparameters of a group, and torch's that are switched on.

    Other keys are the caller's own and are kept.
    """
    own = group.keys() - TAGS - optimizer.defaults.keys()
    known = {*optimizer.defaults, "neuron_axis", "convolutions"}
    misspelt = {name for name in own if get_close_matches(str(name), known, cutoff=0.85)}
    check_names(optimizer, misspelt | {name for name in own & REMEDIES.keys() if group[name]})


def check_values(optimizer: type, group: dict) -> None:
    """Raise ValueError unless rates and decays are 0 or more, momenta below 1, counts 1 or more."""
    for name, default in {**optimizer.defaults, "neuron_axis": None}.items():
        value, expected = group.get(name, default), ""
        single = isinstance(value, Tensor) and value.numel() == 1
        if name in optimizer.choices or name == "neuron_axis":
            known = tuple(optimizer.choices.get(name, (0, 1, None)))
            expected = "" if value in known else f"one of {', '.join(map(str, known))}"
        elif isinstance(default, float):
            limit = 1.0 if name.startswith(("momentum", "beta")) else math.inf
            least = optimizer.least.get(name, 0)
            inside = (single or isinstance(value, Real)) and least <= value < limit
            expected = "" if inside else f"{least} or more, below {limit}"
        elif isinstance(default, torch.dtype):
            known = isinstance(value, torch.dtype) and value.is_floating_point
            expected = "" if known else "a floating torch.dtype"
        elif isinstance(default, int):
            expected = "" if isinstance(value, Integral) and value >= 1 else "1 or more"
        if expected:
            raise ValueError(f"{optimizer.__name__}: {name} is {value!r}, expected {expected}")


def matrix_shape(optimizer: type, p: Tensor, convolutions: bool) -> tuple[int, int]:
    """Return (m, n) of the matrices in a parameter (m, n), in a stack (e, m, n) or, as a
    convolution, in (out, in, ...); raise ValueError where there are none."""
    name, shape = optimizer.__name__, tuple(p.shape)
    if hasattr(p, "device_mesh"):  # a DTensor; its module takes a second to import
        raise ValueError(
            f"{name} takes whole matrices, found a DTensor {shape} with {p.placements}, as FSDP2 "
            "makes them: docs/engines.md has Aurora for such parameters, or use DDP"
        )
    if p.dtype not in TYPES or p.layout != torch.strided:
        raise ValueError(
            f"{name} takes dense real matrices, found a parameter {shape} of {p.dtype} and "
            f"{p.layout}: leave it out, or convert it"
        )
    if p.ndim < 2 or p.numel() == 0 or p.ndim > 3 and not convolutions:
        hint = " or, if it is a convolution, set convolutions=True" if p.ndim > 3 else ""
        raise ValueError(
            f"{name} takes matrices, found a parameter of shape {shape}: give it to "
            f"torch.optim.AdamW instead{hint}"
        )
    return (p.size(0), p[0].numel()) if convolutions else (p.size(-2), p.size(-1))


def plain(value: object) -> object:
    """Return a number of any library as float or int, and everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
