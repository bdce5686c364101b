"""`launcher verify`: compare a run's reduced layout with one process of plain torch."""

import time
from pathlib import Path

from launcher.commands.ready import ReadyRun, check_compiler, ready_elsewhere
from launcher.commands.report_files import check_files_differ, writable_report
from launcher.config.compose import compose_jobs
from launcher.config.errors import refusal
from launcher.config.machine import Machine
from launcher.config.schema import Device, Dtype, RunConfig
from launcher.config.validate import validate
from launcher.config.world import world_of_machine
from launcher.launch.exit_codes import FAILED
from launcher.launch.this_machine import share_cores, this_machine
from launcher.parity.shrink import MOST_RANKS, inner_stages, long_samples, other_axes, shrink

HELP = """\
launcher verify [OVERRIDES]: check that a run's layout computes the same as one process.

Reduces the run, trains it here in its layout and in one process of plain torch, and compares the results.
Exit code 0: equal; 1: different, with the likely cause; 2: refused.

  verify.steps=3           optimizer steps to compare
  verify.device=cpu        or cuda: the layout's ranks on this machine's GPUs
  verify.report=PATH       write all results as JSON

Example: launcher verify model=llama_tiny parallelism=tp2_pp2 precision=bf16
All groups and fields of a run: launcher --help"""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    jobs, machine = compose_jobs("config", RunConfig, arguments), this_machine()
    check_files_differ([job.config for job in jobs], "verify.report")
    ready_runs = ready_elsewhere([job.config for job in jobs], machine)
    for job, ready_run in zip(jobs, ready_runs, strict=True):
        job.announce()
        if not _verify(ready_run, machine):
            return FAILED
    return 0


def _verify(ready_run: ReadyRun, machine: Machine) -> bool:
    """Verify one run and print each result as it comes; return whether all are within bounds."""
    report, gpus = _writable(ready_run.run), gpus_to_use(ready_run.run, machine.gpus)
    share_cores(MOST_RANKS, machine.cores)
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed("cuda" if gpus else "cpu")
    from launcher.parity.verdict import print_pass, write_report
    from launcher.parity.verification import VerifyPass, verify

    small, shrunk = shrink(ready_run.run, ready_run.layout, gpus=gpus)
    small_layout = validate(small, world_of_machine(small, machine))
    check_compiler(small, small_layout)
    inner = inner_stages(ready_run.run, ready_run.layout, small, gpus=gpus)
    long = long_samples(ready_run.run, ready_run.layout, small)
    others = other_axes(ready_run.run, ready_run.layout, gpus=gpus)
    other_layouts = [validate(other, world_of_machine(other, machine)) for other in others]
    print(f"layout   {ready_run.layout.describe()}")
    print(f"small    {small_layout.describe()}")
    for layout in other_layouts:
        print(f"small    {layout.describe()}, by plain SGD")
    print("shrunk   " + "\n         ".join(shrunk) + "\n", flush=True)
    if ready_run.run.precision.dtype is Dtype.fp16:
        print("note     fp16 trains on GPUs only: verified in fp32\n")
    started, passes, finished = time.monotonic(), list[VerifyPass](), False
    try:
        for result in verify(small, run=ready_run.run, more=(inner, long, *others)):
            passes.append(result)
            print_pass(result)
        finished = True
    finally:
        if report:
            write_report(report, small_layout, shrunk, passes, finished=finished)
    ok = all(result.ok for result in passes)
    compared = sum(len(result.differences) for result in passes)
    verdict, same = ("PASSED", "computes the same as") if ok else ("FAILED", "computes something else than")
    took = f"{compared} comparisons, {time.monotonic() - started:.0f} s"
    subject = f"each of {1 + len(others)} reduced layouts" if others and ok else "the reduced layout"
    print(f"{verdict}: {subject} {same} one process of plain torch ({took})")
    return ok


def gpus_to_use(run: RunConfig, gpus: int) -> int:
    """Return how many of this machine's GPUs `verify.device` takes; 0 is the CPU. Raises ConfigError."""
    if run.verify.device is Device.cuda and gpus == 0:
        raise refusal(run, "verify.device", "this machine has no GPU", "verify.device=cpu")
    return 0 if run.verify.device is Device.cpu else gpus


def _writable(run: RunConfig) -> Path | None:
    return writable_report(run.verify.report, "verify.report", key="passes")
