"""Compiled blocks are one more layout of verify: the same numbers, one graph, and the faults still caught."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import launcher.parity.recording as recording
from launcher.parity.verification import Mutation as Fault
from tests.compiling import forget_graphs, graphs_and_breaks, trace_only
from tests.parity.mutations import DROPOUT_MUTATIONS, MUTATIONS, Mutation
from tests.parity.running import VerifyPass, dropout_pass, passes, run_pass, small_run, worst

COMPILED = "training.compile=true"
SP = "parallelism=tp2 parallelism.data=1 parallelism.sequence_parallel=true"
LAYOUTS = [
    f"model=gpt_tiny {SP} parallelism.zero_stage=2 parallelism.activation_checkpointing=selective",
    "model=llama_tiny parallelism=zero3 parallelism.data=2 parallelism.activation_checkpointing=full",
    "model=llama_tiny parallelism=pp2 parallelism.data=1 data.document_attention=true",
]
MORE_LAYOUTS = [
    "model=gpt_tiny parallelism=dp parallelism.data=2 precision=bf16",
    "model=gpt_tiny parallelism=zero1 parallelism.data=2",
    "model=llama_tiny parallelism=tp2 parallelism.data=2 parallelism.zero_stage=3",
    "model=llama_tiny parallelism=zero3 parallelism.data=2 parallelism.offload_parameters=true "
    "parallelism.offload_optimizer=true",
    f"model=llama_tiny {SP} parallelism.activation_checkpointing=full data.document_attention=true",
    "model=gpt_tiny parallelism=tp2_pp2 parallelism.data=1 parallelism.activation_checkpointing=selective",
    "model=gpt_tiny parallelism=pp2 parallelism.data=1 parallelism.pipeline_schedule=dualpipev "
    "training.micro_batch_size=1 model.num_layers=8",
    "model=vit_tiny data=digits parallelism=tp2 parallelism.data=1",
]
QUICK_FAULTS = [
    "norm-weight gradients not reduced under sequence parallel",
    "column layer's input gradient not reduced",
]


def one_graph(fault: Fault | None, *, traced: bool) -> None:
    """In a rank: inject a fault, and fail unless one graph without a break served the whole run."""
    forget_graphs()  # of the process that forked this rank
    if traced:
        trace_only()
    if fault is not None:
        fault()
    right = recording.leave

    def leave() -> None:
        assert graphs_and_breaks() == (1, 0)
        right()

    recording.leave = leave


def compiled_pass(layout: str, fault: Fault | None = None, *, traced: bool) -> VerifyPass:
    """Return the last compiled pass: the run itself."""
    small = small_run(*layout.split(), COMPILED)
    title, run, plain_sgd = [each for each in passes(small) if each[1].training.compile][-1]
    return run_pass(title, run, plain_sgd, partial(one_graph, fault, traced=traced))


def test_a_compiled_run_is_verified_eager_and_compiled() -> None:
    run = small_run("model=gpt_tiny", "parallelism=tp2", "precision=bf16", COMPILED)
    assert [(title, each.training.compile) for title, each, _ in passes(run)] == [
        ("plain SGD, fp32", False),
        ("plain SGD, fp32, compiled", True),
        ("adamw, fp32", False),
        ("adamw, bf16", False),
        ("adamw, bf16, compiled", True),
    ]
    assert not any(each.training.compile for _, each, _ in passes(small_run("model=gpt_tiny")))


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:])]
)
def test_compiled_blocks_are_the_same_run(layout: str) -> None:
    result = compiled_pass(layout, traced=True)
    assert result.ok, (result.diagnosis, worst(result))
    outputs = {difference.name for difference in result.differences if difference.kind == "output"}
    assert {"embedding", "final_norm", "head"} <= outputs


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS + MORE_LAYOUTS)
def test_generated_kernels_are_the_same_run(layout: str) -> None:
    result = compiled_pass(layout, traced=False)
    assert result.ok, (result.diagnosis, worst(result))


@pytest.mark.parametrize("name", QUICK_FAULTS)
def test_a_fault_is_detected_in_compiled_blocks(name: str) -> None:
    mutation = MUTATIONS[name]
    assert not compiled_pass(mutation.layout, mutation.inject, traced=True).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MUTATIONS][::3])  # all of them: uncompiled, in test_mutations
def test_every_third_fault_is_detected_in_generated_kernels(name: str) -> None:
    mutation = MUTATIONS[name]
    assert not compiled_pass(mutation.layout, mutation.inject, traced=False).ok


def compiled_masks(layout: str, fault: Callable[[], None] | None, **options: Any) -> VerifyPass:
    small = small_run(*layout.split(), COMPILED)
    return dropout_pass(small, partial(one_graph, fault, **options))


def assert_caught(mutation: Mutation, result: VerifyPass) -> None:
    assert result.diagnosis is not None
    assert all(words in result.diagnosis.shape for words in mutation.words), result.diagnosis


@pytest.mark.slow
def test_faults_of_dropout_are_detected_in_compiled_blocks() -> None:
    for name in ("dropout mask shared across sequence shards", "dropout mask not restored in recomputation"):
        mutation = DROPOUT_MUTATIONS[name]
        assert_caught(mutation, compiled_masks(mutation.layout, mutation.inject, traced=True))
        result = compiled_masks(mutation.layout, None, traced=True)
        assert result.ok, result.diagnosis


@pytest.mark.slow
@pytest.mark.parametrize("name", DROPOUT_MUTATIONS)
def test_every_fault_of_dropout_is_detected_in_generated_kernels(name: str) -> None:
    mutation = DROPOUT_MUTATIONS[name]
    assert_caught(mutation, compiled_masks(mutation.layout, mutation.inject, traced=False))
    result = compiled_masks(mutation.layout, None, traced=False)
    assert result.ok, result.diagnosis
