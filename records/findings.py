"""Make the tables of what the prose runs show: gaps between two runs, and what became of neurons.

records.pages writes them into records/prose/README.md.
"""

import json
from pathlib import Path
from statistics import fmean

from records.figures import look
from records.log import parse_log
from records.table import markdown

APART = (  # one model: what differs between two runs, and the names of their logs; {}: optimizer
    ("1 and 2 GPUs", "{}_1xH200_seed1", "{}_2xH200_seed1"),
    ("1 and 8 GPUs", "gpus/{}_1x", "gpus/{}_8x"),
    ("8 GPUs, and 4 from step 375 on", "gpus/{}_8x", "gpus/{}_4x_resumed"),
    ("8 GPUs, and 8 after those 4", "gpus/{}_8x", "gpus/{}_8x_resumed"),
    ("resumed at 375 on 1 and 2 GPUs", "resumed/{}_1x_resumed", "resumed/{}_2x_resumed"),
    ("never stopped, and resumed at 375", "family/{}_seed1", "resumed/{}_1x_resumed"),
    ("bf16 and FP8", "fp8/{}_bf16", "fp8/{}_fp8"),
)
VERSIONS = (  # the same settings on one GPU, at two commits
    ("163c63b and 4aee012", "family/{}_seed1", "gpus/{}_1x"),
    ("163c63b and f92c162", "family/{}_seed1", "fp8/{}_bf16"),
    ("163c63b and 2e04f13", "family/{}_seed1", "gluon/{}"),
    ("4aee012 and f92c162", "gpus/{}_1x", "fp8/{}_bf16"),
    ("4aee012 and 2e04f13", "gpus/{}_1x", "gluon/{}"),
    ("f92c162 and 2e04f13", "fp8/{}_bf16", "gluon/{}"),
    ("2e04f13 and 4a056d5", "gluon/{}", "techniques/{}"),
)


def gaps_table(root: Path, pairs: tuple[tuple[str, str, str], ...]) -> str:
    """Return the largest gap between the losses of two runs, before step 500 and from it on."""
    folder, rows = root / "records/prose", []
    for what, *patterns in pairs:
        for optimizer in ("muon", "aurora"):
            names = [f"{pattern.format(optimizer)}.txt" for pattern in patterns]
            if not all((folder / name).is_file() for name in names):
                continue
            one, other = (parse_log(folder / name) for name in names)
            losses = {point.step: point.val_loss for point in one.points}
            gaps = {
                point.step: abs(point.val_loss - losses[point.step])
                for point in other.points
                if point.step in losses and point.step > 0
            }
            early = [gap for step, gap in gaps.items() if step < 500]
            late = [gap for step, gap in gaps.items() if step >= 500]
            cells = [f"{max(part):.5f}" if part else "-" for part in (early, late)]
            links = ", ".join(f"[log]({name})" for name in names)
            rows.append([what, look(optimizer)[0], *cells, links])
    header = ["runs", "optimizer", "largest gap before step 500", "from step 500 on", "logs"]
    return markdown(header, rows) if rows else "not measured yet\n"


def neurons_table(root: Path) -> str:
    """Return what the last update of each run did to MLP neurons, by its last `diag:` line."""
    rows = []
    for path in sorted((root / "records/prose/family").glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [line[6:] for line in lines if line.startswith('diag: {"')]
        if not found:
            continue
        diag = json.loads(found[-1])
        matrices = [
            [values for name, values in diag["matrices"].items() if f".{side}." in name]
            for side in ("fc", "proj")
        ]
        spread = [fmean(values["update"]["cv"] for values in side) for side in matrices]
        starving = [fmean(values["leverage"]["below"][0] for values in side) for side in matrices]
        silent = fmean(values["silent"] for values in diag["neurons"].values())
        cells = [*(f"{x:.3f}" for x in spread), *(f"{x:.3%}" for x in (*starving, silent))]
        rows.append([look(parse_log(path).meta["optimizer"])[0], *cells])
    header = [
        "optimizer",
        "CV of squared update norms, fc",
        "proj",
        "starving (leverage below 1/16), fc",
        "proj",
        "silent",
    ]
    return markdown(header, rows) if rows else "not measured yet\n"
