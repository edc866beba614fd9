"""The gradient of one step, in microbatches of as many rows as fit the memory of every rank.

All microbatches of a run have one shape: one compilation, and one CUDA graph where launching
kernels takes longer than running them (graphs.py).
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .graphs import MicrobatchGraphs


class Microbatches:
    """Splits tokens into microbatches and runs the model on them.

    Args:
        model: model(inputs, targets) returns a summed loss.
        row_tokens: the context length.
        step_rows: this rank's rows in a step, of which a microbatch has a divisor.
        rows: of a microbatch; 0: the most that fit, up to model.rows.
        everywhere: everywhere(condition) is true if it holds on every rank.
        may_record: record CUDA graphs where they pay.
    """

    def __init__(
        self,
        model: nn.Module,
        row_tokens: int,
        step_rows: int,
        rows: int,
        everywhere: Callable[[bool], bool],
        may_record: bool,
    ) -> None:
        self.model, self.row_tokens, self.everywhere = model, row_tokens, everywhere
        divisors = [n for n in range(model.rows, 0, -1) if step_rows % n == 0]
        self.candidates = [rows] if rows else divisors
        self.step_tokens = step_rows * row_tokens
        self.may_record, self.rows = may_record, rows  # `settle` finds the rows
        self.graphs: MicrobatchGraphs | None = None

    def split(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets (rows, row_tokens), int64, from L + 1 tokens.

        Inputs are tokens [0, L), targets [1, L + 1). All microbatches have equally many rows: one
        shape, one compilation.
        """
        inputs, targets = (t.long().view(-1, self.row_tokens) for t in (tokens[:-1], tokens[1:]))
        rows = math.gcd(self.rows, len(inputs))
        yield from zip(inputs.split(rows), targets.split(rows), strict=True)

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """Return the summed loss of each microbatch."""
        return torch.stack([self.model(*batch) for batch in self.split(tokens)])

    def backward(self, tokens: Tensor, before_last: Callable[[], None] = lambda: None) -> Tensor:
        """Add the gradient of the summed loss to p.grad, and return that loss.

        before_last() is called before the last backward pass, but never with CUDA graphs: a replay
        runs no hooks of parameters.
        """
        batches = list(self.split(tokens))
        if self.graphs:
            return self.graphs.gradients(batches)
        total = torch.zeros((), device=tokens.device)
        for batch in batches:
            loss = self.model(*batch)
            if batch is batches[-1]:
                before_last()
            loss.backward()
            total += loss.detach()
        return total

    # ---- memory -----------------------------------------------------------------------------

    def settle(self, token: Tensor) -> None:
        """Choose the most rows with which two microbatches fit the memory of every rank.

        `token` (1,) fills them; gradients are left. Raises ValueError if no rows fit, or if the
        loss leaves a parameter without a gradient.
        """
        for rows in self.candidates:
            self.rows = rows
            some = token.expand(2 * self.rows * self.row_tokens + 1)
            if self.fits(partial(self.backward, some)):
                break
        else:
            raise ValueError(f"{self.rows} rows do not fit the memory: use fewer, or more GPUs")
        for name, p in self.model.named_parameters():
            if p.grad is None:
                raise ValueError(f"the parameter {name} has no gradient: the loss must use it")

    def seconds_per_step(self, tokens: Tensor, synchronize: Callable[[], None]) -> float:
        """Return how long the gradient of a step takes, by one microbatch; none is left.

        `tokens` are L + 1, as in `split`. All ranks call it; synchronize() waits for them.
        """
        tokens = tokens[: self.rows * self.row_tokens + 1]
        synchronize()
        started = time.perf_counter()
        self.backward(tokens)
        synchronize()
        self.model.zero_grad()
        share = (len(tokens) - 1) / self.step_tokens
        return (time.perf_counter() - started) / share

    def fits(self, work: Callable[[], object]) -> bool:
        """True if every rank has the memory for this work; if not, no gradients are left."""
        try:
            work()
            enough = True
        except torch.OutOfMemoryError:
            enough = False
        if not (enough := self.everywhere(enough)):
            self.model.zero_grad()
            torch.cuda.empty_cache()
        return enough

    def record(self, validate: Callable[[Tensor], object], tokens: Tensor) -> None:
        """Record graphs if they pay and a validation fits beside the memory that they keep.

        No gradients are left. One microbatch of `tokens` is validated.
        """
        self.model.zero_grad()
        shape, some = (self.rows, self.row_tokens), tokens[: self.rows * self.row_tokens + 1]

        def with_graphs() -> None:
            torch.cuda.reset_peak_memory_stats()  # recorded memory counts as allocated only now
            self.graphs = MicrobatchGraphs(self.model, shape)
            self.graphs.record()
            validate(some)

        pays = self.may_record and MicrobatchGraphs.worth(shape, tokens.device)
        if not (pays and self.fits(with_graphs)):
            self.graphs = None
            validate(some)
