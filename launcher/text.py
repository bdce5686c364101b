"""Sizes, numbers and tables as people read them."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

FILE_WIDTH = 130  # columns of a table that is not written to a terminal
DAY = 86400

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def size(of: float) -> str:
    """Bytes, in the unit that suits them: `22.6 GB`."""
    unit = unit_of(of)
    return f"{in_unit(unit, of)} {unit[1]}"


def unit_of(of: float) -> tuple[float, str]:
    return next((unit for unit in UNITS if of >= unit[0]), UNITS[-1])


def in_unit(unit: tuple[float, str], of: float) -> str:
    number = of / unit[0]
    return f"{number:.2f}" if number < 99.995 else f"{number:,.0f}"


def count(number: float) -> str:
    """Three digits and a prefix: `1.24 B`."""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    for unit, size in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def print_table(table: Table) -> None:
    """And an empty line."""
    console = Console(highlight=False)
    # What is wider than a narrow terminal runs over its edge; nothing of it is cut.
    least = Measurement.get(console, console.options.update(width=10**4), table).minimum
    console.width = max(console.width if console.is_terminal else FILE_WIDTH, least)
    console.print(table)
    print()
