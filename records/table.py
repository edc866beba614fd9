"""Tables for the terminal (rich) and for Markdown, from the same header and rows of texts."""

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | str | None, form: str) -> str:
    """The value in this format, or a dash where it is unknown."""
    return "-" if value is None or value != value else format(value, form)  # nan != nan


def p_value(p: float) -> str:
    return "< 1e-99" if p < 1e-99 else number(p, ".2g")


def say(header: Sequence[str], rows: Sequence[Sequence[str]], as_markdown: bool = False) -> None:
    """Print a table without the columns that are all dashes; a pipe gets whole lines."""
    keep = [index for index in range(len(header)) if any(row[index] != "-" for row in rows)]
    header, rows = [header[i] for i in keep], [[row[i] for i in keep] for row in rows]
    if as_markdown:
        print(markdown(header, rows))
        return
    from rich import box  # here, so that Markdown needs the standard library only
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title, *cells in zip(header, *rows, strict=True):
        table.add_column(title, overflow="fold", min_width=min(6, max(map(len, cells))))
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 400
    console.print(table)
    console.print()
