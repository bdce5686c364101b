"""The comparison for people, as a table, and for machines. Pure but for printing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.compare.compared_layouts import Compared
from launcher.compare.measured_layout import Measured
from launcher.config.layout import GROUPS
from launcher.text import megabytes, milliseconds, plain_table, print_table, whole

PARTS = ("compute", *GROUPS, "optimizer")
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # of a loss, relative


@dataclass(frozen=True)
class Row:
    """One layout: what was planned and, if it was trained, what was measured; `failed` says why not."""

    compared: Compared
    measured: Measured | None = None
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
        return {name: one.sent for name, one in plan.traffic.items()} if plan else {}

    @property
    def planned_parts(self) -> dict[str, float]:
        """Seconds, as they are measured: what waits for other stages, transfers and bubble, is one."""
        plan = self.compared.plan
        if plan is None or plan.time is None:
            return {}
        time = plan.time
        return {
            "compute": time.compute,
            "tensor": time.tensor,
            "data": time.data,
            "pipeline": time.pipeline + time.bubble,
            "optimizer": time.optimizer,
        }

    def tokens_per_s(self, seconds: float) -> float:
        assert self.compared.plan is not None
        return self.compared.plan.tokens / seconds


def bubble(parts: dict[str, float]) -> float:
    """Waiting for other stages, over what the step would take without."""
    return parts["pipeline"] / (sum(parts.values()) - parts["pipeline"])


def metric_rows(rows: Sequence[Row]) -> list[dict[str, float | int]]:
    """For W&B: the losses step by step, and with the last of them what each layout took."""
    trained = {row.name: row.measured for row in rows if row.measured}
    steps = range(len(next(iter(trained.values())).losses)) if trained else range(0)
    found: list[dict[str, float | int]] = [
        {"step": step + 1, **{f"loss/{name}": one.losses[step] for name, one in trained.items()}}
        for step in steps
    ]
    for row in rows if found else ():
        if one := row.measured:
            found[-1] |= {
                f"step_time_s/{row.name}": one.seconds,
                f"tokens_per_s/{row.name}": row.tokens_per_s(one.seconds),
                f"memory_bytes/{row.name}": one.memory,
                **{f"{part}_s/{row.name}": seconds for part, seconds in one.parts.items()},
                **{f"sent_{group}_bytes/{row.name}": size for group, size in one.sent.items()},
            }
        if row.planned_memory is not None:
            found[-1][f"planned_memory_bytes/{row.name}"] = row.planned_memory
        if row.planned_parts:
            found[-1][f"planned_step_time_s/{row.name}"] = sum(row.planned_parts.values())
    return found


def differing(rows: Sequence[Row]) -> dict[str, float]:
    """Layouts whose losses differ from the first's by more than the tolerance, and by how much of it."""
    trained = [row for row in rows if row.measured]
    found = {}
    for row in trained[1:]:
        assert row.measured
        assert trained[0].measured
        pairs = zip(row.measured.losses, trained[0].measured.losses, strict=True)
        worst = max(abs(one / other - 1) for one, other in pairs)
        if not worst <= TOLERANCE[row.compared.run.precision.dtype.name]:  # a NaN is above it too
            found[row.name] = worst
    return found


def print_comparison(rows: Sequence[Row]) -> None:
    table = plain_table("One step of each layout, measured and (planned); times in ms, sizes in MB")
    sent = (f"sent,\n{group}" for group in GROUPS)
    for name in ("layout", "ranks", "step", "tokens/s", *PARTS, "bubble", "memory", *sent, "last\nloss"):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for row in rows:
        if row.measured:
            table.add_row(*_measured(row, row.measured))
        if row.compared.plan:
            table.add_row(*_planned(row))
    print_table(table)
    for row in rows:
        if row.not_trained:
            print(f"left out {row.name}: {row.not_trained}")


def _measured(row: Row, found: Measured) -> list[str]:
    layout = row.compared.layout
    assert layout is not None
    return [
        row.name,
        str(layout.world_size),
        milliseconds(found.seconds),
        whole(row.tokens_per_s(found.seconds)),
        *(milliseconds(found.parts[part]) for part in PARTS),
        f"{bubble(found.parts):.0%}",
        megabytes(found.memory),
        *(megabytes(found.sent[group]) for group in GROUPS),
        f"{found.losses[-1]:.4f}",
    ]


def _planned(row: Row) -> list[str]:
    parts = row.planned_parts
    seconds = sum(parts.values())
    assert row.planned_memory is not None
    return [
        "" if row.measured else row.name,
        "" if row.measured or not row.compared.layout else str(row.compared.layout.world_size),
        _bracketed(milliseconds(seconds) if parts else ""),
        _bracketed(whole(row.tokens_per_s(seconds)) if parts else ""),
        *(_bracketed(milliseconds(parts[part]) if parts else "") for part in PARTS),
        _bracketed(f"{bubble(parts):.0%}" if parts else ""),
        _bracketed(megabytes(row.planned_memory)),
        *(_bracketed(megabytes(row.planned_sent[group])) for group in GROUPS),
        "",
    ]


def _bracketed(text: str) -> str:
    return f"({text})" if text else ""


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Seconds and bytes."""
    return [
        {
            "layout": row.name,
            "resolved": row.compared.layout and asdict(row.compared.layout),
            "refused": row.compared.refused or None,
            "failed": row.failed or None,
            "measured": row.measured
            and {**asdict(row.measured), "tokens_per_s": row.tokens_per_s(row.measured.seconds)},
            "planned": row.compared.plan
            and {
                "seconds": sum(row.planned_parts.values()) or None,
                "parts": row.planned_parts,
                "memory": row.planned_memory,
                "sent": row.planned_sent,
            },
        }
        for row in rows
    ]
