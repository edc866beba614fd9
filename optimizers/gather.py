"""How recorded kernels find the gradients of a part: by a table of addresses on the GPU.

A graph reads what stays in place, and gradients are elsewhere in each step. Copied to one place
before it they need room of their own, always. Stacked inside the graph they need none: the stack
is an intermediate like others, and what comes after its last use takes its room.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

KINDS = (torch.float32, torch.bfloat16, torch.float16)  # that the kernel reads, by KIND
BLOCK = 2048  # numbers of a program: 16 for each of its threads, in loads of 16 bytes

if triton is not None:

    @triton.jit
    def gather_kernel(table, stack, SIZE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
        """Program (block, matrix): copies a block of the numbers at address table[matrix]."""
        block, matrix = tl.program_id(0), tl.program_id(1)
        address = tl.load(table + matrix)
        if KIND == 0:
            source = address.to(tl.pointer_type(tl.float32))
        elif KIND == 1:
            source = address.to(tl.pointer_type(tl.bfloat16))
        else:
            source = address.to(tl.pointer_type(tl.float16))
        source = tl.multiple_of(source, 16)  # bytes; see `readable`
        at = block * BLOCK + tl.arange(0, BLOCK)
        numbers = tl.load(source + at, mask=at < SIZE).to(stack.dtype.element_ty)
        tl.store(stack + matrix.to(tl.int64) * SIZE + at, numbers, mask=at < SIZE)


def wide(like: Tensor) -> torch.dtype:
    """The type in which such weights are stepped: float32 or better."""
    return torch.promote_types(like.dtype, torch.float32)


def gather(table: Tensor, kind: torch.dtype, weights: Tensor) -> Tensor:
    """The gradients of type `kind` at these addresses (k,), as a stack for weights (k, m, n)."""
    stack = torch.empty(weights.shape, dtype=wide(weights), device=weights.device)
    (k, m, n), which = weights.shape, KINDS.index(kind)
    gather_kernel[(triton.cdiv(m * n, BLOCK), k)](table, stack, m * n, which, BLOCK)
    return stack


def gather_runs(grads: list[Tensor]) -> bool:
    """Whether the kernel reads these."""
    like = grads[0]
    same = all(grad.dtype == like.dtype for grad in grads)
    return triton is not None and like.is_cuda and same and like.dtype in KINDS


def readable(grad: Tensor) -> Tensor:
    """This, or a copy: row after row, and at a multiple of 16 bytes, as torch allocates."""
    fits = grad.is_contiguous() and grad.data_ptr() % 16 == 0
    return grad if fits else grad.clone(memory_format=torch.contiguous_format)


class Sources:
    """Of one part: a tensor that stays where it is, by which its gradients are read."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.addresses: list[int] = []  # that are in it

    def of(self, grads: list[Tensor], weights: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Addresses (k,) of the readable gradients of weights (k, m, n), and their type.

        Where the kernel does not run, a stack of copies, as `gather` makes it, and None.
        """
        if not gather_runs(grads):
            stack = self.room(weights.shape, wide(weights), weights.device)
            torch._foreach_copy_(list(stack), grads)
            return stack, None
        table = self.room((len(grads),), torch.int64, weights.device)
        addresses = [grad.data_ptr() for grad in grads]
        if addresses != self.addresses:
            # Pinned anew each time: the last may still be on its way, and torch keeps it until then
            pinned = torch.tensor(addresses, dtype=torch.int64, pin_memory=table.is_cuda)
            table.copy_(pinned, non_blocking=True)
            self.addresses = addresses
        return table, grads[0].dtype

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        held = self.tensor
        if held is None or (held.shape, held.dtype, held.device) != (shape, dtype, device):
            self.tensor, self.addresses = torch.empty(shape, dtype=dtype, device=device), []
        return self.tensor
