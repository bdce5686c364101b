"""Rules of the rates that were measured on a card. Pure, like validate.py."""

import re

from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig

_SHAPE = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})x([1-9]\d{0,8})")
_LEAST, _MOST = 1e-6, 1e24  # FLOP/s, such that no time of a plan overflows


def shape_of(name: str) -> tuple[int, int, int] | None:
    """Return m, n and k of a shape that is written as 4096x1280x8192; None for any other text."""
    match = _SHAPE.fullmatch(name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def check_shapes(run: RunConfig) -> None:
    """Raise ConfigError for a measured product with an invalid shape or rate."""
    for dtype, rates in vars(run.hardware.card.shapes).items():
        field = f"hardware.card.shapes.{dtype}"
        for name, per_s in rates.items():
            if shape_of(name) is None:
                why = f"{name} is not a shape MxNxK of a product (m, k) x (k, n)"
                raise ConfigError(field, _entry(name, per_s), why, "a shape such as 4096x1280x8192")
            if not _LEAST <= per_s <= _MOST:
                why = f"the FLOP/s of a product must be a finite number from {_LEAST:g} to {_MOST:g}"
                raise ConfigError(field, _entry(name, per_s), why, f"{field}={_entry(name, 1e14)}")


def _entry(name: str, per_s: float) -> str:
    """Return a rate as it is typed: a name that begins with a digit needs the braces."""
    return f"{{{name}:{per_s:g}}}"
