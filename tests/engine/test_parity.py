"""Every layout is the same run: losses, gradient norms and updated weights against plain torch."""

import functools
from collections.abc import Callable

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launcher.config.compose import config_directory, to_typed
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig, register_schema
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.distributed import join, leave, prepare_deepspeed
from tests.distributed import run_fresh
from tests.engine.reference import Trace, reference_trace, samples_for

prepare_deepspeed("cpu")

from launcher.engine.build import build_engine  # noqa: E402  (after DeepSpeed is made quiet)
from launcher.runtime.batches import rank_batches  # noqa: E402
from tests.parity import mutations  # noqa: E402

STEPS = 4
SMALL = [
    "model.max_sequence_length=32", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_layers=3",
    "model.init_std=0.1", "training.global_batch_size=16", "training.micro_batch_size=2",
    "optimizer.gradient_clipping=0.5",
]  # fmt: skip
GPT = ["model=gpt_tiny", "optimizer=sgd", *SMALL]
LLAMA = ["model=llama_tiny", "model.vocab_size=259", "optimizer=sgd", *SMALL]
ADAMW = ["model=llama_tiny", "optimizer=adamw", *SMALL]

SP, FULL = "parallelism.sequence_parallel=true", "parallelism.activation_checkpointing=full"
OFFLOAD = "parallelism.offload_optimizer=true"
SELECTIVE = "parallelism.activation_checkpointing=selective"
LAYOUTS = {
    "single": (GPT, ["parallelism=single"]),
    "dp": (GPT, ["parallelism=dp", "parallelism.data=2"]),
    "tp": (GPT, ["parallelism=tp2"]),
    "tp sp checkpointing": (LLAMA, ["parallelism=tp2", SP, FULL]),
    "tp sp tied": (GPT, ["parallelism=tp2", SP, SELECTIVE]),
    "pp uneven tied": (GPT, ["parallelism=pp2", FULL]),
    "pp dp adamw": (ADAMW, ["parallelism=pp2", "parallelism.data=2"]),
    "tp pp sp": (LLAMA, ["parallelism=tp2_pp2", SP]),
    "zero1 adamw": (ADAMW, ["parallelism=zero1", "parallelism.data=2"]),
    "zero2": (LLAMA, ["parallelism=zero2", "parallelism.data=2"]),
    "zero3 tied checkpointing": (GPT, ["parallelism=zero3", "parallelism.data=2", FULL]),
    "zero3 offload adamw": (ADAMW, ["parallelism=zero3_offload", "parallelism.data=2"]),
    "zero1 tp offload": (GPT, ["parallelism=tp2", "parallelism.data=2", "parallelism.zero_stage=1", OFFLOAD]),
    "zero3 tp sp": (LLAMA, ["parallelism=tp2", "parallelism.data=2", "parallelism.zero_stage=3", SP]),
    "no clipping": (GPT, ["parallelism=dp", "parallelism.data=2", "optimizer.gradient_clipping=null"]),
}  # fmt: skip


def run_of(overrides: list[str]) -> RunConfig:
    register_schema()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return to_typed(compose("config", overrides=overrides), RunConfig)


@functools.cache
def reference(overrides: tuple[str, ...]) -> Trace:
    return reference_trace(run_of(list(overrides)), STEPS)


def trace_of(overrides: list[str], mutation: Callable[[], None] | None = None) -> Trace:
    """Run the layout on real ranks; the loss and norm must be the same on all of them."""
    run = run_of(overrides)
    layout = validate(run, World("cpu", 2, 2))
    # As text: the ranks rebuild it, as a user's would.
    traces = run_fresh(
        _rank, layout.world_size, OmegaConf.to_yaml(OmegaConf.structured(run)), layout, mutation
    )
    assert all(trace.losses == traces[0].losses for trace in traces)
    assert all(trace.norms == traces[0].norms for trace in traces)
    weights = {name: weight for trace in traces for name, weight in trace.weights.items()}
    return Trace(traces[0].losses, traces[0].norms, traces[0].validation, weights)


def _rank(
    rank: int, world: int, init_method: str, config: str, layout: Layout, mutation: Callable[[], None] | None
) -> Trace:
    run = to_typed(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(config)), RunConfig)  # type: ignore[arg-type]
    if mutation is not None:
        mutation()
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    samples = samples_for(run.model, run.model.max_sequence_length, 1)
    size = run.training.global_batch_size
    trace = Trace([], [], 0.0, {})
    for step in range(STEPS):
        engine.set_learning_rate(run.optimizer.lr)
        result = engine.train_batch(rank_batches(run, engine, samples, step * size))
        trace.losses.append(engine.mean_loss(result.loss))
        trace.norms.append(float(result.grad_norm))
    trace.validation = float(engine.eval_batch(rank_batches(run, engine, samples, STEPS * size)))
    trace.weights = {logical.name: tensor.clone() for logical, tensor in engine.full_weights()}
    leave()
    return trace


def assert_same(trace: Trace, expected: Trace, *, relative: float, weights: float) -> None:
    assert trace.losses == pytest.approx(expected.losses, rel=relative)
    assert trace.norms == pytest.approx(expected.norms, rel=10 * relative)
    assert trace.validation == pytest.approx(expected.validation, rel=relative)
    assert trace.weights.keys() == expected.weights.keys()
    for name, weight in trace.weights.items():
        torch.testing.assert_close(
            weight, expected.weights[name], atol=weights, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_the_same_run(name: str) -> None:
    model, layout = LAYOUTS[name]
    expected = reference(tuple(model + [o for o in layout if o.startswith("optimizer")]))
    assert "clipping" in name or min(expected.norms) > 0.5, "clipping must be active"
    adamw = "optimizer=adamw" in model
    # Adam divides by the gradient's size: where a gradient is near zero its sign is rounding.
    assert_same(trace_of(model + layout), expected, relative=2e-6, weights=2e-5 if adamw else 2e-6)


@pytest.mark.slow
def test_hybrid_3d_is_the_same_run() -> None:
    assert_same(
        trace_of([*LLAMA, "parallelism=hybrid_3d", SP]), reference(tuple(LLAMA)), relative=2e-6, weights=2e-6
    )


BF16 = {
    "zero1 dp": ["parallelism=zero1", "parallelism.data=2"],
    "zero0 runs as zero1": ["parallelism=tp2", "parallelism.data=1"],
    "zero2 tp sp": ["parallelism=tp2", "parallelism.data=2", "parallelism.zero_stage=2", SP],
    "zero3 dp": ["parallelism=zero3", "parallelism.data=2"],
    "pp dp": ["parallelism=pp2", "parallelism.data=2"],
    "pp offload": ["parallelism=pp2", OFFLOAD],
}


@pytest.mark.parametrize("name", BF16)
def test_bf16_is_the_same_run_to_its_own_precision(name: str) -> None:
    """8 bits of mantissa: 2^-8 on a rounding; sums of many roundings average out, so the loss is closer."""
    trace = trace_of([*LLAMA, "precision=bf16", *BF16[name]])
    expected = reference(tuple(LLAMA))
    assert trace.losses == pytest.approx(expected.losses, rel=2**-9)
    # A wrong norm is off by sqrt(2) here, as DeepSpeed's was by sqrt(data) when given no data group of one.
    assert trace.norms == pytest.approx(expected.norms, rel=2**-6)
    assert trace.validation == pytest.approx(expected.validation, rel=2**-9)


def _same_data_on_all_ranks() -> None:
    import launcher.runtime.batches as batches

    indices = batches.sample_indices
    batches.sample_indices = lambda **where: indices(**{**where, "data_rank": 0})


MUTATIONS = {
    "unmarked shards": (mutations.shards_unmarked, ["parallelism=tp2", "parallelism.zero_stage=1"]),
    "norm weights unreduced": (mutations.norm_weights_not_reduced, ["parallelism=tp2", SP]),
    "same data on both data ranks": (_same_data_on_all_ranks, ["parallelism=dp", "parallelism.data=2"]),
    "unclipped": (mutations.not_clipped, ["parallelism=tp2"]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_fault_is_seen(name: str) -> None:
    mutation, layout = MUTATIONS[name]
    trace = trace_of(GPT + layout, mutation)
    with pytest.raises(AssertionError):
        assert_same(trace, reference(tuple(GPT)), relative=2e-6, weights=2e-6)
