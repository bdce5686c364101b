"""Describe the limiting factor of a plan: the largest part of the time, or of the memory. Pure."""

from launcher.config.schema import RunConfig, StatesDtype
from launcher.planning.cost.run_plan import Plan

MEMORY_CLASSES = ("weights", "gradients", "optimizer", "activations", "communication", "checkpoint", "margin")
LINKS = {True: "within a node", False: "between nodes"}


def link_of(plan: Plan, group: str) -> str:
    """Return the link that carries the traffic of a group."""
    shape = plan.traffic[group].shape  # type: ignore[index]
    return "none" if shape.ranks == 1 else LINKS[shape.is_within_node]


def parts_of(plan: Plan) -> dict[str, float]:
    """Return seconds of a step by part, with the names to print; empty if the speed is not known."""
    time = plan.time
    if time is None:
        return {}
    of_experts = {"expert communication": time.expert, "expert_data communication": time.expert_data}
    context = {"context communication": time.context} if plan.layout.context > 1 else {}
    return {
        "compute": time.compute,
        "tensor communication": time.tensor,
        **context,
        "data communication": time.data,
        **(of_experts if plan.layout.expert > 1 else {}),
        "pipeline communication": time.pipeline,
        "bubble": time.bubble,
        "optimizer": time.optimizer,
    }


def hidden_of(plan: Plan) -> dict[str, float]:
    """Return seconds of communication that run while the rank computes, by the parts of `parts_of`."""
    time = plan.time
    if time is None:
        return {}
    return {
        "tensor communication": time.tensor_hidden,
        "context communication": time.context_hidden,
        "data communication": time.data_hidden,
    }


def limit(plan: Plan) -> str:
    """Return the limiting factor: a kind of memory if the run does not fit, else a part of the step."""
    if not plan.shortages and not plan.fits:
        return "memory of the host, which the ranks of a node share"
    if plan.shortages:
        stage = max(plan.shortages, key=lambda index: plan.shortages[index])
        memory = plan.stages[stage].memory
        largest = max(MEMORY_CLASSES[:-1], key=lambda name: getattr(memory, name))
        return f"memory: {largest} take most of it, in stage {stage} during the {memory.moment}"
    parts = parts_of(plan)
    if not parts and plan.run.hardware.measured:
        return "unknown: only one rank was measured (run `launcher calibrate` without most_ranks=1)"
    if not parts:
        return "unknown: the hardware config states no speed (run `launcher calibrate`)"
    largest = max(parts, key=lambda name: parts[name])
    share = parts[largest] / sum(parts.values())
    group = largest.partition(" ")[0]
    where = f" {link_of(plan, group)}" if group in plan.traffic else ""
    return f"{largest}{where}, {share:.0%} of the step"


def settings_in_words(run: RunConfig) -> str:
    """Return the settings of a run that a plan depends on, beside its layout."""
    p, t = run.parallelism, run.training
    words = [f"micro-batch {t.micro_batch_size}", f"global batch {t.global_batch_size}"]
    words += [run.precision.dtype.name, f"recomputation {p.activation_checkpointing.name}"]
    words += ["bf16 states"] if run.precision.states is StatesDtype.bf16 else []
    words += ["sequence parallel"] if p.sequence_parallel else []
    words += [f"context by {p.context_method.name}"] if p.context > 1 else []
    words += [f"expert imbalance {run.plan.expert_imbalance:g}"] if p.expert > 1 else []
    words += ["optimizer offloaded"] if p.offload_optimizer else []
    words += ["weights offloaded"] if p.offload_parameters else []
    return ", ".join(words)
