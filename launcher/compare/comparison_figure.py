"""Draw a comparison: time, memory, bytes sent, and the losses over each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.compare.comparison_report import ComparisonRow, shown_groups, shown_parts
from launcher.config.output_files import FIGURE_TITLE

PART_COLOURS = {
    "compute": "#4c72b0",
    "tensor": "#c44e52",
    "context": "#da8bc3",
    "data": "#dd8452",
    "expert": "#da8bc3",
    "expert_data": "#937860",
    "pipeline": "#8172b3",
    "optimizer": "#55a868",
}


def draw_comparison(rows: Sequence[ComparisonRow], path: Path) -> None:
    """Write the picture. matplotlib is an optional dependency: see plan_figure.check_figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8.5), layout="constrained")
    (time, memory), (sent, losses) = figure.subplots(2, 2)
    shown = [row for row in rows if row.compared.plan]
    _draw_time(shown, time)
    _draw_memory(shown, memory)
    _draw_sent(shown, sent)
    _draw_losses([row for row in rows if row.measured], losses)
    figure.savefig(path.expanduser(), dpi=110, metadata={"Title": FIGURE_TITLE})


def _draw_time(rows: Sequence[ComparisonRow], axes: Any) -> None:
    bottom = [0.0] * len(rows)
    for part in shown_parts(rows):
        heights = [row.measured.parts[part] * 1e3 if row.measured else 0.0 for row in rows]
        label = "other stages, idle time too" if part == "pipeline" else part
        axes.bar(range(len(rows)), heights, bottom=bottom, color=PART_COLOURS[part], label=label, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, (row, top) in enumerate(zip(rows, bottom, strict=True)):
        if row.measured:
            axes.text(place, top, f"{row.measured.seconds * 1e3:.0f}", ha="center", va="bottom", fontsize=8)
    _mark_planned(axes, [sum(row.planned_parts.values()) * 1e3 or None for row in rows])
    _finish(axes, rows, "a step, ms")


def _draw_memory(rows: Sequence[ComparisonRow], axes: Any) -> None:
    heights = [row.measured.memory / 1e6 if row.measured else 0.0 for row in rows]
    axes.bar(range(len(rows)), heights, color="#4c72b0", width=0.7, label="measured")
    for place, (row, height) in enumerate(zip(rows, heights, strict=True)):
        words = f"{height:.3g}" if row.measured else "not trained"
        rotation = 0 if row.measured else 90
        axes.text(place, height, words, ha="center", va="bottom", fontsize=8, rotation=rotation)
    _mark_planned(axes, [row.planned_memory and row.planned_memory / 1e6 for row in rows])
    budget = next((row.compared.run.hardware.memory_bytes for row in rows), None)
    if budget:
        label = "hardware.memory_bytes"
        axes.axhline(budget / 1e6, color="#c44e52", linestyle="--", linewidth=1, label=label)
    _finish(axes, rows, "tensors of the fullest rank, MB")


def _draw_sent(rows: Sequence[ComparisonRow], axes: Any) -> None:
    bottom = [0.0] * len(rows)
    for group in shown_groups(rows):
        heights = [row.measured.sent.get(group, 0.0) / 1e6 if row.measured else 0.0 for row in rows]
        label = f"over the {group} group"
        axes.bar(range(len(rows)), heights, bottom=bottom, color=PART_COLOURS[group], label=label, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, top in enumerate(bottom):
        axes.text(place, top, f"{top:.3g}", ha="center", va="bottom", fontsize=8)
    _mark_planned(axes, [sum(row.planned_sent.values()) / 1e6 for row in rows])
    _finish(axes, rows, "sent by a rank in a step, MB")


def _draw_losses(rows: Sequence[ComparisonRow], axes: Any) -> None:
    # Each line is thinner than the one below it, which would be hidden otherwise.
    for number, row in enumerate(rows):
        assert row.measured
        steps = range(1, len(row.measured.losses) + 1)
        width = 1.0 + 1.2 * (len(rows) - 1 - number)
        axes.plot(steps, row.measured.losses, linewidth=width, label=row.name)
    axes.set_xlabel("step")
    _label(axes, "loss")


def _mark_planned(axes: Any, heights: Sequence[float | None]) -> None:
    known = [(place, height) for place, height in enumerate(heights) if height]
    if known:
        places, tops = zip(*known, strict=True)
        style = {"marker": "_", "s": 420, "color": "black", "linewidths": 1.6, "zorder": 3}
        axes.scatter(places, tops, label="planned", **style)


def _finish(axes: Any, rows: Sequence[ComparisonRow], label: str) -> None:
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right")
    axes.margins(y=0.1)
    _label(axes, label)


def _label(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
