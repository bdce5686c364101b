"""`launcher preflight`: check once that the installed torch and DeepSpeed compute a kind of layout right."""

import sys
from collections.abc import Sequence

from launcher.commands.ready import ReadyRun, ready_elsewhere
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError, refusal
from launcher.config.schema import RunConfig
from launcher.launch.exit_codes import FAILED
from launcher.launch.this_machine import this_machine
from launcher.parity.preflight import Preflight, Verdict, preflight

HELP = """\
launcher preflight [OVERRIDES]: check that torch and DeepSpeed compute this kind of layout right.

Runs `launcher verify` on the smallest run of the kind: the same parts of the model, ZeRO stage, precision,
schedule and offload, each axis of 2 or more with 2 ranks, for one step. `launcher submit` does the same.
A success is recorded in ~/.cache/launcher/preflight (or $XDG_CACHE_HOME/launcher/preflight) and not checked
again for the same kind and versions. Exit code 0: passed; 1: failed; 2: refused, or not possible on this
machine.

Example: launcher preflight experiment=llama3_8b_3d
All groups and fields of a run: launcher --help"""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    jobs = compose_jobs("config", RunConfig, arguments)
    ready_runs = ready_elsewhere([job.config for job in jobs], this_machine())
    for job, ready_run in zip(jobs, ready_runs, strict=True):
        job.announce()
        result = preflight(ready_run.run, ready_run.layout)
        if result.verdict is Verdict.unknown:
            elsewhere = "the same command where the job runs, such as `srun launcher preflight ...`"
            raise ConfigError("preflight", None, f"not possible on this machine: {result.why}", elsewhere)
        print(
            _line(result)
            if result.verdict is Verdict.passed
            else f"FAILED   {result.installed}: {result.why}"
        )
        if result.verdict is Verdict.failed:
            print(f"repeat   {result.command}")
            return FAILED
    return 0


def check_before_submission(ready_runs: Sequence[ReadyRun]) -> None:
    """Check each kind of layout; print the verdicts on standard error. Raises ConfigError on a failure."""
    if not ready_runs[0].run.submit.preflight:
        return
    lines = []
    for ready_run in ready_runs:
        result = preflight(ready_run.run, ready_run.layout)
        if result.verdict is Verdict.failed:
            raise _failure(ready_run.run, result)
        lines.append(_line(result))
    print(*dict.fromkeys(lines), sep="\n", file=sys.stderr)


def _failure(run: RunConfig, result: Preflight) -> ConfigError:
    why = f"with {result.installed} the preflight of this kind of layout fails: {result.why}"
    remedies = "another version of deepspeed or torch", "submit.preflight=false (submits nevertheless)"
    return refusal(
        run, "submit.preflight", why, *remedies, f"`{result.command}`, which prints the whole comparison"
    )


def _line(result: Preflight) -> str:
    if result.verdict is Verdict.unknown:
        return f"preflight  not made: {result.why} (where the job runs: `srun launcher preflight ...`)"
    return f"preflight  passed with {result.installed}: {result.why}"
