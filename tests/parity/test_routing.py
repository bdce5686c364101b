"""Choices of experts are followed by the reference, and compared with its scores."""

import pytest
import torch

from launcher.config.schema import ExpertsConfig
from launcher.parity.routing import Routing, biases_in, shortfall
from tests.config.composing import run_of

NAME = "blocks.0.mlp.router"
SCORES = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]])


def routing(**experts: float) -> Routing:
    model = run_of("model=moe_tiny").model
    model.experts = ExpertsConfig(count=4, top_k=2, ffn_hidden_size=8, **experts)  # type: ignore[arg-type]
    return Routing(model)


def test_without_choices_of_a_layout_the_best_experts_are_chosen() -> None:
    chosen = routing().choose(NAME, SCORES)
    assert chosen.tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]]]


def test_choices_are_followed_by_micro_batch() -> None:
    followed = torch.tensor([[[0, 1], [3, 2]], [[0, 2], [1, 3]]])
    router = routing()
    router.begin_step({NAME: followed})
    router.begin_micro_batch(1)
    assert router.choose(NAME, SCORES).tolist() == [[[1, 0, 1, 0], [0, 1, 0, 1]]]
    assert torch.equal(router.scores()[NAME], SCORES)
    router.begin_step({NAME: followed[:, :1]})  # a layout that lost tokens: the comparison shows it
    router.begin_micro_batch(0)
    assert router.choose(NAME, SCORES).tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]]]


def test_biases_follow_the_uses_of_a_step_and_change_the_choice() -> None:
    router = routing(bias_balancing=0.25)
    router.begin_step({})
    router.choose(NAME, SCORES[:, :1])
    assert router.balance()[f"{NAME}.bias"].tolist() == [-0.25, -0.25, 0.25, 0.25]
    assert biases_in(router.balance() | {"embedding.exp_avg": SCORES}).keys() == {NAME}
    router.begin_step({})
    assert router.choose(NAME, SCORES[:, :1]).tolist() == [[[0, 0, 1, 1]]]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([[0, 1], [3, 2]], 0.0),
        ([[1, 0], [2, 3]], 0.0),
        ([[0, 2], [3, 2]], 0.1),
        ([[0, 1], [0, 1]], 0.3),
        ([[0, 0], [3, 2]], torch.inf),
        ([[0, 1]], torch.inf),
    ],
)
def test_the_shortfall_is_the_distance_to_the_best_expert_left_out(
    chosen: list[list[int]], expected: float
) -> None:
    assert shortfall(SCORES, torch.tensor([chosen])) == pytest.approx(expected)


def test_a_token_that_runs_through_all_experts_has_no_shortfall() -> None:
    assert shortfall(SCORES, torch.arange(4).expand(1, 2, 4)) == 0.0
