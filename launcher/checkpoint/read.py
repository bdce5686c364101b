"""Reading boxes of logical tensors out of files, without torch.distributed."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from launcher.checkpoint.boxes import Box
from launcher.checkpoint.final import weight_files
from launcher.checkpoint.huggingface import Entry, entries
from launcher.checkpoint.manifest import BrokenCheckpoint, Manifest, entry_name, read_manifest
from launcher.checkpoint.sources import Kind, Weights, found_tensors
from launcher.checkpoint.weights import unusable
from launcher.parallel.sharding import WEIGHT


class Reader:
    """Copies boxes of logical tensors out of a checkpoint's files. `bytes_read` counts their bytes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.bytes_read = 0
        self._open: dict[str, Any] = {}

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`. Raises BrokenCheckpoint where it is not all there."""
        stored = self.manifest.tensors.get(kind, {}).get(name)
        found = 0
        for piece in stored.pieces if stored else ():
            source = Box(piece.offsets, piece.sizes)
            common = box.overlap(source)
            if common is None:
                continue
            try:
                entry = self._file(piece.file).get_slice(entry_name(kind, name, piece.offsets))
                data = entry[common.within(source)]
            except (SafetensorError, OSError) as error:
                raise BrokenCheckpoint(self.path, piece.file, f"cannot be read: {error}") from None
            view[common.within(box)].copy_(data)
            self.bytes_read += data.nbytes
            found += common.numel
        if found != box.numel:
            why = f"has {found} of the {box.numel} elements of {kind} {name} at {box.offsets}"
            raise BrokenCheckpoint(self.path, "manifest.json", why)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


class HuggingFaceReader:
    """The same out of a Hugging Face directory, whose tensors have other names, cuts and element types."""

    def __init__(self, found: Weights) -> None:
        self._tensors = found_tensors(found.path, found.model, "checkpoint.init_from")
        self._entries: dict[str, list[Entry]] = {}
        for entry in entries(found.model):
            self._entries.setdefault(entry.ours, []).append(entry)
        self._open: dict[Path, Any] = {}

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`, in its element type."""
        assert kind == WEIGHT, kind
        for entry in self._entries[name]:
            common = box.overlap(entry.box)
            if common is None:
                continue
            file, theirs = self._tensors[entry.theirs]
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            slices = common.within(entry.box)
            data = self._open[file].get_slice(theirs)[slices[::-1] if entry.transposed else slices]
            view[common.within(box)].copy_(data.T if entry.transposed else data)


class FinalWeightsReader:
    """The same out of a run's final weights, whole under their logical names."""

    def __init__(self, found: Weights) -> None:
        self._path = found.path
        files: list[Any] = [safe_open(path, framework="pt") for path in weight_files(found.path)]
        self._of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (not a dict)

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`."""
        assert kind == WEIGHT, kind
        if name not in self._of:
            raise unusable(self._path, f"the weights lack {name}")
        view.copy_(self._of[name].get_slice(name)[box.slices])


WeightReader = Reader | HuggingFaceReader | FinalWeightsReader


def open_weights(found: Weights) -> WeightReader:
    """The reader of whatever `found` is. Raises BrokenCheckpoint, ConfigError."""
    if found.kind is Kind.checkpoint:
        return Reader(found.path, read_manifest(found.path))
    return HuggingFaceReader(found) if found.kind is Kind.huggingface else FinalWeightsReader(found)
