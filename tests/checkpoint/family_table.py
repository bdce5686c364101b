"""Measure each family: `python -m tests.checkpoint.family_table` prints the table of docs/models.md.

Each is a tiny random model of transformers' own class (tests/models/families.py). It is imported, trained for
three steps, exported and loaded again.
"""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from launcher.checkpoint.certificate import our_logits
from launcher.checkpoint.conversion import export, import_
from launcher.checkpoint.sources import weights_at
from launcher.config.layout import resolve_layout
from launcher.config.schema import ExchangeConfig, ModelConfig, RunConfig
from launcher.config.world import World
from launcher.data.tokenizer import write_byte_tokenizer
from launcher.parity.reference import GlobalBatch, probe_batches
from tests.checkpoint.saving import load_and_save
from tests.models.families import FAMILIES, transformers_model
from tests.models.small import batch
from tests.parity.running import small_run

OPTIONS = ExchangeConfig()
STEPS = 3
LAYOUT = [
    "parallelism=tp2_pp2", "parallelism.data=2", "parallelism.zero_stage=1",
    "parallelism.sequence_parallel=true", "parallelism.activation_checkpointing=selective",
    "optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.05",
]  # fmt: skip
LARGEST_ERROR = 1e-3  # of a weight after three steps, relative to its movement
ROUNDING = 1e-6  # of a weight, added to its movement


@dataclass(frozen=True)
class Converted:
    """A model after import, and after import and export."""

    logits: float  # largest difference between ours after import and those of transformers
    tensors: dict[str, float]  # largest difference of each exported tensor that has not the same bits
    certificate: dict[str, Any]


def written(family: str, folder: Path) -> Path:
    """Return the save_pretrained directory of a family; write it if there is none."""
    path = folder / family.replace(" ", "-")
    if not path.exists():
        transformers_model(family).save_pretrained(path)
    return path


def from_pretrained(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def tensors_in(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def converted(source_path: Path, folder: Path) -> Converted:
    """Import and export a model; compare logits, tensors, and the models that the configs describe."""
    source, (tokens, _) = weights_at(source_path, "x"), batch(61)
    with torch.no_grad():
        right = from_pretrained(source.path)(tokens).logits
    ours = our_logits(source, tokens)
    assert ours.shape == right.shape
    import_(source, folder / "ours", OPTIONS)
    imported = weights_at(folder / "ours", "x")
    assert (imported.model, imported.model_type) == (source.model, source.model_type)
    export(imported, folder / "back", OPTIONS, write_byte_tokenizer)
    before, after = tensors_in(source.path), tensors_in(folder / "back")
    assert before.keys() == after.keys()
    assert weights_at(folder / "back", "x").model == source.model
    changed = {
        name: float((tensor - after[name]).abs().max())
        for name, tensor in before.items()
        if not torch.equal(tensor, after[name])
    }
    certificate = json.loads((folder / "back" / "certificate.json").read_text())
    return Converted(float((ours - right).abs().max()), changed, certificate)


def run_of(model: ModelConfig) -> RunConfig:
    run = small_run("model=llama_tiny", "model.num_kv_heads=4", *LAYOUT, steps=STEPS)
    run.data.sequence_length = 16
    run.optimizer.gradient_clipping = 0.5
    return replace(run, model=model)


def trained_by_transformers(model: Any, run: RunConfig, batches: Iterable[GlobalBatch]) -> Any:
    """Train a model of transformers by torch's SGD, the whole batch in one piece."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.optimizer.lr, momentum=run.optimizer.momentum or 0.0
    )
    for tokens, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.gradient_clipping or float("inf"))
        optimizer.step()
    return model.eval()


def errors_after_training(source_path: Path, folder: Path) -> dict[str, float]:
    """Train three steps on 8 ranks, export and reload; return each weight's error / movement.

    The right weights are those of transformers and torch's optimizer.
    """
    source = weights_at(source_path, "x")
    run = run_of(source.model)
    layout = resolve_layout(run, World("cpu", 8, 8))
    assert (layout.tensor, layout.pipeline, layout.data, layout.zero_stage) == (2, 2, 2, 1)
    saved = weights_at(load_and_save(run, source.path, folder / "run", batches=STEPS), "x")
    export(replace(saved, model_type=source.model_type), folder / "trained", OPTIONS, write_byte_tokenizer)
    right = trained_by_transformers(from_pretrained(source.path), run, probe_batches(run))
    began = from_pretrained(source.path).state_dict()
    found = from_pretrained(folder / "trained").state_dict()
    errors = {}
    for name, weight in right.state_dict().items():
        moved = float((weight - began[name]).norm())
        assert moved > 0, name
        errors[name] = float((weight - found[name]).norm()) / (moved + ROUNDING / LARGEST_ERROR)
    return errors


def row(family: str, folder: Path) -> str:
    """Return the row of a family, with the directories of its models in `folder`."""
    path = written(family, folder / "theirs")
    found = converted(path, folder / "converted")
    error = max(errors_after_training(path, folder / "trained").values())
    tensors = f"norms to {max(found.tensors.values()):.0e}" if found.tensors else "the same bits"
    ok = "yes" if found.certificate["ok"] else "no"
    name = weights_at(path, "x").model_type
    numbers = f"{found.logits:.0e} | {tensors} | {error:.0e} | {ok}"
    return f"| {family} | `{name}` | {numbers}, {found.certificate['largest_difference']:.0e} |"


def main() -> None:
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            print(row(family, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
