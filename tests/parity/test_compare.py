"""Differences beyond their bound, NaN, and missing tensors are failures."""

import copy
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
import torch

from launcher.config.schema import OptimizerName, RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parity.differences import (
    Difference,
    applied_gradients,
    compare,
    expected_batch_losses,
    in_forward_order,
)
from launcher.parity.reference import probe_batches, reference_trace
from launcher.parity.shrink import shrink
from launcher.parity.step_trace import StepTrace, Weights, read_traces, write_trace
from launcher.parity.tolerance import tolerance
from tests.config.composing import run_of

STEPS = 2


@pytest.fixture(scope="module")
def run() -> RunConfig:
    run = run_of("model=llama_tiny", f"verify.steps={STEPS}", "parallelism.data=1", "optimizer=sgd")
    run.optimizer.lr = 0.1
    small, _ = shrink(run, validate(run, World("cpu", 1, 1)))
    return small


@pytest.fixture(scope="module")
def expected(run: RunConfig) -> list[StepTrace]:
    m, generator = run.model, torch.Generator().manual_seed(0)
    h, kv = m.hidden_size, (m.num_kv_heads or m.num_heads) * (m.hidden_size // m.num_heads)
    shapes = {"embedding": (m.vocab_size, h), "final_norm": (h,), "head": (m.vocab_size, h)}
    for index in range(m.num_layers):
        block = {
            "attention_norm": (h,),
            "attention.qkv": (h + 2 * kv, h),
            "attention.output": (h, h),
            "mlp_norm": (h,),
            "mlp.gate_up": (2 * m.ffn_hidden_size, h),
            "mlp.down": (h, m.ffn_hidden_size),
        }
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    weights = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / 10
        for name, shape in shapes.items()
    }
    return reference_trace(run, weights, list(probe_batches(run)))


@pytest.fixture
def trace(run: RunConfig, expected: list[StepTrace]) -> list[StepTrace]:
    """The trace of a correct layout: one data rank, with its micro-batches in order."""
    trace = copy.deepcopy(expected)
    for step in trace[1:]:
        step.batch_losses = expected_batch_losses(run, 1, step)
    applied_gradients(run, trace, plain_sgd=True)
    return trace


def differences(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace], *, plain_sgd: bool = True
) -> list[Difference]:
    allowed = [tolerance(run)] * len(expected)
    # Without plain SGD, and without a momentum, gradients are not computed.
    trace = trace if plain_sgd else [replace(step, gradients={}) for step in trace]
    all_differences = compare(run, trace, expected, allowed, plain_sgd=plain_sgd)
    return [difference for difference in all_differences if not difference.ok]


def test_equal_traces_have_no_differences(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace]
) -> None:
    assert differences(run, trace, expected) == []
    assert differences(run, trace, expected, plain_sgd=False) == []
    everything = compare(run, trace, expected, [tolerance(run)] * len(expected), plain_sgd=True)
    kinds = {"weight", "batch_loss", "output", "loss", "grad_norm", "norm_replica", "gradient"}
    assert {d.kind for d in everything} == kinds


def test_gradients_are_computed_from_the_weight_updates(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace]
) -> None:
    assert run.optimizer.gradient_clipping is not None
    assert expected[1].grad_norm > run.optimizer.gradient_clipping, "clipping must be active"
    for name, gradient in expected[1].gradients.items():
        torch.testing.assert_close(trace[1].gradients[name], gradient, rtol=1e-2, atol=1e-4)


WRONG = {
    "loss": ("loss", "loss"),
    "grad_norm": ("grad_norm", "grad_norm"),
    "norm_spread": ("norm_replica", "grad_norm"),
}


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("value", [nan, inf, 1e3])
def test_a_wrong_number_or_nan_is_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace], field: str, value: float
) -> None:
    setattr(trace[1], field, value)
    assert [(d.step, d.kind, d.name) for d in differences(run, trace, expected)] == [(1, *WRONG[field])]


def test_gradients_of_zero_are_a_difference(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace]
) -> None:
    trace[1].grad_norm = 0.0
    trace[1].weights = {name: weight.clone() for name, weight in trace[0].weights.items()}
    applied_gradients(run, trace, plain_sgd=True)
    failed = [(d.kind, d.name) for d in differences(run, trace, expected) if d.step == 1]
    assert ("grad_norm", "grad_norm") in failed
    assert ("gradient", "head.weight") in failed


@pytest.mark.parametrize("tensors", ["gradients", "outputs"])
@pytest.mark.parametrize("value", [nan, 10.0])
def test_one_wrong_element_is_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace], tensors: str, value: float
) -> None:
    by_name: Weights = getattr(trace[2], tensors)
    name = sorted(by_name)[3]
    by_name[name].view(-1)[0] = value
    [difference] = differences(run, trace, expected)
    assert (difference.step, difference.kind, difference.name) == (2, tensors.removesuffix("s"), name)


def test_a_wrong_initial_weight_is_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace]
) -> None:
    weight = trace[0].weights["head.weight"]
    weight[0] *= 1 + 1e-5
    [difference] = differences(run, trace, expected)
    assert (difference.step, difference.kind, difference.name) == (0, "weight", "head.weight")


@pytest.mark.parametrize(("number", "tensors", "kind"), [(0, "weights", "weight"), (1, "outputs", "output")])
def test_a_missing_or_additional_tensor_is_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace], number: int, tensors: str, kind: str
) -> None:
    by_name: Weights = getattr(trace[number], tensors)
    name = sorted(by_name)[0]
    by_name["another"] = by_name.pop(name)
    assert {(d.kind, d.name) for d in differences(run, trace, expected)} == {(kind, name), (kind, "another")}


def test_a_missing_state_is_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace]
) -> None:
    right = copy.deepcopy(expected)
    right[1].states = {"head.weight.momentum_buffer": torch.ones(2)}
    [difference] = differences(run, trace, right, plain_sgd=False)
    assert (difference.kind, difference.name) == ("state", "head.weight.momentum_buffer")


def test_a_missing_micro_batch_is_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace]
) -> None:
    trace[1].batch_losses[0].pop()
    [difference] = differences(run, trace, expected)
    assert (difference.kind, difference.name) == ("batch_loss", "data rank 0")


@pytest.mark.parametrize("field", ["replica_spread", "data_spread"])
@pytest.mark.parametrize("spread", [1e-5, nan])
def test_replicas_that_differ_are_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace], field: str, spread: float
) -> None:
    getattr(trace[1], field)["final_norm.weight"] = 0.0
    assert differences(run, trace, expected) == []
    getattr(trace[1], field)["final_norm.weight"] = spread
    [difference] = differences(run, trace, expected)
    assert difference.kind == {"replica_spread": "replica", "data_spread": "data_replica"}[field]


def test_a_tied_copy_that_differs_is_a_failure(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace]
) -> None:
    trace[1].tied["head.weight"] = trace[1].weights["head.weight"].clone()
    assert differences(run, trace, expected) == []
    trace[1].tied["head.weight"][3, 3] += 1e-3
    [difference] = differences(run, trace, expected)
    assert (difference.kind, difference.name) == ("tied_copy", "head.weight")


def test_adam_may_reverse_an_update_only_where_the_gradient_is_rounding(
    run: RunConfig, expected: list[StepTrace]
) -> None:
    adam = copy.deepcopy(run)
    adam.optimizer.name, adam.optimizer.beta2, adam.optimizer.epsilon = OptimizerName.adamw, 0.95, 1e-8
    right = copy.deepcopy(expected)
    # The first element of this gradient consists of rounding only; all others are well above it.
    for step in right[1:]:
        step.gradients["final_norm.weight"][0] = 0.0
        step.states = {f"{n}.exp_avg_sq": 0.05 * g.square() for n, g in step.gradients.items()}
    got = copy.deepcopy(right)
    for step in got[1:]:
        step.batch_losses = expected_batch_losses(run, 1, step)
    assert differences(adam, got, right, plain_sgd=False) == []
    got[1].weights["final_norm.weight"][0] += adam.optimizer.lr
    assert differences(adam, got, right, plain_sgd=False) == []
    got[1].weights["final_norm.weight"][1] += 3 * adam.optimizer.lr
    assert {(d.step, d.kind) for d in differences(adam, got, right, plain_sgd=False)} == {(1, "weight")}


def test_names_are_sorted_in_forward_order(run: RunConfig) -> None:
    order = [
        "embedding.weight",
        "positions.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.bias",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.mlp_norm.weight",
        "blocks.0.mlp.down.weight",
        "blocks.1.mlp.gate_up.weight",
        "final_norm.weight",
        "head.weight",
    ]
    assert in_forward_order(run, sorted(order)) == order
    layers = [name.rpartition(".")[0] for name in order if name.endswith("weight")]
    assert in_forward_order(run, sorted(layers)) == layers


def test_micro_batches_are_assigned_to_data_ranks_in_turn(run: RunConfig) -> None:
    step = StepTrace(batch_losses=[[float(i) for i in range(12)]])
    two = copy.deepcopy(run)
    two.training.micro_batch_size = 2
    assert expected_batch_losses(two, 2, step) == [[0.5, 4.5, 8.5], [2.5, 6.5, 10.5]]


def test_the_traces_of_stages_are_merged(tmp_path: Path, expected: list[StepTrace]) -> None:
    first, last = copy.deepcopy(expected), copy.deepcopy(expected)
    for first_step, last_step in zip(first, last, strict=True):
        for tensors in ("weights", "outputs", "states"):
            getattr(last_step, tensors).clear()
        first_step.weights.pop("head.weight", None)
        first_step.outputs.pop("head", None)
        first_step.replica_spread, last_step.replica_spread = {"a": 1.0}, {"b": 2.0}
    for step, whole in zip(last, expected, strict=True):
        step.weights["head.weight"] = whole.weights["head.weight"]
        step.outputs |= {"head": whole.outputs["head"]} if whole.outputs else {}
    write_trace(first, tmp_path / "stage-0")
    write_trace(last, tmp_path / "stage-1")
    merged = read_traces([tmp_path / "stage-0", tmp_path / "stage-1"])
    assert merged[1].stage_of["head"] == 1
    assert set(merged[1].stage_of.values()) == {0, 1}
    for step, whole in zip(merged, expected, strict=True):
        assert step.weights.keys() == whole.weights.keys()
        assert step.outputs.keys() == whole.outputs.keys()
        assert step.replica_spread == {"a": 1.0, "b": 2.0}
        assert (step.loss, step.batch_losses) == (whole.loss, whole.batch_losses)
