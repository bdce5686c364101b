"""A benchmark without rounds would end in an error only after it has measured."""

from collections.abc import Callable
from functools import partial

import pytest

from benchmarks import calibration, ring_attention
from benchmarks.contest import command
from benchmarks.cpu import CPU

COMMANDS: list[Callable[[list[str]], object]] = [
    calibration.parsed,
    ring_attention.main,
    partial(command.parsed, CPU),
]


@pytest.mark.parametrize("parsed", COMMANDS, ids=["calibration", "ring_attention", "cpu"])
@pytest.mark.parametrize("rounds", ["0", "-1", "1.5", "²", "a"])
def test_rounds_are_at_least_one(
    parsed: Callable[[list[str]], object], rounds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed([f"--rounds={rounds}"])
    assert f"argument --rounds: {rounds} is not an integer of at least 1" in capsys.readouterr().err
