"""Draw a plan: memory by stage, and the timeline of the pipeline or the parts of a step."""

from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError
from launcher.config.output_files import FIGURE_TITLE, check_overwrites_no_picture
from launcher.config.paths import with_a_name
from launcher.planning.choose.limits import MEMORY_CLASSES, parts_of, settings_in_words
from launcher.planning.cost.measured_rates import rates_of
from launcher.planning.cost.pipeline_schedule import simulate
from launcher.planning.cost.run_plan import Plan
from launcher.text import count, plural

FORMATS = (".png", ".svg", ".pdf")
_IN_ORDER = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#bbbbbb")
MEMORY_COLOURS = dict(zip(MEMORY_CLASSES, _IN_ORDER, strict=True))
FORWARD, BACKWARD = "#4c72b0", "#dd8452"
PART_COLOURS = {
    "compute": "#4c72b0", "tensor": "#c44e52", "context": "#937860", "data": "#dd8452", "expert": "#da8bc3",
    "expert_data": "#ccb974", "pipeline": "#8172b3", "bubble": "#bbbbbb", "optimizer": "#55a868",
}  # fmt: skip
MOST_BATCHES, MOST_LABELS = 24, 400  # to draw


def check_figure(path: str | None, field: str = "plan.figure") -> None:
    """Raise ConfigError if a picture cannot be written to `path`."""
    if path is None:
        return
    target = Path(path).expanduser()
    if target.suffix not in FORMATS:
        named = with_a_name(target)
        tries = " or ".join(f"{field}={named.with_suffix(suffix)}" for suffix in FORMATS[:2])
        raise ConfigError(field, path, f"a picture is {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", tries)
    if not target.parent.is_dir():
        why = f"there is no directory {target.parent}"
        raise ConfigError(field, path, why, f"{field}={target.name}")
    check_overwrites_no_picture(target, field)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        why = "needs matplotlib, which is not installed"
        remedy = f"pip install 'launcher[figures]', or {field}=null"
        raise ConfigError(field, path, why, remedy) from None


def draw_plan(plan: Plan, path: Path) -> None:
    """Write the picture. matplotlib is an optional dependency: see check_figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    memory, time = figure.subplots(2, 1, height_ratios=(1.1, 1))
    _draw_memory(plan, memory)
    if plan.time is None:
        time.axis("off")
        time.text(0.5, 0.5, "no timeline: the hardware config has no speeds", ha="center")
    elif plan.layout.pipeline > 1:
        _draw_timeline(plan, time)
    else:
        _draw_parts(plan, time)
    title = f"{count(plan.parameters)} parameters on {plan.layout.describe()}"
    figure.suptitle(f"{title}\n{settings_in_words(plan.run)}", fontsize=10)
    figure.savefig(path.expanduser(), dpi=130, metadata={"Title": FIGURE_TITLE})


def _draw_memory(plan: Plan, axes: Any) -> None:
    stages = range(len(plan.stages))
    bottom = [0.0] * len(plan.stages)
    for name in MEMORY_CLASSES:
        sizes = [getattr(stage.memory, name) / 1e9 for stage in plan.stages]
        if any(sizes):
            axes.bar(stages, sizes, bottom=bottom, color=MEMORY_COLOURS[name], label=name, width=0.75)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    if len(plan.stages) <= 32:
        for stage, top in zip(stages, bottom, strict=True):
            axes.text(stage, top, f"{top:.3g}", ha="center", va="bottom", fontsize=8)
    axes.set_ylim(0, max(bottom) * 1.15)
    if plan.budget is not None and plan.budget < 4 * max(bottom):
        axes.axhline(plan.budget / 1e9 if plan.budget > 1 else 0, color="black", linestyle="--", linewidth=1)
        axes.set_ylim(0, max(*bottom, plan.budget / 1e9) * 1.15)
        axes.text(-0.45, plan.budget / 1e9, " budget", va="bottom", fontsize=8)
    axes.set_ylabel("GB of one rank")
    axes.set_xlabel("pipeline rank" if len(plan.stages) > 1 else "every rank")
    axes.set_xticks([stage for stage in stages if len(plan.stages) <= 32 or stage % 4 == 0])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _caption(plan: Plan, batches: int) -> str:
    hardware, micro_batches = plan.run.hardware, plan.layout.accumulation
    rates = rates_of(hardware, plan.run.precision.dtype, plan.layout.world_size)
    if rates is not None and rates.crowding > 1:
        assert hardware.cores is not None  # otherwise each rank is planned with a core of its own
        bubble = f"on {plural(hardware.cores, 'core')} the bubble is {plan.bubble:.1%} of the planned step"
        return f"seconds of {batches} micro-batches if each rank had a core of its own; {bubble}"
    if batches == micro_batches:
        return f"seconds; white is the bubble: {plan.bubble:.1%} of the step"
    return (
        f"seconds of a step of {batches} micro-batches; the planned step has {micro_batches}, "
        f"and its bubble is {plan.bubble:.1%}"
    )


def _draw_timeline(plan: Plan, axes: Any) -> None:
    from matplotlib.patches import Patch

    assert plan.time is not None
    layout, stages = plan.layout, plan.time.stages
    # DualPipeV needs two micro-batches for each rank; 1F1B shows its shape with one.
    least = layout.pipeline * layout.stages_per_rank
    batches = min(layout.accumulation, max(least, MOST_BATCHES - layout.pipeline))
    forward = [stage.forward.total + stage.sending / 2 for stage in stages]
    backward = [stage.backward.total + stage.sending / 2 for stage in stages]
    events = simulate(layout, forward, backward, batches)
    # One shape for all passes of a stage in a direction: thousands of bars take ten seconds to draw.
    spans: dict[tuple[int, int, bool], list[tuple[float, float]]] = {}
    for event in events:
        of_stage = spans.setdefault((event.rank, event.stage, event.forward), [])
        of_stage.append((event.start, event.end - event.start))
    for (rank, stage, is_forward), passes in spans.items():
        colour = FORWARD if is_forward else BACKWARD
        # DualPipeV's stages on the way back are paler than the stages on the way out.
        alpha = 0.6 if stage >= layout.pipeline else 1.0
        look = {"facecolors": colour, "alpha": alpha, "edgecolor": "white", "linewidth": 0.4}
        axes.broken_barh(passes, (rank - 0.4, 0.8), **look)
    for event in events if len(events) <= MOST_LABELS else ():
        middle, number = (event.start + event.end) / 2, str(event.micro_batch + 1)
        axes.text(middle, event.rank, number, ha="center", va="center", fontsize=6, color="white")
    axes.set_ylabel("pipeline rank")
    axes.set_yticks([rank for rank in range(layout.pipeline) if layout.pipeline <= 32 or rank % 4 == 0])
    axes.invert_yaxis()
    axes.set_xlim(0, max(event.end for event in events))
    axes.set_xlabel(_caption(plan, batches))
    patches = [Patch(color=FORWARD, label="forward"), Patch(color=BACKWARD, label="backward")]
    axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_parts(plan: Plan, axes: Any) -> None:
    assert plan.time is not None
    start = 0.0
    for name, seconds in parts_of(plan).items():
        if seconds > 0:
            colour = PART_COLOURS[name.removesuffix(" communication")]
            axes.barh(0, seconds, left=start, color=colour, label=f"{name}, {seconds:.3g} s", height=0.5)
        start += seconds
    axes.set_yticks([])
    axes.set_ylim(-0.6, 0.6)
    axes.set_xlabel(f"seconds of a step, {start:.3g} in all")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
