"""List what differs between a run and the checkpoint that it resumes from. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from launcher import __version__
from launcher.checkpoint.manifest import Manifest
from launcher.config.errors import as_typed
from launcher.config.fields import fields_of
from launcher.config.schema import RunConfig
from launcher.config.secrets import as_written, masked

# Fields that change nothing about the training.
_ASIDE = ("run.", "submit.", "slurm.", "verify.", "plan.", "checkpoint.resume", "checkpoint.init_from",
          "checkpoint.fallback", "training.stop_at")  # fmt: skip
_LONGEST = 80  # characters of a value
_ABSENT = object()


def changes_since(manifest: Manifest, run: RunConfig, layout: str) -> list[str]:
    """Return a line `name: before -> now` for the layout and each field that differs; empty without any."""
    before, now = dict(_flat(manifest.config)), dict(_flat(as_written(run)))
    changes: list[tuple[str, object, object]] = [
        ("launcher", manifest.launcher, __version__),
        ("layout", manifest.layout, layout),
    ]
    changes += [
        (name, before.get(name, _ABSENT), now.get(name, _ABSENT))
        for name in dict.fromkeys([*now, *before])
        # A field that the checkpoint's launcher did not have yet has its default.
        if not name.startswith(_ASIDE) and not (name not in before and name in fields_of(RunConfig))
    ]
    return [f"{name}: {_shown(old)} -> {_shown(new)}" for name, old, new in changes if old != new]


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the fields of a config by dotted name."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value != {}:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    text = "not set" if value is _ABSENT else masked(as_typed(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
