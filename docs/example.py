"""Aurora in a training loop of your own: one process or DDP, CPU or GPU.

pip install . && python docs/example.py
torchrun --standalone --nproc_per_node=2 docs/example.py
"""

import os

import torch
import torch.distributed as dist
from aurora_optim import Aurora
from torch import nn


def main() -> float:
    ddp, cuda = "RANK" in os.environ, torch.cuda.is_available()
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    device = torch.device("cuda", local) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10)).to(device)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32), nn.Linear(32, 10))
    up, down = (layer.weight for layer in (model.to(device)[0], model[2]))  # of the hidden neurons
    if ddp:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        model = nn.parallel.DistributedDataParallel(model)
    rest = [p for p in model.parameters() if p is not up and p is not down]
    groups = [dict(params=[up], neuron_axis=0), dict(params=[down], neuron_axis=1)]
    optimizers = Aurora(groups, lr=0.02, reduce=False), torch.optim.AdamW(rest, lr=3e-3)
    data = torch.Generator().manual_seed(1 + rank)  # reduce=False: DDP has averaged the gradients
    for step in range(301):
        x = torch.randn(512, 32, generator=data).to(device)
        loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(dim=1))
        loss.backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
        if step % 100 == 0 and rank == 0:
            print(f"step {step} loss {loss.item():.4f}")
    if ddp:
        dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
