"""`launcher calibrate`: measure this machine and write a hardware config that `launcher plan` can use."""

from launcher.calibrate.hardware_file import rank_counts, target, write
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.schema import CalibrateConfig, Device, HardwareConfig
from launcher.config.validate import validate_calibrate
from launcher.launch.this_machine import this_machine


def main(arguments: list[str]) -> int:
    jobs = compose_jobs("calibrate", CalibrateConfig, arguments)
    if not jobs:
        return 0  # --help
    if len(jobs) > 1:
        raise ConfigError("--multirun", None, "not supported by `launcher calibrate`", "launcher calibrate")
    config, machine = jobs[0].config, this_machine()
    validate_calibrate(config)
    path = target(config)
    from launcher.calibrate.rounds import measure

    counts = rank_counts(config.most_ranks or machine.gpus or 2 * machine.cores)
    device = "cuda" if machine.gpus else "cpu"
    measured = measure(counts, rounds=config.rounds, cores=machine.cores, device=device)
    gpus, cores = machine.gpus or None, None if machine.gpus else machine.cores
    hardware = HardwareConfig(
        device=Device[device], accelerators_per_node=gpus, cores=cores, measured=measured
    )
    write(hardware, path, machine)
    print(f"hardware {path}")
    print(f"use it   launcher plan --config-dir {config.dir} hardware={config.name}")
    return 0
