"""Every deliberate fault of experts is detected, in the quantity that it makes wrong."""

import pytest

from tests.parity.expert_mutations import EXPERT_MUTATIONS
from tests.parity.running import plain_sgd_pass, small_run, worst
from tests.parity.test_mutations import every_other_slow


@pytest.mark.parametrize("name", every_other_slow(EXPERT_MUTATIONS))
def test_a_fault_of_experts_is_detected(name: str) -> None:
    mutation = EXPERT_MUTATIONS[name]
    run = small_run(*mutation.layout.split(), steps=1)
    result = plain_sgd_pass(run, mutation.inject)
    assert not result.ok
    assert result.diagnosis is not None
    wrong = [difference.name for difference in result.differences if not difference.ok]
    assert any(mutation.words[0] in found for found in wrong), worst(result)
