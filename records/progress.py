"""The console's line between two validations: updated in place on a terminal, else now and then.

Torch and the standard library only, as every log holds this file.
"""

import sys
import time

import torch
from torch import Tensor

PAUSE = 30.0  # seconds between lines where the console is no terminal


class Progress:
    """Shows step, train loss, learning rate, speed and time left.

    To read a loss would make the CPU wait for the GPU. Each one is copied to pinned memory instead,
    and the newest that has arrived is shown, which may be some steps old.

    Args:
        steps: of the run.
        batch_tokens: tokens of one step, over all ranks.
        world_size: ranks, of which this one sees its own share of a step's loss.
    """

    def __init__(self, steps: int, batch_tokens: int, world_size: int) -> None:
        self.steps, self.batch_tokens, self.share = steps, batch_tokens, batch_tokens / world_size
        self.in_place, self.width, self.shown = sys.stdout.isatty(), 0, time.monotonic()
        self.loss: float | None = None  # the newest mean loss that has arrived
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None

    def follow(self, loss: Tensor) -> None:
        """Take note of a summed loss (), without waiting for its device."""
        if self.coming and self.coming[1].query():
            self.loss, self.coming = self.coming[0].item() / self.share, None
        if not loss.is_cuda:
            self.loss = loss.item() / self.share
        elif self.coming is None:
            copy = torch.empty((), dtype=loss.dtype, pin_memory=True)
            copy.copy_(loss, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.coming = copy, event

    def show(self, step: int, seconds: float, loss: Tensor, lr_factor: float) -> None:
        """Print the state after a step, `seconds` on the run's clock."""
        self.follow(loss)
        if not self.in_place and time.monotonic() - self.shown < PAUSE:
            return
        left = round(seconds / step * (self.steps - step))
        parts = [
            f"step {step}/{self.steps}",
            f"train loss {self.loss:.4f}" if self.loss is not None else "",
            f"lr x {lr_factor:.3f}",
            f"{self.batch_tokens * step / seconds:,.0f} tokens/s",
            f"{left // 60}:{left % 60:02} left",
        ]
        self.shown, line = time.monotonic(), "  ".join(filter(None, parts))
        print("\r" * self.in_place + line.ljust(self.width), end="" if self.in_place else "\n")
        sys.stdout.flush()
        self.width = len(line)

    def clear(self) -> None:
        """Make room for another line."""
        if self.in_place and self.width:
            print("\r" + " " * self.width, end="\r")
            self.width = 0
