"""Verify of models with experts: the layouts agree with the reference, which runs experts one by one."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

import launcher.parity.recording as recording
import launcher.parity.verification as verification
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parity.reference import GlobalBatch, probe_batches
from launcher.parity.shrink import long_samples
from tests.config.composing import run_of
from tests.parity.running import passes, plain_sgd_pass, run_pass, shrink, small_run, worst

OTHER_PARTS = [
    "model.experts.router=sigmoid", "model.experts.shared=2", "model.experts.scaling=2.5",
    "model.experts.first_dense_layers=1", "model.experts.normalize_top_k=false",
    "model.experts.bias_balancing=0.001",
]  # fmt: skip
SEQUENCE = ["parallelism.tensor=2", "parallelism.sequence_parallel=true"]
LAYOUTS = {
    "tensor, ZeRO-0, no shared experts": [
        "parallelism.tensor=2", "parallelism.data=1", "model.experts.shared=0", "model.experts.scaling=1",
    ],
    "data, sequence, ZeRO-1, other parts": [
        *OTHER_PARTS, *SEQUENCE, "parallelism.data=2", "parallelism.zero_stage=1",
    ],
    "pipeline, recomputed, other parts": [
        *OTHER_PARTS, "parallelism.pipeline=2", "parallelism.data=1",
        "parallelism.activation_checkpointing=full",
    ],
    "data, ZeRO-2, selective, every second layer": [
        "parallelism.data=2", "parallelism.zero_stage=2", "parallelism.activation_checkpointing=selective",
        "model.experts.every=2", "data.document_attention=true",
    ],
    "data, ZeRO-3": ["parallelism.data=2", "parallelism.zero_stage=3"],
}  # fmt: skip


def agrees(*overrides: str) -> None:
    result = plain_sgd_pass(small_run("model=moe_tiny", *overrides))
    assert result.ok, (result.diagnosis, worst(result))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_the_reference(layout: str) -> None:
    agrees(*LAYOUTS[layout])


# All combinations. DeepSpeed's pipelines have no ZeRO-2 and 3.
EVERY = [
    (data, tensor, pipeline, zero_stage)
    for data, tensor, pipeline, zero_stage in product((1, 2), (1, 2), (1, 2), (0, 1, 2, 3))
    if pipeline == 1 or zero_stage < 2
]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor", "pipeline", "zero_stage"), EVERY)
def test_every_layout_agrees_with_the_reference(
    data: int, tensor: int, pipeline: int, zero_stage: int
) -> None:
    layout = [f"parallelism.data={data}", f"parallelism.tensor={tensor}", f"parallelism.pipeline={pipeline}"]
    sequence = SEQUENCE[1:] if tensor > 1 and zero_stage % 2 else []
    more = OTHER_PARTS if pipeline == data else []
    run = small_run("model=moe_tiny", *layout, *sequence, *more, f"parallelism.zero_stage={zero_stage}")
    for title, variant, plain_sgd in passes(run):
        result = run_pass(title, variant, plain_sgd)
        assert result.ok, (title, result.diagnosis, worst(result))


@pytest.mark.slow
def test_compiled_layouts_and_dualpipev_agree_with_the_reference() -> None:
    for layout in (
        ["training.compile=true", *OTHER_PARTS, *SEQUENCE, "parallelism.activation_checkpointing=full"],
        ["training.compile=true", "parallelism.zero_stage=3"],
        ["parallelism.pipeline=2", "parallelism.pipeline_schedule=dualpipev", "training.micro_batch_size=1",
         "model.num_layers=8"],
    ):  # fmt: skip
        run = small_run("model=moe_tiny", "parallelism.data=2", *layout)
        for title, variant, plain_sgd in passes(run):
            result = run_pass(title, variant, plain_sgd)
            assert result.ok, (title, result.diagnosis, worst(result))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallelism.tensor=2", "parallelism.data=1"],
        [*OTHER_PARTS, *SEQUENCE, "parallelism.data=2", "parallelism.zero_stage=2"],
        ["parallelism.data=2", "parallelism.zero_stage=3", "parallelism.activation_checkpointing=full"],
        ["parallelism.pipeline=2", "parallelism.data=2", "model.experts.every=2", "optimizer=sgd"],
        ["parallelism.data=2", "training.compile=true"],
        ["parallelism.data=2", "model.experts.count=1", "model.experts.top_k=1"],
    ],
)  # fmt: skip
def test_layouts_agree_in_bf16(layout: list[str]) -> None:
    for plan in passes(small_run("model=moe_tiny", "precision=bf16", *layout)):
        result = run_pass(*plan)
        assert result.ok, (plan.title, result.diagnosis, worst(result))


@pytest.mark.slow
def test_states_in_bf16() -> None:
    for plan in passes(small_run("model=moe_tiny", "precision=bf16_states", "parallelism.data=2")):
        result = run_pass(*plan)
        assert result.ok, (plan.title, result.diagnosis, worst(result))


@pytest.mark.slow
def test_thousands_of_positions_are_routed_alike() -> None:
    """Some tokens are near a tie: the reference follows their choices."""
    run = run_of("model=moe_tiny", "hardware=cpu", "parallelism.data=2", "model.max_sequence_length=4096")
    layout = validate(run, World("cpu", 8, 8))
    long = long_samples(run, layout, shrink(run, layout)[0])
    assert long is not None
    result = run_pass(*passes(long)[0])
    assert result.ok, (result.diagnosis, worst(result))


@pytest.fixture
def alike_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all tokens of a batch be alike: all choose the same experts in every layer, and others get none."""

    def batches(run: RunConfig) -> Iterator[GlobalBatch]:
        for number, (tokens, labels) in enumerate(probe_batches(run)):
            yield torch.full_like(tokens, 3 + number), labels

    monkeypatch.setattr(recording, "probe_batches", batches)
    monkeypatch.setattr(verification, "probe_batches", batches)


@pytest.mark.usefixtures("alike_tokens")
@pytest.mark.parametrize(
    "layout", [["parallelism.data=2", "parallelism.zero_stage=2"], [*SEQUENCE, "parallelism.data=1"]]
)
def test_a_router_that_sends_all_tokens_to_the_same_experts(layout: list[str]) -> None:
    run = small_run("model=moe_tiny", *layout)
    result = plain_sgd_pass(run)
    assert result.ok, (result.diagnosis, worst(result))
    [tokens, *_] = [batch[0] for batch in recording.probe_batches(run)]
    assert len(tokens.unique()) == 1
