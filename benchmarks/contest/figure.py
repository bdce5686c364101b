"""Draw the ratios of all classes with their spread and targets."""

from pathlib import Path
from typing import Any

from benchmarks.contest.results import ClassResult


def draw(results: list[ClassResult], path: Path) -> None:
    """Write the picture: per model a column, per peer a row."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(result.model for result in results))
    rows = max(sum(len(r.shape.peers) for r in results if r.model == model) for model in models)
    figure = Figure(figsize=(2 + 5 * len(models), 1.2 + 0.34 * rows), layout="constrained")
    for model, axes in zip(models, figure.subplots(1, len(models), squeeze=False)[0], strict=True):
        _panel(axes, [result for result in results if result.model == model])
        axes.set_title(model)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, results: list[ClassResult]) -> None:
    labels: list[str] = []
    for result in results:
        for comparison in result.comparisons():
            labels.append(f"{result.shape.name}: {comparison.peer.label}")
            if not comparison.ratios or not comparison.has_same_losses:
                continue
            place, ratio, (low, high) = len(labels) - 1, comparison.ratio, comparison.spread
            colour = {None: "#777777", True: "#55a868", False: "#c44e52"}[comparison.is_met]
            axes.errorbar(
                ratio, place, xerr=[[ratio - low], [high - ratio]], fmt="o", color=colour, capsize=3
            )
            if comparison.target is not None:
                axes.plot(comparison.target, place, marker="|", color="black", markersize=14)
    axes.axvline(1.0, color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("ours / peer, tokens/s (median, quartiles, | target)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
