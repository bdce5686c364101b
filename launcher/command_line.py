"""The command line: `launcher [train | plan | verify | submit | generate | ...] OVERRIDES`.

Finds the verb, and turns exceptions into exit codes. Each command module is imported when its verb is typed,
and imports torch only after it has composed and checked the config.
"""

import difflib
import os
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

from launcher import __version__
from launcher.config.errors import ConfigError
from launcher.config.secrets import without_values
from launcher.launch.environment import speaks_for_all
from launcher.launch.exit_codes import FAILED, REFUSED
from launcher.launch.local import RankFailure, Stopped
from launcher.launch.records import RankEndKind, record_end

# Each verb's entry point in launcher.commands: a function that takes the arguments and returns the exit code.
VERBS = {
    "train": "train:main",
    "plan": "plan:main",
    "compare": "compare:main",
    "calibrate": "calibrate:main",
    "verify": "verify:main",
    "preflight": "preflight:main",
    "submit": "submit:main",
    "job": "job:main",
    "sync": "sync:main",
    "generate": "generate:main",
    "replay": "replay:main",
    "evaluate": "evaluate:main",
    "checkpoint": "checkpoint:main",
    "status": "status:main",
    "doctor": "doctor:main",
    "prepare": "prepare:main",
    "export": "exchange:export_main",
    "import": "exchange:import_main",
}


# The packages that a verb computes with, and the flags with which it computes nothing.
PACKAGES = {
    **dict.fromkeys(
        ("train", "compare", "calibrate", "verify", "replay", "evaluate"), ("torch", "deepspeed")
    ),
    **dict.fromkeys(("generate", "export", "import"), ("torch",)),
}
NOT_COMPUTING = ("-h", "--help", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version")
# Flags of Hydra whose value may be the next argument.
WITH_VALUE = (
    *("--cfg", "-c", "--info", "-i"),
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
)


def run_command(arguments: list[str]) -> int:
    """Return the exit code. Print an error that the user can correct as one message without a traceback."""
    if arguments == ["--version"]:
        print(f"launcher {__version__}")
        return 0
    try:
        verb, rest = _split(arguments)
        _check_packages(verb, rest)
        return entry_point(verb)(rest)
    except ConfigError as error:
        record_end(
            int(os.environ.get("SLURM_PROCID", "0")),
            RankEndKind.refused,
            f"ConfigError: {error}",
        )
        # Under torchrun or srun every rank is refused alike, and the first rank reports it.
        return _report(error, REFUSED) if speaks_for_all(os.environ) else REFUSED
    except RankFailure as failure:
        return _report(failure, FAILED)
    except Stopped as stop:
        code = stop.exit_code
        message = f"stopped by {stop.signal.name}; all ranks have ended{failure_during(stop)}"
        return _report(message, code) if speaks_for_all(os.environ) else code


def failure_during(stop: BaseException) -> str:
    """Return a further line about the failure of a rank during the stop, such as a save that failed."""
    cause = stop.__cause__
    is_cause = isinstance(cause, ConfigError) or (isinstance(cause, RankFailure) and not cause.secondary)
    return f"\nlauncher: during the stop: {cause}" if is_cause else ""


def entry_point(verb: str) -> Callable[[list[str]], int]:
    module, _, function = VERBS[verb].partition(":")
    entry: Callable[[list[str]], int] = getattr(import_module(f"launcher.commands.{module}"), function)
    return entry


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the verb and the arguments after it; without a verb the arguments are those of `train`."""
    word = arguments[0] if arguments else ""
    if word in VERBS:
        return word, arguments[1:]
    if word.isalpha() and (similar := difflib.get_close_matches(word, VERBS, n=1, cutoff=0.7)):
        raise ConfigError(word, None, "no such command", f"launcher {similar[0]}")
    for place, (before, word) in enumerate(pairwise(("", *arguments))):
        if word in VERBS and before not in WITH_VALUE:
            settings = shlex.join(arguments[:place] + arguments[place + 1 :])
            why = "the command comes before its settings"
            raise ConfigError(word, None, why, f"launcher {word} {settings}")
    return "train", arguments


def _check_packages(verb: str, arguments: list[str]) -> None:
    """Raise ConfigError if the verb computes and a package is missing. Imports none of them."""
    flags = {argument.partition("=")[0] for argument in arguments}
    packages = () if flags.intersection(NOT_COMPUTING) else PACKAGES.get(verb, ())
    if missing := next((name for name in packages if find_spec(name) is None), None):
        why = f"{sys.executable} has no package {missing}"
        remedy = f"`launcher doctor`, pip install {missing}, or the Python of `make setup`"
        raise ConfigError(missing, None, why, remedy)


def _report(message: object, code: int) -> int:
    print(f"launcher: {without_values(str(message))}", file=sys.stderr)
    return code
