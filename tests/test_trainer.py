"""train_gpt.py from its arguments to its exit code: bad input, data order, schedule, trials.

Most runs call main() in this process with a tiny preset; a few are real processes.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, in_fresh_python, shards_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_gpt
from data.loader import batches_in, train_batches
from data.shards import write_shard
from records.log import parse_log
from train_gpt import Config, parse_config

Tiny = Callable[..., list[str]]


def losses(path: Path) -> list[str]:
    """The loss column as it stands in the log."""
    return re.findall(r"^step:\d+/\d+ val_loss:(\S+)", path.read_text(), re.M)


def end_of(path: Path) -> dict:
    return json.loads(re.findall(r"^end: (.*)$", path.read_text(), re.M)[-1])


def run(argv: list[str], log: str) -> list[str]:
    assert train_gpt.main([*argv, "--log", log]) == 0
    return losses(Path(log))


# ---- bad input -------------------------------------------------------------------------------


def damaged_corpus(folder: Path, **replaced: bytes | np.ndarray) -> str:
    """Good shards but for those in `replaced` (train, val): tokens, or the bytes of the file."""
    for split, name in (("train", "x_train_000001.bin"), ("val", "x_val_000000.bin")):
        content = replaced.get(split, np.arange(6000, dtype=np.uint16) % 257)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_shard(folder / name, content)
    return str(folder)


def shard_bytes(magic: int = 20240520, version: int = 1, count: int = 6000) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + bytes(2 * 6000)


BAD_FLAGS = {
    "an unknown optimizer": (["--optimizer", "adam"], "--optimizer.*'adam'.*aurora"),
    "an unknown preset": (["--preset", "gpt5"], "--preset.*'gpt5'.*demo"),
    "an unknown flag": (["--learning-rate", "1"], "--learning-rate"),
    "an abbreviated flag": (["--optim", "muon"], "--optim"),
    "a flag without its value": (["--steps"], "--steps"),
    "a word where a number belongs": (["--steps", "many"], "--steps.*'many'"),
    "a stray word": (["aurora"], "aurora"),
    "a data folder that is missing": (["--data", "nowhere"], "nowhere, no folder: run .*--data"),
    "an empty data folder": (["--data", "."], "0 training, 0 validation"),
    "too few tokens for the steps": (
        ["--steps", "31", "--preset", "tiny-no-wrap"],
        "too few tokens.*30 of 31 steps",
    ),
    "fewer tokens than one step": (["--batch-tokens", "16384"], "too few tokens.*0 of 4 steps"),
    "too few tokens to validate": (["--val-tokens", "5120"], "5000 of 5121 tokens"),
    "a batch that is not divisible": (["--batch-tokens", "520"], "batch_tokens 520.*64.*32 tokens"),
    "a validation that is not divisible": (["--val-tokens", "500"], "val_tokens 500.*divisible"),
    "rows that do not divide the batch": (["--rows", "3"], "batch_tokens 512.*96 = .*3 rows"),
    "negative rows": (["--rows", "-2"], "rows is -2, expected 0 or more"),
    "a negative seed": (["--seed", "-1"], "seed is -1, expected 0 or more"),
    "a seed too large for torch": (
        ["--seed", str(2**63 - 1)],
        r"seed is 9223372036854775807, .*less than 2\*\*63 - trials",
    ),
    "a last seed too large for torch": (
        ["--seed", str(2**63 - 3), "--trials", "3"],
        r"seed is 9223372036854775805, .*less than 2\*\*63 - trials",
    ),
    "no steps": (["--steps", "0"], "1 or more"),
    "no trials": (["--trials", "0"], "1 or more"),
    "no validation interval": (["--val-every", "0"], "1 or more"),
    "no tokens to validate": (["--val-tokens", "0"], "val.tokens"),
    "a negative number of tokens to validate": (["--val-tokens", "-512"], "val.tokens"),
    "a device that is not here": (["--device", "xpu"], "'xpu'.*--device"),
    "a device that does not exist": (["--device", "abacus"], "'abacus'.*--device"),
    "a group without a name": (["--set", "fc"], "--set fc: expected group.name=value"),
    "a group without a value": (["--set", "fc.lr"], "--set fc.lr: expected"),
    "an unknown group": (["--set", "mlp.lr=1"], "--set mlp.lr=1: expected.*fc"),
    "an unknown hyperparameter": (["--set", "fc.lrr=1"], "--set fc.lrr=1: expected.*'lr'"),
    "the parameters of a group": (["--set", "fc.params=[]"], "--set fc.params"),
    "a hyperparameter of the other optimizer": (["--set", "fc.rounds=3"], "--set fc.rounds=3"),
    "a hyperparameter that is no number": (["--set", "fc.lr=fast"], "--set fc.lr=fast.*0.025"),
    "a hyperparameter of the wrong type": (["--set", "fc.lr=[1]"], r"--set fc.lr=\[1\]"),
    "a negative rate": (["--set", "embed.lr=-1"], "Invalid learning rate: -1.0"),
    "a negative rate of a matrix": (["--set", "fc.lr=-1"], "lr is -1.0, expected 0 or more"),
    "a beta above 1": (["--set", "head.betas=(2.0,3.0)"], "Invalid beta parameter"),
    "a balance that does not exist": (
        ["--optimizer", "aurora", "--set", "aurora.balance=all"],
        "balance.*all.*both",
    ),
    "half a round": (
        ["--optimizer", "aurora", "--set", "aurora.rounds=2.5"],
        "aurora.rounds=2.5",
    ),
    "a polar method that does not exist": (
        ["--set", "muon.polar=twelve"],
        "polar.*twelve.*quintic12.*exact",
    ),
    "a log below a file": (["--log", f"{ROOT}/LICENSE/log.txt"], "LICENSE"),
}


@pytest.fixture
def refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], str]:
    """Runs main and returns the sentence it refused with, after everything else was checked."""
    monkeypatch.setitem(train_gpt.PRESETS, "tiny-no-wrap", TINY | dict(wrap=False))

    def run_refused(more: list[str]) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = train_gpt.main(tiny(*more))
        out, err = capsys.readouterr()
        assert code == 2
        assert out == "" and "Traceback" not in err
        assert err.startswith("train_gpt.py: ") and err.count("\n") == 1 and err.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before, "a refused run leaves nothing behind"
        return err

    return run_refused


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_arguments_are_refused_in_one_sentence(refused: Callable, case: str) -> None:
    more, sentence = BAD_FLAGS[case]
    assert re.search(sentence, refused(more))


BAD_SHARDS = {
    "a truncated shard": (shard_bytes()[:5000], "damaged.*5000, expected 20240520, 1, 13024"),
    "a shard shorter than its header": (b"abc", "damaged.* 3, expected"),
    "an empty file": (b"", "damaged.* 0, expected"),
    "a wrong magic number": (shard_bytes(magic=20240521), "damaged.*20240521.*expected 20240520"),
    "another version": (shard_bytes(version=2), "damaged.* 2, .*expected 20240520, 1"),
    "a shard longer than its header says": (shard_bytes(count=5999), "damaged"),
    "a negative count": (shard_bytes(count=-5), "damaged"),
    "a token beyond the vocabulary": (
        np.r_[np.zeros(5999), 257].astype(np.uint16),
        "token id 257, the vocabulary has 257",
    ),
    "a token id that is negative as int16": (
        np.r_[65535, np.zeros(5999)].astype(np.uint16),
        "token id 65535",
    ),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_refused_by_name(
    refused: Callable, tmp_path: Path, split: str, case: str
) -> None:
    content, sentence = BAD_SHARDS[case]
    folder = damaged_corpus(tmp_path, **{split: content})
    message = refused(["--data", folder])
    assert f"x_{split}_" in message and re.search(sentence, message)


def test_a_log_that_exists_is_never_overwritten(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a result")
    assert "a.txt exists already" in refused(["--log", "a.txt"])
    (tmp_path / "b.seed2.txt").write_text("a result")
    assert "b.seed2.txt exists already" in refused(["--log", "b.txt", "--trials", "2"])
    assert (tmp_path / "a.txt").read_text() == "a result"


def test_sources_that_cannot_be_one_text_are_refused(
    refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a traceback, for whoever gave an optimizer of their own a name that is taken."""

    def flatten(script: Path) -> str:
        raise ValueError("f is defined in a.py (a.py) and defined in b.py (b.py): rename one")

    monkeypatch.setattr(train_gpt, "flatten", flatten)
    assert "f is defined in a.py" in refused([])


def test_a_refused_script_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    code, out, err = in_fresh_python(str(ROOT / "train_gpt.py"), "--preset", "gpt5", cwd=tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("train_gpt.py: argument --preset: invalid choice: 'gpt5'")
    assert list(tmp_path.iterdir()) == []


def test_of_several_ranks_only_the_first_says_what_is_wrong(tmp_path: Path) -> None:
    """torchrun adds lines of its own; ours is there once."""
    code, out, err = in_fresh_python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train_gpt.py"),
        "--preset",
        "demo",
        "--rows",
        "2",
        "--data",
        "nowhere",
        cwd=tmp_path,
    )
    assert code != 0
    assert (out + err).count("train_gpt.py: shards of both kinds expected in nowhere") == 1
    assert "exitcode  : 2" in err
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_is_left_takes_its_threads_with_it(tmp_path: Path) -> None:
    """Threads of gloo that outlive their group abort one process in thirty as it ends. torch.optim
    imports torch._dynamo, which holds the group if there is one."""
    if not (tasks := Path("/proc/self/task")).is_dir():
        pytest.skip(f"no {tasks} here: threads cannot be listed")
    (script := tmp_path / "ranks.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train_gpt; from pathlib import Path\n"
        "world = train_gpt.World(int(os.environ['RANK']), 2, torch.device('cpu'))\n"
        "torch.optim.AdamW([torch.zeros(1)])\n"
        "world.synchronize(); torch.distributed.destroy_process_group()\n"
        f"names = [task.joinpath('comm').read_text() for task in Path('{tasks}').iterdir()]\n"
        "assert not any('gloo' in name for name in names), names\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    code, _, err = in_fresh_python(*torchrun, str(script), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert code == 0, err


def test_help_shows_every_flag_with_its_text(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # argparse breaks lines at hyphens as well
    with pytest.raises(SystemExit) as stop:
        train_gpt.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    flat = " ".join(text.split())
    for flag in (f for f in fields(Config) if f.metadata["help"]):
        found = re.search(rf" --{flag.name.replace('_', '-')}\b.*", flat)
        assert found and " ".join(flag.metadata["help"].split()) in found[0], flag.name
    assert not any(f"--{f.name} " in text for f in fields(Config) if not f.metadata["help"])
    assert "the learning rate reaches zero there" in text and "--log-file" in text


# ---- configuration ---------------------------------------------------------------------------


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults() -> None:
    assert parse_config([]) == Config()
    assert parse_config(["--steps", "7"]) == Config(steps=7)
    demo = parse_config(["--preset", "demo", "--steps", "7"])
    assert (demo.steps, demo.width, demo.batch_tokens) == (7, 128, 4096)
    assert (Config().width, Config().steps) == (768, 3250)


def test_flags_have_the_types_of_their_fields() -> None:
    config = parse_config(
        [
            "--no-compile",
            "--wandb",
            "--lr-scale",
            "0.5",
            "--set",
            "fc.lr=1",
            "--set",
            "attn.lr=2",
            "--log-file",
            "x.txt",
        ]
    )
    assert (config.compile, config.wandb, config.lr_scale) == (False, True, 0.5)
    assert list(config.set) == ["fc.lr=1", "attn.lr=2"] and config.log == "x.txt"
    assert parse_config(["--log", "y.txt"]).log == "y.txt"


SCOPES = {"model", "run", "schedule", "", "free"}


def test_every_setting_has_a_scope_and_those_of_a_scope_are_named_once() -> None:
    config = Config()
    assert {f.metadata["scope"] for f in fields(Config)} == SCOPES
    parts = [config.scoped(scope) for scope in sorted(SCOPES)]
    assert sum(map(len, parts)) == len(fields(Config))
    assert config.scoped(*SCOPES) == {f.name: getattr(config, f.name) for f in fields(Config)}
    assert all(set(f.metadata) == {"scope", "help", "least"} for f in fields(Config))


def test_the_scopes_are_those_that_checkpoints_and_comparisons_need() -> None:
    """Another seed, log or device changes no setting of an experiment; another width does."""
    config = Config()
    model = "model vocab_size layers width head_dim expansion row_tokens dtype"
    run = "optimizer recipe steps batch_tokens val_tokens lr_scale set fp8 init"
    schedule = "warmup cooldown shape power floor end momentum_steps momentum_start clip average"
    free = "seed trials data log device wandb tensorboard log_every quiet diagnostics checkpoint"
    found = dict(model=model, run=run, schedule=f"{schedule} average_from")
    for scope, names in (found | dict(free=f"{free} keep eval get_data")).items():
        assert config.scoped(scope).keys() == set(names.split()), scope


def test_what_is_no_flag_is_refused_as_one() -> None:
    for f in fields(Config):
        if not f.metadata["help"]:
            with pytest.raises(ValueError, match="unrecognized arguments"):
                parse_config([f"--{f.name.replace('_', '-')}", "1"])


def test_every_preset_is_made_of_settings() -> None:
    names = {f.name for f in fields(Config)}
    assert all(preset.keys() <= names for preset in train_gpt.PRESETS.values())
    assert {config.preset for config in map(preset_config, train_gpt.PRESETS)} == {
        "track3",
        "prose",
        "demo",
    }


def preset_config(name: str) -> Config:
    return parse_config(["--preset", name])


def test_a_rank_that_was_left_in_the_environment_is_one_sentence(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It trained to the end, said nothing and wrote no log."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train_gpt.time, "sleep", lambda seconds: None)
    assert train_gpt.main(tiny("--log", "a.txt")) == 2
    said = "RANK is 1 and WORLD_SIZE 1: unset both in this shell, or use torchrun"
    assert said in capsys.readouterr().err and not Path("a.txt").exists()


# ---- data order ------------------------------------------------------------------------------


def test_a_published_shard_lasts_190_steps() -> None:
    assert batches_in(100_000_000, 524_288) == 190


@pytest.mark.parametrize("batch", [1, 2, 7, 512])
def test_a_shard_is_left_when_at_most_a_batch_and_one_token_remain(batch: int) -> None:
    for tokens in (0, 1, 2, batch, batch + 1, batch + 2, 2 * batch + 1, 2 * batch + 2, 5000):
        at, steps = 0, 0
        while tokens - at > batch + 1:
            at, steps = at + batch, steps + 1
        assert batches_in(tokens, batch) == steps, tokens


def test_batches_follow_each_other_through_the_shards_in_name_order_and_start_again(
    tmp_path: Path,
) -> None:
    contents = [np.arange(150) % 257, (np.arange(130) + 100) % 257]
    for i in (1, 0):  # written in the other order
        write_shard(tmp_path / f"x_train_{i:06}.bin", contents[i].astype(np.uint16))
    write_shard(tmp_path / "x_val_000000.bin", np.zeros(513, np.uint16))
    config = Config(**TINY | dict(batch_tokens=64, data=str(tmp_path), steps=4))
    shards, _ = shards_of(config)
    batches = train_batches(shards, 64, 0, 1)
    wanted = [contents[0][:65], contents[0][64:129], contents[1][:65], contents[1][64:129]]
    assert batches_in(130, 64) == 2 and batches_in(129, 64) == 1
    for expected in wanted + wanted[:2]:
        assert next(batches).tolist() == expected.tolist()
    for first in range(7):  # a resumed run begins in the middle, also of a second reading
        assert next(train_batches(shards, 64, 0, 1, first)).tolist() == wanted[first % 4].tolist()


def test_only_the_shards_that_the_run_needs_are_read(tmp_path: Path, tiny: Tiny) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    damaged_corpus(folder)
    (folder / "x_train_000002.bin").write_bytes(b"damaged, and never needed")
    run(tiny("--data", str(folder), "--steps", "2"), "a.txt")
    assert parse_log("a.txt").meta["shards"] == ["x_train_000001.bin"]


def test_a_run_may_read_the_shards_twice(tiny: Tiny) -> None:
    """30 steps of 512 tokens are in the corpus; the prose and demo presets start again."""
    run(tiny("--steps", "33"), "a.txt")
    assert parse_log("a.txt").points[-1].step == 33


# ---- a run -----------------------------------------------------------------------------------


def test_a_run_validates_on_schedule_and_five_times_as_often_in_the_last_tenth(
    tiny: Tiny,
) -> None:
    run(tiny("--steps", "40", "--val-every", "16", "--batch-tokens", "64"), "a.txt")
    assert [point.step for point in parse_log("a.txt").points] == [0, 16, 32, 36, 39, 40]
    run(tiny("--steps", "5", "--val-every", "2"), "b.txt")
    assert [point.step for point in parse_log("b.txt").points] == [0, 2, 4, 5]


def test_a_run_learns_and_its_first_loss_is_that_of_chance(tiny: Tiny) -> None:
    column = [float(x) for x in run(tiny("--steps", "12", "--val-every", "12"), "a.txt")]
    assert column[0] == pytest.approx(math.log(257), abs=1e-5)
    assert column[-1] < column[0] - 0.3


def test_the_validation_loss_is_the_mean_over_the_first_tokens_of_the_shard(
    tiny: Tiny, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, so that every token has another loss; to the five digits printed."""

    def scatter(model: torch.nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)

    monkeypatch.setattr(train_gpt.GPT, "initialise", scatter)
    column = run(tiny("--steps", "1"), "a.txt")
    model = train_gpt.build_model(Config(**TINY), torch.device("cpu"))
    scatter(model, 1)
    tokens = np.fromfile(next(corpus.glob("*_val_*.bin")), dtype="<u2", offset=1024)[:513]
    tokens = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        parts = [
            model(tokens[i : i + 32][None], tokens[i + 1 : i + 33][None]).item()
            for i in range(0, 512, 32)
        ]
    assert float(column[0]) == pytest.approx(sum(parts) / 512, abs=1.5e-5)
    assert max(parts) - min(parts) > 1


def test_the_learning_rate_is_constant_and_then_falls_linearly_for_all_groups(
    tiny: Tiny,
) -> None:
    """Step t (from 0) of T uses lr x min(1, (1 - t/T) / 0.7)."""
    seen: list[tuple[str, float, float]] = []

    def note(opt: torch.optim.Optimizer, *_: Any) -> None:
        seen.extend((g["name"], g["lr"], g["initial_lr"]) for g in opt.param_groups)

    hook = register_optimizer_step_pre_hook(note)
    try:
        run(tiny("--steps", "10", "--optimizer", "aurora"), "a.txt")
    finally:
        hook.remove()
    seen = seen[-10 * 6 :]  # before that the warm-up
    expected = [min(1, (1 - t / 10) / 0.7) for t in range(10)]
    assert expected[3] == 1 > expected[4] and expected[9] == pytest.approx(1 / 7)
    first = dict(embed=0.7, head=0.004, scalars=0.015, attn=0.025, fc=0.025, proj=0.025)
    for t in range(10):
        step = seen[6 * t : 6 * t + 6]
        assert {name for name, _, _ in step} == set(first)
        for name, lr, initial in step:
            assert initial == pytest.approx(first[name])
            assert lr == pytest.approx(first[name] * expected[t])


def test_trials_are_the_same_as_single_runs(tiny: Tiny, tmp_path: Path) -> None:
    """State that leaks from one trial into the next would make seeds depend on each other."""
    together = tiny("--trials", "2", "--seed", "5", "--optimizer", "aurora")
    assert train_gpt.main([*together, "--log", "both.txt"]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.txt")) == ["both.seed5.txt", "both.seed6.txt"]
    both = [losses(Path(f"both.seed{seed}.txt")) for seed in (5, 6)]
    alone = [
        run(tiny("--seed", str(seed), "--optimizer", "aurora"), f"{seed}.txt") for seed in (5, 6)
    ]
    assert both == alone and both[0] != both[1]
    assert [parse_log(f"both.seed{seed}.txt").meta["seed"] for seed in (5, 6)] == [5, 6]


def test_a_run_repeats_to_the_last_digit(tiny: Tiny) -> None:
    assert run(tiny(), "a.txt") == run(tiny(), "b.txt")


def test_muon_and_aurora_are_different_runs(tiny: Tiny) -> None:
    muon, aurora = (run(tiny("--optimizer", name), name) for name in ("muon", "aurora"))
    assert muon[0] == aurora[0] and muon[-1] != aurora[-1]


def test_without_a_name_each_run_has_a_log_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    assert train_gpt.main(tiny("--trials", "2", "--steps", "1")) == 0
    logs = list((tmp_path / "logs").iterdir())
    assert len(logs) == 2 and {parse_log(path).meta["seed"] for path in logs} == {1, 2}


# ---- hyperparameters -------------------------------------------------------------------------


def groups_of(path: str) -> dict[str, dict]:
    optim = parse_log(path).optim
    assert optim is not None and optim["step"] == 1
    return {group["name"]: group for group in optim["groups"]}


def test_lr_scale_multiplies_every_learning_rate(tiny: Tiny) -> None:
    plain = run(tiny(), "plain.txt")
    scaled = run(tiny("--lr-scale", "0.5"), "scaled.txt")
    before, after = groups_of("plain.txt"), groups_of("scaled.txt")
    assert before["embed"]["lr"] == 0.7 and len(before) == 6
    for name in before:
        assert after[name]["lr"] == pytest.approx(before[name]["lr"] / 2)
    assert plain[-1] != scaled[-1]


@pytest.mark.parametrize(
    "setting, groups, key, value",
    [
        ("fc.lr=0.03", ["fc"], "lr", 0.03),
        ("fc.lr=1", ["fc"], "lr", 1.0),
        ("aurora.momentum=0.9", ["attn", "fc", "proj"], "momentum", 0.9),
        ("adamw.betas=(0.5, 0.9)", ["embed", "head", "scalars"], "betas", [0.5, 0.9]),
        ("head.eps=1e-8", ["head"], "eps", 1e-8),
        ("aurora.balance=fc", ["attn", "fc", "proj"], "balance", "fc"),
        ("fc.rounds=1", ["fc"], "rounds", 1),
        ("fc.neuron_axis=None", ["fc"], "neuron_axis", None),
    ],
)
def test_set_changes_the_named_hyperparameter_and_no_other(
    tiny: Tiny, setting: str, groups: list[str], key: str, value: Any
) -> None:
    argv = tiny("--optimizer", "aurora", "--steps", "6", "--lr-scale", "4")
    plain = run(argv, "plain.txt")
    changed = run([*argv, "--set", setting], "changed.txt")
    before, after = groups_of("plain.txt"), groups_of("changed.txt")
    for name in before:
        differing = {k for k in before[name] if before[name][k] != after[name][k]}
        expected = {key, "initial_lr"} if key == "lr" else {key}
        assert differing == (expected if name in groups else set())
        if name in groups:
            assert after[name][key] == (4 * value if key == "lr" else value)
    if key != "eps":  # too small to be seen in five digits
        assert plain[-1] != changed[-1]


def test_the_last_of_two_settings_counts_and_lr_scale_comes_on_top(tiny: Tiny) -> None:
    more = ["--set", "muon.lr=0.5", "--set", "fc.lr=0.1", "--lr-scale", "2", "--steps", "1"]
    run(tiny(*more), "a.txt")
    found = groups_of("a.txt")
    assert [found[name]["lr"] for name in ("attn", "fc", "proj")] == [1.0, 0.2, 1.0]


# ---- what stops a run ------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--lr-scale", "1e30"], ["--set", "embed.lr=1e38"]])
def test_a_run_that_diverges_stops_and_says_when(tiny: Tiny, more: list[str], capsys: Any) -> None:
    code = train_gpt.main(tiny("--steps", "20", "--val-every", "10", "--log", "a.txt", *more))
    status = end_of(Path("a.txt"))["status"]
    found = re.fullmatch(r"non-finite loss at step (\d+)", status)
    assert code == 1 and found and 1 <= int(found[1]) <= 10
    assert status in capsys.readouterr().out
    assert "step:20/20" not in Path("a.txt").read_text(), "it stops at the next validation"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_the_first_step_with_a_non_finite_loss_is_named(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, first: int, bad: float
) -> None:
    """Even if gradients stay finite and validation recovers. Steps are named from 1."""
    at, usual = [-1], train_gpt.train_batches

    def counted(*args: Any) -> Iterator[torch.Tensor]:
        for step, batch in enumerate(usual(*args)):
            at[0] = step
            yield batch

    forward = train_gpt.GPT.forward

    def sabotaged(self: train_gpt.GPT, *args: torch.Tensor) -> torch.Tensor:
        broken = torch.is_grad_enabled() and at[0] == first
        return forward(self, *args) + (bad if broken else 0)

    monkeypatch.setattr(train_gpt, "train_batches", counted)
    monkeypatch.setattr(train_gpt.GPT, "forward", sabotaged)
    assert train_gpt.main(tiny("--log", "a.txt")) == 1
    assert end_of(Path("a.txt"))["status"] == f"non-finite loss at step {first + 1}"
    assert len(losses(Path("a.txt"))) == (2 if first < 2 else 3)


def test_a_run_that_failed_says_nothing_of_a_target_or_of_neurons(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its validation loss may be low and finite, but it is the loss of no valid run."""
    forward, bad = train_gpt.GPT.forward, [0.0]

    def broken(self: train_gpt.GPT, *args: torch.Tensor) -> torch.Tensor:
        return forward(self, *args) + (bad[0] if torch.is_grad_enabled() else 0)

    monkeypatch.setattr(train_gpt.GPT, "forward", broken)
    for bad[0], code, name in ((0.0, 0, "good.txt"), (math.inf, 1, "bad.txt")):
        argv = tiny("--target", "5.54", "--diagnostics", "--log", name)
        assert train_gpt.main(argv) == code
    good, failed = parse_log("good.txt"), parse_log("bad.txt")
    assert good.target["step"] == 2 and [diag["step"] for diag in good.extra["diag"]] == [2, 4]
    assert failed.status == "non-finite loss at step 1" and failed.points[-1].val_loss < 5.54
    assert failed.target is None and "diag" not in failed.extra


def test_a_diverged_trial_ends_the_others(tiny: Tiny, tmp_path: Path) -> None:
    more = ["--trials", "3", "--lr-scale", "1e30", "--log", "a.txt"]
    assert train_gpt.main(tiny(*more)) == 1
    assert [p.name for p in tmp_path.glob("*.txt")] == ["a.seed1.txt"]


# ---- the target ------------------------------------------------------------------------------


def target_lines(points: list[tuple[int, float, float]], target: float) -> list[dict]:
    """Return what a log says of the target when these points are validated one after another."""
    log = train_gpt.Log.__new__(train_gpt.Log)  # no file: only what it would record
    said: list[dict] = []
    log.config, log.record = dict(target=target), lambda key, **values: said.append(values)
    for i in range(len(points)):
        log.target(points[: i + 1])
    return said


def test_the_crossing_is_interpolated_between_the_points_around_the_target() -> None:
    points = [(0, 10.0, 0.0), (100, 4.0, 50.0), (200, 3.0, 90.0)]
    assert target_lines(points[:2], 3.25) == []
    assert target_lines(points, 3.25) == [
        {
            "loss": 3.25,
            "step": 200,
            "train_time": 90.0,
            "crossing_step": 175.0,
            "crossing_time": 80.0,
        }
    ]


def test_a_target_that_is_met_exactly_is_reached_there() -> None:
    (found,) = target_lines([(0, 4.0, 0.0), (10, 3.0, 5.0)], 3.0)
    assert (found["crossing_step"], found["crossing_time"]) == (10.0, 5.0)


def test_only_the_first_crossing_counts() -> None:
    points = [(0, 4.0, 0.0), (10, 2.9, 5.0), (20, 3.1, 9.0), (30, 2.8, 14.0)]
    assert [len(target_lines(points[:i], 3.0)) for i in (1, 2, 3, 4)] == [0, 1, 1, 1]
    assert target_lines(points, 3.0)[0]["step"] == 10


def test_a_target_that_is_not_a_number_is_never_reached() -> None:
    assert target_lines([(0, 4.0, 0.0), (10, 3.0, 5.0)], math.nan) == []


def test_a_target_reached_by_the_first_point_is_reached_there() -> None:
    (found,) = target_lines([(0, 2.0, 0.0)], 3.0)
    assert (found["step"], found["crossing_step"]) == (0, 0)


def test_the_log_says_once_when_the_target_was_reached(tiny: Tiny) -> None:
    run(tiny("--steps", "12", "--val-every", "2", "--target", "5.3"), "a.txt")
    log = parse_log("a.txt")
    assert Path("a.txt").read_text().count("\ntarget: ") == 1 and log.target is not None
    first = next(i for i, point in enumerate(log.points) if point.val_loss <= 5.3)
    assert log.target["step"] == log.points[first].step > 0 and log.target["loss"] == 5.3
    assert log.points[first - 1].step < log.target["crossing_step"] <= log.points[first].step


def test_a_target_of_zero_is_that_of_the_data(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    damaged_corpus(folder)
    (folder / "manifest.json").write_text(json.dumps(dict(target=99.5)))
    run(tiny("--data", str(folder), "--steps", "1"), "a.txt")
    assert parse_log("a.txt").target["loss"] == 99.5
    run(tiny("--data", str(folder), "--steps", "1", "--target", "98"), "b.txt")
    assert parse_log("b.txt").target["loss"] == 98


@pytest.mark.parametrize(
    "text", ["{", "", "[3.28]", "3.28", '{"target": "soon"}', '{"target": null}', '{"target": [1]}']
)
def test_a_manifest_without_a_number_is_named_and_matters_only_if_it_is_asked(
    refused: Callable, tiny: Tiny, tmp_path: Path, text: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    damaged_corpus(folder)
    (folder / "manifest.json").write_text(text)
    message = refused(["--data", str(folder)])
    assert re.search('manifest.json is no JSON object with a number as "target".*--target', message)
    run(tiny("--data", str(folder), "--steps", "1", "--target", "98"), "a.txt")


def test_the_largest_seed_runs(tiny: Tiny) -> None:
    run(tiny("--seed", str(2**63 - 2), "--steps", "1"), "a.txt")
    assert parse_log("a.txt").meta["seed"] == 2**63 - 2


def test_what_is_logged_as_config_is_what_ran(tiny: Tiny) -> None:
    argv = tiny("--steps", "3", "--seed", "9", "--lr-scale", "0.5", "--log", "a.txt")
    assert train_gpt.main(argv) == 0
    meta = parse_log("a.txt").meta
    assert meta["argv"] == argv and (meta["seed"], meta["world_size"]) == (9, 1)
    wanted = TINY | dict(steps=3, lr_scale=0.5, device="cpu", data=argv[argv.index("--data") + 1])
    assert {name: meta["config"][name] for name in wanted} == wanted
    end = end_of(Path("a.txt"))
    assert end["status"] == "complete" and end["ranks_agree"] is True and end["rows"] == 2
