"""Context parallelism is the same run: losses, norms, gradients, weights equal those of one process.

The cases cover each method with each other axis, ZeRO stage and part that it meets.
"""

import numpy as np
import pytest
import torch

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parity import reference
from launcher.parity.verification import whole_pass
from launcher.parity.whole import whole_run
from tests.config.composing import run_of
from tests.parity.mutations import CHAT
from tests.parity.running import (
    CORES,
    dropout_pass,
    passes,
    plain_sgd_pass,
    run_pass,
    shrink,
    small_run,
    worst,
)

GPT, LLAMA, ONE = "model=gpt_tiny", "model=llama_tiny", "parallelism.data=1"
TP, PP = "parallelism.tensor=2", "parallelism.pipeline=2"
SP = f"{TP} parallelism.sequence_parallel=true"
DOCUMENTS = "data.document_attention=true"
GQA_6_2 = "model.num_heads=6 model.hidden_size=48 model.num_kv_heads=2"
GQA_8_1 = "model.num_heads=8 model.num_kv_heads=1"
RING, GATHER, ULYSSES = (f"parallelism.context_method={method}" for method in ("ring", "gather", "ulysses"))
TWO, FOUR = f"{ONE} parallelism.context=2", f"{ONE} parallelism.context=4"
TWO_OF_TWO = "parallelism.data=2 parallelism.context=2"
QUICK = [
    f"{LLAMA} {TWO} {RING} {SP} {DOCUMENTS} model.sliding_window=24",
    f"{LLAMA} {TWO} {GATHER} {PP} {GQA_6_2}",
    f"{GPT} {TWO} {ULYSSES} {TP} {DOCUMENTS}",
    f"{LLAMA} {FOUR} {ULYSSES} {GQA_8_1} parallelism.zero_stage=3",
    f"{GPT} {TWO_OF_TWO} {RING} parallelism.zero_stage=2",
    f"{LLAMA} {FOUR} {RING} {DOCUMENTS} parallelism.zero_stage=1 {GQA_6_2} "
    "parallelism.activation_checkpointing=selective",
]
MORE = [
    *(
        f"{model} {ranks} {method} {more}"
        for model, ranks, more in (
            (GPT, TWO, f"{SP} {DOCUMENTS} parallelism.activation_checkpointing=full"),
            (LLAMA, TWO, f"{PP} {DOCUMENTS} model.attention_soft_cap=1"),
            (LLAMA, TWO, f"{GQA_6_2} parallelism.zero_stage=3 finetune.lora.rank=2"),
            (GPT, FOUR, "parallelism.zero_stage=1 parallelism.offload_optimizer=true"),
            (LLAMA, TWO, f"{GQA_8_1} {DOCUMENTS} parallelism.zero_stage=2 model.query_key_norm=head"),
        )
        for method in (RING, GATHER, ULYSSES)
    ),
    f"{LLAMA} {TWO} {RING} {PP} {DOCUMENTS} parallelism.pipeline_schedule=dualpipev model.num_layers=8 "
    "training.micro_batch_size=1",
    # Two axes beside the context ranks.
    f"{LLAMA} {TWO} {RING} {SP} {PP} {DOCUMENTS}",
    f"{GPT} {TWO_OF_TWO} {ULYSSES} {TP} parallelism.zero_stage=2",
    f"{GPT} {TWO_OF_TWO} {GATHER} {PP} parallelism.zero_stage=1",
    f"{LLAMA} {TWO_OF_TWO} {RING} parallelism.zero_stage=3 parallelism.activation_checkpointing=full",
]


@pytest.mark.parametrize("layout", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_a_context_layout_computes_the_same_run(layout: str) -> None:
    result = plain_sgd_pass(small_run(*layout.split(), steps=2))
    assert result.ok, (result.diagnosis, worst(result))


@pytest.mark.slow
@pytest.mark.parametrize("method", [RING, GATHER, ULYSSES])
def test_in_bf16_and_with_the_runs_own_optimizer(method: str) -> None:
    layout = f"{LLAMA} {TWO} {PP} {method} {DOCUMENTS} precision=bf16"
    for each in passes(small_run(*layout.split(), steps=2)):
        result = run_pass(*each)
        assert result.ok, (each[0], result.diagnosis, worst(result))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        f"{LLAMA} {TWO} {RING} {CHAT}",
        f"{GPT} {TWO_OF_TWO} {ULYSSES} {DOCUMENTS} parallelism.zero_stage=1 precision=bf16",
        f"{LLAMA} {FOUR} {GATHER} parallelism.zero_stage=3 scheduler=cosine",
    ],
)
def test_the_whole_run(layout: str) -> None:
    """Files, sample order, labels, schedule, evaluation, and a checkpoint that one process restores."""
    run = run_of("hardware=cpu", *layout.split())
    small, _ = shrink(run, validate(run, World("cpu", CORES, CORES)))
    result = whole_pass(whole_run(run, small))
    assert result.ok, (result.diagnosis, worst(result))
    assert {"restored", "evaluation", "weight"} <= {difference.kind for difference in result.differences}


@pytest.mark.slow
@pytest.mark.parametrize("method", [RING, GATHER, ULYSSES])
def test_compiled_blocks(method: str) -> None:
    layout = f"{GPT} {TWO} {method} {DOCUMENTS} training.compile=true"
    compiled = [each for each in passes(small_run(*layout.split(), steps=1)) if each[1].training.compile]
    for each in compiled:
        result = run_pass(*each)
        assert result.ok, (each[0], result.diagnosis, worst(result))
    assert compiled


def masked_labels(run: RunConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of which context and data ranks have very different numbers of labels, often none."""
    batches = []
    for inputs, labels in reference.probe_batches(run):
        length, kept = labels.shape[1], labels.clone()
        kept[0, length // 4 :] = IGNORED_LABEL
        kept[1, 1:] = IGNORED_LABEL
        kept[2:, : length - 3] = IGNORED_LABEL
        batches.append((inputs, kept))
    return batches


@pytest.mark.parametrize(
    "layout",
    [
        f"{GPT} {TWO_OF_TWO} {RING}",
        pytest.param(f"{LLAMA} {TWO} {PP} {ULYSSES}", marks=pytest.mark.slow),
        pytest.param(f"{LLAMA} {FOUR} {GATHER} parallelism.zero_stage=3", marks=pytest.mark.slow),
    ],
)
def test_masks_of_unequal_density(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is divided by the labels of the global batch, wherever they are."""
    small = small_run(*layout.split(), "training.micro_batch_size=1", steps=1)
    batches = masked_labels(small)
    for module in ("launcher.parity.recording", "launcher.parity.verification"):
        monkeypatch.setattr(f"{module}.probe_batches", lambda _run: iter(batches))
    result = plain_sgd_pass(small)
    assert result.ok, (result.diagnosis, worst(result))
    assert all(np.isfinite(difference.measured) for difference in result.differences)


@pytest.mark.slow
@pytest.mark.parametrize("method", [RING, GATHER, ULYSSES])
@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_masks_of_dropout(method: str, recomputed: str) -> None:
    more = f"model.dropout=0.1 {DOCUMENTS} parallelism.activation_checkpointing={recomputed}"
    result = dropout_pass(small_run(*f"{GPT} {TWO} {method} {more}".split()))
    assert result.ok, result.diagnosis


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        f"{LLAMA} {TWO} {RING} {SP} parallelism.activation_checkpointing=full",
        f"{GPT} {TWO} {GATHER} {PP}",
        f"{LLAMA} {TWO_OF_TWO} {ULYSSES} {GQA_8_1} parallelism.zero_stage=3",
        f"{GPT} {TWO} {RING} {DOCUMENTS} training.compile=true",
        f"{GPT} {TWO} {ULYSSES} training.compile=true parallelism.activation_checkpointing=selective",
    ],
)
def test_masks_of_dropout_with_other_axes(layout: str) -> None:
    result = dropout_pass(small_run(*layout.split(), "model.dropout=0.1"))
    assert result.ok, result.diagnosis
