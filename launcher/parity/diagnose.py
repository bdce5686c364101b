"""Diagnose a failed verification: describe the first difference, and name its usual cause. Pure.

RULES are in the order in which a step computes. An early error explains later errors, so the first rule that
yields a shape and a meaning gives the diagnosis.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from statistics import mean

import torch

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import output_size, qkv_sizes, vocabulary_multiple
from launcher.parallel.vocabulary import padded_length
from launcher.parity.differences import Difference, DifferenceKind, expected_batch_losses, in_forward_order
from launcher.parity.patterns import (
    CLOSE,
    CLOSE_LOSSES,
    CLOSE_MEAN,
    common_ratio,
    excess_of_padding,
    moved_rows,
    named_ratio,
    rough_ratio,
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
    before: StepTrace  # the step before in the layout
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
    """Return the diagnosis of the first step in `failed`, which must not be empty."""
    number = failed[0].step
    failed_first = [difference for difference in failed if difference.step == number]
    evidence = Evidence(
        run, layout, number, trace[max(0, number - 1)], trace[number], expected[number], failed_first
    )
    return next(Diagnosis(*result) for rule in RULES for result in rule(evidence))


def diagnose_lost_rank(failure: str, hang: str | None) -> Diagnosis:
    """Return the diagnosis of a rank's failure, or of a hang by the report of the watchdog."""
    if hang is not None:
        meaning = "a rank does not take part in a collective, or calls another one than the other ranks"
        return Diagnosis(hang.strip(), meaning)
    return Diagnosis(failure.strip(), "the traceback shows where the rank failed; nothing was compared")


Findings = Iterator[tuple[str, str]]  # the shape and the meaning of a difference; the first result counts


def _start(e: Evidence) -> Findings:
    if e.number > 0:
        return
    if names := e.names("data_replica"):
        meaning = "each data rank draws its own initial weights, and rank 0's are not broadcast"
        yield f"{_some(names)} differs between data ranks before the first step", meaning
    if names := e.names("replica"):
        meaning = "each tensor rank draws its own values for a weight that all tensor ranks hold"
        yield f"{_some(names)} differs between tensor ranks before the first step", meaning
    if names := e.names("tied_copy"):
        meaning = "each stage draws its own copy of a tied weight"
        yield f"{_some(names)} differs between the stages that share it before the first step", meaning
    yield from _wrong_start(e, e.names("weight"))


def _wrong_start(e: Evidence, names: list[str]) -> Findings:
    got, right = e.step.weights, e.right.weights
    if any(n not in got or n not in right for n in names):
        yield f"{_some(names)}: exists in one of the two runs only", "a parameter is lost or renamed"
    rows = {n: moved_rows(got[n], right[n]) for n in names}
    columns = {n: moved_rows(got[n].T, right[n].T) for n in names if right[n].dim() > 1}
    queries = qkv_sizes(e.run.model)[0]
    if all((moved := rows[n]) and "attention.qkv" in n and min(moved) >= queries for n in names):
        shape = f"{_some(names)}: the rows of keys and values are exchanged with other rows"
        yield shape, "KV heads are assigned to the wrong tensor rank"
    if all(rows[n] or columns.get(n) for n in names):
        shape = f"{_some(names)}: rows or columns have the right values at the wrong places"
        yield shape, "shards are swapped: a tensor rank holds the shard of another"
    meaning = "weights are drawn from another seed or distribution, or sliced or padded at the wrong place"
    yield f"{_some(names)}: differs from the reference before the first step", meaning


def _micro_batches(e: Evidence) -> Findings:
    ran = {len(losses) for losses in e.step.batch_losses}
    if ran != {e.layout.accumulation}:
        numbers = " or ".join(map(str, sorted(ran)))
        meaning = "a micro-batch is dropped, usually the last of a step, or an extra micro-batch is run"
        yield f"{numbers} of {e.layout.accumulation} micro-batches were computed", meaning


_COLUMN_LAYER = "a column layer: its input is not gathered, or its weight's shards are at the wrong place"
# Usual causes of a wrong output on which all tensor ranks agree, by the end of the layer's name.
WRONG_OUTPUT = {
    "embedding": "the look-up in a split vocabulary: its mask or the first row of a shard",
    "patches": "other images are read, or their pixels and channels in another order, or the convolution",
    "positions": "positions offset wrongly, for this stage or for this rank's sequence shard",
    "norm": "the norm: its input, its weight, its epsilon, or the dimension that it reduces",
    "qkv": _COLUMN_LAYER,
    "up": _COLUMN_LAYER,
    "down": "the activation, or a row layer: its shards, its bias added more than once, its reduce-scatter",
    "head": "the projection to the vocabulary: its shards, or a weight that is not tied to the embedding",
}
SUMMED_OVER_TENSOR_RANKS = ("embedding", "attention.output", "mlp.down")


def _forward(e: Evidence) -> Findings:
    names = e.names("output", "output_replica")
    if not names:
        return
    name, stage = names[0], e.step.stage_of.get(names[0], 0)
    where = f"the output of {name}" + (f" on stage {stage}" if e.layout.pipeline > 1 else "")
    where += " is the first wrong output"
    before = [n for n in e.right.outputs if e.step.stage_of.get(n) == stage and n not in names]
    if stage and len(before) <= 2:
        where += f"; all outputs of stage {stage - 1} are right"
    if name in e.names("output_replica"):
        meaning = "tensor ranks compute with different values of a weight that all of them hold"
        if name.endswith(SUMMED_OVER_TENSOR_RANKS):
            partial = f"{name}'s partial results are not summed over the tensor ranks"
            meaning = f"{partial}: an all-reduce is missing"
        yield f"{where}; it differs between tensor ranks", meaning
    if name not in e.step.outputs or name not in e.right.outputs:
        yield f"{where}: it exists in one of the two runs only", "a layer is left out or renamed"
    if name.endswith("attention.output"):
        yield _attention(e, name, where)
    if name == "embedding" and bool((e.step.outputs[name] == 0).all(-1).any()):
        meaning = "partial look-ups are not summed over the tensor ranks"
        meaning += " (under sequence parallelism: by the reduce-scatter)"
        yield f"{where}: tokens in the vocabulary shards of other ranks have output zero", meaning
    if name == "embedding" and (factor := _common_factor(e, name)) is not None:
        meaning = "the scale of the embedding (model.embedding_scale)"
        yield f"{where}: it is the right one times {factor:.3g}", meaning
    if name == "embedding" and "embedding.weight" in e.before.weights and _are_other_tokens(e):
        meaning = "other samples are read: their order, the blend, the first sample, or the place of a window"
        yield f"{where}: it is that of other tokens", meaning
    part = next((part for part in WRONG_OUTPUT if name.endswith(part)), "up")
    yield f"{where}; it is equal on every tensor rank", WRONG_OUTPUT[part]


def _choices(e: Evidence) -> Findings:
    if names := e.names("choice"):
        shape = f"{_some(names)}: a token runs through experts with lower scores than others have"
        meaning = "the router: its logits, the biases for the choice, or tokens and scores in another order"
        yield shape, meaning


def _common_factor(e: Evidence, name: str) -> float | None:
    """Return the factor between an output and the right output; None if there is no common factor."""
    got, right = e.step.outputs[name], e.right.outputs[name]
    factor = float((got * right).sum() / right.square().sum())
    return factor if float((got - factor * right).norm()) <= CLOSE * float(got.norm()) else None


def _are_other_tokens(e: Evidence) -> bool:
    """Return whether every output of the embedding is a row of its weight."""
    rows = e.step.outputs["embedding"].flatten(0, -2)
    table = e.before.weights["embedding.weight"] * e.run.model.embedding_scale
    return bool((torch.cdist(rows, table).amin(1) <= CLOSE * rows.norm(dim=1)).all())


def _attention(e: Evidence, name: str, where: str) -> tuple[str, str]:
    # The first token attends only to itself: its output depends on its value, not on positions or scores.
    got, right = e.step.outputs[name][:, 0], e.right.outputs[name][:, 0]
    if float((got - right).norm()) <= CLOSE * float(right.norm()):
        if e.layout.context > 1:
            return _context_attention(e, name, where)
        meaning = "the attention scores: rotary positions offset (by stage or sequence shard), mask or scale"
        return f"{where}: it is right for the first token and wrong for tokens that attend to others", meaning
    meaning = "heads: values or KV heads of another rank or group, shards of the output weight, or"
    meaning += " (under sequence parallelism) a missing reduce-scatter"
    return f"{where}: it is wrong from the first token on, while queries, keys and values are right", meaning


def _context_attention(e: Evidence, name: str, where: str) -> tuple[str, str]:
    """Return shape and meaning by the wrong chunks of the output; each context rank holds two chunks."""
    pieces = zip(
        e.step.outputs[name].chunk(2 * e.layout.context, 1),
        e.right.outputs[name].chunk(2 * e.layout.context, 1),
        strict=True,
    )
    wrong = [float((got - right).norm()) > CLOSE * float(right.norm()) for got, right in pieces]
    if wrong[-1] and not any(wrong[:-1]):
        shape = f"{where}: it is wrong only in the last chunk of the sequences"
        return shape, "queries of this chunk see later tokens, or not all earlier ones"
    meaning = (
        "attention over context ranks: positions, documents or windows by the place in a rank's part, or"
    )
    shape = f"{where}: it is right for the first token and wrong for tokens that attend to others"
    return shape, f"{meaning} chunks in another order"


def _padding(e: Evidence, above: float, close: float = CLOSE) -> Findings:
    """Yield a diagnosis if a loss is too high by the effect of padding, the same in all micro-batches."""
    multiple = vocabulary_multiple(e.run, e.layout.device)
    size = output_size(e.run.model)
    padding = padded_length(size, e.layout.tensor, multiple) - size
    if padding and "head" in e.right.outputs:
        excess = excess_of_padding(e.right.outputs["head"], padding)
        if abs(above / excess - 1) < close:
            shape = f"losses are {excess:.4f} too high: the effect of {padding} more logits of 0"
            yield f"every output is right and {shape}", "the padding of the vocabulary enters the softmax"


def _loss(e: Evidence) -> Findings:
    names = e.names("batch_loss")
    if not names and e.names("loss"):
        # In bf16 the mean has a tighter bound than each loss.
        of_batches = [mean(chain(*losses)) for losses in (e.step.batch_losses, e.right.batch_losses)]
        if same_losses([e.step.loss], [of_batches[0]]):
            yield from _padding(e, of_batches[0] - of_batches[1], CLOSE_MEAN)
            shape = (
                f"the mean of all losses is {of_batches[0] / of_batches[1]:.5f} times the reference, while "
            )
            shape += "each loss is within its bound"
            yield shape, "an error that all losses share: of the cross-entropy, the head or the final norm"
        words, _ = named_ratio(e.step.loss / e.right.loss, e.layout)
        shape = f"every micro-batch's loss is right and the reported loss is {words}"
        yield shape, "the loss is averaged over the wrong ranks or micro-batches"
    if not names:
        return
    got = e.step.batch_losses
    right = expected_batch_losses(e.run, len(got), e.right)
    for rank in range(1, len(got)):
        if same_losses(got[0], right[0]) and same_losses(got[rank], right[0]):
            shape = f"data rank {rank} reports the losses of data rank 0's samples"
            yield shape, "data ranks read the same samples"
    yield from _padding(e, got[0][0] - right[0][0])
    ratio = common_ratio([(torch.tensor(got), torch.tensor(right))], CLOSE_LOSSES)
    if ratio is not None and abs(ratio - 1) > CLOSE_LOSSES:
        words, axes = named_ratio(ratio, e.layout)
        yield f"every micro-batch's loss is {words}", f"the loss is scaled by {_axes(axes)}"
    if same_losses(sorted(chain(*got)), sorted(chain(*right))):
        shape = "the losses are right but belong to other ranks or micro-batches"
        yield shape, "samples are assigned in another order"
    if e.layout.context > 1 and "data rank 0, micro-batch 0" in names:
        meaning = (
            "labels of context ranks: shifted after the sequence was shared, or each rank divides by the"
        )
        yield "every output is right and the loss of the logits is not", f"{meaning} number of its own labels"
    if "data rank 0, micro-batch 0" in names:
        meaning = (
            "the cross-entropy: a maximum or sum over the vocabulary's shards; or other labels, which are"
        )
        meaning += " not shifted, not masked, or of another sample"
        yield "every output is right and the loss computed from the logits is wrong", meaning
    shape = f"only the losses of {_some(names)} are wrong"
    if {name.partition(",")[0] for name in names} == {"data rank 0"}:
        meaning = "other samples or labels, or the cross-entropy of some labels"
        yield f"{shape}; the outputs of data rank 0's first micro-batch are right", meaning
    yield shape, "these ranks read other samples or hold other weights"


def _replicas(e: Evidence) -> Findings:
    if names := e.names("data_replica"):
        meaning = "gradients are not averaged over the data ranks, or updated weights are not all-gathered"
        yield f"{_some(names)} differs between data ranks after the step", meaning
    if e.names("norm_replica") and e.step.norm_data_spread > 0:
        meaning = "gradients are not averaged over the data ranks"
        yield "data ranks report different gradient norms", meaning
    if e.names("norm_replica"):
        meaning = "the norm is not summed over all shards: each rank clips by the norm of its own shard"
        yield "ranks report different gradient norms", meaning
    if names := e.names("tied_copy"):
        shape = f"{_some(names)}: the copies of this tied weight on different stages are no longer equal"
        yield (
            shape,
            "a tied weight is updated from one stage's gradient only: a sum over its stages is missing",
        )
    names = e.names("replica")
    sharded = [name for name in e.names("gradient") if name not in e.step.replica_spread]
    if names and sharded:
        meaning = "a column layer's input gradient is not summed over the tensor ranks"
        meaning += ": the all-reduce of the backward pass is missing"
        shape = f"{_some(names)} differs between tensor ranks"
        yield f"{shape}, and gradients of {_some(sharded)} are wrong too", meaning
    if names:
        meaning = "gradients of weights that all tensor ranks hold are not summed over tensor ranks"
        meaning += " (norm weights of heads; under sequence parallelism: norms, positions)"
        yield f"{_some(names)} differs between tensor ranks; every sharded weight is right", meaning


def _gradients(e: Evidence) -> Findings:
    names = e.names("gradient")
    if not names:
        return
    got, right = e.step.gradients, e.right.gradients
    ratio = common_ratio([(got[n], right[n]) for n in names])
    if ratio is not None and abs(ratio - 1) > CLOSE:
        words, axes = named_ratio(ratio, e.layout)
        if len(names) < len(right):
            shape = f"gradients of {_some(names)} are {words}; all other gradients are right"
            yield shape, "these gradients lack a sum over ranks, or are summed once too often"
        if not e.names("grad_norm"):
            shape = f"the norm is right and every applied gradient is {words}"
            yield shape, "clipping uses another norm than the reported one, or is left out"
        meaning = f"gradients are scaled by {_axes(axes)}: averaged once too often or not often enough"
        yield f"every gradient is {words}", meaning
    last, queries = names[-1], qkv_sizes(e.run.model)[0]
    if e.layout.context > 1 and last.endswith("attention.qkv.weight"):
        error = (got[last] - right[last])[:queries].norm()
        if float(error) <= CLOSE * float(right[last].norm()):
            shape = f"the gradient of {last} is right for queries and wrong for keys and values"
            meaning = "gradients of keys and values are not summed over the context ranks, or over copies"
            yield shape, f"{meaning} of a head"
    shards = {n: wrong_shards(got[n], right[n], e.layout.tensor) for n in names}
    if all(0 < len(wrong) < e.layout.tensor for wrong in shards.values()):
        shape = f"are wrong only in the shard of tensor rank {shards[names[0]][0]}"
        yield f"gradients of {_some(names)} {shape}", "the place, the mask or the padding of a shard is wrong"
    order = in_forward_order(e.run, list(right))
    later = _some(order[order.index(names[-1]) + 1 :])
    yield (
        f"gradients of {_some(names)} are wrong, and not by a constant ratio; "
        + (f"gradients of {later}, computed earlier, are right" if later else "the loss is right"),
        f"the backward pass goes wrong at {names[-1]}: a missing reduction of an input's gradient, "
        "or some ranks or micro-batches do not contribute to a gradient",
    )


def _rounding(e: Evidence) -> Findings:
    if names := e.names("rounding"):
        shape = f"{_some(names)}: every gradient is right, and the mean of the rounded updates is not"
        yield (
            shape,
            "weights are rounded to nearest, which loses small updates, or by bits that are not uniform",
        )


def _whole(e: Evidence) -> Findings:
    if names := e.names("restored"):
        shape = f"{_some(names)} differs after the checkpoint is restored in another layout"
        yield shape, "saving or restoring: the place of a slice, a state that is not saved, or its precision"
    if e.names("evaluation"):
        meaning = "evaluation: its samples, masked labels, the mean over batches, or dropout that is not off"
        yield "every step is right and the validation loss is wrong", meaning


def _update(e: Evidence) -> Findings:
    # Without a momentum, the updates of the run's own optimizer do not show the gradients.
    are_compared = bool(e.step.gradients)
    if e.names("grad_norm"):
        words, _ = named_ratio(e.step.grad_norm / e.right.grad_norm, e.layout)
        meaning = "the norm is not computed over the logical gradients"
        cause = "shards are left out, or replicas counted twice"
        right = "every gradient is right" if are_compared else "every output and loss is right"
        yield f"{right} and the reported norm is {words}", f"{meaning}: {cause}"
    names = _some(e.names("weight", "state"))
    if not names:
        return
    updates = [
        (e.step.weights[n] - e.before.weights[n], e.right.weights[n] - e.before.weights[n])
        for n in e.names("weight")
        if n in e.before.weights
    ]
    ratio = common_ratio(updates) if updates else None
    if ratio is None and len(updates) == len(e.right.weights):
        ratio = rough_ratio(updates)
    if ratio is not None and abs(ratio - 1) > CLOSE and not e.names("state"):
        words = f"the reference times {ratio:.4f}"
        meaning = "the learning rate, its schedule, or the number of updates that Adam counts"
        right = "gradients and states are right" if are_compared else "the norm is right"
        yield f"{right}, and the update of {names} is {words}", meaning
    right = "the gradients are right, but the update or state computed from them is wrong"
    if not are_compared:
        right = "the norm of the gradients is right, and the update or state is wrong"
    yield (
        f"{names}: {right}",
        "the optimizer, learning rate, weight decay or state differs from the reference",
    )


RULES = (_start, _micro_batches, _forward, _choices, _loss, _replicas, _gradients, _rounding, _update, _whole)


def _axes(names: list[str]) -> str:
    return " or ".join(names) if names else "a constant"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
