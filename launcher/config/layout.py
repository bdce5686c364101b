"""How many ranks there are and what each axis gets: pure arithmetic over a run and a machine."""

from dataclasses import dataclass

from launcher.config.errors import ConfigError
from launcher.config.schema import Device, Dtype, RunConfig


@dataclass(frozen=True)
class Layout:
    """The resolved layout of a run: what `null` and `auto` in the config became.

    `zero_stage` is the stage handed to DeepSpeed; `notes` says, for people, whatever differs from
    what was typed. world size = pipeline x data x tensor.
    """

    pipeline: int
    data: int
    tensor: int
    device: str  # "cpu" or "cuda"
    accumulation: int  # micro-batches per optimizer step and data-parallel rank
    zero_stage: int
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def describe(self) -> str:
        ranks = "rank" if self.world_size == 1 else "ranks"
        axes = f"{self.pipeline} pipeline x {self.data} data x {self.tensor} tensor"
        return f"{self.world_size} {self.device} {ranks} = {axes}, ZeRO-{self.zero_stage}"


def resolve_layout(run: RunConfig, *, gpus: int, cores: int, joined_world: int | None = None) -> Layout:
    """The layout of `run` on a machine with `gpus` and `cores`, or in a world somebody else started.

    `joined_world` is the world size under torchrun or srun, else None: the launcher starts the ranks.
    Raises ConfigError where the world does not factor, the machine lacks accelerators, or the batch
    does not divide.
    """
    device = resolve_device(run, gpus=gpus)
    notes = []
    if joined_world is not None:
        data = _data_in_world(run, joined_world, "the world size")
    else:
        data, note = _data_on_this_machine(run, device, gpus=gpus, cores=cores)
        notes += [note] if note else []
    zero_stage, note = effective_zero_stage(run)
    notes += [note] if note else []
    return Layout(
        pipeline=run.parallelism.pipeline,
        data=data,
        tensor=run.parallelism.tensor,
        device=device,
        accumulation=_accumulation(run, data),
        zero_stage=zero_stage,
        notes=tuple(notes),
    )


def resolve_device(run: RunConfig, *, gpus: int) -> str:
    """`auto` becomes "cuda" where there are GPUs, else "cpu". Raises ConfigError without a GPU for cuda."""
    wanted = run.hardware.device
    if wanted is Device.cuda and gpus == 0:
        raise ConfigError(
            "hardware.device", "cuda", "this machine has no GPU", "hardware=cpu or hardware=local"
        )
    if wanted is Device.auto:
        return "cuda" if gpus else "cpu"
    return wanted.name


def effective_zero_stage(run: RunConfig) -> tuple[int, str | None]:
    """The ZeRO stage to hand to DeepSpeed and, where it is not the one asked for, why.

    DeepSpeed 0.19 computes a wrong gradient norm, without a word, under ZeRO-0 with a pipeline (later
    stages are left out) and under ZeRO-0 in low precision with tensor parallelism. ZeRO-1 is right in
    both and computes the same update.
    """
    stage = run.parallelism.zero_stage
    if stage == 0 and run.parallelism.pipeline > 1:
        return 1, "parallelism.zero_stage=0 runs as 1: DeepSpeed's ZeRO-0 clips wrongly under a pipeline"
    if stage == 0 and run.precision.dtype is not Dtype.fp32:
        return 1, "parallelism.zero_stage=0 runs as 1: DeepSpeed's ZeRO-0 is wrong in low precision"
    return stage, None


def _data_in_world(run: RunConfig, world: int, world_name: str) -> int:
    p = run.parallelism
    model_parallel = p.tensor * p.pipeline
    if world % model_parallel:
        raise ConfigError(
            "parallelism.tensor" if p.tensor > 1 else "parallelism.pipeline",
            p.tensor if p.tensor > 1 else p.pipeline,
            f"{world_name} {world} does not factor into tensor {p.tensor} x pipeline {p.pipeline} "
            f"= {model_parallel} ranks per copy of the model",
            f"a tensor x pipeline product that divides {world}: {_either(divisors(world))}",
        )
    data = world // model_parallel
    if p.data is not None and p.data != data:
        raise ConfigError(
            "parallelism.data",
            p.data,
            f"pipeline {p.pipeline} x data {p.data} x tensor {p.tensor} = {model_parallel * p.data} ranks, "
            f"but {world_name} is {world}",
            f"parallelism.data={data} or parallelism.data=null",
        )
    return data


def _data_on_this_machine(run: RunConfig, device: str, *, gpus: int, cores: int) -> tuple[int, str | None]:
    h, p = run.hardware, run.parallelism
    if h.nodes > 1:
        raise ConfigError(
            "hardware.nodes",
            h.nodes,
            "`launcher` starts ranks on this machine only",
            "hardware.nodes=1, or start the same command on every node with torchrun or srun",
        )
    if device == "cuda" and (h.accelerators_per_node or 0) > gpus:
        raise ConfigError(
            "hardware.accelerators_per_node",
            h.accelerators_per_node,
            f"this machine has {gpus} GPUs",
            f"hardware.accelerators_per_node={gpus} or hardware=local",
        )
    found = gpus if device == "cuda" else cores
    available = h.accelerators_per_node or found
    unit = "GPUs" if device == "cuda" else "CPU ranks"
    bounded = device == "cuda" or h.accelerators_per_node is not None
    model_parallel = p.tensor * p.pipeline
    if bounded and model_parallel * (p.data or 1) > available:
        axis, value = _largest_axis(run)
        raise ConfigError(
            axis,
            value,
            f"pipeline {p.pipeline} x data {p.data or 1} x tensor {p.tensor} = "
            f"{model_parallel * (p.data or 1)} ranks, more than the {available} {unit} here",
            f"a product of at most {available}",
        )
    if p.data is not None:
        data = p.data
    elif bounded:
        data = _data_in_world(run, available, f"the number of {unit}")
    else:
        data = _data_that_divides_the_batch(run, max(1, available // model_parallel))
    ranks = data * model_parallel
    if device == "cpu" and ranks > cores:
        return data, f"{ranks} CPU ranks share {cores} cores: right, but slow"
    return data, None


def _data_that_divides_the_batch(run: RunConfig, most: int) -> int:
    t = run.training
    sequences = t.global_batch_size // t.micro_batch_size
    return max((d for d in divisors(sequences) if d <= most), default=1) if sequences else 1


def _accumulation(run: RunConfig, data: int) -> int:
    t = run.training
    per_pass = t.micro_batch_size * data
    if t.global_batch_size % per_pass:
        lower = t.global_batch_size // per_pass * per_pass
        sizes = [n for n in (lower, lower + per_pass) if n]
        micro = divisors(t.global_batch_size // data) if t.global_batch_size % data == 0 else []
        remedy = _either([f"training.global_batch_size={n}" for n in sizes])
        if micro:
            remedy += f", or training.micro_batch_size={nearest(micro, t.micro_batch_size)[0]}"
        raise ConfigError(
            "training.global_batch_size",
            t.global_batch_size,
            f"does not divide into micro-batches of {t.micro_batch_size} on {data} data-parallel ranks "
            f"({per_pass} sequences a pass)",
            remedy,
        )
    return t.global_batch_size // per_pass


def _largest_axis(run: RunConfig) -> tuple[str, int]:
    p = run.parallelism
    axes = {"tensor": p.tensor, "pipeline": p.pipeline, "data": p.data or 1}
    name = max(axes, key=lambda axis: axes[axis])
    return f"parallelism.{name}", axes[name]


def divisors(n: int) -> list[int]:
    """The divisors of n > 0 in rising order."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def nearest(options: list[int], value: int, count: int = 2) -> list[int]:
    """The `count` options closest to value, in rising order."""
    return sorted(sorted(options, key=lambda option: (abs(option - value), option))[:count])


def _either(options: list[int] | list[str]) -> str:
    return " or ".join(str(option) for option in options)
