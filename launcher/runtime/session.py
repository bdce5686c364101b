"""The parts of a run that every step uses."""

from dataclasses import dataclass
from pathlib import Path

from launcher.config.layout import Layout
from launcher.config.schema import OnSpike, RunConfig
from launcher.data.open import Data
from launcher.engine.base import Engine
from launcher.engine.watchdog import Watchdog
from launcher.engine.work_time import WorkTime
from launcher.launch.rank import StopRequest
from launcher.runtime.compile_report import CompileReport
from launcher.runtime.metrics.rows import Row
from launcher.runtime.nonfinite import NonfiniteGuard
from launcher.runtime.output import RunOutput
from launcher.runtime.plan_check import PlanCheck
from launcher.runtime.resume import Progress
from launcher.runtime.run_dir import RunDir
from launcher.runtime.saving import Checkpoints
from launcher.runtime.slow_rank import SlowRankWatch
from launcher.runtime.spikes import Rollback, SpikeGuard, checkpoint_before_spike
from launcher.runtime.step_clock import StepClock


@dataclass(frozen=True)
class Parts:
    """The parts that a rank builds once per process, whatever the number of rollbacks."""

    run: RunConfig
    layout: Layout
    engine: Engine
    data: Data
    directory: RunDir
    watchdog: Watchdog
    work: WorkTime
    stop: StopRequest


@dataclass
class Session:
    """The parts of a run that every step uses, on one rank."""

    run: RunConfig
    layout: Layout
    engine: Engine
    data: Data
    directory: Path
    last: int  # the step at which this start ends
    watchdog: Watchdog
    output: RunOutput
    checkpoints: Checkpoints
    plan_check: PlanCheck
    clock: StepClock
    work: WorkTime
    compile_report: CompileReport
    slow_rank: SlowRankWatch
    nonfinite: NonfiniteGuard
    spikes: SpikeGuard
    stop: StopRequest

    @classmethod
    def create(cls, parts: Parts, last: int, output: RunOutput, progress: Progress) -> "Session":
        """Return the parts of a start that begins at `progress` and ends at the step `last`."""
        run, layout, engine, data = parts.run, parts.layout, parts.engine, parts.data
        check = PlanCheck(run, layout, engine.device)
        return cls(
            run,
            layout,
            engine,
            data,
            parts.directory.path,
            last,
            parts.watchdog,
            output,
            Checkpoints(run, layout, engine, parts.directory, data.digests),
            check,
            StepClock(engine.device, parts.work, lambda: engine.blocks.seconds),
            parts.work,
            CompileReport(engine.blocks),
            SlowRankWatch(parts.watchdog.hosts, check.flops, run.launch.slow_rank_seconds),
            NonfiniteGuard(run, engine, progress),
            SpikeGuard(run, engine, progress.history),
            parts.stop,
        )

    def after_spikes(self, progress: Progress, row: Row) -> None:
        """Judge a logged step, and apply guard.spike to its spikes. Collective over the world.

        Raises Rollback if the run goes back to a checkpoint, and RunStopped after too many rollbacks.
        """
        spikes = self.spikes.after(row)
        if spikes and self.run.guard.spike is OnSpike.rollback:
            self._go_back(progress, f"step {progress.step}: {' and '.join(spikes)}")
        else:
            self.output.say(*[f"warning  step {progress.step}: {spike}" for spike in spikes])

    def _go_back(self, progress: Progress, words: str) -> None:
        """Raise Rollback; only warn if there is no checkpoint before the spike. Collective over the world."""
        self.output.note(self.checkpoints.close())
        checkpoint = checkpoint_before_spike(self.run, self.directory, progress, words)
        if checkpoint is None:
            self.output.say(f"warning  {words}: there is no checkpoint before it to go back to")
            return
        self.output.say(f"rollback {words}")
        self.output.say(f"         back to {checkpoint.name}, without the samples since the last logged step")
        raise Rollback(checkpoint)
