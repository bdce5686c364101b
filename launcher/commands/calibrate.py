"""`launcher calibrate`: measure this machine and write a hardware config that `launcher plan` can use."""

from launcher.calibrate.hardware_file import rank_counts, target, write
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.machine import Machine
from launcher.config.schema import CalibrateConfig, Device, HardwareConfig
from launcher.config.validate import validate_calibrate
from launcher.launch.this_machine import this_machine, wait_briefly


def main(arguments: list[str]) -> int:
    jobs = compose_jobs("calibrate", CalibrateConfig, arguments)
    if not jobs:
        return 0  # --help
    if len(jobs) > 1:
        raise ConfigError("--multirun", None, "not supported by `launcher calibrate`", "launcher calibrate")
    config, machine = jobs[0].config, this_machine()
    validate_calibrate(config)
    path = target(config)
    write(_gpus(config, machine) if machine.gpus else _cores(config, machine), path, machine)
    print(f"hardware {path}")
    print(f"use it   launcher plan --config-dir {config.dir} hardware={config.name}")
    return 0


def _gpus(config: CalibrateConfig, machine: Machine) -> HardwareConfig:
    from launcher.calibrate.card import measure_card

    card, memory = measure_card(min(machine.gpus, config.most_ranks or machine.gpus))
    return HardwareConfig(
        device=Device.cuda,
        accelerators_per_node=machine.gpus,
        memory_bytes=memory,
        host_memory_bytes=machine.memory_bytes,
        card=card,
    )


def _cores(config: CalibrateConfig, machine: Machine) -> HardwareConfig:
    wait_briefly()
    from launcher.calibrate.rounds import measure

    counts = rank_counts(config.most_ranks or 2 * machine.cores)
    measured = measure(counts, rounds=config.rounds, cores=machine.cores)
    return HardwareConfig(device=Device.cpu, cores=machine.cores, measured=measured)
