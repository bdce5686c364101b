"""Tables of results in Markdown. Pure."""

from statistics import median

from benchmarks.contest.operators import operator_table
from benchmarks.contest.results import FIRST_STEP_TARGET_S, ClassResult, Comparison, Measured

_HEADER = (
    "| class | contestant | tokens/s | ours / peer | quartiles | target | peak memory, MB | ours / peer |"
    " target | first step, s |\n|---|---|---|---|---|---|---|---|---|---|"
)


def tables(results: list[ClassResult]) -> str:
    """Return a table per model, and a line on the first steps of our command."""
    models = dict.fromkeys(result.model for result in results)
    parts = [table(model, [result for result in results if result.model == model]) for model in models]
    operators = [_operators(result) for result in results]
    return "\n\n".join([*parts, *filter(None, [start_up(results), *operators])])


def table(model: str, results: list[ClassResult]) -> str:
    rows = [row for result in results for row in _rows(result)]
    return "\n".join([f"### {model}", "", _HEADER, *rows])


def _operators(result: ClassResult) -> str:
    times = {measured.label: measured.operators for measured in result.measured if measured.operators}
    return operator_table(f"{result.model}, {result.shape.name}", times) if times else ""


def _rows(result: ClassResult) -> list[str]:
    ours = result.ours
    first = f"{result.shape.name} | **{ours.label}** | {_speed(result, ours)} | | | | {_megabytes(ours)}"
    lines = [f"| {first} | | | {_seconds(ours)} |"]
    for comparison in result.comparisons():
        peer = comparison.peer
        if peer.failed:
            lines.append(f"| | {peer.label} | failed | | | | | | | |")
            continue
        lines.append(
            f"| | {peer.label} | {_speed(result, peer)} | {_time_cells(comparison)} | {_megabytes(peer)} |"
            f" {_memory_cells(comparison)} | {_seconds(peer)} |"
        )
    return lines


def _speed(result: ClassResult, measured: Measured) -> str:
    return f"{result.tokens_per_s(measured):,.0f}" if measured.seconds else ""


def _megabytes(measured: Measured) -> str:
    return "" if measured.peak_bytes is None else f"{measured.peak_bytes / 1e6:,.1f}"


def _seconds(measured: Measured) -> str:
    return "" if measured.first_step_s is None else f"{measured.first_step_s:.1f}"


def _time_cells(comparison: Comparison) -> str:
    if comparison.loss_difference is None and not comparison.ratios:
        return " | | "  # not timed
    if not comparison.has_same_losses:
        return "losses differ | | "
    if not comparison.ratios:
        return " | | "
    low, high = comparison.spread
    target = _target(comparison.target, comparison.is_met, "≥")
    return f"{comparison.ratio:.3f} | {low:.3f} to {high:.3f} | {target}"


def _memory_cells(comparison: Comparison) -> str:
    ratio = "" if comparison.memory is None else f"{comparison.memory:.3f}"
    return f"{ratio} | {_target(comparison.memory_target, comparison.memory_is_met, '≤')}"


def _target(target: float | None, is_met: bool | None, sign: str) -> str:
    return "" if target is None else f"{sign} {target:.2f} {'met' if is_met else 'missed'}"


def start_up(results: list[ClassResult]) -> str:
    """Return a line on the first step of our command by number of ranks; empty if it was not measured."""
    seconds: dict[int, list[float]] = {}
    for result in results:
        if result.ours.first_step_s is not None:
            seconds.setdefault(result.shape.ranks, []).append(result.ours.first_step_s)
    if not seconds:
        return ""
    parts = [f"{median(values):.1f} s on {_ranks(ranks)}" for ranks, values in sorted(seconds.items())]
    target = f"target {FIRST_STEP_TARGET_S:.0f} s on CPU"
    return f"First step of `launcher`, from the command on: {', '.join(parts)} ({target})."


def _ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"
