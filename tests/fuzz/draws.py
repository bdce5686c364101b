"""Random runs: the axes of the layout and the settings. The same random numbers give the same run."""

import random
from contextlib import suppress
from dataclasses import dataclass

from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from tests.config.composing import run_of
from tests.parity.running import small_run

# A new axis of the layout is one more line. A drawn axis has 2 ranks.
AXES = {"parallelism.data": 4, "parallelism.tensor": 5, "parallelism.pipeline": 3, "parallelism.context": 3}
NUMBERS_OF_AXES = {0: 1, 1: 7, 2: 2}  # axes larger than 1, and how often: most draws have 2 ranks
# Settings, and the weight of each value in the draw; validation refuses invalid combinations.
SETTINGS: dict[str, dict[str, int]] = {
    "model": {
        "gpt_tiny": 4, "llama_tiny": 4, "gemma2_2b": 1, "olmo2_7b": 1, "qwen3_0_6b": 1, "mistral_7b": 1,
        "moe_tiny": 3,
        "vit_tiny data=digits": 1,
    },
    "parallelism.zero_stage": {"0": 4, "1": 3, "2": 2, "3": 2},
    "parallelism.sequence_parallel": {"false": 1, "true": 1},
    "parallelism.context_method": {"ring": 2, "gather": 1, "ulysses": 1},
    "parallelism.expert": {"1": 1, "2": 3},
    "parallelism.activation_checkpointing": {"none": 3, "selective": 1, "full": 1},
    "parallelism.offload_optimizer": {"false": 6, "true": 1},
    "parallelism.pipeline_schedule": {"1f1b": 2, "dualpipev": 1},
    "precision": {"fp32": 5, "bf16": 4, "bf16_states": 1},
    "optimizer": {"adamw": 4, "sgd": 1},
    "optimizer.gradient_clipping": {"1.0": 4, "null": 1},
    "training.micro_batch_size": {"2": 2, "1": 1},
    "model.dropout": {"0.0": 5, "0.1": 1},
    "finetune.lora.rank": {"0": 8, "4": 1},
    "data.document_attention": {"false": 4, "true": 1},
    "data": {"stdlib": 6, "chat data.train=chats.jsonl": 1},  # masked labels
    "training.compile": {"false": 30, "true": 1},
    # Shapes; "" is that of the model.
    "model.vocab_size": {"": 4, "259": 1},
    "model.num_layers": {"": 4, "5": 1},
    "model.num_kv_heads": {"": 3, "1": 1},
    "data.sequence_length": {"": 4, "48": 1},
}  # fmt: skip
STEPS = 2
CORES = 8


@dataclass(frozen=True)
class Draw:
    """A drawn run: its overrides, the run, and the run as `launcher verify` shrinks it."""

    overrides: tuple[str, ...]
    run: RunConfig
    small: RunConfig

    def __str__(self) -> str:
        return " ".join(self.overrides)


def draw(rng: random.Random) -> Draw:
    """Return a run that validation accepts."""
    while True:
        with suppress(ConfigError):
            return drawn_from(_overrides(rng))


def drawn_from(overrides: list[str]) -> Draw:
    """Return the run of these overrides. Raises ConfigError where validation refuses it."""
    run = run_of("hardware=cpu", *overrides)
    validate(run, World("cpu", CORES, CORES))
    return Draw(tuple(overrides), run, small_run(*overrides, steps=STEPS))


def check_small(drawn: Draw) -> None:
    """Raise ConfigError if the shrunk run is refused, which is a fault of `launcher verify`."""
    validate(drawn.small, World("cpu", CORES, CORES))


def _overrides(rng: random.Random) -> list[str]:
    [number] = rng.choices(list(NUMBERS_OF_AXES), list(NUMBERS_OF_AXES.values()))
    axes: set[str] = set()
    while len(axes) < number:
        axes |= set(rng.choices(list(AXES), list(AXES.values())))
    chosen = {name: rng.choices(list(values), list(values.values()))[0] for name, values in SETTINGS.items()}
    if "data=" in chosen["model"]:
        del chosen["data"]
    if chosen["model"] != "moe_tiny" or "parallelism.data" not in axes:
        chosen["parallelism.expert"] = "1"  # only data ranks share experts; few other draws would be left
    micro_batches = rng.choice((1, 3)) if "parallelism.pipeline" not in axes else 4
    batch = (
        int(chosen["training.micro_batch_size"]) * (2 if "parallelism.data" in axes else 1) * micro_batches
    )
    words = [word for name, value in chosen.items() if value for word in f"{name}={value}".split()]
    sizes = [f"{axis}={2 if axis in axes else 1}" for axis in AXES]
    return [*words, *sizes, f"training.global_batch_size={batch}"]
