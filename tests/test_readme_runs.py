"""README.md's commands, run in their order, as they stand, in a fresh clone.

REPLACED and PREPARED say what differs from a reader's machine: no GPU, no network, and small data.
The clone is HEAD with this checkout's changes. Its .venv stands for what ./run.sh installs, and
shares the packages of this Python; the python3 on PATH has none.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_hellaswag import made_examples, write_jsonl
from test_readme import commands
from test_show_compare import write_log

from data.shards import write_manifest, write_shard

FEW = "--steps 2 --batch-tokens 1024 --val-tokens 1024 --rows 1"
SMALL = f"--preset demo {FEW}"
REPLACED = [  # pattern, what runs in place of it, why
    (r"^\./run\.sh$", rf"\g<0> {FEW}", "260 steps take minutes"),
    (r"^\./test\.sh$", r"\g<0> -n 0 tests/test_crossing.py", "this test is one of its tests"),
    (r"nproc_per_node=8", "nproc_per_node=1", "eight processes starve two cores"),
    (r"^(python|torchrun \S+ \S+) train_gpt\.py.*", rf"\g<0> {SMALL}", "the presets need GPUs"),
    (r" --data data/mine (?=--preset)", r"\g<0>--checkpoint run.pt ", "later commands read run.pt"),
    (r"(?<=--out data/mine)$", " --tokenizer bytes --val-tokens 8193", "that of SMALL, few texts"),
    (r"muon aurora --seeds 1 2 3 -- --preset prose", rf"aurora --seeds 1 -- {SMALL}", "six runs"),
    (r"hellaswag\.py run\.pt$", r"\g<0> --data val.jsonl", "the data come from a network"),
]
VENV = ".venv/lib/python{}.{}/site-packages".format(*sys.version_info)
TORCHRUN = '#!/bin/sh\nexec "${0%/*}/python" -m torch.distributed.run "$@"\n'  # as of setup.sh


def block_commands(page: str) -> list[str]:
    """Return the commands of the page's blocks of shell, not those between backticks."""
    return commands("\n".join(re.findall(r"^```sh\n.*?^```", page, re.DOTALL | re.M)))


def replaced(command: str, used: set[str]) -> str:
    for pattern, other, _ in REPLACED:
        command, count = re.subn(pattern, other, command)
        used |= {pattern} if count else set()
    return command


class Clone:
    """A fresh clone, and a PATH whose python3 has no packages."""

    def __init__(self, folder: Path) -> None:
        self.root, bare = folder / "clone", folder / "bare"
        self.git("clone", "-q", str(ROOT), str(self.root), cwd=folder)
        if changes := self.git("diff", "--binary", "HEAD", cwd=ROOT):
            self.git("apply", "-", cwd=self.root, text=changes)
        for venv in (bare, self.root / ".venv"):
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        packages = [path for path in sys.path if "-packages" in path]
        (self.root / VENV / "outer.pth").write_text("\n".join(packages))
        (torchrun := self.root / ".venv/bin/torchrun").write_text(TORCHRUN)
        torchrun.chmod(0o755)
        self.env = dict(PATH=f"{bare}/bin:/usr/bin:/bin", HOME=str(folder), OMP_NUM_THREADS="1")
        self.env |= dict(CUDA_VISIBLE_DEVICES="", HF_ENDPOINT="http://127.0.0.1:9")
        wanted = self.run(". tools/setup.sh; wanted tools dev")[1]
        (self.root / ".venv/installed").write_text(wanted)

    def git(self, *words: str, cwd: Path, text: bytes = b"") -> bytes:
        done = subprocess.run(["git", *words], cwd=cwd, input=text, check=True, capture_output=True)
        return done.stdout

    def run(self, line: str) -> tuple[int, str, str]:
        """Run a line in bash; if it takes too long, nothing that it started is left."""
        process = subprocess.Popen(
            ["bash", "-ec", line],
            cwd=self.root,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=170)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, out, err


def prepare(root: Path) -> None:
    """Make what the commands expect: FineWeb's shards, texts, two groups of logs, examples."""
    trainer = root / "train_gpt.py"  # a sample of 400 bytes takes longer than two steps
    trainer.write_text(trainer.read_text().replace("sample_tokens=400", "sample_tokens=10"))
    shards = root / "data/fineweb10B"
    for folder in (shards, root / "my_texts", root / "mine", root / "baseline"):
        folder.mkdir()
    names = ["val_000000", *(f"train_{i:06d}" for i in range(1, 19))]
    for name in names:
        write_shard(shards / f"fineweb_{name}.bin", np.arange(100))
    write_manifest(shards, "gpt2", 50257)
    for i in range(30):
        (root / f"my_texts/{i}.txt").write_text(f"Text {i} says: " + "all is well. " * 80)
    for seed in (1, 2):
        write_log(root / f"mine/{seed}.txt", seed, 3.27 + seed / 1000)
        write_log(root / f"baseline/{seed}.txt", seed + 2, 3.28 + seed / 1000)
    write_jsonl(root / "val.jsonl", made_examples(2))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_the_readmes_commands_run_as_they_stand_in_a_fresh_clone(tmp_path: Path) -> None:
    """After ./run.sh all others died on missing modules: nothing said where the packages were."""
    clone, used, said = Clone(tmp_path), set(), {}
    prepare(clone.root)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in block_commands(page):
        # The page's own sentence: once in each shell, before the commands after ./test.sh.
        first = "" if command.startswith("./") else "source .venv/bin/activate; "
        code, out, err = clone.run(first + replaced(command, used))
        assert code == 0 and "Traceback" not in err, f"{command}\n{out[-2000:]}\n{err[-4000:]}"
        said[command] = err
    assert "No usable GPU" in said["./run.sh"] and "embedded default" in said["./run.sh"]
    for command in ("./run.sh", "./test.sh"):
        assert "run `source .venv/bin/activate` before other commands" in said[command]
    assert used == {pattern for pattern, *_ in REPLACED}, "the page no longer needs some of them"
    made = (
        "logs/a.txt",
        "pictures/loss_steps.png",
        "exported/model.safetensors",
        "data/mine/manifest.json",
    )
    assert not [name for name in made if not (clone.root / name).is_file()]
    assert len(list(clone.root.glob("logs/**/*.txt"))) == 11


def test_blocks_are_read_without_sentences_and_in_order() -> None:
    page = "Run `./a.sh`:\n```sh\n./b.sh  # first\n./c.sh; ./d.sh\n```\n`x`\n```sh\n./e.sh\n```\n"
    assert block_commands(page) == ["./b.sh", "./c.sh", "./d.sh", "./e.sh"]
