"""The bar of a terminal: loss, gradient norm, tokens/s and the time that is left."""

import io

import pytest
from rich.console import Console

from launcher.runtime import progress
from launcher.runtime.progress import ProgressDisplay

ROW = {"step": 101, "train/loss": 2.5, "train/grad_norm": 0.75, "perf/tokens_per_s": 12345.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_the_values_within_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(
        progress, "Console", lambda: Console(file=terminal, width=80, force_terminal=True, color_system=None)
    )
    display = ProgressDisplay(101, 200, visible=True)
    assert display._bar is not None
    [task] = display._bar.tasks
    assert (task.completed, task.total) == (100, 200), "a resumed run begins at its step"
    with display:
        display.step(101, ROW)
        display.step(102, None)
    assert task.completed == 102
    line = [text for text in terminal.getvalue().splitlines() if "102/200" in text][-1]
    assert "loss 2.5000  grad norm 0.750  12,345 tokens/s" in line
