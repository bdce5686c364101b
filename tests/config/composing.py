"""Compose runs for tests from overrides, as the command line does, but without Hydra for each field."""

import copy
import functools
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launcher.config.compose import OPEN, compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.fields import fields_of
from launcher.config.schema import (
    CalibrateConfig,
    ComparedRunConfig,
    GenerateConfig,
    PrepareConfig,
    RunConfig,
)

FIELDS = fields_of(RunConfig)


class Case(NamedTuple):
    command: str
    text: str  # of the ConfigError


def cases(file: str) -> list[Case]:
    """Return each command and, indented below it, `field=value: why -> what to try`."""
    found = []
    for block in Path(__file__).with_name(file).read_text().strip().split("\n\n"):
        command, *said = block.splitlines()
        message, _, remedy = " ".join(line.strip() for line in said).partition(" -> ")
        found.append(Case(command, f"{message}\n  try: {remedy}"))
    return found


@functools.cache
def composed(*arguments: str) -> RunConfig:
    """Return a run composed by Hydra in a tenth of a second. Must not be changed."""
    return composed_as("config", RunConfig, *arguments)  # type: ignore[no-any-return]


def composed_as(name: str, root: Any, *arguments: str) -> Any:
    """Return the config that a command composes from `name`, as a single run."""
    [job] = compose_jobs(name, root, list(arguments))
    return job.config


def composed_generate(*arguments: str) -> GenerateConfig:
    return composed_as("generate", GenerateConfig, *arguments)  # type: ignore[no-any-return]


def composed_prepare(*arguments: str) -> PrepareConfig:
    return composed_as("prepare", PrepareConfig, *arguments)  # type: ignore[no-any-return]


def composed_compare(*arguments: str) -> ComparedRunConfig:
    return composed_as("compare", ComparedRunConfig, *arguments)  # type: ignore[no-any-return]


def composed_calibrate(*arguments: str) -> CalibrateConfig:
    return composed_as("calibrate", CalibrateConfig, *arguments)  # type: ignore[no-any-return]


# Combinations of parts that no shipped model has, as overrides.
UNPUBLISHED = {
    "rms norm, learned positions, gelu, some biases, grouped heads of 24": [
        "model=gpt_tiny", "model.norm=rms_norm", "model.num_kv_heads=2", "model.head_size=24",
        "model.biases.output=false", "model.biases.head=true", "model.tie_embeddings=false",
    ],
    "layer norm, linearly scaled positions, swiglu, some biases, heads of 8": [
        "model=llama_tiny", "model.norm=layer_norm", "model.head_size=8", "model.biases.qkv=true",
        "model.biases.down=true", "model.rope_scaling.kind=linear", "model.rope_scaling.factor=2",
    ],
    "norms before and after, geglu, capped scores and logits, scaled embedding, windows in turn": [
        "model=llama_tiny", "model.norm_placement=sandwich", "model.mlp=geglu", "model.attention_soft_cap=50",
        "model.logit_soft_cap=30", "model.embedding_scale=8", "model.attention_scale_size=24",
        "model.sliding_window=24", "model.full_attention_every=2", "model.tie_embeddings=true",
    ],
    "norms after, norms of all query heads together, scaled positions": [
        "model=llama_tiny", "model.norm_placement=post", "model.query_key_norm=projection",
        "model.rope_scaling.kind=yarn", "model.rope_scaling.factor=4",
        "model.rope_scaling.original_length=32",
    ],
    "norms of each head, a window, positions of its own for it, biases of queries": [
        "model=llama_tiny", "model.query_key_norm=head", "model.sliding_window=24",
        "model.full_attention_every=3", "model.local_rope_theta=100", "model.biases.qkv=true",
        "model.rope_scaling.kind=llama3", "model.rope_scaling.factor=8",
        "model.rope_scaling.original_length=16",
    ],
    "parallel residual, half of each head rotated, exact gelu, layer norm": [
        "model=llama_tiny", "model.residual=parallel", "model.rotary_fraction=0.5", "model.mlp=gelu_erf",
        "model.norm=layer_norm", "model.num_kv_heads=null", "model.biases.up=true", "model.biases.down=true",
    ],
    "images, rope, swiglu, rms norm, causal, no head bias": [
        "model=vit_tiny", "data=image_folder", "data.train=images", "model.norm=rms_norm",
        "model.positions=rope", "model.mlp=swiglu", "model.attention=causal", "model.num_kv_heads=2",
        "model.biases.head=false",
    ],
}  # fmt: skip


def run_of(*overrides: str) -> RunConfig:
    """Return a run: groups composed by Hydra and cached, then fields; the last value of a field counts."""
    fields = [override for override in overrides if _is_field(override)]
    run = copy.deepcopy(composed(*(override for override in overrides if override not in fields)))
    by_section: dict[str, list[Any]] = {}
    for override in OverridesParser.create().parse_overrides(fields):
        by_section.setdefault(override.key_or_group.partition(".")[0], []).append(override)
    for name, settings in by_section.items():
        # Only the sections that change: to convert all of a run takes 70 ms.
        section = OmegaConf.create({name: getattr(run, name)})
        for setting in settings:
            OmegaConf.update(section, setting.key_or_group, setting.value(), force_add=True)
        setattr(run, name, OmegaConf.to_object(section)[name])  # type: ignore[call-overload,index]
    return run


def _is_field(override: str) -> bool:
    return override.startswith(OPEN) or override.partition("=")[0] in FIELDS


def alternatives(error: ConfigError) -> list[list[str]]:
    """Return each setting that a remedy offers, as overrides; instructions in words are left out."""
    plain = re.sub(r" \([^)]*\)", "", error.remedy)
    split = [shlex.split(offer) for offer in plain.split(" or ")]
    return [
        words
        for words in split
        if all(re.match(r"[a-z_.0-9]+=(?!VALUE|OPTION|<|{KEY)", word) for word in words)
    ]


def section_of(run: RunConfig, name: str) -> Any:
    """Return a part of a run, or an entry of an open dictionary in it, by its dotted name."""

    def within(part: Any, key: str) -> Any:
        return part[key] if isinstance(part, dict) else getattr(part, key)

    return functools.reduce(within, name.split("."), run)
