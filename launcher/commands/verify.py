"""What `launcher verify` does once its config has been composed and checked."""

import time
from pathlib import Path

from launcher.config.errors import ConfigError, refusal
from launcher.config.layout import Layout
from launcher.config.schema import Device, Dtype, RunConfig
from launcher.config.validate import validate
from launcher.engine.distributed import prepare_deepspeed


def verify_and_report(run: RunConfig, layout: Layout, *, cores: int, gpus: int) -> bool:
    """Verify one run, print what is found as it is found, and say whether all of it is within bounds.

    Raises ConfigError for a report that cannot be written and for GPUs that are not there, before anything
    runs.
    """
    report, gpus = _writable(run), gpus_to_use(run, gpus)
    prepare_deepspeed("cuda" if gpus else "cpu")
    from launcher.parity.shrink import shrink
    from launcher.parity.verdict import print_pass, write_report
    from launcher.parity.verify import verify

    small, shrunk = shrink(run, layout, gpus=gpus)
    small_layout = validate(small, gpus=gpus, cores=cores)
    print(f"layout   {layout.describe()}")
    print(f"verified {small_layout.describe()}")
    print("shrunk   " + "\n         ".join(shrunk) + "\n", flush=True)
    if run.precision.dtype is Dtype.fp16:
        print("note     fp16 trains on GPUs only: verified in fp32\n")
    started, passes = time.monotonic(), []
    for one in verify(small):
        passes.append(one)
        print_pass(one)
    ok = all(one.ok for one in passes)
    if report:
        write_report(report, small_layout, shrunk, passes)
    compared = sum(len(one.differences) for one in passes)
    verdict = "is the same run as one process of plain torch" if ok else "is NOT the same run"
    took = f"{time.monotonic() - started:.0f} s"
    print(f"The layout, made small as above, {verdict}: {compared} comparisons, {took}")
    return ok


def gpus_to_use(run: RunConfig, gpus: int) -> int:
    """Of this machine's, those that `verify.device` says; 0 is the CPU. Raises ConfigError without any."""
    if run.verify.device is Device.cuda and gpus == 0:
        raise refusal(run, "verify.device", "this machine has no GPU", "verify.device=cpu")
    return 0 if run.verify.device is Device.cpu else gpus


def _writable(run: RunConfig) -> Path | None:
    if run.verify.report is None:
        return None
    path = Path(run.verify.report).expanduser()
    try:
        path.touch()
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
        raise ConfigError("verify.report", path, why, "a file you may write to") from None
    return path
