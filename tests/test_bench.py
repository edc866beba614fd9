"""The benches run on the CPU through the same code, and what they print is what a GPU would add."""

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


def last_line(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_bench_measures_a_small_preset_with_one_and_two_ranks(tmp_path, ranks):
    """Once it read an attribute that the trainer had lost, and a device run came back empty."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    small = "--preset demo --batch-tokens 1024 --val-tokens 1024 --rows 2".split()
    out, trace = tmp_path / "trainer.jsonl", tmp_path / "trainer.trace.json.gz"
    launcher = [sys.executable, *(torchrun if ranks == 2 else [])]
    command = [*launcher, str(ROOT / "tools/bench_trainer.py"), *small]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--bench-steps", "2", "--out", str(out), "--profile", "1"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    head, *table, _ = done.stdout.splitlines()
    assert head.endswith(f"ms of kernels in a step, the trace is {trace}")
    assert len(table) == 16 and any(row.endswith("aten::addmm") for row in table)
    assert len(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]) > 100
    line = last_line(out)
    assert (line["bench"], line["gpus"], line["preset"]) == ("trainer", ranks, "demo")
    assert line["microbatch_rows"] == 2 and line["graphs"] is False
    assert 0 < line["optimizer_ms"] < line["step_ms"]
    assert line["ranks_agree"] is True and line["steps"] == 4
    assert abs(line["comm_ms"]) < line["step_ms"] and (line["comm_ms"] != 0) == (ranks == 2)
    matrices = 4 * 12 * 128 * 128 * 4  # 4 layers, fp32: half of it is sent twice, none alone
    assert line["bytes_per_rank"] == (matrices if ranks == 2 else 0)
    assert line["tokens_per_s"] == pytest.approx(1024 / line["step_ms"] * 1000, rel=1e-3)


def test_the_trainer_bench_measures_how_a_step_grows(tmp_path):
    """With the MLP's expansion at the preset's width, then with the width at expansion 4."""
    out = tmp_path / "trainer.jsonl"
    command = [sys.executable, str(ROOT / "tools/bench_trainer.py"), "--out", str(out)]
    small = "--preset demo --batch-tokens 512 --val-tokens 512 --rows 2 --bench-steps 1"
    sizes = "--expansions 1 8 --widths 64"
    done = subprocess.run(
        [*command, *small.split(), *sizes.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["expansion"], line["width"]) for line in lines] == [(1, 128), (8, 128), (4, 64)]
    assert all(line["bench"] == "growth" and "start_s" not in line for line in lines)
    assert all(0 < line["optimizer_share"] < 1 for line in lines)
    assert lines[0]["step_ms"] < lines[1]["step_ms"] > lines[2]["step_ms"]
    assert all(sizes in line["command"] and line["peak_gib"] == 0 for line in lines)


def test_a_profile_lists_what_ran_on_the_device_by_time_in_a_step(monkeypatch):
    """Annotations span other kernels: counting them would count those twice."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_trainer as bench
    from torch.autograd import DeviceType

    def event(key: str, kind: DeviceType, us: float, count: int, note: bool = False):
        times = dict(self_device_time_total=us, self_cpu_time_total=us)
        return SimpleNamespace(
            key=key, device_type=kind, count=count, is_user_annotation=note, **times
        )

    events = [
        event("gemm", DeviceType.CUDA, 3000, 6),
        event("norm", DeviceType.CUDA, 5000, 2),
        event("step", DeviceType.CUDA, 9000, 2, note=True),
        event("aten", DeviceType.CPU, 800, 4),
    ]
    rows = bench.kernel_rows(events, steps=2, on_gpu=True)
    assert rows == [(2.5, 1.0, "norm"), (1.5, 3.0, "gemm")]
    assert bench.kernel_rows(events, steps=2, on_gpu=False) == [(0.4, 2.0, "aten")]


def test_the_optimizer_bench_says_how_exact_and_how_even_each_direction_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_optimizers as bench
    import torch

    shapes = dict(fc=(96, 24), proj=(24, 96), attn=(24, 24))
    draws = torch.Generator().manual_seed(0)
    real = {name: torch.randn(*shape, generator=draws) for name, shape in shapes.items()}
    rows = {
        name: bench.measure(name, "tiny", torch.device("cpu"), 3, real)
        for name in ("muon", "aurora", "aurora, quintic12", "adamw", "torch.optim.Muon")
    }
    assert all(row["ms"] > 0 for row in rows.values())
    assert rows["aurora"]["rms_sigma"] < 0.005 > rows["aurora, quintic12"]["rms_sigma"]
    for key in ("row_sq_cv", "real_sq_cv"):
        assert rows["aurora"][key] < rows["muon"][key] / 3
        assert rows["aurora"][key] < 1.01 * rows["aurora, quintic12"][key]
    assert "rms_sigma" not in rows["adamw"]


@pytest.mark.parametrize("name", ["bench_optimizers", "bench_trainer", "exactness"])
def test_without_out_a_bench_leaves_the_committed_files_alone(name, monkeypatch):
    """It appended to records/bench, and `python -m records verify` failed from then on."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    seen = []

    def parsed(parser, *_):
        seen.append(parser.get_default("out"))
        raise SystemExit

    for method in ("parse_args", "parse_known_args"):
        monkeypatch.setattr("argparse.ArgumentParser." + method, parsed)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    assert [path.parent for path in seen] == [ROOT / "logs/bench"]


def test_memory_that_graphs_keep_is_counted_by_pool(monkeypatch):
    """It is free for no one else, though nothing in it counts as allocated between steps."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_optimizers as bench
    import torch

    sizes = [((0, 0), 100), ((0, 1), 20), ((0, 2), 3), ((0, 1), 4)]
    snapshot = [dict(segment_pool_id=pool, total_size=size) for pool, size in sizes]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    assert bench.reserved_by_graphs() == {(0, 1): 24, (0, 2): 3}


def test_the_optimizer_bench_says_when_it_left_rows_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_optimizers as bench

    monkeypatch.setattr(bench, "measure", lambda name, *_: {"name": name})
    some = ["--only", "adamw", "muon, quintic12"]
    for more in ([], some):
        monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path / "out"), *more])
        bench.main()
    first, second = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert first["command"] == "python tools/bench_optimizers.py" and len(first["rows"]) > 6
    assert second["command"] == first["command"] + " --only adamw 'muon, quintic12'"
    assert [row["name"] for row in second["rows"]] == some[1:]


def test_exactness_appends_one_line_a_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import exactness

    monkeypatch.setattr(exactness, "CONDITIONS", (10, 3000))
    monkeypatch.setattr(exactness, "PARITY", {"tall or wide": (((9, 3), 0),)})
    measure = exactness.polar_rows
    monkeypatch.setattr(exactness, "polar_rows", lambda m, n, device: measure(24, 6, device))
    out = tmp_path / "exactness.jsonl"
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--out", str(out)])
    exactness.main()
    polar, parity = map(json.loads, out.read_text().splitlines())
    assert (polar["bench"], parity["bench"]) == ("polar", "parity")
    assert len(polar["rows"]) == 5 * 3 + 2 + 1 and len(parity["rows"]) == 6
    first, *_, last = polar["rows"]
    assert first["method"] == "quintic12" and last["method"] == "exact"
    mild, hard = ([float(x) for x in first[c].split(" / ")] for c in ("10", "3000"))
    assert max(mild) < 0.02 and hard[1] > 0.1
    assert all(row["float64, tall or wide"] < 1e-12 for row in parity["rows"])
    assert all(1e-8 < row["float32, tall or wide"] < 1e-3 for row in parity["rows"])
