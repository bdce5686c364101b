"""Runs for tests, composed from overrides as the command line would, but without Hydra for each field."""

import copy
import functools
import re
import shlex
import sys
from typing import Any
from unittest import mock

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.fields import fields_of
from launcher.config.schema import GenerateConfig, RunConfig


def composed(*arguments: str) -> RunConfig:
    """One run, by Hydra itself. Slow: a fifth of a second."""
    with mock.patch.object(sys, "argv", ["launcher"]):
        [job] = compose_jobs("config", RunConfig, list(arguments))
    return job.config


def composed_generate(*arguments: str) -> GenerateConfig:
    with mock.patch.object(sys, "argv", ["launcher"]):
        [job] = compose_jobs("generate", GenerateConfig, list(arguments))
    return job.config


def run_of(*overrides: str) -> RunConfig:
    """One run: groups by Hydra, kept between calls; fields laid over them, the last of each name counts."""
    fields = [
        override for override in overrides if override.partition(".")[0] == "deepspeed" or _is_field(override)
    ]
    groups = copy.deepcopy(_groups(*(override for override in overrides if override not in fields)))
    if not fields:
        return groups
    run = OmegaConf.structured(groups)
    for override in OverridesParser.create().parse_overrides(fields):
        OmegaConf.update(run, override.key_or_group, override.value(), force_add=True)
    typed = OmegaConf.to_object(run)
    assert isinstance(typed, RunConfig)
    return typed


_groups = functools.lru_cache(maxsize=None)(composed)


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(fields_of(RunConfig))


def _is_field(override: str) -> bool:
    return override.startswith("deepspeed.") or override.partition("=")[0] in _names()


def alternatives(error: ConfigError) -> list[list[str]]:
    """What the remedy offers, each as the overrides to type; without what is only said in prose."""
    plain = re.sub(r" \([^)]*\)", "", error.remedy)
    split = [shlex.split(offer) for offer in plain.split(" or ")]
    return [words for words in split if all(re.match(r"[a-z_.0-9]+=(?!VALUE)", word) for word in words)]


def section_of(run: RunConfig, name: str) -> Any:
    """A part of a run by its dotted name."""
    return functools.reduce(getattr, name.split("."), run)
