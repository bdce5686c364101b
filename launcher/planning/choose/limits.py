"""What a step spends its time on, and what fills the memory, in words. Pure."""

from launcher.config.schema import RunConfig
from launcher.planning.cost.plan import Plan

LINKS = {True: "within a node", False: "between nodes"}


def link_of(plan: Plan, group: str) -> str:
    """Where the traffic of a group goes."""
    shape = plan.traffic[group].shape  # type: ignore[index]
    return "none" if shape.ranks == 1 else LINKS[shape.is_within_node]


def parts_of(plan: Plan) -> dict[str, float]:
    """Seconds of a step by part, as they are printed; empty where the speed is not known."""
    time = plan.time
    if time is None:
        return {}
    return {
        "compute": time.compute,
        "tensor communication": time.tensor,
        "data communication": time.data,
        "pipeline communication": time.pipeline,
        "bubble": time.bubble,
        "optimizer": time.optimizer,
    }


def limit(plan: Plan) -> str:
    """The one thing that stands in the way most."""
    if plan.shortages:
        stage = max(plan.shortages, key=lambda index: plan.shortages[index])
        memory = plan.stages[stage].memory
        largest = max(CLASSES[:-1], key=lambda name: getattr(memory, name))
        return f"memory: {largest} take most of it, in stage {stage} during the {memory.moment}"
    parts = parts_of(plan)
    if not parts:
        return "not known: the hardware's config does not say how fast it is"
    largest = max(parts, key=lambda name: parts[name])
    share = parts[largest] / sum(parts.values())
    group = largest.partition(" ")[0]
    where = f" {link_of(plan, group)}" if group in plan.traffic else ""
    return f"{largest}{where}, {share:.0%} of the step"


CLASSES = ("weights", "gradients", "optimizer", "activations", "communication", "checkpoint", "margin")


def settings_in_words(run: RunConfig) -> str:
    p = run.parallelism
    words = [
        f"micro-batch {run.training.micro_batch_size}",
        f"global batch {run.training.global_batch_size}",
        run.precision.dtype.name,
        f"recomputation {p.activation_checkpointing.name}",
    ]
    words += ["sequence parallel"] if p.sequence_parallel else []
    words += ["optimizer offloaded"] if p.offload_optimizer else []
    words += ["weights offloaded"] if p.offload_parameters else []
    return ", ".join(words)
