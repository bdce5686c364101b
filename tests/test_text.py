"""Sizes, counts, times and tables as people read them."""

import pytest

from launcher import text
from launcher.text import plain_table, print_table


def test_a_narrow_terminal_cuts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # taken for a terminal
    monkeypatch.setenv("COLUMNS", "40")
    table = plain_table("Wide")
    for number in range(16):
        table.add_column(f"column{number}", no_wrap=True)
    table.add_row(*(f"value-{number}" for number in range(16)))
    print_table(table)
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split() == [f"value-{number}" for number in range(16)]


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (text.size(22_600_000_000), "22.60 GB"),
        (text.size(99_995_000), "100 MB"),
        (text.size(12), "12.00 B"),
        (text.megabytes(0), "0"),
        (text.megabytes(1_234_567), "1.23"),
        (text.megabytes(123_456_789), "123.5"),
        (text.count(1_239_000_000), "1.24 B"),
        (text.count(12), "12"),
        (text.whole(1_234_567.6), "1,234,568"),
        (text.plural(1, "rank"), "1 rank"),
        (text.plural(2, "micro-batch", "es"), "2 micro-batches"),
        (text.duration(90), "1.5 minutes"),
        (text.duration(2.5), "2.5 seconds"),
        (text.duration(2 * text.DAY), "2 days"),
        (text.four_digits(0.123456), "0.1235"),
        (text.milliseconds(1.2345), "1,234"),
    ],
)
def test_numbers_read_as(formatted: str, expected: str) -> None:
    assert formatted == expected
