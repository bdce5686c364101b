"""Report a plan as tables and as JSON."""

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from launcher.config.layout import GroupName
from launcher.config.shape import has_experts
from launcher.models.arithmetic import adapter_parameters
from launcher.planning.choose.changes import Change
from launcher.planning.choose.limits import (
    MEMORY_CLASSES,
    hidden_of,
    limit,
    link_of,
    parts_of,
    settings_in_words,
)
from launcher.planning.cost.run_plan import Plan, StagePlan
from launcher.text import DAY, count, duration, four_digits, in_unit, plain_table, print_table, size, unit_of

if TYPE_CHECKING:
    from rich.table import Table


def print_plan(plan: Plan, changes: list[Change], traced: list[dict[str, Any]] | None = None) -> None:
    of_adapters = adapter_parameters(plan.run)
    trained = f" and {count(of_adapters)} of adapters, which are trained" if of_adapters else ""
    active = f", {count(plan.active_parameters)} active" if has_experts(plan.run.model) else ""
    sizes = f"{count(plan.parameters)} parameters{active}{trained}"
    print(f"model    {sizes}, {count(plan.model_flops)} FLOPs a step")
    for note in plan.layout.notes:
        print(f"note     {note}")
    print(f"layout   {plan.layout.describe()}")
    print(f"         {settings_in_words(plan.run)}")
    print()
    tables = [_memory_table(plan), _traffic_table(plan)]
    tables += [_time_table(plan)] if plan.time else []
    tables += [_trace_table(traced)] if traced else []
    for table in tables:
        print_table(table)
    print("\n".join([*_host(plan), *_speed(plan), f"limit    {limit(plan)}", *advice(plan, changes)]))


def _host(plan: Plan) -> list[str]:
    """Return the line of host memory of ranks on GPUs."""
    if plan.layout.device == "cpu":
        return []
    host, start_up = (
        max(getattr(stage.memory, name) for stage in plan.stages) for name in ("host", "start_up")
    )
    budget = plan.host_budget
    of = "" if budget is None else f" of {size(budget)}"
    short = "" if budget is None or plan.host <= budget else f": {size(plan.host - budget)} too much"
    return [
        f"host     {size(host)} of the host's memory for each rank{of}, {size(start_up)} at start-up{short}"
    ]


def _memory_table(plan: Plan) -> "Table":
    unit = unit_of(max(stage.memory.total for stage in plan.stages))
    table = plain_table(f"Memory of one rank, {unit[1]}")
    classes = [name for name in MEMORY_CLASSES if any(getattr(stage.memory, name) for stage in plan.stages)]
    for name in ("stage", "blocks", "parameters", *classes, "needed", "available", ""):
        table.add_column(name, justify="left" if name in ("stage", "") else "right", no_wrap=True)
    for first, last, stage in _equal_stages(plan.stages):
        memory = stage.memory
        stages = str(first) if first == last else f"{first} to {last}"
        sizes = [in_unit(unit, getattr(memory, name)) for name in (*classes, "total")]
        budget = "?" if plan.budget is None else in_unit(unit, plan.budget)
        row = stages, str(stage.blocks), count(stage.parameters), *sizes, budget
        table.add_row(*row, _verdict(plan, memory.total))
    return table


def _verdict(plan: Plan, total: int) -> str:
    if plan.budget is None:
        return "no budget known"
    short = total - plan.budget
    return f"[bold red]{size(short)} too much[/]" if short > 0 else "fits"


def _equal_stages(stages: tuple[StagePlan, ...]) -> list[tuple[int, int, StagePlan]]:
    """Return runs of consecutive stages that print the same, as (first, last, a stage of the run)."""

    def key(numbered: tuple[int, StagePlan]) -> tuple[object, ...]:
        stage = numbered[1]
        return stage.blocks, stage.parameters, *(size(getattr(stage.memory, name)) for name in MEMORY_CLASSES)

    runs = [list(group) for _, group in groupby(enumerate(stages), key)]
    return [(run[0][0], run[-1][0], run[0][1]) for run in runs]


def _traffic_table(plan: Plan) -> "Table":
    table = plain_table("Sent by one rank in a step")
    for name in ("group", "ranks", "link", "sent", "collectives"):
        table.add_column(name, justify="right" if name in ("ranks", "sent") else "left")
    for name, traffic in plan.traffic.items():
        kinds: dict[str, int] = {}
        for collective, times in traffic.collectives.items():
            kinds[collective.kind] = kinds.get(collective.kind, 0) + times
        listed = ", ".join(f"{times} {kind}" for kind, times in sorted(kinds.items()))
        table.add_row(name, str(traffic.shape.ranks), link_of(plan, name), size(traffic.sent), listed)
    return table


def _time_table(plan: Plan) -> "Table":
    table = plain_table("Time of a step")
    for name in ("part", "seconds", "share", "hidden behind compute, s"):
        table.add_column(name, justify="left" if name == "part" else "right")
    parts, hidden = parts_of(plan), hidden_of(plan)
    total = sum(parts.values())
    for name, seconds in [*parts.items(), ("step", total)]:
        beside = hidden.get(name, 0.0)
        table.add_row(
            name, four_digits(seconds), f"{seconds / total:.1%}", four_digits(beside) if beside else ""
        )
    return table


def _planned_tokens(plan: Plan) -> float:
    return plan.run.plan.tokens or plan.tokens * plan.run.training.steps


def _speed(plan: Plan) -> list[str]:
    if plan.tokens_per_s is None:
        return []
    words = [f"{count(plan.tokens_per_s)} tokens/s"]
    if plan.mfu is not None:
        words.append(f"MFU {plan.mfu:.1%}")
    if plan.bubble:
        words.append(f"bubble {plan.bubble:.1%} of the step")
    tokens = _planned_tokens(plan)
    words.append(f"{duration(tokens / plan.tokens_per_s)} for {count(tokens)} tokens")
    return [f"speed    {', '.join(words)}"]


def _trace_table(traced: list[dict[str, Any]]) -> "Table":
    table = plain_table("One micro-batch of a rank: formulas, and a trace of the real modules")
    for name in ("stage", "quantity", "formula", "traced", "error"):
        table.add_column(name, justify="left" if name == "quantity" else "right")
    for check in traced:
        row = str(check["stage"]), check["quantity"], f"{check['formula']:,}", f"{check['traced']:,}"
        table.add_row(*row, f"{check['error']:+.2%}")
    return table


def advice(plan: Plan, changes: list[Change]) -> list[str]:
    """Return a line for each change, with its time and memory."""
    if not changes:
        return [] if plan.fits else ["advice   no single change makes it fit"]
    lines = []
    for change in changes:
        gain = ""
        if plan.time and change.plan.time:
            seconds, faster = change.plan.time.total, plan.time.total / change.plan.time.total - 1
            gain = f"{four_digits(seconds)} s a step" + (f", {faster:+.0%} tokens/s" if plan.fits else "")
        peak = max(stage.memory.total for stage in change.plan.stages)
        lines.append(f"{change.settings}: {gain}{', ' if gain else ''}{size(peak)}")
    return [f"{'advice' if index == 0 else '':8} {line}" for index, line in enumerate(lines)]


def as_json(plan: Plan, changes: list[Change]) -> dict[str, Any]:
    """Return the plan as plain values in bytes, seconds and FLOPs; times are null without known speeds."""
    time, p = plan.time, plan.run.parallelism
    days = _planned_tokens(plan) / plan.tokens_per_s / DAY if plan.tokens_per_s is not None else None
    return {
        "model": {
            "parameters": plan.parameters,
            "active_parameters": plan.active_parameters,
            "flops_per_step": plan.model_flops,
        },
        "layout": {
            **asdict(plan.layout),
            "world_size": plan.layout.world_size,
            "micro_batch_size": plan.run.training.micro_batch_size,
            "global_batch_size": plan.run.training.global_batch_size,
            "pipeline_schedule": p.pipeline_schedule.name,
            "sequence_parallel": p.sequence_parallel,
            "context_method": p.context_method.name,
            "activation_checkpointing": p.activation_checkpointing.name,
            "offload_optimizer": p.offload_optimizer,
            "offload_parameters": p.offload_parameters,
            "dtype": plan.run.precision.dtype.name,
            "states": plan.run.precision.states.name,
            "notes": list(plan.layout.notes),
        },
        "stages": [_stage_json(plan, index, stage) for index, stage in enumerate(plan.stages)],
        "step": {
            "time_s": time.total if time else None,
            "tokens": plan.tokens,
            "tokens_per_s": plan.tokens_per_s,
            "mfu": plan.mfu,
            "bubble": plan.bubble,
            "parts_s": {name.replace(" ", "_"): value for name, value in parts_of(plan).items()},
            "hidden_s": {name.replace(" ", "_"): value for name, value in hidden_of(plan).items()},
            "flops_per_rank": max(stage.flops for stage in plan.stages),
            "days": days,
        },
        "traffic": {name: _traffic_json(plan, name) for name in plan.traffic},
        "fits": plan.fits,
        "limit": limit(plan),
        "advice": [_change_json(change) for change in changes],
    }


def _traffic_json(plan: Plan, group: GroupName) -> dict[str, Any]:
    shape, collectives = plan.traffic[group].shape, plan.traffic[group].collectives.items()
    counts = [{"kind": call.kind, "size": call.size, "count": times} for call, times in collectives]
    sent = plan.traffic[group].sent
    return {"bytes": sent, "ranks": shape.ranks, "link": link_of(plan, group), "collectives": counts}


def _change_json(change: Change) -> dict[str, Any]:
    seconds = change.plan.time.total if change.plan.time else None
    memory = max(stage.memory.total for stage in change.plan.stages)
    return {"settings": change.settings, "time_s": seconds, "memory": memory}


def _stage_json(plan: Plan, index: int, stage: StagePlan) -> dict[str, Any]:
    memory = stage.memory
    return {
        "stage": index,
        "blocks": stage.blocks,
        "parameters": stage.parameters,
        "flops": stage.flops,
        "memory": {
            **{name: getattr(memory, name) for name in MEMORY_CLASSES},
            "total": memory.total,
            "budget": plan.budget,
            "host": memory.host,
            "host_budget": plan.host_budget,
            "start_up": memory.start_up,
            "moment": memory.moment,
        },
    }
