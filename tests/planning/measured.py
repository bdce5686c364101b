"""Compare predicted memory with real runs on this machine, which count every tensor's storage in the ranks.

`python -m tests.planning.measured` prints the table of docs/planning.md in some minutes.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

# Some of torch is imported at the first operation under a dispatch mode, and ZeRO-3 wraps what it would find.
import torch._dynamo

from launcher.config.layout import GroupName, Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.data.sampler import MicroBatch
from launcher.engine.distributed import join, leave, prepare_deepspeed
from launcher.engine.measuring import RankMeasurement
from launcher.launch.local import run_local_ranks
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.memory import rank_memories
from launcher.planning.cost.operations import Collective
from launcher.planning.cost.run_plan import Plan, make_plan
from tests.config.composing import run_of

prepare_deepspeed("cpu")
torch.set_num_threads(1)  # a fork does not take OpenMP's threads along, and deadlocks in them

STEPS = 3

# Large enough that what is not a tensor of the model's size does not count, small enough for a laptop.
BASE = [
    "hardware=cpu", "model.hidden_size=256", "model.ffn_hidden_size=1024", "training.global_batch_size=16",
    "training.micro_batch_size=2",
]  # fmt: skip
# DeepSpeed's bucket of 5e8 elements would be most of all that these models take.
BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=1000000"
FULL, SELECTIVE = (f"parallelism.activation_checkpointing={kind}" for kind in ("full", "selective"))
LLAMA, BF16, SEQUENCE = "model=llama_tiny", "precision=bf16", "parallelism.sequence_parallel=true"
OFFLOAD = "parallelism.offload_optimizer=true"
GATHER, ULYSSES = (f"parallelism.context_method={method}" for method in ("gather", "ulysses"))
DOCUMENTS = "data.document_attention=true"
LONG = ["model.max_sequence_length=512", "training.global_batch_size=4", "training.micro_batch_size=1"]
LORA = "finetune.lora.rank=16"
DUALPIPEV = "parallelism.pipeline_schedule=dualpipev"


def axes(data: int = 1, tensor: int = 1, pipeline: int = 1, zero: int = 0, context: int = 1) -> list[str]:
    sizes = {"data": data, "tensor": tensor, "pipeline": pipeline, "zero_stage": zero, "context": context}
    return [f"parallelism.{name}={size}" for name, size in sizes.items()]


# Every token runs through every expert, which is an even router.
MOE = [
    "model=moe_tiny", "model.experts.ffn_hidden_size=128", "model.experts.count=12", "model.experts.top_k=12",
    "model.experts.shared=0", "model.experts.scaling=1",
]  # fmt: skip
EXPERT = "parallelism.expert=2"

CASES: dict[str, list[str]] = {
    "single": axes(),
    "single, SGD": [*axes(), "optimizer=sgd"],
    "single, one micro-batch": [*axes(), "training.micro_batch_size=16"],
    "single, bf16": [*axes(zero=1), BF16],
    "single, bf16, one micro-batch": [*axes(zero=1), BF16, "training.micro_batch_size=16"],
    "single, full recomputation": [*axes(), FULL, "training.micro_batch_size=4"],
    "single, Llama, selective recomputation": [*axes(), LLAMA, SELECTIVE, "training.micro_batch_size=4"],
    "data 2": axes(data=2),
    "data 4": axes(data=4),
    "tensor 2": axes(tensor=2),
    "tensor 2, Llama": [*axes(tensor=2), LLAMA],
    "tensor 2, Llama, bf16, one micro-batch": [
        *axes(tensor=2, zero=1), LLAMA, BF16, "training.micro_batch_size=4", "training.global_batch_size=4",
    ],
    "tensor 2, sequence parallel": [*axes(tensor=2), SEQUENCE],
    "tensor 4, sequence parallel, full recomputation": [*axes(tensor=4), SEQUENCE, FULL],
    "pipeline 2": [*axes(pipeline=2, zero=1), BUCKET],
    "pipeline 2, large bucket": [*axes(pipeline=2, zero=1), BUCKET.replace("1000000", "20000000")],
    "pipeline 2, bf16, offload, large bucket": [
        *axes(pipeline=2, zero=1), BF16, OFFLOAD, BUCKET.replace("1000000", "20000000"),
    ],
    "pipeline 4, Llama": [*axes(pipeline=4, zero=1), LLAMA, BUCKET],
    "pipeline 2, full recomputation": [*axes(pipeline=2, zero=1), FULL, BUCKET],
    "pipeline 2, DualPipeV": [*axes(pipeline=2, zero=1), DUALPIPEV, BUCKET],
    "pipeline 2, bf16": [*axes(pipeline=2, zero=1), BF16],
    "pipeline 3, 5 layers": [*axes(pipeline=3, zero=1), "model.num_layers=5", BUCKET],
    "single, LoRA": [*axes(), LLAMA, LORA],
    "LoRA, tensor 2, sequence parallel, bf16": [*axes(tensor=2, zero=1), SEQUENCE, LLAMA, LORA, BF16],
    "LoRA, pipeline 2": [*axes(pipeline=2, zero=1), LLAMA, LORA],
    "LoRA, ZeRO-1, data 2, bf16": [*axes(data=2, zero=1), LLAMA, LORA, BF16],
    "LoRA, ZeRO-2, data 2": [*axes(data=2, zero=2), LLAMA, LORA],
    "LoRA, ZeRO-3, data 2": [*axes(data=2, zero=3), LLAMA, LORA],
    "ZeRO-1, data 2": [*axes(data=2, zero=1), BUCKET],
    "ZeRO-1, data 4": [*axes(data=4, zero=1), BUCKET],
    "ZeRO-1, data 2, bf16": [*axes(data=2, zero=1), BF16],
    "ZeRO-1, data 2, offload": [*axes(data=2, zero=1), OFFLOAD, BUCKET],
    "ZeRO-2, data 2": [*axes(data=2, zero=2), BUCKET],
    "ZeRO-2, data 4": [*axes(data=4, zero=2), BUCKET],
    "ZeRO-2, data 2, bf16": [*axes(data=2, zero=2), BF16, BUCKET],
    "ZeRO-2, data 2, bf16, offload": [*axes(data=2, zero=2), BF16, OFFLOAD, BUCKET],
    "ZeRO-3, data 2": [*axes(data=2, zero=3), BUCKET],
    "ZeRO-3, data 4, Llama": [*axes(data=4, zero=3), LLAMA, BUCKET],
    "ZeRO-3, data 2, bf16": [*axes(data=2, zero=3), BF16, BUCKET],
    "ZeRO-3, data 2, full recomputation": [*axes(data=2, zero=3), FULL, BUCKET],
    "ZeRO-3, data 2, offload": ["parallelism=zero3_offload", "parallelism.data=2", BUCKET],
    "data 2 x tensor 2, ZeRO-1, sequence parallel": [*axes(data=2, tensor=2, zero=1), SEQUENCE, BUCKET],
    "data 2 x tensor 2, ZeRO-3": [*axes(data=2, tensor=2, zero=3), BUCKET],
    "data 2 x pipeline 2": [*axes(data=2, pipeline=2, zero=1), BUCKET],
    "experts, single": [*axes(), *MOE],
    "experts, tensor 2, sequence parallel, ZeRO-1, bf16": [*axes(tensor=2, zero=1), *MOE, SEQUENCE, BF16],
    "experts over 2, data 2": [*axes(data=2), *MOE, EXPERT],
    "experts over 2, data 2, ZeRO-2, full recomputation": [
        *axes(data=2, zero=2), *MOE, EXPERT, FULL, BUCKET,
    ],
    "experts over 2, data 4, ZeRO-1": [*axes(data=4, zero=1), *MOE, EXPERT, BUCKET],
    "experts over 2, data 4, ZeRO-1, bf16": [*axes(data=4, zero=1), *MOE, EXPERT, BF16],
    "experts over 2, data 2 x pipeline 2": [*axes(data=2, pipeline=2, zero=1), *MOE, EXPERT, BUCKET],
    "experts over 2, data 2 x tensor 2, sequence parallel": [
        *axes(data=2, tensor=2), *MOE, EXPERT, SEQUENCE,
    ],
    "experts over 2, LoRA, data 2, ZeRO-1, bf16": [
        *axes(data=2, zero=1), *MOE, EXPERT, LORA, "finetune.lora.targets=[qkv,output]", BF16,
    ],
    "experts over 2, context 2": [*axes(context=2), *MOE, EXPERT],
    "experts over 4, data 2 x context 2, ZeRO-1": [
        *axes(data=2, context=2, zero=1), *MOE, "parallelism.expert=4", BUCKET,
    ],
    "tensor 2 x pipeline 2, sequence parallel": [*axes(tensor=2, pipeline=2, zero=1), SEQUENCE, BUCKET],
    "context 2": axes(context=2),
    "context 4, Llama": [*axes(context=4), LLAMA, *LONG],
    "context 2, gather, ZeRO-1, bf16": [*axes(context=2, zero=1), BF16, GATHER, *LONG],
    "context 4, ulysses, ZeRO-3, documents": [*axes(context=4, zero=3), ULYSSES, DOCUMENTS, BUCKET],
    "context 2 x tensor 2, sequence parallel": [*axes(context=2, tensor=2), SEQUENCE, LLAMA, *LONG],
    "context 2 x pipeline 2, bf16": [*axes(context=2, pipeline=2, zero=1), BF16, *LONG],
    "LoRA, context 2, ulysses": [*axes(context=2, zero=1), LLAMA, LORA, ULYSSES, *LONG],
}  # fmt: skip
# One of each kind, for the quick tests.
SOME = [
    "single",
    "single, bf16, one micro-batch",
    "tensor 2, sequence parallel",
    "pipeline 2",
    "ZeRO-1, data 2, bf16",
    "ZeRO-3, data 2",
    "context 4, Llama",
]


@dataclass(frozen=True)
class Measured:
    """Bytes of a pipeline rank: the maximum over its tensor and data ranks."""

    case: str
    stage: int
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def planned(*overrides: str) -> tuple[RunConfig, Layout]:
    run = run_of(*BASE, *overrides)
    return run, validate(run, World("cpu", 4, 4))


def measure(case: str) -> tuple[list[Measured], dict[tuple[GroupName, Collective], tuple[int, int]]]:
    """Return the memory of each stage, and the collectives of rank 0 in a step: (planned, measured)."""
    run, layout = planned(*CASES[case])
    with tempfile.TemporaryDirectory(prefix="launcher-measured-") as name:
        folder = Path(name)
        target = partial(_measure_rank, run=run, layout=layout, folder=folder)
        run_local_ranks(target, layout.world_size, log_dir=folder / "logs", start_method="fork")
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(layout.world_size)]
    per_stage, ranks = layout.gradient_ranks * layout.tensor, pipeline_ranks(run, layout)
    memory = [
        Measured(
            case,
            rank.stage,
            planned.allocated,
            max(one["peak"] for one in found[rank.stage * per_stage : (rank.stage + 1) * per_stage]),
        )
        for rank, planned in zip(ranks, rank_memories(run, layout, ranks), strict=True)
    ]
    return memory, _collectives(make_plan(run, layout), found)


def _collectives(plan: Plan, found: list[dict]) -> dict[tuple[GroupName, Collective], tuple[int, int]]:
    """Return the collectives of the ranks that send most, as the plan does."""
    compared = {}
    for name, traffic in plan.traffic.items():
        if traffic.shape.ranks == 1:
            continue  # DeepSpeed calls its collectives all the same, and nothing is sent
        seen = [_of_group(name, one["collectives"]) for one in found]
        ranks = traffic.shape.ranks
        most = max(seen, key=lambda one: sum(each.sent(ranks) * count for each, count in one.items()))
        for kind in {one.kind for one in (*traffic.collectives, *most)}:
            totals = [
                sum(one.size * count for one, count in side.items() if one.kind == kind)
                for side in (traffic.collectives, most)
            ]
            compared[name, Collective(kind, 0)] = (totals[0], totals[1])
    return compared


def _of_group(name: str, collectives: list[list]) -> Counter[Collective]:
    found: Counter[Collective] = Counter()
    for group, kind, size, count in collectives:
        if group == name:
            found[Collective(kind, size)] += count
    return found


def _measure_rank(rank: int, *, run: RunConfig, layout: Layout, folder: Path) -> None:
    meeting = f"file://{folder / 'store'}"
    device = join(rank=rank, world_size=layout.world_size, local_rank=rank, device="cpu", init_method=meeting)
    measurement = RankMeasurement()
    with measurement.tensors:
        from launcher.engine.build import build_engine

        engine = build_engine(run, layout, device)
        measurement.name_groups(engine)
        random = np.random.default_rng(rank)
        peaks = []
        for _ in range(STEPS):
            measurement.tensors.restart()
            engine.train_batch(_batches(run, layout, random))
            peaks.append(measurement.tensors.peak)
    # The first step makes the optimizer's states; now and then gloo's threads let go of a tensor very late.
    peak = min(peaks[1:])
    collectives = [(*call, times) for call, times in measurement.collectives().items()]
    (folder / f"{rank}.json").write_text(json.dumps({"peak": peak, "collectives": collectives}))
    leave()


def _batches(run: RunConfig, layout: Layout, random: np.random.Generator) -> Iterator[MicroBatch]:
    """Yield micro-batches of random tokens, of a context rank inputs and labels of its part."""
    length, size = sequence_length(run) // layout.context, run.training.micro_batch_size
    for _ in range(layout.accumulation):
        tokens = random.integers(0, run.model.vocab_size, (size, length + 1))
        yield tokens if layout.context == 1 else (tokens[:, :-1], tokens[:, 1:])


def table(found: list[Measured]) -> str:
    lines = ["| run | stage | measured, MB | predicted, MB | error |", "|---|---|---|---|---|"]
    for one in found:
        lines.append(
            f"| {one.case} | {one.stage} | {one.measured / 1e6:.2f} | {one.predicted / 1e6:.2f} "
            f"| {one.error:+.1%} |"
        )
    worst = max(abs(one.error) for one in found)
    return "\n".join([*lines, "", f"{len(CASES)} runs; the largest error is {worst:.1%}."])


if __name__ == "__main__":
    print(table([one for case in CASES for one in measure(case)[0]]))
