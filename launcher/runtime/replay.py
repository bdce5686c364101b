"""Repeat a step of a run in any layout: its loss, and the samples behind it (`launcher replay`)."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import GenerateConfig, InputKind, RunConfig
from launcher.data.blend import Blend
from launcher.data.open import Data, open_data
from launcher.engine.base import Engine
from launcher.engine.build import build_engine
from launcher.engine.distributed import join, leave, prepare_deepspeed
from launcher.engine.examination import micro_batch_losses
from launcher.runtime.batches import counted_labels, rank_batches, rank_loader, rank_samples
from launcher.runtime.excluded import SampleRange, past_excluded, read_excluded
from launcher.runtime.resume import Progress, start_from
from launcher.runtime.sampling import tokenizer_of
from launcher.runtime.spikes import SpikeGuard
from launcher.runtime.training import is_logged, optimizer_step

_EXCERPT = 120  # characters of a sample's text
_DETAILED = 3  # samples of which all text is printed


@dataclass(frozen=True)
class SampleLoss:
    sample: int
    loss: float


def replay_rank(
    rank: int,
    *,
    run: RunConfig,
    layout: Layout,
    run_dir: Path,
    checkpoint: Path | None,
    step: int,
    shown: int,
    folder: Path,
) -> None:
    """Train up to `step` without saving anything, and print the step's losses by sample on rank 0."""
    prepare_deepspeed(layout.device)
    device = join(
        rank=rank, world_size=layout.world_size, local_rank=rank, device=layout.device,
        init_method=f"file://{folder / 'store'}", timeout_minutes=run.launch.timeout_minutes,
    )  # fmt: skip
    data, engine = open_data(run), build_engine(run, layout, device, drawn=checkpoint is None)
    progress = trained_until(run, engine, data, started(run, engine, data, run_dir, checkpoint, step), step)
    blend = data.blend(progress.blends)
    losses, norm = sample_losses(run, engine, blend, progress)
    if rank == 0:
        since = f"from {checkpoint.name} on" if checkpoint else "from the first weights on"
        print(f"replay   step {step} of {run_dir}, {since}")
        print("\n".join(report(run, run_dir, blend, losses, norm, shown)), flush=True)
    leave()


def started(
    run: RunConfig, engine: Engine, data: Data, run_dir: Path, checkpoint: Path | None, step: int
) -> Progress:
    """Restore the checkpoint, or begin with the run's first weights. Collective over the world."""
    progress = start_from(run, engine, checkpoint, None, data.digests).progress
    # Later rollbacks leave out later samples.
    ranges = tuple(sorted({*progress.excluded, *read_excluded(run_dir)}))
    return as_first_taken(progress, ranges, step, run.training.global_batch_size)


def as_first_taken(
    progress: Progress, ranges: tuple[SampleRange, ...], step: int, global_batch_size: int
) -> Progress:
    """Return `progress` with the ranges that were already excluded when the run first took `step`. Pure.

    `ranges` are all excluded ranges, in the order of their rollbacks.
    """
    for count, (start, end) in enumerate(ranges):
        then = leaving_out(progress, ranges[:count])
        if start <= then.at_step(step - 1, global_batch_size).samples < end:
            return then  # the next rollback left out the samples of this step
    return leaving_out(progress, ranges)


def leaving_out(progress: Progress, ranges: tuple[SampleRange, ...]) -> Progress:
    return replace(progress, samples=past_excluded(progress.samples, ranges), excluded=ranges)


def trained_until(run: RunConfig, engine: Engine, data: Data, progress: Progress, step: int) -> Progress:
    """Take the steps before `step` as the run took them. Collective over the world."""
    spikes = SpikeGuard(run, engine, progress.history)
    with rank_loader(run, engine, data.blend(progress.blends)) as loader:
        while progress.step < step - 1:
            result = optimizer_step(run, engine, loader, progress)
            progress = progress.after(run.training.global_batch_size)
            if is_logged(run, progress.step, run.training.steps):
                row = {
                    "train/loss": engine.mean_loss(result.loss),
                    "train/grad_norm": float(result.grad_norm),
                }
                spikes.after(row)
    return progress


def sample_losses(
    run: RunConfig, engine: Engine, blend: Blend, progress: Progress
) -> tuple[list[SampleLoss], float]:
    """Repeat the next step without its update: the loss of each sample, the gradient norm. Collective."""
    batches = list(rank_batches(run, engine, blend, progress.samples)) if engine.reads_data else []
    labels = counted_labels(run, blend, progress.samples)
    losses, norm = micro_batch_losses(engine, progress.step + 1, batches, labels)
    samples = rank_samples(run, engine, progress.samples).ravel().tolist()
    mine = [SampleLoss(*pair) for pair in zip(samples, losses, strict=False)]
    if engine.mesh.tensor.rank:
        mine = []  # all tensor ranks have the same losses
    gathered: list[list[SampleLoss]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    by_sample: dict[int, list[float]] = {}
    for sample_loss in (sample_loss for part in gathered for sample_loss in part):
        by_sample.setdefault(sample_loss.sample, []).append(sample_loss.loss)
    # Each context rank has the loss of its part of a sample, as a share of their mean.
    means = [SampleLoss(sample, sum(losses) / len(losses)) for sample, losses in by_sample.items()]
    return sorted(means, key=lambda sample_loss: sample_loss.loss, reverse=True), norm


def report(
    run: RunConfig, run_dir: Path, blend: Blend, losses: list[SampleLoss], norm: float, shown: int
) -> list[str]:
    """Return the lines: loss and norm of the step, then the samples with the highest losses."""
    mean = sum(sample_loss.loss for sample_loss in losses) / len(losses)
    lines = [f"loss     {mean:.4f} over {len(losses)} samples, gradient norm {norm:.4g}", ""]
    lines.append(f"{'sample':>10}  {'loss':>8}  content")
    for place, sample_loss in enumerate(losses[:shown]):
        content = content_of(run, run_dir, blend, sample_loss.sample)
        excerpt = content if place < _DETAILED else content[:_EXCERPT]
        lines.append(f"{sample_loss.sample:>10}  {sample_loss.loss:>8.4f}  {excerpt}")
    return lines


def content_of(run: RunConfig, run_dir: Path, blend: Blend, sample: int) -> str:
    """Return the text of a sample, quoted, or the class of an image."""
    batch = blend.take(np.array([sample]))
    if run.model.inputs is InputKind.patches:
        return f"image of class {int(batch[1][0])}"
    try:
        tokenizer = tokenizer_of(run, GenerateConfig(), run_dir)
    except ConfigError:
        return f"tokens {batch[0].tolist()}"
    return repr(tokenizer.decode(batch[0].tolist()))
