"""Hydra's composition, from a command line to dataclasses. Its errors become ConfigErrors in explain.py."""

import argparse
import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from launcher.config.errors import ConfigError
from launcher.config.explanations import COMPOSITION_ERRORS, explain, missing_value, no_such_field
from launcher.config.fields import ENTRIES, config_directory, is_section
from launcher.config.schema import (
    CalibrateConfig,
    ComparedRunConfig,
    ExchangeConfig,
    GenerateConfig,
    PlannedRunConfig,
    PrepareConfig,
    RunConfig,
    register_schema,
)

Config = TypeVar(
    "Config",
    RunConfig,
    PlannedRunConfig,
    ComparedRunConfig,
    GenerateConfig,
    ExchangeConfig,
    PrepareConfig,
    CalibrateConfig,
)


# Dictionaries whose keys are the user's.
OPEN = tuple(f"{name}{end}" for name in ("deepspeed", *ENTRIES) for end in (".", "="))


@dataclass(frozen=True)
class Job(Generic[Config]):
    """One config to run; `index` counts the jobs of a --multirun and is None in a single run."""

    config: Config
    index: int | None
    overrides: list[str]  # that make it, from any directory: --config-dir is among them

    def announce(self) -> None:
        """Print which job of a sweep comes next; nothing for a single run."""
        if self.index is not None:
            print(f"job      {self.index}: {' '.join(self.overrides)}", flush=True)


def compose_jobs(config_name: str, root: type[Config], arguments: list[str]) -> list[Job[Config]]:
    """Compose `config_name` from command-line `arguments`: one job, or those of a sweep.

    Hydra's own flags (--help, --cfg job, --multirun, --config-dir ...) do what they do in any Hydra
    application; those that only show something leave no job. Raises ConfigError for whatever cannot
    be composed, in any job of a sweep, before a caller can start the first.
    """
    register_schema()
    # Hydra would otherwise print its errors itself and exit with 1; it offers no other switch.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # argparse takes overrides in one stretch only; a flag may stand between them here.
    flags_first: list[str] = [_addable(argument) for argument in sorted(arguments, key=_is_override)]
    flags, overrides = _parsed(flags_first)
    directories: list[str] = []
    if flags.config_dir:
        directories = [f"--config-dir={Path(flags.config_dir).absolute()}"]
    sys.argv = ["launcher", *flags_first]
    composed: list[tuple[DictConfig, int | None, list[str]]] = []

    def keep(config: DictConfig) -> None:
        # Unresolved: a ${...} among them may lead nowhere, which is reported later.
        task = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        assert isinstance(task, list)
        composed.append((config, _multirun_index(), [str(override) for override in task]))

    main = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(keep)
    try:
        main()
    except BrokenPipeError:
        raise  # whoever read the --help has seen enough
    except COMPOSITION_ERRORS as error:
        raise explain(error, root, overrides) from None
    return [
        Job(to_typed(config, root, overrides), index, directories + task) for config, index, task in composed
    ]


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def _addable(argument: str) -> str:
    """Keys of an open dictionary need no `+`."""
    return f"++{argument}" if argument.startswith(OPEN) else argument


def _parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags, and what is left without them. Raises ConfigError for a flag it does not have."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            flags: argparse.Namespace = get_args_parser().parse_args(arguments)
    except SystemExit as stop:
        if not stop.code:
            raise  # --version
        why = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ConfigError("command line", None, why, "a flag that `launcher --hydra-help` lists") from None
    return flags, list(flags.overrides)


def _multirun_index() -> int | None:
    config = HydraConfig.get()
    swept = config.mode is not None and config.mode.name == "MULTIRUN"
    return int(config.job.num) if swept else None


def to_typed(composed: DictConfig, root: type[Config], overrides: list[str] | None = None) -> Config:
    """The dataclasses behind a composed config.

    Raises ConfigError for a missing value, an unknown key or a ${...} that leads nowhere; `overrides`
    are those of the command line, for its message.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise missing_value(missing[0], root)
        _refuse_unknown(composed, OmegaConf.structured(root), "", root)
        typed = OmegaConf.to_object(composed)
        # Composing does not look into lists: [a, {b: 1}] would pass for a list of text.
        OmegaConf.structured(typed)
    except COMPOSITION_ERRORS as error:
        raise explain(error, root, overrides or []) from None
    assert isinstance(typed, root)
    return typed


def _refuse_unknown(config: DictConfig, schema: DictConfig, prefix: str, root: type[Any]) -> None:
    # Hydra's `+key=value` adds keys that the schema does not have.
    for key in config:
        name = f"{prefix}{key!s}"
        if key not in schema.keys():  # noqa: SIM118  (`in schema` is false for a mandatory value)
            raise no_such_field(name, str(config[key]), root)
        node, inner = config._get_node(key), schema._get_node(key)
        if isinstance(node, DictConfig) and isinstance(inner, DictConfig) and is_section(inner):
            _refuse_unknown(node, inner, f"{name}.", root)


def load_typed(path: Path, root: type[Config]) -> Config:
    """Read a composed config that a run wrote (run.dir/config.yaml). Raises ConfigError if it cannot be."""
    if not path.is_file():
        why = f"not a run's directory, it has no {path.name}"
        raise ConfigError("run.dir", path.parent, why, "the directory that a run printed")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(root), OmegaConf.load(path))
        assert isinstance(merged, DictConfig)
        return to_typed(merged, root)
    except (*COMPOSITION_ERRORS, ConfigError) as error:
        why = f"its {path.name} is not one that a run wrote: {str(error).splitlines()[0]}"
        raise ConfigError("run.dir", path.parent, why, "the directory of an unchanged run") from None
