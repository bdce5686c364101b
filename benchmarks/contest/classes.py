"""The comparison: models, classes of layouts, contestants, and the targets of their ratios."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.contest.job import AdamW, Job, Sizes
from launcher.config.schema import NormKind, RunConfig
from launcher.config.shape import kv_heads, sequence_length

OURS = "launcher"


@dataclass(frozen=True)
class Peer:
    """A peer, and the least ratio of our tokens per second to its; None where there is no target."""

    label: str
    module: str
    target: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkModel:
    """A model, its precision and its share of the launcher's overrides."""

    name: str
    overrides: tuple[str, ...]
    micro_batch: int
    precision: str = "fp32"


@dataclass(frozen=True)
class Class:
    """Contestants that train one model on equally many ranks with equally many tokens per step."""

    name: str
    overrides: tuple[str, ...]
    peers: tuple[Peer, ...]
    ranks: int = 1
    data_ranks: int = 1
    accumulation: int = 1
    # The most that our peak memory may be of a peer's: of the named peer's, or of the best peer's.
    memory_target: float | None = None
    memory_peer: str | None = None


def overrides_of(model: BenchmarkModel, shape: Class, device: str, data: str) -> list[str]:
    """Return the overrides of the launcher for a class; `data` is the prefix of a token file."""
    global_batch = model.micro_batch * shape.accumulation * shape.data_ranks
    return [
        *model.overrides,
        *shape.overrides,
        *("hardware=cpu" if device == "cpu" else "hardware=local hardware.device=cuda").split(),
        f"precision={model.precision}",
        "data=tokens",
        f'data.train="{data}"',
        "scheduler=constant",
        "scheduler.warmup_steps=0",
        "training.steps=100000",
        f"training.global_batch_size={global_batch}",
        f"training.micro_batch_size={model.micro_batch}",
        "training.validation_interval=0",
        "training.validation_batches=1",
        "checkpoint.enabled=false",
        "logging.wandb.mode=disabled",
    ]


def jobs_of(
    run: RunConfig, model: BenchmarkModel, shape: Class, device: str, folder: str, overrides: list[str]
) -> list[Job]:
    """Return the jobs of a class, ours first. `run` is composed of the overrides."""
    ours = Peer(OURS, "launcher")
    return [
        Job(
            label=peer.label,
            peer=peer.module,
            options=peer.options,
            overrides=overrides,
            sizes=sizes_of(run),
            adamw=adamw_of(run),
            ranks=shape.ranks,
            data_ranks=shape.data_ranks,
            micro_batch=model.micro_batch,
            accumulation=shape.accumulation,
            device=device,
            precision=model.precision,
            folder=folder,
        )
        for peer in (ours, *shape.peers)
    ]


def sizes_of(run: RunConfig) -> Sizes:
    m = run.model
    assert m.dropout == 0.0, "the peers have no dropout"
    return Sizes(
        layers=m.num_layers,
        hidden=m.hidden_size,
        heads=m.num_heads,
        kv_heads=kv_heads(m),
        ffn=m.ffn_hidden_size,
        vocabulary=m.vocab_size,
        length=sequence_length(run),
        is_llama=m.norm is NormKind.rms_norm,
        is_tied=m.tie_embeddings,
        rope_theta=m.rope_theta,
        norm_epsilon=m.norm_epsilon,
    )


def adamw_of(run: RunConfig) -> AdamW:
    o = run.optimizer
    assert o.beta1 is not None
    assert o.beta2 is not None
    assert o.epsilon is not None
    assert o.gradient_clipping is not None
    return AdamW(o.lr, (o.beta1, o.beta2), o.epsilon, o.weight_decay, o.gradient_clipping)
