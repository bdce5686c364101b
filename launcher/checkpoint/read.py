"""Read boxes of logical tensors from files, without torch.distributed."""

from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from launcher.checkpoint.adapters import AdapterReader, MergedReader
from launcher.checkpoint.final import other_model_error, read_final_weights
from launcher.checkpoint.huggingface import Entry
from launcher.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredFiles,
    UnusableCheckpoint,
    entry_name,
    read_manifest,
)
from launcher.checkpoint.sources import WeightsKind, WeightSource, stored_tensors, weights_at
from launcher.models.selection_bias import selection_biases
from launcher.parallel.boxes import Box, whole
from launcher.parallel.sharding import WEIGHT, logical_of


class CheckpointReader:
    """Copies boxes of logical tensors from a checkpoint's files; `bytes_read` counts the copied bytes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.bytes_read = 0
        self._file = cache(_opened)

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`, of shape box.sizes. Raises UnusableCheckpoint."""
        stored = self.manifest.tensors.get(kind, {}).get(name)
        filled = 0
        for piece in stored.pieces if stored else ():
            source = Box(piece.offsets, piece.sizes)
            common = box.overlap(source)
            if common is None:
                continue
            try:
                entry = self._file(self.path / piece.file).get_slice(entry_name(kind, name, piece.offsets))
                data = entry[common.within(source)]
            except (SafetensorError, OSError) as error:
                raise UnusableCheckpoint(self.path, piece.file, f"cannot be read: {error}") from None
            view[common.within(box)].copy_(data)
            self.bytes_read += data.nbytes
            filled += common.numel
        if filled != box.numel:
            why = f"has only {filled} of the {box.numel} elements of {kind} {name} at {box.offsets}"
            raise UnusableCheckpoint(self.path, MANIFEST, why)


class HuggingFaceReader:
    """Copies boxes of logical tensors from a Hugging Face directory, whose tensors differ: see Entry."""

    def __init__(self, weights: WeightSource) -> None:
        self._tensors = stored_tensors(weights, "checkpoint.init_from")
        self._entries: dict[str, list[Entry]] = {}
        for entry in weights.converter.entries(weights.model):
            self._entries.setdefault(entry.ours, []).append(entry)
        self._file = cache(_opened)

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`, of shape box.sizes; converts to the dtype of `view`."""
        assert kind == WEIGHT, kind
        for entry in self._entries[name]:
            common = box.overlap(entry.box)
            if common is None:
                continue
            file, name_in_file = self._tensors[entry.theirs]
            rows, *others = common.within(entry.box)
            rows = slice(rows.start + entry.first_row, rows.stop + entry.first_row)
            slices = (*others, rows) if entry.transposed else (rows, *others)
            data = self._file(file).get_slice(name_in_file)[slices]
            data = data.T if entry.transposed else data
            view[common.within(box)].copy_(data.float() + entry.added if entry.added else data)


class FinalWeightsReader:
    """Copies boxes of logical tensors from a run's final weights, which hold each logical tensor whole."""

    def __init__(self, weights: WeightSource) -> None:
        self._path = weights.path
        stored = read_final_weights(weights.path).stored(weights.path)
        self._path_of = {
            name: stored.path / file for file, by_name in stored.shapes.items() for name in by_name
        }
        self._file = cache(_opened)

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`, of shape box.sizes. Raises ConfigError."""
        assert kind == WEIGHT, kind
        if name not in self._path_of:
            raise other_model_error(self._path, f"the weights lack {name}")
        view.copy_(self._file(self._path_of[name]).get_slice(name)[box.slices])


def fill_whole(module: nn.Module, reader: "WeightReader") -> None:
    """Copy every weight of an unsharded module. Raises UnusableCheckpoint, ConfigError."""
    for parameter in module.parameters():
        logical = logical_of(parameter)
        reader.fill(WEIGHT, logical.name, whole(logical.shape), parameter.data)
    for bias in selection_biases(module):
        reader.fill(WEIGHT, bias.logical.name, whole(bias.logical.shape), bias.value)


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def stored_files_of(weights: WeightSource) -> StoredFiles | None:
    """Return the files that have checksums; None for a Hugging Face directory, which has none.

    Raises UnusableCheckpoint, ConfigError.
    """
    if weights.kind is WeightsKind.huggingface:
        return None
    if weights.kind is WeightsKind.checkpoint:
        return read_manifest(weights.path).stored(weights.path)
    return read_final_weights(weights.path).stored(weights.path)


def files_with_weights(stored: StoredFiles) -> list[str]:
    """Return the files that hold more than optimizer states. Final weights have no prefix for their kind."""
    return [
        name
        for name, shapes in sorted(stored.shapes.items())
        if any(entry.startswith(f"{WEIGHT}/") or "/" not in entry for entry in shapes)
    ]


WeightReader = CheckpointReader | HuggingFaceReader | FinalWeightsReader | MergedReader


def open_weights(weights: WeightSource) -> WeightReader:
    """Return the reader of `weights`, with adapters (LoRA) added. Raises UnusableCheckpoint, ConfigError."""
    stored = _open_stored(weights)
    if weights.lora is None:
        return stored
    base: WeightReader = stored
    if weights.kind is WeightsKind.checkpoint:  # holds the adapters alone
        assert weights.base is not None
        base = open_weights(weights_at(weights.base, "checkpoint.init_from"))
    return MergedReader(base, AdapterReader(stored, weights.lora, weights.model))


def open_adapters(weights: WeightSource) -> AdapterReader:
    """Return the reader of the adapters of a run. Raises UnusableCheckpoint, ConfigError."""
    assert weights.lora is not None
    return AdapterReader(_open_stored(weights), weights.lora, weights.model)


def _open_stored(weights: WeightSource) -> CheckpointReader | HuggingFaceReader | FinalWeightsReader:
    if weights.kind is WeightsKind.checkpoint:
        return CheckpointReader(weights.path, read_manifest(weights.path))
    return (
        HuggingFaceReader(weights) if weights.kind is WeightsKind.huggingface else FinalWeightsReader(weights)
    )
