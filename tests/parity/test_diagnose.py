"""The shapes of differences, and which of two explanations speaks."""

from math import sqrt

import pytest
import torch

from launcher.config.layout import Layout
from launcher.parity.diagnose import Diagnosis, diagnose
from launcher.parity.differences import Difference, DifferenceKind
from launcher.parity.patterns import (
    best_ratio,
    common_ratio,
    excess_of_padding,
    moved_rows,
    named_ratio,
    wrong_shards,
)
from launcher.parity.step_trace import StepTrace
from tests.config.composing import run_of

LAYOUT = Layout(pipeline=1, data=2, tensor=4, device="cpu", accumulation=3, zero_stage=0)


def matrix(rows: int = 8, columns: int = 6) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    ("ratio", "words", "axes"),
    [
        (4.0, "tensor size (4)", ["tensor"]),
        (1 / 3, "1 / accumulation size (1/3)", ["accumulation"]),
        (1.01 * sqrt(3), "sqrt(accumulation size) (1.732)", ["accumulation"]),
        (2.0, "sqrt(tensor size) (2.000) or data size (2)", ["tensor", "data"]),
        (1.2, "1.2000", []),
    ],
)
def test_a_ratio_is_named_after_every_axis_that_it_can_be_of(
    ratio: float, words: str, axes: list[str]
) -> None:
    assert named_ratio(ratio, LAYOUT) == (f"the right one times {words}", axes)


def test_a_constant_ratio_is_told_from_noise() -> None:
    right, other = matrix(), matrix(5)
    assert best_ratio(3 * right, right) == pytest.approx((3.0, 0.0), abs=1e-6)
    assert common_ratio([(3 * right, right), (3 * other, other)]) == pytest.approx(3.0)
    assert common_ratio([(3 * right, right), (2 * other, other)]) is None
    assert common_ratio([(right.flip(0), right)]) is None


def test_moved_rows() -> None:
    right = matrix()
    assert moved_rows(right, right) == []
    assert moved_rows(right[[0, 1, 3, 2, 4, 5, 6, 7]], right) == [2, 3]
    assert moved_rows(right + 1e-6, right) is None


def test_wrong_shards() -> None:
    right, got = matrix(), matrix()
    got[2] += 1
    assert wrong_shards(got, right, 4) == [1]


def test_excess_of_padding_is_what_a_longer_softmax_costs() -> None:
    logits = matrix()
    longer = torch.cat([logits, torch.zeros(8, 2)], dim=-1)
    labels = torch.zeros(8, dtype=torch.long)
    cost = torch.nn.functional.cross_entropy
    expected = float(cost(longer, labels) - cost(logits, labels))
    assert excess_of_padding(logits, 2) == pytest.approx(expected, rel=1e-5)


def step_with(**changed: object) -> StepTrace:
    step = StepTrace(loss=5.0, grad_norm=1.0, batch_losses=[[5.0, 5.1, 5.2], [4.9, 4.8, 4.7]])
    for name in ("embedding", "blocks.0.attention.output", "final_norm"):
        step.weights[f"{name}.weight"] = matrix()
        step.gradients[f"{name}.weight"] = matrix()
        step.outputs[name] = matrix(4, 12).view(2, 4, 6)
    vars(step).update(changed)
    return step


def diagnosed(step: StepTrace, *failed: tuple[DifferenceKind, str], number: int = 1) -> Diagnosis:
    right = step_with(batch_losses=[[5.0, 4.9, 5.1, 4.8, 5.2, 4.7]])
    run = run_of("training.micro_batch_size=1", "training.global_batch_size=6")
    differences = [Difference(number, kind, name, 1.0, 0.1) for kind, name in failed]
    start = [StepTrace() for _ in range(number)]
    return diagnose(run, LAYOUT, differences, [*start, step], [*start, right])


IN_CAUSAL_ORDER: list[tuple[DifferenceKind, str, str]] = [
    ("output", "embedding", "output of embedding"),
    ("batch_loss", "data rank 1, micro-batch 0", "of other ranks or micro-batches"),
    ("loss", "loss", "reported loss"),
    ("data_replica", "embedding.weight", "between data ranks"),
    ("norm_replica", "grad_norm", "different gradient norms"),
    ("tied_copy", "embedding.weight", "copies of this tied weight"),
    ("replica", "final_norm.weight", "between tensor ranks"),
    ("gradient", "embedding.weight", "gradients of embedding"),
    ("grad_norm", "grad_norm", "the reported norm"),
    ("weight", "embedding.weight", "what the optimizer made"),
]


@pytest.mark.parametrize("place", range(len(IN_CAUSAL_ORDER)))
def test_a_cause_speaks_before_its_effects(place: int) -> None:
    kind, name, words = IN_CAUSAL_ORDER[place]
    effects = [(kind, name) for kind, name, _ in reversed(IN_CAUSAL_ORDER[place + 1 :])]
    assert words in diagnosed(step_with(loss=4.0, grad_norm=1.2), *effects, (kind, name)).shape


def test_only_the_first_step_that_fails_is_read() -> None:
    failed: list[Difference] = [
        Difference(1, "grad_norm", "grad_norm", 1.0, 0.1),
        Difference(2, "output", "embedding", 1.0, 0.1),
    ]
    steps = [StepTrace(), step_with(grad_norm=2.0), step_with()]
    found = diagnose(run_of(), LAYOUT, failed, steps, [StepTrace(), step_with(), step_with()])
    assert "reported norm is the right one times sqrt(tensor size) (2.000) or data size (2)" in found.shape


def test_some_gradients_in_a_constant_ratio() -> None:
    step = step_with()
    step.gradients["final_norm.weight"] = matrix() / 4
    found = diagnosed(step, ("gradient", "final_norm.weight"))
    assert (
        "final_norm.weight are the right one times 1 / tensor size (1/4), the others are right" in found.shape
    )


def test_a_gradient_wrong_in_one_shard() -> None:
    step = step_with()
    step.gradients["embedding.weight"][6:] += 1
    assert "only in the part of tensor rank 3" in diagnosed(step, ("gradient", "embedding.weight")).shape


def test_the_place_where_the_backward_pass_goes_wrong() -> None:
    step = step_with()
    names = ("embedding.weight", "blocks.0.attention.output.weight")
    for name in names:
        step.gradients[name] = matrix().flip(0)
    found = diagnosed(step, *[("gradient", name) for name in names])
    assert "final_norm.weight, computed before, are right" in found.shape
    assert "goes wrong at blocks.0.attention.output.weight" in found.meaning


def test_samples_of_other_ranks() -> None:
    step = step_with(batch_losses=[[4.9, 4.8, 4.7], [5.0, 5.1, 5.2]])
    names = [("batch_loss", f"data rank {rank}, micro-batch {i}") for rank in range(2) for i in range(3)]
    assert "another order" in diagnosed(step, *names).meaning  # type: ignore[arg-type]


def test_a_parameter_that_is_not_there() -> None:
    assert "lost" in diagnosed(step_with(), ("weight", "another.weight"), number=0).meaning
