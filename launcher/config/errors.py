"""Errors with a message for the user: they are printed without a traceback."""

import re
import shlex
from collections.abc import Iterable
from enum import Enum
from functools import reduce

from launcher.config.secrets import Referenced, masked

_NOT_TEXT = ("null", "true", "false", "nan", "inf")  # Hydra reads these words as other values
LONGEST_VALUE = 400  # characters of a field and its value in a message


class ConfigError(Exception):
    """A setting that cannot work: field, value, reason and remedy. The command prints it and exits with 2."""

    def __init__(self, field: str, value: object, why: str, remedy: str) -> None:
        self.field, self.value, self.why, self.remedy = field, value, why, remedy
        shown = field if value is None else f"{field}={as_typed(value)}"
        super().__init__(masked(f"{_shortened(shown)}: {why}\n  try: {remedy}"))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str, str]]:
        # By default, only an exception's message is pickled; this exception is sent between ranks.
        return type(self), (self.field, self.value, self.why, self.remedy)


class RunStopped(Exception):
    """Raised on all ranks to end a run whose numbers are wrong, not its code. Printed once, no traceback."""


class NotJoined(Exception):
    """Raised by a rank if the other ranks do not come. Printed once, without a traceback."""


def _shortened(text: str) -> str:
    return (
        text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE // 2]}... ({len(text):,} characters)"
    )


def refusal(config: object, field: str, why: str, *remedies: str) -> ConfigError:
    """Return the error about `field` of `config`, with the field's value in `config`."""
    return ConfigError(field, as_typed(value_of(config, field)), why, " or ".join(remedies))


def value_of(config: object, field: str) -> object:
    """Return the value of a dotted field."""
    return reduce(getattr, field.split("."), config)


def settings(field: str, values: Iterable[object]) -> list[str]:
    """Return the setting FIELD=VALUE for each value, as the user would type it."""
    return [f"{field}={as_typed(value)}" for value in values]


def typed_text(field: str, text: str) -> str:
    """Return the setting FIELD=TEXT for any text, quoted for the shell and for Hydra where it must be."""
    if re.fullmatch(r"(/|\.\.?/|[A-Za-z_])[\w./%-]*", text, re.ASCII) and text.lower() not in _NOT_TEXT:
        return f"{field}={text}"
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # not the name of a variable
    return shlex.quote(f"{field}={hydra_text(literal)}")


def hydra_text(text: str) -> str:
    """Return the text quoted for Hydra, in which a backslash escapes quotes only. Not for text with `${`."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def quoted_setting(field: str, value: object) -> str:
    """Return the setting FIELD=VALUE, quoted for the shell; `value` is written as Hydra reads it."""
    return shlex.quote(f"{field}={value}")


def as_typed(value: object) -> str:
    """Return a value as it is typed on the command line, such as true and null for True and None."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_typed(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, Referenced):
        return value.reference
    return value.name if isinstance(value, Enum) else str(value)
