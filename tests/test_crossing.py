"""One function finds crossings for the trainer's `target:` line and for the readers of logs."""

import ast
import math
import sys

import pytest
from conftest import ROOT

from records.crossing import Crossing, crossing


def test_a_crossing_lies_between_the_points_around_the_target() -> None:
    points = [(0, 11.0, 0.0), (100, 4.0, 50.0), (200, 3.0, 90.0), (300, 2.9, 120.0)]
    assert crossing(points, 3.25) == Crossing(200, 90.0, 175.0, 80.0)
    assert crossing(points, 3.25).point == (175.0, 80.0)
    assert crossing(points, 3.0).point == (200.0, 90.0)
    assert crossing(points, 2.8) is None and crossing(points, math.nan) is None
    assert crossing([], 3.0) is None


@pytest.mark.parametrize("before", [[], [(5, math.inf, 1.0)], [(5, math.nan, 1.0)]])
def test_a_crossing_that_nobody_saw_is_the_validation_itself(before: list) -> None:
    found = crossing([*before, (10, 2.0, 3.0)], 2.5)
    assert found[:2] == found.point == (10, 3.0)
    assert math.isnan(found.exact_step) and math.isnan(found.exact_seconds)


def test_the_module_can_be_flattened_into_a_log() -> None:
    tree = ast.parse((ROOT / "records/crossing.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {name.name for node in imports for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names
