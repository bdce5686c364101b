"""Check the arguments of a command before Hydra reads them: their size, and that they run no code."""

import argparse
import contextlib
import io
import re
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override

from launcher.config.errors import ConfigError, typed_text

MOST_ARGUMENTS, MOST_TEXT, MOST_SYNTAX, MOST_DEPTH = 1000, 100_000, 4096, 32
_QUOTED = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'")

# Flags of Hydra that the launcher does not accept, with the reason and what to use instead.
_REFUSED_FLAGS = {
    "experimental_rerun": ("would run code from a pickle", "run.dir=DIRECTORY of the run, which resumes it"),
    "config_name": ("each command has its own config", "experiment=NAME, from a --config-dir"),
    "config_path": ("conf/ is part of the launcher", "--config-dir=DIRECTORY, which adds to it"),
    "shell_completion": ("would change the start-up files of the shell", "leave it out"),
    "resolve": ("would print values of the environment", "--cfg job"),
    "package": ("would print values of the environment", "--cfg job"),
}
# The settings of Hydra that a file of the user may have. Others may start programs, or do nothing here.
_ALLOWED = ("hydra.sweeper.params.", "hydra.sweeper.params=")


def check_sizes(arguments: list[str]) -> None:
    """Raise ConfigError for arguments that would take Hydra minutes to parse, or that cannot be printed."""
    if len(arguments) > MOST_ARGUMENTS:
        why = f"{len(arguments):,} arguments; the maximum is {MOST_ARGUMENTS:,}"
        raise ConfigError("command line", None, why, "a file experiment/NAME.yaml in a --config-dir")
    for argument in arguments:
        name = argument.partition("=")[0][:80]
        shown = name.encode(errors="replace").decode()
        syntax = _QUOTED.sub("", argument)
        if "\0" in argument or shown != name or argument.encode(errors="replace").decode() != argument:
            raise ConfigError(shown, None, "is not valid UTF-8 text", f"{shown}=TEXT")
        if len(argument) > MOST_TEXT or len(syntax) > MOST_SYNTAX:
            most = f"{MOST_SYNTAX:,}, or {MOST_TEXT:,} in quotes"
            why = f"has {len(argument):,} characters; the maximum is {most}"
            raise ConfigError(shown, None, why, "a file experiment/NAME.yaml in a --config-dir")
        if _depth(syntax) > MOST_DEPTH:
            why = f"has brackets {_depth(syntax)} deep; the maximum is {MOST_DEPTH}"
            raise ConfigError(shown, None, why, f"{shown}=VALUE with fewer brackets")


def _depth(syntax: str) -> int:
    depth = deepest = 0
    for character in syntax:
        depth += (character in "[{(") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


def check_no_bare_directory(arguments: list[str]) -> None:
    """Raise ConfigError if the directory of a run is given without the name of its setting."""
    for argument in arguments:
        if "=" not in argument and Path(argument).is_dir():
            why = "a setting needs a name, = and a value"
            raise ConfigError(argument, None, why, typed_text("run.dir", argument))


def parsed_flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's flags and the overrides. Raises ConfigError for a flag that is unknown or refused."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            flags: argparse.Namespace = get_args_parser().parse_args(arguments)
    except SystemExit as stop:
        if not stop.code:
            raise  # --version
        why = stderr.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ConfigError("command line", None, why, "a flag that `launcher --hydra-help` lists") from None
    for name, (why, remedy) in _REFUSED_FLAGS.items():
        if getattr(flags, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')}", None, why, remedy)
    chosen = [name for name in ("run", "cfg", "multirun", "info") if getattr(flags, name)]
    if len(chosen) > 1:
        why = "these flags cannot be combined"
        raise ConfigError(" ".join(f"--{name}" for name in chosen), None, why, f"--{chosen[0]}")
    return flags, list(flags.overrides)


def check_hydra_overrides(overrides: list[Override]) -> None:
    """Raise ConfigError for an override of Hydra's own settings, which can start programs."""
    for override in overrides:
        name = override.key_or_group.replace("/", ".").replace("@", ".")
        if name.partition(".")[0] == "hydra":
            raise _refused_setting(override.key_or_group)


def check_hydra_settings(composed: object, standard: object) -> None:
    """Raise ConfigError if files of a --config-dir change Hydra's own settings."""
    ours, theirs = _leaves(standard), _leaves(composed)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name) and not f"{name}=".startswith((*_ALLOWED, *_OF_EVERY_RUN)):
            raise _refused_setting(name)


# These differ between runs by themselves.
_OF_EVERY_RUN = ("hydra.runtime.", "hydra.overrides.", "hydra.job.override_dirname=")


def _refused_setting(name: str) -> ConfigError:
    why = "settings of Hydra can start programs; only hydra.sweeper.params in a --config-dir is read"
    return ConfigError(name, None, why, f"leave {name} out (--multirun starts a sweep)")


def _leaves(value: object, name: str = "hydra") -> dict[str, object]:
    """Return each value that is not a section by its dotted name; an empty section is a value."""
    if isinstance(value, dict) and value:
        return {leaf: v for key, item in value.items() for leaf, v in _leaves(item, f"{name}.{key}").items()}
    return {name: value}
