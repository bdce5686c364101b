"""The launcher: the engine of a run, its data loader, and the step that the training loop takes."""

from benchmarks.contest.job import AfterStep, Job
from launcher.config.compose import compose_jobs
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed(job.device)
    from launcher.data.open import open_data
    from launcher.engine.build import build_engine
    from launcher.engine.distributed import join
    from launcher.runtime.batches import rank_loader
    from launcher.runtime.resume import start_from
    from launcher.runtime.training import optimizer_step

    run = composed(job.overrides)
    layout = validate(run, World(job.device, job.ranks, job.ranks))
    assert layout.world_size == job.ranks, "the class and its layout differ in ranks"
    device = join(
        rank=rank, world_size=job.ranks, local_rank=rank, device=job.device, init_method=f"file://{job.store}"
    )
    engine, data = build_engine(run, layout, device), open_data(run)
    progress = start_from(run, engine, None, None, data.digests).progress
    with rank_loader(run, engine, data.blend(progress.blends)) as loader:
        while True:
            result = optimizer_step(run, engine, loader, progress)
            progress = progress.after(run.training.global_batch_size)
            after_step(result.loss)


def composed(overrides: list[str]) -> RunConfig:
    [job] = compose_jobs("config", RunConfig, overrides)
    return job.config
