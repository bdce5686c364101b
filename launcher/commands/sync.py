"""`launcher sync`: upload a run's offline W&B files."""

from launcher.config.errors import ConfigError
from launcher.config.paths import path_argument
from launcher.config.run_format import IDENTITY
from launcher.launch.scratch import scratch_directory, temporary_files_in


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print("launcher sync runs/NAME ...: upload the new offline W&B files of each run, in order")
        return 0
    runs = [path_argument("sync", argument.removeprefix("run.dir=")) for argument in arguments]
    for run in runs:
        if not (run / IDENTITY).is_file():
            why = f"this is not a run directory, because it has no {IDENTITY}"
            raise ConfigError("sync", run, why, "launcher sync runs/NAME (the run directory)")
    # W&B makes directories when it is imported.
    with scratch_directory() as temporary, temporary_files_in(temporary):
        from launcher.runtime.metrics.upload import upload

        return max(upload(run, temporary) for run in runs)
