"""Resolve the layout of a run: the ranks, and the size of each axis. Pure arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.config import shape
from launcher.config.context_rules import check_context_on_nodes
from launcher.config.errors import ConfigError, refusal, settings
from launcher.config.schema import Dtype, RunConfig
from launcher.config.world import World
from launcher.text import plural

# Groups of ranks that communicate with each other. expert: data ranks that together hold all experts once;
# expert_data: data ranks that hold the same experts. Without expert parallelism neither of the two is used.
GroupName = Literal["tensor", "context", "data", "expert", "expert_data", "pipeline"]
GROUPS: tuple[GroupName, ...] = ("tensor", "context", "data", "expert", "expert_data", "pipeline")
EXPERT_GROUPS: tuple[GroupName, ...] = ("expert", "expert_data")
STEP_PARTS = ("compute", *GROUPS, "optimizer")  # seconds of a step by part; for a group, the wait for it


@dataclass(frozen=True)
class Layout:
    """The resolved layout of a run, without `null` and `auto`.

    World size = pipeline x data x context x tensor. A data rank reads samples of its own, which its context
    ranks share. `zero_stage` is the stage that DeepSpeed gets; `compiled` says whether torch.compile compiles
    the blocks; `notes` tell the user what differs from the config.
    """

    pipeline: int
    data: int
    tensor: int
    device: str  # "cpu" or "cuda"
    accumulation: int  # micro-batches per optimizer step and data-parallel rank
    zero_stage: int
    stages_per_rank: int = 1  # pipeline stages; 2 under DualPipeV
    notes: tuple[str, ...] = ()
    compiled: bool = False
    context: int = 1  # ranks over which each sequence is split
    expert: int = 1  # ranks over which the experts are split; divides `gradient_ranks`, data x context

    @property
    def world_size(self) -> int:
        return self.pipeline * self.gradient_ranks * self.tensor

    @property
    def compiles_updates(self) -> bool:
        """Whether updates that are our own code, not torch's optimizer, are one compiled kernel."""
        return self.compiled and self.device == "cuda"

    @property
    def gradient_ranks(self) -> int:
        """Ranks with a copy of the same weights: DeepSpeed's data group, over which gradients are reduced."""
        return self.data * self.context

    @property
    def expert_holders(self) -> int:
        """Ranks of the data group that hold the same experts."""
        return self.gradient_ranks // self.expert

    def describe(self) -> str:
        schedule = " (DualPipeV)" if self.stages_per_rank == 2 else ""
        context = f" x {self.context} context" if self.context > 1 else ""
        experts = f" (experts over {self.expert})" if self.expert > 1 else ""
        data = f"{self.data} data{context}{experts}"
        axes = f"{self.pipeline} pipeline{schedule} x {data} x {self.tensor} tensor"
        ranks = plural(self.world_size, f"{self.device} rank")
        batches = plural(self.accumulation, "micro-batch", "es")
        return f"{ranks} = {axes}, ZeRO-{self.zero_stage}, {batches} per step and data rank"


def recorded_layout(identity: Mapping[str, Any]) -> Layout:
    """Return the layout in the content of run.json. Raises KeyError or TypeError if it is damaged."""
    layout = Layout(**identity["layout"])
    return replace(layout, notes=tuple(layout.notes))


def resolve_layout(run: RunConfig, world: World) -> Layout:
    """Return the layout of `run` on the ranks of `world`.

    Raises ConfigError if the ranks do not factor, the machine lacks accelerators, or the batch does not fit.
    """
    assert run.hardware.device.name in ("auto", world.device)
    all_ranks_take_part = world.fixed or run.hardware.nodes > 1
    if not world.fixed:
        check_machine(run, world)
    sharing = None
    if all_ranks_take_part:
        data = _data_in_world(run, world.ranks if world.fixed else run.hardware.nodes * world.ranks_per_node)
    else:
        data, sharing = _data_on_this_machine(run, world)
    check_context_on_nodes(run, world)
    zero_stage, substitution = effective_zero_stage(run)
    return Layout(
        pipeline=run.parallelism.pipeline,
        data=data,
        tensor=run.parallelism.tensor,
        device=world.device,
        accumulation=_accumulation(run, data, fewer_ranks_possible=not all_ranks_take_part),
        zero_stage=zero_stage,
        stages_per_rank=shape.stages_per_rank(run),
        notes=tuple(note for note in (sharing, substitution) if note),
        compiled=is_compiled(run, world.device),
        context=run.parallelism.context,
        expert=_expert(run, data),
    )


def _expert(run: RunConfig, data: int) -> int:
    """Return the expert-parallel size. Raises ConfigError if it does not divide data x context ranks."""
    expert, context = run.parallelism.expert, run.parallelism.context
    ranks = data * context
    if ranks % expert:
        why = f"does not divide the {plural(data, 'data-parallel rank')}"
        why += f" x {context} context ranks" if context > 1 else ""
        legal = [size for size in shape.divisors(ranks) if run.model.experts.count % size == 0]
        near = settings("parallelism.expert", shape.nearest(legal, expert))
        raise refusal(run, "parallelism.expert", why, *near)
    return expert


def is_compiled(run: RunConfig, device: str) -> bool:
    """Return whether torch.compile compiles the transformer blocks on `device`, "cpu" or "cuda"."""
    return device == "cuda" if run.training.compile is None else run.training.compile


def effective_zero_stage(run: RunConfig) -> tuple[int, str | None]:
    """Return the ZeRO stage for DeepSpeed and, if the config has another, the reason.

    DeepSpeed 0.19's ZeRO-0 silently computes a wrong gradient norm with a pipeline (later stages are left
    out) and in low precision with tensor parallelism. ZeRO-1 is right in both and computes the same update.
    """
    stage, note = run.parallelism.zero_stage, "ZeRO-1 is used instead of ZeRO-0"
    if stage == 0 and run.parallelism.pipeline > 1:
        return 1, f"{note}: with a pipeline, DeepSpeed's ZeRO-0 computes a wrong gradient norm"
    if stage == 0 and run.precision.dtype is not Dtype.fp32:
        return 1, f"{note}: DeepSpeed's ZeRO-0 has defects in bf16 and fp16"
    return stage, None


def _data_in_world(run: RunConfig, world: int) -> int:
    p = run.parallelism
    copy = ranks_of_a_sample(run)

    def data_beside(size: int) -> int | None:
        return world // size if world % size == 0 and p.data in (None, world // size) else None

    if world % copy:
        worlds = shape.multiples_around(world, copy) if p.data is None else [copy * p.data]
        remedies = *_other_splits(run, data_beside), f"a world size of {' or '.join(map(str, worlds))}"
        raise _not_a_multiple(run, f"the world size {world} is", *remedies)
    data = world // copy
    if p.data not in (None, data):
        why = f"{_product(run)}, but the world size is {world}"
        remedies = f"parallelism.data={data}", "parallelism.data=null (the remaining ranks)"
        raise refusal(run, "parallelism.data", why, *remedies)
    return data


def ranks_of_a_sample(run: RunConfig) -> int:
    """Return the ranks of each data rank: a copy of the model for each of its context ranks."""
    p = run.parallelism
    return p.tensor * p.pipeline * p.context


def _not_a_multiple(run: RunConfig, ranks: str, *remedies: str) -> ConfigError:
    p = run.parallelism
    axis = "parallelism.tensor" if p.tensor > 1 else "parallelism.pipeline"
    product, copies = f"tensor {p.tensor} x pipeline {p.pipeline}", "one copy of the model"
    if p.context > 1:
        axis = "parallelism.context" if p.context >= max(p.tensor, p.pipeline) else axis
        product, copies = f"{product} x context {p.context}", "a copy of the model for each context rank"
    why = f"{ranks} not a multiple of {product} = {ranks_of_a_sample(run)} ranks, {copies}"
    return refusal(run, axis, why, *remedies)


def check_machine(run: RunConfig, world: World) -> None:
    """Raise ConfigError where the run asks for more nodes or GPUs than the launcher can start ranks on."""
    if run.hardware.nodes > world.nodes:
        why = "`launcher` starts ranks on this machine only"
        on_every_node = "the same command started on every node by torchrun or srun"
        remedies = "hardware.nodes=1", "`launcher submit` instead", on_every_node
        raise refusal(run, "hardware.nodes", why, *remedies)
    if world.device == "cuda" and (run.hardware.accelerators_per_node or 0) > world.ranks_per_node:
        why = f"this machine has {plural(world.ranks_per_node, 'GPU')}"
        fewer = settings("hardware.accelerators_per_node", [world.ranks_per_node])
        local = "hardware=local (the hardware of this machine)"
        raise refusal(run, "hardware.accelerators_per_node", why, *fewer, local)


def _data_on_this_machine(run: RunConfig, world: World) -> tuple[int, str | None]:
    h, p = run.hardware, run.parallelism
    copy, here = ranks_of_a_sample(run), world.ranks_per_node
    if world.device == "cpu" and h.accelerators_per_node is None:
        most = max(1, here // copy)
        data = p.data or max((size for size in range(1, most + 1) if _divides_batch(run, size)), default=1)
    else:
        data = _data_on_accelerators(run, h.accelerators_per_node or here, world.device)
    ranks = data * copy
    if world.device == "cpu" and ranks > here:
        return data, f"{ranks} CPU ranks share {plural(here, 'core')}: correct results, but slow training"
    return data, None


def _data_on_accelerators(run: RunConfig, available: int, device: str) -> int:
    p = run.parallelism
    copy, here = ranks_of_a_sample(run), plural(available, "GPU" if device == "cuda" else "CPU rank")
    wanted = copy * (p.data or 1)
    if wanted <= available and (p.data is not None or available % copy == 0):
        return p.data or available // copy

    def data_beside(size: int) -> int | None:
        data = p.data or available // size
        return data if size * data <= available and (p.data or available % size == 0) else None

    fewer = [size for size in range(1, available // copy + 1) if _divides_batch(run, size)]
    remedies = [*settings("parallelism.data", fewer[-1:]), *_other_splits(run, data_beside)]
    one_rank = "parallelism.tensor=1 parallelism.pipeline=1 parallelism.data=1"
    one_rank += " parallelism.context=1" if p.context > 1 else ""
    if wanted <= available:
        raise _not_a_multiple(run, f"the {here} here are", *(remedies or [one_rank]))
    remedies += [f"hardware.accelerators_per_node={wanted}"] if device == "cpu" else []
    why = f"{_product(run)}, more than the {here} here"
    axes = {"tensor": p.tensor, "pipeline": p.pipeline, "data": p.data or 1, "context": p.context}
    largest = max(axes, key=lambda axis: axes[axis])
    raise refusal(run, f"parallelism.{largest}", why, *(remedies or [one_rank]))


def _other_splits(run: RunConfig, data_beside: Callable[[int], int | None]) -> list[str]:
    """Return settings of one model-parallel axis after which the data-parallel ranks divide the batch.

    `data_beside` maps the ranks of a copy of the model to the data-parallel ranks; None if they do not fit.
    """
    p = run.parallelism

    def works(size: int) -> bool:
        data = data_beside(size)
        return data is not None and _divides_batch(run, data)

    tensor = [
        size
        for size in shape.legal_tensor_sizes(run)
        if size != p.tensor and p.context == 1 and works(size * p.pipeline)
    ]
    pipeline = [
        size
        for size in shape.legal_pipeline_sizes(run)
        if size != p.pipeline and works(p.tensor * size * p.context)
    ]
    # Of the divisors of a size that splits sequences and heads, each splits them too.
    context = [size for size in shape.divisors(p.context)[:-1] if works(p.tensor * p.pipeline * size)]
    return [
        *settings("parallelism.context", context[-1:]),
        *settings("parallelism.tensor", shape.nearest(tensor, p.tensor, 1)),
        *settings("parallelism.pipeline", shape.nearest(pipeline, p.pipeline, 1)),
    ]


def _divides_batch(run: RunConfig, data: int) -> bool:
    """Return whether `data` ranks divide the batch into enough whole micro-batches for the schedule."""
    return _is_enough(run, run.training.micro_batch_size * data)


def _is_enough(run: RunConfig, at_once: int) -> bool:
    sequences = run.training.global_batch_size
    return sequences % at_once == 0 and sequences // at_once >= shape.least_micro_batches(run)


def _product(run: RunConfig) -> str:
    p = run.parallelism
    ranks = plural(ranks_of_a_sample(run) * (p.data or 1), "rank")
    context = f" x context {p.context}" if p.context > 1 else ""
    return f"pipeline {p.pipeline} x data {p.data or 1}{context} x tensor {p.tensor} = {ranks}"


def _accumulation(run: RunConfig, data: int, *, fewer_ranks_possible: bool) -> int:
    t = run.training
    sequences = t.micro_batch_size * data
    if _divides_batch(run, data):
        return t.global_batch_size // sequences
    least = shape.least_micro_batches(run)
    batches = [n for n in shape.multiples_around(t.global_batch_size, sequences) if n >= least * sequences]
    micro = [n for n in shape.divisors(t.global_batch_size) if _is_enough(run, n * data)]
    smaller = range(1, data if fewer_ranks_possible else 1)
    fewer = [size for size in smaller if _divides_batch(run, size)]
    remedies = [
        *settings("training.global_batch_size", batches or [least * sequences]),
        *settings("training.micro_batch_size", shape.nearest(micro, t.micro_batch_size, 1)),
        *settings("parallelism.data", shape.nearest(fewer, data, 1)),
    ]
    if t.global_batch_size % sequences:
        ranks = plural(data, "data-parallel rank")
        why = f"not a multiple of {sequences}: micro-batches of {t.micro_batch_size} on {ranks}"
        raise refusal(run, "training.global_batch_size", why, *remedies)
    batches_per_rank = plural(t.global_batch_size // sequences, "micro-batch", "es")
    why = f"{batches_per_rank} per step and data rank, and {least} are needed: two for each of "
    why += f"{run.parallelism.pipeline} pipeline ranks"
    raise refusal(run, "parallelism.pipeline_schedule", why, *remedies, "parallelism.pipeline_schedule=1f1b")
