"""Every comparison of a planned step on GPUs with a measured or published one, for docs/planning.md.

    python -m benchmarks.comparisons
    python -m benchmarks.comparisons RUN...     rows of finished runs, to append to the table

The rows on an H100 are this project's runs. Those of 2026-11-26 are planned with the engine of that day:
attention copied its operands, all logits were kept, several kernels of the loss read them, and DeepSpeed made
its own passes over the gradients. Those of 2026-11-27 are planned with fp32 sums of the gradients. Rows that
are not fitted come from other programs; they show how far the plan is from runs of other engines.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from unittest.mock import patch

from benchmarks import narayanan
from launcher.commands.learn import finished_run
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout, resolve_layout
from launcher.config.schema import Dtype, RunConfig
from launcher.config.shape import qkv_sizes
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.planning.cost import (
    attention_operations,
    end_operations,
    optimizer_time,
    sizes,
    zero_states,
)
from launcher.planning.cost.measured_rates import rates_of
from launcher.planning.cost.operations import BYTES, FP32, Matmul, Operation
from launcher.planning.cost.rates import Shares
from launcher.planning.cost.run_plan import Plan, make_plan
from launcher.planning.cost.sizes import Sizes
from launcher.runtime.metrics.rows import rows_in
from launcher.runtime.run_dir import METRICS

OLD, NEW = "H100, 2026-11-26", "H100, 2026-11-27"
SC21 = "Narayanan et al., SC 2021"


@dataclass(frozen=True)
class Comparison:
    """A measured step and its plan. `fitted` names the constants that the row helped to fit."""

    run: str
    source: str
    fitted: str  # empty: kept aside
    measured: float  # seconds of a step
    planned: float
    measured_gb: float | None = None
    planned_gb: float | None = None

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1

    @property
    def memory_error(self) -> float | None:
        if self.measured_gb is None or self.planned_gb is None:
            return None
        return self.planned_gb / self.measured_gb - 1


LLAMA = [
    "model=llama3_8b", "model.hidden_size=2048", "model.num_layers=16", "model.num_heads=32",
    "model.num_kv_heads=8", "model.ffn_hidden_size=8192", "model.max_sequence_length=4096",
    "model.vocab_size=128256", "model.tie_embeddings=true",
]  # fmt: skip
# Overrides, micro-batch, and tokens of a sequence.
MODELS = {
    "GPT-2 124M": (["model=gpt2_small", "model.dropout=0"], 32, 1024),
    "GPT-2 124M, 8 sequences": (["model=gpt2_small", "model.dropout=0"], 8, 1024),
    "Llama 1.24B": (LLAMA, 4, 4096),
    "GPT-2 1.56B": (["model=gpt2_xl", "model.dropout=0"], 8, 1024),
}


@dataclass(frozen=True)
class Engine:
    """The engine of a run on the H100: its head ("kept", "fused" or "chunks"), and what was compiled."""

    head: str
    compiled: bool
    copies: bool  # attention's operands
    is_old: bool = True  # with DeepSpeed's passes over the gradients, and several kernels for the loss


EAGER, BLOCKS = Engine("kept", False, True), Engine("kept", True, True)
# (engine, model): tokens/s and peak GB (facts of 2026-11-26, medians of 15 to 20 steps).
MEASURED_HERE = [
    ("eager", EAGER, "GPT-2 124M", 281_557, 28.6, []),
    ("eager", EAGER, "Llama 1.24B", 44_983, 70.1, []),
    ("eager", EAGER, "GPT-2 1.56B", 32_561, 52.7, []),
    ("eager, 50,257 columns", EAGER, "GPT-2 124M", 198_622, 28.6, ["parallelism.vocabulary_multiple=1"]),
    ("eager", EAGER, "GPT-2 124M, 8 sequences", 150_581, None, []),
    ("eager, ZeRO-3", EAGER, "GPT-2 124M, 8 sequences", 43_705, None, ["parallelism.zero_stage=3"]),
    ("blocks compiled", BLOCKS, "GPT-2 124M", 319_966, 28.6, []),
    ("blocks and loss compiled", Engine("fused", True, True), "GPT-2 124M", 441_487, 22.0, []),
    ("blocks and loss compiled", Engine("fused", True, True), "Llama 1.24B", 53_394, 57.4, []),
    ("blocks compiled, head in chunks", Engine("chunks", True, False), "GPT-2 124M", 459_272, 15.6, []),
    ("blocks compiled, head in chunks", Engine("chunks", True, False), "Llama 1.24B", 53_961, 51.7, []),
    ("blocks compiled, head in chunks", Engine("chunks", True, False), "GPT-2 1.56B", 35_845, 50.5, []),
]
# The engine of 2026-11-27. GPT-2 124M was measured with `launcher`, Llama with `python -m benchmarks.gpu`,
# GPT-2 1.56B with the engine alone.
SUMMING = Engine("chunks", True, False, is_old=False)
MEASURED_LATER = [
    ("compiled", SUMMING, "GPT-2 124M", 487_165, 13.14, []),
    ("compiled", SUMMING, "Llama 1.24B", 60_655, 46.94, []),
    ("compiled", SUMMING, "GPT-2 1.56B", 41_053, 49.79, []),
]
FUSED, LOSS = attention_operations.fused_attention, end_operations._loss


def copying_attention(s: Sizes, inputs: tuple[str, ...]) -> Operation:
    """Return attention that orders its operands, its result and their gradients anew."""
    core, copied = FUSED(s, inputs), 2 * s.fused + 2 * s.query
    return replace(
        core,
        forward_bytes=core.forward_bytes + copied,
        backward_bytes=core.backward_bytes + copied,
        kernels=5,
    )


def kept_loss(s: Sizes, x: str, *, fused: bool) -> Operation:
    """Return a loss that keeps all logits, and its softmax in fp32 unless one kernel computes it.

    Bytes per logit: cast 6, maximum 4, difference 8, exponential 8, sum 4, quotient 8; backward copy 8,
    product 8, cast 6. Fused: read twice; read and written.
    """
    h, columns, tokens = s.hidden_size, s.vocabulary, s.tokens
    logits, product = tokens * columns, Matmul(tokens, columns, h)
    return replace(
        LOSS(s, x),
        forward_matmuls=(product,),
        backward_matmuls=(Matmul(tokens, h, columns), Matmul(columns, h, tokens)),
        made=0,
        extra=logits * (2 if fused else 6),
        scratch=logits * 4,
        backward_scratch=logits * 4,
        weight=2 * columns * h,
        forward_bytes=logits * (4 if fused else 38),
        backward_bytes=logits * (4 if fused else 22),
    )


def eager_loss(s: Sizes, x: str) -> Operation:
    """Return the loss in chunks, whose passes are eager even if the blocks are compiled."""
    return LOSS(replace(s, compiled=False), x)


def deepspeeds_passes(run: RunConfig, layout: Layout, whole: int, share: int, element: int) -> float:
    """Return the bytes that BF16_Optimizer itself moves beside the update (DeepSpeed 0.19.8).

    In three models on an H100, the step beside the computation took the time of 110, 103 and 110 bytes a
    parameter with the update's 28. Here they are 102, because bf16 gradients are no longer kept and zeroed.
    """
    low, high = BYTES[Dtype.bf16], FP32
    # Each micro-batch: cast to fp32 and added (_update_hp_grad).
    added = (low + high) + 3 * high
    # The reduction, also of one rank: copied, cast, scaled, cast, copied (engine.py, allreduce_and_copy).
    reduced = 2 * high + (high + low) + 2 * low + (low + high) + 2 * high
    # The norm, clipping and zeros of all gradients, not of the partition; the update counts 4 of clipping.
    judged = high + 2 * high + high
    # New weights are cast, and copied in the gather (update_lp_params).
    return whole * (layout.accumulation * added + reduced + judged + low) + share * low


@contextmanager
def engine_of(engine: Engine) -> Iterator[None]:
    narayanan.forget_parts()
    with ExitStack() as stack:
        stack.enter_context(patch.object(sizes, "is_compiled", lambda run, device: engine.compiled))
        if engine.head != "chunks":
            loss = partial(kept_loss, fused=engine.head == "fused")
            stack.enter_context(patch.object(end_operations, "_loss", loss))
        elif engine.is_old:
            stack.enter_context(patch.object(end_operations, "_loss", eager_loss))
        # Measured when BF16_Optimizer still kept fp32 sums for one data rank with one micro-batch.
        for module in (optimizer_time, zero_states):
            stack.enter_context(patch.object(module, "updates_directly", lambda run, layout: False))
        if engine.is_old:
            stack.enter_context(patch.object(optimizer_time, "_light_passes", deepspeeds_passes))
        if engine.copies:
            stack.enter_context(patch.object(attention_operations, "fused_attention", copying_attention))
        yield
    narayanan.forget_parts()


def planned(overrides: list[str], ranks: int, per_node: int) -> Plan:
    [job] = compose_jobs("config", RunConfig, ["checkpoint.enabled=false", *overrides])
    return make_plan(job.config, validate(job.config, World("cuda", ranks, per_node, fixed=True)))


def on_this_h100() -> Iterator[Comparison]:
    for name, engine, model, tokens_per_s, gigabytes, more in (*MEASURED_HERE, *MEASURED_LATER):
        overrides, micro_batch, length = MODELS[model]
        sizes_of_batch = [f"training.{size}_batch_size={micro_batch}" for size in ("global", "micro")]
        single = ["parallelism=single", "hardware=h100_80gb", "precision=bf16"]
        with engine_of(engine):
            plan = planned([*overrides, *single, *sizes_of_batch, *more], 1, 1)
        assert plan.time is not None
        peak = plan.stages[0].memory.allocated / 1e9
        seconds = micro_batch * length / tokens_per_s
        source = OLD if engine.is_old else NEW
        fitted = "engine" if engine.is_old and "ZeRO-3" not in name else ""
        yield Comparison(f"{model}, {name}", source, fitted, seconds, plan.time.total, gigabytes, peak)


def on_this_h200() -> Iterator[Comparison]:
    """Yield a step of Llama 3 8B with two sequences of 8192 tokens: the run of docs/precision.md."""
    run = [
        "model=llama3_8b", "parallelism=single", "hardware=h200_141gb", "precision=bf16_states",
        "training.global_batch_size=2", "training.micro_batch_size=2",
    ]  # fmt: skip
    with engine_of(SUMMING):
        plan = planned(run, 1, 1)
    assert plan.time is not None
    peak, name = plan.stages[0].memory.allocated / 1e9, "Llama 8.03B, bf16 states, compiled"
    yield Comparison(name, "H200, 2026-11-27", "", 1.5213, plan.time.total, 131.38, peak)


def megatron() -> Iterator[Comparison]:
    with narayanan.as_megatron_2021():
        for row in narayanan.TABLE_1:
            plan = narayanan.plan_of(row, Shares())
            assert plan.time is not None
            seconds = plan.time.total - plan.time.bubble * (1 - 1 / row.interleaved)
            name = f"GPT {row.billions} B, TP{row.tensor} x PP{row.pipeline} x DP{plan.layout.data}"
            measured = seconds * narayanan.tflops(row, plan) / row.published
            yield Comparison(name, f"{SC21}, table 1", "product, memory, link", measured, seconds)


# hidden size, layers, heads, GPUs, micro-batch, global batch, TFLOP/s of each GPU
ZERO_3 = [
    (12288, 96, 96, 384, 4, 1536, 144), (12288, 96, 96, 768, 2, 1536, 88), (12288, 96, 96, 1536, 1, 1536, 44),
    (20480, 105, 128, 640, 4, 2560, 138), (20480, 105, 128, 1120, 2, 2240, 98),
    (20480, 105, 128, 2240, 1, 2240, 48),
]  # fmt: skip


def zero_3() -> Iterator[Comparison]:
    """Yield ZeRO-3 without model parallelism, on the kernels of Megatron-LM."""
    for hidden, layers, heads, gpus, micro_batch, batch, published in ZERO_3:
        row = narayanan.Row(0, heads, hidden, layers, 1, 1, gpus, batch, micro_batch, 1, published)
        run = narayanan.run_of(row)
        run.parallelism.zero_stage = 3
        with narayanan.as_megatron_2021():
            plan = make_plan(run, resolve_layout(run, World("cuda", gpus, 8, fixed=True)))
            measured = narayanan.seconds_of(row, plan)
        assert plan.time is not None
        name = f"GPT {plan.parameters / 1e9:.0f} B, ZeRO-3 on {gpus} A100, micro-batch {micro_batch}"
        yield Comparison(name, f"{SC21}, table 2", "", measured, plan.time.total)


def deepspeed_pipelines() -> Iterator[Comparison]:
    """Yield runs of Megatron-DeepSpeed: DeepSpeed's pipeline, and kernels of Megatron-LM."""
    for name, source, row, hardware, dtype, vocabulary, seconds in DEEPSPEED:
        run = narayanan.run_of(row)
        run.precision.dtype = dtype
        run.model.vocab_size = vocabulary
        run.hardware = replace(hardware, nodes=row.gpus // 8)
        with (
            narayanan.as_megatron_2021(),
            patch.object(optimizer_time, "_light_passes", deepspeeds_passes),
        ):
            plan = make_plan(run, resolve_layout(run, World("cuda", row.gpus, 8, fixed=True)))
        assert plan.time is not None
        yield Comparison(name, source, "", seconds or narayanan.seconds_of(row, plan), plan.time.total)


A100_40 = replace(narayanan.A100, memory_bytes=42.3e9, memory_bandwidth_gb_s=1555)
MT_NLG = "Smith et al., arXiv 2201.11990"
DEEPSPEED = [
    (
        "BLOOM 176 B, TP4 x PP12 x DP8", "BigScience, 2022",
        narayanan.Row(176, 112, 14336, 70, 4, 12, 384, 2048, 2, 1, 150), narayanan.A100, Dtype.bf16, 250_880,
        105,
    ),
    *(
        (
            f"MT-NLG 530 B, TP8 x PP35 x DP{gpus // 280}", MT_NLG,
            narayanan.Row(530, 128, 20480, 105, 8, 35, gpus, 1920, 1, 1, 0), narayanan.A100, Dtype.bf16,
            51_200, seconds,
        )
        for gpus, seconds in ((2240, 60.1), (2800, 50.2), (3360, 44.4))
    ),
    (
        "GPT-NeoX 20 B, TP2 x PP4 x DP12", "Black et al., arXiv 2204.06745",
        narayanan.Row(20, 64, 6144, 44, 2, 4, 96, 1536, 4, 1, 117), A100_40, Dtype.fp16, 50_432, None,
    ),
]  # fmt: skip


# Their H100 has 96 GB of HBM2e with 2.4 TB/s, and ours 3.35: memory rates of the card in this proportion.
HBM2E = 2400 / 3350


def torchtitan() -> Iterator[Comparison]:
    """Yield Llama 8B on 8 H100 of 500 W by torchtitan: FSDP2, which partitions as ZeRO-3 does.

    Two sequences per GPU (benchmarks/llama3_h100_202412_torchtitan.md, table 1). Its selective recomputation
    repeats every second product of a block: keys, the output of attention, and half of the MLP's input.
    """
    run = [
        "model=llama3_8b", "hardware=h100_80gb", "hardware.memory_bytes=96e9", "precision=bf16",
        f"hardware.card.memory_gb_s={3000 * HBM2E:.0f}", f"hardware.card.update_gb_s={2600 * HBM2E:.0f}",
        "parallelism.zero_stage=3", "parallelism.activation_checkpointing=selective",
        "training.micro_batch_size=2", "training.global_batch_size=16", "parallelism.data=8",
    ]  # fmt: skip
    tokens = 2 * 8192
    for name, compiled, tokens_per_s in (("eager", False, 5762), ("compiled", True, 6667)):
        with engine_of(Engine("chunks", compiled, False)):
            plan = planned(run, 8, 8)
        rates, model = rates_of(plan.run.hardware, Dtype.bf16, 8), plan.run.model
        assert plan.time is not None
        assert rates is not None
        columns = (qkv_sizes(model)[1], model.hidden_size, model.ffn_hidden_size)
        again = sum(rates.product(Matmul(tokens, size, model.hidden_size)) for size in columns)
        seconds = plan.time.total + model.num_layers * again
        yield Comparison(
            f"Llama 8 B on 8 H100, {name}", "torchtitan, 2024", "", tokens / tokens_per_s, seconds
        )


def comparisons() -> list[Comparison]:
    return [*on_this_h100(), *on_this_h200(), *megatron(), *zero_3(), *deepspeed_pipelines(), *torchtitan()]


def finished_runs(paths: Sequence[Path]) -> list[Comparison]:
    """Return finished runs beside their plans on the hardware of their own configs.

    Raises ConfigError for a directory without a finished run, and for hardware without known speeds.
    """
    return [_finished(path) for path in paths]


def _finished(path: Path) -> Comparison:
    done = finished_run(path)
    plan, hardware = make_plan(done.run, done.layout), done.run.hardware
    if plan.time is None:
        why = f"the hardware config of {path} states no speed"
        raise ConfigError("hardware", None, why, f"launcher plan learn=[{path}] hardware=NAME")
    measured = (row.get("memory/allocated_bytes") for row in rows_in(path / METRICS))
    peaks = [size for size in measured if size is not None]
    day = datetime.fromtimestamp((path / METRICS).stat().st_mtime, UTC).date()
    return Comparison(
        run=f"{path.name}: {done.layout.describe()}",
        source=f"{hardware.card.name or done.layout.device}, {day}",
        fitted="compute_scale" if hardware.compute_scale != 1 else "",
        measured=done.seconds,
        planned=plan.time.total,
        measured_gb=peaks[-1] / 1e9 if peaks else None,
        planned_gb=max(stage.memory.allocated for stage in plan.stages) / 1e9,
    )


def lines_of(rows: Sequence[Comparison]) -> list[str]:
    """Return the table of the rows."""
    lines = [
        "| run | source | fitted | measured, s | planned, s | error | measured, GB | planned, GB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = ["", "", ""]
        if row.memory_error is not None:
            memory = [*map(_gigabytes, (row.measured_gb, row.planned_gb)), f"{row.memory_error:+.1%}"]
        cells = [row.run, row.source, row.fitted or "no", f"{row.measured:.3g}", f"{row.planned:.3g}"]
        lines.append(f"| {' | '.join([*cells, f'{row.error:+.1%}', *memory])} |")
    return lines


def _gigabytes(size: float | None) -> str:
    assert size is not None
    return f"{size:.1f}" if size >= 10 else f"{size:.3g}"


def table(rows: Sequence[Comparison]) -> str:
    """Return the table with the mean errors of the rows that were fitted, and of the others."""
    lines = lines_of(rows)
    for words, some in (
        ("fitted", [row for row in rows if row.fitted]),
        ("kept aside", [row for row in rows if not row.fitted]),
    ):
        errors = [abs(row.error) for row in some]
        mean = sum(errors) / len(errors)
        lines.append(
            f"\nMean error of the {len(some)} rows {words}: {mean:.1%}; the largest is {max(errors):.0%}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        runs = finished_runs([Path(name) for name in sys.argv[1:]])
    except ConfigError as error:
        sys.exit(str(error))
    print("\n".join(lines_of(runs)) if runs else table(comparisons()))
