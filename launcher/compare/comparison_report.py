"""Report a comparison as a table, as JSON and as rows of metrics. Pure except for printing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan, nan
from typing import Any

from launcher.compare.compared_layouts import ComparedLayout
from launcher.compare.measured_layout import MeasuredLayout
from launcher.config.layout import EXPERT_GROUPS, GROUPS, STEP_PARTS, GroupName
from launcher.text import megabytes, milliseconds, plain_table, print_table, whole

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # relative difference of two losses


@dataclass(frozen=True)
class ComparisonRow:
    """Plan and measurement of a layout; without a measurement, `failed` is the reason."""

    compared: ComparedLayout
    measured: MeasuredLayout | None = None
    failed: str = ""

    @property
    def name(self) -> str:
        return self.compared.name

    @property
    def not_trained(self) -> str:
        return self.compared.refused or self.failed

    @property
    def planned_memory(self) -> int | None:
        plan = self.compared.plan
        return max(stage.memory.allocated for stage in plan.stages) if plan else None

    @property
    def planned_sent(self) -> dict[str, float]:
        plan = self.compared.plan
        return {group: traffic.sent for group, traffic in plan.traffic.items()} if plan else {}

    @property
    def planned_parts(self) -> dict[str, float]:
        """Return planned seconds by measured part; the wait for other stages is transfers and bubble."""
        plan = self.compared.plan
        if plan is None or plan.time is None:
            return {}
        time = plan.time
        return {
            "compute": time.compute,
            "tensor": time.tensor,
            "context": time.context,
            "data": time.data,
            "expert": time.expert,
            "expert_data": time.expert_data,
            "pipeline": time.pipeline + time.bubble,
            "optimizer": time.optimizer,
        }

    def tokens_per_s(self, seconds: float) -> float:
        assert self.compared.plan is not None
        return self.compared.plan.tokens / seconds


def shown_groups(rows: Sequence[ComparisonRow]) -> list[GroupName]:
    """Return the groups to show; expert groups only if a layout has expert parallelism."""
    shares = any(row.compared.layout is not None and row.compared.layout.expert > 1 for row in rows)
    return [group for group in GROUPS if shares or group not in EXPERT_GROUPS]


def shown_parts(rows: Sequence[ComparisonRow]) -> list[str]:
    """Return the parts of a step to show; times of expert groups only if shown_groups has the group."""
    groups = shown_groups(rows)
    return [part for part in STEP_PARTS if part not in EXPERT_GROUPS or part in groups]


def bubble(parts: dict[str, float]) -> float:
    """Return the share of the step in which a rank waits for other stages, as a plan's bubble and sends."""
    return parts["pipeline"] / sum(parts.values())


def metric_rows(rows: Sequence[ComparisonRow]) -> list[dict[str, float | int]]:
    """Return the losses of each step for W&B; the last row also has time, memory and bytes of each layout."""
    trained = {row.name: row.measured for row in rows if row.measured}
    steps = range(len(next(iter(trained.values())).losses)) if trained else range(0)
    metrics: list[dict[str, float | int]] = [
        {"step": step + 1, **{f"loss/{name}": layout.losses[step] for name, layout in trained.items()}}
        for step in steps
    ]
    for row in rows if metrics else ():
        if measured := row.measured:
            metrics[-1] |= {
                f"step_time_s/{row.name}": measured.seconds,
                f"tokens_per_s/{row.name}": row.tokens_per_s(measured.seconds),
                f"memory_bytes/{row.name}": measured.memory,
                **{f"{part}_s/{row.name}": seconds for part, seconds in measured.parts.items()},
                **{f"sent_{group}_bytes/{row.name}": size for group, size in measured.sent.items()},
            }
        if row.planned_memory is not None:
            metrics[-1][f"planned_memory_bytes/{row.name}"] = row.planned_memory
        if row.planned_parts:
            metrics[-1][f"planned_step_time_s/{row.name}"] = sum(row.planned_parts.values())
    return metrics


def differing(rows: Sequence[ComparisonRow]) -> dict[str, float]:
    """Return the largest relative difference of losses from the first layout, if beyond the tolerance."""
    trained = [row for row in rows if row.measured]
    differences = {}
    for row in trained[1:]:
        assert row.measured
        assert trained[0].measured
        pairs = zip(row.measured.losses, trained[0].measured.losses, strict=True)
        apart = [abs(loss / first - 1) for loss, first in pairs]
        worst = nan if any(map(isnan, apart)) else max(apart)  # max() passes over a NaN after the first value
        if not worst <= TOLERANCE[row.compared.run.precision.dtype.name]:  # a NaN is above it too
            differences[row.name] = worst
    return differences


def print_comparison(rows: Sequence[ComparisonRow]) -> None:
    table = plain_table("One step of each layout, measured and (planned); times in ms, sizes in MB")
    groups, parts = shown_groups(rows), shown_parts(rows)
    sent = (f"sent,\n{group}" for group in groups)
    for name in ("layout", "ranks", "step", "tokens/s", *parts, "bubble", "memory", *sent, "last\nloss"):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for row in rows:
        if row.measured:
            table.add_row(*_measured(row, row.measured, parts, groups))
        if row.compared.plan:
            table.add_row(*_planned(row, parts, groups))
    print_table(table)
    for row in rows:
        if row.not_trained:
            print(f"skipped  {row.name}: {row.not_trained}")


def _measured(
    row: ComparisonRow, measured: MeasuredLayout, parts: list[str], groups: list[GroupName]
) -> list[str]:
    layout = row.compared.layout
    assert layout is not None
    return [
        row.name,
        str(layout.world_size),
        milliseconds(measured.seconds),
        whole(row.tokens_per_s(measured.seconds)),
        *(milliseconds(measured.parts[part]) for part in parts),
        f"{bubble(measured.parts):.0%}",
        megabytes(measured.memory),
        *(megabytes(measured.sent.get(group, 0.0)) for group in groups),
        f"{measured.losses[-1]:.4f}",
    ]


def _planned(row: ComparisonRow, shown: list[str], groups: list[GroupName]) -> list[str]:
    parts = row.planned_parts
    seconds = sum(parts.values())
    assert row.planned_memory is not None
    labels = ["", ""]
    if not row.measured:
        labels = [row.name, str(row.compared.layout.world_size) if row.compared.layout else ""]
    times = [""] * (3 + len(shown))
    if parts:
        times = [milliseconds(seconds), whole(row.tokens_per_s(seconds))]
        times += [*(milliseconds(parts[part]) for part in shown), f"{bubble(parts):.0%}"]
    sent = [row.planned_sent.get(group, 0.0) for group in groups]
    sizes = [megabytes(row.planned_memory), *map(megabytes, sent)]
    return [*labels, *(f"({text})" if text else "" for text in times + sizes), ""]


def as_json(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """Return each layout as plain values; times are in seconds, sizes in bytes."""
    return [
        {
            "layout": row.name,
            "resolved": row.compared.layout and asdict(row.compared.layout),
            "refused": row.compared.refused or None,
            "failed": row.failed or None,
            "measured": _measured_json(row, row.measured) if row.measured else None,
            "planned": _planned_json(row) if row.compared.plan else None,
        }
        for row in rows
    ]


def _measured_json(row: ComparisonRow, measured: MeasuredLayout) -> dict[str, Any]:
    return {**asdict(measured), "tokens_per_s": row.tokens_per_s(measured.seconds)}


def _planned_json(row: ComparisonRow) -> dict[str, Any]:
    parts = row.planned_parts
    seconds = sum(parts.values()) or None
    return {"seconds": seconds, "parts": parts, "memory": row.planned_memory, "sent": row.planned_sent}
