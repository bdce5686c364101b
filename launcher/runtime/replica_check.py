"""Stop a run whose replicas differ: the tensors and numbers that several ranks hold must have equal bits.

A bit that flips in one rank's weights raises no error: the ranks continue with different models, and a
checkpoint takes each slice from one of the ranks. Replicas are compared every guard.replica_interval steps,
before every checkpoint and after the last step.
"""

from pathlib import Path

from launcher.checkpoint.manifest import checkpoints_in
from launcher.config.errors import RunStopped, typed_text
from launcher.engine.base import Engine
from launcher.engine.distributed import gathered_hosts
from launcher.engine.replicas import Disagreement, disagreements
from launcher.runtime.resume import Progress
from launcher.text import ranks_on_hosts

_LISTED = 8  # tensors in the message


class ReplicaCheck:
    """Compares the replicas of a run every `interval` steps, and when asked; never if `interval` is 0."""

    def __init__(self, engine: Engine, interval: int) -> None:
        self.engine = engine
        self.interval = interval if engine.mesh.shape.world_size > 1 else 0

    def is_due(self, step: int) -> bool:
        """Return whether to compare after `step` even if nothing is saved; the same on all ranks."""
        return self.interval > 0 and step % self.interval == 0

    def disagreements(self, progress: Progress) -> list[Disagreement]:
        """Return the replicas that differ; the same on all ranks. Collective over the world."""
        if self.interval == 0:
            return []
        return disagreements(self.engine, {"step": progress.step, "samples consumed": progress.samples})


def diverged(step: int, differing: list[Disagreement], run_dir: Path) -> RunStopped:
    """Return the error that ends a diverged run; the same on all ranks. Collective over the world."""
    return RunStopped(report(step, differing, gathered_hosts(), next(iter(checkpoints_in(run_dir)), None)))


def report(step: int, differing: list[Disagreement], hosts: list[str], checkpoint: Path | None) -> str:
    """Return a text that names the tensors and ranks, and the checkpoint to resume from. Pure."""
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    lines = [f"the replicas of {differing[0].name}{more} differ after step {step}:"]
    lines += [f"  {each.name}: {_who(each, hosts)}" for each in differing[:_LISTED]]
    if len(differing) > _LISTED:
        lines.append(f"  and {len(differing) - _LISTED} more")
    lines.append(
        "  Replicas must be equal bit for bit. The usual cause is a bit flipped in memory or in transit."
    )
    if checkpoint is None:
        remedy = "the same command with another run.dir (this run has no checkpoint)"
    else:
        run_dir = typed_text("run.dir", str(checkpoint.parent.parent))
        remedy = f"the same command with {run_dir} checkpoint.resume=auto"
        remedy += f" (it resumes from {checkpoint.name}, whose replicas were equal)"
    return "\n".join([*lines, f"  try: {remedy}"])


def _who(differing: Disagreement, hosts: list[str]) -> str:
    minority = differing.minority()
    others = [rank for rank in sorted(differing.ranks) if rank not in minority]
    if not others:
        return f"{ranks_on_hosts(minority, hosts)} differ"
    verb = "differs" if len(minority) == 1 else "differ"
    return f"{ranks_on_hosts(minority, hosts)} {verb} from {ranks_on_hosts(others, hosts)}"
