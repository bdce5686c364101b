"""Compose dataclasses from a command line with Hydra. explanations.py translates Hydra's errors.

Hydra composes, and does nothing else: its launchers, sweepers, callbacks and log files are not used.
"""

import argparse
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import InterpolationResolutionError

from launcher.config.arguments import check_hydra_overrides, check_hydra_settings, check_sizes, parsed_flags
from launcher.config.as_written import check_typed
from launcher.config.descriptions import described
from launcher.config.errors import ConfigError
from launcher.config.explanations import (
    COMPOSITION_ERRORS,
    explain,
    missing_value,
    no_such_field,
    not_an_option,
)
from launcher.config.fields import (
    ENTRIES,
    config_directory,
    groups_of,
    is_section,
    options_of,
    schema_of,
)
from launcher.config.file_loader import WITH_ORIGIN, FileLoader
from launcher.config.run_format import check_format
from launcher.config.schema import (
    CalibrateConfig,
    ComparedRunConfig,
    EvaluateConfig,
    ExchangeConfig,
    GenerateConfig,
    PlannedRunConfig,
    PrepareConfig,
    ReplayConfig,
    RunConfig,
)
from launcher.config.secrets import Referenced, masked, register_environment_resolver, variables_read
from launcher.config.strict import strict

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
    EvaluateConfig,
)

COMMAND_LINE = "the command line"  # an origin of a field
MOST_JOBS = 1000  # of a sweep; Slurm's default limit of an array
SWITCHES = {"profile": "profile.enabled"}  # sections that a single word turns on or off
# The beginnings of overrides of open dictionaries, whose keys the user chooses.
OPEN = tuple(f"{name}{end}" for name in ("deepspeed", *ENTRIES) for end in (".", "="))


@dataclass(frozen=True)
class Job(Generic[Config]):
    """A composed config to run."""

    config: Config
    index: int | None  # number of the job in a --multirun; None for a single run
    overrides: list[str]  # arguments that compose the same config from any directory, including --config-dir
    # The file, or the command line, that sets a field of file_loader.WITH_ORIGIN; the schema's are left out
    origins: dict[str, str] = field(default_factory=dict)

    def announce(self) -> None:
        """Print the number and overrides of a job of a sweep; print nothing for a single run."""
        if self.index is not None:
            print(masked(f"job      {self.index}: {' '.join(self.overrides)}"), flush=True)


def compose_jobs(config_name: str, root: type[Config], arguments: list[str]) -> list[Job[Config]]:
    """Return the jobs that the command-line `arguments` compose from `config_name`; a sweep has several.

    Hydra's flags --help, --cfg job, --multirun, --config-dir ... work as in any Hydra application, but no
    plugin, callback or other setting of Hydra can start a program. A flag that only prints, such as --help,
    gives no job. Raises ConfigError if any job cannot be composed, so that no job of a sweep starts before
    all of them are valid.
    """
    register_environment_resolver()
    schema_of(root)  # registers it, so that Hydra finds it
    check_sizes(arguments)
    # argparse accepts overrides only without flags between them, so the flags are sorted first.
    flags, overrides = parsed_flags([_addable(argument) for argument in sorted(arguments, key=_is_override)])
    directories = [f"--config-dir={Path(flags.config_dir).absolute()}"] if flags.config_dir else []
    is_printed = bool(flags.help or flags.hydra_help or flags.cfg or flags.info)
    try:
        hydra, loader = _hydra(flags.config_dir, root)
        with strict():
            parser = OverridesParser.create(config_loader=hydra.config_loader)
            parsed = parser.parse_overrides(overrides)
            check_hydra_overrides(parsed)
            check_typed(parsed, root)
            loader.replaced = {override.key_or_group for override in parsed}
            _check_groups(parsed, root)
            if flags.config_dir or not is_printed:
                mode = RunMode.MULTIRUN if flags.multirun else RunMode.RUN
                composed = hydra.compose_config(config_name, overrides, mode)
            if flags.config_dir:
                _check_own_files(config_name, composed)
            if is_printed:
                text = _printed_instead(hydra, config_name, root, flags, overrides)
                print(masked(text), end="", flush=True)
                return []
            if not flags.multirun:
                return [_job(composed, loader, root, None, directories)]
            return [
                _job(hydra.compose_config(config_name, job, RunMode.RUN), loader, root, index, directories)
                for index, job in enumerate(_jobs_of_sweep(hydra, composed, overrides))
            ]
    except BrokenPipeError:
        raise  # the reader of --help, such as `head`, closed the pipe
    except COMPOSITION_ERRORS as error:
        raise explain(error, root, overrides) from None


def _hydra(config_dir: str | None, root: type[Any]) -> tuple[Hydra, FileLoader]:
    """Return Hydra and its loader, with conf/ and a directory of the user, which it searches after conf/."""
    version.setbase("1.3")
    search_path = create_automatic_config_search_path(None, None, str(config_directory()))
    if config_dir is not None:
        path = Path(config_dir).absolute()
        if not path.is_dir():
            why, remedy = "no such directory", "--config-dir=DIRECTORY of your files"
            raise ConfigError("--config-dir", path, why, remedy)
        search_path.prepend("command-line", f"file://{path}", anchor=SearchPathQuery(provider="schema"))
    loader = FileLoader(search_path, root)
    return Hydra("launcher", loader), loader


def _check_groups(overrides: list[Override], root: type[Any]) -> None:
    for override in overrides:
        group = override.key_or_group
        if isinstance(override.value(), list | dict) and group in groups_of(root):
            raise not_an_option(group, override.get_value_element_as_str(), options_of(group))


def _check_own_files(config_name: str, composed: DictConfig) -> None:
    """Raise ConfigError if a config with files of the user has other settings of Hydra than conf/ has."""
    hydra_settings = OmegaConf.to_container(composed.hydra, resolve=False)
    check_hydra_settings(hydra_settings, _shipped_hydra_settings(config_name))


@cache
def _shipped_hydra_settings(config_name: str) -> Any:
    """Return the settings of Hydra that conf/ has. Must not be changed."""
    config = _hydra(None, RunConfig)[0].compose_config(config_name, [], RunMode.RUN)
    return OmegaConf.to_container(config.hydra, resolve=False)


def _printed_instead(
    hydra: Hydra, config_name: str, root: type[Any], flags: argparse.Namespace, overrides: list[str]
) -> str:
    """Return the help, with a description of each field, or the config; without values of the environment."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if flags.help:
            hydra.app_help(config_name, get_args_parser(), flags)
        elif flags.hydra_help:
            hydra.hydra_help(config_name, get_args_parser(), flags)
        elif flags.cfg:
            hydra.show_cfg(config_name, overrides, flags.cfg, package=None)
        else:
            hydra.show_info(flags.info, config_name, overrides)
    return described(printed.getvalue(), root) if flags.help else printed.getvalue()


def _jobs_of_sweep(hydra: Hydra, composed: DictConfig, overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job of a --multirun. Raises ConfigError for too many jobs."""
    params = composed.hydra.sweeper.params or {}
    typed = [override for override in overrides if not override.lstrip("+~").startswith("hydra.")]
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    choices: dict[str, list[str]] = {}
    for override in parser.parse_overrides([f"{name}={value}" for name, value in params.items()] + typed):
        name = override.get_key_element()
        choices[name] = [override.input_line or name]
        if override.is_sweep_override():
            choices[name] = [f"{name}={value}" for value in islice(_sweep_values(override), MOST_JOBS + 1)]
    jobs = prod(map(len, choices.values()))
    if jobs > MOST_JOBS:
        why = f"the sweep has more jobs than the maximum of {MOST_JOBS:,}"
        raise ConfigError("--multirun", None, why, "fewer values, in several commands")
    return [list(job) for job in product(*choices.values())]


def _sweep_values(override: Override) -> Iterator[str]:
    values = override.value()
    if isinstance(values, RangeSweep):
        # shuffle(range(...)) lists the whole range before its first value.
        in_order = replace(override, _value=replace(values, shuffle=False)).sweep_string_iterator()
        if len(few := list(islice(in_order, MOST_JOBS + 1))) > MOST_JOBS:
            return iter(few)
    return override.sweep_string_iterator()


def _job(
    config: DictConfig, loader: FileLoader, root: type[Config], index: int | None, directories: list[str]
) -> Job[Config]:
    """Return the job of the config that `loader` has composed last; references are resolved here."""
    overrides = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    task = [str(override) for override in overrides]
    with flag_override(config, ["struct", "readonly"], [False, False]):
        del config["hydra"]
    names = (override.lstrip("+").partition("=")[0] for override in task)
    origins = loader.origins | {name: COMMAND_LINE for name in names if name.startswith(WITH_ORIGIN)}
    return Job(to_typed(config, root, task), index, directories + task, origins)


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def _addable(argument: str) -> str:
    """Return the argument, with `++` in front if it sets a key of an open dictionary.

    A switch is written out: `profile=true` becomes profile.enabled=true.
    """
    name, _, value = argument.partition("=")
    if name in SWITCHES and {*value.lower().split(",")} <= {"true", "false"}:
        return f"{SWITCHES[name]}={value}"
    return f"++{argument}" if argument.startswith(OPEN) else argument


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
        _keep_references(composed, typed)
    except COMPOSITION_ERRORS as error:
        raise explain(error, root, overrides or []) from None
    assert isinstance(typed, root)
    return typed


def _keep_references(composed: DictConfig | ListConfig, typed: Any) -> None:
    """Replace each text of `typed` that comes from the environment by a Referenced text."""
    names = range(len(composed)) if isinstance(composed, ListConfig) else list(composed)
    for name in names:
        node: Any = composed._get_node(name)
        value = typed[name] if isinstance(typed, dict | list) else getattr(typed, str(name))
        if not node._is_interpolation():
            if isinstance(node, DictConfig | ListConfig) and value is not None:
                _keep_references(node, value)
            continue
        before = len(variables_read())
        node._dereference_node()
        if len(variables_read()) == before:
            continue
        if isinstance(value, dict | list) or is_dataclass(value):
            why = "text and numbers can come from the environment, and sections and lists cannot"
            raise ConfigError(node._get_full_key(None), node._value(), why, "one ${oc.env:NAME} per value")
        if isinstance(value, str):
            reference = Referenced(value, node._value())
            if isinstance(typed, dict | list):
                typed[name] = reference
            else:
                setattr(typed, str(name), reference)


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
    """Return the config of a run from its config.yaml, `path`. Raises ConfigError if no run wrote it.

    A text that refers to an environment variable that is not set here stays as it is written.
    """
    if not path.is_file():
        why = f"this is not a run directory, because it has no {path.name}"
        raise ConfigError("run.dir", path.parent, why, "run.dir=DIRECTORY of a run")
    check_format(path.parent)
    try:
        with strict():
            merged = OmegaConf.merge(schema_of(root), OmegaConf.load(path))
            assert isinstance(merged, DictConfig)
            _leave_unset(merged)
            return to_typed(merged, root)
    except (*COMPOSITION_ERRORS, ConfigError) as error:
        why = f"its {path.name} was not written by a run: {str(error).splitlines()[0]}"
        remedy = "run.dir=DIRECTORY of a run whose files are unchanged"
        raise ConfigError("run.dir", path.parent, why, remedy) from None


def _leave_unset(config: DictConfig | ListConfig) -> None:
    for name in range(len(config)) if isinstance(config, ListConfig) else list(config):
        node: Any = config._get_node(name)
        if isinstance(node, DictConfig | ListConfig) and not node._is_interpolation():
            if not (node._is_none() or node._is_missing()):
                _leave_unset(node)
        elif node._is_interpolation() and "oc.env" in (reference := node._value()):
            try:
                node._dereference_node()
            except InterpolationResolutionError:
                node._set_value(reference.replace("${", "\\${"))
