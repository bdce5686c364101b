"""Gradients that are not usable change nothing, in every layout: the run goes on as if the step were not."""

import math
from pathlib import Path

import pytest
import torch

from launcher.engine.update_guard import LARGEST_NORM, UpdateGuard, norms_of
from tests.checkpoint.saving import GPT, LAYOUTS, MOMENTUM, STEPS, Outcome, run_in, train

FAULTS = {1: math.inf, 2: math.nan, 4: 1e30, 7: -math.inf}
QUICK = {("adamw", "zero1"), ("adamw", "tp2_pp2"), ("sgd", "dp"), ("sgd", "zero3")}


def test_skipped_steps_are_counted() -> None:
    guard = UpdateGuard(torch.device("cpu"))
    # The norm of each step, and afterwards: steps skipped so far, in a row, and steps since.
    for norm, counts in (
        (1.0, [0, 0, 1]), (math.inf, [1, 1, 0]), (math.nan, [2, 2, 0]), (1e30, [3, 3, 0]), (1.0, [3, 0, 1]),
        (LARGEST_NORM, [3, 0, 2]), (math.inf, [4, 1, 0]),
    ):  # fmt: skip
        guard.judge(torch.tensor(norm))
        assert guard.counts.tolist() == counts, norm
        assert bool(guard.skipped) == (counts[2] == 0), norm
    with guard.rehearsal():
        guard.judge(torch.tensor(2.0))
        assert (float(guard.norm), bool(guard.skipped)) == (2.0, True)
    assert guard.counts.tolist() == [4, 1, 0]
    assert float(guard.norm) == math.inf
    guard.restart()
    assert guard.counts.tolist() == [0, 0, 0]


def test_norms_of_bf16_gradients_are_not_rounded_to_bf16() -> None:
    gradient = torch.full((1001,), 0.1, dtype=torch.bfloat16)
    [norm] = norms_of([gradient])
    assert float(norm) == pytest.approx(float(gradient.double().norm()), rel=1e-6)


def trained(layout: str, folder: Path, *overrides: str, faulty: bool) -> Outcome:
    run, resolved = run_in(layout, *overrides)
    if faulty:
        return train(run, resolved, folder, faults=FAULTS)
    return train(run, resolved, folder, left_out=frozenset(FAULTS))


@pytest.fixture(scope="module")
def without_the_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {
        optimizer: trained("single", tmp_path_factory.mktemp("right"), *GPT, *overrides, faulty=False)
        for optimizer, overrides in {"adamw": [], "sgd": MOMENTUM}.items()
    }


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [
        pytest.param(optimizer, layout, marks=[] if (optimizer, layout) in QUICK else pytest.mark.slow)
        for optimizer in ("adamw", "sgd")
        for layout in LAYOUTS
    ],
)
def test_a_skipped_step_changes_no_weight_and_no_state(
    layout: str, optimizer: str, without_the_steps: dict[str, Outcome], tmp_path: Path
) -> None:
    outcome = trained(layout, tmp_path, *GPT, *(MOMENTUM if optimizer == "sgd" else []), faulty=True)
    assert outcome.skipped == [step in FAULTS for step in range(1, STEPS + 1)]
    assert [not norm < 1e18 for norm in outcome.norms] == outcome.skipped
    assert all(math.isfinite(loss) for loss in outcome.losses)
    expected = without_the_steps[optimizer]
    assert outcome.tensors.keys() == expected.tensors.keys()
    for name, tensor in outcome.tensors.items():
        # The gradient of a key's bias is zero but for rounding, and AdamW divides it by its own size.
        if optimizer == "sgd" or not name.endswith("qkv.bias"):
            torch.testing.assert_close(tensor, expected.tensors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["single", "zero2", pytest.param("tp2_pp2", marks=pytest.mark.slow)])
def test_in_bf16_too(layout: str, tmp_path: Path) -> None:
    outcome = trained(layout, tmp_path / "faulty", *GPT, "precision=bf16", faulty=True)
    assert outcome.skipped == [step in FAULTS for step in range(1, STEPS + 1)]
    expected = trained(layout, tmp_path / "right", *GPT, "precision=bf16", faulty=False)
    for name, tensor in outcome.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name], rtol=0.02, atol=1e-3)
