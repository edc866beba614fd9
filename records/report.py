"""Write one HTML file about runs: `python -m records report PATHS... --out report.html`.

It holds statistics, pictures and a table of all runs, and needs no network and no script. PATHS are
those of plot; runs that differ only in the seed form a group, and each group is compared with those
that come after it. (`python -m records.pages` writes the
tables of this repository.)
"""

from argparse import ArgumentParser, Namespace
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from records.caveats import check_repeats, warnings
from records.compare import against_table, loss_table, target_table
from records.figures import rendered
from records.groups import Group, group, target_of
from records.plot import check_folder, history, pictures, read_groups
from records.show import read_back, run_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; display: block; font-size: 13px; overflow-x: auto; }
td, th { border-bottom: 1px solid #ccc; padding: .3em .7em; text-align: left; }
img { height: auto; max-width: 100%; }
"""
TITLES = {
    "loss_steps": "Validation loss against steps",
    "loss_time": "Validation loss against time",
    "steps_to_target": "Steps to the target",
    "step_time": "Time of a step",
    "diagnostics": "Neurons of the MLP",
    "history": "Published entries of track 3",
    "published_curves": "Mean loss of the published entries that set a record",
}


def page(title: str, parts: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table without the columns that are all dashes, as in the terminal."""
    keep = [index for index in range(len(header)) if any(row[index] != "-" for row in rows)]
    header, rows = [header[i] for i in keep], [[row[i] for i in keep] for row in rows]
    lines = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line)
        for tag, line in (("th", header), *(("td", row) for row in rows))
    ]
    return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def picture(name: str, figure: Any) -> str:
    data = b64encode(rendered(figure, "svg")).decode()
    title = escape(TITLES[name])
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/svg+xml;base64,{data}">'


def statistics(groups: list[Group], target: float | None) -> list[str]:
    """Return the HTML of means, rules, crossings and pairs; ValueError if a run counts twice."""
    if target is None:
        return ["<p>These logs name no target, so there are no statistics; see --target.</p>"]
    check_repeats(groups)
    sized = [(one, one.last_step()) for one in groups]
    tables = {
        "Loss at one step": loss_table(sized, target),
        f"Steps and seconds to {target:g}": target_table(groups, target),
    }
    tables |= {"Each pair of groups": against_table(sized, target)} if len(groups) > 1 else {}
    caveats = "".join(f"<li>{escape(warning)}</li>" for warning in warnings(sized, target))
    return [
        "<h2>Statistics</h2>",
        *(f"<h3>{escape(title)}</h3>\n{table(*one)}" for title, one in tables.items()),
        *([f"<h3>Caveats</h3>\n<ul>{caveats}</ul>"] if caveats else []),
    ]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", help="logs, folders, track_3#36 or track_3")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file")
    parser.add_argument("--target", type=float, help="the loss to reach (default: the logs' own)")
    parser.add_argument("--title", default="Runs")


def run(args: Namespace) -> None:
    check_folder(args.out.absolute().parent)
    if args.out.is_dir():
        raise ValueError(
            f"--out: {args.out} is a folder, expected the name of an HTML file; "
            f"write {args.out / 'report.html'}"
        )
    names = [name for name in args.paths if name != "track_3"]
    groups, parts, drawn = read_groups(names), [], {}
    if groups:
        target = target_of(groups, args.target)
        drawn = pictures({one.name: one.runs for one in groups}, target)
        parts = statistics(groups, target)
    drawn |= history() if "track_3" in args.paths else {}
    parts += [picture(name, figure) for name, figure in drawn.items()]
    if groups:  # this table lists incomplete runs, too
        every = [group(name) for name in names]
        parts += ["<h2>Runs</h2>", table(*run_table(every, target))]
        parts += [f"<p>{escape(line)}</p>" for line in read_back(every)]
    text = page(args.title, parts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(args.out)
