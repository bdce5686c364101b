"""Warnings about a learning-rate schedule that does not fit the run. Pure."""

from launcher.config.schema import RunConfig


def schedule_warnings(run: RunConfig) -> list[str]:
    """Return a warning with a remedy if the learning rate never reaches its height, else nothing."""
    warmup, steps = run.scheduler.warmup_steps, run.training.steps
    if not 0 < steps <= warmup:
        return []
    what = f"scheduler.warmup_steps={warmup}: the warm-up lasts longer than training.steps={steps}"
    if warmup == steps:
        what = f"scheduler.warmup_steps={warmup}: the warm-up takes all of training.steps={steps}"
    highest = f"the learning rate ends at {run.optimizer.lr * steps / warmup:.3g}, and never decays"
    return [f"{what}: {highest}\n  try: scheduler.warmup_steps={steps // 10}"]
