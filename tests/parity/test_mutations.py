"""Deliberate faults are caught, each named for what it is and for nothing else."""

import pytest

from launcher.parity.diagnose import Diagnosis
from tests.parity.mutations import DROPOUT_MUTATIONS, MUTATIONS, OPTIMIZER_MUTATIONS, Mutation
from tests.parity.running import Pass, dropout_pass, plain_sgd_pass, small_run, verify

ALL = MUTATIONS | OPTIMIZER_MUTATIONS


def assert_named(found: Pass, mutation: Mutation) -> None:
    assert not found.ok
    assert found.diagnosis is not None
    named = [other.words for other in ALL.values() if matches(other, found.diagnosis)]
    assert set(named) == {mutation.words}, found.diagnosis


def matches(mutation: Mutation, diagnosis: Diagnosis) -> bool:
    told = f"{diagnosis.shape}: {diagnosis.meaning}"
    return all(words in told for words in mutation.words)


@pytest.mark.parametrize("name", MUTATIONS)
def test_plain_sgd_shows(name: str) -> None:
    mutation = MUTATIONS[name]
    assert_named(plain_sgd_pass(small_run(*mutation.layout.split(), steps=1), mutation.inject), mutation)


@pytest.mark.parametrize("name", OPTIMIZER_MUTATIONS)
def test_only_the_own_optimizer_shows(name: str) -> None:
    mutation = OPTIMIZER_MUTATIONS[name]
    plain, own = verify(small_run(*mutation.layout.split(), steps=1), mutation=mutation.inject)
    assert plain.ok
    assert_named(own, mutation)


def test_without_a_fault_nothing_is_found() -> None:
    found = plain_sgd_pass(small_run("model=llama_tiny", "parallelism=tp2", "parallelism.data=1", steps=1))
    assert found.ok
    assert found.diagnosis is None


@pytest.mark.parametrize("name", DROPOUT_MUTATIONS)
def test_the_masks_of_dropout_show(name: str) -> None:
    mutation = DROPOUT_MUTATIONS[name]
    found = dropout_pass(small_run(*mutation.layout.split()), mutation.inject)
    assert found.diagnosis is not None
    assert all(words in found.diagnosis.shape for words in mutation.words), found.diagnosis


@pytest.mark.parametrize("layout", sorted({mutation.layout for mutation in DROPOUT_MUTATIONS.values()}))
def test_right_masks_raise_no_alarm(layout: str) -> None:
    found = dropout_pass(small_run(*layout.split()))
    assert found.ok, found.diagnosis
