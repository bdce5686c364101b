"""The planner plans every run that validation accepts: random combinations of features."""

import math
import random
from contextlib import suppress

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.planning.choose.changes import helpful
from launcher.planning.cost.run_plan import make_plan
from launcher.planning.show.plan_report import as_json
from tests.config.composing import run_of

MODELS = [
    "gpt_tiny", "llama_tiny", "gemma2_2b", "olmo2_7b", "moe_tiny", "mixtral_8x7b", "vit_tiny data=digits",
]  # fmt: skip
# Most fields of a draw keep their defaults: otherwise few draws would be legal.
VALUES = {
    "parallelism.zero_stage": "0 1 2 3", "parallelism.sequence_parallel": "true",
    "parallelism.context_method": "gather ulysses", "parallelism.expert": "2 4",
    "parallelism.activation_checkpointing": "selective full", "parallelism.offload_optimizer": "true",
    "parallelism.offload_parameters": "true", "parallelism.pipeline_schedule": "dualpipev",
    "precision": "bf16 fp16 bf16_states", "optimizer": "sgd", "model.dropout": "0.0 0.1",
    "finetune.lora.rank": "4", "finetune.lora.dropout": "0.1",
    "finetune.lora.targets": "[qkv] [qkv,output] [qkv,output,up,down]", "data.document_attention": "true",
    "training.compile": "true", "model.num_layers": "2 5", "model.tie_embeddings": "true false",
    "model.sliding_window": "24", "model.attention_soft_cap": "30", "model.norm_placement": "post sandwich",
    "model.query_key_norm": "head projection", "model.residual": "parallel",
    "model.norm": "layer_norm rms_norm",
    "model.experts.shared": "1", "model.experts.first_dense_layers": "1", "model.experts.z_loss": "0 0.001",
    "hardware.device": "cuda",
}  # fmt: skip
DRAWS = 150


def drawn(rng: random.Random) -> tuple[RunConfig, Layout]:
    """Return a random run that validation accepts, and its layout."""
    while True:
        sizes = {"tensor": rng.choice((1, 1, 2, 4)), "pipeline": rng.choice((1, 1, 2, 4))}
        sizes |= {"context": rng.choice((1, 1, 1, 2)), "data": rng.choice((1, 2, 4))}
        micro = rng.choice((1, 2))
        words = [f"model={rng.choice(MODELS)}", f"training.micro_batch_size={micro}"]
        words += [f"parallelism.{axis}={size}" for axis, size in sizes.items()]
        words.append(f"training.global_batch_size={micro * sizes['data'] * rng.choice((1, 4, 8))}")
        words += [
            f"{name}={rng.choice(values.split())}" for name, values in VALUES.items() if rng.random() < 0.2
        ]
        with suppress(ConfigError):
            run = run_of("hardware=cpu", *(part for word in words for part in word.split()))
            return run, validate(run, World(run.hardware.device.name, math.prod(sizes.values()), 8))


def test_whatever_validation_accepts_has_a_plan() -> None:
    rng = random.Random(1)
    for _ in range(DRAWS):
        run, layout = drawn(rng)
        plan = make_plan(run, layout, budget=1e9)
        assert plan.peak > 0, run
        assert as_json(plan, helpful(plan)), run
