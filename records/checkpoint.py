"""Checkpoints: everything that a run of any number of ranks needs to go on.

A file appears only when it is whole. Torch and the standard library only, as every log holds this
file.
"""

import pickle
import shutil
from pathlib import Path

import torch
from torch import nn

# What torch.load raises for files that are damaged or something else.
UNREADABLE = RuntimeError, ValueError, TypeError, LookupError, OSError, EOFError, pickle.PickleError


def shard_sizes(shards: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: len(tokens) for name, tokens in shards.items()}


def write_checkpoint(
    path: Path,
    config: dict,
    weights: dict,
    shards: dict[str, torch.Tensor],
    points: list[tuple[int, float, float]],
    **facts: object,
) -> None:
    """Save settings, weights, the sizes of the shards, validations (step, loss, seconds) and facts.

    `path` is replaced in one step; if the settings keep the best checkpoint and the last loss is
    the lowest, so is best_of(path).
    """
    weights = {name: w.clone() for name, w in weights.items()}  # a view would save all its storage
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    facts |= dict(shards=shard_sizes(shards), points=points)
    torch.save(dict(config=config, model=weights, **facts), part)
    part.replace(path)
    if config.get("keep") == "best" and points[-1][1] <= min(loss for _, loss, _ in points):
        shutil.copyfile(path, part)
        part.replace(best_of(path))


def best_of(path: Path) -> Path:
    """Return the name of the best checkpoint beside the last: run.best.pt beside run.pt."""
    return path.with_suffix(f".best{path.suffix}")


def read_checkpoint(path: Path, same: dict, defaults: dict, **given: object) -> dict:
    """Return a checkpoint whose settings have the values in `same`, and whose facts are `given`.

    `defaults` are the values of settings that older checkpoints lack. Raises FileNotFoundError or
    ValueError with one sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: write one with --checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        then = saved["config"] = defaults | saved["config"]
    except UNREADABLE:
        raise ValueError(f"{path} is no whole checkpoint of this trainer: name another") from None
    pairs = [(name, then[name], same[name]) for name in same]
    for name, found, expected in pairs + [(key, saved.get(key), given[key]) for key in given]:
        if found != expected:
            raise ValueError(f"{path} was made with {name} {found}, now it is {expected}")
    return dict(saved, path=str(path))


def read_trials(
    paths: dict[int, tuple[Path, Path | None]],
    same: dict,
    defaults: dict,
    shards: dict[str, torch.Tensor],
) -> dict[int, dict]:
    """Return the checkpoints from which trials go on, by seed; paths are check_outputs'."""
    sizes = shard_sizes(shards)
    return {
        seed: read_checkpoint(path, same, defaults, seed=seed, shards=sizes)
        for seed, (_, path) in paths.items()
        if path and path.is_file()
    }


def restore(saved: dict, model: nn.Module, optimizer: object) -> None:
    """Load the weights and the optimizer's state; ValueError, one sentence, if they do not fit."""
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved)
    except (*UNREADABLE, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        raise ValueError(
            f"{saved['path']} does not fit model and optimizer: {reason}: name another checkpoint, "
            "or use the code that wrote it"
        ) from None
