"""GPT-2 124M speedrun with a slot for matrix optimizers (Muon, Aurora, ...).

    torchrun --standalone --nproc_per_node=8 train_gpt.py         # 8 GPUs, FineWeb to 3.28
    python train_gpt.py --optimizer aurora --seed 3 --trials 2    # 1 GPU, seeds 3 and 4
    python train_gpt.py --preset prose --data DIR                 # 1,200 steps on a prose corpus
    python data/embedded.py && python train_gpt.py --preset demo  # no GPU, no download, minutes
    python train_gpt.py --set fc.lr=0.03 --set schedule.warmup=100  # hyperparameters, schedules
    python train_gpt.py --preset demo --print-config > my.json      # then --config my.json

Model, data order and validation are those of modded-nanogpt's optimizer track and stay fixed; the
optimizer is free. A log begins with the whole source of its run: the text above its first line of
100 '=' is a script that, run with the same arguments, gives the same losses.
"""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve busy machines
STARTED = time.perf_counter()  # before torch is imported: the start-up time counts all of it

from records.missing import explain_missing

if __name__ == "__main__":
    explain_missing()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import manifest_target, open_shards, train_batches
from models.ahead import compiled_ahead
from models.generate import sample_bytes
from models.head import capped_loss, head_path
from models.initial import INITIAL
from models.microbatch import Microbatches
from models.rotary import rotary_table, rotate
from models.trunk import fused_trunk, trunk_obstacle
from models.world import World, choose_device
from optimizers import OPTIMIZERS, Diagnostics, ModelOptimizer, cooked, planned, recipe_settings
from records.checkpoint import read_checkpoint, read_trials, restore, write_checkpoint
from records.options import Settings, read_options, setting
from records.writer import Log, check_outputs, flatten, say_interrupted

####################################################################################################
#                                              Config                                              #
####################################################################################################


@dataclass(frozen=True)
class Config(Settings):  # records/options.py says what the scopes mean
    preset: str = setting("track3", "", "track3 (FineWeb), prose or demo: all other defaults")
    optimizer: str = setting("muon", "run", "of the matrices: a name in optimizers.OPTIMIZERS")
    recipe: str = setting("", "run", "published entry to repeat, like track_3#17; list: all")
    seed: int = setting(1, "free", "of the initial weights; the data order never changes", 0)
    trials: int = setting(1, "free", "runs with seeds seed, seed + 1, ...; compiled once")
    steps: int = setting(3250, "run", "optimizer steps; the learning rate reaches zero there")
    target: float = setting(3.28, "", "validation loss to reach; 0: that of the data's manifest")
    data: str = setting("data/fineweb10B", "free", "folder with *_train_*.bin and *_val_*.bin")
    log: str = setting("", "free", "log file, default in logs/; under torchrun --log-file")
    rows: int = setting(0, "", "rows of a microbatch; 0: as many as fit the memory")
    batch_tokens: int = setting(524_288, "run", "tokens of one step, over all ranks")
    val_tokens: int = setting(10_485_760, "run", "tokens of a validation, from the shard's start")
    val_every: int = setting(125, "", "steps between validations; a fifth of it in the last tenth")
    lr_scale: float = setting(1.0, "run", "multiplies all learning rates")
    set: tuple = setting((), "run", "group, schedule or model.name=value, repeatable")
    device: str = setting("", "free", "cuda, mps or cpu; default: the first that works")
    compile: bool = setting(True, "", "--no-compile: eager, as CPU and MPS always are")
    fp8: bool = setting(False, "run", "8-bit inputs of the head and, on Hopper, of the MLPs")
    wandb: bool = setting(False, "free", "log to Weights & Biases as well")
    tensorboard: str = setting("", "free", "folder: log to TensorBoard as well")
    log_every: int = setting(0, "free", "log losses, rates and norms every N steps as well")
    quiet: bool = setting(False, "free", "print the end's summary only")
    diagnostics: bool = setting(False, "free", "log at validations what updates do to neurons")
    checkpoint: str = setting("", "free", "file to write at validations, and to resume from")
    keep: str = setting("last", "free", "checkpoint to keep: last; best: FILE.best.* as well")
    eval: str = setting("", "free", "print this checkpoint's validation loss, train nothing")
    model: str = setting("gpt", "model")  # a name in MODELS
    init: str = setting("plain", "run")  # a name in INITIAL
    vocab_size: int = setting(50304, "model")
    layers: int = setting(12, "model")
    width: int = setting(768, "model")
    head_dim: int = setting(128, "model")
    expansion: int = setting(4, "model")  # MLP neurons over width
    row_tokens: int = setting(1024, "model")  # context length
    dtype: str = setting("bfloat16", "model")  # of activations, embedding and polar factors
    warmup: int = setting(0, "schedule")  # steps in which the learning rate rises
    cooldown: float = setting(0.7, "schedule")  # share of the steps in which it falls
    shape: str = setting("linear", "schedule")  # of the fall: linear or cosine,
    power: float = setting(1.0, "schedule")  # to this power,
    floor: float = setting(0.0, "schedule")  # to this share of the highest rate
    momentum_steps: int = setting(0, "schedule")  # in which the matrices' momentum rises
    momentum_start: float = setting(0.9, "schedule")  # from this share of it
    end: float = setting(1.0, "schedule")  # share of the steps at which it would reach zero
    clip: float = setting(0.0, "schedule")  # the most that the gradient's norm may be; 0: any
    average: float = setting(0.0, "schedule")  # steps that an average of the weights spans
    average_from: float = setting(0.0, "schedule")  # share of the steps before it begins
    wrap: bool = setting(False, "")  # start again when the shards are used up
    sample_tokens: int = setting(0, "")  # of text, generated after the run
    get_data: str = setting("python data/cached_fineweb10B.py 18", "free")  # fills the data folder


PROSE = dict(data="data/prose", steps=1200, batch_tokens=131_072, val_tokens=2_097_152, wrap=True)
PROSE |= dict(get_data="python data/tokenize_text.py YOUR_TEXTS --out data/prose", target=3.42)
DEMO = dict(data="data/embedded", steps=260, batch_tokens=4096, val_tokens=131_072, val_every=130)
DEMO |= dict(vocab_size=257, layers=4, width=128, head_dim=64, row_tokens=256, dtype="float32")
DEMO |= dict(get_data="python data/embedded.py", sample_tokens=400, target=0.0, wrap=True)
PRESETS = dict(track3={}, prose=PROSE, demo=DEMO)


def parse_config(argv: list[str]) -> Config:
    choices = dict(optimizer=OPTIMIZERS, keep=("last", "best"))
    saved = partial(read_checkpoint, same={}, defaults=asdict(Config()))
    fixed = "track3", "prose"
    return read_options(argv, Config, PRESETS, fixed, choices, recipe_settings(), saved)


def check_config(config: Config, world_size: int) -> None:
    given = asdict(config)
    if config.seed + config.trials >= 2**63:  # torch's limit
        raise ValueError(f"seed is {config.seed}, expected less than 2**63 - trials")
    for name, rows in (("batch_tokens", max(config.rows, 1)), ("val_tokens", 1)):
        unit = world_size * rows * config.row_tokens
        if given[name] % unit:
            raise ValueError(
                f"{name} {given[name]} is not divisible by {unit} = {world_size} ranks x "
                f"{rows} rows x {config.row_tokens} tokens: change one of them"
            )


####################################################################################################
#                                               Model                                              #
####################################################################################################


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.gain.type_as(x))


class Attention(nn.Module):
    def __init__(self, width, head_dim):
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
    def __init__(self, width, neurons):
        super().__init__()
        self.fc, self.proj = Linear(width, neurons), Linear(neurons, width)

    def forward(self, x):
        return self.proj(self.fc(x).relu().square())


class Block(nn.Module):
    def __init__(self, width, head_dim, expansion):
        super().__init__()
        self.norm1, self.attn = RMSNorm(width), Attention(width, head_dim)
        self.norm2, self.mlp = RMSNorm(width), MLP(width, expansion * width)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The track's fixed model. With bfloat16 on Hopper GPUs, models/trunk.py runs its blocks."""

    def __init__(self, vocab_size, layers, width, head_dim, expansion, row_tokens, dtype, device):
        super().__init__()
        with torch.device("meta"):  # `initialise` fills the weights
            self.embed = nn.Embedding(vocab_size, width, dtype=dtype)
            self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
            blocks = (Block(width, head_dim, expansion) for _ in range(layers))
            self.blocks = nn.ModuleList(blocks)
            self.head = Linear(width, vocab_size)
        self.to_empty(device=device)
        self.rotary = rotary_table(row_tokens, head_dim, device)

    def choose_kernels(self, compile: bool, fp8: bool) -> None:
        """Fuse the trunk where that works, else compile it on GPUs; `kernels` goes to the log."""
        table, head_dim = self.embed.weight, self.blocks[0].attn.head_dim
        obstacle = trunk_obstacle(table, head_dim) if compile else "--no-compile"
        self.fused, self.fp8 = not obstacle, fp8
        self.rows = 256 if self.fused else 64 if table.is_cuda else 8  # of a microbatch, at most
        trunk = f"plain PyTorch: {obstacle}" if obstacle else "fused"
        self.kernels = dict(trunk=trunk, head=head_path(table, len(table), fp8))
        if compile and obstacle and table.is_cuda:
            for block in self.blocks:  # twelve blocks share one compilation
                block.compile(dynamic=False, fullgraph=True)

    def hidden(self, tokens_BT: Tensor, plain: bool = False) -> Tensor:
        """Return the input of the output head. `plain` runs the modules above, with their hooks,
        instead of the fused kernels: equal up to rounding."""
        cos, sin = (table[: tokens_BT.size(1)] for table in self.rotary)
        if self.fused and not plain:
            norms = self.norm1, self.blocks, self.norm2
            return fused_trunk(tokens_BT, self.embed.weight, *norms, cos, sin, self.fp8)
        x = self.norm1(self.embed(tokens_BT))
        for block in self.blocks:
            x = block.forward(x, cos, sin) if plain else block(x, cos, sin)
        return self.norm2(x)

    def logits(self, x: Tensor) -> Tensor:
        z = self.head(x).float()
        return 15 * z * torch.rsqrt(z.square() + 15**2)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the cross-entropy in nats, summed over tokens: microbatches and ranks add up."""
        x, head = self.hidden(inputs_BT).flatten(0, 1), self.head
        return capped_loss(x, head.weight, head.bias, targets_BT.flatten(), self.fp8)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw on the CPU: a seed gives the same weights on every device and world size."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "head.weight", "bias")):
                p.zero_()
            elif name.endswith("gain"):
                p.fill_(1)
            elif name.endswith(("embed.weight", "q.weight", "k.weight", "v.weight", "fc.weight")):
                std = 1 if name == "embed.weight" else (0.33 / p.size(1)) ** 0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            else:
                raise AssertionError(f"no initialisation for {name}")

    def flops_per_token(self) -> float:
        """Return those of matmuls in both passes; attention sees half of the context on average."""
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return 6 * (linear + len(self.blocks) * self.head.in_features * len(self.rotary[0]))

    def groups(self) -> list[dict]:
        """Return parameters by role, with AdamW's rates; a neuron_axis marks matrices."""

        def matrices(room: str) -> list[tuple[str, Tensor]]:
            return [(n, p) for n, p in self.named_parameters() if room in n and p.ndim == 2]

        return [
            dict(name="embed", lr=0.7, params=[self.embed.weight]),
            dict(name="head", lr=0.004, params=[self.head.weight]),
            dict(name="scalars", lr=0.015, params=[p for p in self.parameters() if p.ndim < 2]),
            dict(name="attn", neuron_axis=None, params=matrices(".attn.")),
            dict(name="fc", neuron_axis=0, params=matrices(".mlp.fc.")),
            dict(name="proj", neuron_axis=1, params=matrices(".mlp.proj.")),
        ]

    def neurons(self) -> dict[str, nn.Module]:
        """Return the layers whose outputs are MLP neurons before the activation."""
        return {f"blocks.{i}.mlp.fc": block.mlp.fc for i, block in enumerate(self.blocks)}


MODELS = {"gpt": GPT}


def build_model(config: Config, device: torch.device) -> nn.Module:
    """Return the model of these settings; its weights are not initialised."""
    settings = config.scoped("model") | dict(dtype=getattr(torch, config.dtype), device=device)
    model = MODELS[settings.pop("model")](**settings)
    model.choose_kernels(config.compile, config.fp8)
    return model


####################################################################################################
#                                        Optimizer, schedule                                       #
####################################################################################################


def build_optimizer(model: nn.Module, config: Config) -> ModelOptimizer:
    """Return the chosen optimizer for the blocks' matrices, with AdamW for everything else."""
    adamw = dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001, fused=True)  # of track_3#36
    arguments = planned(config.steps, **config.scoped("schedule"))
    arguments |= dict(settings=config.set, lr_scale=config.lr_scale, loss_scale=config.batch_tokens)
    arguments |= dict(dtype=getattr(torch, config.dtype), compile=None if config.compile else False)
    matrix, groups = cooked(config.recipe, OPTIMIZERS[config.optimizer], model.groups())
    chosen = config.optimizer, matrix, adamw, config.steps
    optimizer = ModelOptimizer(groups, *chosen, **arguments)
    optimizer.check_covers(model)
    return optimizer


def validates(step: int, config: Config) -> bool:
    every = config.val_every if 10 * step < 9 * config.steps else max(config.val_every // 5, 1)
    return step == config.steps or step % every == 0


def measures(step: int, config: Config) -> bool:
    return validates(step, config) or config.log_every > 0 and not step % config.log_every


####################################################################################################
#                                                Run                                               #
####################################################################################################


class Trainer:
    """Model, optimizer and validation tokens, compiled once for all trials."""

    def __init__(self, config: Config, world: World, shards: dict, val_tokens: Tensor) -> None:
        self.config, self.world, self.shards = config, world, shards
        self.model = build_model(config, world.device)
        self.optimizer = build_optimizer(self.model, config)
        per_rank = config.batch_tokens // world.size // config.row_tokens
        rows = config.row_tokens, per_rank, config.rows
        self.microbatches = Microbatches(self.model, *rows, world.everywhere, config.compile)
        local = config.val_tokens // world.size  # each rank validates a contiguous slice
        mine = val_tokens[world.rank * local : (world.rank + 1) * local + 1]
        self.val = mine.to(torch.int32).to(world.device)

    def warm_up(self) -> None:
        """Compile and run everything once, on throw-away weights, and settle the rows."""
        settle = partial(self.microbatches.settle, self.val[:1])
        with compiled_ahead(self.world.device, settle):
            for p in self.model.parameters():
                p.grad = p.data.zero_().clone()  # uninitialised memory may hold nan
            self.optimizer.step(0, True)  # its state is then in memory while rows are tried
        self.optimizer.before_forward(0)
        settle()
        self.microbatches.record(self.losses, self.val)

    def reset(self, seed: int) -> None:
        """Return to the state of a newly built trainer, with the weights of this seed."""
        self.model.initialise(seed)
        INITIAL[self.config.init](self.model, seed)
        self.optimizer.reset()
        self.diagnostics = Diagnostics(self.optimizer.matrix, self.model)
        if self.world.device.type == "cuda" and not self.microbatches.graphs:
            torch.cuda.reset_peak_memory_stats()

    def step(self, step: int, tokens: Tensor) -> Tensor:
        """Train on the rank's tokens; returns their summed loss before the step."""
        tokens, device = tokens.to(torch.int32), self.world.device
        tokens = tokens.pin_memory() if device.type == "cuda" else tokens  # so that no copy waits
        self.optimizer.before_forward(step)
        tokens = tokens.to(device, non_blocking=True)
        loss = self.microbatches.backward(tokens, self.optimizer.before_last_backward)
        self.optimizer.step(step, measures(step + 1, self.config))
        return loss

    def train(self, log: Log, seed: int, saved: dict, path: Path | None) -> str:
        """Train from reset or saved weights; returns "complete" or the reason for an early end."""
        config, world, optimizer = self.config, self.world, self.optimizer
        never = config.steps + 1
        first, self.points = saved["step"], saved["points"]  # (step, loss, seconds) of validations
        batches = train_batches(self.shards, config.batch_tokens, world.rank, world.size, first)
        bad_step = torch.full((), never, device=world.device)  # the first with a non-finite loss
        seconds = self.points[-1][2] if self.points else 0.0  # on the stopped clock
        started = time.perf_counter()
        for step in range(first, config.steps + 1):
            if validates(step, config) and (step > first or not self.points):
                world.synchronize()
                seconds += time.perf_counter() - started if step else 0.0
                val_loss = self.losses(self.val) / config.val_tokens
                log.validated(step, seconds, val_loss)
                self.points.append((step, val_loss, seconds))
                if bad := optimizer.nonfinite_steps(self.model.named_parameters()):
                    log.record("nonfinite", step=step, gradients=bad)
                first_bad = int(world.all_reduce(bad_step.clone(), "MIN"))
                if first_bad < never or not math.isfinite(val_loss):
                    return f"non-finite loss at step {min(first_bad, step)}"
                self.report(log, step)
                if path:
                    self.save(path, seed, step)
                world.synchronize()
                started = time.perf_counter()
            if step < config.steps:
                if config.diagnostics and validates(step + 1, config):
                    self.diagnostics.before_step()
                loss = self.step(step, next(batches))
                bad_step = bad_step.minimum(torch.where(loss.isfinite(), never, step + 1))
                if step == first:
                    log.record("optim", step=step + 1, groups=optimizer.read_back())
                elapsed = seconds + time.perf_counter() - started
                log.trained(step + 1, elapsed, loss, optimizer.lr_factor)
                if measures(step + 1, config):
                    log.measured(step + 1, elapsed, world.all_reduce(loss), **optimizer.measured())
        return "complete"

    def losses(self, tokens: Tensor) -> float:
        """Return the summed validation loss of these tokens of all ranks."""
        with self.optimizer.readout():
            total = self.microbatches.losses(tokens).cpu().double().sum()  # MPS has no float64
        return self.world.all_reduce(total).item()

    def report(self, log: Log, step: int) -> None:
        """Log what a validation finds besides the loss."""
        log.target(self.points)
        if self.config.diagnostics and step:
            some = self.val[: min(len(self.val) - 1, 2**16) + 1]
            batches = (inputs for inputs, _ in self.microbatches.split(some))
            log.record("diag", **self.diagnostics.measure(step, batches))

    def save(self, path: Path, seed: int, step: int) -> None:
        """Write everything that a run of any number of ranks needs to go on."""
        state = self.optimizer.state_dict()  # every rank takes part
        if self.world.rank == 0:
            facts = dict(points=self.points, seed=seed, step=step, **state)
            weights = self.model.state_dict()
            write_checkpoint(path, asdict(self.config), weights, self.shards, **facts)


def run_trials(trainer: Trainer, saved: dict[int, dict], paths: dict, start: dict) -> str:
    """Train all seeds, those with a checkpoint from there; returns the status of the last."""
    config, world, microbatches = trainer.config, trainer.world, trainer.microbatches
    start_s = round(time.perf_counter() - STARTED, 3)
    kernels = trainer.model.kernels | dict(optimizer=trainer.optimizer.matrix.kernel())
    start |= dict(device=world.device_name, world_size=world.size, shards=[*trainer.shards])
    start |= dict(config=asdict(config), free=[*config.scoped("free")], kernels=kernels)
    start |= dict(peak=world.peak_flops / trainer.model.flops_per_token())
    for seed, (path, checkpoint) in paths.items():
        trainer.reset(seed)
        expected_s = config.steps * microbatches.seconds_per_step(trainer.val, world.synchronize)
        log = Log(path if world.rank == 0 else None, seed=seed, expected_s=expected_s, **start)
        begun = saved.get(seed, dict(step=0, points=[]))
        if seed in saved:
            restore(begun, trainer.model, trainer.optimizer)
            log.record("resumed", step=begun["step"], checkpoint=config.checkpoint)
        status = trainer.train(log, seed, begun, checkpoint)
        agree = world.same(list(trainer.model.parameters()))
        if not agree:
            status = "ranks hold different parameters"
        facts = dict(rows=microbatches.rows, graphs=bool(microbatches.graphs), start_s=start_s)
        log.record_end(status, ranks_agree=agree, **facts)
        if config.sample_tokens and status == "complete":
            with trainer.optimizer.readout():
                text = sample_bytes(trainer.model, config.sample_tokens, config.row_tokens, seed)
            log.say(f"\nA sample of the model's text:\n{text}\n", file=False)
        log.close(status, *trainer.points[-1])
        if status != "complete":
            break
    return status


def main(argv: list[str]) -> int:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    script = Path(__file__).resolve()
    try:
        start = dict(script=script, source=flatten(script), argv=argv)  # now: it may change
        config = parse_config(argv)
        check_config(config, size)
        paths = check_outputs(asdict(config))
        sizes = config.steps, config.batch_tokens, config.val_tokens, config.vocab_size
        shards, val_tokens = open_shards(config.data, config.get_data, *sizes, config.wrap)
        target = config.target or manifest_target(config.data, config.get_data)
        config, defaults = replace(config, target=target), asdict(Config())
        world = World(rank, size, choose_device(config.device))
        saved = read_trials(paths, config.scoped("model", "run", "schedule"), defaults, shards)
        if config.eval:
            saved = {0: read_checkpoint(Path(config.eval), config.scoped("model"), defaults)}
        trainer = Trainer(config, world, shards, val_tokens)
        trainer.warm_up()
        for found in saved.values():  # refused now if it does not fit, before a log is written
            restore(found, trainer.model, trainer.optimizer)
        if config.eval:
            loss = trainer.losses(trainer.val) / config.val_tokens
            if rank == 0:
                print(f"step:{found['step']} val_loss:{loss:.5f} {config.eval}")
    except (ValueError, FileNotFoundError) as error:
        if rank:
            time.sleep(10)  # rank 0 speaks, exits, and torchrun ends this one; or it is alone in it
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2
    try:
        status = "complete" if config.eval else run_trials(trainer, saved, paths, start)
    except KeyboardInterrupt:
        return say_interrupted(paths, rank)
    world.close()
    return 0 if status == "complete" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
