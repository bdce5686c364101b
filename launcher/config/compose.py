"""Compose dataclasses from a command line with Hydra. explanations.py translates Hydra's errors."""

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
from launcher.config.fields import ENTRIES, config_directory, is_section, schema_of
from launcher.config.run_format import check_format
from launcher.config.schema import (
    CalibrateConfig,
    ComparedRunConfig,
    ExchangeConfig,
    GenerateConfig,
    PlannedRunConfig,
    PrepareConfig,
    ReplayConfig,
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
    ReplayConfig,
)

# The beginnings of overrides of open dictionaries, whose keys the user chooses.
OPEN = tuple(f"{name}{end}" for name in ("deepspeed", *ENTRIES) for end in (".", "="))


@dataclass(frozen=True)
class Job(Generic[Config]):
    """A composed config to run."""

    config: Config
    index: int | None  # number of the job in a --multirun; None for a single run
    overrides: list[str]  # arguments that compose the same config from any directory, including --config-dir

    def announce(self) -> None:
        """Print the number and overrides of a job of a sweep; print nothing for a single run."""
        if self.index is not None:
            print(f"job      {self.index}: {' '.join(self.overrides)}", flush=True)


def compose_jobs(config_name: str, root: type[Config], arguments: list[str]) -> list[Job[Config]]:
    """Return the jobs that the command-line `arguments` compose from `config_name`; a sweep has several.

    Hydra's flags (--help, --cfg job, --multirun, --config-dir ...) work as in any Hydra application. A flag
    that only prints, such as --help, gives no job. Raises ConfigError if any job cannot be composed, so that
    no job of a sweep starts before all of them are valid.
    """
    register_schema()
    # Without this variable, Hydra prints its errors itself and exits with code 1. It has no other switch.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # argparse accepts overrides only without flags between them, so the flags are sorted first.
    flags_first: list[str] = [_addable(argument) for argument in sorted(arguments, key=_is_override)]
    flags, overrides = _parsed(flags_first)
    directories = [f"--config-dir={Path(flags.config_dir).absolute()}"] if flags.config_dir else []
    sys.argv = ["launcher", *flags_first]
    composed: list[tuple[DictConfig, int | None, list[str]]] = []

    def keep(config: DictConfig) -> None:
        # Not resolved here: a ${...} that refers to nothing is reported later.
        hydra_config = HydraConfig.get()
        task = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        assert isinstance(task, list)
        is_sweep = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
        index = int(hydra_config.job.num) if is_sweep else None
        composed.append((config, index, [str(override) for override in task]))

    main = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(keep)
    try:
        main()
    except BrokenPipeError:
        raise  # the reader of --help, such as `head`, closed the pipe
    except COMPOSITION_ERRORS as error:
        raise explain(error, root, overrides) from None
    return [Job(to_typed(config, root, overrides), n, directories + task) for config, n, task in composed]


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def _addable(argument: str) -> str:
    """Return the argument, with `++` in front if it sets a key of an open dictionary."""
    return f"++{argument}" if argument.startswith(OPEN) else argument


def _parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's flags and the overrides. Raises ConfigError for an unknown flag."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            flags: argparse.Namespace = get_args_parser().parse_args(arguments)
    except SystemExit as stop:
        if not stop.code:
            raise  # --version
        why = stderr.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ConfigError("command line", None, why, "a flag that `launcher --hydra-help` lists") from None
    return flags, list(flags.overrides)


def to_typed(composed: DictConfig, root: type[Config], overrides: list[str] | None = None) -> Config:
    """Return a composed config as dataclasses of type `root`.

    Raises ConfigError for a missing value, an unknown key, or a ${...} that refers to nothing. Its message
    uses `overrides`, the overrides of the command line.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise missing_value(missing[0], root, overrides or [])
        _refuse_unknown(composed, schema_of(root), "", root)
        typed = OmegaConf.to_object(composed)
        # Composition does not check the items of lists: it accepts [a, {b: 1}] as a list of text.
        OmegaConf.structured(typed)
    except COMPOSITION_ERRORS as error:
        raise explain(error, root, overrides or []) from None
    assert isinstance(typed, root)
    return typed


def _refuse_unknown(config: DictConfig, schema: DictConfig, prefix: str, root: type[Any]) -> None:
    # Hydra's `+key=value` can add keys that are not in the schema.
    for key in config:
        name = f"{prefix}{key!s}"
        if key not in schema.keys():  # noqa: SIM118  (`in schema` is false for a mandatory value)
            raise no_such_field(name, str(config[key]), root)
        node, inner = config._get_node(key), schema._get_node(key)
        if isinstance(node, DictConfig) and isinstance(inner, DictConfig) and is_section(inner):
            _refuse_unknown(node, inner, f"{name}.", root)


def load_typed(path: Path, root: type[Config]) -> Config:
    """Return the config of a run from its config.yaml, `path`. Raises ConfigError if no run wrote it."""
    if not path.is_file():
        why = f"this is not a run directory, because it has no {path.name}"
        raise ConfigError("run.dir", path.parent, why, "run.dir=DIRECTORY of a run")
    check_format(path.parent)
    try:
        merged = OmegaConf.merge(schema_of(root), OmegaConf.load(path))
        assert isinstance(merged, DictConfig)
        return to_typed(merged, root)
    except (*COMPOSITION_ERRORS, ConfigError) as error:
        why = f"its {path.name} was not written by a run: {str(error).splitlines()[0]}"
        remedy = "run.dir=DIRECTORY of a run whose files are unchanged"
        raise ConfigError("run.dir", path.parent, why, remedy) from None
