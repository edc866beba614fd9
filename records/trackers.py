"""Copies of a log for Weights & Biases and TensorBoard, whose packages are imported on request.

Torch and the standard library only, as every log holds this file.
"""

import importlib
import importlib.util
import json
from pathlib import Path

PACKAGES = dict(wandb="wandb", tensorboard="tensorboard")  # by flag


def check_trackers(config: dict) -> None:
    """Raise ValueError if a tracker that the settings ask for cannot work here."""
    for flag, package in PACKAGES.items():
        if config[flag] and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--{flag} needs a package that is not installed: run pip install {package}"
            )
    if not config["wandb"]:
        return
    client = importlib.import_module("wandb")
    reason = "nobody is logged in"
    try:
        if client.setup().settings.mode != "online" or client.login(prompt=False):
            return
    except client.Error as error:  # of a key that the server refuses, or no network
        reason = str(error).partition("\n")[0]
    raise ValueError(f"--wandb: {reason}; run wandb login, or set WANDB_MODE=offline")


class Trackers:
    """The pages of one trial; none at all unless the settings ask for them.

    Args:
        name: of the trial.
        meta: what its log's `meta:` line holds, with the settings as "config".
    """

    def __init__(self, name: str, meta: dict) -> None:
        self.page = self.board = None
        if meta["config"].get("wandb"):
            client = importlib.import_module("wandb")
            self.page = client.init(project="aurora-speedrun", name=name, config=meta)
        if folder := meta["config"].get("tensorboard"):
            client = importlib.import_module("torch.utils.tensorboard")
            self.board = client.SummaryWriter(str(Path(folder, name)))
            self.board.add_text("meta", f"```\n{json.dumps(meta, indent=2, default=str)}\n```")

    def log(self, step: int, values: dict) -> None:
        """Add numbers at a step; those of a nested dict are named outer/inner."""
        flat = {}
        for name, value in values.items():
            inner = {f"{name}/{key}": v for key, v in value.items()} if type(value) is dict else {}
            flat |= inner or {name: value}
        if self.page:
            self.page.log(flat, step=step)
        for name, value in flat.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def summarise(self, name: str, text: str) -> None:
        """Add what a log's line says once."""
        if self.page:
            self.page.summary[name] = text
        if self.board:
            self.board.add_text(name, f"`{text}`")

    def close(self) -> None:
        if self.page:
            self.page.finish()
        if self.board:
            self.board.close()
