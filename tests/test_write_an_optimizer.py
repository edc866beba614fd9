"""docs/write_an_optimizer.md: its files are pasted into a copy of the repository and work there."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, in_fresh_python

PAGE = (ROOT / "docs/write_an_optimizer.md").read_text(encoding="utf-8")
TRAINED = """
import sys
import train_gpt
import optimizers
from optimizers.cubic import CubicMuon
from optimizers.lookahead import CubicAhead
from optimizers.spikes import SteadyCubic
from records.log import parse_log
assert optimizers.OPTIMIZERS["cubic"] is CubicMuon
optimizers.OPTIMIZERS |= dict(steady=SteadyCubic, ahead=CubicAhead)
train_gpt.PRESETS["tiny"] = {tiny!r}
for name, *more in (
    ["cubic", "--set", "cubic.lr=0.05"],
    ["steady", "--set", "fc.spike=4", "--set", "steady.spike_of=row"],
    ["ahead", "--set", "ahead.momentum=0.9"],
):
    words = ["--preset", "tiny", "--data", {data!r}, "--device", "cpu", "--optimizer", name]
    assert train_gpt.main([*words, "--log", name + ".txt", *more]) == 0, name
    run = parse_log(name + ".txt")
    assert run.points[-1].val_loss < run.points[0].val_loss, name
wrong = ["--log", "x.txt", "--optimizer", "steady", "--set", "steady.spike=0.5"]
assert train_gpt.main([*words[:6], *wrong]) == 2
"""
TESTED = """
from optimizers.cubic import Cubic
from tests.test_cubic import test_cubic_muon_is_its_formula
test_cubic_muon_is_its_formula()
honest = Cubic.before
Cubic.before = lambda *given: 1.01 * honest(*given)
try:
    test_cubic_muon_is_its_formula()
except AssertionError:
    print("found")
"""


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files and the change that the page shows."""
    root = tmp_path_factory.mktemp("pasted") / "main"
    skip = shutil.ignore_patterns("__pycache__", "*.txt", "*.jsonl", "*.png", "*.bin")
    for folder in ("data", "models", "optimizers", "records"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skip)
    for name in ("train_gpt.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / "tests").mkdir()
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        name = re.match(r'"""((?:optimizers|tests)/\w+\.py): ', block)[1]
        (root / name).write_text(block, encoding="utf-8")
    assert len(blocks) == 4
    init = root / "optimizers/__init__.py"
    init.write_text(patched(init.read_text()))
    return root


def patched(text: str) -> str:
    """Insert the lines of the page's diff before or after its line of context."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    (context,) = [line[1:] for line in diff.splitlines() if line[0] == " "]
    assert text.count(context) == 1
    return text.replace(context, "\n".join(line[1:] for line in diff.splitlines()))


def test_the_optimizers_of_the_page_train_and_refuse_wrong_values(
    pasted: Path, corpus: Path
) -> None:
    """CubicMuon is chosen by its name in OPTIMIZERS; state, schedules and averages are in use."""
    script = TRAINED.format(tiny=TINY, data=str(corpus))
    code, _, err = in_fresh_python("-c", script, cwd=pasted, OMP_NUM_THREADS="1")
    assert code == 0, err
    assert "SteadyCubic: spike is 0.5, expected 1.0 or more" in err


def test_the_test_of_the_page_passes_and_finds_a_wrong_factor(pasted: Path) -> None:
    """Its loop is the formula of Cubic, and a change of one per cent in Cubic is found."""
    code, out, err = in_fresh_python("-c", TESTED, cwd=pasted, OMP_NUM_THREADS="1")
    assert (code, out) == (0, "found\n"), err


def test_shorten_acts_on_spikes_only() -> None:
    """A gradient ten times as long as the others becomes `spike` times as long; zeros stay."""
    names: dict = {}
    block = re.search(r"class Shorten\(.*?(?=\n\n\nclass)", PAGE, re.DOTALL)[0]
    exec("from optimizers import Technique\n\n\n" + block, names)
    shorten, group = names["Shorten"](), names["Shorten"].defaults
    G = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    G[2] = 0
    for kind in ("matrix", "row"):
        state = shorten.init(G)
        for size, expected in ((1.0, 1.0), (1.0, 1.0), (10.0, 2.0), (1.0, 1.0)):
            U = shorten.before(size * G, G, state, group | dict(spike_of=kind))
            assert torch.allclose(U, expected * G)
