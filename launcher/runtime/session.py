"""The parts of a run that every step uses."""

from dataclasses import dataclass
from pathlib import Path

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.data.open import Data
from launcher.engine.base import Engine
from launcher.engine.watchdog import Watchdog
from launcher.engine.work_time import WorkTime
from launcher.launch.rank import StopRequest
from launcher.runtime.compile_report import CompileReport
from launcher.runtime.nonfinite import NonfiniteGuard
from launcher.runtime.output import RunOutput
from launcher.runtime.plan_check import PlanCheck
from launcher.runtime.run_dir import RunDir
from launcher.runtime.saving import Checkpoints
from launcher.runtime.slow_rank import SlowRankWatch
from launcher.runtime.spikes import Spike, SpikeGuard, roll_back
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
    def create(cls, parts: Parts, last: int, output: RunOutput, history: dict[str, list[float]]) -> "Session":
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
            NonfiniteGuard(run, engine),
            SpikeGuard(run, engine, history),
            parts.stop,
        )

    def go_back(self, spike: Spike) -> Path | None:
        """Return the checkpoint to go back to; None if there is none. Collective. Raises RunStopped."""
        self.output.note(self.checkpoints.close())
        checkpoint = roll_back(self.run, self.directory, spike)
        if checkpoint is None:
            self.output.say(f"warning  {spike.words}: there is no checkpoint before it to go back to")
        else:
            self.output.say(f"rollback {spike.words}")
            self.output.say(
                f"         back to {checkpoint.name}, without the samples since the last logged step"
            )
        return checkpoint
