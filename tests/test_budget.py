"""What is not enforced grows: ceilings for files, functions and lines. Raise one on purpose.

Files are counted in tokens (names, operators, literals), because a line can be packed and a token
cannot. Ceilings were set 10% above what stood there.
"""

import ast
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = {
    "train_gpt.py": 4900,
    "models/__init__.py": 10,
    "models/ahead.py": 350,
    "models/gemm.py": 5370,
    "models/generate.py": 330,
    "models/graphs.py": 710,
    "models/head.py": 1290,
    "models/initial.py": 390,
    "models/microbatch.py": 850,
    "models/passes.py": 5450,
    "models/rotary.py": 230,
    "models/trunk.py": 1600,
    "models/world.py": 690,
    "optimizers/__init__.py": 440,
    "optimizers/averages.py": 1620,
    "optimizers/balance.py": 1000,
    "optimizers/buckets.py": 1480,
    "optimizers/checks.py": 710,
    "optimizers/contra.py": 470,
    "optimizers/diagnostics.py": 1780,
    "optimizers/gram.py": 850,
    "optimizers/lowbits.py": 200,
    "optimizers/polar.py": 1120,
    "optimizers/ranks.py": 830,
    "optimizers/recipes.py": 1830,
    "optimizers/reducer.py": 1860,
    "optimizers/replay.py": 540,
    "optimizers/riemannian.py": 870,
    "optimizers/schedules.py": 650,
    "optimizers/size.py": 510,
    "optimizers/slot.py": 4300,
    "optimizers/soap.py": 1120,
    "optimizers/split.py": 1360,
    "optimizers/state.py": 2000,
    "optimizers/symmetric.py": 1430,
    "optimizers/technique.py": 970,
    "optimizers/whole.py": 2420,
    "records/__init__.py": 10,
    "records/__main__.py": 270,
    "records/benches.py": 1820,
    "records/bundle.py": 660,
    "records/caveats.py": 1060,
    "records/checkpoint.py": 660,
    "records/compare.py": 1370,
    "records/crossing.py": 270,
    "records/figures.py": 1430,
    "records/findings.py": 740,
    "records/groups.py": 540,
    "records/history.py": 710,
    "records/log.py": 1540,
    "records/missing.py": 190,
    "records/options.py": 1770,
    "records/pack.py": 940,
    "records/pages.py": 1800,
    "records/plot.py": 2440,
    "records/progress.py": 660,
    "records/published.py": 1000,
    "records/record.py": 2000,
    "records/report.py": 850,
    "records/run.py": 720,
    "records/show.py": 1850,
    "records/stats.py": 900,
    "records/table.py": 490,
    "records/trackers.py": 490,
    "records/upstream.py": 2050,
    "records/verify.py": 1210,
    "records/writer.py": 2780,
    "data/__init__.py": 10,
    "data/cached_fineweb10B.py": 1290,
    "data/embedded.py": 880,
    "data/loader.py": 780,
    "data/shards.py": 1400,
    "data/tokenize_text.py": 2020,
    "tools/bench_optimizers.py": 2290,
    "tools/bench_trainer.py": 2540,
    "tools/exactness.py": 1250,
    "tools/export.py": 830,
    "tools/hellaswag.py": 1970,
    "tools/run_many.py": 2330,
    "tools/same_as.py": 1240,
    "tools/sample.py": 1100,
}
FILES = sorted(
    path
    for folder in (".", "models", "optimizers", "records", "data", "tools", "tests")
    for path in (ROOT / folder).glob("*.py")
)
PRODUCT = [path for path in FILES if path.parent.name != "tests"]
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
LAYOUT |= {tokenize.ENCODING, tokenize.ENDMARKER}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tokens_of(path: Path) -> int:
    """Count names, operators and literals. An f-string is one, as it is for Python 3.11."""
    count, depth = 0, 0
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            part = tokenize.tok_name[token.type]
            depth -= part == "FSTRING_END"
            count += not depth and token.type not in LAYOUT and part != "FSTRING_END"
            depth += part == "FSTRING_START"
    return count


@pytest.mark.parametrize("file, ceiling", CEILINGS.items())
def test_a_file_stays_below_its_ceiling(file: str, ceiling: int) -> None:
    assert tokens_of(ROOT / file) <= ceiling


def test_every_module_has_a_ceiling_and_every_ceiling_a_module() -> None:
    assert {name(path) for path in PRODUCT} == set(CEILINGS)


def test_the_trainer_has_at_most_500_lines() -> None:
    """Whoever opens it sees model, optimizer and loop in one file, and can read it to the end."""
    assert CEILINGS["train_gpt.py"] <= 4900
    assert (ROOT / "train_gpt.py").read_text().count("\n") <= 500


def test_tokens_are_counted_without_layout_and_f_strings_as_one(tmp_path: Path) -> None:
    (path := tmp_path / "a.py").write_text(
        '"""Two."""\n\n\ndef f(x):  # a comment\n    return f"{x:{4 + 5}} and {f(2)}" "text"\n'
    )
    assert tokens_of(path) == 1 + len("def f ( x ) :".split()) + len("return f-string text".split())


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_no_function_is_longer_than_50_lines(path: Path) -> None:
    """The signature counts as one: ruff gives each of a kernel's 20 arguments its own line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert 1 + node.end_lineno - node.body[0].lineno + 1 <= 50, node.name


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_line_is_longer_than_100_characters(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"{name(path)}:{number}"


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_trainer_has_at_most_26_flags() -> None:
    import train_gpt

    assert len([f for f in fields(train_gpt.Config) if f.metadata["help"]]) <= 26


def test_the_readme_stays_below_12_kilobytes() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 12 * 1024


def test_the_page_on_optimizers_stays_below_12_kilobytes() -> None:
    assert len((ROOT / "docs/optimizers.md").read_bytes()) < 12 * 1024
