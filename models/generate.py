"""Text from a language model, token by token."""

import math

import torch
from torch import nn


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: list[int],
    count: int,
    row_tokens: int,
    seed: int,
    temperature: float = 0.7,
    top_k: int = 0,
) -> list[int]:
    """Return `ids` and `count` more, drawn from the ids below ids[0], the end-of-text token.

    The model offers hidden(tokens) and logits(hidden). All inputs have one shape (1, row_tokens);
    attention is causal, so the padding is not seen.
    """
    draws, ids = torch.Generator().manual_seed(seed), list(ids)
    device = next(model.parameters()).device
    for _ in range(count):
        row = torch.tensor([(ids[-row_tokens:] + row_tokens * [0])[:row_tokens]], device=device)
        last = model.hidden(row)[:, min(len(ids), row_tokens) - 1]
        logits = model.logits(last)[0, : ids[0]].cpu()
        logits[logits < logits.topk(top_k or ids[0]).values[-1]] = -math.inf
        ids += torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws).tolist()
    return ids


def sample_bytes(model: nn.Module, count: int, row_tokens: int, seed: int) -> str:
    """Return `count` bytes of Python from a model of bytes, whose token 256 begins a text."""
    ids = generate(model, [256, *b"def "], count, row_tokens, seed)
    return bytes(ids[1:]).decode("utf-8", errors="replace")
