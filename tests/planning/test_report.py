"""Tables as they are read."""

import pytest

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
