"""The training run of a rank: build the engine, train, log, save, write the final weights.

Values stay on the device until a step is logged (`logging.interval`, and every validation). A logged step
adds one all-reduce to those of the engine (agreement.py). Between logged steps the loop neither reads from
the device nor communicates, unless a stop or a save would be noticed too late (saving.py).
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.checkpoint.companions import COMPANIONS
from launcher.checkpoint.weights import save_weights
from launcher.config.errors import RunStopped, typed_text
from launcher.config.layout import Layout
from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import has_experts, has_lora, sequence_length
from launcher.data.blend import Blend
from launcher.data.loader import Loader
from launcher.data.open import open_data, record_tokenizer
from launcher.engine.base import Engine, StepResult
from launcher.engine.build import build_engine
from launcher.engine.optimizer import learning_rate
from launcher.engine.router_metrics import routing_row
from launcher.engine.watchdog import Watchdog
from launcher.engine.work_time import WorkTime
from launcher.launch.rank import StopRequest
from launcher.launch.records import RankEndKind, record_end
from launcher.launch.stopping import stop_grace
from launcher.models.arithmetic import mfu, step_flops
from launcher.runtime.agreement import RankValues, WorldValues, exchange
from launcher.runtime.batches import rank_loader
from launcher.runtime.excluded import read_excluded
from launcher.runtime.metrics.rows import Row
from launcher.runtime.output import RunOutput
from launcher.runtime.profiling import Profiling, profiled_steps
from launcher.runtime.resume import Progress, start_from
from launcher.runtime.run_dir import PROFILE, RunDir, config_as_dict
from launcher.runtime.session import Parts, Session
from launcher.runtime.spikes import Rollback
from launcher.runtime.validation import is_validation_step, validation_row


def training_run(
    run: RunConfig,
    layout: Layout,
    directory: RunDir,
    device: torch.device,
    work: WorkTime,
    stop: StopRequest | None,
) -> bool:
    """Train to the last step or a stop; return whether the run is finished. Collective over the world."""
    request = stop or StopRequest()
    listening = request if stop is None and stop_grace(run) else nullcontext()
    watchdog = Watchdog(
        directory.logs,
        run.launch.timeout_minutes,
        setting="launch.timeout_minutes",
        on_hang=partial(record_end, dist.get_rank(), RankEndKind.failed),
    )
    with watchdog:
        data = open_data(run)
        is_new = directory.checkpoint is None and directory.initial is None
        # A checkpoint of adapters (LoRA) lacks the frozen weights.
        are_drawn_again = has_lora(run) and run.checkpoint.init_from is None
        engine = build_engine(run, layout, device, drawn=is_new or are_drawn_again)
        if engine.mesh.rank == 0:
            record_tokenizer(run, directory.path / COMPANIONS)
        parts = Parts(run, layout, engine, data, directory, watchdog, work, request)
        outcome: bool | RunDir = directory
        with listening:
            while isinstance(outcome, RunDir):
                outcome = trained(parts, outcome)
    return outcome


def trained(parts: Parts, directory: RunDir) -> bool | RunDir:
    """Train from `directory.checkpoint`, or from new weights; return whether the run is finished.

    After a spike, return instead the directory with the checkpoint to go back to. Collective.
    """
    run, engine = parts.run, parts.engine
    engine.guard.restart()
    excluded = read_excluded(directory.path)
    start = start_from(run, engine, directory.checkpoint, directory.initial, parts.data.digests, excluded)
    progress, last = start.progress, run.training.stop_at or run.training.steps
    with RunOutput(run, parts.layout, directory, progress.step + 1, last, rank=engine.mesh.rank) as output:
        session = Session.create(parts, last, output, progress)
        output.say(*start.notes())
        try:
            step = training_loop(session, progress)
        except Rollback as rollback:
            output.finished = True  # not a failure, although the run is not at its last step
            return replace(directory, checkpoint=rollback.checkpoint)
        except RunStopped:
            # The pending save is of an earlier step, whose state was good. Its thread ends with the process.
            output.note(session.checkpoints.complete())
            raise
        output.finished = finish(session, directory, step)
        return output.finished


def training_loop(session: Session, progress: Progress) -> int:
    """Take the steps after `progress`; return the step at which training ended. Collective over the world."""
    run, engine, last = session.run, session.engine, session.last
    blend = session.data.blend(progress.blends)
    with (
        session.output.display as display,
        rank_loader(run, engine, blend) as loader,
        profiling_of(session, progress.step + 1) as profiling,
    ):
        if last == 0:
            validate_only(session)
        while progress.step < last and not session.checkpoints.stopping:
            session.watchdog.at(f"step {progress.step + 1}")
            step = progress.step + 1
            logged, profiled = is_logged(run, step, last), step in profiling.steps
            measuring = session.plan_check.measuring(session.checkpoints.pending_copy, profiled=profiled)
            with measuring, session.clock.step(logged=logged), profiling.step(step):
                result = optimizer_step(run, engine, loader, progress)
                session.clock.times.data_wait += loader.waited
            if profiled and step == profiling.steps[-1]:
                session.clock.synchronise()
                profiling.finish()
            progress = progress.after(run.training.global_batch_size)
            if logged or session.checkpoints.needs_agreement(progress.step):
                end_step(session, progress, blend, result)
            else:
                display.step(progress.step, None)
        session.output.note(session.checkpoints.close())
    return progress.step


def profiling_of(session: Session, first: int) -> Profiling:
    """Return the profiling of a start that begins with the step `first`."""
    steps = profiled_steps(session.run.profile, first, session.last)
    collectives, directory = session.work.collectives, session.directory / PROFILE
    return Profiling(steps, session.engine, collectives, session.output, directory)


def optimizer_step(run: RunConfig, engine: Engine, loader: Loader, progress: Progress) -> StepResult:
    step = progress.step + 1
    engine.set_learning_rate(rate_of(run, step))
    engine.random.begin_step(step)
    batches = loader.step(progress.samples) if engine.reads_data else []
    return engine.train_batch(batches, loader.labels)


def end_step(session: Session, progress: Progress, blend: Blend, result: StepResult) -> None:
    """Validate, agree with the other ranks, log and save, each if it is due. Collective over the world.

    Raises Rollback after a spike, and RunStopped if a guard ends the run.
    """
    run, checkpoints, step = session.run, session.checkpoints, progress.step
    session.clock.synchronise()
    scores: Row = {}
    if is_validation_step(run, step, session.last):
        session.watchdog.at(f"the validation after step {step}")
        scores = validation_row(run, session.engine, session.data, step)
    agreed = exchange(
        RankValues(
            result.loss,
            session.engine.loss_share,
            session.engine.guard.counts,
            stop_requested=session.stop.asked,
            save_due=checkpoints.is_overdue,
            step_seconds=session.clock.times.per_step,
            work_seconds=session.clock.work_seconds,
            allocated_bytes=session.plan_check.allocated_bytes,
            compile_failed=session.engine.blocks.problem is not None,
        )
    )
    session.output.say(*session.nonfinite.after(progress, agreed, blend))
    row = None
    if is_logged(run, step, session.last):
        plan_row, lines = session.plan_check.after(session.clock.times, agreed.allocated_bytes)
        compile_row, compile_lines = session.compile_report.after(agreed.compile_failed)
        row = training_row(session, progress, result, agreed) | compile_row
        times = session.clock.times
        slow_row, warnings = session.slow_rank.after(agreed.work_seconds, times.per_step, times.steps)
        if has_experts(run.model):
            row |= routing_row(session.engine, run.model)
        row |= plan_row | slow_row | scores | memory_row(agreed) | epochs(blend, progress)
        session.output.say(*compile_lines, *lines, *warnings)
        session.output.log(row)
        session.after_spikes(progress, row)
        session.clock.restart()
    session.output.display.step(step, row)
    session.watchdog.at(f"the end of step {step}")
    is_last = step == session.last
    history = session.spikes.detector.history
    notes = checkpoints.after_step(progress, agreed, scores.get("val/loss"), history, last=is_last)
    session.output.note(notes)


def finish(session: Session, directory: RunDir, step: int) -> bool:
    """Write the final weights, or tell how a stopped run continues; return whether the run finished."""
    output = session.output
    if step < session.last:
        settings = to_resume(session.run, directory.path)
        output.say(f"stopped  at step {step}. To resume: the same command, {settings}")
        return False
    if session.last > 0:
        session.watchdog.at("the final weights")
        output.say(f"weights  {final_weights(session, directory, step)}")
    output.say_where()
    return True


def to_resume(run: RunConfig, run_dir: Path) -> str:
    """Return the settings with which the same command resumes the run."""
    resumes = " checkpoint.resume=auto" if run.checkpoint.resume == "none" else ""
    return typed_text("run.dir", str(run_dir)) + resumes


def final_weights(session: Session, directory: RunDir, step: int) -> Path:
    return save_weights(
        session.engine, directory.path, step, config_as_dict(session.run), loss_of_directory=directory.loss
    )


def validate_only(session: Session) -> None:
    """Log the validation loss of a run of no steps. Collective over the world."""
    session.watchdog.at("the validation")
    scores = validation_row(session.run, session.engine, session.data, 0)
    no_loss = torch.zeros((), device=session.engine.device)
    values = RankValues(no_loss, (0, 1), session.engine.guard.counts)
    session.output.log({"step": 0, **scores, **memory_row(exchange(values))})
    session.output.say(f"validation loss {scores['val/loss']:.4f}")


def is_logged(run: RunConfig, step: int, last: int) -> bool:
    return step % run.logging.interval == 0 or is_validation_step(run, step, last)


def rate_of(run: RunConfig, step: int) -> float:
    return learning_rate(run.optimizer, run.scheduler, step=step, steps=run.training.steps)


def training_row(session: Session, progress: Progress, result: StepResult, agreed: WorldValues) -> Row:
    """Return the metrics of a logged step; times are means over the steps since the logged step before.

    Without a step that did not compile there are no times.
    """
    run, times, length = session.run, session.clock.times, sequence_length(session.run)
    row: Row = {
        "step": progress.step,
        "train/loss": agreed.loss,
        "train/grad_norm": float(result.grad_norm),
        "guard/skipped": progress.skipped + agreed.skips[0],
        "train/lr": rate_of(run, progress.step),
        "train/samples": progress.samples,
        "train/tokens": progress.samples * length,
    }
    if run.data.source is CorpusSource.chat and result.labels is not None:
        row["train/labels"] = result.labels
    if times.steps:
        row |= performance(run, session.layout, length, times.per_step)
        row["perf/data_wait"] = times.data_wait / times.seconds
    return row


def performance(run: RunConfig, layout: Layout, length: int, elapsed: float) -> Row:
    """Return the speed of a step of `elapsed` seconds over all ranks; MFU if the hardware's peak is known."""
    row: Row = {
        "perf/step_time_s": elapsed,
        "perf/tokens_per_s": run.training.global_batch_size * length / elapsed,
        "perf/flops_per_s": step_flops(run) / elapsed,
    }
    utilisation = mfu(run, layout.world_size, elapsed)
    return row if utilisation is None else row | {"perf/mfu": utilisation}


def memory_row(agreed: WorldValues) -> Row:
    return {"memory/peak_bytes": agreed.peak_bytes, "memory/peak_rank": agreed.peak_rank}


def epochs(blend: Blend, progress: Progress) -> Row:
    """Return how often the run has gone through its data, or through each source of a blend."""
    counts = blend.epochs(progress.samples)
    return {f"data/epochs/{source}" if source else "data/epochs": count for source, count in counts.items()}
