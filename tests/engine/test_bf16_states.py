"""precision=bf16_states in real engines: layouts agree, and all that is kept is bf16."""

from pathlib import Path

import pytest
import torch

from launcher.config.schema import CheckpointConfig
from tests.checkpoint.saving import GPT, LLAMA, MOMENTUM, Outcome, run_in, saved, train

STATES = "precision=bf16_states"
RUNS = {"adamw": [*LLAMA, STATES, "optimizer.lr=1e-3"], "sgd": [*GPT, *MOMENTUM, STATES]}
STEPS = 4
# Both runs round with the same bits, so they differ where bf16 gradients do: by some units of the last bit.
BOUND = 2**-5


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Return the outcome of each of RUNS in one process."""
    outcomes = {}
    for name, overrides in RUNS.items():
        run, layout = run_in("single", *overrides)
        outcomes[name] = train(run, layout, tmp_path_factory.mktemp(name), last=STEPS)
    return outcomes


def assert_alike(outcome: Outcome, expected: Outcome, *, first: int = 1) -> None:
    assert outcome.losses == pytest.approx(expected.losses[first - 1 :], rel=0.01)
    assert outcome.tensors.keys() == expected.tensors.keys()
    for name, tensor in outcome.tensors.items():
        assert torch.equal(tensor, tensor.bfloat16().float()), name
        # The gradient of a key's bias is rounding alone.
        if not name.endswith("qkv.bias") and not name.startswith("exp_avg"):
            distance = float((tensor - expected.tensors[name]).norm())
            assert distance <= BOUND * float(expected.tensors[name].norm()) + 1e-6, name


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ("pp2", "adamw"),  # untied: the loss runs the head, behind the output of DeepSpeed's module
        ("zero2", "sgd"),
        *(
            pytest.param(layout, optimizer, marks=pytest.mark.slow)
            for layout in ("tp2", "tp2_pp2", "dualpipev", "zero1", "zero3_tp2", "zero1_tp2")
            for optimizer in RUNS
        ),
    ],
)
def test_layouts_agree(layout: str, optimizer: str, one_process: dict[str, Outcome], tmp_path: Path) -> None:
    run, resolved = run_in(layout, *RUNS[optimizer])
    outcome = train(run, resolved, tmp_path, last=STEPS)
    assert_alike(outcome, one_process[optimizer])


def test_resume_in_another_layout(one_process: dict[str, Outcome], tmp_path: Path) -> None:
    run, layout = run_in("zero3", *RUNS["adamw"])
    train(run, layout, tmp_path / "half", last=2, save=CheckpointConfig())
    run, layout = run_in("zero1", *RUNS["adamw"])
    half = saved(tmp_path / "half", 2)
    outcome = train(run, layout, tmp_path / "resumed", first=3, last=STEPS, restore=half)
    assert_alike(outcome, one_process["adamw"], first=3)
