"""Convert weights to and from a Hugging Face directory, with one file's tensors in memory at a time."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from launcher import __version__
from launcher.checkpoint.adapters import write_peft
from launcher.checkpoint.certificate import write_adapter_certificate, write_certificate
from launcher.checkpoint.companions import SOURCE, base_config, carry_companions
from launcher.checkpoint.exported_files import write_tokenizer
from launcher.checkpoint.huggingface import Entry, has_text_part
from launcher.checkpoint.integrity import check_files, unchanged
from launcher.checkpoint.manifest import (
    CHECKPOINTS,
    IMPORTED,
    Manifest,
    UnusableCheckpoint,
    checkpoint_at,
    read_manifest,
    step_name,
)
from launcher.checkpoint.read import (
    HuggingFaceReader,
    WeightReader,
    files_with_weights,
    open_adapters,
    open_weights,
    stored_files_of,
)
from launcher.checkpoint.sources import INDEX, SAFETENSORS, WeightsKind, WeightSource, stored_dtype
from launcher.checkpoint.tensor_file import save_tensors
from launcher.checkpoint.write import HostPiece, commit, write_pieces
from launcher.config.errors import ConfigError
from launcher.config.schema import ExchangeConfig
from launcher.files import PARTIAL, new_directory
from launcher.parallel.boxes import whole
from launcher.parallel.dtypes import TORCH_DTYPES
from launcher.parallel.sharding import WEIGHT

Pieces = list[Entry]  # the rows of one Hugging Face tensor, in order


def export(
    weights: WeightSource,
    target: Path,
    options: ExchangeConfig,
    write_bytes: Callable[[Path], None],
    memory: int | None = None,
) -> list[str]:
    """Write a directory for from_pretrained; return notes to the user.

    `write_bytes` writes the tokenizer of a run on text as bytes. `memory` is that of this machine in bytes;
    None: not known. Raises UnusableCheckpoint, NotConvertible, OSError, and ConfigError if transformers
    computes other logits from the exported directory than the launcher.
    """
    stored, dtype, reader = stored_files_of(weights), _dtype(weights, options), open_weights(weights)
    with new_directory(target) as aside, unchanged(stored) if stored else nullcontext():
        if stored:
            check_files(stored, files_with_weights(stored))
        files = list(_in_files(weights, dtype.itemsize, int(options.max_file_gb * 1e9)))
        names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
        for name, group in zip(names if len(files) > 1 else [SAFETENSORS], files, strict=True):
            tensors = {pieces[0].theirs: _joined(reader, pieces).to(dtype).contiguous() for pieces in group}
            save_tensors(tensors, aside / name, {"format": "pt"})
            del tensors  # before the tensors of the next file are made
        if len(files) > 1:
            placed = [(pieces, name) for name, group in zip(names, files, strict=True) for pieces in group]
            total = sum(_numel(pieces) for pieces, _ in placed) * dtype.itemsize
            weight_map = {pieces[0].theirs: name for pieces, name in placed}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        name = str(dtype).removeprefix("torch.")
        ids, notes = write_tokenizer(weights, aside, write_bytes)
        described = weights.converter.config_json(weights.model, name, ids)
        (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        if options.certificate:
            write_certificate(aside, target, memory)
    return notes


def export_adapters(
    weights: WeightSource, target: Path, options: ExchangeConfig, memory: int | None = None
) -> None:
    """Write a directory for PeftModel.from_pretrained.

    Raises UnusableCheckpoint, OSError, and ConfigError if PEFT computes other logits than the launcher, or
    cannot load the adapter onto the model that it was trained for.
    """
    stored, base = stored_files_of(weights), base_of_adapter(weights)
    assert stored is not None
    if base is not None and has_text_part(base_config(Path(base)) or base_config(weights.path)):
        why = f"the adapter is for the text part of {base}, where PEFT expects other names of its modules"
        raise ConfigError("export", weights.path, why, "merged=true")
    with new_directory(target) as aside, unchanged(stored):
        check_files(stored, files_with_weights(stored))
        entries = weights.converter.entries(weights.model)
        dtype = torch.float32 if options.dtype is None else TORCH_DTYPES[options.dtype]
        write_peft(open_adapters(weights), entries, aside, dtype, base)
        # Rounded to 16 bits, an adapter computes other logits than the adapter of the run.
        if options.certificate and dtype is torch.float32:
            write_adapter_certificate(aside, target, weights, base, memory)


def base_of_adapter(weights: WeightSource) -> str | None:
    """Return the directory from which PEFT can load the frozen weights; None if it is not known."""
    if weights.base is None:
        return None
    if (weights.base / "config.json").exists():
        return str(weights.base)
    carried = base_config(weights.path).get(SOURCE)
    return carried if carried is not None and _stands_for(Path(carried), weights.base) else None


def _stands_for(directory: Path, base: Path) -> bool:
    """Return whether the Hugging Face `directory` has the weights `base`, which are not in PEFT's form.

    It has them if `base` is an import. It has not if `base` is a run that trained them further and kept the
    config.json of the model that it began with.
    """
    checkpoint = checkpoint_at(base)
    if checkpoint is None:
        # The same directory, which was moved, or which has a relative path from another working directory.
        return not base.exists() and directory.parts[-len(base.parts) :] == base.parts
    try:
        manifest = read_manifest(checkpoint)
    except UnusableCheckpoint:
        return False
    return manifest.layout == IMPORTED and manifest.step == 0


def _dtype(weights: WeightSource, options: ExchangeConfig) -> torch.dtype:
    """Return the dtype of the export: as asked, else of the model that the weights began as, else fp32."""
    if options.dtype is not None:
        return TORCH_DTYPES[options.dtype]
    if weights.kind is WeightsKind.huggingface:
        return getattr(torch, stored_dtype(weights))  # type: ignore[no-any-return]
    base = base_config(weights.path)
    name = str(base.get("dtype", base.get("torch_dtype"))).removeprefix("torch.")
    return {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}.get(
        name, torch.float32
    )


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
            layout=IMPORTED,
            config={"model": model},
            validation_loss=None,
            tensors={},
            files={},
        )
        commit(partial, manifest, world=1)
        carry_companions(weights.path, aside, stored_dtype(weights))
        (aside / "conf" / "model").mkdir(parents=True)
        (aside / "conf" / "model" / "imported.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(model)))


def _joined(reader: WeightReader, pieces: Pieces) -> Tensor:
    """Return a whole Hugging Face tensor."""
    return _read(reader, pieces[0]) if len(pieces) == 1 else torch.cat([_read(reader, one) for one in pieces])


def _read(reader: WeightReader, entry: Entry) -> Tensor:
    tensor = torch.empty(entry.box.sizes)
    reader.fill(WEIGHT, entry.ours, entry.box, tensor)
    tensor = tensor - entry.added if entry.added else tensor
    return tensor.T if entry.transposed else tensor


def _numel(pieces: Pieces) -> int:
    return sum(entry.box.numel for entry in pieces)


def _in_files(weights: WeightSource, itemsize: int, max_bytes: int) -> Iterator[list[Pieces]]:
    group: list[Pieces] = []
    entries = weights.converter.entries(weights.model)
    for pieces in (list(pieces) for _, pieces in groupby(entries, key=lambda entry: entry.theirs)):
        if group and sum(map(_numel, (*group, pieces))) * itemsize > max_bytes:
            yield group
            group = []
        group.append(pieces)
    yield group


def _parts(weights: WeightSource, reader: HuggingFaceReader) -> Iterator[HostPiece]:
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in weights.converter.entries(weights.model):
        last = [offset + size for offset, size in zip(entry.box.offsets, entry.box.sizes, strict=True)]
        shapes[entry.ours] = tuple(map(max, last, shapes.get(entry.ours, last)))
    for name, shape in shapes.items():
        tensor = torch.empty(shape)
        reader.fill(WEIGHT, name, whole(shape), tensor)
        yield HostPiece(WEIGHT, name, shape, whole(shape), tensor)
