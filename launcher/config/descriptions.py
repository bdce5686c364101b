"""Describe fields in `--help` by their comments in schema.py, which are written once, there."""

import re
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from launcher.config import schema
from launcher.config.fields import fields_of


def described(help_text: str, root: type[Any]) -> str:
    """Return a help text whose fields, in lines of YAML, end with their descriptions."""
    known, path, lines = descriptions(root), list[str](), []
    for line in help_text.splitlines():
        if match := re.match(r"( *)(\w+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            description = known.get(".".join(path), "")
            line = f"{line:<40}  # {description}" if description else line
        lines.append(line)
    return "\n".join(lines) + "\n"


def descriptions(root: type[Any], prefix: str = "") -> dict[str, str]:
    """Return the description of each field by dotted name: its comment, else its valid values."""
    comments, hints = _comments()[root.__name__], get_type_hints(root)
    for base in root.__mro__[1:]:
        comments = _comments().get(base.__name__, {}) | comments
    texts: dict[str, str] = {}
    for field in fields(root):
        name = f"{prefix}{field.name}"
        if is_dataclass(hints[field.name]):
            texts |= descriptions(hints[field.name], f"{name}.")
        else:
            texts[name] = comments.get(field.name, "")
    if not prefix:
        texts = {name: text or fields_of(root)[name] for name, text in texts.items()}
    return texts


@cache
def _comments() -> dict[str, dict[str, str]]:
    """Return the comments of schema.py by class and field: beside the field, else in the lines above it."""
    comments: dict[str, dict[str, str]] = {}
    name, above = "", list[str]()
    for line in Path(schema.__file__).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"class (\w+)", line):
            name, above = match[1], []
        elif match := re.match(r"    # (.*)", line):
            above.append(match[1])
        elif match := re.match(r"    (\w+): [^#]*(?:# (.*))?$", line):
            comments.setdefault(name, {})[match[1]] = match[2] or " ".join(above)
            above = []
        else:
            above = []
    return comments
