"""Every deliberate fault is detected, and its diagnosis fits this fault only."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine import direct_update
from launcher.parity.diagnose import Diagnosis
from launcher.parity.shrink import inner_stages, long_samples
from launcher.parity.verification import more_passes, whole_pass
from launcher.parity.whole import whole_run
from tests.config.composing import run_of
from tests.parity.in_bf16 import result_in_bf16
from tests.parity.mutations import (
    BY_PASS,
    CHAT,
    DP,
    DROPOUT_MUTATIONS,
    GPT,
    INNER_MUTATIONS,
    LLAMA,
    LONG_MUTATIONS,
    MUTATIONS,
    OPTIMIZER_MUTATIONS,
    PERTURBED_MUTATIONS,
    PP,
    STATES_MUTATIONS,
    TP,
    WHOLE_MUTATIONS,
    Mutation,
    not_clipped,
)
from tests.parity.running import (
    VerifyPass,
    dropout_pass,
    passes,
    plain_sgd_pass,
    run_pass,
    shrink,
    small_run,
    verify,
    worst,
)

ALL = MUTATIONS | OPTIMIZER_MUTATIONS
OF_OTHER_RUNS = INNER_MUTATIONS | LONG_MUTATIONS


def most_slow(names: Iterable[str]) -> list[Any]:
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (index % 3 > 0)) for index, name in enumerate(names)
    ]


def assert_diagnosed(result: VerifyPass, mutation: Mutation) -> None:
    assert not result.ok
    assert result.diagnosis is not None
    fitting = [other.words for other in ALL.values() if matches(other, result.diagnosis)]
    assert set(fitting) == {mutation.words}, result.diagnosis


def matches(mutation: Mutation, diagnosis: Diagnosis) -> bool:
    text = f"{diagnosis.shape}: {diagnosis.meaning}"
    return all(words in text for words in mutation.words)


@pytest.mark.parametrize("name", most_slow(MUTATIONS))
def test_a_fault_is_detected_under_plain_sgd(name: str) -> None:
    mutation = MUTATIONS[name]
    assert_diagnosed(plain_sgd_pass(small_run(*mutation.layout.split(), steps=1), mutation.inject), mutation)


@pytest.mark.parametrize("name", PERTURBED_MUTATIONS)
def test_a_fault_is_detected_because_vectors_are_perturbed(name: str) -> None:
    mutation = PERTURBED_MUTATIONS[name]
    result = plain_sgd_pass(small_run(*mutation.layout.split(), steps=1), mutation.inject)
    assert result.diagnosis is not None
    assert matches(mutation, result.diagnosis), result.diagnosis


@pytest.mark.parametrize("name", OF_OTHER_RUNS)
def test_a_fault_is_detected_with_inner_stages_or_long_samples_only(name: str) -> None:
    mutation = OF_OTHER_RUNS[name]
    run = run_of("hardware=cpu", "verify.steps=1", *mutation.layout.split())
    layout = validate(run, World("cpu", 32, 32))
    small, _ = shrink(run, layout)
    assert plain_sgd_pass(small, mutation.inject).ok
    more = inner_stages(run, layout, small) if name in INNER_MUTATIONS else long_samples(run, layout, small)
    assert more is not None
    result = plain_sgd_pass(more, mutation.inject)
    assert result.diagnosis is not None
    assert matches(mutation, result.diagnosis), result.diagnosis
    if name in LONG_MUTATIONS:
        right = plain_sgd_pass(more)
        assert right.ok, worst(right)


def whole(*overrides: str, mutation: Mutation | None = None) -> VerifyPass:
    run = run_of("hardware=cpu", *overrides)
    small, _ = shrink(run, validate(run, World("cpu", 8, 8)))
    return whole_pass(whole_run(run, small), mutation and mutation.inject)


@pytest.mark.parametrize("name", most_slow(WHOLE_MUTATIONS))
def test_a_fault_of_the_whole_run_is_detected(name: str) -> None:
    mutation = WHOLE_MUTATIONS[name]
    result = whole(*mutation.layout.split(), mutation=mutation)
    assert result.diagnosis is not None
    assert matches(mutation, result.diagnosis), (result.diagnosis, worst(result))


WHOLE_RUNS = [
    f"{GPT} {PP} scheduler=wsd scheduler.decay_steps=10 data.document_attention=true precision=bf16",
    f"{LLAMA} parallelism=zero3 parallelism.data=2 optimizer=sgd scheduler=cosine",
    f"{GPT} {TP} precision=bf16_states",
    f"{LLAMA} parallelism=zero1 parallelism.data=2 finetune.lora.rank=4 parallelism.offload_optimizer=true",
    f"{LLAMA} {TP} {CHAT}",
    f"{GPT} parallelism=zero2 parallelism.data=2 precision=bf16 {CHAT} data.document_attention=false",
    f"model=vit_tiny data=digits {DP}",
    f"model=vit_b16 data=image_folder data.train=images {PP} precision=bf16",
    "model=moe_tiny parallelism.data=2 parallelism.expert=2 precision=bf16 model.experts.bias_balancing=0.01",
]


@pytest.mark.parametrize("run", most_slow(WHOLE_RUNS))
def test_the_whole_run_agrees_with_the_reference(run: str) -> None:
    result = whole(*run.split())
    assert result.ok, (result.diagnosis, worst(result))
    assert {"restored", "evaluation", "weight"} <= {d.kind for d in result.differences}


@pytest.mark.slow
@pytest.mark.parametrize(("title", "name"), [(title, name) for title in BY_PASS for name in BY_PASS[title]])
def test_a_fault_is_detected_in_the_own_precision_of_a_run_in_bf16(title: str, name: str) -> None:
    """By a pass in bf16; the fp32 passes before it would catch the fault as well."""
    mutation = BY_PASS[title][name]
    result = result_in_bf16(title, mutation)
    assert not result.ok
    assert result.diagnosis is not None
    text = f"{result.diagnosis.shape}: {result.diagnosis.meaning}"
    assert all(words in text for words in mutation.in_bf16 or mutation.words), text


# One gradient per step: engine/direct_update.py.
ONE_GRADIENT = f"{GPT} {TP} precision=bf16 training.micro_batch_size=4 training.global_batch_size=4"


def nothing_updated() -> None:
    direct_update.DirectUpdate._update_group = lambda *_: None  # type: ignore[method-assign]


def weights_not_cast() -> None:
    """The master weights are updated, and the weights in bf16 stay."""
    right = direct_update.DirectUpdate._update_group

    def update(self: direct_update.DirectUpdate, group: Any, index: int) -> None:
        before = self._zero.bf16_groups_flat[index].clone()
        right(self, group, index)
        self._zero.bf16_groups_flat[index].copy_(before)

    direct_update.DirectUpdate._update_group = update  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "inject",
    [
        None,
        pytest.param(not_clipped, marks=pytest.mark.slow),
        pytest.param(nothing_updated, marks=pytest.mark.slow),
        pytest.param(weights_not_cast, marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_an_update_without_sums_is_detected(inject: Callable[[], None] | None) -> None:
    small = small_run(*ONE_GRADIENT.split())
    assert validate(small, World("cpu", 2, 2)).accumulation == 1
    result = run_pass(*passes(small)[-1], inject)
    assert result.ok == (inject is None), worst(result)


@pytest.mark.parametrize("name", OPTIMIZER_MUTATIONS)
def test_a_fault_is_detected_under_the_configured_optimizer_only(name: str) -> None:
    mutation = OPTIMIZER_MUTATIONS[name]
    plain, configured = verify(small_run(*mutation.layout.split(), steps=1), mutation=mutation.inject)
    assert plain.ok
    assert_diagnosed(configured, mutation)


@pytest.mark.parametrize("name", STATES_MUTATIONS)
def test_a_fault_is_detected_with_bf16_states_only(name: str) -> None:
    mutation = STATES_MUTATIONS[name]
    run = small_run(*mutation.layout.split(), steps=1)
    names = [title for title, _, _ in passes(run)]
    assert names == ["plain SGD, fp32", "adamw, fp32", "plain SGD, bf16 states", "adamw, bf16 states"]
    right, wrong = (run_pass(*passes(run)[2], fault) for fault in (None, mutation.inject))
    assert right.ok, worst(right)
    assert wrong.diagnosis is not None
    assert matches(mutation, wrong.diagnosis), wrong.diagnosis


@pytest.mark.parametrize(
    ("words", "titles"),
    [
        ("", ["plain SGD, fp32"]),
        ("precision=bf16", ["plain SGD, fp32", "adamw, bf16"]),
        ("precision=bf16_states", ["plain SGD, fp32", "plain SGD, bf16 states"]),
        ("precision=bf16 optimizer=sgd optimizer.momentum=0", ["plain SGD, fp32", "plain SGD, bf16"]),
    ],
)
def test_inner_stages_and_long_samples_run_in_the_precision_of_the_run_too(
    words: str, titles: list[str]
) -> None:
    small = small_run(*f"{LLAMA} {DP} {words}".split())
    ends = ("inner stages", "128 positions")
    long = replace(small, model=replace(small.model, max_sequence_length=128))
    assert [plan.title for plan in more_passes(small, long)] == [
        f"{t}, {end}" for end in ends for t in titles
    ]


def test_without_a_fault_the_pass_succeeds() -> None:
    result = plain_sgd_pass(small_run("model=llama_tiny", "parallelism=tp2", "parallelism.data=1", steps=1))
    assert result.ok
    assert result.diagnosis is None


@pytest.mark.parametrize("name", DROPOUT_MUTATIONS)
def test_a_fault_of_dropout_is_detected(name: str) -> None:
    mutation = DROPOUT_MUTATIONS[name]
    result = dropout_pass(small_run(*mutation.layout.split()), mutation.inject)
    assert result.diagnosis is not None
    assert all(words in result.diagnosis.shape for words in mutation.words), result.diagnosis


@pytest.mark.parametrize("layout", sorted({mutation.layout for mutation in DROPOUT_MUTATIONS.values()}))
def test_correct_masks_pass(layout: str) -> None:
    result = dropout_pass(small_run(*layout.split()))
    assert result.ok, result.diagnosis
