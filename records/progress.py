"""The console's line between two validations: updated in place on a terminal, else now and then.

To read a loss would make the CPU wait for the GPU. Values are copied to pinned memory instead, and
read once they have arrived, which may be some steps later. Torch and the standard library only, as
every log holds this file.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

PAUSE = 30.0  # seconds between lines where the console is no terminal


class Arrivals:
    """Values that a GPU may still have to compute; none is waited for until asked to."""

    def __init__(self) -> None:
        self.coming: deque[tuple[Tensor, torch.cuda.Event | None, object]] = deque()

    def expect(self, values: Tensor, note: object = None) -> None:
        """Copy values to the CPU once the device has them; `note` comes back with them."""
        if not values.is_cuda:
            self.coming.append((values.detach().cpu().clone(), None, note))
            return
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.coming.append((copy, event, note))

    def arrived(self, wait: bool = False) -> Iterator[tuple[float | list, object]]:
        """Yield the values that have arrived, with their notes, in order; or wait for all."""
        while self.coming and (wait or self.coming[0][1] is None or self.coming[0][1].query()):
            copy, event, note = self.coming.popleft()
            if event and wait:
                event.synchronize()
            yield copy.tolist(), note


class Progress:
    """Shows step, train loss, learning rate, speed and time left.

    Args:
        steps: of the run.
        batch_tokens: tokens of one step, over all ranks.
        world_size: ranks, of which this one sees its own share of a step's loss.
        peak: tokens per second at which the matmuls would use all of the devices; 0: unknown.
    """

    def __init__(self, steps: int, batch_tokens: int, world_size: int, peak: float = 0) -> None:
        self.steps, self.batch_tokens, self.share = steps, batch_tokens, batch_tokens / world_size
        self.in_place, self.width, self.shown = sys.stdout.isatty(), 0, time.monotonic()
        self.loss: float | None = None  # the newest mean loss that has arrived
        self.peak, self.losses = peak, Arrivals()

    def show(self, step: int, seconds: float, loss: Tensor, lr_factor: float) -> None:
        """Print the state after a step, `seconds` on the run's clock; `loss` () is a sum."""
        if not self.losses.coming:
            self.losses.expect(loss)
        for total, _ in self.losses.arrived():
            self.loss = total / self.share
        if not self.in_place and time.monotonic() - self.shown < PAUSE:
            return
        speed = self.batch_tokens * step / seconds
        left = round(seconds / step * (self.steps - step))
        parts = [
            f"step {step}/{self.steps}",
            f"train loss {self.loss:.4f}" if self.loss is not None else "",
            f"lr x {lr_factor:.3f}",
            f"{speed:,.0f} tokens/s",
            f"MFU {speed / self.peak:.1%}" if self.peak else "",
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
