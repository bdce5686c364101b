"""One rank's training run: build the engine, loop, log, write the final weights."""

import resource
import sys
import time
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from launcher.checkpoint.companions import COMPANIONS
from launcher.checkpoint.weights import save_weights
from launcher.config.errors import as_typed
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.data.blend import Blend
from launcher.data.loader import Loader
from launcher.data.open import ONLY, open_data, record_tokenizer
from launcher.data.sampler import Samples, Source, sample_indices
from launcher.engine.base import Engine, MicroBatches
from launcher.engine.build import build_engine
from launcher.engine.optimizer import learning_rate
from launcher.launch.rank import StopRequest
from launcher.models.arithmetic import train_flops_per_token
from launcher.runtime.expectation import Expectation
from launcher.runtime.metrics.log import MetricsLog
from launcher.runtime.metrics.rows import Row
from launcher.runtime.progress import ProgressDisplay
from launcher.runtime.run_dir import RunDir, stop_grace
from launcher.runtime.saving import Checkpoints, Progress, start_from
from launcher.runtime.watchdog import Watchdog

_RANK_BITS = 24


def train(
    run: RunConfig, layout: Layout, directory: RunDir, device: torch.device, stop: StopRequest | None
) -> bool:
    """Train to the last step, or until told to stop: whether it is finished. Collective over the world.

    Rank 0 logs and shows progress. `stop` is one that the caller listens with already; without one, stops are
    listened for between the first step and the last.
    """
    with Watchdog(directory.path, run.launch.timeout_minutes) as watchdog:
        return _train(run, layout, directory, device, stop, watchdog)


def _train(
    run: RunConfig,
    layout: Layout,
    directory: RunDir,
    device: torch.device,
    stop: StopRequest | None,
    watchdog: Watchdog,
) -> bool:
    data = open_data(run)
    engine = build_engine(run, layout, device)
    progress, taken = start_from(run, engine, directory.checkpoint, directory.initial, data.digests)
    training = data.blend(progress.blends)
    last = run.training.stop_at or run.training.steps
    own_stop = StopRequest()
    listening = own_stop if stop is None and stop_grace(run) else nullcontext()
    checkpoints = Checkpoints(run, layout, engine, directory, data.digests, stop or own_stop)

    if engine.mesh.rank == 0:
        record_tokenizer(run, directory.path / COMPANIONS)
    expectation = Expectation(run, layout, device)
    log = MetricsLog(run, layout, directory, progress.step + 1) if engine.mesh.rank == 0 else None
    failed = True
    try:
        _say(log, *(log.notes if log else []))
        _say(log, *new_blend(progress))
        if taken:
            _say(log, f"resumed  {taken}, at step {progress.step}" if progress.step else f"begun    {taken}")
        display = ProgressDisplay(last) if log else _Silent()
        with listening, display, loader_of(run, engine, training) as loader:
            if last == 0:
                watchdog.at("the validation")
                row = {
                    "step": 0,
                    **validated(run, engine, data.validation, "val/loss"),
                    **peak_memory(device),
                }
                if log:
                    log.write(row)
                _say(log, f"validation loss {row['val/loss']:.4f}")
            while progress.step < last and not checkpoints.stopping:
                watchdog.at(f"step {progress.step + 1}")
                if expectation.counts_next:
                    _note(log, checkpoints.close())  # whose copy is not the step's
                with expectation.watching():
                    row = train_step(run, layout, engine, loader, progress)
                beside, told = expectation.after(row["perf/step_time_s"])
                row |= beside
                _say(log, *told)
                progress = progress.after(run.training.global_batch_size)
                if is_validation_step(run, progress.step, last):
                    watchdog.at(f"the validation after step {progress.step}")
                    row |= validated(run, engine, data.validation, "val/loss")
                    if progress.step == run.training.steps and data.test:
                        row |= validated(run, engine, data.test, "test/loss")
                if progress.step % run.logging.interval == 0 or "val/loss" in row:
                    row |= peak_memory(device) | epochs(training, progress)
                    if log:
                        log.write(row)
                display.step(row)
                watchdog.at(f"the end of step {progress.step}")
                is_last = progress.step == last
                _note(log, checkpoints.after_step(progress, row.get("val/loss"), last=is_last))
            _note(log, checkpoints.close())
        finished = progress.step == last
        if not finished:
            _say(log, f"stopped  at step {progress.step}: the same with run.dir={directory.path} goes on")
        elif last > 0:
            watchdog.at("the final weights")
            weights = save_weights(engine, directory.path, progress.step)
            _say(log, f"weights  {weights}")
        if finished and log:
            _say(
                log,
                f"metrics  {directory.metrics}",
                *[f"W&B      {where}" for where in [log.where()] if where],
            )
        failed = not finished
    finally:
        if log:
            log.close(failed=failed)
    return finished


def train_step(
    run: RunConfig,
    layout: Layout,
    engine: Engine,
    loader: Loader,
    progress: Progress,
) -> Row:
    """The optimizer step after `progress`, and its row of metrics. Collective over the world."""
    step, length = progress.step + 1, sequence_length(run)
    rate = learning_rate(run.optimizer, run.scheduler, step=step, steps=run.training.steps)
    engine.set_learning_rate(rate)
    engine.random.begin_step(step)
    started = time.perf_counter()
    result = engine.train_batch(loader.step(progress.samples) if engine.reads_data else [])
    elapsed = time.perf_counter() - started
    seen = progress.samples + run.training.global_batch_size
    return {
        "step": step,
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/lr": rate,
        "train/samples": seen,
        "train/tokens": seen * length,
        **performance(run, layout, length, elapsed),
        "perf/data_wait": loader.waited / elapsed,
    }


def performance(run: RunConfig, layout: Layout, length: int, elapsed: float) -> Row:
    """Speed of a step of `elapsed` seconds over all ranks; MFU only where the hardware's peak is known."""
    tokens_per_s = run.training.global_batch_size * length / elapsed
    flops_per_s = tokens_per_s * train_flops_per_token(run.model, length)
    row: Row = {
        "perf/step_time_s": elapsed,
        "perf/tokens_per_s": tokens_per_s,
        "perf/flops_per_s": flops_per_s,
    }
    peak = getattr(run.hardware.peak_flops, run.precision.dtype.value)
    if peak is not None:
        row["perf/mfu"] = flops_per_s / (peak * layout.world_size)
    return row


def validated(run: RunConfig, engine: Engine, parts: dict[str, Samples], name: str) -> Row:
    """Each source's loss and, of a blend, their mean by its weights. Collective over the world."""
    losses = {source: validation_loss(run, engine, samples) for source, samples in parts.items()}
    accuracy = engine.accuracy()
    weights = {source: run.data.weights.get(source, 1.0) for source in losses}
    mean = sum(weights[source] * losses[source] for source in losses) / sum(weights.values())
    row: Row = {name: mean, **{f"{name}/{source}": loss for source, loss in losses.items() if source != ONLY}}
    return row if accuracy is None else row | {name.replace("loss", "accuracy"): accuracy}


def epochs(training: Blend, progress: Progress) -> Row:
    """How often the run has gone through its data, or each source of a blend."""
    counts = training.epochs(progress.samples)
    return {f"data/epochs/{source}" if source else "data/epochs": count for source, count in counts.items()}


def new_blend(progress: Progress) -> list[str]:
    """What to tell of a blend that counts from here on."""
    if len(progress.blends) < 2 or progress.blends[-1].start != progress.samples:
        return []
    before, now = (as_typed(blend.weights) for blend in progress.blends[-2:])
    return [f"note     a new blend from sample {progress.samples} on: {now} (until then {before})"]


def validation_loss(run: RunConfig, engine: Engine, samples: Samples) -> float:
    """The mean loss over the first validation batches: the same samples every time, in every layout."""
    batches = max(1, min(run.training.validation_batches, len(samples) // run.training.global_batch_size))
    size = run.training.global_batch_size
    losses = [engine.eval_batch(global_batch(run, engine, samples, n * size)) for n in range(batches)]
    return sum(losses) / batches


def is_validation_step(run: RunConfig, step: int, last: int) -> bool:
    """At intervals and at the end; after the first step too, to see where it started, and that it works."""
    interval = run.training.validation_interval
    return step == last or (interval > 0 and (step == 1 or step % interval == 0))


def loader_of(run: RunConfig, engine: Engine, training: Source) -> Loader:
    """What reads this data rank's batches, ahead of the steps."""
    return Loader(
        training,
        lambda consumed: own_samples(run, engine, consumed),
        global_batch_size=run.training.global_batch_size,
        threads=run.data.num_workers,
        ahead=run.data.prefetch,
    )


def global_batch(run: RunConfig, engine: Engine, samples: Source, consumed: int) -> MicroBatches:
    """This data rank's micro-batches of the global batch after `consumed` samples."""
    return map(samples.take, own_samples(run, engine, consumed))


def own_samples(run: RunConfig, engine: Engine, consumed: int) -> npt.NDArray[np.int64]:
    """Which samples (A, B) of the global batch after `consumed` are this data rank's."""
    return sample_indices(
        samples_consumed=consumed,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        data_rank=engine.mesh.data.rank,
        data_size=engine.mesh.data.size,
    )


def peak_memory(device: torch.device) -> Row:
    """The largest peak over the ranks, and whose. Collective over the world: one all-reduce of a number.

    On CUDA what torch allocated, on CPU the process's resident set; both in bytes, since its start.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    packed = torch.tensor((peak << _RANK_BITS) + dist.get_rank(), dtype=torch.int64, device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    highest = int(packed)
    return {"memory/peak_bytes": highest >> _RANK_BITS, "memory/peak_rank": highest & ((1 << _RANK_BITS) - 1)}


class _Silent:
    """The display of the ranks that show nothing."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, row: Row) -> None:
        pass


def _note(log: MetricsLog | None, notes: list[str]) -> None:
    _say(log, *[f"note     {note}" for note in notes])


def _say(log: MetricsLog | None, *lines: str) -> None:
    if log:
        for line in lines:
            print(line, flush=True)
