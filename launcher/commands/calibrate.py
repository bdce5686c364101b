"""`launcher calibrate`: this machine measured, as a hardware config that `launcher plan` can use."""

import os
import platform
from pathlib import Path

from omegaconf import OmegaConf

from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.schema import CalibrateConfig, Device, HardwareConfig
from launcher.config.validate import validate_calibrate
from launcher.launch.machine import Machine, this_machine


def calibrate(arguments: list[str]) -> int:
    """Run `launcher calibrate`; the exit code. Raises ConfigError."""
    jobs = compose_jobs("calibrate", CalibrateConfig, arguments)
    if not jobs:
        return 0  # --help
    if len(jobs) > 1:
        raise ConfigError("--multirun", None, "there is one machine to measure", "launcher calibrate")
    config, machine = jobs[0].config, this_machine()
    validate_calibrate(config)
    path = target(config)
    from launcher.calibrate.rounds import measure

    counts = rank_counts(config.most_ranks or machine.gpus or 2 * machine.cores)
    device = "cuda" if machine.gpus else "cpu"
    measured = measure(counts, rounds=config.rounds, cores=machine.cores, device=device)
    hardware = HardwareConfig(
        device=Device[device],
        accelerators_per_node=machine.gpus or None,
        cores=None if machine.gpus else machine.cores,
        measured=measured,
    )
    write(hardware, path, machine)
    print(f"hardware {path}")
    print(f"use it   launcher plan --config-dir {config.dir} hardware={config.name}")
    return 0


def rank_counts(most: int) -> list[int]:
    """1, 2, 4 and so on."""
    return [2**power for power in range(most.bit_length())]


def target(config: CalibrateConfig) -> Path:
    """DIR/hardware/NAME.yaml, in a directory that can be written to. Raises ConfigError."""
    path = Path(config.dir).expanduser() / "hardware" / f"{config.name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        why = None if os.access(path.parent, os.W_OK) else "permission denied"
    except OSError as error:
        why = error.strerror
    if why:
        raise ConfigError("dir", config.dir, f"cannot be written to: {why}", "dir=DIRECTORY of your own")
    return path


def write(hardware: HardwareConfig, path: Path, machine: Machine) -> None:
    """Whole or not at all."""
    what = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cores} cores"
    said = f"# {platform.node()}, {platform.machine()}, {what}: measured by `launcher calibrate`.\n"
    aside = path.with_suffix(".tmp")
    aside.write_text(said + OmegaConf.to_yaml(OmegaConf.structured(hardware)))
    aside.replace(path)
