"""Bounds grow with the unit roundoff and with the square root of the length of the sums."""

from dataclasses import replace
from math import isnan, nan, sqrt
from statistics import median

import numpy as np
import pytest
import torch

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.parity.outputs import spread_of
from launcher.parity.reference import initial_weights, probe_batches, reference_trace
from launcher.parity.rounding import BF16, EXACT, Arithmetic, equivalent
from launcher.parity.step_trace import StepTrace
from launcher.parity.tolerance import (
    LAMBDA,
    LEAST,
    SMALL,
    SPREAD,
    ULP,
    UNIT_ROUNDOFF,
    forward_length,
    loss_distance,
    measured_tolerance,
    norm_distance,
    tolerance,
)
from tests.config.composing import run_of
from tests.parity.running import small_run as shrunk


def small(**model: int) -> RunConfig:
    run = run_of("model=llama_tiny")
    for name, value in model.items():
        setattr(run.model, name, value)
    return run


def layout_of(tensor: int) -> Layout:
    return Layout(pipeline=1, data=1, tensor=tensor, device="cpu", accumulation=3, zero_stage=1)


def test_unit_roundoff_matches_torch() -> None:
    # The unit roundoff is half the distance from 1 to the next number.
    assert torch.finfo(torch.float32).eps / 2 == UNIT_ROUNDOFF


def test_forward_length_sums_all_reductions_of_a_forward_pass() -> None:
    run = small(hidden_size=32, num_heads=4, ffn_hidden_size=38, num_layers=2, vocab_size=256)
    run.model.max_sequence_length = 16
    attention = 32 + 32 + 8 + 16 + 32  # norm, projection, score, mix, output
    mlp = 32 + 38 + 32  # norm, down, up
    assert forward_length(run) == 2 * (attention + mlp) + 32 + 32 + 256


@pytest.mark.parametrize("field", ["hidden_size", "num_layers", "ffn_hidden_size", "vocab_size"])
def test_bounds_grow_with_every_dimension_but_sublinearly(field: str) -> None:
    run = small()
    before = tolerance(run)
    setattr(run.model, field, 4 * getattr(run.model, field))
    after = tolerance(run)
    assert before.loss < after.loss <= 2 * before.loss
    assert before.gradient < after.gradient <= 2 * before.gradient


def test_the_gradient_bound_includes_the_sum_over_tokens() -> None:
    run = small()
    run.training.global_batch_size = 10**6
    tokens = 10**6 * run.model.max_sequence_length
    assert tolerance(run).gradient == pytest.approx(2 * LAMBDA * 2**-24 * sqrt(tokens), rel=0.01)
    assert tolerance(run).loss == tolerance(small()).loss


LABELS = 32  # of a micro-batch


def steps_of(*arithmetic: Arithmetic) -> tuple[RunConfig, list[StepTrace]]:
    """Return one step of a small run in bf16 in each arithmetic."""
    run = shrunk("model=llama_tiny", "parallelism=tp2", "precision=bf16", steps=1)
    batches, weights = list(probe_batches(run)), initial_weights(run)
    return run, [reference_trace(run, weights, batches, arithmetic=a)[1] for a in arithmetic]


def test_bounds_in_bf16_are_a_multiple_of_the_measured_distance_and_eight_times_tighter() -> None:
    run, (right, *others) = steps_of(BF16, *equivalent(BF16, layout_of(2)))
    allowed = measured_tolerance(right, others, LABELS)
    # Before, against a reference in fp32: k 6 u sqrt(n) after step k, with u = 2^-8 and n tensors written.
    old = 6 * 2**-8 * sqrt(11 * run.model.num_layers + 4)
    assert max(allowed.outputs.values()) < 2 * old / 8
    assert median(allowed.outputs.values()) < old / 8
    assert max(allowed.gradients.values()) < 2.2 * sqrt(3) * old / 8
    assert median(allowed.gradients.values()) < sqrt(3) * old / 8
    assert allowed.norm < sqrt(3) * old / 8
    assert allowed.loss < old / 4 / 8
    for name, tensor in right.gradients.items():
        distance = max(float((o.gradients[name] - tensor).norm() / tensor.norm()) for o in others)
        factor = SPREAD * (1 + SMALL / sqrt(tensor.numel()))
        assert allowed.gradients[name] == pytest.approx(factor * distance, rel=1e-5)


def test_the_loss_of_a_step_has_a_tighter_bound_than_each_loss() -> None:
    """The errors of micro-batches cancel in their mean, except for an error that all of them share."""
    _, (right, other) = steps_of(BF16, equivalent(BF16, layout_of(2))[0])
    allowed = measured_tolerance(right, [other], LABELS)
    samples = len(right.batch_losses[0])
    assert allowed.of_step_loss() < 1.5 * allowed.loss / sqrt(samples)
    assert tolerance(small()).of_step_loss() == tolerance(small()).loss
    shifted = replace(other, batch_losses=[[1.001 * loss for loss in right.batch_losses[0]]])
    assert measured_tolerance(right, [shifted], LABELS).of_step_loss() == pytest.approx(0.004, rel=0.01)


def test_a_state_has_at_least_the_bound_of_its_gradient() -> None:
    """Found by `python -m tests.fuzz --clean`: the squares of ten numbers were close by chance."""
    _, (right, other) = steps_of(BF16, equivalent(BF16, layout_of(2))[0])
    lucky = replace(other, states=right.states)
    allowed = measured_tolerance(right, [lucky], LABELS)
    for name, bound in allowed.gradients.items():
        assert allowed.of_state(f"{name}.exp_avg") == bound
        assert allowed.of_state(f"{name}.exp_avg_sq") == 2 * bound


def test_the_norm_has_a_wider_bound_where_errors_point_along_the_gradient() -> None:
    """Found by `python -m tests.fuzz --clean`: of two images they do, and the bound was half as wide."""
    _, (right, *others) = steps_of(BF16, *equivalent(BF16, layout_of(2)))
    across = measured_tolerance(right, others, LABELS).norm
    longer = replace(right, grad_norm=1.01 * right.grad_norm, gradients=dict(others[0].gradients))
    assert norm_distance([right], [[longer], [right]]) == pytest.approx(0.01 / sqrt(2))
    along = measured_tolerance(right, [*others, longer], LABELS).norm
    assert 1.4 * across < along <= 1.51 * across


def test_the_bounds_are_not_zero_where_all_orders_agree() -> None:
    _, (right, other) = steps_of(BF16, BF16)
    allowed = measured_tolerance(right, [other], LABELS)
    for name, bound in allowed.gradients.items():
        assert bound == max(LEAST, ULP / sqrt(right.gradients[name].numel())), name
    assert min(allowed.loss, allowed.norm) > 0


def test_the_loss_of_a_single_sample_has_the_bound_of_all_steps() -> None:
    """Found by `python -m tests.fuzz --clean`: in one step of three, all orders agreed by chance."""
    _, (right, other) = steps_of(BF16, equivalent(BF16, layout_of(2))[0])
    lucky = replace(other, batch_losses=right.batch_losses)
    assert measured_tolerance(right, [lucky], LABELS).loss == 2.0**-8 / LABELS
    of_steps = loss_distance([right, right], [[other, lucky]])
    assert of_steps == pytest.approx(loss_distance([right], [[other]]) / sqrt(2))
    assert measured_tolerance(right, [lucky], 1e9, of_losses=of_steps).loss == pytest.approx(8 * of_steps)


def test_one_of_a_few_elements_may_be_rounded_the_other_way() -> None:
    """Found by `python -m tests.fuzz --clean`: the gradient of a bias of ten classes."""
    _, (right,) = steps_of(BF16)
    few = torch.ones(10)
    step = replace(right, gradients={"head.bias": few}, grad_norm=float(few.norm()))
    bound = measured_tolerance(step, [step], LABELS).gradients["head.bias"]
    flipped = few.clone()
    flipped[3] = torch.nextafter(few.bfloat16(), torch.tensor(2.0).bfloat16())[3].float()
    assert float((flipped - few).norm() / few.norm()) <= bound < 2 * 2.0**-7


def test_a_sample_without_labels_that_count_leaves_a_bound() -> None:
    """Found by `python -m tests.fuzz --clean`: the bound was NaN, which no loss keeps."""
    _, (right, other) = steps_of(BF16, equivalent(BF16, layout_of(2))[0])
    usual = measured_tolerance(right, [other], LABELS).loss
    right.batch_losses, other.batch_losses = ([[0.0, *step.batch_losses[0]]] for step in (right, other))
    assert measured_tolerance(right, [other], LABELS).loss == usual


def test_more_orders_of_summation_are_rarely_beyond_the_bounds() -> None:
    orders = [replace(BF16, parts=parts, fused=fused) for parts in (4, 5, 6, 7, 8) for fused in (True, False)]
    _, (right, *others) = steps_of(BF16, *equivalent(BF16, layout_of(2)), *orders)
    allowed = measured_tolerance(right, others[:2], LABELS)
    for other in others[2:]:
        for name, tensor in right.gradients.items():
            distance = float((other.gradients[name] - tensor).norm() / tensor.norm())
            assert distance < allowed.gradients[name], name
        for name, tensor in right.outputs.items():
            distance = float((other.outputs[name] - tensor).norm() / tensor.norm())
            assert distance < allowed.outputs[name], name


def test_compiled_blocks_may_round_less() -> None:
    eager, compiled = equivalent(BF16, layout_of(1)), equivalent(BF16, replace(layout_of(1), compiled=True))
    assert EXACT not in eager
    assert EXACT in compiled


def test_two_summation_orders_differ_by_1_to_100_percent_of_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    u, worst = 2.0**-24, 0.0
    for length in (100, 10_000):
        for _ in range(20):
            numbers = torch.rand(length, generator=generator).numpy()
            # Sequential sums in fp32; torch sums pairwise, with smaller errors.
            forward, backward = (float(np.cumsum(order)[-1]) for order in (numbers, numbers[::-1]))
            size = float(numbers.sum(dtype=np.float64))
            worst = max(worst, abs(forward - backward) / size / (2 * LAMBDA * u * sqrt(length)))
    assert 0.01 < worst < 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_of_any_replica_is_a_spread(place: int) -> None:
    """Python's max passes over a NaN that is not the first value."""
    own = torch.ones(2)
    pieces = [own, own + 1, own]
    assert spread_of(pieces, own) == 1.0
    pieces[place] = torch.tensor([1.0, nan])
    assert isnan(spread_of(pieces, own))
