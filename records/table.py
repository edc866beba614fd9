"""Print tables in the terminal (rich) or as Markdown, from one header and rows of texts."""

import re
from collections.abc import Sequence

NUMERIC = re.compile(r"[\[(]?-?\d[\d.,/]*(?:e-?\d+)?[\]),]*")  # these words must not be broken


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | str | None, form: str) -> str:
    """Format a value; a dash if it is None or nan."""
    return "-" if value is None or value != value else format(value, form)  # nan != nan


def p_value(p: float) -> str:
    return "< 1e-99" if p < 1e-99 else number(p, ".2g")


def say(header: Sequence[str], rows: Sequence[Sequence[str]], as_markdown: bool = False) -> None:
    """Print a table without the columns that are all dashes. A pipe gets whole lines.

    Numbers are never broken, so a table may be wider than the terminal.
    """
    keep = [index for index in range(len(header)) if any(row[index] != "-" for row in rows)]
    header, rows = [header[i] for i in keep], [[row[i] for i in keep] for row in rows]
    if as_markdown:
        print(markdown(header, rows))
        return
    from rich import box  # imported here: Markdown needs the standard library only
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    widths: list[int] = []  # the least that break no number
    for title, *cells in zip(header, *rows, strict=True):
        words = [len(word) for cell in cells for word in cell.split() if NUMERIC.fullmatch(word)]
        widths.append(max([min(6, max(map(len, cells))), *words]))
        table.add_column(title, overflow="fold", min_width=widths[-1])
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 400
    console.width = max(console.width, sum(widths) + len(widths))
    console.print(table)
    console.print()
