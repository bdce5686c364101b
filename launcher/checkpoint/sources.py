"""Sources of weights: a checkpoint, a run's final weights, a Hugging Face directory. Imports no torch."""

import json
import shlex
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

from launcher.checkpoint.companions import base_config
from launcher.checkpoint.final import FINAL_WEIGHTS, final_step, read_final_weights
from launcher.checkpoint.huggingface import Converter, Entry, NotConvertible, converter_of, model_of, titles
from launcher.checkpoint.huggingface.converter import setting_names, setting_of
from launcher.checkpoint.manifest import (
    MANIFEST,
    UnusableCheckpoint,
    checkpoint_at,
    newest_complete_before,
    read_manifest,
    step_of,
)
from launcher.config.compose import load_typed
from launcher.config.errors import ConfigError, as_typed
from launcher.config.run_format import IDENTITY
from launcher.config.schema import LoraConfig, ModelConfig, PositionKind, RunConfig
from launcher.config.shape import has_lora

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_AS_SAFETENSORS = "the same model as safetensors (save_pretrained writes them)"
_AS_PUBLISHED = "the model as published: a directory with config.json and safetensors in bf16, fp16 or fp32"
# By the precision that a safetensors file names: its name in torch, without those of quantised weights.
_PRECISIONS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
RUN_CONFIG = "config.yaml"
_PUBLISHED = f"a {titles('or')} as published"
_SOURCES = "a run's directory, a checkpoint, or a Hugging Face directory with config.json and safetensors"

_Section = TypeVar("_Section", ModelConfig, LoraConfig)


class WeightsKind(Enum):
    checkpoint = "checkpoint"
    run = "run"  # final weights, by logical name
    huggingface = "huggingface"


@dataclass(frozen=True)
class WeightSource:
    """The weights of a whole model on disk: directory, kind of source, and model."""

    path: Path
    kind: WeightsKind
    model: ModelConfig
    model_type: str | None = None  # of the Hugging Face directory, or of the one that a run began with
    lora: LoraConfig | None = None  # the adapters of a run; None without adapters
    base: Path | None = None  # the weights that the adapters were trained for; None if they were drawn

    @property
    def converter(self) -> Converter:
        """The Hugging Face model type of the weights. Raises NotConvertible."""
        return converter_of(self.model, self.model_type)


def weights_at(path: Path, field: str) -> WeightSource:
    """Return the weights at `path`. Raises ConfigError about `field` if names or lengths show a gap."""
    path = path.expanduser()
    if checkpoint := _newest_checkpoint(path):
        try:
            manifest = read_manifest(checkpoint)
            config, step = manifest.config, manifest.step
            model, lora = _model_in(config), _lora_in(config)
        except UnusableCheckpoint as unusable:
            raise damaged(field, checkpoint, unusable) from None
        if lora is None:
            return WeightSource(checkpoint.resolve(), WeightsKind.checkpoint, model, _model_type(checkpoint))
        # The final weights of a run with adapters need no other directory.
        if final_step(path) != step:
            base = _base_in(config)
            if base is None:
                why = "holds adapters only, and their base weights were drawn at random, not loaded"
                raise ConfigError(field, path, why, "the run's directory, once it has finished")
            at = checkpoint.resolve()
            return WeightSource(at, WeightsKind.checkpoint, model, _model_type(checkpoint), lora, base)
    if (path / RUN_CONFIG).exists() and (path / FINAL_WEIGHTS).is_dir():
        run = load_typed(path / RUN_CONFIG, RunConfig)
        try:
            read_final_weights(path)
        except UnusableCheckpoint as unusable:
            raise ConfigError(field, path, str(unusable), _SOURCES) from None
        lora, begun = (run.finetune.lora, run.checkpoint.init_from) if has_lora(run) else (None, None)
        base = None if begun is None else Path(begun).expanduser()
        return WeightSource(path.resolve(), WeightsKind.run, run.model, _model_type(path), lora, base)
    if (path / "config.json").exists():
        model = _their_model(path, field)
        weights = WeightSource(path.resolve(), WeightsKind.huggingface, model, _model_type(path))
        stored_tensors(weights, field)
        return weights
    raise ConfigError(field, path, *_no_weights(path))


def _newest_checkpoint(path: Path) -> Path | None:
    """Return the checkpoint `path`, or the newest of the run `path`; None without one.

    Also None if the final weights of the run are of a later step, as after a last save that failed.
    """
    newest = checkpoint_at(path)
    final = final_step(path) if newest else None
    return None if newest and final is not None and final > step_of(newest) else newest


def _no_weights(path: Path) -> tuple[str, str]:
    """Return why no weights can be read from `path`, and what to name instead."""
    if not path.is_dir():
        return _file_of_weights(path)
    if (path / IDENTITY).exists():
        return "this run has no checkpoint yet", _SOURCES
    if (path / "adapter_config.json").exists():
        return (
            "holds an adapter alone",
            "the model that it adapts, with the adapter merged (peft's merge_and_unload)",
        )
    if snapshots := sorted(path.glob("snapshots/*/config.json")):
        return "is a folder of the Hugging Face cache", str(snapshots[-1].parent)
    if any(path.glob("*.safetensors")):
        return "has safetensors and no config.json", "the config.json of the model beside them"
    for file in sorted(path.iterdir()):
        if why := _other_format(file):
            return f"has {file.name}, which {why}", _AS_PUBLISHED
    return "contains no weights", _SOURCES


_IS_PICKLE = "is a pickle, which can run any code and is never loaded"
# By the ending of a file: why its weights cannot be read.
_OTHER_FORMATS = {
    ".gguf": "is a GGUF file: its weights are quantised or in another order",
    **dict.fromkeys((".pt", ".pth", ".ckpt"), _IS_PICKLE),
}


def _other_format(file: Path) -> str | None:
    """Return why a file of weights is not read; None for any other file. Token files end in .bin too."""
    return _IS_PICKLE if file.name in _PICKLES else _OTHER_FORMATS.get(file.suffix)


def _file_of_weights(path: Path) -> tuple[str, str]:
    if not path.is_file():
        return "is not a directory", _SOURCES
    if why := _other_format(path):
        return why, _AS_PUBLISHED
    if path.suffix == ".safetensors":
        return "is a file, and the config.json beside it is needed too", str(path.parent)
    return "is not a directory", _SOURCES


def damaged(field: str, checkpoint: Path, error: object) -> ConfigError:
    """Return the user error about a checkpoint that cannot be read, with the checkpoint before it, if any."""
    older = newest_complete_before(checkpoint)
    remedy = f"remove {checkpoint}: {older.name} is the newest before it" if older else _SOURCES
    return ConfigError(field, checkpoint, str(error), remedy)


def _model_type(path: Path) -> str | None:
    """Return the model type of the Hugging Face model that a run began with; None if there was none."""
    return base_config(path).get("model_type")


def check_model_is(model: ModelConfig, weights: WeightSource, field: str) -> None:
    """Check that a run's model is the model of its initial weights. Raises ConfigError."""
    rotates = model.positions is PositionKind.rope
    free = {"dropout", "init_std", "max_sequence_length" if rotates else "rope_theta"}
    names = [name for name in setting_names() if name not in free]
    wrong = [name for name in names if setting_of(model, name) != setting_of(weights.model, name)]
    if wrong:
        theirs = [f"model.{name}={as_typed(setting_of(weights.model, name))}" for name in wrong]
        why = f"the model of {field}={weights.path} has {theirs[0]}"
        value, remedy = as_typed(setting_of(model, wrong[0])), " ".join(theirs)
        if weights.kind is WeightsKind.huggingface:
            imported = f"launcher import {shlex.quote(str(weights.path))} imported"
            remedy += f", or model=imported as `{imported}` writes it"
        raise ConfigError(f"model.{wrong[0]}", value, why, remedy)


def _model_in(config: dict[str, Any]) -> ModelConfig:
    return _typed(ModelConfig, config.get("model"), "model")


def _lora_in(config: dict[str, Any]) -> LoraConfig | None:
    """Return the adapters of the run that wrote a checkpoint; None if it trained the whole model."""
    lora = _typed(LoraConfig, (config.get("finetune") or {}).get("lora") or {}, "finetune.lora")
    return lora if lora.rank else None


def _base_in(config: dict[str, Any]) -> Path | None:
    """Return the weights that a run began with."""
    begun = (config.get("checkpoint") or {}).get("init_from")
    return None if begun is None else Path(str(begun)).expanduser()


def _typed(schema: type[_Section], values: Any, name: str) -> _Section:
    try:
        section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, KeyError, ValueError, TypeError) as error:
        why = f"has no {name} that this launcher knows: {error}"
        raise UnusableCheckpoint(Path(), MANIFEST, why) from None
    assert isinstance(section, schema)
    return section


def _their_model(path: Path, field: str) -> ModelConfig:
    try:
        return model_of(json.loads((path / "config.json").read_text()))
    except NotConvertible as error:
        remedy = _AS_PUBLISHED if "quantised" in str(error) else _PUBLISHED
        raise ConfigError(field, path, f"config.json: {error}", remedy) from None
    except KeyError as error:
        raise ConfigError(field, path, f"config.json: {error.args[0]} is missing", _PUBLISHED) from None
    except (
        OSError,
        ValueError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        RecursionError,
    ) as error:
        raise ConfigError(field, path, f"config.json cannot be read: {error}", _SOURCES) from None


def stored_tensors(weights: WeightSource, field: str) -> dict[str, tuple[Path, str]]:
    """Return the file of each Hugging Face tensor, and its name in the file. Reads headers only.

    Raises ConfigError for a missing tensor, another shape or precision, or a tensor that the model does not
    have.
    """
    path, model, converter = weights.path, weights.model, weights.converter
    expected = {entry.theirs: entry for entry in converter.entries(model)}
    stored: dict[str, tuple[Path, str]] = {}
    for file in _files(path, field):
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    plain = converter.plain_name(name, model)
                    if plain is not None:
                        tensor = opened.get_slice(name)
                        _check_precision(name, tensor.get_dtype(), path, field)
                        _check_shape(expected.get(plain), name, tuple(tensor.get_shape()), path, field)
                        stored[plain] = file, name
        except (SafetensorError, OSError) as error:
            raise ConfigError(field, path, *_unreadable(file, error)) from None
    if missing := [name for name in expected if name not in stored]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(field, path, f"has no {missing[0]}{more}", "a whole copy of the model")
    return stored


def _unreadable(file: Path, error: Exception) -> tuple[str, str]:
    """Return why a safetensors file cannot be read, and a remedy."""
    if file.is_file() and file.stat().st_size < _LARGEST_POINTER and file.read_bytes().startswith(_POINTER):
        return f"{file.name} is a pointer of Git LFS and not the file", f"git -C {file.parent} lfs pull"
    if not file.exists():
        return f"{file.name} is missing", "a whole copy of the model"
    why = f"{file.name} cannot be read: {error}"
    return why, "another copy of this file: it is incomplete or damaged"


_POINTER, _LARGEST_POINTER = b"version https://git-lfs", 1000


def stored_dtype(weights: WeightSource) -> str:
    """Return the name in torch of the precision of a Hugging Face model's tensors; float32 if they differ.

    Reads headers only: a config.json can state another precision, or none. Raises ConfigError.
    """
    names: dict[Path, list[str]] = {}
    for file, name in stored_tensors(weights, "checkpoint.init_from").values():
        names.setdefault(file, []).append(name)
    kinds = set()
    for file, of_file in names.items():
        with safe_open(file, framework="np") as opened:
            kinds |= {_PRECISIONS[opened.get_slice(name).get_dtype()] for name in of_file}
    return kinds.pop() if len(kinds) == 1 else _PRECISIONS["F32"]


def _check_precision(name: str, dtype: str, path: Path, field: str) -> None:
    if dtype not in _PRECISIONS:
        why = f"has {name} in {dtype}: quantised weights cannot be trained"
        raise ConfigError(field, path, why, "the model as published in bf16, fp16 or fp32")


def _check_shape(entry: Entry | None, name: str, shape: tuple[int, ...], path: Path, field: str) -> None:
    if entry is None:
        why = f"contains {name}, but its config.json describes no such tensor"
    elif entry.shape != shape:
        why = f"contains {name} of shape {shape}, but its config.json implies {entry.shape}"
    else:
        return
    raise ConfigError(field, path, why, _PUBLISHED)


def _files(path: Path, field: str) -> list[Path]:
    if (path / INDEX).exists():
        try:
            names = set(json.loads((path / INDEX).read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(field, path, f"{INDEX} cannot be read: {error}", _SOURCES) from None
        if any(Path(name).name != name for name in names):
            raise ConfigError(field, path, f"{INDEX} names files outside the directory", _SOURCES)
        return sorted(path / name for name in names)
    if (path / SAFETENSORS).exists():
        return [path / SAFETENSORS]
    if any((path / name).exists() for name in _PICKLES):
        why = "holds its weights as a pickle, which can run any code and is never loaded"
        raise ConfigError(field, path, why, _AS_SAFETENSORS)
    if gguf := sorted(path.glob("*.gguf")):
        why = f"has {gguf[0].name}, which {_OTHER_FORMATS['.gguf']}"
        raise ConfigError(field, path, why, _AS_PUBLISHED)
    raise ConfigError(field, path, "has a config.json and no safetensors", _SOURCES)
