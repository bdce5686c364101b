"""Sealed JSON: a manifest with its own SHA-256, and strict parsing of its values. Imports no torch.

A manifest is input: it may be damaged, forged, or another program's file. Its bytes are bounded and verified
before they are parsed; then each value must have the right type and lie within bounds. Everything else raises
Malformed, whose message continues a sentence that begins with the name of the file.
"""

import hashlib
import json
import re
from math import isfinite
from pathlib import Path
from typing import Any

from launcher.config.run_format import FORMAT, wrong_format
from launcher.files import read_regular, what_is_wrong

NOT_READABLE = "cannot be read: it is damaged or was written by another program"
MOST_BYTES = 2**28  # of a manifest. 1.3 million pieces, as of 1,024 ranks under ZeRO-0, make 0.1 GB.
LARGEST = 2**62  # of any integer
_LONGEST_TEXT = 4096
_DEEPEST = 32  # levels of a value of any type
_SEALED = re.compile(rb'\{"format": (\d{1,9}), "sha256": "([0-9a-f]{64})", "([a-z]+)": (.*)\}\n', re.DOTALL)
_FORMAT_ONLY = re.compile(rb'\s*\{\s*"format":\s*(-?\d{1,9})\b')


class Malformed(ValueError):
    """Raised for content that a manifest cannot have."""


def sealed(kind: str, content: dict[str, Any]) -> str:
    """Return `content` as JSON with its SHA-256, so that any changed digit is detected."""
    text = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"format": {FORMAT}, "sha256": "{digest}", "{kind}": {text}}}\n'


def unsealed(path: Path, kind: str) -> dict[str, Any]:
    """Return the content that `sealed` wrote to `path`. Raises Malformed."""
    try:
        data = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise Malformed(what_is_wrong(error)) from None
    match = _SEALED.fullmatch(data)
    number = match or _FORMAT_ONLY.match(data)
    if number and int(number[1]) != FORMAT:
        raise Malformed(wrong_format(int(number[1])))
    if match is None:
        raise Malformed(NOT_READABLE)
    if hashlib.sha256(match[4]).hexdigest().encode() != match[2]:
        raise Malformed("was altered: it does not match its own SHA-256")
    if match[3] != kind.encode():
        raise Malformed(f"is a manifest of {match[3].decode()}, not of {kind}")
    return table(parsed(match[4]), kind)


def parsed(text: bytes) -> object:
    """Return the value of a JSON text. Raises Malformed, also for keys that occur twice."""
    try:
        value: object = json.loads(text, object_pairs_hook=_without_duplicates)
    except Malformed:
        raise
    except (ValueError, RecursionError, MemoryError):
        raise Malformed(NOT_READABLE) from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"has the key {shown(key)} twice")
    return result


def shown(value: object) -> str:
    """Return a value for a message, in at most 60 printable characters."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number beyond 2^62"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fields(
    value: object, where: str, required: set[str], optional: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the object if it has the required keys and no others than the optional ones."""
    given = table(value, where)
    if missing := sorted(required - given.keys()):
        raise Malformed(f"lacks {where}.{missing[0]}")
    if unknown := sorted(given.keys() - required - optional):
        raise Malformed(f"has {where}.{shown(unknown[0])}, which this launcher does not know")
    return given


def table(value: object, where: str) -> dict[str, Any]:
    """Return the value if it is an object; its keys are printable and not too long."""
    if not isinstance(value, dict):
        raise Malformed(f"has {shown(value)} as {where} instead of an object")
    for key in value:
        text(key, f"a key of {where}")
    return value


def items(value: object, where: str, most: int = LARGEST) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise Malformed(f"has {shown(value)} as {where} instead of a list of at most {most} values")
    return value


def text(value: object, where: str) -> str:
    """Return the value if it is text that can be printed."""
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise Malformed(f"has {shown(value)} as {where} instead of printable text")
    return value


def integer(value: object, where: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise Malformed(f"has {shown(value)} as {where} instead of an integer from {least} to 2^62")
    return value


def number(value: object, where: str) -> float:
    """Return the value if it is a number, NaN and infinity among them."""
    if type(value) is float:
        return value
    return float(integer(value, where, least=-LARGEST))


def finite(value: object, where: str) -> float:
    if not isfinite(result := number(value, where)):
        raise Malformed(f"has {shown(value)} as {where} instead of a finite number")
    return result


def boolean(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise Malformed(f"has {shown(value)} as {where} instead of true or false")
    return value


def free(value: object, where: str) -> dict[str, Any]:
    """Return the object if it is not nested too deeply; its keys are printable and its integers bounded."""
    level: list[object] = [table(value, where)]
    for _ in range(_DEEPEST):
        inner: list[object] = []
        for entry in level:
            if isinstance(entry, (dict, list)):
                inner += table(entry, where).values() if isinstance(entry, dict) else entry
            elif isinstance(entry, int):
                integer(int(entry), where, least=-LARGEST)
        if not inner:
            return table(value, where)
        level = inner
    raise Malformed(f"has a value in {where} that is nested more than {_DEEPEST} levels deep")
