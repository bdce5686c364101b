"""Faults of processes, disks and numbers at every stage of a run; then the same command again."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.final import read_final_weights
from launcher.checkpoint.integrity import check_files, read_intact_manifest
from launcher.checkpoint.manifest import CHECKPOINTS, UnusableCheckpoint, checkpoints_in, step_name, step_of
from tests.faults.campaign import Abandoned, Ended, Family, Shared, Try
from tests.faults.injection import FIRED, Fault, allow_writing
from tests.forked_commands import LAUNCHER
from tests.runtime.command import SMALL, metrics, trained

STEPS, INTERVAL = 6, 2
RUN = [
    *SMALL, "run.dir=r", f"training.steps={STEPS}", f"checkpoint.interval_steps={INTERVAL}",
    "training.validation_interval=0", "launch.timeout_minutes=0.1",
]  # fmt: skip
LAYOUTS = {
    "single": ["parallelism.data=1"],
    "dp2": ["parallelism.data=2"],
    "tp2": ["parallelism=tp2", "parallelism.data=1"],
    "pp2": ["parallelism=pp2", "parallelism.data=1"],
}
LIKELY = {"single": 3, "dp2": 5, "tp2": 1, "pp2": 1}
COMPARED = ("step", "train/samples", "train/loss", "train/grad_norm")


@dataclass(frozen=True)
class Moment:
    """A function of a stage of the run, and how often the first rank (or the launcher) calls it."""

    function: str
    calls: int = 1
    on: str = "every rank"  # or rank 0, launcher


TRAINING = Moment("launcher.runtime.training:optimizer_step", STEPS)
MOMENTS = {
    "start": [
        Moment("launcher.runtime.run_dir:write_identity", on="launcher"),
        Moment("launcher.runtime.run_dir:write_text", on="launcher"),
        Moment("launcher.runtime.start:announce", on="launcher"),
        Moment("launcher.launch.local:_start", on="launcher"),
        Moment("launcher.engine.distributed:join"),
        Moment("launcher.runtime.training:build_engine"),
        Moment("launcher.runtime.training:start_from"),
    ],
    "training": [TRAINING, Moment("launcher.runtime.training:end_step", STEPS)],
    "save": [
        Moment("launcher.checkpoint.save:write_pieces", 3),
        Moment("launcher.checkpoint.save:commit", 3, "rank 0"),
        Moment("launcher.checkpoint.write:write_text", 9, "rank 0"),
        Moment("launcher.checkpoint.write:rename", 3, "rank 0"),
        Moment("launcher.checkpoint.save:prune", 3, "rank 0"),
        Moment("launcher.checkpoint.save:record_saved_step", 3, "rank 0"),
    ],
    "weights": [
        Moment("launcher.runtime.training:final_weights"),
        Moment("launcher.checkpoint.weights:_write", on="rank 0"),
        Moment("launcher.checkpoint.weights:remove_final_weights", on="rank 0"),
        Moment("launcher.checkpoint.weights:write_text", on="rank 0"),
    ],
}
WEIGHTS = {"start": 3, "training": 3, "save": 4, "weights": 2}

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
IN_THE_LAUNCHER = [(name, victim) for name in ("SIGKILL", *SIGNALS) for victim in ("launcher", "group")]
IN_A_RANK = [
    *IN_THE_LAUNCHER,
    *((name, "actor") for name in ("SIGKILL", *SIGNALS, "SIGSEGV", "SIGSTOP", "pause")),
    *(("pause", victim) for victim in ("launcher", "group")),
    *((name, "actor") for name in ("raise", "exit", "slow", "full disk", "read-only")),
]
OF_NUMBERS = [(name, "actor") for name in ("NaN", "infinity", "huge")]

# Exit codes that may follow a fault, and what the output then says. A run that ends with 0 is complete.
UNHURT = {0: ""}
STOPPED = {
    "SIGKILL": {-9: ""},
    "SIGTERM": {143: "stopped by SIGTERM", -15: ""},
    "SIGINT": {130: "interrupted"},
    "SIGHUP": {129: "stopped by SIGHUP", -1: ""},
    "SIGUSR1": {138: "stopped by SIGUSR1", -10: ""},
}
# A rank ignores Ctrl-C and SIGHUP, which a terminal sends to every process. SIGTERM and SIGUSR1 ask it to
# save and stop; after its last step nothing is left to stop.
RANK_SIGNALLED = {
    "SIGKILL": {1: "was killed by SIGKILL"},
    "SIGSEGV": {1: "SIGSEGV"},
    "SIGTERM": {1: "SIGTERM", 143: "SIGTERM", 0: ""},
    "SIGINT": UNHURT,
    "SIGHUP": UNHURT,
    "SIGUSR1": {143: "SIGTERM", 138: "SIGUSR1", 1: "SIGUSR1", 0: ""},
    "SIGSTOP": {
        1: "did not arrive|did not join|no answer from rank|was stopped by SIGSTOP or SIGTSTP for 6 seconds"
    },
    "pause": UNHURT,
}
NOTE = "a checkpoint could not be written"
OTHERS = {
    "raise": {1: "the disk is on fire", 0: f"{NOTE}.*the disk is on fire"},
    "exit": {1: "exited with code 3"},
    "slow": UNHURT,
    "full disk": {0: "", 2: "File too large", 1: "File too large"},
    "read-only": {0: "", 2: "Permission denied", 1: "Permission denied"},
    "NaN": {0: "was skipped"},
    "infinity": {0: "was skipped"},
    "huge": {0: "was skipped"},
    "flipped bit": {1: "differ"},
}


@dataclass(frozen=True)
class Case:
    layout: str
    fault: Fault
    restarts: bool

    def describe(self) -> str:
        return f"{self.layout}: {self.fault.describe()}{', with a restart' if self.restarts else ''}"

    @property
    def spoils_numbers(self) -> bool:
        return (self.fault.action, self.fault.victim) in OF_NUMBERS

    def arguments(self) -> list[str]:
        return [*RUN, *LAYOUTS[self.layout], *(["launch.max_restarts=2"] if self.restarts else [])]

    def program(self) -> str:
        """Return a program that lets the fault happen. A disk that is read-only stops root, too."""
        permissions = "obey_permissions()\n" if self.fault.action == "read-only" else ""
        imports = "from tests.faults.injection import Fault, obey_permissions, install\n"
        return f"{imports}{permissions}install({self.fault!r})\n{LAUNCHER}"

    def allowed(self) -> dict[int, str]:
        """Return the exit codes that may follow, each with a pattern for the output."""
        fault = self.fault
        if fault.action in OTHERS:
            codes = OTHERS[fault.action]
        elif fault.victim in ("launcher", "group") and fault.action != "pause":
            codes = STOPPED[fault.action]
        else:
            codes = RANK_SIGNALLED[fault.action]
        if not self.restarts:
            return codes
        return codes | {0: "|".join(["restart 1 of 2", *([codes[0]] if 0 in codes else [])])}


def drawn(this: Try) -> Case:
    rng = this.rng
    layout = rng.choices(list(LIKELY), list(LIKELY.values()))[0]
    world = 1 if layout == "single" else 2
    if rng.random() < 0.12:
        return Case(layout, _of_numbers(this, layout, world), restarts=False)
    stage = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    moment = rng.choice(MOMENTS[stage])
    ranks = range(world) if moment.on == "every rank" else range(1)
    actor = None if moment.on == "launcher" else rng.choice(ranks)
    action, victim = rng.choice(IN_THE_LAUNCHER if actor is None else IN_A_RANK)
    if world == 2 and victim == "actor" and action.startswith(("SIG", "pause")) and rng.random() < 0.3:
        victim = "other"
    fault = Fault(action, moment.function, rng.randint(1, moment.calls), rng.random() < 0.5, actor, victim)
    failed = action in ("SIGKILL", "SIGSEGV", "raise", "exit") and victim in ("actor", "other")
    return Case(layout, fault, restarts=failed and rng.random() < 0.25)


def _of_numbers(this: Try, layout: str, world: int) -> Fault:
    """Return a fault of a gradient, or of a weight that both ranks hold."""
    step, actor = this.rng.randint(1, STEPS), this.rng.randrange(world)
    if layout in ("dp2", "tp2") and this.rng.random() < 0.5:
        return Fault("flipped bit", TRAINING.function, step, True, actor)
    return Fault(this.rng.choice(OF_NUMBERS)[0], TRAINING.function, step, False, actor)


def undisturbed(shared: Shared, layout: str) -> Path:
    """Return the directory of an undisturbed run of this layout."""
    return shared.made(f"whole-{layout}", lambda folder: trained(*RUN, *LAYOUTS[layout], cwd=folder)) / "r"


def attempt(this: Try) -> None:
    case = drawn(this)
    this.case, whole = case.describe(), undisturbed(this.shared, case.layout)
    first = this.run(*case.arguments(), program=case.program(), tracebacks=_tracebacks(case))
    this.case += f"; exit code {first.code}"
    if not (this.folder / FIRED).exists():
        this.expect(False, "silent", f"the fault did not happen: {first.brief}")
        raise Abandoned
    this.check_processes()
    allow_writing(this.run_dir)
    check_end(this, case, first)
    check_checkpoints(this)
    if case.spoils_numbers:
        check_complete(this, "after a skipped step")
        return
    check_restarted(this, case.arguments(), whole)


def _tracebacks(case: Case) -> int:
    """A rank shows the traceback of its own error, at each start."""
    return (3 if case.restarts else 1) if case.fault.action in ("raise", "SIGSEGV") else 0


def check_end(this: Try, case: Case, first: Ended) -> None:
    """Check the exit code and the message of the run with the fault."""
    allowed = case.allowed()
    this.expect(first.code in allowed, "silent", f"{sorted(allowed)} expected: {first.brief}")
    pattern = allowed.get(first.code, "")
    this.expect(re.search(pattern, first.said) is not None, "silent", f"{pattern!r} expected: {first.brief}")
    if first.code == 0:
        check_complete(this, "exit code 0")
        is_saved = checkpoints_in(this.run_dir)[:1] == [this.run_dir / CHECKPOINTS / step_name(STEPS)]
        before = json.loads((this.folder / FIRED).read_text())
        # A disk stays full, but an exception spoils one checkpoint. The last checkpoint may be that one only
        # if the checkpoint before it was there.
        may_lack = case.fault.action != "raise" or before[:1] == [step_name(STEPS - INTERVAL)]
        this.expect(
            is_saved or (may_lack and NOTE in first.said),
            "silent",
            f"no checkpoint of the last step: {first.brief}",
        )


def check_complete(this: Try, when: str) -> None:
    """Check that the run has a row for each step, and intact final weights of the last step."""
    steps = [row["step"] for row in metrics(this.run_dir)]
    this.expect(steps == list(range(1, STEPS + 1)), "lost", f"{when}: rows of steps {steps}")
    try:
        weights = read_final_weights(this.run_dir)
        check_files(weights.stored(this.run_dir), sorted(weights.files))
        this.expect(weights.step == STEPS, "lost", f"{when}: weights of step {weights.step}")
    except UnusableCheckpoint as unusable:
        this.expect(False, "lost", f"{when}: {unusable}")


def check_checkpoints(this: Try) -> None:
    """Check that the newest checkpoint from before the fault, or a newer one, is there and intact."""
    before = json.loads((this.folder / FIRED).read_text())
    if not before:
        return
    present = checkpoints_in(this.run_dir)
    newest = this.run_dir / CHECKPOINTS / before[0]
    this.expect(
        bool(present) and step_of(present[0]) >= step_of(newest),
        "lost",
        f"{newest.name} is gone, {[path.name for path in present]} are there",
    )
    for path in present:
        try:
            read_intact_manifest(path)
        except UnusableCheckpoint as unusable:
            this.expect(False, "lost", f"{path.name}: {unusable}")


def check_restarted(this: Try, arguments: list[str], whole: Path) -> None:
    """Run the same command without a fault: it reaches the last step with the undisturbed run's numbers."""
    again = this.run(*arguments)
    this.expect(again.code == 0, "lost", f"the same command again: {again.brief}")
    if again.code:
        raise Abandoned
    check_complete(this, "started again")
    this.expect(numbers(this.run_dir) == numbers(whole), "lost", "other numbers than an undisturbed run")
    this.expect(digests(this.run_dir) == digests(whole), "lost", "other weights than an undisturbed run")
    leftovers = sorted(path.name for path in (this.run_dir / CHECKPOINTS).glob("*.partial"))
    this.expect(not leftovers, "orphan", f"{leftovers} in checkpoints/")


def numbers(run_dir: Path) -> list[list[Any]]:
    return [[row[name] for name in COMPARED] for row in metrics(run_dir)]


def digests(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of the final weights."""
    return {name: file.sha256 for name, file in read_final_weights(run_dir).files.items()}


FAMILY = Family("processes", 160, attempt)
