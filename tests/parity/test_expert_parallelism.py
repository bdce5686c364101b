"""Verify with experts shared by data ranks: expert-parallel layouts agree with the one-process reference."""

from itertools import product

import pytest

from launcher.config.schema import Dtype, RunConfig
from tests.parity.running import passes, plain_sgd_pass, run_pass, small_run, worst
from tests.parity.test_experts import OTHER_PARTS, SEQUENCE, alike_tokens

__all__ = ["alike_tokens"]

MOE = ["model=moe_tiny", "model.experts.count=8"]
CONTEXT = ["parallelism.data=1", "parallelism.context=2"]
CONTEXT_AND_DATA = "context 2 x expert 4 of data 2, ulysses, ZeRO-1, other parts"
LAYOUTS = {
    "expert 2, ZeRO-0": ["parallelism.data=2", "parallelism.expert=2"],
    "expert 2, sequence, ZeRO-1, other parts": [
        *OTHER_PARTS, *SEQUENCE, "parallelism.data=2", "parallelism.expert=2", "parallelism.zero_stage=1",
    ],
    "context 2 x expert 2, ring": [*CONTEXT, "parallelism.expert=2", "model.experts.shared=0"],
    "expert 2 of data 4, ZeRO-2": [
        "parallelism.data=4", "parallelism.expert=2", "parallelism.zero_stage=2",
    ],
    "expert 2 of data 4, tensor, ZeRO-0": [
        "parallelism.data=4", "parallelism.expert=2", "parallelism.tensor=2",
    ],
    "expert 2 of data 4, sequence, ZeRO-1": [
        *SEQUENCE, "parallelism.data=4", "parallelism.expert=2", "parallelism.zero_stage=1",
    ],
    "expert 2 of data 4, pipeline, ZeRO-1, other parts": [
        *OTHER_PARTS, "parallelism.data=4", "parallelism.expert=2", "parallelism.pipeline=2",
        "parallelism.zero_stage=1",
    ],
    "expert 2, pipeline, recomputed": [
        "parallelism.data=2", "parallelism.expert=2", "parallelism.pipeline=2",
        "parallelism.activation_checkpointing=full",
    ],
    CONTEXT_AND_DATA: [
        *OTHER_PARTS, *CONTEXT[1:], "parallelism.data=2", "parallelism.expert=4", "parallelism.zero_stage=1",
        "parallelism.context_method=ulysses",
    ],
}  # fmt: skip
# Experts are folded over data x context: groups within the context ranks, across them, and of data ranks.
WITH_CONTEXT = {
    "expert 1, ZeRO-3, gather": [
        *CONTEXT, "parallelism.zero_stage=3", "parallelism.context_method=gather",
    ],
    "expert 2, pipeline 2, recomputed, other parts": [
        *OTHER_PARTS, *CONTEXT, "parallelism.expert=2", "parallelism.pipeline=2",
        "parallelism.activation_checkpointing=full",
    ],
    "expert 2, sequence, documents": [
        *CONTEXT, *SEQUENCE, "parallelism.expert=2", "data.document_attention=true",
    ],
    "expert 2 of data 2, ZeRO-2, ulysses": [
        *CONTEXT[1:], "parallelism.data=2", "parallelism.expert=2", "parallelism.zero_stage=2",
        "parallelism.context_method=ulysses",
    ],
    "expert 4 of context 4": [
        "parallelism.context=4", "parallelism.data=1", "parallelism.expert=4", *OTHER_PARTS,
    ],
    "expert 4 of data 2, ZeRO-2, masked labels": [
        *CONTEXT[1:], "parallelism.data=2", "parallelism.expert=4", "parallelism.zero_stage=2",
        "data=chat", "data.train=chats.jsonl",
    ],
}  # fmt: skip


QUICK = {
    "expert 2, sequence, ZeRO-1, other parts",
    "context 2 x expert 2, ring",
    "expert 2, pipeline, recomputed",
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in LAYOUTS]
)
def test_layouts_agree_with_the_reference(layout: str) -> None:
    run = small_run(*MOE, *LAYOUTS[layout])
    assert run.parallelism.expert > 1
    result = plain_sgd_pass(run)
    assert result.ok, (result.diagnosis, worst(result))


@pytest.mark.slow
@pytest.mark.parametrize("layout", WITH_CONTEXT)
def test_layouts_with_context_ranks_agree_with_the_reference(layout: str) -> None:
    run = small_run(*MOE, *WITH_CONTEXT[layout])
    assert run.parallelism.context > 1
    all_passes_agree(run)


# All combinations on 2, 4 and 8 ranks. DeepSpeed's pipelines have no ZeRO-2.
EVERY = [
    (expert, tensor, pipeline, zero_stage)
    for expert, tensor, pipeline, zero_stage in product((2, 4), (1, 2), (1, 2), (0, 1, 2))
    if expert * tensor * pipeline <= 8 and (pipeline == 1 or zero_stage < 2)
]


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "tensor", "pipeline", "zero_stage"), EVERY)
def test_every_layout_agrees_with_the_reference(
    expert: int, tensor: int, pipeline: int, zero_stage: int
) -> None:
    layout = [f"parallelism.expert={expert}", f"parallelism.tensor={tensor}", f"parallelism.data={expert}"]
    layout += [f"parallelism.pipeline={pipeline}", f"parallelism.zero_stage={zero_stage}"]
    sequence = SEQUENCE[1:] if tensor > 1 and zero_stage % 2 == 0 else []
    run = small_run(*MOE, *layout, *sequence, *(OTHER_PARTS if pipeline == tensor else []))
    assert run.parallelism.expert == run.parallelism.data == expert
    all_passes_agree(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["training.compile=true", *OTHER_PARTS, *SEQUENCE, "parallelism.activation_checkpointing=full"],
        ["training.compile=true", "parallelism.zero_stage=2"],
        ["parallelism.pipeline=2", "parallelism.pipeline_schedule=dualpipev", "training.micro_batch_size=1",
         "model.num_layers=8"],
    ],
    ids=["compiled, sequence, recomputed", "compiled, ZeRO-2", "DualPipeV"],
)  # fmt: skip
def test_compiled_layouts_and_dualpipev_agree_with_the_reference(layout: list[str]) -> None:
    all_passes_agree(small_run(*MOE, "parallelism.data=2", "parallelism.expert=2", *layout))


def all_passes_agree(run: RunConfig) -> None:
    for title, variant, plain_sgd in passes(run):
        result = run_pass(title, variant, plain_sgd)
        assert result.ok, (title, result.diagnosis, worst(result))


IN_BF16 = {
    "expert 2, other parts": [*OTHER_PARTS, "parallelism.data=2", "parallelism.expert=2"],
    "expert 2 of data 4, ZeRO-2": LAYOUTS["expert 2 of data 4, ZeRO-2"],
    "expert 2, sequence, recomputed": [
        *SEQUENCE, "parallelism.data=2", "parallelism.expert=2",
        "parallelism.activation_checkpointing=full",
    ],
    "context 2, expert 4 of data 2, ulysses": LAYOUTS[CONTEXT_AND_DATA],
    "expert 2, pipeline": ["parallelism.data=2", "parallelism.expert=2", "parallelism.pipeline=2"],
}  # fmt: skip


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(IN_BF16)]
)
def test_layouts_agree_in_bf16(layout: str) -> None:
    """In the pass that is the run itself: tokens near a tie choose by rounded activations."""
    last = passes(small_run(*MOE, "precision=bf16", *IN_BF16[layout]))[-1]
    assert last.run.precision.dtype is Dtype.bf16
    result = run_pass(*last)
    assert result.ok, (result.diagnosis, worst(result))
    assert {"choice", "gradient", "weight", "state"} <= {each.kind for each in result.differences}


SKEWED = {
    "ZeRO-0": ["parallelism.data=2", "parallelism.expert=2"],
    "ZeRO-1": ["parallelism.data=2", "parallelism.expert=2", "parallelism.zero_stage=1"],
    "expert 4, sequence, ZeRO-2": [
        *SEQUENCE, "parallelism.data=4", "parallelism.expert=4", "parallelism.zero_stage=2",
    ],
    "expert 2 of data 4, pipeline, recomputed": [
        "parallelism.data=4", "parallelism.expert=2", "parallelism.pipeline=2",
        "parallelism.activation_checkpointing=full",
    ],
    "expert 4 of data 2, context 2, ZeRO-1": [
        *CONTEXT[1:], "parallelism.data=2", "parallelism.expert=4", "parallelism.zero_stage=1",
    ],
}  # fmt: skip


@pytest.mark.usefixtures("alike_tokens")
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(SKEWED)]
)
def test_a_router_that_sends_all_tokens_to_the_experts_of_one_rank(layout: str) -> None:
    """Ranks without tokens take part in every collective, and no number is a NaN."""
    result = plain_sgd_pass(small_run(*MOE, "model.experts.top_k=1", *SKEWED[layout]))
    assert result.ok, (result.diagnosis, worst(result))
