"""Recognise secrets by name and by value, and keep text of the environment out of what is written. Pure."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from math import log2
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

_PARTS = frozenset(
    "pass passwd password passphrase pwd pw pat token secret secrets key keys apikey cred creds credential "
    "credentials auth authorization oauth cookie cookies dsn webhook webhooks bearer jwt otp".split()
)
_ENDINGS = ("token", "secret", "password", "passwd", "passphrase", "credentials", "apikey", "accesskey",
            "secretkey", "privatekey")  # fmt: skip
_STORES = frozenset("database db redis mongo mongodb postgres postgresql mysql amqp broker".split())
# Settings of libraries, such as NCCL_NET_PLUGIN_KEY and OMP_PLACES.
_LIBRARIES = ("NCCL_", "OMP_", "KMP_", "MKL_", "UCX_", "FI_", "GLOO_")

_URL_PASSWORD = re.compile(r"(://[^\s/@:]*:)[^\s/@]+@")  # in linear time, also in long texts
_TOKEN = re.compile(
    r"\b(gh[pousr]_\w{8}|github_pat_|glpat-|hf_[A-Za-z]{8}|sk-[\w-]{8}|[sr]k_(live|test)_|(AKIA|ASIA)[A-Z0-9]{12}"
    r"|xox[abeprs]-|eyJ[\w-]{8}|AIza[\w-]{20}|ya29\.|npm_\w{16}|pypi-\w{16}|dckr_pat_)|-----BEGIN "
)
_DIGESTS = frozenset("commit sha sha1 sha256 hash digest checksum revision rev uuid guid md5".split())
_LONG = 24  # characters of a text without words that may be a key


def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name probably holds a secret, such as MY_PASS or DATABASE_URL."""
    if name.upper().startswith(_LIBRARIES):
        return False
    parts = _parts(name)
    is_store = bool(parts & _STORES) and bool(parts & {"url", "uri"})
    return bool(parts & _PARTS) or is_store or any(part.endswith(_ENDINGS) for part in parts)


def is_secret_value(value: str, name: str = "") -> bool:
    """Return whether the value of a variable is a secret by its form, or a long random text."""
    is_digest = bool(_parts(name) & _DIGESTS)
    return has_token(value) or (not is_digest and any(map(_is_random, re.findall(r"[A-Za-z0-9+]+", value))))


def has_token(text: str) -> bool:
    """Return whether the text has a URL with a password, or a token with the prefix of a known service."""
    return bool(_URL_PASSWORD.search(text) or _TOKEN.search(text))


def _parts(name: str) -> set[str]:
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def _is_random(text: str) -> bool:
    if len(text) < _LONG or text.isdecimal():
        return False
    entropy = -sum(n / len(text) * log2(n / len(text)) for n in Counter(text).values())
    if re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", text):
        return len(text) >= 32 and entropy > 3
    return all(re.search(kind, text) for kind in ("[a-z]", "[A-Z]", "[0-9]")) and entropy > 3.8


def masked(text: str) -> str:
    """Return the text with *** for the password of each URL."""
    return _URL_PASSWORD.sub(r"\1***@", text)


class Referenced(str):
    """Text that a config takes from the environment; `reference` is written and printed in its place."""

    reference: str  # such as ${oc.env:SCRATCH}/runs

    def __new__(cls, text: str, reference: str) -> "Referenced":
        referenced = super().__new__(cls, text)
        referenced.reference = reference
        return referenced

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.reference


@cache
def variables_read() -> list[str]:
    """Return the names of the environment variables that configs have read. The resolver adds to the list.

    It is one list per process, because OmegaConf has one set of resolvers per process.
    """
    return []


def note_variables(names: Iterable[str]) -> None:
    """Let `without_values` replace the values of these environment variables in this process, too."""
    variables_read().extend(names)


def register_environment_resolver() -> None:
    """Replace OmegaConf's `oc.env` by one that also notes the name of the variable."""

    def read(name: str, *default: Any) -> Any:
        variables_read().append(name)
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", read, replace=True)


def without_values(message: str) -> str:
    """Return a message with ${oc.env:NAME} for each value that a config has read, and masked passwords."""
    for name in dict.fromkeys(variables_read()):
        value = os.environ.get(name, "")
        if len(value) >= 4:  # a shorter value would be replaced inside words
            message = message.replace(value, f"${{oc.env:{name}}}")
    return masked(message)


def as_written(value: Any, text: Callable[[str], str] = str) -> Any:
    """Return a config as plain values that may be written: references, masked passwords, enums by name.

    `text` is applied to each text that is not a reference.
    """
    if is_dataclass(value):
        return {name: as_written(item, text) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: as_written(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [as_written(item, text) for item in value]
    if isinstance(value, Referenced):
        return masked(value.reference)
    if isinstance(value, str):
        return text(masked(value))
    return value.name if isinstance(value, Enum) else value


def as_yaml(config: object) -> str:
    """Return the YAML of a config, which composes to the same config where the environment is the same."""
    return OmegaConf.to_yaml(OmegaConf.create(as_written(config, _escaped)))


def _escaped(text: str) -> str:
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", text)
