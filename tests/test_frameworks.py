"""The package in Lightning, transformers' Trainer and accelerate, where these are installed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import Aurora, Muon, split_parameters

CASES = [(True, Muon), (False, Muon), (True, Aurora), (False, Aurora)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("automatic, kind", CASES, ids=str)
def test_lightning_trains_saves_and_resumes(automatic: bool, kind: type, tmp_path: Path) -> None:
    """It passes a closure to step(), and saves state_dict()."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
            self.automatic_optimization = automatic

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss = self.net(batch).square().mean()
            if not automatic:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return kind(split_parameters(self.net).matrices, lr=0.05)

    def fit(steps: int, resume: Path | None = None) -> tuple[Any, Net]:
        data = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))  # a step an epoch
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        net = Net()
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        trainer.fit(net, loader, ckpt_path=resume)
        return trainer, net

    start, (_, whole) = Net(), fit(4)
    half, _ = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(4, tmp_path / "half.ckpt")
    for a, b, c in zip(*(net.parameters() for net in (whole, resumed, start)), strict=True):
        assert torch.equal(a, b) and (a.ndim < 2 or not torch.equal(a, c))


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_saves_resumes_and_ends_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    tf = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    tokens = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0))
    data = [dict(input_ids=row, labels=row) for row in tokens]

    def train(folder: Path, resume: str | None = None) -> nn.Module:
        torch.manual_seed(0)
        sizes = dict(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32)
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        split = split_parameters(model)
        for group in split.others:
            for _, p in group["params"]:
                p.requires_grad_(False)
        opt = Aurora(split.matrices)
        arguments = tf.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            max_grad_norm=1.0,
            seed=1,
        )
        both = opt, tf.get_linear_schedule_with_warmup(opt, 2, 8)
        tf.Trainer(model, arguments, train_dataset=data, optimizers=both).train(resume)
        return model

    whole = train(tmp_path / "a")
    again = train(tmp_path / "b", str(tmp_path / "a/checkpoint-2"))
    back = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "a/checkpoint-4")
    for a, b, c in zip(*(m.parameters() for m in (whole, again, back)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_trains_with_schedule_clipping_and_accumulation(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def run(steps: int, folder: Path | None = None, save: bool = False) -> list[Tensor]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False))
        opt = Aurora(split_parameters(model).matrices, lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        model, opt, schedule = accelerator.prepare(model, opt, schedule)
        if folder and not save:
            accelerator.load_state(folder)
        for step in range(2 if folder and not save else 0, steps):
            for half in range(2):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + half))
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    opt.step()
                    schedule.step()
                    opt.zero_grad()
        if save:
            accelerator.save_state(folder)
        return [p.detach().clone() for p in model.parameters()]

    whole, half = run(4), run(2, tmp_path / "half", save=True)
    resumed = run(4, tmp_path / "half")
    for a, b, c in zip(whole, resumed, half, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
