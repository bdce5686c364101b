"""loss.png: loss, validation loss, gradient norm and tokens/s over the steps of a run.

Drawn with Pillow, which every installation has: a picture takes about 0.1 s, a tenth of importing matplotlib.
A thread draws; pictures are so far apart that drawing takes at most 0.5% of the time.
"""

import io
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10, nan
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.output_files import FIGURE_TITLE
from launcher.files import replacing
from launcher.runtime.metrics.rows import Row, rows_in
from launcher.runtime.run_dir import PICTURE
from launcher.text import count, printable, whole

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_SHARE = 1 / 200  # of the time
_EVERY = 60.0  # seconds between pictures of a run that is not validated
_PATIENCE = 10.0  # seconds to wait at the end of a run for a disk that does not answer
_MOST_POINTS = 2000  # of a curve; an even number
_SIZE, _SCALE = (1000, 860), 2  # drawn in double size and halved, so that lines are smooth
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 84, 40, 72, 40, 34  # margins in points of the picture
_INK, _GRID, _NAN = "#333333", "#dddddd", "#c44e52"
# Each panel: its name, its share of the height, its metrics with their colours and names.
_PANELS = (
    ("loss", 0.5, {"train/loss": ("#4c72b0", "training"), "val/loss": ("#dd8452", "validation")}),
    ("gradient norm", 0.25, {"train/grad_norm": ("#55a868", "")}),
    ("tokens/s", 0.25, {"perf/tokens_per_s": ("#8172b3", "")}),
)
_METRICS = [name for _, _, metrics in _PANELS for name in metrics]
_FEW = 40  # points of a curve that are also drawn as dots
_LARGEST = 1e30  # a greater value is drawn like NaN: differences of values must be finite
_LOGARITHMIC = 30.0  # a greater ratio of largest and smallest value is drawn on a logarithmic axis


@dataclass
class Curve:
    """Points of a metric, fewer than _MOST_POINTS: then neighbours are averaged."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    _width: int = 1  # values that a point averages
    _waiting: list[tuple[float, float]] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        is_small = abs(value) < 1 / _LARGEST
        self._waiting.append((step, nan if not abs(value) < _LARGEST else 0.0 if is_small else value))
        if len(self._waiting) < self._width:
            return
        self._append(self._waiting)
        self._waiting = []
        if len(self.steps) == _MOST_POINTS:
            points = list(zip(self.steps, self.values, strict=True))
            self.steps, self.values, self._width = [], [], 2 * self._width
            for index in range(0, _MOST_POINTS, 2):
                self._append(points[index : index + 2])

    def _append(self, points: Sequence[tuple[float, float]]) -> None:
        self.steps.append(points[-1][0])
        self.values.append(sum(value for _, value in points) / len(points))

    def finite(self) -> list[float]:
        return [value for value in self.values if isfinite(value)]


class LossPicture:
    """Refreshes the picture of a run from its metrics.jsonl, in a thread. `notes` are for the user."""

    def __init__(self, metrics: Path, title: str) -> None:
        self.notes: list[str] = []
        self._metrics, self._title, self._position = metrics, title, 0
        self._curves = {name: Curve() for name in _METRICS}
        self._thread: threading.Thread | None = None
        self._is_lost = False
        self._first_seen: os.stat_result | None = None
        self._next, self._last = 0.0, time.monotonic()

    def refresh(self, row: Row) -> None:
        """Draw after this row, if a picture is due; never wait."""
        now = time.monotonic()
        is_due = now >= self._next and ("val/loss" in row or now >= self._last + _EVERY)
        if is_due and (self._thread is None or not self._thread.is_alive()):
            self._start()

    def close(self) -> None:
        """Draw the last picture, for a bounded time."""
        for is_last in (False, True):
            if is_last:
                self._start()
            if self._thread is not None:
                self._thread.join(_PATIENCE)
                if self._thread.is_alive():
                    return

    def _start(self) -> None:
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=PICTURE, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        begin = time.thread_time()
        try:
            if self._is_replaced():
                return
            self._read()
            content = drawn(self._curves, self._title)
            if not self._is_replaced():
                with replacing(self._metrics.with_name(PICTURE)) as aside:
                    aside.write_bytes(content)
        except Exception as error:
            if not self._is_lost:
                self.notes.append(f"{PICTURE} cannot be drawn ({error}); training continues")
            self._is_lost = True
        self._next = time.monotonic() + (time.thread_time() - begin) / _SHARE

    def _is_replaced(self) -> bool:
        """Return whether metrics.jsonl was removed or replaced: the directory may belong to another run."""
        try:
            state = self._metrics.stat()
        except FileNotFoundError:
            return True
        self._first_seen = self._first_seen or state
        return not os.path.samestat(state, self._first_seen)

    def _read(self) -> None:
        """Add the rows that the file has since the last picture."""
        if not self._metrics.is_file():
            return
        end = self._metrics.stat().st_size
        for row in rows_in(self._metrics, end, start=self._position):
            for name, curve in self._curves.items():
                if isinstance(row.get(name), int | float):
                    curve.add(row["step"], row[name])
        self._position = end


@dataclass(frozen=True)
class PlotAxis:
    """Maps values from `low` to `high` to points from `begin` to `end`, also on a logarithmic scale."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high = self._scale(self.low), self._scale(self.high)
        return self.begin + (self.end - self.begin) * (self._scale(value) - low) / (high - low)

    def _scale(self, value: float) -> float:
        return log10(value) if self.is_log else value

    def ticks(self, most: int) -> list[float]:
        """Return round values on the axis, about as many as `most`."""
        if self.is_log:
            powers = range(ceil(log10(self.low)), floor(log10(self.high)) + 1)
            return [10.0**power for power in powers[:: max(1, len(powers) // most)]]
        rough = (self.high - self.low) / most
        power = 10.0 ** floor(log10(rough))
        distance = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * 0.999)
        first = ceil(self.low / distance)
        return [distance * number for number in range(first, floor(self.high / distance) + 1)]


def value_axis(values: Sequence[float], begin: float, end: float) -> PlotAxis:
    """Return an axis for finite values; logarithmic if they differ much."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high / low > _LOGARITHMIC:
        return PlotAxis(low / 1.1, high * 1.1, begin, end, is_log=True)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return PlotAxis(low - margin, high + margin, begin, end)


def drawn(curves: dict[str, Curve], title: str) -> bytes:
    """Return the picture of the curves, by name of the metric, as a PNG file."""
    from PIL import Image, ImageDraw, PngImagePlugin

    image = Image.new("RGB", (_SIZE[0] * _SCALE, _SIZE[1] * _SCALE), "white")
    canvas = Canvas(ImageDraw.Draw(image))
    steps = [step for curve in curves.values() for step in curve.steps] or [0.0, 1.0]
    last = max(max(steps), min(steps) + 1)
    across = PlotAxis(min(steps), last, _LEFT, _SIZE[0] - _RIGHT)
    canvas.text((_LEFT, 16), printable(title), size=17)
    height = _SIZE[1] - _TOP - _BOTTOM - _GAP * (len(_PANELS) - 1)
    top = float(_TOP)
    for name, share, metrics in _PANELS:
        drawn = [(curves[metric], colour, label) for metric, (colour, label) in metrics.items()]
        canvas.panel(name, drawn, across, top, share * height)
        top += share * height + _GAP
    for step in filter(float.is_integer, across.ticks(8)):
        canvas.text((across.place(step), _SIZE[1] - _BOTTOM + 8), whole(step), anchor="ma")
    canvas.text((across.end, _SIZE[1] - 4), "step", anchor="rs")
    about = PngImagePlugin.PngInfo()
    about.add_text("Title", FIGURE_TITLE)
    content = io.BytesIO()
    image.reduce(_SCALE).save(content, "PNG", pnginfo=about)
    return content.getvalue()


class Canvas:
    """Draws in points of the picture."""

    def __init__(self, pen: "ImageDraw") -> None:
        self._pen = pen

    def text(
        self, at: tuple[float, float], words: str, *, size: int = 13, anchor: str = "la", colour: str = _INK
    ) -> None:
        from PIL import ImageFont

        font = ImageFont.load_default(size * _SCALE)
        self._pen.text(_scaled(at), words, fill=colour, font=font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        self._pen.line(
            [_scaled(point) for point in points], fill=colour, width=round(width * _SCALE), joint="curve"
        )

    def dot(self, at: tuple[float, float], colour: str) -> None:
        (x, y), radius = _scaled(at), 2.5 * _SCALE
        self._pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def panel(
        self, name: str, curves: Sequence[tuple[Curve, str, str]], across: PlotAxis, top: float, height: float
    ) -> None:
        """Draw the curves, each with its colour and its name, in a frame with grid lines."""
        bottom = top + height
        axis = value_axis([value for curve, _, _ in curves for value in curve.finite()], bottom, top)
        for tick in axis.ticks(max(3, round(height / 50))):
            y = axis.place(tick)
            self.line([(across.begin, y), (across.end, y)], _GRID)
            self.text((across.begin - 8, y), short(tick), anchor="rm")
        self.line([(across.begin, top), (across.begin, bottom), (across.end, bottom)], _INK)
        self.text((across.begin, top - 20), name + (" (logarithmic)" if axis.is_log else ""))
        right = across.end
        for curve, colour, label in curves:
            for piece in pieces(curve):
                points = [(across.place(step), axis.place(value)) for step, value in piece]
                self.line(points, colour, width=1.5)
                if len(curve.steps) <= _FEW:
                    for point in points:
                        self.dot(point, colour)
            for step in (
                step for step, value in zip(curve.steps, curve.values, strict=True) if not isfinite(value)
            ):
                self.line([(across.place(step), bottom), (across.place(step), bottom - 8)], _NAN, width=2)
            if values := curve.finite():
                shown = f"{label} {short(values[-1])}".strip()
                self.text((right, top - 20), shown, anchor="ra", colour=colour)
                right -= 150


def pieces(curve: Curve) -> Iterator[list[tuple[float, float]]]:
    """Yield the stretches of finite points."""
    stretch: list[tuple[float, float]] = []
    for step, value in zip(curve.steps, curve.values, strict=True):
        if isfinite(value):
            stretch.append((step, value))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def short(value: float) -> str:
    """Return a value in four digits, or with a prefix such as k."""
    return count(value) if abs(value) >= 10_000 else f"{value:.4g}"


def _scaled(at: tuple[float, float]) -> tuple[float, float]:
    return at[0] * _SCALE, at[1] * _SCALE
