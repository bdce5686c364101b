"""Diagnose a failed verification: describe the first difference, and name its usual cause. Pure.

RULES are in the order in which a step computes. An early error explains later errors, so the first rule that
applies gives the diagnosis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import output_size, qkv_sizes
from launcher.parallel.sharding import padded_length
from launcher.parity.differences import Difference, DifferenceKind, expected_batch_losses, in_forward_order
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
    """A description of the difference (`shape`), and its usual cause (`meaning`)."""

    shape: str
    meaning: str


@dataclass(frozen=True)
class Evidence:
    """The first step that failed: its trace in the layout (`step`) and in the reference (`right`)."""

    run: RunConfig
    layout: Layout
    number: int
    step: StepTrace
    right: StepTrace
    failed: list[Difference]

    def names(self, *kinds: DifferenceKind) -> list[str]:
        """Return the names of the failed quantities of these kinds, in forward order."""
        return in_forward_order(self.run, sorted({d.name for d in self.failed if d.kind in kinds}))


def diagnose(
    run: RunConfig,
    layout: Layout,
    failed: list[Difference],
    trace: list[StepTrace],
    expected: list[StepTrace],
) -> Diagnosis:
    """Return the diagnosis of the first step that failed.

    `failed` must not be empty; `trace` is of the layout, `expected` of the reference.
    """
    number = failed[0].step
    failed_first = [difference for difference in failed if difference.step == number]
    evidence = Evidence(run, layout, number, trace[number], expected[number], failed_first)
    diagnoses = (rule(evidence) for rule in RULES)
    return next(diagnosis for diagnosis in diagnoses if diagnosis is not None)


def _start(e: Evidence) -> Diagnosis | None:
    if e.number > 0:
        return None
    replicas: tuple[tuple[DifferenceKind, str, str], ...] = (
        (
            "data_replica",
            "data ranks",
            "each data rank draws its own initial weights, and rank 0's are not broadcast",
        ),
        (
            "replica",
            "tensor ranks",
            "each tensor rank draws its own values for a weight that all tensor ranks hold",
        ),
        ("tied_copy", "the stages that share it", "each stage draws its own copy of a tied weight"),
    )
    for kind, ranks, meaning in replicas:
        if names := e.names(kind):
            return Diagnosis(f"{_some(names)} differs between {ranks} before the first step", meaning)
    return _wrong_start(e, e.names("weight"))


def _wrong_start(e: Evidence, names: list[str]) -> Diagnosis:
    present = [n for n in names if n in e.step.weights and n in e.right.weights]
    if len(present) < len(names):
        return Diagnosis(
            f"{_some(names)}: exists in one of the two runs only", "a parameter is lost or renamed"
        )
    rows = {n: moved_rows(e.step.weights[n], e.right.weights[n]) for n in names}
    columns = {
        n: moved_rows(e.step.weights[n].T, e.right.weights[n].T)
        for n in names
        if e.right.weights[n].dim() > 1
    }
    queries = qkv_sizes(e.run.model)[0]
    if all((moved := rows[n]) and "attention.qkv" in n and min(moved) >= queries for n in names):
        return Diagnosis(
            f"{_some(names)}: the rows of keys and values are exchanged with other rows",
            "KV heads are assigned to the wrong tensor rank",
        )
    if all(rows[n] or columns.get(n) for n in names):
        return Diagnosis(
            f"{_some(names)}: rows or columns have the right values at the wrong places",
            "shards are swapped: a tensor rank holds the shard of another",
        )
    return Diagnosis(
        f"{_some(names)}: differs from the reference before the first step",
        "weights are drawn from another seed or distribution, or sliced or padded at the wrong place",
    )


def _micro_batches(e: Evidence) -> Diagnosis | None:
    ran = {len(losses) for losses in e.step.batch_losses}
    if ran == {e.layout.accumulation}:
        return None
    return Diagnosis(
        f"{' or '.join(map(str, sorted(ran)))} of {e.layout.accumulation} micro-batches were computed",
        "a micro-batch is dropped, usually the last of a step, or an extra micro-batch is run",
    )


# Usual causes of a wrong output on which all tensor ranks agree, by the end of the layer's name.
WRONG_OUTPUT = {
    "embedding": "the look-up in a split vocabulary: its mask or the first row of a shard",
    "positions": "positions offset wrongly, for this stage or for this rank's sequence shard",
    "norm": "the norm: its weight, its epsilon, or the dimension that it reduces",
    "qkv": "a column layer: its input is not gathered, or its weight's shards are at the wrong place",
    "up": "a column layer: its input is not gathered, or its weight's shards are at the wrong place",
    "down": "a row layer: its shards, its bias added more than once, or its reduce-scatter",
    "head": "the projection to the vocabulary: its shards, or a weight that is not tied to the embedding",
}
SUMMED_OVER_TENSOR_RANKS = {"embedding", "attention.output", "mlp.down"}


def _forward(e: Evidence) -> Diagnosis | None:
    names = e.names("output", "output_replica")
    if not names:
        return None
    name, stage = names[0], e.step.stage_of.get(names[0], 0)
    where = f"the output of {name}" + (f" on stage {stage}" if e.layout.pipeline > 1 else "")
    before = [n for n in e.right.outputs if e.step.stage_of.get(n) == stage and n not in names]
    if stage and len(before) <= 2:
        where += f" is the first wrong output; all outputs of stage {stage - 1} are right"
    else:
        where += " is the first wrong output"
    if name in e.names("output_replica"):
        summed = any(name.endswith(layer) for layer in SUMMED_OVER_TENSOR_RANKS)
        return Diagnosis(
            f"{where}; it differs between tensor ranks",
            f"{name}'s partial results are not summed over the tensor ranks: an all-reduce is missing"
            if summed
            else "tensor ranks compute with different values of a weight that all of them hold",
        )
    if name not in e.step.outputs or name not in e.right.outputs:
        return Diagnosis(f"{where}: it exists in one of the two runs only", "a layer is left out or renamed")
    if name.endswith("attention.output"):
        return _attention(e, name, where)
    if name == "embedding" and bool((e.step.outputs[name] == 0).all(-1).any()):
        return Diagnosis(
            f"{where}: tokens in the vocabulary shards of other ranks have output zero",
            "partial look-ups are not summed over the tensor ranks (under sequence parallelism: by the "
            "reduce-scatter)",
        )
    part = next((part for part in WRONG_OUTPUT if name.endswith(part)), "up")
    return Diagnosis(f"{where}; it is equal on every tensor rank", WRONG_OUTPUT[part])


def _attention(e: Evidence, name: str, where: str) -> Diagnosis:
    # The first token attends only to itself: its output depends on its value, not on positions or scores.
    got, right = e.step.outputs[name][:, 0], e.right.outputs[name][:, 0]
    if float((got - right).norm()) <= CLOSE * float(right.norm()):
        return Diagnosis(
            f"{where}: it is right for the first token and wrong for tokens that attend to others",
            "the attention scores: rotary positions offset (by stage or sequence shard), mask or scale",
        )
    return Diagnosis(
        f"{where}: it is wrong from the first token on, while queries, keys and values are right",
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
                f"data rank {rank} reports the losses of data rank 0's samples",
                "data ranks read the same samples",
            )
    ratio = common_ratio([(torch.tensor(got), torch.tensor(right))])
    if ratio is not None and abs(ratio - 1) > CLOSE:
        words, axes = named_ratio(ratio, e.layout)
        return Diagnosis(f"every micro-batch's loss is {words}", f"the loss is scaled by {_axes(axes)}")
    if same_losses(sorted(chain(*got)), sorted(chain(*right))):
        return Diagnosis(
            "the losses are right but belong to other ranks or micro-batches",
            "samples are assigned in another order",
        )
    padding = padded_length(output_size(e.run.model), e.layout.tensor) - output_size(e.run.model)
    if padding and "head" in e.right.outputs:
        excess = excess_of_padding(e.right.outputs["head"], padding)
        if abs((got[0][0] - right[0][0]) / excess - 1) < CLOSE:
            return Diagnosis(
                f"every output is right and losses are {excess:.4f} too high: the effect of {padding} more "
                "logits of 0",
                "the padding of the vocabulary enters the softmax",
            )
    if "data rank 0, micro-batch 0" in names:
        return Diagnosis(
            "every output is right and the loss computed from the logits is wrong",
            "the cross-entropy: a maximum or sum over the vocabulary's shards, or other labels",
        )
    return Diagnosis(
        f"only the losses of {_some(names)} are wrong", "these ranks read other samples or hold other weights"
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
        "gradients are not averaged over the data ranks, or updated weights are not all-gathered",
    )


def _norm_replica(e: Evidence) -> Diagnosis | None:
    if not e.names("norm_replica"):
        return None
    return Diagnosis(
        "ranks report different gradient norms",
        "the norm is not summed over all shards: each rank clips by the norm of its own shard",
    )


def _replicas(e: Evidence) -> Diagnosis | None:
    if names := e.names("tied_copy"):
        return Diagnosis(
            f"{_some(names)}: the copies of this tied weight on different stages are no longer equal",
            "a tied weight is updated from one stage's gradient only: a sum over its stages is missing",
        )
    names = e.names("replica")
    if not names:
        return None
    sharded = [name for name in e.names("gradient") if name not in e.step.replica_spread]
    if sharded:
        return Diagnosis(
            f"{_some(names)} differs between tensor ranks, and gradients of {_some(sharded)} are wrong too",
            "a column layer's input gradient is not summed over the tensor ranks: the all-reduce of the "
            "backward pass is missing",
        )
    return Diagnosis(
        f"{_some(names)} differs between tensor ranks; every sharded weight is right",
        "gradients of weights that all tensor ranks hold are not summed over tensor ranks (under sequence "
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
                "clipping uses another norm than the reported one, or is left out",
            )
        return Diagnosis(
            f"every gradient is {words}",
            f"gradients are scaled by {_axes(axes)}: averaged once too often or not often enough",
        )
    if ratio is not None:
        words, _ = named_ratio(ratio, e.layout)
        return Diagnosis(
            f"gradients of {_some(names)} are {words}; all other gradients are right",
            "these gradients lack a sum over ranks, or are summed once too often",
        )
    shards = {n: wrong_shards(e.step.gradients[n], e.right.gradients[n], e.layout.tensor) for n in names}
    if all(0 < len(wrong) < e.layout.tensor for wrong in shards.values()):
        return Diagnosis(
            f"gradients of {_some(names)} are wrong only in the shard of tensor rank {shards[names[0]][0]}",
            "the place, the mask or the padding of a shard is wrong",
        )
    later = in_forward_order(e.run, list(e.right.gradients))
    later = later[later.index(names[-1]) + 1 :]
    return Diagnosis(
        f"gradients of {_some(names)} are wrong, and not by a constant ratio; "
        + (f"gradients of {_some(later)}, computed earlier, are right" if later else "the loss is right"),
        f"the backward pass goes wrong at {names[-1]}: a missing reduction of an input's gradient, "
        "or some ranks or micro-batches do not contribute to a gradient",
    )


def _norm(e: Evidence) -> Diagnosis | None:
    if not e.names("grad_norm"):
        return None
    words, _ = named_ratio(e.step.grad_norm / e.right.grad_norm, e.layout)
    return Diagnosis(
        f"every gradient is right and the reported norm is {words}",
        "the norm is not computed over the logical gradients: shards are left out, or replicas counted twice",
    )


def _optimizer(e: Evidence) -> Diagnosis | None:
    names = _some(e.names("weight", "state"))
    return Diagnosis(
        f"{names}: the gradients are right, but the update or state computed from them is wrong",
        "the optimizer, learning rate, weight decay or state differs from the reference",
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
