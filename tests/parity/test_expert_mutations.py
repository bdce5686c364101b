"""Every deliberate fault of experts is detected, in the quantity that it makes wrong."""

import pytest

from launcher.config.schema import Dtype
from tests.parity.expert_mutations import EXPERT_MUTATIONS
from tests.parity.mutations import Mutation
from tests.parity.running import VerifyPass, passes, plain_sgd_pass, run_pass, small_run, worst
from tests.parity.test_mutations import most_slow


@pytest.mark.parametrize("name", most_slow(EXPERT_MUTATIONS))
def test_a_fault_of_experts_is_detected(name: str) -> None:
    mutation = EXPERT_MUTATIONS[name]
    run = small_run(*mutation.layout.split(), steps=3 if "bias" in name else 1)
    assert_shown(plain_sgd_pass(run, mutation.inject), mutation)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERT_MUTATIONS)
def test_a_fault_of_experts_is_detected_in_bf16(name: str) -> None:
    """By the pass that is the run itself."""
    mutation = EXPERT_MUTATIONS[name]
    run = small_run(*mutation.layout.split(), "precision=bf16", steps=3 if "bias" in name else 1)
    last = passes(run)[-1]
    assert last.run.precision.dtype is Dtype.bf16
    assert_shown(run_pass(*last, mutation.inject), mutation)


def assert_shown(result: VerifyPass, mutation: Mutation) -> None:
    assert not result.ok
    assert result.diagnosis is not None
    wrong = [difference.name for difference in result.differences if not difference.ok]
    assert any(mutation.words[0] in found for found in wrong), worst(result)
