"""Fit the time model on table 1 of Narayanan et al. (SC 2021, arXiv 2104.04473) alone.

    python -m benchmarks.narayanan          predicted beside published, for docs/planning.md
    python -m benchmarks.narayanan fit      the shares in launcher/planning/cost/rates.py

The runs in the table are Megatron-LM of 2021 on A100s of 80 GB. They are planned with full recomputation,
fp16, attention scores kept in memory by unfused kernels, no overlap, and an interleaved pipeline, whose
bubble is divided by the stages of a rank. Sizes and micro-batches are those of the authors' script
(examples/sc21/run_table_1.sh in NVIDIA/Megatron-LM). Throughput counts FLOPs by their equation 3.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from launcher.config.layout import resolve_layout
from launcher.config.schema import (
    ActivationCheckpointing,
    AttentionKind,
    BiasesConfig,
    Dtype,
    HardwareConfig,
    InputKind,
    MLPKind,
    ModelConfig,
    NormKind,
    OptimizerConfig,
    OptimizerName,
    ParallelismConfig,
    PeakFlops,
    PositionKind,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
)
from launcher.config.world import World
from launcher.planning.cost import attention_operations, pass_time
from launcher.planning.cost.block_operations import block
from launcher.planning.cost.operations import Matmul, Operation
from launcher.planning.cost.parts import parts
from launcher.planning.cost.rates import Shares
from launcher.planning.cost.run_plan import Plan, make_plan
from launcher.planning.cost.sizes import Sizes

SEQUENCE, VOCABULARY = 2048, 51200
# Megatron-LM of 2021 waits for collectives, sends and receives at once, and fuses what lies between products.
MEGATRON = {"overlaps": False, "exchange": 1.0, "eager": 1.0}


@dataclass(frozen=True)
class Row:
    billions: float  # of parameters, as published
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    micro_batch: int
    interleaved: int  # stages on each rank
    published: int  # TFLOP/s of each GPU


TABLE_1 = [
    Row(1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137),
    Row(3.6, 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138),
    Row(7.5, 32, 4096, 36, 4, 1, 128, 512, 16, 1, 142),
    Row(18.4, 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135),
    Row(39.1, 64, 8192, 48, 8, 2, 512, 1536, 4, 1, 138),
    Row(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 2, 3, 140),
    Row(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148),
    Row(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 1, 2, 155),
    Row(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 1, 3, 163),
    Row(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163),
]

A100 = HardwareConfig(
    accelerators_per_node=8,
    memory_bytes=80e9,
    peak_flops=PeakFlops(fp32=19.5e12, bf16=312e12, fp16=312e12),
    gemm_efficiency=0.869,
    memory_bandwidth_gb_s=2039,
    bandwidth_intra_node_gb_s=300,
    bandwidth_inter_node_gb_s=25,
)


def run_of(row: Row) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            inputs=InputKind.tokens,
            norm=NormKind.layer_norm,
            positions=PositionKind.learned,
            mlp=MLPKind.gelu,
            attention=AttentionKind.causal,
            biases=BiasesConfig(qkv=True, output=True, up=True, down=True, head=False),
            hidden_size=row.hidden,
            num_layers=row.layers,
            num_heads=row.heads,
            ffn_hidden_size=4 * row.hidden,
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            tie_embeddings=True,
            dropout=0.1,
        ),
        parallelism=ParallelismConfig(
            tensor=row.tensor,
            pipeline=row.pipeline,
            zero_stage=1,
            activation_checkpointing=ActivationCheckpointing.full,
        ),
        hardware=replace(A100, nodes=row.gpus // 8),
        optimizer=OptimizerConfig(name=OptimizerName.adamw, lr=1e-4),
        precision=PrecisionConfig(dtype=Dtype.fp16),
        # Megatron-LM compiled no blocks then.
        training=TrainingConfig(
            steps=1, global_batch_size=row.batch, micro_batch_size=row.micro_batch, compile=False
        ),
    )


def plan_of(row: Row, shares: Shares) -> Plan:
    run = run_of(row)
    layout = resolve_layout(run, World("cuda", row.gpus, 8, fixed=True))
    return make_plan(run, layout, shares=replace(shares, **MEGATRON))


def seconds_of(row: Row, plan: Plan) -> float:
    """Return the seconds of a step at the published TFLOP/s; its FLOPs are those of equation 3."""
    return _flops(row, plan.run.model.vocab_size) / row.published / row.gpus / 1e12


def _flops(row: Row, vocabulary: int) -> float:
    """Return the FLOPs of a step by the paper's count: 4 passes, with recomputation (equation 3)."""
    h, s, layers = row.hidden, SEQUENCE, row.layers
    return 96 * row.batch * s * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))


def tflops(row: Row, plan: Plan) -> float:
    """Return TFLOP/s of each GPU, by the paper's count."""
    assert plan.time is not None
    seconds = plan.time.total - plan.time.bubble * (1 - 1 / row.interleaved)
    return _flops(row, VOCABULARY) / seconds / row.gpus / 1e12


def errors(shares: Shares) -> list[float]:
    return [tflops(row, plan_of(row, shares)) / row.published - 1 for row in TABLE_1]


def mean_error(found: list[float]) -> float:
    return sum(map(abs, found)) / len(found)


def unfused_attention(s: Sizes, inputs: tuple[str, ...]) -> Operation:
    """Return Megatron-LM's attention of 2021: a fused softmax, other kernels through memory, 2-byte elements.

    Forward: scores written; softmax read, written; dropout read, written with its mask of a byte; read.
    Backward: gradient written; dropout's and softmax's read and written; dropped and undropped scores read.
    """
    product = Matmul(s.length, s.length, s.head_size, s.micro_batch * s.heads)
    scores = s.tokens * s.length * s.heads
    return replace(
        FUSED(s, inputs),
        attention=None,
        backward_matmuls=(product,) * 4,
        forward_bytes=s.fused + s.query + (2 + 4 + 5 + 2) * scores,
        backward_bytes=2 * s.fused + 2 * s.query + (2 + 5 + 6 + 4 + 2) * scores,
        kernels=4,
    )


def fused_block(s: Sizes) -> list[Operation]:
    """Return a block as Megatron-LM fuses it: biases in GELU and in dropout, in-place reductions."""
    again = []
    for one in BLOCK(s):
        if one.name in ("qkv", "up", "attention", "mlp"):
            one = replace(one, forward_bytes=0, kernels=1)
        if one.name.endswith(".dropped"):
            one = replace(one, forward_bytes=one.extra, kernels=0)
        again.append(one)
    return again


FUSED, BLOCK = attention_operations.fused_attention, block


@contextmanager
def as_megatron_2021() -> Iterator[None]:
    forget_parts()
    with (
        patch.object(attention_operations, "fused_attention", unfused_attention),
        patch("launcher.planning.cost.parts.block", fused_block),
    ):
        yield
    forget_parts()


def forget_parts() -> None:
    """Forget the planned parts of a model and their times: they depend on what is patched."""
    parts.cache_clear()
    pass_time.part_times.cache_clear()


# What kernels of one purpose reach on an A100: BabelStream's triad 0.9 of the memory's bandwidth, nccl-tests'
# all-reduce 0.8 of NVLink's. A fit that needs more would be hiding a fault of the model.
CEILINGS = Shares(product=1.0, memory=0.9, link=0.8)


def fit() -> Shares:
    """Return the shares with the least mean error, by a grid that is refined around its best point."""
    best, step = Shares(product=0.8, memory=0.7, link=0.6), 0.08
    while step > 0.004:
        around = [step * n for n in (-2, -1, 0, 1, 2)]
        candidates = [
            replace(best, product=best.product + p, memory=best.memory + m, link=best.link + n)
            for p, m, n in itertools.product(around, around, around)
        ]
        legal = [
            one
            for one in candidates
            if 0.2 < one.product <= CEILINGS.product
            and 0.2 < one.memory <= CEILINGS.memory
            and 0.2 < one.link <= CEILINGS.link
        ]
        best, step = min(legal, key=lambda one: mean_error(errors(one))), step / 2
    return best


def table(shares: Shares) -> str:
    lines = [
        "| parameters | ours | TP x PP x DP | published | predicted | error |",
        "|---|---|---|---|---|---|",
    ]
    for row, error in zip(TABLE_1, errors(shares), strict=True):
        plan = plan_of(row, shares)
        axes = f"{row.tensor} x {row.pipeline} x {plan.layout.data}"
        lines.append(
            f"| {row.billions} B | {plan.parameters / 1e9:.1f} B | {axes} | {row.published} TFLOP/s | "
            f"{row.published * (1 + error):.0f} TFLOP/s | {error:+.1%} |"
        )
    return "\n".join([*lines, "", f"Mean error {mean_error(errors(shares)):.1%}."])


if __name__ == "__main__":
    with as_megatron_2021():
        print(fit() if sys.argv[1:] == ["fit"] else table(Shares()))
