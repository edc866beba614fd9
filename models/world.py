"""The machine of a run: the device that works here, and the ranks of the process group."""

import importlib
import os

import torch
import torch.distributed as dist
from torch import Tensor

PEAK_TFLOPS = {  # dense bf16 with fp32 sums, of the makers' data sheets, by a part of the name
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
}


class World:
    """The process group (NCCL between GPUs, gloo between CPUs), or one process without a group."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        if not 0 <= rank < size:
            raise ValueError(
                f"RANK is {rank} and WORLD_SIZE {size}: unset both in this shell, or use torchrun"
            )
        self.rank, self.size, self.device = rank, size, device
        cuda = device if device.type == "cuda" else None
        if cuda:
            torch.cuda.set_device(cuda)
        self.device_name = torch.cuda.get_device_name() if cuda else device.type
        if size > 1:
            # Imported after the group, torch._dynamo would keep it alive, and gloo aborts at exit.
            importlib.import_module("torch._dynamo")
            dist.init_process_group("nccl" if cuda else "gloo", device_id=cuda)

    def synchronize(self) -> None:
        """Wait for all ranks, and for everything that this rank's device has to do."""
        if dist.is_initialized():
            dist.barrier()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def all_reduce(self, tensor: Tensor, op: str = "SUM") -> Tensor:
        """Return the reduction over all ranks, on the device, as NCCL needs it; maybe in place."""
        if dist.is_initialized():
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
        return tensor

    @property
    def peak_flops(self) -> float:
        """Return the floating-point operations per second of all devices; 0 if unknown."""
        known = (tflops for part, tflops in PEAK_TFLOPS.items() if part in self.device_name)
        return 1e12 * self.size * next(known, 0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def everywhere(self, condition: bool) -> bool:
        """True if the condition holds on every rank."""
        return bool(self.all_reduce(torch.tensor(float(condition)), "MIN").item())

    def same(self, tensors: list[Tensor]) -> bool:
        """True if all ranks hold the same tensors: the sums over the bits of each are equal."""
        integers = {4: torch.int32, 2: torch.int16}
        sums = torch.stack([t.detach().view(integers[t.element_size()]).sum() for t in tensors])
        return torch.equal(*(self.all_reduce(sums.clone(), op) for op in ("MIN", "MAX")))


def choose_device(wanted: str) -> torch.device:
    """Return the first of cuda, mps and cpu, or just the wanted one, that computes a matmul."""
    local, ranks = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    if not wanted and torch.cuda.is_available():
        wanted = "cuda"  # a GPU that fails is an error, not a reason to use the CPU
    if wanted == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"{ranks} processes for {torch.cuda.device_count()} GPUs here")
    for name in [wanted] if wanted else ["mps", "cpu"]:
        try:
            device = torch.device(name, local if name == "cuda" else None)
            (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum().item()
            return device
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without it
            reason = str(error).split("\n")[0]
    raise ValueError(f"device {wanted!r} does not work here, {reason}: choose another --device")
