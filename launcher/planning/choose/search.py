"""Search for `parallelism=auto`: every layout that validation allows for a model, a batch and ranks. Pure.

The search covers data, context, tensor and pipeline sizes, ZeRO stage, micro-batch, sequence parallelism,
recomputation and offload. A field that was set to another value than its default keeps that value; the
micro-batch is always searched. Offload is searched only if no layout fits without it: it is the last choice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple, TypeVar

from launcher.config.context_rules import check_context_on_nodes
from launcher.config.errors import ConfigError, as_typed, settings
from launcher.config.layout import Layout, check_machine, effective_zero_stage
from launcher.config.numbers import BOUNDS
from launcher.config.schema import (
    ActivationCheckpointing,
    ContextMethod,
    InputKind,
    ParallelismConfig,
    RunConfig,
)
from launcher.config.shape import divisors, sequence_length
from launcher.config.validate import check_tensor_divides, check_values, validate, validate_layout
from launcher.config.world import World
from launcher.planning.choose.changes import LEAST_TOKENS, changed
from launcher.planning.cost.geometry import Rank, pipeline_ranks
from launcher.planning.cost.measured_rates import AnyRates, rates_of
from launcher.planning.cost.memory import rank_memories
from launcher.planning.cost.rates import NOMINAL
from launcher.planning.cost.run_plan import host_budget, memory_budget
from launcher.planning.cost.step_time import step_time
from launcher.planning.cost.traffic import group_shapes

Settings = dict[str, Any]
T = TypeVar("T")

# Share of the memory that the choice leaves free: for the allocator's fragments, and for errors of the plan.
LEFT_FREE = 0.08
# Among layouts whose step times differ by less than this share, the simplest is chosen.
AS_FAST = 0.03
# Share by which layouts with context ranks must be faster: no step with context ranks was measured on GPUs.
UNMEASURED = 0.10
# The same for ZeRO-3 between nodes. Its published rows in docs/planning.md are planned too fast even if no
# traffic is hidden; this is the least of these errors.
FLATTERED = 0.08
# Bounds of the search, which takes up to 2 ms for each setting. 64 nodes of 8 GPUs have 6,400 settings.
MOST_SETTINGS, MOST_WORLDS = 25_000, 40

CHOICES: dict[str, Sequence[Any]] = {
    "context_method": tuple(ContextMethod),
    "zero_stage": range(4),
    "sequence_parallel": (False, True),
    "activation_checkpointing": tuple(ActivationCheckpointing),
    "offload_optimizer": (False, True),
    "offload_parameters": (False, True),
}


class Seconds(NamedTuple):
    """The planned time of a candidate's step."""

    step: float  # without known speeds, good only to rank layouts
    unsure: float = 0.0  # traffic between nodes that the plan hides behind computation


@dataclass(frozen=True)
class Candidate:
    """A legal layout, its peak memory and its time.

    The time is planned when it is first asked for: most layouts of a large model do not fit, and few of them
    are compared by their time.
    """

    settings: Settings
    run: RunConfig
    layout: Layout
    plan_seconds: Callable[[], Seconds] = field(compare=False)
    peak: int  # bytes of the rank that needs most
    budget: float | None
    host: int  # bytes of host memory, of the rank on a GPU that needs most
    host_budget: float | None
    per_node: int

    @cached_property
    def _planned(self) -> Seconds:
        return self.plan_seconds()

    @property
    def seconds(self) -> float:
        return self._planned.step

    @property
    def fits(self) -> bool:
        return self.fits_device and (self.host_budget is None or self.host <= self.host_budget)

    @property
    def fits_device(self) -> bool:
        return self.budget is None or self.peak <= self.budget

    @property
    def is_tight(self) -> bool:
        """Whether less memory is left than the allocator may hold without use."""
        return self.budget is not None and self.peak > (1 - LEFT_FREE) * self.budget

    @property
    def offloads(self) -> bool:
        return self.run.parallelism.offload_optimizer

    @property
    def crosses_nodes(self) -> bool:
        """Whether a tensor group spans several nodes."""
        return self.layout.tensor > 1 and self.per_node % self.layout.tensor != 0

    @property
    def kind(self) -> str:
        """Row label in the report: axes, ZeRO stage and offload."""
        axes = {name: getattr(self.layout, name) for name in ("pipeline", "data", "context", "tensor")}
        if self.layout.expert > 1:
            axes["experts"] = self.layout.expert
        used = " x ".join(name for name, size in axes.items() if size > 1) or "one rank"
        offload = ", offload" if self.run.parallelism.offload_optimizer else ""
        return f"{used}, ZeRO-{self.layout.zero_stage}{offload}"

    @property
    def concerns(self) -> tuple[bool, bool, bool]:
        """Reasons why the layout is chosen only if no other layout fits, the gravest first."""
        return self.offloads, self.crosses_nodes, self.is_tight

    @property
    def complexity(self) -> tuple[int, ...]:
        """Sort key among layouts of nearly the same speed, the simplest first.

        With a pipeline, tensor parallelism should fill the node (Narayanan et al., SC 2021, takeaway 1).
        """
        layout, p = self.layout, self.run.parallelism
        sizes = layout.tensor, layout.context, layout.data, layout.pipeline, layout.expert
        axes = sum(size > 1 for size in sizes)
        recomputation = list(ActivationCheckpointing).index(p.activation_checkpointing)
        return (
            layout.zero_stage == 3, axes, layout.zero_stage, recomputation, p.sequence_parallel,
            layout.pipeline, -layout.tensor if layout.pipeline > 1 else 0,
        )  # fmt: skip

    @property
    def cautious(self) -> float:
        """Seconds by which layouts are compared: `unhidden`, and more where plans are in doubt.

        No published run of ZeRO-3 on hundreds of GPUs hid this traffic: see SC21's rows in docs/planning.md.
        """
        return self.unhidden * (1 + self.doubt)

    @property
    def doubt(self) -> float:
        """Share by which the layout must be faster than others: UNMEASURED, FLATTERED or both."""
        data = group_shapes(self.layout, self.per_node)["data"]
        zero_3 = FLATTERED if self.layout.zero_stage == 3 and not data.is_within_node else 0.0
        return zero_3 + (UNMEASURED if self.layout.context > 1 else 0.0)

    @property
    def unhidden(self) -> float:
        """Seconds of a step that hides no traffic between nodes."""
        return self.seconds + self._planned.unsure

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key, best first. The settings come last, so that ties always have the same order."""
        return self.concerns, self.cautious, self.peak, tuple(map(str, self.settings.values()))


@dataclass(frozen=True)
class Search:
    """The legal layouts of a run over all ranks of the world; if none is legal, over fewer ranks.

    If one fits without offload, layouts with offload are left out.
    """

    candidates: tuple[Candidate, ...]
    world: World

    @cached_property
    def leaves_out_offload(self) -> bool:
        return not any(candidate.offloads for candidate in self.candidates)

    @cached_property
    def fitting(self) -> list[Candidate]:
        """Candidates that fit: the chosen one, then the others by concerns and by speed."""
        fitting = [candidate for candidate in self.candidates if candidate.fits]
        ordered = sorted(fitting, key=lambda candidate: candidate.order)
        if not ordered:
            return []
        limit = ordered[0].cautious * (1 + AS_FAST)
        similar = [
            candidate
            for candidate in ordered
            if candidate.concerns == ordered[0].concerns and candidate.cautious <= limit
        ]
        best = min(similar, key=lambda candidate: (candidate.complexity, *candidate.order))
        return [best, *(candidate for candidate in ordered if candidate is not best)]

    @cached_property
    def fastest(self) -> Candidate:
        """Fastest candidate with the concerns of the chosen candidate. Needs a candidate that fits."""
        return min(
            (candidate for candidate in self.fitting if candidate.concerns == self.fitting[0].concerns),
            key=lambda candidate: candidate.order,
        )

    @cached_property
    def runner_up(self) -> Candidate | None:
        """Best candidate of another kind than the chosen one."""
        others = (candidate for candidate in self.fitting if candidate.kind != self.fitting[0].kind)
        return next(others, None)

    @cached_property
    def best_of_kinds(self) -> dict[str, Candidate]:
        """Best candidate of each kind, best first; if no candidate of a kind fits, the lowest peak."""
        kinds: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            kinds.setdefault(candidate.kind, []).append(candidate)
        best = {kind: _best(candidates) for kind, candidates in kinds.items()}
        return dict(sorted(best.items(), key=lambda item: (not item[1].fits, item[1].order)))


def _best(candidates: Sequence[Candidate]) -> Candidate:
    fitting = [candidate for candidate in candidates if candidate.fits]
    return min(fitting, key=lambda candidate: candidate.order) if fitting else smallest(candidates)


def smallest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate that comes closest to fitting; only equally small ones are compared by time.

    If the devices have enough memory, that is the one that needs least of the host's.
    """
    on_device = [candidate for candidate in candidates if candidate.fits_device]
    sizes = [((one.host if on_device else 0, one.peak), one) for one in on_device or candidates]
    least = min(size for size, _ in sizes)
    return min((one for size, one in sizes if size == least), key=lambda candidate: candidate.order)


def search(run: RunConfig, world: World, *, budget: float | None = None) -> Search:
    """Return every legal layout of `run` over all ranks; without any, and if ranks may be idle, over fewer.

    `budget` is the memory of one rank in bytes, if the caller knows it. Raises validation's ConfigError
    if there is no legal layout.
    """
    check_values(run)
    if not world.fixed:
        check_machine(run, world)
    world = world.of_hardware(run.hardware)
    candidates = _from_worlds(run, [world], budget)
    if not candidates and not world.fixed:
        smaller = _smaller_worlds(run, world)[-MOST_WORLDS:]
        candidates = _from_worlds(run, [replace(world, ranks=ranks) for ranks in reversed(smaller)], budget)
    if not candidates:
        raise _why_none(run, world)
    return Search(tuple(candidates), world)


def _from_worlds(run: RunConfig, worlds: Sequence[World], budget: float | None) -> list[Candidate]:
    """Return the legal layouts of all worlds: without offload, and if none of these fits, also with it."""
    candidates: list[Candidate] = []
    for offload in (False, True):
        for world in worlds:
            candidates += _candidates(run, world, budget, MOST_SETTINGS // len(worlds), (offload,))
        if any(candidate.fits for candidate in candidates):
            break
    return candidates


def _smaller_worlds(run: RunConfig, world: World) -> list[int]:
    """Return numbers of ranks by which heads, layers and batch divide: whole nodes, or a part of a node."""
    step = world.ranks_per_node if world.ranks > world.ranks_per_node else 1
    split = run.model.num_heads, run.model.num_layers, run.training.global_batch_size
    products = {prod(sizes) for sizes in product(*map(divisors, split))}
    return sorted(ranks for ranks in products if ranks < world.ranks and (ranks < step or ranks % step == 0))


def _candidates(
    run: RunConfig,
    world: World,
    budget: float | None = None,
    most: int = MOST_SETTINGS,
    offload: Sequence[bool] = (False, True),
) -> Iterator[Candidate]:
    judge = _Judge(run, world, budget)
    yield from filter(None, map(judge.candidate, _settings(run, world, most, offload)))


def _settings(run: RunConfig, world: World, most: int, offload: Sequence[bool]) -> Iterator[Settings]:
    """Yield all settings to try, legal or not; if there are more than about `most`, evenly spaced sizes.

    Only those with a parallelism.offload_optimizer of `offload` are yielded.
    """
    default, p = ParallelismConfig(), run.parallelism
    options = {
        name: (getattr(p, name),) if getattr(p, name) != getattr(default, name) else values
        for name, values in CHOICES.items()
    }
    uses_all_nodes = world.ranks == run.hardware.nodes * world.ranks_per_node
    nodes = {} if uses_all_nodes else {"hardware.nodes": world.nodes}
    choices = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    all_axes = _thinned(list(_axes(run, world.ranks)), most // 64)
    for axes in all_axes:
        if not _is_possible(run, world, axes):
            continue
        combined = [fields for choice in choices if not _is_hopeless(fields := {**axes, **choice})]
        # Micro-batches that divide a data rank's share of the batch.
        micro_batches = divisors(run.training.global_batch_size // axes["data"])
        micro_batches = _thinned(micro_batches, most // max(1, len(all_axes) * len(combined)))
        for fields in combined:
            if fields["offload_optimizer"] not in offload or _runs_as_zero_1(run, fields):
                continue
            settings = _as_settings(fields)
            for micro_batch in micro_batches:
                yield {**settings, "training.micro_batch_size": micro_batch, **nodes}


def _thinned(sizes: list[T], most: int) -> list[T]:
    """Return the sizes, or about `most` of them, evenly spaced and with the first."""
    return sizes[:: -(-len(sizes) // max(1, most))] if sizes else sizes


def _is_hopeless(fields: dict[str, Any]) -> bool:
    """Return whether validation refuses the fields in any run; skipping them here is faster."""
    return (
        (fields["pipeline"] > 1 and fields["zero_stage"] > 1)
        or (fields["tensor"] == 1 and fields["sequence_parallel"])
        or (fields["context"] == 1 and fields["context_method"] is not ContextMethod.ring)
        or (fields["offload_optimizer"] and fields["zero_stage"] == 0)
        or ("expert" in fields and (fields["zero_stage"] == 3 or fields["offload_optimizer"]))
        or (fields["offload_parameters"] and not (fields["zero_stage"] == 3 and fields["offload_optimizer"]))
    )


def _is_possible(run: RunConfig, world: World, axes: dict[str, int]) -> bool:
    """Return whether validation accepts the sizes of the axes, as far as no other searched field matters."""
    split = changed(run, _as_settings(axes))
    try:
        check_tensor_divides(split)
        check_context_on_nodes(split, world)
    except ConfigError:
        return False
    return True


def _runs_as_zero_1(run: RunConfig, fields: dict[str, Any]) -> bool:
    """Return whether ZeRO-0 would run as ZeRO-1, so that the same layout would be searched twice."""
    return fields["zero_stage"] == 0 and effective_zero_stage(changed(run, _as_settings(fields)))[0] == 1


def _as_settings(fields: dict[str, Any]) -> Settings:
    return {f"parallelism.{name}": value for name, value in fields.items()}


def _axes(run: RunConfig, ranks: int) -> Iterator[dict[str, int]]:
    p, batch = run.parallelism, run.training.global_batch_size
    tensors = [p.tensor] if p.tensor > 1 else divisors(ranks)
    most = min(run.model.num_heads, BOUNDS["parallelism.tensor"].most)
    for tensor in tensors:
        if tensor > most or ranks % tensor:
            continue
        pipelines = [p.pipeline] if p.pipeline > 1 else divisors(ranks // tensor)
        for pipeline in pipelines:
            if pipeline > run.model.num_layers or ranks % (tensor * pipeline):
                continue
            for context in [p.context] if p.context > 1 else _contexts(run, ranks // (tensor * pipeline)):
                data = ranks // (tensor * pipeline * context)
                fits = data * tensor * pipeline * context == ranks
                if fits and p.data in (None, data) and batch % data == 0:
                    axes = {"tensor": tensor, "pipeline": pipeline, "data": data, "context": context}
                    yield from ({**axes, **shared} for shared in _expert_axes(run, data * context))


def _contexts(run: RunConfig, ranks: int) -> list[int]:
    """Return the context sizes to try; `ranks` is the world size without tensor and pipeline ranks."""
    if run.model.inputs is InputKind.patches:
        return [1]
    return [size for size in divisors(ranks) if size == 1 or sequence_length(run) // size >= LEAST_TOKENS]


def _expert_axes(run: RunConfig, ranks: int) -> list[dict[str, int]]:
    """Return expert sizes to try on `ranks` data x context ranks, as settings; the default 1 sets nothing."""
    chosen, count = run.parallelism.expert, run.model.experts.count
    if chosen > 1:
        return [{"expert": chosen}] if ranks % chosen == 0 else []
    return [{"expert": size} if size > 1 else {} for size in divisors(gcd(ranks, count) if count else 1)]


def freed(run: RunConfig) -> RunConfig:
    """Return the run with every searched field at its default, so that the search may set it."""
    kept = {name: getattr(run.parallelism, name) for name in ("pipeline_schedule", "vocabulary_multiple")}
    return replace(run, parallelism=ParallelismConfig(**kept))


class _Judge:
    """Validates settings and computes the cost of their layout."""

    def __init__(self, run: RunConfig, world: World, budget: float | None) -> None:
        self.run, self.world = changed(run, {"parallelism.auto": False}), replace(world, fixed=True)
        # In a fixed world each rank makes this choice: it must not depend on the memory of its machine.
        shared = replace(world, memory_bytes=None) if world.fixed else world
        self.budget = budget or memory_budget(run, shared, world.ranks)
        rates = rates_of(run.hardware, run.precision.dtype, world.ranks)
        self.rates: AnyRates = rates or NOMINAL[world.device]

    def candidate(self, chosen: Settings) -> Candidate | None:
        run = self._with_possible_imbalance(changed(self.run, chosen))
        try:
            layout = validate_layout(run, self.world)
        except ConfigError:
            return None
        per_node = self.world.ranks_per_node
        ranks = pipeline_ranks(run, layout)
        device, host = peaks(run, layout, ranks)
        budgets = self.budget, host_budget(run, layout)
        seconds = partial(planned_seconds, run, layout, ranks, self.rates, per_node)
        return Candidate(chosen, run, layout, seconds, device, budgets[0], host, budgets[1], per_node)

    @staticmethod
    def _with_possible_imbalance(run: RunConfig) -> RunConfig:
        """Return the run with at most the imbalance of all rows on one of its expert ranks."""
        most = float(run.parallelism.expert)
        return changed(run, {"plan.expert_imbalance": most}) if run.plan.expert_imbalance > most else run


def planned_seconds(
    run: RunConfig, layout: Layout, ranks: Sequence[Rank], rates: AnyRates, per_node: int
) -> Seconds:
    groups = group_shapes(layout, per_node)
    time = step_time(run, layout, ranks, rates, groups)
    return Seconds(time.total, 0.0 if groups["data"].is_within_node else time.data_hidden)


def peaks(run: RunConfig, layout: Layout, ranks: Sequence[Rank]) -> tuple[int, int]:
    """Return the largest bytes of a rank, on its device and on its host."""
    # The first of equal ranks has most micro-batches in flight; under DualPipeV all have the same number.
    fullest = {rank.kind: rank for rank in reversed(ranks)}.values()
    memories = rank_memories(run, layout, fullest)
    return max(memory.total for memory in memories), max(memory.on_host for memory in memories)


def _why_none(run: RunConfig, world: World) -> ConfigError:
    """Return validation's error on a single rank; else the error about a field that was set, or the batch."""
    default = ParallelismConfig()
    one = {
        "training.micro_batch_size": 1,
        "parallelism.pipeline_schedule": default.pipeline_schedule,
        "plan.expert_imbalance": 1.0,
    }
    try:
        validate(changed(freed(run), one), replace(world, ranks=1, fixed=True))
    except ConfigError as error:
        return error
    for name in ("data", "context", "tensor", "pipeline", "expert", "pipeline_schedule", *CHOICES):
        value, free = getattr(run.parallelism, name), getattr(default, name)
        field = f"parallelism.{name}"
        if value != free and (legal := next(_candidates(changed(run, {field: free}), world), None)):
            why = f"no layout of {world.ranks} ranks is legal with this setting"
            return ConfigError(field, value, why, f"{field}={as_typed(legal.settings.get(field, free))}")
    batch = run.training.global_batch_size
    larger = sorted({data * -(-batch // data) for data in divisors(world.ranks) if batch % data})
    why = f"no layout of {world.ranks} ranks is legal with a batch of {batch} and the other settings"
    remedies = [*settings("training.global_batch_size", larger[:2]), "fewer ranks"]
    return ConfigError("parallelism.auto", True, why, " or ".join(remedies))
