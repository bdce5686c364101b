"""`parallelism=auto`: every layout that validation allows for a model, a batch and a machine. Pure.

Searched: data, tensor and pipeline sizes, ZeRO stage, micro-batch, sequence parallelism, recomputation and
offload. What is typed at another value than its default stays as typed; the micro-batch is always chosen.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from launcher.config.errors import ConfigError, as_typed, settings
from launcher.config.layout import Layout, check_machine, effective_zero_stage
from launcher.config.schema import ActivationCheckpointing, ParallelismConfig, RunConfig
from launcher.config.shape import divisors
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.planning.choose.changes import changed
from launcher.planning.cost.geometry import Rank, kind_of, pipeline_ranks
from launcher.planning.cost.measured_rates import AnyRates, rates_of
from launcher.planning.cost.memory import rank_memory
from launcher.planning.cost.plan import memory_budget
from launcher.planning.cost.rates import NOMINAL
from launcher.planning.cost.step_time import step_time
from launcher.planning.cost.traffic import group_shapes

Settings = dict[str, Any]

CHOICES: dict[str, Sequence[Any]] = {
    "zero_stage": range(4),
    "sequence_parallel": (False, True),
    "activation_checkpointing": tuple(ActivationCheckpointing),
    "offload_optimizer": (False, True),
    "offload_parameters": (False, True),
}


@dataclass(frozen=True)
class Candidate:
    """A layout that validation allows, and what it costs."""

    settings: Settings
    run: RunConfig
    layout: Layout
    seconds: float  # of a step: in the right order also where no speed is known, and else no more than that
    peak: int  # bytes of the fullest rank
    budget: float | None
    per_node: int

    @property
    def fits(self) -> bool:
        return self.budget is None or self.peak <= self.budget

    @property
    def crosses_nodes(self) -> bool:
        """Whether a tensor group does."""
        return self.layout.tensor > 1 and self.per_node % self.layout.tensor != 0

    @property
    def kind(self) -> str:
        """The class it is told of in."""
        axes = {"pipeline": self.layout.pipeline, "data": self.layout.data, "tensor": self.layout.tensor}
        used = " x ".join(name for name, size in axes.items() if size > 1) or "one rank"
        offload = ", offload" if self.run.parallelism.offload_optimizer else ""
        return f"{used}, ZeRO-{self.layout.zero_stage}{offload}"

    @property
    def order(self) -> tuple[Any, ...]:
        """The least is the best. The settings last, so that equals are told apart the same way every time."""
        return self.crosses_nodes, self.seconds, self.peak, tuple(map(str, self.settings.values()))


@dataclass(frozen=True)
class Search:
    """The legal layouts of a run. Where no layout could use all ranks of the world, layouts of fewer."""

    candidates: tuple[Candidate, ...]
    world: World

    @cached_property
    def fitting(self) -> list[Candidate]:
        """From the best on. A tensor group over nodes counts only where nothing else fits."""
        return sorted((one for one in self.candidates if one.fits), key=lambda one: one.order)

    @cached_property
    def best_of_kinds(self) -> dict[str, Candidate]:
        """The best of each class; of one that does not fit, what comes closest. The best class first."""
        found: dict[str, Candidate] = {}
        for one in self.candidates:
            other = found.get(one.kind)
            if other is None or _rank_in_kind(one) < _rank_in_kind(other):
                found[one.kind] = one
        return dict(sorted(found.items(), key=lambda item: (not item[1].fits, item[1].order)))


def _rank_in_kind(one: Candidate) -> tuple[Any, ...]:
    return (0, *one.order) if one.fits else (1, one.peak, *one.order)


def search(run: RunConfig, world: World, *, budget: float | None = None) -> Search:
    """Return every legal layout of `run` over all ranks; where there is none, over fewer, if those may be.

    `budget` is the memory of one rank in bytes, where the caller knows it. Raises ConfigError, validation's
    own, where there is no legal layout at all.
    """
    if not world.fixed:
        check_machine(run, world)
    world = world.of_hardware(run.hardware)
    found = tuple(_candidates(run, world, budget))
    if not found and not world.fixed:
        found = tuple(
            candidate
            for ranks in _smaller_worlds(run, world)
            for candidate in _candidates(run, replace(world, ranks=ranks), budget)
        )
    if not found:
        raise _why_none(run, world)
    return Search(found, world)


def _smaller_worlds(run: RunConfig, world: World) -> list[int]:
    """Return numbers of ranks that split the heads, the layers and the batch: whole nodes, or part of one."""
    step = world.ranks_per_node if world.ranks > world.ranks_per_node else 1
    sizes = product(
        divisors(run.model.num_heads),
        divisors(run.model.num_layers),
        divisors(run.training.global_batch_size),
    )
    products = {tensor * pipeline * data for tensor, pipeline, data in sizes}
    return sorted(ranks for ranks in products if ranks < world.ranks and (ranks < step or ranks % step == 0))


def _candidates(run: RunConfig, world: World, budget: float | None = None) -> Iterator[Candidate]:
    judged = _Judge(run, world, budget)
    for chosen in _settings(run, world):
        candidate = judged.candidate(chosen)
        if candidate is not None:
            yield candidate


def _settings(run: RunConfig, world: World) -> Iterator[Settings]:
    """All there are, legal or not, in an order of their own."""
    default, p = ParallelismConfig(), run.parallelism
    options = {
        name: (getattr(p, name),) if getattr(p, name) != getattr(default, name) else values
        for name, values in CHOICES.items()
    }
    is_whole = world.ranks == run.hardware.nodes * world.ranks_per_node
    nodes = {} if is_whole else {"hardware.nodes": world.nodes}
    for axes in _axes(run, world.ranks):
        # Micro-batches that divide what one data rank has of the batch.
        micro_batches = divisors(run.training.global_batch_size // axes["data"])
        for values in product(*options.values()):
            own = {**axes, **dict(zip(options, values, strict=True))}
            if _is_hopeless(own):
                continue
            for micro_batch in micro_batches:
                yield {
                    **{f"parallelism.{name}": value for name, value in own.items()},
                    "training.micro_batch_size": micro_batch,
                    **nodes,
                }


def _is_hopeless(own: dict[str, Any]) -> bool:
    """What validation would refuse whatever else is set: most of the product, and quicker told here."""
    return (
        (own["pipeline"] > 1 and own["zero_stage"] > 1)
        or (own["tensor"] == 1 and own["sequence_parallel"])
        or (own["offload_optimizer"] and own["zero_stage"] == 0)
        or (own["offload_parameters"] and not (own["zero_stage"] == 3 and own["offload_optimizer"]))
    )


def _axes(run: RunConfig, ranks: int) -> Iterator[dict[str, int]]:
    p, batch = run.parallelism, run.training.global_batch_size
    tensors = [p.tensor] if p.tensor > 1 else divisors(ranks)
    for tensor in tensors:
        if tensor > run.model.num_heads or ranks % tensor:
            continue
        pipelines = [p.pipeline] if p.pipeline > 1 else divisors(ranks // tensor)
        for pipeline in pipelines:
            if pipeline > run.model.num_layers or ranks % (tensor * pipeline):
                continue
            data = ranks // (tensor * pipeline)
            if p.data in (None, data) and batch % data == 0:
                yield {"tensor": tensor, "pipeline": pipeline, "data": data}


def freed(run: RunConfig) -> RunConfig:
    """The run with all that is searched at its default, and thereby free."""
    kept = run.parallelism.pipeline_schedule
    return replace(run, parallelism=ParallelismConfig(pipeline_schedule=kept))


class _Judge:
    """Validation, and what a layout costs."""

    def __init__(self, run: RunConfig, world: World, budget: float | None) -> None:
        self.run, self.world = changed(run, {"parallelism.auto": False}), replace(world, fixed=True)
        # Ranks that others started each make this choice: it must not depend on the memory of their machines.
        shared = replace(world, memory_bytes=None) if world.fixed else world
        self.budget = budget or memory_budget(run, shared, world.ranks)
        rates = rates_of(run.hardware, run.precision.dtype, world.ranks)
        self.rates: AnyRates = rates or NOMINAL[world.device]

    def candidate(self, chosen: Settings) -> Candidate | None:
        run = changed(self.run, chosen)
        # ZeRO-0 that runs as ZeRO-1 is no layout of its own.
        if run.parallelism.zero_stage == 0 and effective_zero_stage(run)[0] == 1:
            return None
        try:
            layout = validate(run, self.world)
        except ConfigError:
            return None
        per_node = self.world.ranks_per_node
        return Candidate(
            chosen,
            run,
            layout,
            seconds(run, layout, self.rates, per_node),
            peak(run, layout),
            self.budget,
            per_node,
        )


def seconds(run: RunConfig, layout: Layout, rates: AnyRates, per_node: int) -> float:
    groups = group_shapes(layout, per_node)
    return step_time(run, layout, pipeline_ranks(run, layout), rates, groups).total


def peak(run: RunConfig, layout: Layout) -> int:
    ranks = _fullest(pipeline_ranks(run, layout))
    return max(rank_memory(run, layout, rank).total for rank in ranks)


def _fullest(ranks: tuple[Rank, ...]) -> Iterable[Rank]:
    """Those that may be the fullest: of ranks that are alike the first, which holds most micro-batches.

    Under DualPipeV all hold equally many in all.
    """
    return {kind_of(rank): rank for rank in reversed(ranks)}.values()


def _why_none(run: RunConfig, world: World) -> ConfigError:
    """Validation's own words about the run on one rank; else a setting that was typed, else the batch."""
    try:
        validate(changed(freed(run), {"training.micro_batch_size": 1}), replace(world, ranks=1, fixed=True))
    except ConfigError as error:
        return error
    default = ParallelismConfig()
    for name in ("data", "tensor", "pipeline", *CHOICES):
        value, free = getattr(run.parallelism, name), getattr(default, name)
        field = f"parallelism.{name}"
        if value != free and (found := next(_candidates(changed(run, {field: free}), world), None)):
            why = f"no layout of {world.ranks} ranks is legal with it"
            return ConfigError(field, value, why, f"{field}={as_typed(found.settings[field])}")
    batch = run.training.global_batch_size
    larger = sorted({data * -(-batch // data) for data in divisors(world.ranks) if batch % data})
    return ConfigError(
        "parallelism.auto",
        True,
        f"no layout of {world.ranks} ranks is legal with a batch of {batch} and what is set beside it",
        " or ".join([*settings("training.global_batch_size", larger[:2]), "fewer ranks"]),
    )
