"""Stopping and saving a run, from the signal to the exit code, in order:

1. A signal arrives: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 at `launcher`; SIGUSR1 or SIGTERM at a batch script,
   which Slurm sends `slurm.signal_seconds` before the time limit.
2. `launcher job` (runtime/slurm_job.py) sends SIGUSR1 to its srun, and srun sends it to every rank. A
   launcher that started its ranks (launch/local.py) sends SIGUSR1 to them, and gives them `stop_grace`; a
   second Ctrl-C, at least one second later, kills them.
3. In a rank a StopRequest (launch/rank.py) notes the signal, and training continues. Ranks of torchrun and
   srun note signals from start to end. Other ranks only while they train (runtime/training.py): before and
   after, a signal ends them.
4. At the next step at which the ranks agree, all ranks learn that a rank was asked to stop, save that step
   and leave the training loop (runtime/saving.py: which step; runtime/agreement.py: how).
5. The rank records its end if `launcher job` asked for it (launch/records.py). Such a rank exits with 0:
   on any other code srun would end the tasks that are still saving. Any other rank exits with 143
   (runtime/start.py).
6. `launcher` exits with 128 + the signal (launch/local.py). `launcher job` requeues the job or submits the
   next (runtime/slurm_job.py). The same command resumes from the checkpoint (runtime/resume.py).
"""

from launcher.config.schema import RunConfig


def stop_grace(run: RunConfig) -> float:
    """Return the seconds that a run may take to save itself when it is stopped; 0 if it is not saved."""
    return (run.checkpoint.stop_grace_seconds or 0.0) if run.checkpoint.enabled else 0.0
