"""Rotary position embedding of which half of the pairs do not rotate, after an RMS norm per head.

Source: modded-nanogpt's optimizer track.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_table(row_tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (row_tokens, 1, head_dim / 2), fp32; half of the pairs do not rotate."""
    quarter = head_dim // 4
    frequencies = (1 / 1024) ** torch.linspace(0, 1, quarter, device=device)
    frequencies = torch.cat([frequencies, torch.zeros(quarter, device=device)])
    angles = torch.outer(torch.arange(row_tokens, device=device), frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotary embedding of the RMS norm of each head, computed in fp32."""
    x1, x2 = F.rms_norm(x_BTHD, (x_BTHD.size(-1),)).float().chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x_BTHD)
