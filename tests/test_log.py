"""A log holds the code that made it: grammar, replay in an empty folder, flatten, Weights & Biases.

Here the trainer that writes (train_gpt.py) meets the parser that reads (records/log.py).
"""

import ast
import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, in_fresh_python, on_ranks

import train_gpt
from records.log import RULE, Run, parse_log
from records.writer import flatten

Tiny = Callable[..., list[str]]
DEMO = (
    "--preset",
    "demo",
    "--device",
    "cpu",
    "--optimizer",
    "aurora",
    "--steps",
    "3",
    "--rows",
    "2",
    "--batch-tokens",
    "2048",
    "--val-tokens",
    "2048",
    "--val-every",
    "1",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
PACKAGES = ("data", "models", "optimizers", "records")
SOURCES = ["train_gpt.py", "data/loader.py"]
LOGGING = "checkpoint", "crossing", "missing", "options", "progress", "trackers", "writer"
SOURCES += [f"records/{name}.py" for name in LOGGING]
SOURCES += [f"optimizers/{path.name}" for path in (ROOT / "optimizers").glob("*.py")]
SOURCES += [f"models/{p.name}" for p in (ROOT / "models").glob("*.py") if p.name != "__init__.py"]


def launch(script: Path, corpus: Path, cwd: Path, size: int) -> tuple[str, Run, str]:
    """A real process, or `size` of them: what it printed, its log, and the log's loss column."""
    start = [str(script)] if size == 1 else [*TORCHRUN, f"--nproc_per_node={size}", str(script)]
    few = corpus / "few.json"  # the demo's sample of text takes longer than these steps
    few.write_text('{"preset": "demo", "sample_tokens": 20}')
    files = "--config", str(few), "--data", str(corpus), "--log-file", str(cwd / "log.txt")
    code, out, err = in_fresh_python(*start, *DEMO, *files, cwd=cwd)
    assert code == 0, err
    text = (cwd / "log.txt").read_text()
    column = "\n".join(re.findall(r"^step:\S+ val_loss:\S+", text, re.M))
    return out, parse_log(cwd / "log.txt"), column


@pytest.fixture(scope="module")
def original(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run, str]:
    return launch(ROOT / "train_gpt.py", corpus, tmp_path_factory.mktemp("original"), 1)


# ---- grammar ---------------------------------------------------------------------------------


def test_a_log_follows_its_grammar_line_by_line(original: tuple[str, Run, str]) -> None:
    lines = original[1].path.read_text().split("\n")
    first, second = (i for i, line in enumerate(lines) if line == RULE)
    environment, body = lines[first + 1 : second], lines[second + 1 :]
    assert re.fullmatch(r"Running PyTorch .* on cpu with world_size 1", environment[0])
    assert environment[-1].startswith('meta: {"') and body[-1] == ""
    validated = r"step:{}/3 val_loss:\d+\.\d{{5}} train_time:\d+\.\d{{3}}s step_avg:{}ms"
    shapes = [
        validated.format(0, "nan"),
        r'optim: {"step": 1, .*}',
        r'train: {"step": 1, "train_loss": \d.*}',
        validated.format(1, r"\d+\.\d\d"),
        r'train: {"step": 2, "train_loss": \d.*}',
        validated.format(2, r"\d+\.\d\d"),
        r'train: {"step": 3, "train_loss": \d.*}',
        validated.format(3, r"\d+\.\d\d"),
        r'end: {"status": "complete", .*}',
    ]
    assert len(body[:-1]) == len(shapes)
    for line, shape in zip(body[:-1], shapes, strict=True):
        assert re.fullmatch(shape, line), line


def test_the_parser_reads_what_the_trainer_writes(original: tuple[str, Run, str]) -> None:
    _, log, column = original
    assert log.status == "complete" and log.end["ranks_agree"] is True
    assert [point.step for point in log.points] == [0, 1, 2, 3]
    assert all(point.total_steps == 3 for point in log.points)
    times = [point.train_time_s for point in log.points]
    assert times[0] == 0 and sorted(times) == times and times[-1] > 0
    assert log.points[-1].step_avg_ms == pytest.approx(1000 * times[-1] / 3, abs=1)
    assert f"val_loss:{log.points[-1].val_loss:.5f}" in column.split("\n")[-1]
    assert log.points[0].val_loss == pytest.approx(math.log(257), abs=1.5e-5)
    assert log.points[3].val_loss < 5.5
    meta = log.meta
    assert (meta["optimizer"], meta["seed"], meta["world_size"]) == ("aurora", 1, 1)
    assert meta["config"]["batch_tokens"] == 2048 and meta["argv"][:2] == ["--preset", "demo"]
    assert re.fullmatch(r"[0-9a-f]{40}|unknown|", meta["commit"])
    assert {group["name"] for group in log.optim["groups"]} == {
        "embed",
        "head",
        "scalars",
        "attn",
        "fc",
        "proj",
    }


def test_the_optimizers_hyperparameters_are_in_the_log(original: tuple[str, Run, str]) -> None:
    """`optim:` is read back from the groups; it would have shown an ignored decay (MN#279)."""
    groups = {group["name"]: group for group in original[1].optim["groups"]}
    assert (
        groups["fc"].items()
        >= dict(
            optimizer="aurora",
            rounds=2,
            exponent=0.5,
            balance="both",
            neuron_axis=0,
            lr=0.025,
            weight_decay=0.05,
            momentum=0.95,
        ).items()
    )
    assert groups["embed"]["optimizer"] == "adamw" and groups["embed"]["weight_decay"] == 0.001


def test_the_hash_is_that_of_the_script_above_the_first_rule(
    original: tuple[str, Run, str],
) -> None:
    log = original[1]
    assert hashlib.sha256(log.script.encode()).hexdigest() == log.meta["code_sha256"]
    assert log.script == flatten(ROOT / "train_gpt.py")


def test_a_run_ends_with_a_sample_of_text_on_the_console_only(
    original: tuple[str, Run, str],
) -> None:
    out, log, _ = original
    assert "A sample of the model's text:\ndef " in out
    assert "A sample" not in log.path.read_text().split(RULE)[-1]
    assert f"the log is {log.path}\n" in out
    assert f"next: python -m records show {log.path}; " in out.splitlines()[-1]
    assert "optim: {" not in out and "end: {" not in out, "JSON goes to the file only"


# ---- replay ----------------------------------------------------------------------------------


def test_the_script_of_a_log_repeats_its_losses_in_an_empty_folder(
    original: tuple[str, Run, str], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "replay.py").write_text(original[1].script)
    _, log, column = launch(tmp_path / "replay.py", corpus, tmp_path, 1)
    assert column == original[2]
    assert log.script == original[1].script, "a log of a replay holds the same script"
    assert log.meta["commit"] == "unknown" and log.meta["dirty"] is None
    made = {path.name for path in tmp_path.iterdir()}
    assert made <= {"replay.py", "log.txt", "__pycache__"}


def test_torchrun_with_two_ranks_comes_near_the_losses_of_one(
    original: tuple[str, Run, str], corpus: Path, tmp_path: Path
) -> None:
    """They add in another order: 1e-3 after three steps in which the loss falls by 0.1 or more."""
    _, log, _ = launch(ROOT / "train_gpt.py", corpus, tmp_path, 2)
    assert log.meta["world_size"] == 2 and log.end["ranks_agree"] is True
    for two, one in zip(log.points, original[1].points, strict=True):
        assert two.val_loss == pytest.approx(one.val_loss, abs=1e-3)
    assert original[1].points[-1].val_loss < original[1].points[0].val_loss - 0.1


def script_on_rank(rank: int, size: int, script: str, argv: list[str]) -> int:
    """main() of the script at this path, on one of several ranks, with the tiny preset."""
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["script"] = module
    spec.loader.exec_module(module)
    module.PRESETS["tiny"] = TINY
    return module.main(argv)


def test_two_ranks_repeat_their_losses_from_the_script_of_their_log(
    tiny: Tiny, tmp_path: Path
) -> None:
    scripts, columns = [ROOT / "train_gpt.py", tmp_path / "replay.py"], []
    for script, name in zip(scripts, ("first.txt", "second.txt"), strict=True):
        argv = tiny("--optimizer", "aurora", "--steps", "6", "--log", str(tmp_path / name))
        assert on_ranks(2, script_on_rank, tmp_path / f"of {name}", str(script), argv) == [0, 0]
        log = parse_log(tmp_path / name)
        assert log.meta["world_size"] == 2 and log.end["ranks_agree"] is True
        columns.append([point.val_loss for point in log.points])
        scripts[1].write_text(log.script)
    assert columns[0] == columns[1] and columns[0][-1] < columns[0][0] - 0.1


# ---- flatten ---------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """The files of a flattened script, restored."""
    parts = re.split(r"^# =+ (\S+) =+\n", text, flags=re.M)
    assert parts[0] == ""
    bodies = (re.sub(r"^#\| ", "", body, flags=re.M) for body in parts[2::2])
    return dict(zip(parts[1::2], bodies, strict=True))


def test_the_sections_restore_every_file_byte_for_byte() -> None:
    found = sections(flatten(ROOT / "train_gpt.py"))
    assert list(found)[-1] == "train_gpt.py"
    assert set(found) == set(SOURCES)
    for name, text in found.items():
        assert text.encode() == (ROOT / name).read_bytes(), name


def test_flatten_is_idempotent(tmp_path: Path) -> None:
    flat = flatten(ROOT / "train_gpt.py")
    (tmp_path / "flat.py").write_text(flat)
    assert flatten(tmp_path / "flat.py") == flat


def write_tree(folder: Path, **files: str) -> Path:
    (folder / "package").mkdir()
    for name, text in files.items():
        path = folder / "main.py" if name == "main" else folder / "package" / f"{name}.py"
        path.write_text(text)
    return folder / "main.py"


def test_a_flattened_tree_runs_alone_with_each_module_once(tmp_path: Path) -> None:
    main = write_tree(
        tmp_path,
        __init__="from .a import f\nfrom .b import g\n",
        a="from .c import (\n    BASE,\n)\n\n\ndef f(x):\n    return BASE + x\n",
        b="from .c import BASE\n\n\ndef g(x):\n    return BASE * x\n",
        c="import math\n\nBASE = math.floor(10.5)\n",
        main="import json\n\nfrom package import f, g\n\nprint(json.dumps([f(1), g(2)]))\n",
    )
    flat = flatten(main)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "flat.py").write_text(flat)
    code, out, err = in_fresh_python("flat.py", cwd=alone)
    assert (code, out, err) == (0, "[11, 20]\n", "")
    assert flat.count("BASE = math.floor") == 1
    found = sections(flat)
    order = ["package/c.py", "package/a.py", "package/b.py", "package/__init__.py", "main.py"]
    assert list(found) == order
    assert all(found[name] == (tmp_path / name).read_text() for name in found)


@pytest.mark.parametrize(
    "again",
    ["def f(): ...", "class f: ...", "f = 1", "f, g = 1, 2", "f: int = 1"],
)
def test_a_name_of_two_modules_is_an_error(tmp_path: Path, again: str) -> None:
    """The later one would silently replace the earlier one in the flattened script."""
    main = write_tree(
        tmp_path,
        __init__="from .a import f\n",
        a="def f():\n    return 1\n",
        main=f"from package import f\n\n{again}\n",
    )
    with pytest.raises(ValueError, match="^f is .*a.py.* and .*main.py.*rename one"):
        flatten(main)


@pytest.mark.parametrize(
    "here, there",
    [
        ("from json import loads", "from marshal import loads"),
        ("from json import loads", "import marshal as loads"),
        ("from json import loads", "def loads(): ..."),
        (
            "try:\n    from json import loads\nexcept ImportError:\n    loads = None",
            "from marshal import loads",
        ),
        (
            "if True:\n    from json import loads",
            "try:\n    from marshal import loads\nexcept ImportError:\n    loads = None",
        ),
        ("import json", "json = {}"),
        (
            "try:\n    import no_such\nexcept ImportError:\n    loads = 1",
            "loads = 2",
        ),
    ],
)
def test_a_name_from_two_places_is_an_error(tmp_path: Path, here: str, there: str) -> None:
    """Both modules work alone. In one text the functions of the first find the second's name."""
    use = "from .a import f\n"
    body = f"{here}\n\n\ndef f():\n    return 1\n"
    main = write_tree(tmp_path, __init__=use, a=body, main=f"from package import f\n\n{there}\n")
    with pytest.raises(ValueError, match="^(loads|json) is .*a.py.* and .*main.py.*rename one"):
        flatten(main)


def test_what_two_modules_import_from_one_place_is_accepted(tmp_path: Path) -> None:
    """Also `import a` beside `import a.b`, which binds a as well, and a package that is missing."""
    missing = "try:\n    from no_such import thing\nexcept ImportError:\n    thing = None\n"
    main = write_tree(
        tmp_path,
        __init__="from .a import f\n",
        a=f"import os\nfrom json import dumps\n\n{missing}\n\ndef f():\n    return os.sep\n",
        main=f"import os.path\nfrom json import dumps\n\nfrom package import f\n\n{missing}\n"
        'print(dumps([f(), os.path.join("a", "b"), thing]))\n',
    )
    (alone := tmp_path / "alone").mkdir()
    (alone / "flat.py").write_text(flatten(main))
    code, out, err = in_fresh_python("flat.py", cwd=alone)
    assert (code, out, err) == (0, '["/", "a/b", null]\n', "")


@pytest.mark.parametrize(
    "how",
    [
        "from package import f as g",
        "from package.a import f as g",
        "import package",
        "import package.a as a",
        "import json, package.a",
        "def g():\n    from package import f",
        "try:\n    from package import f\nexcept ImportError:\n    f = None",
    ],
)
def test_an_own_import_that_cannot_be_a_comment_is_an_error(tmp_path: Path, how: str) -> None:
    """Alone, a script would not find the module, and in a try statement nobody would notice."""
    body = "def f():\n    return 1\n"
    main = write_tree(tmp_path, __init__="from .a import f\n", a=body, main=f"x = 1\n{how}\n")
    with pytest.raises(ValueError, match="main.py, line [23]: import own modules by from"):
        flatten(main)
    main.write_text("from package import f\n")
    assert "def f" in flatten(main)


def bound(path: Path) -> dict[str, str]:
    """Names bound at the top level of a file, and to what: the file, or what is imported."""
    names: dict[str, str] = {}

    def look(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                if node.level or node.module.partition(".")[0] in PACKAGES:
                    continue  # the name of another module of ours, bound there
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                for a in node.names:
                    top = a.name if a.asname else a.name.split(".")[0]
                    names[a.asname or top] = f"import {module} {top}"
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] = str(path)
            elif isinstance(node, ast.If | ast.Try):
                look([*node.body, *node.orelse])
            else:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                stored = [n for target in targets if target for n in ast.walk(target)]
                names.update({n.id: str(path) for n in stored if isinstance(n, ast.Name)})

    look(ast.parse(path.read_text()).body)
    return names


def test_no_top_level_name_means_two_things_in_the_flattened_script() -> None:
    """Also not an import in one module and a definition in another."""
    meaning: dict[str, str] = {}
    for name in SOURCES:
        for bound_name, what in bound(ROOT / name).items():
            assert meaning.setdefault(bound_name, what) == what, (bound_name, name)
    assert {"Aurora", "polar", "Trainer", "torch"} <= set(meaning)


def test_no_line_of_the_sources_looks_like_a_rule_or_a_mark_of_the_flattener() -> None:
    for name in SOURCES:
        for line in (ROOT / name).read_text().split("\n"):
            assert line != RULE and not line.startswith(("#| ", "# ===================="))
        assert (ROOT / name).read_text().endswith("\n")


def test_packages_import_nothing_that_flatten_cannot_follow() -> None:
    """torch, the standard library, and siblings relatively and without `as`."""
    for name in SOURCES[1:]:
        others = {"torch", "triton"}
        text = (ROOT / name).read_text()
        assert "__file__" not in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and not any(a.asname for a in node.names), name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = (
                    [getattr(node, "module", None)]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                )
                for module in modules:
                    top = module.split(".")[0]
                    assert top in others | set(sys.stdlib_module_names), (name, top)


def test_importing_the_trainer_starts_nothing(tmp_path: Path) -> None:
    check = (
        "import sys, train_gpt, torch, torch.distributed as dist\n"
        "assert not torch.cuda.is_initialized() and not dist.is_initialized()\n"
        "assert 'wandb' not in sys.modules\n"
    )
    code, out, err = in_fresh_python("-c", check, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (code, out, err) == (0, "", "") and list(tmp_path.iterdir()) == []


# ---- Weights & Biases ------------------------------------------------------------------------

FAKE = """
calls, pages = [], []


class Page:
    def __init__(self):
        self.summary = {}
        pages.append(self)

    def log(self, values, step):
        calls.append(("log", step, values))

    def finish(self):
        calls.append(("finish",))


class Error(Exception):
    pass


def setup():
    from types import SimpleNamespace

    return SimpleNamespace(settings=SimpleNamespace(mode="online"))


def login(prompt):
    return not prompt


def init(project, name, config):
    calls.append(("init", name, config["seed"]))
    return Page()
"""


def test_wandb_gets_a_page_for_each_trial_and_every_validation(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    spec = importlib.util.spec_from_file_location("wandb", tmp_path / "fake.py")
    wandb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wandb)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train_gpt.main(tiny("--wandb", "--trials", "2", "--log", "a.txt")) == 0
    inits = [call for call in wandb.calls if call[0] == "init"]
    assert inits == [("init", "a.seed1", 1), ("init", "a.seed2", 2)]
    assert [call[0] for call in wandb.calls] == 2 * ["init", *5 * ["log"], "finish"]
    assert all({"optim", "end"} == page.summary.keys() for page in wandb.pages)
    run, logged = parse_log("a.seed1.txt"), wandb.calls[1:6]
    validated = [(step, values) for _, step, values in logged if "val_loss" in values]
    for (step, values), point in zip(validated, run.points, strict=True):
        assert step == point.step
        assert values["val_loss"] == pytest.approx(point.val_loss, abs=1e-5)
    trained = [(step, values) for _, step, values in logged if "val_loss" not in values]
    for (step, values), line in zip(trained, run.extra["train"], strict=True):
        assert (step, values["train_loss"]) == (line["step"], line["train_loss"])
        assert values["lr/fc"] == line["lr"]["fc"] > 0 and values["grad_norm/embed"] > 0
    assert [step for _, step, _ in logged] == sorted(step for _, step, _ in logged)


def test_the_real_wandb_works_offline(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb to run this")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train_gpt.main(tiny("--wandb", "--log", "a.txt")) == 0
    assert parse_log("a.txt").status == "complete"
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_run_needs_no_wandb_unless_asked(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError
    assert train_gpt.main(tiny("--log", "a.txt")) == 0
    capsys.readouterr()
    assert train_gpt.main(tiny("--log", "b.txt", "--wandb")) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "b.txt").exists()


def test_a_log_is_written_as_it_happens(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed keeps what it had: every line is in the file before the next step."""
    seen: list[int] = []
    usual = train_gpt.train_batches

    def watched(*args: object) -> Iterator:
        for batch in usual(*args):
            text = Path("a.txt").read_text() if Path("a.txt").exists() else ""
            seen.append(text.count(" train_time:") - flat.count(" train_time:"))
            yield batch

    flat = flatten(ROOT / "train_gpt.py")
    monkeypatch.setattr(train_gpt, "train_batches", watched)
    assert train_gpt.main(tiny("--log", "a.txt")) == 0
    assert seen == [1, 1, 2, 2], "validations at 0 and 2 are there before steps 1 and 3"


def test_meta_is_json_with_every_field_of_the_config(tiny: Tiny) -> None:
    assert train_gpt.main(tiny("--steps", "1", "--log", "a.txt")) == 0
    meta = parse_log("a.txt").meta
    assert set(meta["config"]) == set(train_gpt.Config.__dataclass_fields__)
    assert meta["format"] == 1


def test_meta_says_which_settings_change_no_loss(tiny: Tiny) -> None:
    """Readers of logs group runs whose other settings are equal."""
    assert train_gpt.main(tiny("--steps", "1", "--log", "a.txt")) == 0
    free = parse_log("a.txt").meta["free"]
    assert free == [*train_gpt.Config().scoped("free")] and {"seed", "log", "device"} <= set(free)
    assert not {"steps", "optimizer", "width", "rows"} & set(free)


def test_meta_says_which_kernels_ran_and_why_not_the_fused_ones(tiny: Tiny) -> None:
    assert train_gpt.main(tiny("--steps", "1", "--log", "a.txt")) == 0
    kernels = parse_log("a.txt").meta["kernels"]
    assert kernels.keys() == {"trunk", "head", "optimizer"}
    assert kernels["trunk"] == "plain PyTorch: device cpu"
    assert kernels["head"] == "PyTorch: device cpu"
    assert kernels["optimizer"].startswith("eager, ") and "no CUDA device" in kernels["optimizer"]
    assert train_gpt.main(tiny("--steps", "1", "--no-compile", "--log", "b.txt")) == 0
    kernels = parse_log("b.txt").meta["kernels"]
    assert kernels["trunk"] == "plain PyTorch: --no-compile"
    assert kernels["optimizer"].startswith("eager")


def test_meta_says_so_where_the_trunk_is_fused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for kernels that no CPU runs."""

    def plainly(tokens, embed, norm1, blocks, norm2, cos, sin, fp8):
        x = norm1(torch.nn.functional.embedding(tokens, embed))
        for block in blocks:
            x = block(x, cos, sin)
        return norm2(x)

    columns = []
    for obstacle, name in (("", "a.txt"), ("too old a GPU", "b.txt")):
        monkeypatch.setattr(train_gpt, "trunk_obstacle", lambda *_, why=obstacle: why)
        monkeypatch.setattr(train_gpt, "fused_trunk", plainly)
        assert train_gpt.main(tiny("--steps", "2", "--log", name)) == 0
        columns.append([point.val_loss for point in parse_log(name).points])
    found = [parse_log(name).meta["kernels"]["trunk"] for name in ("a.txt", "b.txt")]
    assert found == ["fused", "plain PyTorch: too old a GPU"] and columns[0] == columns[1]
