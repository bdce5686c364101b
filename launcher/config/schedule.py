"""Warnings about a learning-rate schedule that does not fit the run. Pure."""

from collections.abc import Mapping

from launcher.config.schema import RunConfig

_FIELD = "scheduler.warmup_steps"


def schedule_warnings(run: RunConfig, origins: Mapping[str, str]) -> list[str]:
    """Return what to print if the learning rate never reaches its height: `warning` or `note`, and the text.

    `origins` are those of the job. A warm-up that the user or an experiment has chosen is a warning with a
    remedy. The default of a scheduler is a note of one line: such a run is a short trial.
    """
    warmup, steps = run.scheduler.warmup_steps, run.training.steps
    if not 0 < steps <= warmup:
        return []
    end = f"the learning rate ends at {run.optimizer.lr * steps / warmup:.3g}"
    if origins.get(_FIELD, "").startswith("the shipped scheduler/"):
        return [f"note     the run ends during the warm-up ({_FIELD}={warmup}): {end}"]
    why = "lasts longer than" if warmup > steps else "takes all of"
    problem = f"{_FIELD}={warmup}: the warm-up {why} training.steps={steps}"
    return [f"warning  {problem}: {end}, and never decays\n  try: {_FIELD}={steps // 10}"]
