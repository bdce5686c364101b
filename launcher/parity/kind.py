"""The kind of a layout: the smallest run that executes the same code. Pure, and imports no torch.

Runs of one kind differ in sizes and numbers only, such as the number of layers or the learning rate. So one
check of the kind is a check of all its runs.
"""

from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from launcher.config.compose import compose_jobs
from launcher.config.errors import as_typed, hydra_text
from launcher.config.layout import Layout
from launcher.config.schema import (
    CorpusSource,
    DataConfig,
    InputKind,
    OptimizerName,
    RunConfig,
    TrainingConfig,
)
from launcher.parity.shrink import LayoutAxes, shrunk_to

LARGEST_AXIS = 2  # ranks of an axis that is larger than 1
_SECTIONS = ("model", "parallelism", "data", "optimizer", "precision", "training", "finetune")
# These numbers replace those of the run, which are no part of its kind.
_LR = {OptimizerName.sgd: 0.1, OptimizerName.adamw: 1e-3}
_FILES = {CorpusSource.chat: "chats.jsonl", CorpusSource.image_folder: "images"}  # never opened
_GROUPS = ("hardware=cpu", "scheduler=constant", "logging=local")


def kind_of(run: RunConfig, layout: Layout) -> RunConfig:
    """Return the smallest run of this kind: an axis of 2 or more has 2 ranks, and `verify` shrinks the rest.

    The result keeps what `launcher verify` keeps, such as ZeRO stage, schedule, precision and offload.
    """
    axes = LayoutAxes(*(min(LARGEST_AXIS, size) for size in LayoutAxes.of(layout)))
    kind = shrunk_to(axes, run, replace(layout, **axes._asdict()))
    kind.verify.steps = 1
    kind.training = TrainingConfig(
        steps=1,
        global_batch_size=kind.training.global_batch_size,
        micro_batch_size=kind.training.micro_batch_size,
        compile=kind.training.compile,
    )
    _set_numbers(kind)
    _set_data(kind)
    return kind


def _set_numbers(kind: RunConfig) -> None:
    kind.optimizer.lr = _LR[kind.optimizer.name]
    kind.optimizer.weight_decay = 0.1 if kind.optimizer.weight_decay else 0.0
    if kind.optimizer.gradient_clipping is not None:
        kind.optimizer.gradient_clipping = 0.5
    if kind.model.dropout:
        kind.model.dropout = 0.1
    if kind.finetune.lora.dropout:
        kind.finetune.lora.dropout = 0.1


def _set_data(kind: RunConfig) -> None:
    """Replace the user's data by placeholders, because `verify` draws its batches."""
    source = CorpusSource.chat if kind.data.source is CorpusSource.chat else CorpusSource.stdlib
    if kind.model.inputs is InputKind.patches:
        source = CorpusSource.image_folder
    kind.data = DataConfig(
        source=source,
        train=_FILES.get(source),
        sequence_length=kind.data.sequence_length,
        document_attention=kind.data.document_attention,
    )


def overrides_of(kind: RunConfig) -> list[str]:
    """Return the overrides that compose the kind: each setting that differs from the defaults."""
    groups = [f"data={kind.data.source.name}", f"optimizer={kind.optimizer.name.name}", *_GROUPS]
    if kind.data.train is not None:
        groups.append(f"data.train={kind.data.train}")
    default = compose_jobs("config", RunConfig, groups)[0].config
    settings = [
        f"{name}={_written(value)}"
        for section in _SECTIONS
        for name, value in _differing(section, getattr(default, section), getattr(kind, section))
    ]
    if kind.deepspeed:
        settings.append(f"deepspeed={_written(kind.deepspeed)}")
    return [*groups, *settings, f"verify.steps={kind.verify.steps}"]


def sections_of(kind: RunConfig) -> dict[str, Any]:
    """Return the settings that distinguish this kind from others, as plain values for JSON."""
    return {name: _plain(getattr(kind, name)) for name in (*_SECTIONS, "deepspeed")}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in sorted(value.items())}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.name if isinstance(value, Enum) else value


def _differing(name: str, default: Any, value: Any) -> list[tuple[str, object]]:
    if not is_dataclass(value):
        return [] if value == default else [(name, value)]
    return [
        pair
        for field in fields(value)
        for pair in _differing(
            f"{name}.{field.name}", getattr(default, field.name), getattr(value, field.name)
        )
    ]


def _written(value: object) -> str:
    """Return a value as Hydra reads it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_written(value[key])}" for key in sorted(value)) + "}"
    return hydra_text(value) if isinstance(value, str) and not isinstance(value, Enum) else as_typed(value)
