"""Paths among the arguments of a command that also takes settings NAME=VALUE."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any


def is_path(argument: str, root: type[Any]) -> bool:
    """Return whether an argument is a path: neither a flag nor a setting of the command with the type `root`.

    A path may contain `=`, as lang=en/a.parquet and runs/lr=0.1 do. Only a group of Hydra, which is refused,
    has a `/` in its name.
    """
    name, equals, _ = argument.partition("=")
    if argument.startswith("-") or not equals:
        return not argument.startswith("-")
    plain = name.lstrip("+~")
    if "/" in name:
        return not plain.startswith("hydra/")
    is_setting = plain.partition(".")[0] in {field.name for field in fields(root)}
    return not is_setting and os.path.exists(argument)


def typed_path(path: Path) -> str:
    """Return a path as an argument that `is_path` accepts, also if the path does not exist."""
    return f"./{path}" if "=" in str(path).partition("/")[0] else str(path)
