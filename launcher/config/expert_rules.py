"""Rules of a mixture of experts. Pure, like validate.py."""

from dataclasses import fields

from launcher.config import shape
from launcher.config.errors import as_typed, quoted_setting, refusal, settings
from launcher.config.schema import Dtype, ExpertsConfig, InputKind, RunConfig, StatesDtype

_FIELD = "model.experts"


def check_experts(run: RunConfig) -> None:
    """Check that the experts have all their settings, and that a dense model has none of them."""
    m, e = run.model, run.model.experts
    if not shape.has_experts(m):
        _check_unused(run)
        return
    if m.inputs is InputKind.patches:
        why = "experts are for language models, and this run has model.inputs=patches"
        raise refusal(run, f"{_FIELD}.count", why, _without_experts(e))
    if not 1 <= e.top_k <= e.count:
        why = f"each token runs through at least 1 and at most model.experts.count={e.count} experts"
        close = min(2, e.count) if e.top_k < 1 else e.count
        raise refusal(run, f"{_FIELD}.top_k", why, f"{_FIELD}.top_k={close}")
    if e.ffn_hidden_size < 1:
        why = "must be at least 1: the columns of an expert"
        raise refusal(run, f"{_FIELD}.ffn_hidden_size", why, f"{_FIELD}.ffn_hidden_size={m.ffn_hidden_size}")
    _check_layers(run)
    if e.router_dtype is not Dtype.fp32:
        why = "scores rounded to bf16 could choose different experts in different layouts"
        raise refusal(run, f"{_FIELD}.router_dtype", why, f"{_FIELD}.router_dtype=fp32")
    _check_combinations(run)


def check_expert_parallelism(run: RunConfig) -> None:
    """Check that expert parallelism has experts to distribute, and settings with which it is verified."""
    m, p, one = run.model, run.parallelism, "parallelism.expert=1"
    if run.plan.expert_imbalance > p.expert:
        why = f"with parallelism.expert={p.expert} a rank gets at most {p.expert} times the mean"
        raise refusal(run, "plan.expert_imbalance", why, f"plan.expert_imbalance={p.expert} (or lower)")
    if p.expert == 1:
        return
    if run.plan.trace:
        why = "plan.trace can only trace a rank that holds all experts of a layer"
        raise refusal(run, "plan.trace", why, "plan.trace=false", one)
    if not shape.has_experts(m):
        why = "the model has no experts (model.experts.count=0)"
        raise refusal(run, "parallelism.expert", why, one, "model=moe_tiny")
    if m.experts.count % p.expert:
        why = f"does not divide model.experts.count={m.experts.count}"
        near = shape.nearest(shape.divisors(m.experts.count), p.expert, 1)
        raise refusal(run, "parallelism.expert", why, *settings("parallelism.expert", near))
    if p.zero_stage == 3:
        why = "ZeRO-3 would partition the experts over all data ranks, which hold different experts"
        raise refusal(run, "parallelism.zero_stage", why, "parallelism.zero_stage=2", one)
    if p.offload_optimizer:
        why = "the offloaded optimizer has not been verified with expert parallelism"
        raise refusal(run, "parallelism.offload_optimizer", why, "parallelism.offload_optimizer=false", one)
    if run.precision.states is StatesDtype.bf16:
        why = "states in bf16 have not been verified with expert parallelism"
        raise refusal(run, "precision.states", why, "precision=bf16", one)


def _without_experts(e: ExpertsConfig) -> str:
    """Return the settings that turn a model with the experts `e` into a dense model."""
    unset = ExpertsConfig()
    names = [field.name for field in fields(unset) if getattr(e, field.name) != getattr(unset, field.name)]
    return " ".join(f"{_FIELD}.{name}={as_typed(getattr(unset, name))}" for name in names)


def _check_unused(run: RunConfig) -> None:
    given, unset = run.model.experts, ExpertsConfig()
    for name in (field.name for field in fields(unset) if field.name != "count"):
        if getattr(given, name) != getattr(unset, name):
            why = "the model has no experts (model.experts.count=0)"
            typed = as_typed(getattr(unset, name))
            raise refusal(run, f"{_FIELD}.{name}", why, f"{_FIELD}.{name}={typed}", "model=moe_tiny")


def _check_layers(run: RunConfig) -> None:
    e, layers = run.model.experts, run.model.num_layers
    left = layers - e.first_dense_layers
    if left < 1:
        why = f"leaves none of the {layers} layers with experts"
        remedy = f"{_FIELD}.first_dense_layers={layers - 1} (or fewer)"
        every = f"{_FIELD}.every=1 " if e.every > 1 else ""
        raise refusal(run, f"{_FIELD}.first_dense_layers", why, every + remedy)
    if e.every > left:
        why = f"none of the {left} layers after the first dense layers would have experts"
        raise refusal(run, f"{_FIELD}.every", why, f"{_FIELD}.every={left} (or fewer)")


def _check_combinations(run: RunConfig) -> None:
    """Refuse combinations with experts that are not supported or not verified."""
    m, e, tensor = run.model, run.model.experts, run.parallelism.tensor
    for name in ("up", "down"):
        if getattr(m.biases, name):
            raise refusal(run, f"model.biases.{name}", "experts have no biases", f"model.biases.{name}=false")
    _check_adapters(run)
    if run.precision.dtype is Dtype.fp16:
        why = "the auxiliary losses of experts do not follow the loss scale of fp16"
        raise refusal(run, "precision.dtype", why, "precision=bf16", "precision=fp32")
    if e.ffn_hidden_size % tensor:
        why = f"{e.ffn_hidden_size} columns of an expert cannot be split {tensor} ways"
        near = shape.nearest(shape.legal_tensor_sizes(run) or [1], tensor)
        raise refusal(run, "parallelism.tensor", why, *settings("parallelism.tensor", near))


def _check_adapters(run: RunConfig) -> None:
    """Check that adapters (LoRA) are those of attention, and that all other weights stay as they are."""
    if not shape.has_lora(run):
        return
    lora, off = run.finetune.lora, "finetune.lora.rank=null"
    if of_mlp := [name for name in lora.targets if name in ("up", "down")]:
        why = f"{of_mlp[0]!r} is a projection of the experts, and only those of attention can have adapters"
        kept = [name for name in lora.targets if name not in of_mlp] or ["qkv", "output"]
        remedy = quoted_setting("finetune.lora.targets", f"[{','.join(kept)}]")
        raise refusal(run, "finetune.lora.targets", why, remedy, off)
    if run.model.experts.bias_balancing:
        why = "with adapters the router is frozen, but bias balancing would change its biases"
        raise refusal(run, f"{_FIELD}.bias_balancing", why, f"{_FIELD}.bias_balancing=0", off)
