"""The whole run: its files, sample order, labels, schedule, clipping, evaluation and a checkpoint.

The ranks take two steps with the functions of the training loop, evaluate, save, and end. Ranks of another
layout restore the checkpoint and take a third step. The reference reads tokens, conversations or images in
the plainest way (parity/plain_data.py) and computes the learning rate by its formula.
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.checkpoint.load import restore
from launcher.checkpoint.manifest import Manifest, checkpoints_in, read_manifest
from launcher.checkpoint.save import CheckpointWriter
from launcher.config.layout import Layout
from launcher.config.schema import (
    ActivationCheckpointing,
    CheckpointConfig,
    PipelineSchedule,
    RunConfig,
    SchedulerName,
)
from launcher.data.open import blend_of, open_data
from launcher.engine.base import Engine
from launcher.engine.optimizer import state_keys
from launcher.engine.state import updates_made
from launcher.parity.differences import Difference
from launcher.parity.outputs import OutputRecorder
from launcher.parity.perturb import perturb
from launcher.parity.plain_data import blend_weights, training_batch, validation_batch
from launcher.parity.plain_source import PlainSource
from launcher.parity.recording import rank_engine, record_weights, recorded_states, recorded_step
from launcher.parity.reference import GlobalBatch, mean_loss
from launcher.parity.rounding import Arithmetic
from launcher.parity.routing import biases_in
from launcher.parity.step_trace import StepTrace, write_trace
from launcher.runtime.batches import rank_loader
from launcher.runtime.resume import Progress
from launcher.runtime.training import optimizer_step
from launcher.runtime.validation import loss_row

STEPS, TOTAL = 2, 4  # steps before the save, and of the whole schedule; one step follows the save
FIRST_SAMPLE = 31  # samples consumed before the first step: both sources are in their second epoch
UNCLIPPED = 1e4  # a limit above every gradient norm: the other passes clip
EVALUATION = "evaluation.json"


def whole_run(run: RunConfig, small: RunConfig) -> RunConfig:
    """Return the small run with the schedule of `run`, warm-up of two steps, and inactive clipping."""
    whole = replace(small, training=replace(small.training, steps=TOTAL, validation_batches=2, compile=False))
    whole.scheduler = replace(run.scheduler, warmup_steps=2)
    if run.scheduler.name is SchedulerName.wsd:
        whole.scheduler.decay_steps = 1
    clips = run.optimizer.gradient_clipping is not None
    whole.optimizer = replace(small.optimizer, gradient_clipping=UNCLIPPED if clips else None)
    return whole


def other_layout(run: RunConfig) -> RunConfig:
    """Return the run on one rank."""
    p = run.parallelism
    other = replace(
        p, tensor=1, pipeline=1, data=1, expert=1, context=1, sequence_parallel=False, zero_stage=0,
        offload_optimizer=False, offload_parameters=False, pipeline_schedule=PipelineSchedule("1f1b"),
        activation_checkpointing=ActivationCheckpointing.none,
    )  # fmt: skip
    return replace(run, parallelism=other)


def record_whole(rank: int, *, run: RunConfig, layout: Layout, folder: Path) -> None:
    """Take the steps before the save, or the step after it if there is a checkpoint. Collective (world)."""
    with rank_engine(rank, run, layout, folder) as (engine, watchdog):
        perturb(engine, run.training.seed)
        recorder = OutputRecorder(engine, run.parallelism.sequence_parallel, run.parallelism.context_method)
        data, saved = open_data(run), checkpoints_in(folder)
        progress, count = Progress(samples=FIRST_SAMPLE, blends=(blend_of(run),)), STEPS
        if saved:
            manifest = read_manifest(saved[0])
            restore(engine, saved[0], manifest, state_keys(run.optimizer))
            progress, count = replace(progress, step=manifest.step, samples=manifest.samples), 1
        steps = [record_weights(engine)]
        if saved:
            steps[0].states = recorded_states(run, engine)
        with rank_loader(run, engine, data.blend(progress.blends)) as loader:
            for _ in range(count):
                watchdog.at(f"step {progress.step + 1}")
                take = partial(optimizer_step, run, engine, loader, progress)
                steps.append(recorded_step(run, engine, recorder, take))
                progress = progress.after(run.training.global_batch_size)
        if engine.mesh.data.rank == 0 and engine.mesh.tensor.rank == 0:
            write_trace(steps, folder / f"{'after' if saved else 'stage'}-{engine.mesh.stage}")
        if not saved:
            watchdog.at("the evaluation")
            row = loss_row(run, engine, data.validation, "val/loss")
            if rank == 0:
                (folder / EVALUATION).write_text(json.dumps(row["val/loss"]))
            watchdog.at("the checkpoint")
            _save(run, layout, engine, progress, folder)


def _save(run: RunConfig, layout: Layout, engine: Engine, progress: Progress, folder: Path) -> None:
    writer = CheckpointWriter(engine, CheckpointConfig(), folder, state_keys(run.optimizer))
    fields: dict[str, Any] = {key: {} for key in ("scaler", "corpus", "config", "tensors", "files")}
    fields |= {"step": progress.step, "samples": progress.samples}
    fields |= {"updates": updates_made(engine), "launcher": __version__, "layout": layout.describe()}
    writer.save(Manifest(**fields, validation_loss=None))
    writer.wait()


def rate_of(run: RunConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1, by the formula of its schedule."""
    s, peak = run.scheduler, run.optimizer.lr
    if step <= s.warmup_steps:
        return peak * step / s.warmup_steps
    if s.name is SchedulerName.constant:
        return peak
    length = s.decay_steps if s.name is SchedulerName.wsd else TOTAL - s.warmup_steps
    assert length
    done = max(0, step - (TOTAL - length)) / length
    falls = 0.5 + 0.5 * math.cos(math.pi * done) if s.name is SchedulerName.cosine else 1 - done
    return peak * (s.min_lr_ratio + (1 - s.min_lr_ratio) * falls)


def whole_batches(run: RunConfig, sources: dict[str, PlainSource]) -> list[GlobalBatch]:
    """Return the global batch of each step, also of the step after the checkpoint."""
    size = run.training.global_batch_size
    return [training_batch(run, sources, FIRST_SAMPLE + number * size) for number in range(STEPS + 1)]


def expected_evaluation(
    run: RunConfig, step: StepTrace, sources: dict[str, PlainSource], a: Arithmetic
) -> float:
    """Return the mean over the blend of the loss of each source's validation samples."""
    weights, biases = step.weights, biases_in(step.states)
    losses = {
        name: mean_loss(run, weights, biases, validation_batch(run, source), a)
        for name, source in sources.items()
    }
    shares = blend_weights(run)
    return sum(shares[name] * loss for name, loss in losses.items()) / sum(shares.values())


def compare_restored(saved: StepTrace, restored: StepTrace) -> list[Difference]:
    """Compare weights and optimizer states before a save and after a restore: bit by bit."""
    differences = []
    for kind in ("weights", "states"):
        ours, theirs = getattr(restored, kind), getattr(saved, kind)
        for name in sorted({*ours, *theirs}):
            alike = name in ours and name in theirs and ours[name].shape == theirs[name].shape
            measured = float((ours[name] - theirs[name]).abs().max()) if alike else math.inf
            differences.append(Difference(STEPS, "restored", name, measured, 0.0))
    return differences
