"""Adapters (LoRA) on disk: added to the weights that they adapt, or exported in PEFT's format."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.checkpoint.huggingface import Entry
from launcher.checkpoint.tensor_file import save_tensors
from launcher.config.schema import LoraConfig, ModelConfig
from launcher.config.shape import lora_segments
from launcher.parallel.boxes import Box
from launcher.parallel.sharding import WEIGHT

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Targets by the last name of the projection in a block.
_TARGETS = {"qkv": "qkv", "output": "output", "up": "up", "gate_up": "up", "down": "down"}


class Reader(Protocol):
    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None: ...


class AdapterReader:
    """Reads the two matrices of adapters; `reader` holds them by logical name."""

    def __init__(self, reader: Reader, lora: LoraConfig, model: ModelConfig) -> None:
        assert lora.rank
        self._reader, self.lora, self.rank = reader, lora, lora.rank
        self.scale = lora.alpha / lora.rank
        self._sizes = lora_segments(model)

    def segments(self, name: str) -> tuple[int, tuple[int, ...]] | None:
        """Return inputs and segments of an adapted weight's projection; None for any other weight."""
        *_, projection, kind = ("", *name.split("."))
        target = _TARGETS.get(projection) if name.startswith("blocks.") and kind == WEIGHT else None
        return self._sizes[target] if target is not None and target in self.lora.targets else None

    def pieces(self, name: str, first: int, rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (segment, A, B) of rows first .. first + rows of an adapted weight, one segment at a time.

        A (r, inputs), B (rows of the segment, r).
        """
        sizes = self.segments(name)
        assert sizes is not None
        inputs, segments = sizes
        projection, start = name.removesuffix(f".{WEIGHT}"), 0
        shape_a, shape_b = (len(segments) * self.rank, inputs), (sum(segments), self.rank)
        for index, length in enumerate(segments):
            low, high = max(first, start), min(first + rows, start + length)
            if low < high:
                a = self._read(f"{projection}.lora_a", shape_a, index * self.rank, self.rank)
                yield index, a, self._read(f"{projection}.lora_b", shape_b, low, high - low)
            start += length

    def _read(self, name: str, shape: tuple[int, ...], first: int, rows: int) -> Tensor:
        box = Box((first, 0), (rows, shape[1]))
        tensor = torch.empty(box.sizes)
        self._reader.fill(WEIGHT, name, box, tensor)
        return tensor


class MergedReader:
    """Copies boxes of weights with their adapters added: W + alpha / rank * B A."""

    def __init__(self, base: Reader, adapter: AdapterReader) -> None:
        self._base, self._adapter = base, adapter

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`, of shape box.sizes."""
        if self._adapter.segments(name) is None:
            self._base.fill(kind, name, box, view)
            return
        weight = torch.empty(box.sizes)
        self._base.fill(kind, name, box, weight)
        columns, done = slice(box.offsets[1], box.offsets[1] + box.sizes[1]), 0
        for _, a, b in self._adapter.pieces(name, box.offsets[0], box.sizes[0]):
            weight[done : done + len(b)] += self._adapter.scale * (b @ a[:, columns])
            done += len(b)
        view.copy_(weight)


def write_peft(
    adapter: AdapterReader, entries: Iterator[Entry], folder: Path, dtype: torch.dtype, base: str | None
) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as PeftModel.from_pretrained loads them.

    `base` is the model that it adapts.

    Where a Hugging Face model fuses projections that have an adapter each, the adapters become one of a
    higher rank: their A stacked, their B in blocks.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    is_transposed = False
    adapted = (entry for entry in entries if adapter.segments(entry.ours) is not None)
    for theirs, group in groupby(adapted, key=lambda entry: entry.theirs):
        module, parts = theirs.removesuffix(".weight"), list(group)
        is_transposed = is_transposed or parts[0].transposed
        a, b = _joined(adapter, parts)
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.to(dtype), b.to(dtype)
        ranks[".".join(module.split(".")[-2:])] = len(a)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS,
                 {"format": "pt"})  # fmt: skip
    settings = _peft_settings(adapter, ranks, base, is_transposed)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _joined(adapter: AdapterReader, parts: list[Entry]) -> tuple[Tensor, Tensor]:
    """Return A and B of a Hugging Face module, whose rows are `parts` of our segments, in order."""
    pieces = [
        piece for part in parts for piece in adapter.pieces(part.ours, part.box.offsets[0], part.box.sizes[0])
    ]
    used = {segment: a for segment, a, _ in pieces}
    places = {segment: index for index, segment in enumerate(used)}
    rank = adapter.rank
    rows = torch.zeros(sum(len(b) for _, _, b in pieces), rank * len(used))
    done = 0
    for segment, _, b in pieces:
        place = places[segment] * rank
        rows[done : done + len(b), place : place + rank] = b
        done += len(b)
    return torch.cat(list(used.values())), rows


def _peft_settings(
    adapter: AdapterReader, ranks: dict[str, int], base: str | None, is_transposed: bool
) -> dict[str, Any]:
    lora, rank = adapter.lora, adapter.rank
    fused = {module: size for module, size in ranks.items() if size != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        # The same factor for modules of a higher rank: PEFT divides alpha by the rank.
        "rank_pattern": fused,
        "alpha_pattern": {module: lora.alpha * size / rank for module, size in fused.items()},
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "inference_mode": True,
    }
