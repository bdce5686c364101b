"""Output files that a setting names. A file that the launcher did not write is never overwritten."""

import json
import os
from pathlib import Path

from launcher.config.errors import ConfigError, typed_text
from launcher.config.paths import free_path
from launcher.files import read_regular

FIGURE_TITLE = "written by launcher"  # in the metadata of a picture
_MOST_BYTES = 2**26


def check_overwrites_no_picture(path: Path, field: str) -> None:
    """Raise ConfigError if `path` exists and is not a picture that the launcher drew."""
    content = _content(path)
    if content and FIGURE_TITLE.encode() not in content:
        raise _not_ours(path, field)


def check_overwrites_no_report(path: Path, field: str, key: str) -> None:
    """Raise ConfigError if `path` exists and is not a report; its object, or each of its list, has `key`."""
    if content := _content(path):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        objects = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, dict) and key in entry for entry in objects):
            raise _not_ours(path, field)


def is_device(path: Path) -> bool:
    """Return whether `path` is a device or a pipe, whose content nobody loses."""
    if path.is_relative_to("/dev"):  # /dev/stdout may lead to a file, by the user's own redirection
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _content(path: Path) -> bytes:
    """Return the content of the file; empty if it does not exist or is a device such as /dev/stdout."""
    if is_device(path) or not os.path.lexists(path):
        return b""
    try:
        return read_regular(path.resolve(), _MOST_BYTES)
    except OSError as error:
        return str(error).encode()  # not ours


def _not_ours(path: Path, field: str) -> ConfigError:
    remedy = typed_text(field, str(free_path(path, path.suffix)))
    return ConfigError(field, path, "already exists, and the launcher did not write it", remedy)
