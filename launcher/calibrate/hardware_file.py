"""The hardware config that `launcher calibrate` writes."""

import os
import platform
from pathlib import Path

from omegaconf import OmegaConf

from launcher.config.errors import ConfigError
from launcher.config.machine import Machine
from launcher.config.paths import free_path
from launcher.config.schema import CalibrateConfig, HardwareConfig
from launcher.files import write_text
from launcher.text import plural

_MARK = "measured by `launcher calibrate`"
_REFINED = "Refined by `launcher plan`"


def rank_counts(most: int) -> list[int]:
    """Return the powers of two up to `most`."""
    return [2**power for power in range(most.bit_length())]


def target(config: CalibrateConfig) -> Path:
    """Return DIR/hardware/NAME.yaml and make its directory. Raises ConfigError if that is not writable."""
    path = Path(config.dir).expanduser() / "hardware" / f"{config.name}.yaml"
    if why := _not_writable(path.parent):
        raise ConfigError("dir", config.dir, f"cannot be written to: {why}", "dir=WRITABLE_DIRECTORY")
    if path.exists() and not _has_mark(path, _MARK):
        why = f"holds {path.name}, which `launcher calibrate` did not write"
        raise ConfigError("dir", config.dir, why, f"name={config.name}-2")
    return path


def refined_target(learned: str) -> Path:
    """Return the file of `launcher plan learned=FILE` and make its directory.

    Raises ConfigError if it is not writable, or if it is a file that the launcher did not write.
    """
    path = Path(learned).expanduser()
    if why := _not_writable(path.parent):
        why = f"cannot be written: {why}"
        raise ConfigError("learned", learned, why, "learned=my_conf/hardware/NAME.yaml")
    if path.exists() and not _has_mark(path, _MARK, _REFINED):
        why = "the launcher did not write this file"
        raise ConfigError("learned", learned, why, f"learned={free_path(path, '.yaml')}")
    return path


def _not_writable(directory: Path) -> str | None:
    """Make the directory; return the reason if that fails, or if no file can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return f"{directory} is a file"
    except OSError as error:
        return error.strerror
    return None if os.access(directory, os.W_OK) else "permission denied"


def _has_mark(path: Path, *marks: str) -> bool:
    return path.is_file() and any(mark in path.read_text(errors="replace") for mark in marks)


def write(hardware: HardwareConfig, path: Path, machine: Machine) -> None:
    """Write the config with a comment that names the machine."""
    processors = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cores} cores"
    _write(hardware, path, f"{platform.node()}, {platform.machine()}, {processors}: {_MARK}")


def write_refined(hardware: HardwareConfig, path: Path, *, runs: int) -> None:
    """Write the config that was refined from finished runs."""
    _write(hardware, path, f"{_REFINED} from {plural(runs, 'run')}")


def _write(hardware: HardwareConfig, path: Path, comment: str) -> None:
    write_text(path, f"# {comment}.\n" + OmegaConf.to_yaml(OmegaConf.structured(hardware)))
