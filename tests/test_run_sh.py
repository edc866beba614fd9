"""run.sh and tools/setup.sh: what is installed, fetched and launched where.

In most tests the trainer, the data scripts, torch and pip are stubs that write down how they were
called, so nothing is installed and no network is used. test_readme_runs.py trains for real.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from train_gpt import Config

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "run.sh",
    "train_gpt.py",
    "requirements.txt",
    "pyproject.toml",
    "tools/setup.sh",
    "data/*.py",
    "models/*.py",
    "optimizers/*.py",
    "records/*.py",
)
CALL = 'import sys; open("calls", "a").write(" ".join([{name!r}, *sys.argv[1:]]) + "\\n")\n'
TRAINER = """
from types import SimpleNamespace
def parse_config(argv):
    preset = next((name for name in ("demo", "prose") if name in " ".join(argv)), "track3")
    return SimpleNamespace(device="", preset=preset)
if __name__ == "__main__":
    import sys
    open("calls", "a").write(" ".join(["train", *sys.argv[1:]]) + "\\n")
    sys.exit(7 if "fail" in sys.argv else 0)
"""
TORCH = """
__version__ = "2.12.0"
class cuda:
    device_count = lambda: {count}
def ones(*shape, device):
    raise RuntimeError("CUDA driver too old\\nand so on")
"""
# A Python that makes an environment of copies of itself, whose pip writes down what it would
# install. Called python3 it has no packages (-S), as a system's Python; in .venv it has all.
PYTHON = """#!/bin/bash
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin {packages}; cp "$0" .venv/bin/python ;;
    "-m pip "*) sleep 0.2; echo "pip $* $(tr '\\n' ' ')" >>calls; [ ! -e pip_fails ] ;;
    *download.pytorch.org*) [ -e pytorch_answers ] ;;
    *) if [ "${{0##*/}}" = python ]; then exec {real} "$@"; else exec {real} {flags} "$@"; fi ;;
esac
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Checkout:
    """A copy of the repository, and a PATH on which python3 is ours."""

    def __init__(self, folder: Path, flags: str = "") -> None:
        self.root, self.bin = folder / "a clone", folder / "bin"
        for path in (path for pattern in NEEDED for path in ROOT.glob(pattern)):
            copy = self.root / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        packages = ".venv/lib/python{}.{}/site-packages".format(*sys.version_info)
        script(
            self.bin / "python3",
            PYTHON.format(real=f"'{sys.executable}'", flags=flags, packages=packages),
        )
        script(self.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *command: object) -> subprocess.Popen:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.root.parent,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *arguments: object) -> tuple[int, str, str]:
        process = self.start(self.root / "run.sh", *arguments)
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err

    def stub(self, gpus: int = 0, working: bool = True) -> "Checkout":
        """The trainer, torch with that many GPUs, torchrun and the data scripts as stubs."""
        script(self.root / "train_gpt.py", TRAINER)
        torch = TORCH.format(count=gpus)
        if working:
            torch += "from unittest.mock import Mock\nones = Mock()\n"
        script(self.root / "torch/__init__.py", torch)
        script(self.root / "torch/distributed/run.py", CALL.format(name="torchrun"))
        script(self.root / "data/embedded.py", CALL.format(name="embedded"))
        script(self.root / "data/cached_fineweb10B.py", CALL.format(name="fineweb"))
        return self

    def fineweb_is_missing(self, fetched: bool) -> None:
        with open(self.root / "data/cached_fineweb10B.py", "a") as file:
            file.write(f"sys.exit(2 if '--offline' in sys.argv else {0 if fetched else 2})\n")

    def corpora(self) -> list[Path]:
        """Return the folders in data/, which scripts make."""
        return [path for path in self.root.glob("data/*/") if path.name != "__pycache__"]

    def calls(self) -> list[str]:
        """What was called since the last time."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def bare(tmp_path: Path) -> Checkout:
    """python3 has no packages at all."""
    return Checkout(tmp_path, flags="-S").stub()


@pytest.fixture
def hub(checkout: Checkout) -> Iterator[None]:
    """A server, in place of Hugging Face, that answers (404)."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        checkout.env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        yield
        server.shutdown()


# ----------------------------------------------------------------------------------- the real thing


def test_a_mistyped_flag_is_one_sentence_before_anything_is_fetched(checkout: Checkout) -> None:
    code, out, err = checkout.run("--optimzer", "aurora")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("train_gpt.py: unrecognized arguments: --optimzer")
    assert not checkout.corpora()


def test_help_is_the_trainers(checkout: Checkout) -> None:
    code, out, _ = checkout.run("--help")
    assert code == 0 and "{adamw,muon,normuon,unormuon,aurora,riemannian}" in out
    assert not checkout.corpora()


# ---------------------------------------------------------------------------------------- launching


@pytest.mark.parametrize("gpus, used", [(2, 2), (3, 2), (7, 4), (8, 8), (16, 8)])
def test_the_largest_of_2_4_8_gpus_that_is_there_is_used(checkout, gpus: int, used: int) -> None:
    code, _, err = checkout.stub(gpus).run("--log", "my log")
    assert code == 0 and f"training on {used} of {gpus} GPUs" in err
    assert checkout.calls() == [
        "fineweb 18 --offline",
        f"torchrun --standalone --nproc_per_node={used} -- train_gpt.py --log my log",
    ]


def test_one_gpu_needs_no_torchrun(checkout: Checkout) -> None:
    assert checkout.stub(1).run("--seed", 3)[0] == 0
    assert checkout.calls() == ["fineweb 18 --offline", "train --seed 3"]


def test_a_gpu_that_does_not_work_is_none_and_the_reason_is_said(checkout: Checkout) -> None:
    code, _, err = checkout.stub(8, working=False).run()
    assert code == 0 and "No usable GPU (CUDA driver too old), so" in err
    assert checkout.calls() == ["embedded", "train --preset demo"]


def test_the_exit_code_is_the_trainers(checkout: Checkout) -> None:
    assert checkout.stub().run("fail")[0] == 7


@pytest.mark.parametrize(
    "arguments, calls",
    [
        ("--preset demo", ["embedded", "train --preset demo"]),
        (
            "--preset prose",
            ["torchrun --standalone --nproc_per_node=8 -- train_gpt.py --preset prose"],
        ),
        (
            "--preset=prose",
            ["torchrun --standalone --nproc_per_node=8 -- train_gpt.py --preset=prose"],
        ),
        ("--data=x", ["torchrun --standalone --nproc_per_node=8 -- train_gpt.py --data=x"]),
    ],
)
def test_a_chosen_preset_or_folder_stays_on_gpus(checkout, arguments: str, calls: list) -> None:
    assert checkout.stub(8).run(*arguments.split())[0] == 0
    assert checkout.calls() == calls


@pytest.mark.parametrize(
    "arguments, calls",
    [
        ("--preset track3", ["fineweb 18 --offline", "train --preset track3"]),
        ("--data x", ["train --data x"]),
        ("--preset demo --data x", ["train --preset demo --data x"]),
    ],
)
def test_a_chosen_preset_or_folder_stays_without_gpu(checkout, arguments: str, calls: list) -> None:
    assert checkout.stub().run(*arguments.split())[0] == 0
    assert checkout.calls() == calls


# ------------------------------------------------------------------------------------------ FineWeb


def test_fineweb_is_fetched_if_it_is_missing(checkout: Checkout, hub: None) -> None:
    checkout.stub(1).fineweb_is_missing(fetched=True)
    assert checkout.run()[0] == 0
    assert checkout.calls() == ["fineweb 18 --offline", "fineweb 18", "train"]


def test_a_failed_download_ends_the_run(checkout: Checkout, hub: None) -> None:
    """A full disk or a second download must not turn eight GPUs to the demo."""
    checkout.stub(1).fineweb_is_missing(fetched=False)
    assert checkout.run()[0] == 2
    assert checkout.calls() == ["fineweb 18 --offline", "fineweb 18"]


def test_without_network_the_embedded_default_takes_over(checkout: Checkout) -> None:
    checkout.stub(8).fineweb_is_missing(fetched=False)
    code, _, err = checkout.run("--seed", 2)
    assert code == 0 and "does not answer, so this is the embedded default" in err
    assert checkout.calls() == ["fineweb 18 --offline", "embedded", "train --preset demo --seed 2"]


# ------------------------------------------------------------------------------------------ set-up


def test_a_python_without_torch_gets_a_venv_once(bare: Checkout) -> None:
    assert bare.run()[0] == 0
    pip, *rest = bare.calls()
    assert pip.startswith("pip -m pip install") and "torch>=2.11,<3 numpy" in pip
    assert all(f" {name}>=" in pip for name in ("scipy", "matplotlib", "rich", "pyarrow"))
    assert rest == ["embedded", "train --preset demo"]
    assert bare.run()[0] == 0
    assert bare.calls() == rest


def test_a_venv_that_is_used_is_named_once_and_an_active_one_is_not(bare: Checkout) -> None:
    """Every other command of the README died on missing modules after ./run.sh."""
    advice = "packages are in .venv: run `source .venv/bin/activate` before other commands"
    for _ in range(2):
        code, _, err = bare.run()
        assert code == 0 and err.count(advice) == 1
    bare.env["VIRTUAL_ENV"] = str(bare.root / ".venv")
    assert advice not in bare.run()[2]


def test_a_python3_with_all_packages_needs_no_advice(checkout: Checkout) -> None:
    code, _, err = checkout.stub().run()
    assert code == 0 and "activate" not in err and not (checkout.root / ".venv").exists()


def test_an_interrupted_installation_is_made_anew(bare: Checkout) -> None:
    (bare.root / "pip_fails").touch()
    assert bare.run()[0] == 1
    assert len(bare.calls()) == 1
    (bare.root / "pip_fails").unlink()
    (bare.root / ".venv/half").touch()
    assert bare.run()[0] == 0
    assert bare.calls()[0].startswith("pip ")
    assert not (bare.root / ".venv/half").exists()


def test_a_venv_of_the_users_is_added_to(bare: Checkout) -> None:
    (bare.root / ".venv").mkdir()
    (bare.root / ".venv/mine").touch()
    (bare.root / "pip_fails").touch()
    assert bare.run()[0] == 1
    (bare.root / "pip_fails").unlink()
    assert bare.run()[0] == 0
    assert [call.split()[0] for call in bare.calls()] == ["pip", "pip", "embedded", "train"]
    assert (bare.root / ".venv/mine").exists()


def test_changed_requirements_are_installed(bare: Checkout) -> None:
    assert bare.run()[0] == 0
    with open(bare.root / "requirements.txt", "a") as file:
        file.write("another>=1  # for a test\n")
    bare.calls()
    assert bare.run()[0] == 0
    assert "another>=1 " in bare.calls()[0]


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")
def test_of_two_at_once_one_installs(bare: Checkout) -> None:
    both = [bare.start(bare.root / "run.sh") for _ in range(2)]
    for process in both:
        assert (process.communicate(timeout=100), process.returncode)[1] == 0
    assert sum(call.startswith("pip ") for call in bare.calls()) == 1


@pytest.mark.parametrize("gpu, answers", [(False, True), (False, False), (True, True)])
def test_torch_without_cuda_is_chosen_only_where_there_is_no_gpu(bare, gpu, answers) -> None:
    script(bare.bin / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    if answers:
        (bare.root / "pytorch_answers").touch()
    assert bare.run()[0] == 0
    expected = answers and not gpu and sys.platform == "linux"
    assert ("--extra-index-url https://download.pytorch.org/whl/cpu" in bare.calls()[0]) == expected


def test_a_torch_that_is_there_is_not_installed_again(checkout: Checkout) -> None:
    """PyTorch's own containers have torch but no huggingface_hub."""
    checkout.stub()
    with open(checkout.root / "requirements.txt", "a") as file:
        file.write("not-there>=1\n")
    process = checkout.start(
        "bash",
        "-c",
        "cd a*; . tools/setup.sh; setup torch; echo $python; setup 'torch|not-there'; echo $python",
    )
    assert process.communicate(timeout=100)[0].split() == ["python3", ".venv/bin/python"]
    assert re.search(r"/dev/stdin numpy\S* .* not-there>=1 $", checkout.calls()[0])
    outer = next(checkout.root.glob(".venv/lib/*/site-packages/outer.pth")).read_text().split()
    assert any(Path(folder, "torch").is_dir() for folder in outer)
    process = checkout.start("bash", "-c", "cd a*; PATH=$PWD/.venv/bin:$PATH; torchrun --x 'a b'")
    assert process.communicate(timeout=100) and process.returncode == 0
    assert checkout.calls() == ["torchrun --x a b"], "of .venv's python, which has the packages"


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0+cu130", "2.14.0.dev20261101", "3.0.0"])
def test_a_torch_that_fits_is_never_replaced(checkout: Checkout, version: str) -> None:
    """2.14 and later were replaced by 2.13, gigabytes of it."""
    checkout.stub()
    info = checkout.root / f"torch-{version}.dist-info/METADATA"
    script(info, f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    command = 'cd a*; . tools/setup.sh; export PYTHONPATH=$PWD; has "$(wanted | grep ^torch)"'
    process = checkout.start("bash", "-c", command)
    process.communicate(timeout=100)
    assert (process.returncode == 0) == (version != "3.0.0")


@pytest.mark.parametrize(
    "requirement, fulfilled",
    [
        ("pytest>=1", True),
        ("pytest>=1,<999", True),
        ("pytest>=999", False),
        ("pytest>=1,<2", False),
        ("not-there>=1", False),
    ],
)
def test_versions_are_compared(checkout: Checkout, requirement: str, fulfilled: bool) -> None:
    process = checkout.start("bash", "-c", f"cd a*; . tools/setup.sh; has '{requirement}'")
    process.communicate(timeout=100)
    assert (process.returncode == 0) == fulfilled


def test_an_old_python_is_refused_in_one_sentence(bare: Checkout) -> None:
    script(bare.bin / "python3", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    code, out, err = bare.run()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Python 3.11 or newer is needed, but python3 is Python 3.9.2" in err


def test_help_installs_nothing(bare: Checkout) -> None:
    shutil.copy(ROOT / "train_gpt.py", bare.root)
    shutil.rmtree(bare.root / "torch")
    code, out, _ = bare.run("--help")
    assert code == 0 and "./run.sh --preset prose" in out
    flags = [f for f in fields(Config) if f.metadata["help"]]
    lines = [line for line in out.splitlines() if line.startswith("  --")]
    assert len(lines) == len(flags) > 15
    for line, f in zip(lines, flags, strict=True):
        assert line.split()[0] == "--" + f.name.replace("_", "-")
        assert f" {f.metadata['help']} [" in line, "a field that run.sh's sed does not understand"
    assert any(line.endswith(" [3250]") for line in lines), "the default comes last"
    assert bare.calls() == [] and not (bare.root / ".venv").exists()


def test_requirements_and_pyproject_say_the_same() -> None:
    def ranges(lines: list[str]) -> dict[str, str]:
        return dict(re.match(r"([\w-]+)(\S*)", line).groups() for line in lines if line[0] != "#")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = ranges((ROOT / "requirements.txt").read_text().splitlines())
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        for name, limits in ranges(lines).items():
            assert required.get(name, limits) == limits
