"""Check the paths of a config before anything is created. Pure, apart from looking up home directories."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from launcher.config.errors import ConfigError

# The fields that hold a path, the name of a file, or paths by name, with an example.
PATHS = {
    "run.dir": "runs/NAME", "data.train": "null", "data.validation": "null", "data.test": "null",
    "data.sources": "corpora/NAME", "data.validation_sources": "corpora/NAME", "data.tokenizer": "null",
    "data.chat_template": "null", "chat_template": "null",
    "checkpoint.resume": "auto", "checkpoint.init_from": "null", "plan.figure": "plan.png",
    "learned": "my_conf/hardware/NAME.yaml",
    "verify.report": "verify.json", "compare.figure": "compare.png", "compare.report": "compare.json",
    "tokenizer.path": "null", "tokenizer": "null", "dir": "my_conf",
    "name": "this_machine", "text": "null", "tokens": "null", "chats": "null", "task_dir": "null",
    "report": "evaluation.json",
}  # fmt: skip

# Bytes of a path, and of a name in it. The system takes 4095 and 255; the launcher appends to both.
LONGEST_PATH, LONGEST_NAME = 3000, 230


def check_paths(config: object) -> None:
    """Raise ConfigError for a path that no file system accepts."""
    for field, text in _paths_in(config):
        check_path(field, text, PATHS.get(field, "corpora/NAME"))


def check_path(field: str, text: str, example: str, *, is_field: bool = True) -> None:
    if why := _why_impossible(text):
        shown = text if text.isprintable() else repr(text)
        raise ConfigError(field, shown, why, f"{field}={example}" if is_field else example)


def path_argument(name: str, text: str) -> Path:
    """Return the path in an argument of a command; `name` is its name in the usage. Raises ConfigError."""
    check_path(name, text, f"a path such as {PATHS['run.dir']}", is_field=False)
    return Path(text).expanduser()


def with_a_name(path: Path) -> Path:
    """Return the path, resolved if it ends in . or .., and one in the working directory for the root."""
    if path.name in ("", ".."):
        path = path.resolve()
    return path if path.name else Path.cwd() / "launcher"


def free_path(path: Path, ending: str = "") -> Path:
    """Return a path beside `path` that does not exist: its name without `ending`, -2 or more, `ending`."""
    path = with_a_name(path)
    stem = path.name.removesuffix(ending)
    candidates = (path.with_name(f"{stem}-{number}{ending}") for number in range(2, 10**6))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


def _why_impossible(text: str) -> str | None:
    if control := re.search(r"[\x00-\x1f\x7f]", text):
        return f"the path contains the control character {control[0]!r}"
    if not text.strip():
        return "the path is empty"
    if text.encode(errors="replace").decode() != text:
        return "the path is not valid UTF-8"
    if os.path.expanduser(text).startswith("~"):
        return f"{text.partition('/')[0]} is not the home directory of a user of this machine"
    if len(text.encode()) > LONGEST_PATH:
        return f"the path has {len(text.encode()):,} bytes; the maximum is {LONGEST_PATH:,}"
    longest = max(len(name.encode()) for name in text.split("/"))
    if longest > LONGEST_NAME:
        return f"a name in the path has {longest:,} bytes; the maximum is {LONGEST_NAME}"
    return None


def _paths_in(config: object) -> Iterator[tuple[str, str]]:
    for field in PATHS:
        value: object = config
        for name in field.split("."):
            value = getattr(value, name, None)
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict):
            yield from ((f"{field}.{name}", text) for name, text in value.items())
