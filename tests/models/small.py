"""Small models for tests: all dimensions differ, and no tensor size divides the vocabulary."""

from typing import Any

import torch
from torch import Tensor, nn

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import (
    ActivationCheckpointing,
    AttentionKind,
    BiasesConfig,
    DataConfig,
    InputKind,
    MLPKind,
    ModelConfig,
    NormKind,
    NormPlacement,
    ParallelismConfig,
    Pooling,
    PositionKind,
    QueryKeyNorm,
    ResidualKind,
    RopeScalingConfig,
    RopeScalingKind,
    RunConfig,
    TrainingConfig,
)
from launcher.models.architecture import FlatModel, flat_model
from launcher.models.block_context import BlockContext
from launcher.parallel.initializer import Initializer
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of

BATCH, LENGTH = 2, 16

# The parts of two published architectures, and of two that nobody has published.
PARTS: dict[str, dict[str, Any]] = {
    "gpt": {
        "norm": NormKind.layer_norm,
        "positions": PositionKind.learned,
        "mlp": MLPKind.gelu,
        "biases": ("qkv", "output", "up", "down"),
        "tie_embeddings": True,
    },
    "llama": {
        "norm": NormKind.rms_norm,
        "positions": PositionKind.rope,
        "mlp": MLPKind.swiglu,
        "biases": (),
        "num_kv_heads": 4,
        "tie_embeddings": False,
    },
    "rms norm, learned positions, gelu": {
        "norm": NormKind.rms_norm,
        "positions": PositionKind.learned,
        "mlp": MLPKind.gelu,
        "biases": ("qkv", "up", "head"),
        "num_kv_heads": 4,
        "head_size": 6,
        "tie_embeddings": False,
    },
    "layer norm, rope, swiglu": {
        "norm": NormKind.layer_norm,
        "positions": PositionKind.rope,
        "mlp": MLPKind.swiglu,
        "biases": ("output", "up", "down"),
        "head_size": 2,
        "tie_embeddings": True,
    },
}
# The parts of later architectures, each part in one of them.
PARTS |= {
    "head norms, scaled rotary, windows in turn": {
        **PARTS["llama"],
        "biases": ("qkv",),
        "query_key_norm": QueryKeyNorm.head,
        "rope_scaling": RopeScalingConfig(RopeScalingKind.llama3, factor=8.0, original_length=8),
        "sliding_window": 12,
        "full_attention_every": 2,
        "local_rope_theta": 20.0,
    },
    "norms after, joined head norms, yarn": {
        **PARTS["llama"],
        "norm_placement": NormPlacement.post,
        "query_key_norm": QueryKeyNorm.projection,
        "rope_scaling": RopeScalingConfig(RopeScalingKind.yarn, factor=4.0, original_length=8),
    },
    "norms around, geglu, soft caps, window": {
        **PARTS["llama"],
        "tie_embeddings": True,
        "norm_placement": NormPlacement.sandwich,
        "mlp": MLPKind.geglu,
        "sliding_window": 12,
        "attention_scale_size": 9.0,
        "attention_soft_cap": 2.0,
        "logit_soft_cap": 3.0,
        "embedding_scale": 2.0,
    },
    "parallel residual, half rotated, exact gelu": {
        **PARTS["gpt"],
        "positions": PositionKind.rope,
        "mlp": MLPKind.gelu_erf,
        "residual": ResidualKind.parallel,
        "rotary_fraction": 0.5,
        "tie_embeddings": False,
    },
}
PUBLISHED = ["gpt", "llama"]


def biases(*names: str) -> BiasesConfig:
    return BiasesConfig(**{name: name in names for name in ("qkv", "output", "up", "down", "head")})


def small(architecture: str, **changes: Any) -> ModelConfig:
    """Return a model with wide initial weights, so that every part of it affects the loss."""
    fields: dict[str, Any] = {
        **PARTS[architecture],
        "inputs": InputKind.tokens,
        "attention": AttentionKind.causal,
        "biases": biases(*PARTS[architecture]["biases"]),
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 8,
        "ffn_hidden_size": 48,
        "vocab_size": 61,
        "max_sequence_length": 24,
        "norm_epsilon": 1e-3,
        "rope_theta": 50.0,
        "init_std": 0.3,
    }
    return ModelConfig(**(fields | changes))


def small_vit(**changes: Any) -> ModelConfig:
    """Return a model of 16 patches and a class token; no tensor size divides the classes."""
    fields: dict[str, Any] = {
        **PARTS["gpt"],
        "inputs": InputKind.patches,
        "attention": AttentionKind.full,
        "biases": biases("qkv", "output", "up", "down", "head"),
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 8,
        "ffn_hidden_size": 48,
        "vocab_size": 0,
        "max_sequence_length": 0,
        "tie_embeddings": False,
        "norm_epsilon": 1e-3,
        "init_std": 0.3,
        "num_classes": 7,
        "image_size": 12,
        "image_channels": 3,
        "patch_size": 3,
        "pooling": Pooling.class_token,
    }
    return ModelConfig(**(fields | changes))


def images_of(model: ModelConfig, count: int = 5) -> tuple[Tensor, Tensor]:
    """Return random images and classes."""
    generator = torch.Generator().manual_seed(11)
    shape = count, model.image_channels, model.image_size, model.image_size
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return images, torch.randint(model.num_classes, (count, 1), generator=generator)


def build(
    model: ModelConfig,
    mesh: ProcessMesh | None = None,
    *,
    sequence_parallel: bool = False,
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    seed: int = 3,
    data: DataConfig | None = None,
    compiled: bool = False,
) -> FlatModel:
    """Return this rank's part of the model, or all of it without a mesh."""
    run = RunConfig(
        model=model,
        parallelism=ParallelismConfig(
            sequence_parallel=sequence_parallel, activation_checkpointing=checkpointing
        ),
        training=TrainingConfig(seed=seed),
        data=data or DataConfig(),
    )
    mesh = mesh or ProcessMesh.single()
    initializer = Initializer(seed, mesh.tensor)
    context = BlockContext.create(run, mesh, initializer, compiled=compiled, strict=True)
    return flat_model(model, context)


def batch(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(vocabulary, (BATCH, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3:6] = IGNORED_LABEL
    return tokens[:, :-1], labels


def by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    return {logical_of(parameter).name: parameter for parameter in module.parameters()}


def gradients(model: FlatModel, tokens: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Return the loss, and this rank's gradients by logical name."""
    model.loss.labels_per_micro_batch = int((labels != IGNORED_LABEL).sum())
    loss = model(tokens, labels)
    loss.backward()
    found = {}
    for name, parameter in by_name(model).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return loss.item(), found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in units of the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()
