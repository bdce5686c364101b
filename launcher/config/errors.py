"""Raised for every user error."""

from collections.abc import Iterable
from enum import Enum
from functools import reduce


class ConfigError(Exception):
    """A setting that cannot work: the field, its value, why, and what to try instead.

    Printed as one message without a traceback; the process exits with code 2.
    """

    def __init__(self, field: str, value: object, why: str, remedy: str) -> None:
        self.field, self.value, self.why, self.remedy = field, value, why, remedy
        shown = field if value is None else f"{field}={as_typed(value)}"
        super().__init__(f"{shown}: {why}\n  try: {remedy}")

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str, str]]:
        # Exceptions pickle by their message alone; this one travels between ranks.
        return type(self), (self.field, self.value, self.why, self.remedy)


def refusal(config: object, field: str, why: str, *remedies: str) -> ConfigError:
    """The error about `field` of `config`, with the value it has there."""
    return ConfigError(field, as_typed(value_of(config, field)), why, " or ".join(remedies))


def value_of(config: object, field: str) -> object:
    """The value of a dotted field."""
    return reduce(getattr, field.split("."), config)


def settings(field: str, values: Iterable[object]) -> list[str]:
    """Each value as the setting that a user would type."""
    return [f"{field}={as_typed(value)}" for value in values]


def as_typed(value: object) -> str:
    """A value as it is typed on the command line: true and null, not True and None."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_typed(value[key])}" for key in sorted(value)) + "}"
    return value.name if isinstance(value, Enum) else str(value)
