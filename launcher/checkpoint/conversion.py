"""Convert weights to and from a Hugging Face directory, holding the tensors of a file at a time."""

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from launcher import __version__
from launcher.checkpoint.companions import carry_companions, companions_of
from launcher.checkpoint.huggingface import Entry, adapter_of
from launcher.checkpoint.integrity import check_files, unchanged
from launcher.checkpoint.manifest import (
    CHECKPOINTS,
    Manifest,
    StoredFiles,
    step_name,
)
from launcher.checkpoint.read import HuggingFaceReader, WeightReader, open_weights, stored_files_of
from launcher.checkpoint.sources import INDEX, SAFETENSORS, WeightSource
from launcher.checkpoint.tensor_file import save_tensors
from launcher.checkpoint.write import HostPiece, commit, write_pieces
from launcher.config.schema import ExchangeConfig
from launcher.files import PARTIAL, new_directory
from launcher.parallel.boxes import whole
from launcher.parallel.dtypes import TORCH_DTYPES
from launcher.parallel.sharding import WEIGHT


def export(weights: WeightSource, target: Path, options: ExchangeConfig) -> None:
    """Write a directory for from_pretrained. Raises UnusableCheckpoint, NotConvertible, OSError."""
    stored, dtype, reader = stored_files_of(weights), TORCH_DTYPES[options.dtype], open_weights(weights)
    with new_directory(target) as aside, unchanged(stored) if stored else nullcontext():
        if stored:
            check_files(stored, _files_with_weights(stored))
        files = list(_in_files(weights, dtype.itemsize, int(options.max_file_gb * 1e9)))
        names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
        for name, group in zip(names if len(files) > 1 else [SAFETENSORS], files, strict=True):
            tensors = {entry.theirs: _read(reader, entry).to(dtype).contiguous() for entry in group}
            save_tensors(tensors, aside / name, {"format": "pt"})
            del tensors  # before the tensors of the next file are made
        if len(files) > 1:
            placed = [(entry, name) for name, group in zip(names, files, strict=True) for entry in group]
            total = sum(entry.box.numel for entry, _ in placed) * dtype.itemsize
            weight_map = {entry.theirs: name for entry, name in placed}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        base = _copy_companions(weights.path, aside)
        name, adapter = str(dtype).removeprefix("torch."), adapter_of(weights.model)
        described = adapter.config_json(weights.model, name, base)
        (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def import_(weights: WeightSource, target: Path, options: ExchangeConfig) -> None:
    """Write a run directory: a checkpoint of step 0 with only weights. Raises ConfigError, OSError."""
    with new_directory(target) as aside:
        reader = HuggingFaceReader(weights)
        partial = aside / CHECKPOINTS / f"{step_name(0)}{PARTIAL}"
        partial.mkdir(parents=True)
        write_pieces(partial, 0, _parts(weights, reader), int(options.max_file_gb * 1e9))
        model = OmegaConf.to_container(OmegaConf.structured(weights.model), enum_to_str=True)
        manifest = Manifest(
            step=0,
            samples=0,
            updates=0,
            scaler={},
            corpus={},
            launcher=__version__,
            layout="import",
            config={"model": model},
            validation_loss=None,
            tensors={},
            files={},
        )
        commit(partial, manifest, world=1)
        carry_companions(weights.path, aside)
        (aside / "conf" / "model").mkdir(parents=True)
        (aside / "conf" / "model" / "imported.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(model)))


def _files_with_weights(stored: StoredFiles) -> list[str]:
    """Return the files that hold more than optimizer states. Final weights have no prefix for their kind."""
    return [
        name
        for name, shapes in sorted(stored.shapes.items())
        if any(entry.startswith(f"{WEIGHT}/") or "/" not in entry for entry in shapes)
    ]


def _read(reader: WeightReader, entry: Entry) -> Tensor:
    tensor = torch.empty(entry.box.sizes)
    reader.fill(WEIGHT, entry.ours, entry.box, tensor)
    return tensor.T if entry.transposed else tensor


def _in_files(weights: WeightSource, itemsize: int, max_bytes: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in adapter_of(weights.model).entries(weights.model):
        if group and sum(member.box.numel for member in (*group, entry)) * itemsize > max_bytes:
            yield group
            group = []
        group.append(entry)
    yield group


def _parts(weights: WeightSource, reader: HuggingFaceReader) -> Iterator[HostPiece]:
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in adapter_of(weights.model).entries(weights.model):
        last = [offset + size for offset, size in zip(entry.box.offsets, entry.box.sizes, strict=True)]
        shapes[entry.ours] = tuple(map(max, last, shapes.get(entry.ours, last)))
    for name, shape in shapes.items():
        tensor = torch.empty(shape)
        reader.fill(WEIGHT, name, whole(shape), tensor)
        yield HostPiece(WEIGHT, name, shape, whole(shape), tensor)


def _copy_companions(source: Path, target: Path) -> dict[str, Any] | None:
    """Copy the companion files except config.json, and return its content."""
    companions = {path.name: path for path in companions_of(source)}
    base = companions.pop("config.json", None)
    for name, path in companions.items():
        shutil.copyfile(path, target / name)
    return json.loads(base.read_text()) if base else None
