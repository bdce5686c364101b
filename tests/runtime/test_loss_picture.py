"""loss.png: drawn from metrics.jsonl, rarely enough, and never the end of a run."""

import json
import math
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from launcher.config.output_files import FIGURE_TITLE
from launcher.runtime.metrics import loss_picture
from launcher.runtime.metrics.loss_picture import Curve, LossPicture, PlotAxis, pieces, value_axis
from tests.runtime.command import SMALL, launcher, trained

Rows = list[dict[str, float | int | None]]


def rows(*losses: float | None) -> Rows:
    return [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]


def written(folder: Path, lines: Rows) -> Path:
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_has_a_picture_and_a_resumed_run_a_new_one(tmp_path: Path) -> None:
    picture = tmp_path / "r" / "loss.png"
    run = ["training.steps=4", "training.validation_interval=2", "run.dir=r"]
    trained(*run, "training.stop_at=2", cwd=tmp_path)
    first = picture.read_bytes()
    assert Image.open(picture).info["Title"] == FIGURE_TITLE
    trained(*run, cwd=tmp_path)
    assert picture.read_bytes() != first
    assert not list(picture.parent.glob("*.tmp"))


def test_a_picture_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    picture = LossPicture(written(tmp_path, rows(2.0, 1.0)), "r")
    (tmp_path / "loss.png").mkdir()
    picture.close()
    note = picture.notes.pop()
    picture.close()
    assert picture.notes == []
    assert note.startswith("loss.png cannot be drawn (")
    assert note.endswith("; training continues")


def test_a_file_named_loss_png_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "loss.png").write_text("mine")
    done = launcher(*SMALL, "training.steps=1", "run.dir=r", cwd=tmp_path)
    assert done.returncode == 2
    assert "run.dir=r: holds loss.png, which would be overwritten" in done.stderr


def test_pictures_take_half_a_percent_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    clock = [1000.0]
    monkeypatch.setattr(loss_picture, "drawn", lambda *_: drawn.append(clock[0]) or b"")
    monkeypatch.setattr(loss_picture.time, "monotonic", lambda: clock[0])
    cost = iter(range(0, 10**6, 2))
    monkeypatch.setattr(loss_picture.time, "thread_time", lambda: float(next(cost)))  # a picture takes 2 s
    picture = LossPicture(written(tmp_path, rows(1.0)), "r")
    for _ in range(1000):
        clock[0] += 1.0
        picture.refresh({"step": 1, "val/loss": 1.0})
        if picture._thread:
            picture._thread.join()
    assert [b - a for a, b in pairwise(drawn)] == 2 * [400.0]


def test_a_row_without_validation_draws_once_a_minute(tmp_path: Path) -> None:
    picture = LossPicture(written(tmp_path, rows(1.0)), "r")
    picture.refresh({"step": 1})
    assert picture._thread is None
    picture._last -= 61
    picture.refresh({"step": 2})
    wait_until((tmp_path / "loss.png").exists)


def test_a_slow_disk_keeps_no_step_and_no_end_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(loss_picture, "drawn", lambda *_: release.wait(60) and b"")
    monkeypatch.setattr(loss_picture, "_PATIENCE", 0.1)
    picture = LossPicture(written(tmp_path, rows(1.0)), "r")
    begin = time.monotonic()
    for step in range(100):
        picture.refresh({"step": step, "val/loss": 1.0})
    picture.close()
    assert time.monotonic() - begin < 5
    release.set()


def test_the_last_rows_are_in_the_last_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    def noted(curves: dict[str, Curve], title: str) -> bytes:
        seen.append([*curves["train/loss"].values])
        return b""

    monkeypatch.setattr(loss_picture, "drawn", noted)
    metrics = written(tmp_path, [*rows(3.0, 2.0), {"step": 2, "train/loss": "x"}])  # type: ignore[dict-item]
    picture = LossPicture(metrics, "r")
    picture.refresh({"step": 2, "val/loss": 2.0})
    wait_until(lambda: len(seen) == 1)
    written(tmp_path, [{"step": 3, "train/loss": 1.0}])
    picture.close()
    assert seen[-1] == [3.0, 2.0, 1.0]


def test_long_runs_are_averaged_and_what_is_not_finite_stays_visible() -> None:
    curve = Curve()
    for step in range(1, 20_001):
        curve.add(step, math.nan if step == 10_000 else float(step))
    assert len(curve.steps) <= 2001
    assert len(list(pieces(curve))) == 2
    assert len(curve.finite()) == len(curve.steps) - 1
    assert curve.values[0] == pytest.approx(curve.steps[0] / 2 + 0.5)
    assert curve.steps == sorted(curve.steps)


def test_axes_have_round_ticks_within_them(subtests: pytest.Subtests) -> None:
    for values in (
        [1.0],
        [0.0],
        [-3.0, 5.0],
        [1e-9, 1.0],
        [1e12, 1.1e12],
        [2.0, 61.0],
        [1e-30, 1e30],
        [-1e30, 1e30],
        [],
    ):
        with subtests.test(values):
            axis = value_axis(values, 100, 0)
            ticks = axis.ticks(5)
            assert len(ticks) <= 11
            assert all(axis.low <= tick <= axis.high for tick in ticks)
            assert all(-1e-6 <= axis.place(value) <= 100 + 1e-6 for value in (*values, *ticks))
    assert value_axis([1.0, 100.0], 0, 1).is_log
    assert PlotAxis(0, 100, 0, 1).ticks(5) == [0, 20, 40, 60, 80, 100]


def test_every_kind_of_run_is_drawn(tmp_path: Path, subtests: pytest.Subtests) -> None:
    kinds: dict[str, Rows] = {
        "no rows": [],
        "only a validation": [{"step": 0, "val/loss": 2.0}],
        "one step": rows(1.0),
        "nothing finite": rows(None, None),
        "huge values": [{"step": 1, "train/loss": 1e308}, {"step": 2, "train/loss": -1e308}],
        "many steps": [{"step": 10**12, "train/loss": 1.0}, {"step": 10**12 + 1, "train/loss": 2.0}],
    }
    for number, (kind, lines) in enumerate(kinds.items()):
        with subtests.test(kind):
            folder = tmp_path / str(number)
            folder.mkdir()
            picture = LossPicture(written(folder, lines), "a\udcff name")
            picture.close()
            assert picture.notes == []
            assert Image.open(folder / "loss.png").size == (1000, 860)
