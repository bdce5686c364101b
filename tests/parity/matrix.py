"""Every combination of axes, ZeRO stage and sequence parallelism: what the rules allow, and what they refuse.

`python -m tests.parity.matrix` prints the tables of docs/verify.md.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations as combinations_of
from itertools import product
from string import ascii_lowercase

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from tests.config.composing import run_of

RANKS = 8


@dataclass(frozen=True)
class Combination:
    data: int
    tensor: int
    pipeline: int
    zero_stage: int
    sequence_parallel: bool
    schedule: str = "1f1b"

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def run(self) -> RunConfig:
        """The run that `overrides` compose, in a thousandth of the time: this file makes hundreds."""
        run = _base(self.schedule)
        axes = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        parallelism = replace(
            run.parallelism, zero_stage=self.zero_stage, sequence_parallel=self.sequence_parallel, **axes
        )
        return replace(run, parallelism=parallelism)

    @property
    def overrides(self) -> list[str]:
        return [
            "hardware=cpu",
            f"hardware.accelerators_per_node={RANKS}",
            f"parallelism.data={self.data}",
            f"parallelism.tensor={self.tensor}",
            f"parallelism.pipeline={self.pipeline}",
            f"parallelism.zero_stage={self.zero_stage}",
            f"parallelism.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"parallelism.pipeline_schedule={self.schedule}",
            # DualPipeV needs two stages per rank filled, and two micro-batches for each.
            *(["training.micro_batch_size=1", "model.num_layers=8"] if self.schedule == "dualpipev" else []),
        ]

    def __str__(self) -> str:
        axes = f"dp{self.data}-tp{self.tensor}-pp{self.pipeline}-zero{self.zero_stage}"
        return axes + ("-sp" if self.sequence_parallel else "") + self.schedule.removeprefix("1f1b")


@cache
def _base(schedule: str) -> RunConfig:
    return run_of("model=gpt_tiny", *Combination(1, 1, 1, 0, False, schedule).overrides)


COMBINATIONS = [
    Combination(*values, schedule)
    for schedule in ("1f1b", "dualpipev")
    for values in product((1, 2), (1, 2, 4), (1, 2, 4), range(4), (False, True))
]


@cache
def outcome(combination: Combination) -> Layout | ConfigError:
    """What the product's own rules say."""
    try:
        return validate(combination.run, World("cpu", RANKS, RANKS))
    except ConfigError as error:
        return error


LEGAL: list[Combination] = [c for c in COMBINATIONS if isinstance(outcome(c), Layout)]

# What else may vary, spread over the legal combinations: each varies with a period of its own.
UNEVEN, GROUPED = "model.num_layers=5", ["model.num_heads=8", "model.num_kv_heads=4"]
MODELS = {
    "gpt, tied": ["model=gpt_tiny"],
    "llama, grouped KV heads, uneven layers": ["model=llama_tiny", UNEVEN, *GROUPED],
    "gpt, untied, odd vocabulary": ["model=gpt_tiny", "model.tie_embeddings=false", "model.vocab_size=257"],
    "llama, tied, odd vocabulary": [
        "model=llama_tiny",
        "model.tie_embeddings=true",
        "model.vocab_size=259",
        "model.num_kv_heads=4",
    ],
    "gpt, tied, uneven layers, odd vocabulary": ["model=gpt_tiny", UNEVEN, "model.vocab_size=257"],
    "vit, odd classes": ["model=vit_tiny", "data=digits", "model.num_classes=11"],
}
CHECKPOINTING = ["none", "selective", "full"]


def variation(combination: Combination) -> list[str]:
    """A function of the combination's place among the legal ones."""
    place = LEGAL.index(combination)
    model = list(MODELS.values())[place % len(MODELS)]
    if combination.schedule == "dualpipev":
        model = ["model.num_layers=9" if setting == UNEVEN else setting for setting in model]
    found = [*model, f"parallelism.activation_checkpointing={CHECKPOINTING[place % len(CHECKPOINTING)]}"]
    if combination.zero_stage and place // 3 % 2:
        found.append("parallelism.offload_optimizer=true")
        if combination.zero_stage == 3:
            found.append("parallelism.offload_parameters=true")
    if place % 7 in (2, 5):
        is_offloaded = "parallelism.offload_optimizer=true" in found
        found.append("precision=bf16" if is_offloaded or place % 2 else "precision=bf16_states")
    if place % 4 == 1 and "data=digits" not in found:
        found.append("data.document_attention=true")
    return found


def run_of_combination(combination: Combination, *more: str) -> RunConfig:
    return run_of(*combination.overrides, *variation(combination), *more)


def covering(combinations: list[Combination], count: int) -> list[Combination]:
    """`count` of them, each time the one with most pairs of properties that none before it has."""

    def pairs(combination: Combination) -> set[tuple[str, ...]]:
        properties = [*combination.overrides[2:], *variation(combination)]
        return set(combinations_of(sorted(properties), 2))

    seen: set[tuple[str, ...]] = set()
    chosen: list[Combination] = []
    for _ in range(count):
        chosen.append(max(combinations, key=lambda c: len(pairs(c) - seen)))
        seen |= pairs(chosen[-1])
    return chosen


def reason(error: ConfigError) -> str:
    """Without its numbers."""
    return re.sub(r"\d+", "N", error.why)


def table() -> str:
    """A table per schedule, a row per number of ranks on each axis, a column per ZeRO stage.

    In a cell: without / with sequence parallelism.
    """
    letters: dict[str, str] = {}
    examples: dict[str, str] = {}

    def cell(combination: Combination) -> str:
        found = outcome(combination)
        if isinstance(found, Layout):
            return "yes" if found.zero_stage == combination.zero_stage else f"as {found.zero_stage}"
        key = reason(found)
        letter = letters.setdefault(key, ascii_lowercase[len(letters)])
        examples.setdefault(letter, f"`{found.field}={found.value}`: {found.why}")
        return letter

    lines: list[str] = []
    for schedule in dict.fromkeys(c.schedule for c in COMBINATIONS):
        lines += [
            f"| {schedule}: data x tensor x pipeline | ZeRO-0 | ZeRO-1 | ZeRO-2 | ZeRO-3 |",
            "|---|---|---|---|---|",
        ]
        for axes in dict.fromkeys((c.data, c.tensor, c.pipeline) for c in COMBINATIONS):
            cells = [
                " / ".join(cell(Combination(*axes, stage, sequence, schedule)) for sequence in (False, True))
                for stage in range(4)
            ]
            lines.append(f"| {' x '.join(map(str, axes))} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- {letter}: {example}" for letter, example in examples.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
