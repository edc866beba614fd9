"""The commands of README.md and of the other pages: their files exist, and their flags are known.

Each command of a block of shell, and each one between backticks, is checked as it stands. Python
scripts are run up to the end of their parsing of arguments, torchrun's own flags by torchrun's own
parser, and the trainer's flags by train_gpt.parse_config. test_readme_runs.py runs README.md's.
"""

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, in_fresh_python
from torch.distributed.run import get_args_parser

import optimizers
import records.__main__ as records_main
import train_gpt
from optimizers import OPTIMIZERS, Muon
from records.verify import dead_links

PAGES = ["README.md", "CONTRIBUTING.md", "records/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
WRITTEN = {"submission.py"}  # a page's command on a file that an earlier command writes
PROGRAMS = ("python ", "torchrun ", "./", "pip ", "source ")


class Parsed(BaseException):
    """A script's arguments are right; it must not go on."""


def commands(page: str) -> list[str]:
    """Return the commands of a page in their order, without comments.

    A sentence may name a command without its arguments: it must at least have a --help.
    """
    found = []
    for block, inline in re.findall(r"^```sh\n(.*?)^```|`([^`\n]+)`", page, re.DOTALL | re.M):
        inline = re.sub(r"^(python (-m records \w+|tools/\w+\.py))$", r"\1 --help", inline)
        lines = block.replace("\\\n", " ").splitlines() or [inline] * inline.startswith(PROGRAMS)
        for line in lines:
            line = re.sub(r"(^|\s)#.*", "", line)
            found += [one.strip() for one in re.split(r"&&|;", line) if one.strip()]
    return found


def flags(page: str) -> set[str]:
    """Return the flags between backticks, such as `--rows` or `--set fc.lr=0.03`."""
    return set(re.findall(r"`(--[a-z][a-z-]*)[ =`]", page))


def mistake(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what is wrong with a command, or ""."""
    try:
        check(command, monkeypatch)
    except SystemExit as stop:
        return f"exit code {stop.code}" if stop.code else ""
    except (AssertionError, ValueError, KeyError, OSError) as error:
        return repr(error)
    return ""


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match shlex.split(command):
        case ["./run.sh", *words]:
            assert os.access(ROOT / "run.sh", os.X_OK)
            check_trainer(words, 1)
        case ["./test.sh", *words]:
            assert os.access(ROOT / "test.sh", os.X_OK)
        case ["source", path]:
            assert path == ".venv/bin/activate"
        case ["pip", "install", *words]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            some = project["optional-dependencies"]
            known = [*project["dependencies"], *some["tools"], *some["dev"]]
            names = {re.match(r"[\w-]+", line)[0] for line in known}
            assert {*words} <= names | {"."}
        case ["torchrun", *words]:
            given = get_args_parser().parse_args(words)
            assert given.nproc_per_node in ("2", "4", "8") and given.standalone
            if given.training_script == "train_gpt.py":
                check_trainer(given.training_script_args, int(given.nproc_per_node))
            else:
                check_script(given.training_script, given.training_script_args, monkeypatch)
        case ["python", "-m", "pytest", *_]:
            pass
        case ["python", "-m", "records", name, *words]:
            module = importlib.import_module(records_main.COMMANDS[name])
            with monkeypatch.context() as patch:
                patch.setattr(module, "run", lambda args: None)
                records_main.main([name, *words])
        case ["python", "-m", "records.pages", *words]:
            check_script("records/pages.py", words, monkeypatch)
        case ["python", "train_gpt.py", *words]:
            check_trainer(words, 1)
        case ["python", path, *words]:
            check_script(path, words, monkeypatch)
        case words:
            raise AssertionError(f"no such program: {words[0]}")


def check_trainer(words: list[str], world_size: int) -> None:
    """Check the trainer's arguments, without those that only a file could refuse."""
    words = [word.replace("{run}", "run") for word in words]
    if ">" in words:  # the shell's
        words = words[: words.index(">")]
    for flag in ("--config", "--eval"):  # files of the reader's own
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    if "--help" in words or "--print-config" in words:
        with pytest.raises(SystemExit) as left:
            train_gpt.parse_config(words)
        assert not left.value.code
        return
    config = train_gpt.parse_config(words)
    train_gpt.check_config(config, world_size)


def check_script(path: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script until its arguments are parsed; one without a parser takes no arguments."""
    if path in WRITTEN:
        return
    text = (ROOT / path).read_text(encoding="utf-8")
    if "argparse" not in text:
        assert not words
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args: object) -> None:
        parse(parser, *args)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [path, *words])
        patch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / path), run_name="__main__")
    if "--" in words:  # run_many.py
        check_trainer(words[words.index("--") + 1 :], 1)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_a_page_names_existing_files_and_known_flags(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "cubic", Muon)  # of docs/write_an_optimizer.md
    found = commands((ROOT / name).read_text(encoding="utf-8"))
    wrong = {command: what for command in found if (what := mistake(command, monkeypatch))}
    assert not wrong


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md")], ids=lambda path: path.name
)
def test_no_link_leads_to_nothing(path: Path) -> None:
    """`records verify` checks the pages of docs/ and records/ and the README."""
    assert not dead_links(path)


def test_the_readme_has_as_many_commands_as_we_think() -> None:
    """A check of commands that are not found would find nothing wrong."""
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found[:3] == ["./run.sh", "./test.sh", "source .venv/bin/activate"]
    assert "python data/embedded.py" in found and "python train_gpt.py --preset demo" in found
    assert "python tools/hellaswag.py run.pt" in found and len(found) > 20


@pytest.mark.parametrize("name", ["README.md", "docs/write_an_optimizer.md"])
def test_every_flag_that_a_page_names_alone_is_one_of_the_trainers(name: str) -> None:
    known = set()

    def note(parser: argparse.ArgumentParser, *args: object) -> argparse.Namespace:
        known.update(flag for action in parser._actions for flag in action.option_strings)
        return argparse.Namespace()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        train_gpt.parse_config([])
    assert flags("`--rows` and `--set fc.lr=0.03`") == {"--rows", "--set"}
    found = flags((ROOT / name).read_text(encoding="utf-8"))
    assert found and found <= known


@pytest.mark.parametrize(
    "wrong",
    [
        "python train_gpt.py --optimzer muon",
        "python train_gpt.py --preset mine",
        "torchrun --standalone --nproc_per_node=3 train_gpt.py",
        "torchrun --standalone --nproc_per_node=8 train_gpt.py --seeds 1",
        "python data/none.py",
        "python data/embedded.py --now",
        "python data/shards.py check data/mine",
        "python -m records shw logs/",
        "python -m records compare --stp 3 mine/",
        "python tools/run_many.py --optimizers muon --seeds 1 -- --sed 3",
        "python tools/run_many.py --optimisers muon --seeds 1",
        "python tools/sample.py",
        "./run.sh --trial 2",
        "pip install matplotib",
        "pyhton train_gpt.py",
    ],
)
def test_a_wrong_command_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mistake(wrong, monkeypatch)


def test_the_version_is_that_of_the_changelogs_newest_heading() -> None:
    """pyproject.toml stayed at the version before. An unreleased version ends with .dev0."""
    version = optimizers.__version__
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert version.replace(".dev0", " (unreleased)") == newest


SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "data")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)


@pytest.mark.parametrize("words", [*SCRIPTS, "-m records show", "-m records.pages"])
def test_a_missing_package_is_one_sentence(words: str) -> None:
    """It was a traceback: nothing said where ./run.sh had put the packages. -S hides them all."""
    code, out, err = in_fresh_python("-S", *words.split(), cwd=ROOT)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    name = re.search(r" has no (\w+): run `source .venv/bin/activate`, or ./run.sh if ", err)[1]
    assert err.endswith(f"or `pip install {name}`\n") and name in {"numpy", "scipy", "torch"}


def test_another_error_keeps_its_traceback() -> None:
    """A module of ours that is missing is our mistake, and no package."""
    for wrong, name in (("1 / 0", "ZeroDivisionError"), ("import records.no", "'records.no'")):
        script = f"from records.missing import explain_missing as e; e(); {wrong}"
        code, _, err = in_fresh_python("-S", "-c", script, cwd=ROOT)
        assert code == 1 and err.startswith("Traceback") and name in err
