"""Format sizes, counts, times and tables for people. Importing this loads nothing heavy."""

import json
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes a while to load, and a refusal needs no table
    from rich.table import Table

FILE_WIDTH = 130  # columns of a table that is not written to a terminal
DAY = 86400

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def size(number: float) -> str:
    """Return bytes in a suitable unit: `22.6 GB`."""
    unit = unit_of(number)
    return f"{in_unit(unit, number)} {unit[1]}"


def unit_of(number: float) -> tuple[float, str]:
    """Return the largest unit that gives `number` bytes a value of at least 1."""
    return next((unit for unit in UNITS if number >= unit[0]), UNITS[-1])


def in_unit(unit: tuple[float, str], number: float) -> str:
    """Return bytes as a number of the given unit, for a table whose heading names the unit."""
    value = number / unit[0]
    return f"{value:.2f}" if value < 99.995 else f"{value:,.0f}"


def megabytes(number: float) -> str:
    """Return bytes as a number of MB, for a table whose heading names the unit."""
    return f"{number / 1e6:,.{1 if number >= 1e8 else 2}f}" if number else "0"


def count(number: float) -> str:
    """Return three digits and a prefix: `1.24 B`."""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:.3g}"


def whole(number: float) -> str:
    """Return all digits of the nearest whole number: `1,234,567`."""
    return f"{number:,.0f}"


def plural(number: int, noun: str, ending: str = "s") -> str:
    """Return the number and its noun: `1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else ending}"


def ranks_on_hosts(ranks: list[int], hosts: Sequence[str]) -> str:
    """Return up to eight ranks with their hosts: `rank 1 on node0`; `hosts` are those of all ranks."""
    shown = [f"{rank} on {hosts[rank]}" for rank in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(shown)}{more}"


def duration(seconds: float) -> str:
    """Return a time in a suitable unit: `3.5 hours`."""
    for unit, length in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def four_digits(seconds: float) -> str:
    return f"{seconds:.4g}"


def milliseconds(seconds: float) -> str:
    """Return seconds as a number of ms, for a table whose heading names the unit."""
    return whole(seconds * 1e3)


def printable(value: object) -> str:
    """Return the text with `?` for the bytes of a path that are no text, which print refuses."""
    return str(value).encode(errors="replace").decode()


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int]) -> list[str]:
    """Return a line per row with columns of equal width, those of `right` aligned to the right.

    Unlike a table of rich, no line is wrapped or cut, so that programs can read them.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if index in right else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plain_table(title: str) -> "Table":
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def print_table(table: "Table") -> None:
    """Print the table and an empty line."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    # A table that is wider than a narrow terminal runs over the edge instead of being cut.
    least = Measurement.get(console, console.options.update(width=10**4), table).minimum
    console.width = max(console.width if console.is_terminal else FILE_WIDTH, least)
    console.print(table)
    print()


def json_text(value: object, indent: int | None = None) -> str:
    """Return the value as JSON, in which NaN and infinities are null: JSON has no other word for them."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
