"""bfloat16 weights with the 16 bits that float32 has beyond them.

A float32 number is its upper half, which is a bfloat16, and 16 low bits. The weight w holds the
nearest bfloat16 and the state the difference d of the bit patterns, from -2^15 to 2^15 - 1:

    bits(W) = 2^16 bits(w) + d

so that steps add up in float32 and lose nothing, for 2 bytes per parameter on the owner. A weight
that others overwrite is taken as it is, up to half of its last bit.
"""

import torch
from torch import Tensor


def widened(weight: Tensor, low_bits: Tensor) -> Tensor:
    """Return the float32 numbers of bfloat16 weights and their int16 low bits, all (k, m, n)."""
    high = weight.view(torch.int16).to(torch.int32) * 2**16
    return (high + low_bits).view(torch.float32)


def narrow(W: Tensor, weight: Tensor, low_bits: Tensor) -> None:
    """Write float32 W into bfloat16 weights and their int16 low bits, all (k, m, n)."""
    bits = W.view(torch.int32)
    high = torch.where(W.isnan(), bits | 2**22, bits + 2**15) >> 16  # a nan stays one
    low_bits.copy_(torch.where(W.isnan(), 0, bits - high * 2**16))
    weight.copy_(high.to(torch.int16).view(torch.bfloat16))
