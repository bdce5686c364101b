"""The hardware config that `launcher calibrate` writes."""

import os
import platform
from pathlib import Path

from omegaconf import OmegaConf

from launcher.config.errors import ConfigError
from launcher.config.machine import Machine
from launcher.config.schema import CalibrateConfig, HardwareConfig
from launcher.files import write_text

_MARK = "measured by `launcher calibrate`"


def rank_counts(most: int) -> list[int]:
    """Return the powers of two up to `most`."""
    return [2**power for power in range(most.bit_length())]


def target(config: CalibrateConfig) -> Path:
    """Return DIR/hardware/NAME.yaml and make its directory. Raises ConfigError if that is not writable."""
    path = Path(config.dir).expanduser() / "hardware" / f"{config.name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        why = None if os.access(path.parent, os.W_OK) else "permission denied"
    except OSError as error:
        why = error.strerror
    if not why and path.exists() and _MARK not in path.read_text(errors="replace"):
        why = f"holds {path.name}, which `launcher calibrate` did not write"
        raise ConfigError("dir", config.dir, why, f"name={config.name}-2")
    if why:
        raise ConfigError("dir", config.dir, f"cannot be written to: {why}", "dir=WRITABLE_DIRECTORY")
    return path


def write(hardware: HardwareConfig, path: Path, machine: Machine) -> None:
    """Write the config with a comment that names the machine."""
    processors = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cores} cores"
    header = f"# {platform.node()}, {platform.machine()}, {processors}: {_MARK}.\n"
    write_text(path, header + OmegaConf.to_yaml(OmegaConf.structured(hardware)))
