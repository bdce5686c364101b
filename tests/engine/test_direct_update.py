"""Weights updated from their only bf16 gradient are those that BF16_Optimizer's fp32 sums would give."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.direct_update import compiled_update, pieces_of, update_
from launcher.engine.stochastic import adamw_arithmetic, sgd_arithmetic
from launcher.parallel.buckets import updates_directly
from tests.config.composing import run_of
from tests.distributed import run_fresh

SMALL = [
    "hardware=cpu", "model=gpt_tiny", "model.hidden_size=64", "model.ffn_hidden_size=128", "precision=bf16",
    "model.num_layers=2", "training.micro_batch_size=2", "training.global_batch_size=2",
]  # fmt: skip
MOMENTUM = ["optimizer=sgd", "optimizer.momentum=0.9"]
CLIPPED = "optimizer.gradient_clipping=0.01"  # each norm is larger


class Outcome(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    states: dict[str, torch.Tensor]
    sums: int  # elements of the fp32 sums
    kept: int  # gradients that are left after the steps


def steps(
    rank: int, world: int, init_method: str, run: RunConfig, directly: bool, bad_step: int | None = None
) -> Outcome:
    """Take three steps.

    With `bad_step` the first weight has a NaN gradient in that step, and the last weight never a gradient.
    """
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed("cpu")
    from launcher.engine import base
    from launcher.engine.build import build_engine

    if not directly:  # in this process only: the update of BF16_Optimizer, to compare with
        base.has_one_gradient = lambda layout: False  # type: ignore[attr-defined]
    layout = validate(run, World("cpu", world, world))
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    random, losses, norms = np.random.default_rng(0), [], []
    weights = list(engine.parameters())
    weights[0].register_hook(lambda gradient: gradient * torch.nan if len(losses) == bad_step else None)
    if bad_step is not None:
        weights[-1].requires_grad_(False)  # the optimizer has it already
    for _ in range(3):
        batch = random.integers(run.model.vocab_size, size=(2, sequence_length(run) + 1))
        result = engine.train_batch([batch] * layout.accumulation)
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    weights[-1].requires_grad_(True)
    kept = sum(weight.grad is not None for weight in weights)
    keys = ["momentum_buffer"] if run.optimizer.momentum else ["exp_avg", "exp_avg_sq"]
    outcome = Outcome(
        losses,
        norms,
        {logical.name: weight for logical, weight in engine.full_weights()},
        {f"{key} {logical.name}": state for key in keys for logical, state in engine.full_states(key)},
        sum(total.numel() for total in engine.deepspeed.optimizer.fp32_groups_gradients_flat),
        kept,
    )
    leave()
    return outcome


def assert_equal(ours: Outcome, theirs: Outcome) -> None:
    # The norm's squares are added in another order, so a clipped gradient and what follows may differ.
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6, nan_ok=True)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-6, nan_ok=True)
    for ours_by_name, theirs_by_name in ((ours.weights, theirs.weights), (ours.states, theirs.states)):
        assert ours_by_name.keys() == theirs_by_name.keys()
        for name, tensor in ours_by_name.items():
            torch.testing.assert_close(tensor, theirs_by_name[name], rtol=1e-6, atol=1e-9)
    assert ours.sums == 0 < theirs.sums
    assert ours.kept == 0


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("single", []),
        pytest.param("single", [*MOMENTUM, CLIPPED], marks=pytest.mark.slow),
        pytest.param("tp2", [CLIPPED], marks=pytest.mark.slow),
    ],
)
def test_the_update_equals_that_from_fp32_sums(layout: str, overrides: list[str]) -> None:
    run = run_of(*SMALL, f"parallelism={layout}", "optimizer.lr=1e-2", *overrides)
    world = 2 if layout == "tp2" else 1
    assert_equal(*(run_fresh(steps, world, run, directly)[0] for directly in (True, False)))


def test_a_skipped_step_changes_nothing_and_a_weight_without_gradient_decays() -> None:
    run = run_of(*SMALL, "parallelism=single", CLIPPED)
    assert_equal(*(run_fresh(steps, 1, run, directly, 1)[0] for directly in (True, False)))


@pytest.mark.parametrize(("layout", "world"), [("single", 1), ("zero1", 2)])
def test_several_gradients_have_sums(layout: str, world: int) -> None:
    """Two micro-batches, or two data ranks, make two gradients: BF16_Optimizer sums them in fp32."""
    run = run_of(*SMALL, f"parallelism={layout}", "training.global_batch_size=4")
    assert run_fresh(steps, world, run, True)[0].sums > 0


@pytest.mark.parametrize(
    ("layout", "samples", "expected"),
    [
        ("single", 2, True),
        ("tp2", 2, True),
        ("single", 4, False),
        ("dp", 4, False),
        ("cp2", 2, False),
        ("pp2", 2, False),
        ("zero3", 2, False),
    ],
)
def test_one_micro_batch_of_one_data_rank_is_one_gradient(layout: str, samples: int, expected: bool) -> None:
    run = run_of(*SMALL, f"parallelism={layout}", f"training.global_batch_size={samples}")
    resolved = validate(run, World("cpu", 1 if layout in ("single", "zero3") else 2, 2))
    assert updates_directly(run, resolved) == expected


def test_large_weights_are_pieces_of_their_own() -> None:
    sizes = [3, 1 << 20, 5, 7, 1 << 21, 1 << 20]
    weights = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    pieces = pieces_of(weights)
    assert [[w.numel() for w in piece.weights] for piece in pieces] == [
        [3], [1 << 20], [5, 7], [1 << 21], [1 << 20],
    ]  # fmt: skip
    assert [piece.start for piece in pieces] == [0, 3, 3 + (1 << 20), 15 + (1 << 20), 15 + 3 * (1 << 20)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("is_kept", [True, False])
def test_one_pass_equals_torchs_optimizer(compiled: bool, momentum: float | None, is_kept: bool) -> None:
    """Three updates beside torch's own optimizer, from gradients that are scaled."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(1000))
    low, master = weight.detach().bfloat16(), weight.detach().clone()
    states = [torch.zeros(1000) for _ in range(1 if momentum else 2)]
    kept, scale = torch.tensor(is_kept), torch.tensor(4.0)
    if momentum:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [weight], lr=0.1, momentum=momentum, weight_decay=0.1
        )
    else:
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    [group] = optimizer.param_groups
    for number in range(3):
        gradient = torch.randn(1000).bfloat16()
        updates = torch.tensor(float(number))
        arithmetic = (
            sgd_arithmetic(group, low.device) if momentum else adamw_arithmetic(group, updates, low.device)
        )
        update = compiled_update() if compiled else update_
        update(*arithmetic, low, [master, *states], gradient, kept, scale)
        weight.grad = gradient.float() / scale
        if is_kept:
            optimizer.step()
    torch.testing.assert_close(master, weight.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(low, master.bfloat16())
    assert all((state != 0).any() == is_kept for state in states)
