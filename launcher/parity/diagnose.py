"""What a difference looks like, and what that usually means. Pure.

RULES stand in the order in which a step computes: what is wrong first explains what is wrong later, so the
first rule that applies speaks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import output_size
from launcher.parallel.sharding import padded_length
from launcher.parity.differences import Difference, Kind, expected_batch_losses, in_forward_order
from launcher.parity.patterns import (
    CLOSE,
    common_ratio,
    excess_of_padding,
    moved_rows,
    named_ratio,
    same_losses,
    wrong_shards,
)
from launcher.parity.step_trace import StepTrace


@dataclass(frozen=True)
class Diagnosis:
    """`shape` of the difference in words, and its usual `meaning`."""

    shape: str
    meaning: str


@dataclass(frozen=True)
class Evidence:
    """The first step that failed."""

    run: RunConfig
    layout: Layout
    number: int
    step: StepTrace
    right: StepTrace
    failed: list[Difference]

    def names(self, *kinds: Kind) -> list[str]:
        """What failed of these kinds, in forward order."""
        return in_forward_order(self.run, sorted({d.name for d in self.failed if d.kind in kinds}))


def diagnose(
    run: RunConfig,
    layout: Layout,
    failed: list[Difference],
    trace: list[StepTrace],
    expected: list[StepTrace],
) -> Diagnosis:
    number = failed[0].step
    first = [difference for difference in failed if difference.step == number]
    evidence = Evidence(run, layout, number, trace[number], expected[number], first)
    found = (rule(evidence) for rule in RULES)
    return next(diagnosis for diagnosis in found if diagnosis is not None)


def _start(e: Evidence) -> Diagnosis | None:
    if e.number > 0:
        return None
    replicas: tuple[tuple[Kind, str, str], ...] = (
        ("data_replica", "data ranks", "each data rank draws weights of its own, and none are broadcast"),
        ("replica", "tensor ranks", "a weight that every tensor rank holds is drawn by each for itself"),
        ("tied_copy", "the stages that share it", "the copies of a tied weight are drawn separately"),
    )
    for kind, who, meaning in replicas:
        if names := e.names(kind):
            return Diagnosis(f"{_some(names)} differs between {who} before the first step", meaning)
    return _wrong_start(e, e.names("weight"))


def _wrong_start(e: Evidence, names: list[str]) -> Diagnosis:
    present = [n for n in names if n in e.step.weights and n in e.right.weights]
    if len(present) < len(names):
        return Diagnosis(f"{_some(names)}: not in both runs", "a parameter is lost, or has another name")
    rows = {n: moved_rows(e.step.weights[n], e.right.weights[n]) for n in names}
    columns = {
        n: moved_rows(e.step.weights[n].T, e.right.weights[n].T)
        for n in names
        if e.right.weights[n].dim() > 1
    }
    queries = e.run.model.hidden_size
    if all((moved := rows[n]) and "attention.qkv" in n and min(moved) >= queries for n in names):
        return Diagnosis(
            f"{_some(names)}: the rows of keys and values start in each other's places",
            "KV heads are assigned to the wrong tensor rank",
        )
    if all(rows[n] or columns.get(n) for n in names):
        return Diagnosis(
            f"{_some(names)}: the right rows or columns start in each other's places",
            "shards are swapped: tensor ranks hold each other's",
        )
    return Diagnosis(
        f"{_some(names)}: not the reference's weights before the first step",
        "weights are drawn from another seed or distribution, or cut or padded at the wrong place",
    )


def _micro_batches(e: Evidence) -> Diagnosis | None:
    ran = {len(losses) for losses in e.step.batch_losses}
    if ran == {e.layout.accumulation}:
        return None
    return Diagnosis(
        f"{'/'.join(map(str, sorted(ran)))} of {e.layout.accumulation} micro-batches were computed",
        "a micro-batch is dropped, usually the last of a step, or one too many is run",
    )


# What a layer's output depends on besides its input, where all tensor ranks agree on a wrong one.
WRONG_OUTPUT = {
    "embedding": "the look-up in a split vocabulary: its mask or the first row of a shard",
    "positions": "positions offset, for this stage or for this rank's stretch of the sequence",
    "norm": "the norm: its weight, epsilon or the dimension it reduces",
    "qkv": "a column layer: its input is not gathered, or its weight's shards are in the wrong place",
    "up": "a column layer: its input is not gathered, or its weight's shards are in the wrong place",
    "down": "a row layer: its shards, its bias added more than once, or its reduce-scatter",
    "head": "the projection to the vocabulary: another weight than the embedding's, or its shards",
}
SUMS = {"embedding", "attention.output", "mlp.down"}


def _forward(e: Evidence) -> Diagnosis | None:
    names = e.names("output", "output_replica")
    if not names:
        return None
    name, stage = names[0], e.step.stage_of.get(names[0], 0)
    where = f"the output of {name}" + (f" on stage {stage}" if e.layout.pipeline > 1 else "")
    before = [n for n in e.right.outputs if e.step.stage_of.get(n) == stage and n not in names]
    if stage and len(before) <= 2:
        where += f" is the first that is wrong, all of stage {stage - 1} is right"
    else:
        where += " is the first that is wrong"
    if name in e.names("output_replica"):
        summed = any(name.endswith(layer) for layer in SUMS)
        return Diagnosis(
            f"{where}, and differs between tensor ranks",
            f"{name}'s partial results are not summed over the tensor ranks: an all-reduce is missing"
            if summed
            else "tensor ranks compute with different copies of what they should hold alike",
        )
    if name not in e.step.outputs or name not in e.right.outputs:
        return Diagnosis(f"{where}: not in both runs", "a layer is left out or has another name")
    if name.endswith("attention.output"):
        return _attention(e, name, where)
    if name == "embedding" and bool((e.step.outputs[name] == 0).all(-1).any()):
        return Diagnosis(
            f"{where}: tokens of other ranks' shards come out as zero",
            "partial look-ups are not summed over the tensor ranks (under sequence parallelism: by the "
            "reduce-scatter)",
        )
    part = next((part for part in WRONG_OUTPUT if name.endswith(part)), "up")
    return Diagnosis(f"{where}, alike on every tensor rank", WRONG_OUTPUT[part])


def _attention(e: Evidence, name: str, where: str) -> Diagnosis:
    # The first token attends to itself alone: its output depends on its value, not on positions or scores.
    got, right = e.step.outputs[name][:, 0], e.right.outputs[name][:, 0]
    if float((got - right).norm()) <= CLOSE * float(right.norm()):
        return Diagnosis(
            f"{where}: right for the first token, wrong for those that attend to others",
            "the attention scores: rotary positions offset (by stage or sequence stretch), mask or scale",
        )
    return Diagnosis(
        f"{where}: wrong from the first token on, while queries, keys and values are right",
        "heads: values or KV heads of another rank or group, shards of the output weight, or (under "
        "sequence parallelism) a missing reduce-scatter",
    )


def _loss(e: Evidence) -> Diagnosis | None:
    names = e.names("batch_loss")
    if not names:
        return None
    got = e.step.batch_losses
    right = expected_batch_losses(e.run, len(got), e.right)
    for rank in range(1, len(got)):
        if same_losses(got[0], right[0]) and same_losses(got[rank], right[0]):
            return Diagnosis(
                f"data rank {rank} has the losses of data rank 0's samples",
                "data ranks read the same samples",
            )
    ratio = common_ratio([(torch.tensor(got), torch.tensor(right))])
    if ratio is not None and abs(ratio - 1) > CLOSE:
        words, axes = named_ratio(ratio, e.layout)
        return Diagnosis(f"every micro-batch's loss is {words}", f"the loss is scaled by {_axes(axes)}")
    if same_losses(sorted(chain(*got)), sorted(chain(*right))):
        return Diagnosis(
            "the right losses, of other ranks or micro-batches", "samples are dealt out in another order"
        )
    padding = padded_length(output_size(e.run.model), e.layout.tensor) - output_size(e.run.model)
    if padding and "head" in e.right.outputs:
        excess = excess_of_padding(e.right.outputs["head"], padding)
        if abs((got[0][0] - right[0][0]) / excess - 1) < CLOSE:
            return Diagnosis(
                f"every output is right and losses are {excess:.4f} too high: what {padding} logits of 0 add",
                "the vocabulary's padding is predicted",
            )
    if "data rank 0, micro-batch 0" in names:
        return Diagnosis(
            "every output is right and the loss computed from the logits is not",
            "the cross-entropy: a maximum or sum over the vocabulary's shards, or other labels",
        )
    return Diagnosis(
        f"only {_some(names)}: another loss", "these ranks read other samples, or hold other weights"
    )


def _mean_loss(e: Evidence) -> Diagnosis | None:
    if not e.names("loss"):
        return None
    words, _ = named_ratio(e.step.loss / e.right.loss, e.layout)
    return Diagnosis(
        f"every micro-batch's loss is right and the reported loss is {words}",
        "the loss is averaged over the wrong ranks or micro-batches",
    )


def _data_replica(e: Evidence) -> Diagnosis | None:
    names = e.names("data_replica")
    if not names:
        return None
    return Diagnosis(
        f"{_some(names)} differs between data ranks after the step",
        "gradients are not averaged over the data ranks, or updated weights not gathered",
    )


def _norm_replica(e: Evidence) -> Diagnosis | None:
    if not e.names("norm_replica"):
        return None
    return Diagnosis(
        "ranks report different gradient norms",
        "the norm is not summed over all shards: each rank clips by that of its own",
    )


def _replicas(e: Evidence) -> Diagnosis | None:
    if names := e.names("tied_copy"):
        return Diagnosis(
            f"{_some(names)}: the copies of this tied weight on different stages are no longer equal",
            "a tied weight is updated from one stage's gradient only: they are not summed over its stages",
        )
    names = e.names("replica")
    if not names:
        return None
    split = [name for name in e.names("gradient") if name not in e.step.replica_spread]
    if split:
        return Diagnosis(
            f"{_some(names)} differs between tensor ranks, and gradients of {_some(split)} are wrong too",
            "a column layer's input gradient is not summed over the tensor ranks: the all-reduce of the "
            "backward pass is missing",
        )
    return Diagnosis(
        f"{_some(names)} differs between tensor ranks, every split weight is right",
        "gradients of weights that all tensor ranks hold are not summed over them (under sequence "
        "parallelism: norm weights, positions, row biases)",
    )


def _gradients(e: Evidence) -> Diagnosis | None:
    names = e.names("gradient")
    if not names:
        return None
    ratio = common_ratio([(e.step.gradients[n], e.right.gradients[n]) for n in names])
    if ratio is not None and len(names) == len(e.right.gradients):
        words, axes = named_ratio(ratio, e.layout)
        if not e.names("grad_norm"):
            return Diagnosis(
                f"the norm is right and every applied gradient is {words}",
                "clipping does not use the norm that is reported, or does not happen",
            )
        return Diagnosis(
            f"every gradient is {words}",
            f"gradients are scaled by {_axes(axes)}: averaged once too often or rarely",
        )
    if ratio is not None:
        words, _ = named_ratio(ratio, e.layout)
        return Diagnosis(
            f"gradients of {_some(names)} are {words}, the others are right",
            "these gradients miss a sum over ranks, or have one too many",
        )
    shards = {n: wrong_shards(e.step.gradients[n], e.right.gradients[n], e.layout.tensor) for n in names}
    if all(0 < len(wrong) < e.layout.tensor for wrong in shards.values()):
        return Diagnosis(
            f"gradients of {_some(names)}: wrong only in the part of tensor rank {shards[names[0]][0]}",
            "one shard is wrong: its place, its mask or its padding",
        )
    later = in_forward_order(e.run, list(e.right.gradients))
    later = later[later.index(names[-1]) + 1 :]
    return Diagnosis(
        f"gradients of {_some(names)} are wrong, in no constant ratio; "
        + (f"those of {_some(later)}, computed before, are right" if later else "the loss is right"),
        f"the backward pass goes wrong at {names[-1]}: a missing reduction of an input's gradient, "
        "or a gradient that some ranks or micro-batches do not add to",
    )


def _norm(e: Evidence) -> Diagnosis | None:
    if not e.names("grad_norm"):
        return None
    words, _ = named_ratio(e.step.grad_norm / e.right.grad_norm, e.layout)
    return Diagnosis(
        f"every gradient is right and the reported norm is {words}",
        "the norm is not that of the logical gradients: shards left out of it, or replicas counted twice",
    )


def _optimizer(e: Evidence) -> Diagnosis | None:
    names = _some(e.names("weight", "state"))
    return Diagnosis(
        f"{names}: the gradients are right, and what the optimizer made of them is not",
        "another optimizer, learning rate, weight decay or state than the reference's",
    )


RULES: tuple[Callable[[Evidence], Diagnosis | None], ...] = (
    _start,
    _micro_batches,
    _forward,
    _loss,
    _mean_loss,
    _data_replica,
    _norm_replica,
    _replicas,
    _gradients,
    _norm,
    _optimizer,
)


def _axes(names: list[str]) -> str:
    return " or ".join(names) if names else "a constant"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
