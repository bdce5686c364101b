"""`launcher replay`: repeat a step of a run, and show the samples with the highest losses."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from launcher.checkpoint.integrity import read_intact_manifest
from launcher.checkpoint.manifest import (
    UnusableCheckpoint,
    checkpoints_in,
    read_manifest_to_resume,
    step_of,
)
from launcher.commands.ready import ready
from launcher.config.compose import compose_jobs, load_typed
from launcher.config.errors import refusal
from launcher.config.schema import HardwareConfig, ReplayConfig, RunConfig
from launcher.config.validate import validate_replay
from launcher.config.world import world_of_machine
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.launch.this_machine import share_cores, this_machine
from launcher.runtime.metrics.rows import last_step
from launcher.runtime.run_dir import CONFIG, METRICS


def main(arguments: list[str]) -> int:
    for job in compose_jobs("replay", ReplayConfig, arguments):
        _replay(job.config)
    return 0


def _replay(config: ReplayConfig) -> None:
    directory, step = validate_replay(config)
    run_dir = Path(directory).expanduser()
    recorded = load_typed(run_dir / CONFIG, RunConfig)
    check_step_was_taken(config, recorded, run_dir, step)
    checkpoint = checkpoint_before(run_dir, step)
    # One sample per micro-batch: the loss of a micro-batch is then the loss of a sample.
    run = replace(
        recorded,
        parallelism=config.parallelism,
        hardware=HardwareConfig(device=config.device),
        training=replace(recorded.training, micro_batch_size=1),
    )
    machine = this_machine()
    ready_run = ready(run, world_of_machine(run, machine), needs_data=True, must_fit=True)
    layout = ready_run.layout
    share_cores(layout.world_size, machine.cores)
    print(f"layout   {layout.describe()}", flush=True)
    from launcher.runtime.start import preload

    if layout.device == "cpu":
        preload(layout.device)
    from launcher.runtime.replay import replay_rank

    with scratch_directory() as folder:
        target = partial(
            replay_rank, run=ready_run.run, layout=layout, run_dir=run_dir, checkpoint=checkpoint, step=step,
            shown=config.samples, folder=folder,
        )  # fmt: skip
        start_method = start_method_for(layout.device)
        limit = 60 * ready_run.run.launch.timeout_minutes
        run_local_ranks(
            target, layout.world_size, log_dir=folder, start_method=start_method, stopped_limit=limit
        )


def check_step_was_taken(config: ReplayConfig, recorded: RunConfig, run_dir: Path, step: int) -> None:
    """Raise ConfigError for a step that the run has not reached, as far as rows and checkpoints tell."""
    saved = next(map(step_of, checkpoints_in(run_dir)), 0)
    # Steps after the last row may have been taken too, up to the next row.
    reached = max(saved, last_step(run_dir / METRICS) + recorded.logging.interval - 1)
    most = min(reached, recorded.training.steps)
    if step > most:
        why = f"the run in {run_dir} has taken no such step"
        raise refusal(config, "step", why, f"step={max(1, most)} (or less)")


def checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """Return the newest intact checkpoint before `step`; None to begin with the run's first weights."""
    for path in checkpoints_in(run_dir):
        with suppress(UnusableCheckpoint):
            if read_manifest_to_resume(path).step < step:
                read_intact_manifest(path)
                return path
    return None
