"""Patterns of differences are recognised, and the earliest cause gives the diagnosis."""

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
    rough_ratio,
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
def test_a_ratio_is_named_after_every_axis_that_explains_it(
    ratio: float, words: str, axes: list[str]
) -> None:
    assert named_ratio(ratio, LAYOUT) == (f"the reference times {words}", axes)


def test_a_constant_ratio_is_distinguished_from_noise() -> None:
    right, other = matrix(), matrix(5)
    assert best_ratio(3 * right, right) == pytest.approx((3.0, 0.0), abs=1e-6)
    assert common_ratio([(3 * right, right), (3 * other, other)]) == pytest.approx(3.0)
    assert common_ratio([(3 * right, right), (2 * other, other)]) is None
    assert common_ratio([(right.flip(0), right)]) is None


def test_a_ratio_is_found_below_noise() -> None:
    right, noise = matrix(), matrix(7)[:, :6].repeat(2, 1)[:8]
    pairs = [(0.5 * right + 0.1 * noise, right), (0.5 * right - 0.1 * noise, right)]
    assert common_ratio(pairs) is None
    assert rough_ratio(pairs) == pytest.approx(0.5, abs=0.01)
    assert rough_ratio([(noise, right)]) is None


def test_moved_rows_are_listed() -> None:
    right = matrix()
    assert moved_rows(right, right) == []
    assert moved_rows(right[[0, 1, 3, 2, 4, 5, 6, 7]], right) == [2, 3]
    assert moved_rows(right + 1e-6, right) is None


def test_the_wrong_shard_is_listed() -> None:
    right, got = matrix(), matrix()
    got[2] += 1
    assert wrong_shards(got, right, 4) == [1]


def test_excess_of_padding_is_the_loss_increase_of_a_longer_softmax() -> None:
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


CAUSES_IN_ORDER: list[tuple[DifferenceKind, str, str]] = [
    ("output", "embedding", "output of embedding"),
    ("batch_loss", "data rank 1, micro-batch 0", "belong to other ranks or micro-batches"),
    ("loss", "loss", "reported loss"),
    ("data_replica", "embedding.weight", "between data ranks"),
    ("norm_replica", "grad_norm", "different gradient norms"),
    ("tied_copy", "embedding.weight", "copies of this tied weight"),
    ("replica", "final_norm.weight", "between tensor ranks"),
    ("gradient", "embedding.weight", "gradients of embedding"),
    ("grad_norm", "grad_norm", "the reported norm"),
    ("weight", "embedding.weight", "update or state computed from them"),
]


@pytest.mark.parametrize("place", range(len(CAUSES_IN_ORDER)))
def test_the_earliest_cause_gives_the_diagnosis(place: int) -> None:
    kind, name, words = CAUSES_IN_ORDER[place]
    effects = [(kind, name) for kind, name, _ in reversed(CAUSES_IN_ORDER[place + 1 :])]
    assert words in diagnosed(step_with(loss=4.0, grad_norm=1.2), *effects, (kind, name)).shape


def test_only_the_first_failed_step_is_diagnosed() -> None:
    failed: list[Difference] = [
        Difference(1, "grad_norm", "grad_norm", 1.0, 0.1),
        Difference(2, "output", "embedding", 1.0, 0.1),
    ]
    steps = [StepTrace(), step_with(grad_norm=2.0), step_with()]
    diagnosis = diagnose(run_of(), LAYOUT, failed, steps, [StepTrace(), step_with(), step_with()])
    assert (
        "reported norm is the reference times sqrt(tensor size) (2.000) or data size (2)" in diagnosis.shape
    )


def test_some_gradients_wrong_by_a_constant_ratio() -> None:
    step = step_with()
    step.gradients["final_norm.weight"] = matrix() / 4
    diagnosis = diagnosed(step, ("gradient", "final_norm.weight"))
    assert (
        "final_norm.weight are the reference times 1 / tensor size (1/4); all other gradients are right"
        in diagnosis.shape
    )


def test_a_gradient_wrong_in_one_shard() -> None:
    step = step_with()
    step.gradients["embedding.weight"][6:] += 1
    assert "only in the shard of tensor rank 3" in diagnosed(step, ("gradient", "embedding.weight")).shape


def test_the_layer_where_the_backward_pass_goes_wrong() -> None:
    step = step_with()
    names = ("embedding.weight", "blocks.0.attention.output.weight")
    for name in names:
        step.gradients[name] = matrix().flip(0)
    diagnosis = diagnosed(step, *[("gradient", name) for name in names])
    assert "final_norm.weight, computed earlier, are right" in diagnosis.shape
    assert "goes wrong at blocks.0.attention.output.weight" in diagnosis.meaning


def test_samples_assigned_to_other_ranks() -> None:
    step = step_with(batch_losses=[[4.9, 4.8, 4.7], [5.0, 5.1, 5.2]])
    names = [("batch_loss", f"data rank {rank}, micro-batch {i}") for rank in range(2) for i in range(3)]
    assert "another order" in diagnosed(step, *names).meaning  # type: ignore[arg-type]


def test_gradients_that_were_not_compared_are_not_called_right() -> None:
    """SGD without a momentum leaves no trace of them but the update."""
    names: list[tuple[DifferenceKind, str]] = [("weight", "embedding.weight"), ("grad_norm", "grad_norm")]
    for name in names:
        shown, hidden = (
            diagnosed(step_with(grad_norm=1.2, **more), name) for more in ({}, {"gradients": {}})
        )
        assert "gradient is right" in shown.shape or "gradients are right" in shown.shape
        assert "gradient is right" not in hidden.shape
        assert "gradients are right" not in hidden.shape


def test_an_error_that_all_losses_share() -> None:
    """In bf16 the mean has a tighter bound than each loss, so it may fail alone."""
    losses = [[5.001, 5.101, 5.201], [4.901, 4.801, 4.701]]
    step = step_with(loss=sum(map(sum, losses)) / 6, batch_losses=losses)
    assert "each loss is within its bound" in diagnosed(step, ("loss", "loss")).shape


def test_a_missing_parameter() -> None:
    assert "lost" in diagnosed(step_with(), ("weight", "another.weight"), number=0).meaning
