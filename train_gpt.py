"""GPT-2 124M speedrun with a slot for matrix optimizers (Muon, Aurora, ...).

    torchrun --standalone --nproc_per_node=8 train_gpt.py         # 8 GPUs, FineWeb to 3.28
    python train_gpt.py --optimizer aurora --seed 3 --trials 2    # 1 GPU, seeds 3 and 4
    python train_gpt.py --preset prose --data DIR                 # 1,200 steps on a prose corpus
    python data/embedded.py && python train_gpt.py --preset demo  # no GPU, no download, minutes
    python train_gpt.py --set fc.lr=0.03 --set aurora.balance=fc  # hyperparameters of groups

Model, data order and validation are those of modded-nanogpt's optimizer track and stay fixed; the
optimizer is free. A log begins with the whole source of its run: what stands above the first line
of 100 '=' is a script that, run with the same arguments, gives the same losses.
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path

STARTED = time.perf_counter()  # before torch is imported: the start-up time counts all of it

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import MicrobatchGraphs, capped_loss, compiled_ahead, fused_trunk, runs_blocks
from optimizers import OPTIMIZERS, Diagnostics, activity

####################################################################################################
#                                              Config                                              #
####################################################################################################


@dataclass(frozen=True)
class Config:
    preset: str = "track3"  # track3 (FineWeb), prose or demo: the defaults of everything else
    optimizer: str = "muon"  # of the matrices: a name in optimizers.OPTIMIZERS
    seed: int = 1  # of the initial weights; the data order never changes
    trials: int = 1  # runs with seeds seed, seed + 1, ...; one log each, compiled once
    steps: int = 3250  # optimizer steps; the learning rate reaches zero there
    target: float = 3.28  # validation loss to reach; 0: the "target" in the data's manifest.json
    data: str = "data/fineweb10B"  # folder with *_train_*.bin and *_val_*.bin
    log: str = ""  # log file, default logs/<uuid>.txt; under torchrun write --log-file
    rows: int = 0  # rows of a microbatch; 0: what fits the memory
    batch_tokens: int = 524_288  # tokens of one step, over all ranks
    val_tokens: int = 10_485_760  # tokens of a validation, from the start of the shard
    val_every: int = 125  # steps between validations; in the last tenth a fifth of it
    lr_scale: float = 1.0  # multiplies all learning rates
    set: tuple = ()  # group.name=value, repeatable: changes one hyperparameter
    device: str = ""  # cuda, mps or cpu; default: the first that works
    compile: bool = True  # --no-compile: eager, as CPU and MPS always are
    fp8: bool = False  # 8-bit floats into the head and, on Hopper, the MLPs: other losses
    wandb: bool = False  # log to Weights & Biases as well
    diagnostics: bool = False  # at validations, log what the last update did to MLP neurons
    checkpoint: str = ""  # file to write at validations; where it exists, the run goes on from it
    eval: str = ""  # print the validation loss of this checkpoint, train nothing
    vocab_size: int = 50304
    layers: int = 12
    width: int = 768
    head_dim: int = 128
    row_tokens: int = 1024  # context length
    cooldown: float = 0.7  # share of the steps in which the learning rate falls to zero
    dtype: str = "bfloat16"  # of activations, embedding and polar factors
    wrap: bool = False  # start again when the shards are used up
    sample_tokens: int = 0  # of text, generated after the run
    get_data: str = "python data/cached_fineweb10B.py 18"  # what makes the data folder


FLAGS = fields(Config)[:21]  # up to eval; what follows belongs to the benchmark
PRESETS = {
    "track3": {},
    "prose": dict(
        data="data/prose",
        steps=1200,
        target=3.42,
        batch_tokens=131_072,
        val_tokens=2_097_152,
        wrap=True,
        get_data="python data/tokenize_text.py YOUR_TEXTS --out data/prose",
    ),
    "demo": dict(
        data="data/embedded",
        steps=260,
        target=0.0,
        batch_tokens=4096,
        val_tokens=131_072,
        val_every=130,
        vocab_size=257,
        layers=4,
        width=128,
        head_dim=64,
        row_tokens=256,
        wrap=True,
        dtype="float32",
        sample_tokens=400,
        get_data="python data/embedded.py",
    ),
}


def parse_config(argv: list[str]) -> Config:
    def fail(message: str) -> None:
        raise ValueError(f"{message}; see python train_gpt.py --help")

    comments = dict(re.findall(r"    (\w+): .*?  # (.*)", inspect.getsource(Config)))
    parser = argparse.ArgumentParser(description="GPT-2 124M speedrun", allow_abbrev=False)
    parser.error = fail  # main prints one sentence, on one rank
    kinds = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(action="append")}
    choices = dict(preset=PRESETS, optimizer=OPTIMIZERS)
    for f in FLAGS:
        flags = ["--" + f.name.replace("_", "-")] + ["--log-file"] * (f.name == "log")
        how = kinds.get(f.type, dict(type=f.type, choices=choices.get(f.name)))
        parser.add_argument(*flags, help=comments[f.name], default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(argv))
    return Config(**PRESETS[given.get("preset", Config.preset)] | given)


def check_config(config: Config, world_size: int) -> None:
    given = asdict(config)
    for name in ("steps", "trials", "val_every", "batch_tokens", "val_tokens", "rows"):
        if given[name] < (least := int(name != "rows")):
            raise ValueError(f"{name} is {given[name]}, expected {least} or more")
    limit = 2**63 - config.trials  # of torch
    if not 0 <= config.seed < limit:
        raise ValueError(f"seed is {config.seed}, expected 0 or more and less than {limit}")
    for name, rows in (("batch_tokens", max(config.rows, 1)), ("val_tokens", 1)):
        if given[name] % (unit := world_size * rows * config.row_tokens):
            raise ValueError(
                f"{name} {given[name]} is not divisible by {unit} = {world_size} ranks x "
                f"{rows} rows x {config.row_tokens} tokens: change one of them"
            )
    for seed in range(config.seed, config.seed + config.trials):
        path = log_path(config, seed)
        if path.exists() or any(parent.is_file() for parent in path.parents):
            raise ValueError(f"{path} exists already or lies below a file: choose another --log")
        if config.checkpoint and of_trial(config.checkpoint, config, seed).is_dir():
            raise ValueError(f"{config.checkpoint} is no file: choose another --checkpoint")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs a package that is not installed: run pip install wandb")


####################################################################################################
#                                               Data                                               #
####################################################################################################


Shards = dict[str, Tensor]  # file name: its tokens


def open_shard(path: Path, vocab_size: int) -> Tensor:
    """The tokens of a shard, memory-mapped: 256 int32 of header, then uint16 tokens."""
    size, header = path.stat().st_size, torch.zeros(256, dtype=torch.int32)
    if size >= 1024:
        header = torch.from_file(str(path), shared=False, size=256, dtype=torch.int32)
    magic, version, count = header[:3].tolist()
    if (magic, version, size) != (20240520, 1, 1024 + 2 * count):
        raise ValueError(
            f"{path} is damaged or no token shard: magic, version, bytes are {magic}, {version}, "
            f"{size}, expected 20240520, 1, {1024 + 2 * count}: delete it and make it again"
        )
    tokens = torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.uint16)[512:]
    parts = tokens.split(1 << 20) if count else ()
    largest = max((int(part.to(torch.int32).max()) for part in parts), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{path} holds token id {largest}, the vocabulary has {vocab_size}: it was made with "
            "another tokenizer, tokenize its text again"
        )
    return tokens


def batches_in(tokens: int, batch_tokens: int) -> int:
    """Steps that a shard lasts: it is left when at most batch + 1 tokens remain."""
    return max(0, (tokens - 2) // batch_tokens)


def check_data(config: Config) -> tuple[Shards, Tensor]:
    """The training shards that the run will read, and the tokens of its validations."""
    folder, remedy = Path(config.data), f"run {config.get_data}, or name a folder with --data"
    train, val = (sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    if not train or not val:
        found = f"{len(train)} training, {len(val)} validation" if folder.is_dir() else "no folder"
        raise FileNotFoundError(f"shards of both kinds expected in {folder}, {found}: {remedy}")
    needed = config.val_tokens + 1
    val_tokens = open_shard(val[0], config.vocab_size)[:needed]
    if (found := len(val_tokens)) < needed:
        raise ValueError(f"{val[0]} holds {found} of {needed} tokens to validate: {remedy}")
    steps, shards = 0, {}
    for path in train:
        if steps < config.steps:
            tokens = shards[path.name] = open_shard(path, config.vocab_size)
            steps += batches_in(len(tokens), config.batch_tokens)
    if steps == 0 or (steps < config.steps and not config.wrap):
        raise ValueError(
            f"too few tokens: {folder} lasts {steps} of {config.steps} steps of "
            f"{config.batch_tokens} tokens: {remedy}, or lower --steps"
        )
    return shards, val_tokens


def target_of(config: Config) -> float:
    """What was asked for or, if that is 0, what the data's manifest.json says."""
    manifest = Path(config.data, "manifest.json")
    if config.target or not manifest.is_file():
        return config.target
    try:
        return float(json.loads(manifest.read_text()).get("target", 0))
    except (ValueError, TypeError, AttributeError):
        sentence = f'{manifest} is no JSON object with a number as "target"'
        raise ValueError(f"{sentence}: run {config.get_data}, or set --target") from None


def train_batches(shards: Shards, config: Config, rank: int, size: int) -> Iterator[Tensor]:
    """For each step the rank's L tokens and the one after: the same tokens in all for any size."""
    local = config.batch_tokens // size
    while True:
        for tokens in shards.values():
            for i in range(batches_in(len(tokens), config.batch_tokens)):
                start = i * config.batch_tokens + rank * local
                yield tokens[start : start + local + 1]


####################################################################################################
#                                               Model                                              #
####################################################################################################


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.gain.type_as(x))


def rotary_table(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (row_tokens, 1, head_dim / 2), fp32; half of the pairs does not rotate."""
    quarter = config.head_dim // 4
    frequencies = (1 / 1024) ** torch.linspace(0, 1, quarter, device=device)
    frequencies = torch.cat([frequencies, torch.zeros(quarter, device=device)])
    angles = torch.outer(torch.arange(config.row_tokens, device=device), frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Per-head RMS norm, then the rotary embedding, computed in fp32."""
    x1, x2 = F.rms_norm(x_BTHD, (x_BTHD.size(-1),)).float().chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x_BTHD)


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (Linear(width, width) for _ in range(4))

    def attend(self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        qkv_BHTD = (t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD))
        y_BHTD = F.scaled_dot_product_attention(*qkv_BHTD, is_causal=True, scale=0.12)
        return y_BHTD.transpose(1, 2).flatten(2)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        layers, heads = (self.q, self.k, self.v), (-1, self.head_dim)
        q_BTHD, k_BTHD, v_BTHD = (layer(x_BTC).unflatten(-1, heads) for layer in layers)
        q_BTHD, k_BTHD = rotate(q_BTHD, cos, sin), rotate(k_BTHD, cos, sin)
        return self.proj(self.attend(q_BTHD, k_BTHD, v_BTHD))


class MLP(nn.Module):
    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.fc, self.proj = Linear(width, expansion * width), Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x).relu().square())


class Block(nn.Module):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = RMSNorm(width), Attention(width, head_dim)
        self.norm2, self.mlp = RMSNorm(width), MLP(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        dtype = getattr(torch, config.dtype)
        self.embed = nn.Embedding(config.vocab_size, config.width, dtype=dtype)
        self.norm1, self.norm2 = RMSNorm(config.width), RMSNorm(config.width)
        blocks = (Block(config.width, config.head_dim) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)
        self.head = Linear(config.width, config.vocab_size)

    def trunk(self, tokens_BT: Tensor, plain: bool = False) -> Tensor:
        """What the head takes; plain: by the modules above, which is the same but for rounding."""
        cos, sin = (table[: tokens_BT.size(1)] for table in self.rotary)
        norms = self.norm1, self.blocks, self.norm2
        if self.fused and not plain:
            return fused_trunk(tokens_BT, self.embed.weight, *norms, cos, sin, self.fp8)
        x = self.norm1(self.embed(tokens_BT))
        for block in self.blocks:
            x = block.forward(x, cos, sin) if plain else block(x, cos, sin)
        return self.norm2(x)

    def logits(self, x: Tensor) -> Tensor:
        z = self.head(x).float()
        return 15 * z * torch.rsqrt(z.square() + 15**2)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over all tokens, so that microbatches and ranks add."""
        x, head = self.trunk(inputs_BT).flatten(0, 1), self.head
        return capped_loss(x, head.weight, head.bias, targets_BT.flatten(), self.fp8)


def build_model(config: Config, device: torch.device) -> GPT:
    """Weights are not initialised. Compiled by block: twelve blocks share one compilation."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.rotary = rotary_table(config, device)
    model.fused = config.compile and runs_blocks(model.embed.weight, config.head_dim)
    model.fp8 = config.fp8
    if config.compile and device.type == "cuda" and not model.fused:
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
    return model


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """Drawn on the CPU: the same seed gives the same weights on every device and world size."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "head.weight", "bias")):
            p.zero_()
        elif name.endswith("gain"):
            p.fill_(1)
        elif name.endswith(("embed.weight", "q.weight", "k.weight", "v.weight", "fc.weight")):
            std = 1 if name == "embed.weight" else (0.33 / p.size(1)) ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            raise AssertionError(f"no initialisation for {name}")


@torch.no_grad()
def generate(model: GPT, ids: list, count: int, seed: int, temperature=0.7, top_k=0) -> list:
    """`ids` and `count` more, drawn below ids[0], the end of text; inputs of one shape."""
    draws, ids, width = torch.Generator().manual_seed(seed), list(ids), len(model.rotary[0])
    for _ in range(count):  # the padding is not seen: attention is causal
        row = torch.tensor([(ids[-width:] + width * [0])[:width]], device=model.head.weight.device)
        logits = model.logits(model.trunk(row)[:, min(len(ids), width) - 1])[0, : ids[0]].cpu()
        logits[logits < logits.topk(top_k or ids[0]).values[-1]] = -math.inf
        ids += torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws).tolist()
    return ids


####################################################################################################
#                                            Optimizers                                            #
####################################################################################################


def build_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW for embedding, head and 1-D parameters, the chosen optimizer for all other matrices."""
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    rooms = (("attn", ".attn.", None), ("fc", ".mlp.fc.", 0), ("proj", ".mlp.proj.", 1))
    matrices = [
        dict(name=name, neuron_axis=axis, params=[pair for pair in named if room in pair[0]])
        for name, room, axis in rooms
    ]
    others = [
        dict(name="embed", lr=0.7, params=[model.embed.weight]),
        dict(name="head", lr=0.004, params=[model.head.weight]),
        dict(name="scalars", lr=0.015, params=[p for p in model.parameters() if p.ndim < 2]),
    ]
    kind, how = OPTIMIZERS[config.optimizer], dict(compile=None if config.compile else False)
    if "dtype" in kind.defaults:
        how["dtype"] = getattr(torch, config.dtype)
    adamw = dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001, fused=True)  # of entry #36
    optimizers = [torch.optim.AdamW(others, **adamw), kind(matrices, **how)]
    owned = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)), "a parameter has two optimizers"
    assert set(owned) == set(model.parameters()), "a parameter has no optimizer"
    change_hyperparameters(optimizers, config)
    optimizers[1].deal()  # what a matrix costs may have changed
    return optimizers


def change_hyperparameters(optimizers: list[torch.optim.Optimizer], config: Config) -> None:
    """Applies --set, by group or by optimizer (all groups of it), and --lr-scale."""
    adamw, matrix = (opt.param_groups for opt in optimizers)
    named = {group["name"]: [group] for group in adamw + matrix} | {"adamw": adamw}
    named[config.optimizer] = named.get(config.optimizer, []) + matrix
    fixed = {"params", "param_names", "name"}
    keys = {name: sorted(set().union(*some) - fixed) for name, some in named.items()}
    for setting in config.set:
        where, _, text = setting.partition("=")
        name, _, key = where.partition(".")
        if key not in keys.get(name, []):
            known = f"names of {name}: {keys[name]}" if name in keys else f"groups: {list(keys)}"
            raise ValueError(f"--set {setting}: expected group.name=value; {known}")
        for group in (group for group in named[name] if key in group):
            old = group[key]
            try:
                value = text if isinstance(old, str) else ast.literal_eval(text)
                value = float(value) if isinstance(old, float) else value
            except (ValueError, SyntaxError, TypeError):
                value = setting  # of no type that is expected
            if type(value) is not type(old) and old is not None and key != "neuron_axis":
                raise ValueError(f"--set {setting}: expected a value like {old!r}")
            group[key] = value
    for group in adamw + matrix:
        group["initial_lr"] = group["lr"] = group["lr"] * config.lr_scale
    for group in adamw:  # refuses foolish values, as the matrix optimizer does when it deals
        chosen = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        torch.optim.AdamW([torch.zeros(1)], **chosen)


def read_back(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    """The hyperparameters that the optimizers use, from their groups and not from the plan."""
    groups = [(type(opt).__name__.lower(), g) for opt in optimizers for g in opt.param_groups]
    return [{"optimizer": name} | {k: g[k] for k in g if "param" not in k} for name, g in groups]


####################################################################################################
#                                                Log                                               #
####################################################################################################

RULE, MARKER = "=" * 100, "# ==================== "


def flatten(script: Path) -> str:
    """The script behind the modules beside it that it imports: one text that runs alone.

    Their imports stay, behind '#| ', so that the tree can be restored. What is flattened already
    comes back unchanged. No top-level name may be defined in two modules.
    """
    if (text := script.read_text()).startswith(MARKER):
        return text
    sections, owner = {}, {}

    def add(path: Path) -> None:
        lines = path.read_text().splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.ImportFrom):
                package = path.parent if node.level else script.parent / node.module
                module = package / (f"{node.module}.py" if node.level else "__init__.py")
                if module.is_file():
                    if module not in sections:
                        add(module)
                    for i in range(node.lineno - 1, node.end_lineno):
                        lines[i] = "#| " + lines[i]
            targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
            assigned = [n for target in filter(None, targets) for n in ast.walk(target)]
            names = [getattr(node, "name", None)] + [getattr(n, "id", None) for n in assigned]
            for name in filter(None, names):
                assert owner.setdefault(name, path) == path, f"{name}: {owner[name]} and {path}"
        title = f"{MARKER}{path.relative_to(script.parent)} ===================="
        sections[path] = "\n".join([title, *lines, ""])

    add(script)
    return "".join(sections.values())


def output_of(*command: str) -> str:
    """What a command prints, run beside this file; nothing where it is missing or fails."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def of_trial(name: str, config: Config, seed: int) -> Path:
    """The file of one trial: of several, each has its seed in the name."""
    path = Path(name)
    return path.with_suffix(f".seed{seed}{path.suffix}") if config.trials > 1 else path


def log_path(config: Config, seed: int) -> Path:
    return of_trial(config.log, config, seed) if config.log else Path(f"logs/{uuid.uuid4()}.txt")


class Log:
    """One trial's file, console and, if asked, Weights & Biases page. Rank 0 alone writes."""

    def __init__(self, source: str, config: Config, seed: int, world: "World", **meta) -> None:
        self.path, self.file, self.wandb = log_path(config, seed), None, None
        if world.rank > 0:
            return
        commit = output_of("git", "rev-parse", "HEAD", f"HEAD:./{Path(__file__).name}").split()
        changes = output_of("git", "status", "--porcelain", "-uno")
        meta |= dict(
            format=1,
            preset=config.preset,
            optimizer=config.optimizer,
            seed=seed,
            config=asdict(config),
            code_sha256=hashlib.sha256(source.encode()).hexdigest(),
            commit=commit[0] if commit else "unknown",
            dirty=bool(changes) if commit else None,
            device=world.device_name,
            world_size=world.size,
            torch=torch.__version__,
        )
        versions = f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}), Python {sys.version}"
        running = f"Running {versions} on {world.device_name} with world_size {world.size}"
        header = [RULE, running, output_of("nvidia-smi"), f"meta: {json.dumps(meta)}", RULE]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("x", buffering=1)
        self.file.write(source + "\n".join(filter(None, header)) + "\n")
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project="aurora-speedrun", name=self.path.stem, config=meta)

    def say(self, text: str, file: bool = True, console: bool = True) -> None:
        if self.file:
            if console:
                print(text, flush=True)
            self.file.write(text + "\n" if file else "")

    def record(self, key: str, console: bool = True, **values) -> None:
        self.say(f"{key}: {json.dumps(values, default=str)}", console=console)
        if self.wandb:
            self.wandb.summary[key] = json.dumps(values, default=str)

    def step(self, step: int, steps: int, seconds: float, val_loss: float | None = None) -> None:
        """A validated step; or any other: console only, with the minutes and seconds left."""
        average = seconds / step if step else math.nan
        times = f"train_time:{seconds:.3f}s step_avg:{1000 * average:.2f}ms"
        if val_loss is None:
            left = round(average * (steps - step))
            self.say(f"step:{step}/{steps} {times} left:{left // 60}:{left % 60:02}", file=False)
            return
        self.say(f"step:{step}/{steps} val_loss:{val_loss:.5f} {times}")
        if self.wandb:
            self.wandb.log({"val_loss": val_loss, "train_time": seconds}, step=step)

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


####################################################################################################
#                                                Run                                               #
####################################################################################################


class World:
    """Several ranks are a group (NCCL between GPUs, gloo between CPUs), one is just a process."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        cuda = device if device.type == "cuda" else None
        if cuda:
            torch.cuda.set_device(cuda)
        self.device_name = torch.cuda.get_device_name() if cuda else device.type
        if size > 1:
            importlib.import_module("torch._dynamo")  # later, it keeps the group: gloo then aborts
            dist.init_process_group("nccl" if cuda else "gloo", device_id=cuda)

    def synchronize(self) -> None:
        if dist.is_initialized():
            dist.barrier()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def all_reduce(self, tensor: Tensor, op: str = "SUM") -> Tensor:
        if dist.is_initialized():
            tensor = tensor.to(self.device)  # NCCL takes none on the CPU
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
        return tensor


def choose_device(wanted: str) -> torch.device:
    """The first of cuda, mps and cpu (or just the wanted one) on which one real product works."""
    local, ranks = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    if not wanted and torch.cuda.is_available():
        wanted = "cuda"  # a GPU that fails is an error, not a reason to use the CPU
    if wanted == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"{ranks} processes for {torch.cuda.device_count()} GPUs here")
    for kind in [wanted] if wanted else ["mps", "cpu"]:
        try:
            device = torch.device(kind, local if kind == "cuda" else None)
            (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum().item()
            return device
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without it
            reason = str(error).split("\n")[0]
    raise ValueError(f"device {wanted!r} does not work here, {reason}: choose another --device")


def crossing(points: list[tuple[int, float, float]], target: float) -> dict | None:
    """If the last (step, loss, seconds) is the first at the target: it, and the point between."""
    (step0, loss0, time0), (step, loss, seconds) = points[max(len(points) - 2, 0)], points[-1]
    if not loss <= target or any(earlier <= target for _, earlier, _ in points[:-1]):
        return None
    part = (loss0 - target) / (loss0 - loss) if loss0 > loss else 1.0
    return dict(
        loss=target,
        step=step,
        train_time=round(seconds, 3),
        crossing_step=round(step0 + part * (step - step0), 1),
        crossing_time=round(time0 + part * (seconds - time0), 3),
    )


MODEL = ("vocab_size", "layers", "width", "head_dim", "row_tokens", "dtype")  # fields of Config
RUN = (
    *MODEL,
    "fp8",
    "optimizer",
    "steps",
    "batch_tokens",
    "val_tokens",
    "lr_scale",
    "set",
    "cooldown",
)


def read_checkpoint(path: Path, config: Config, same: tuple[str, ...], **given: object) -> dict:
    """What Trainer.save wrote, if these fields of the config, and what is given, are the same."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: write one with --checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        then, now = asdict(Config()) | saved["config"], asdict(config)  # older ones lack some
    except (RuntimeError, ValueError, LookupError, OSError, EOFError, pickle.UnpicklingError):
        raise ValueError(f"{path} is no whole checkpoint of this trainer: name another") from None
    pairs = [(name, then[name], now[name]) for name in same]
    for name, found, expected in pairs + [(key, saved.get(key), given[key]) for key in given]:
        if found != expected:
            raise ValueError(f"{path} was made with {name} {found}, now it is {expected}")
    return saved


class Trainer:
    """Model, optimizers and validation tokens, compiled once for all trials."""

    def __init__(self, config: Config, world: World, shards: Shards, val_tokens: Tensor) -> None:
        self.config, self.world, self.shards = config, world, shards
        self.model = build_model(config, world.device)
        self.optimizers = self.adamw, self.matrix = build_optimizers(self.model, config)
        local = config.val_tokens // world.size  # each rank validates a contiguous slice
        mine = val_tokens[world.rank * local : (world.rank + 1) * local + 1]
        self.val = mine.to(torch.int32).to(world.device)
        count = len(list(self.model.parameters()))  # steps with a gradient that is not finite:
        self.bad_grads = torch.zeros(count, device=world.device)  # read at validations only
        self.graphs: MicrobatchGraphs | None = None  # warm_up records them where they are worth it
        self.last_backward, self.head_sums = False, []  # works of all_reduces that have begun
        if dist.is_initialized():
            self.model.head.weight.register_post_accumulate_grad_hook(self.sum_head)

    def microbatches(self, tokens: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of L + 1 tokens: inputs [0, L) and targets [1, L + 1), as (rows, row_tokens) int64."""
        width = self.config.row_tokens
        inputs, targets = (part.long().view(-1, width) for part in (tokens[:-1], tokens[1:]))
        rows = math.gcd(rows, len(inputs))  # equally many in all: one shape, one compilation
        yield from zip(inputs.split(rows), targets.split(rows), strict=True)

    def sum_head(self, p: Tensor) -> None:
        """Its gradient is complete first: the sum over ranks has the whole backward pass to end."""
        if self.last_backward:
            self.head_sums.append(dist.all_reduce(p.grad, async_op=True))

    def forward_backward(self, tokens: Tensor, rows: int, whole_step: bool = False) -> Tensor:
        """Adds the gradient of the summed loss of the rank's tokens; returns that loss."""
        total, batches = torch.zeros((), device=tokens.device), [*self.microbatches(tokens, rows)]
        if whole_step and self.graphs:  # no hook runs in a replay: step() launches all reductions
            return self.graphs.gradients(batches)
        for batch in batches:
            loss = self.model(*batch)
            self.last_backward = whole_step and batch is batches[-1]
            if self.last_backward:
                self.matrix.before_last_backward()
            loss.backward()
            total += loss.detach()
        return total

    def optimizer_step(self, step: int) -> None:
        """Steps count from 0. The learning rate is constant, then falls linearly to zero."""
        factor = min(1.0, (1 - step / self.config.steps) / self.config.cooldown)
        for group in (group for opt in self.optimizers for group in opt.param_groups):
            group["lr"] = group["initial_lr"] * factor
        for work in self.head_sums:
            work.wait()
        norms = torch._foreach_norm([p.grad.float() for p in self.model.parameters()], math.inf)
        self.bad_grads += torch.stack(norms).isfinite().logical_not()  # of one dtype: in one pass
        works, grads = [], [p.grad for group in self.adamw.param_groups for p in group["params"]]
        if dist.is_initialized():
            small = [g for g in grads if g.ndim < 2]  # these travel together
            summed = self.model.head.weight.grad if self.head_sums else None
            buffers = [torch.cat(small), *(g for g in grads if g.ndim == 2 and g is not summed)]
            works = [dist.all_reduce(buffer, async_op=True) for buffer in buffers]
        self.matrix.step()  # sums the gradients of its own parameters
        for work in works:
            work.wait()
        if works:
            torch._foreach_copy_(small, list(buffers[0].split([len(g) for g in small])))
        self.adamw.step()
        self.model.zero_grad()
        self.head_sums.clear()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation tokens of all ranks."""
        losses = [self.model(*batch) for batch in self.microbatches(self.val, self.rows)]
        total = torch.stack(losses).cpu().double().sum()  # MPS has no float64
        return self.world.all_reduce(total).item() / self.config.val_tokens

    def warm_up(self) -> None:
        """Compiles and runs everything, on what is thrown away, and settles a microbatch's rows."""
        with compiled_ahead(self.world.device, self.rows_that_fit):
            for p in self.model.parameters():
                p.grad = p.data.zero_().clone()  # what was never written may be nan
            self.optimizer_step(0)  # first, so that its state is in memory when rows are tried
        self.matrix.before_forward()
        self.rows = self.rows_that_fit()
        for name, p in self.model.named_parameters():
            if p.grad is None:
                raise ValueError(f"the parameter {name} has no gradient: the loss must use it")
        self.model.zero_grad()
        if not self.fits(self.prepare):
            self.graphs = None
            self.prepare(graphs=False)

    def fits(self, work: Callable[..., object], *args: object) -> bool:
        """Whether the memory of every rank is enough for this; if not, no gradients are left."""
        enough = torch.ones((), device=self.world.device)
        try:
            work(*args)
        except torch.OutOfMemoryError:
            enough.fill_(0)
        if not (fits := bool(self.world.all_reduce(enough, "MIN").item())):
            self.model.zero_grad()
            torch.cuda.empty_cache()
        return fits

    def prepare(self, graphs: bool = True) -> None:
        """CUDA graphs of small microbatches, and a first validation beside what these keep."""
        shape = self.rows, self.config.row_tokens
        if graphs and self.config.compile and MicrobatchGraphs.worth(shape, self.world.device):
            torch.cuda.reset_peak_memory_stats()  # what graphs keep counts as allocated only now
            self.graphs = MicrobatchGraphs(self.model, shape)
            self.graphs.record()
        with self.matrix.readout(), torch.no_grad():
            self.model(*next(self.microbatches(self.val, self.rows)))

    def rows_that_fit(self) -> int:
        """The most rows, of divisors of a rank's, whose gradient fits; each try compiles blocks."""
        config = self.config
        per_rank = config.batch_tokens // self.world.size // config.row_tokens
        most = 256 if self.model.fused else 64 if self.world.device.type == "cuda" else 8
        divisors = [rows for rows in range(most, 0, -1) if per_rank % rows == 0]
        for rows in [config.rows] if config.rows else divisors:
            tokens = self.val[:1].expand(2 * rows * config.row_tokens + 1)
            if self.fits(self.forward_backward, tokens, rows):
                return rows
        raise ValueError(f"{config.rows or 1} rows do not fit the memory: use fewer, or more GPUs")

    def reset(self, seed: int) -> None:
        """As newly built: weights of this seed, optimizers without state."""
        initialise(self.model, seed)
        self.adamw.state.clear()
        self.matrix.reset()
        self.bad_grads.zero_()
        if self.world.device.type == "cuda" and not self.graphs:  # see prepare
            torch.cuda.reset_peak_memory_stats()

    def step(self, step: int, tokens: Tensor) -> Tensor:
        """One whole step on the rank's tokens; returns its loss, summed, before the step."""
        tokens, device = tokens.to(torch.int32), self.world.device
        tokens = tokens.pin_memory() if device.type == "cuda" else tokens  # so that no copy waits
        self.matrix.before_forward()
        loss = self.forward_backward(tokens.to(device, non_blocking=True), self.rows, True)
        self.optimizer_step(step)
        return loss

    def validates(self, step: int) -> bool:
        steps, every = self.config.steps, self.config.val_every
        every = every if 10 * step < 9 * steps else max(every // 5, 1)
        return step == steps or step % every == 0

    def report_bad_gradients(self, log: Log, step: int) -> None:
        """Names the parameters whose gradients were not finite since the last validation."""
        counts = self.world.all_reduce(self.bad_grads.clone(), "MAX").tolist()
        names = (name for name, _ in self.model.named_parameters())
        bad = [(int(count), name) for name, count in zip(names, counts, strict=True) if count]
        if bad:  # the first to fail has the most steps
            gradients = {name: count for count, name in sorted(bad, reverse=True)}
            log.record("nonfinite", step=step, gradients=gradients)
            self.bad_grads.zero_()

    def diagnose(self, diagnostics: Diagnostics, log: Log, step: int) -> None:
        started = time.perf_counter()
        layers = {f"blocks.{i}.mlp.fc": b.mlp.fc for i, b in enumerate(self.model.blocks)}
        tokens = self.val[: min(len(self.val) - 1, 2**16) + 1]
        batches = (inputs for inputs, _ in self.microbatches(tokens, self.rows))
        neurons = activity(layers, lambda batch: self.model.trunk(batch, plain=True), batches)
        values = dict(matrices=diagnostics.measure(step), neurons=neurons)
        seconds = round(time.perf_counter() - started, 3)
        log.record("diag", console=False, step=step, seconds=seconds, **values)

    def save(self, path: Path, **facts: object) -> None:
        """What a run of any number of ranks needs to go on; the file appears only when whole."""
        weights = {name: p.clone() for name, p in self.model.state_dict().items()}  # of views
        saved = dict(config=asdict(self.config), model=weights, **facts)
        saved |= dict(adamw=self.adamw.state_dict(), matrix=self.matrix.state_dict())
        if self.world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, part := path.with_name(path.name + ".part"))
            part.replace(path)

    def restore(self, saved: dict) -> None:
        for name in ("model", "adamw", "matrix"):
            getattr(self, name).load_state_dict(saved[name])

    def train(self, log: Log, seed: int, saved: dict | None = None) -> str:
        """From reset or saved weights to the last step; "complete" or what stopped it."""
        config, world, never = self.config, self.world, self.config.steps + 1
        diagnostics = Diagnostics(self.matrix) if config.diagnostics else None
        first = saved["step"] if saved else 0
        batches = islice(train_batches(self.shards, config, world.rank, world.size), first, None)
        bad_step = torch.full((), never, device=world.device)  # the first with a non-finite loss
        self.points = points = saved["points"] if saved else []  # (step, loss, seconds) of each
        seconds = points[-1][2] if saved else 0.0  # shown by the clock at its last stop
        since = time.perf_counter()  # since when it runs
        for step in range(first, config.steps + 1):
            if self.validates(step) and not (saved and step == first):
                world.synchronize()
                seconds += time.perf_counter() - since if step else 0.0
                with self.matrix.readout():
                    val_loss = self.validate()
                log.step(step, config.steps, seconds, val_loss)
                self.report_bad_gradients(log, step)
                first_bad = int(world.all_reduce(bad_step.clone(), "MIN"))
                points.append((step, val_loss, seconds))
                if first_bad < never or not math.isfinite(val_loss):
                    return f"non-finite loss at step {min(first_bad, step)}"
                if reached := crossing(points, config.target):
                    log.record("target", **reached)
                if diagnostics and step:
                    self.diagnose(diagnostics, log, step)
                if config.checkpoint:
                    shards = {name: len(tokens) for name, tokens in self.shards.items()}
                    facts = dict(seed=seed, step=step, points=points, shards=shards)
                    self.save(of_trial(config.checkpoint, config, seed), **facts)
                world.synchronize()
                since = time.perf_counter()
            if step < config.steps:
                if diagnostics and self.validates(step + 1):
                    diagnostics.before_step()
                loss = self.step(step, next(batches))
                bad_step = bad_step.minimum(torch.where(loss.isfinite(), never, step + 1))
                if step == first:
                    log.record("optim", step=step + 1, groups=read_back(self.optimizers))
                log.step(step + 1, config.steps, seconds + time.perf_counter() - since)
        return "complete"

    def ranks_agree(self) -> bool:
        """Whether all ranks hold the same parameters, bit for bit: the sum over each one's bits."""
        bits = {4: torch.int32, 2: torch.int16}
        params = (p.detach() for p in self.model.parameters())
        sums = torch.stack([p.view(bits[p.element_size()]).sum() for p in params])
        return torch.equal(*(self.world.all_reduce(sums.clone(), op) for op in ("MIN", "MAX")))

    def sample(self, prompt: bytes) -> str:
        """Text from a byte model, drawn at temperature 0.7."""
        ids = generate(self.model, [256, *prompt], self.config.sample_tokens, self.config.seed)
        return bytes(ids[1:]).decode("utf-8", errors="replace")


def run_trials(trainer: Trainer, saved: dict, source: str, start_s: float, argv: list[str]) -> str:
    """All seeds, those with something saved from there; returns the status of the last."""
    config, world = trainer.config, trainer.world
    for seed in range(config.seed, config.seed + config.trials):
        trainer.reset(seed)
        log = Log(source, config, seed, world, argv=argv, shards=list(trainer.shards))
        if seed in saved:
            trainer.restore(saved[seed])
            log.record("resumed", step=saved[seed]["step"], checkpoint=config.checkpoint)
        status, agree = trainer.train(log, seed, saved.get(seed)), trainer.ranks_agree()
        status = status if agree else "ranks hold different parameters"
        peak = torch.cuda.max_memory_allocated()  # 0 where there is no CUDA
        facts = dict(rows=trainer.rows, peak_gib=round(peak / 2**30, 3), start_s=start_s)
        log.record("end", status=status, ranks_agree=agree, graphs=bool(trainer.graphs), **facts)
        if config.sample_tokens and status == "complete":
            log.say(f"\nA sample of the model's text:\n{trainer.sample(b'def ')}\n", file=False)
        step, loss, seconds = trainer.points[-1]
        verdict = "reached" if loss <= config.target else "missed"
        log.say(
            f"{config.optimizer}, seed {seed}: {status}, {step} steps in {seconds:.1f} s; loss "
            f"{loss:.5f}, target {config.target:.5f} {verdict}; the log is {log.path}",
            file=False,
        )
        log.close()
        if status != "complete":
            break
    return status


def main(argv: list[str]) -> int:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    source = flatten(Path(__file__).resolve())  # now: the file may change while it runs
    try:
        config = parse_config(argv)
        check_config(config, size)
        shards, val_tokens = check_data(config)
        config = replace(config, target=target_of(config))
        world = World(rank, size, choose_device(config.device))
        seeds = range(config.seed, config.seed + config.trials)
        paths = {s: of_trial(config.checkpoint, config, s) for s in seeds if config.checkpoint}
        tokens = {name: len(shard) for name, shard in shards.items()}
        saved = {
            seed: read_checkpoint(path, config, RUN, seed=seed, shards=tokens)
            for seed, path in paths.items()
            if path.is_file()
        }
        weights = read_checkpoint(Path(config.eval), config, MODEL) if config.eval else None
        trainer = Trainer(config, world, shards, val_tokens)
        trainer.warm_up()
    except (ValueError, FileNotFoundError) as error:
        if rank > 0:
            time.sleep(10)  # rank 0 speaks, exits, and torchrun ends this one; or it is alone in it
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2
    start_s = round(time.perf_counter() - STARTED, 3)
    if weights:
        trainer.model.load_state_dict(weights["model"])
        status, loss = "complete", trainer.validate()
        if rank == 0:
            print(f"step:{weights['step']} val_loss:{loss:.5f} {config.eval}")
    else:
        status = run_trials(trainer, saved, source, start_s, argv)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if status == "complete" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
