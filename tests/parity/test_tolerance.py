"""Bounds grow with the unit roundoff and with the square root of the length of the sums."""

from math import sqrt

import numpy as np
import pytest
import torch

from launcher.config.schema import Dtype, RunConfig
from launcher.parity.tolerance import LAMBDA, UNIT_ROUNDOFF, forward_length, tolerance
from tests.config.composing import run_of


def small(**model: int) -> RunConfig:
    run = run_of("model=llama_tiny")
    for name, value in model.items():
        setattr(run.model, name, value)
    return run


def test_unit_roundoff_matches_torch() -> None:
    # The unit roundoff is half the distance from 1 to the next number.
    for dtype, torch_dtype in {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}.items():
        assert UNIT_ROUNDOFF[dtype] == torch.finfo(torch_dtype).eps / 2
    assert UNIT_ROUNDOFF[Dtype.fp16] == torch.finfo(torch.float16).eps / 2


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


def test_bounds_in_low_precision_scale_with_its_roundoff() -> None:
    fp32, bf16, fp16 = (run_of("model=llama_tiny", f"precision={name}") for name in ("fp32", "bf16", "fp16"))
    assert tolerance(bf16).gradient == 8 * tolerance(fp16).gradient
    assert tolerance(bf16).gradient > 1000 * tolerance(fp32).gradient
    # A gradient norm that is off by sqrt(2) must still show.
    shrunk = small(num_layers=2)
    shrunk.precision.dtype = Dtype.bf16
    assert tolerance(shrunk).gradient < sqrt(2) - 1
    assert tolerance(shrunk).loss < 0.05


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
