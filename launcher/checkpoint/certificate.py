"""The certificate of an export: transformers and the launcher compute the same logits from it."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.companions import CERTIFICATE
from launcher.checkpoint.read import HuggingFaceReader, fill_whole
from launcher.checkpoint.sources import WeightSource, weights_at
from launcher.config.errors import ConfigError
from launcher.config.schema import ModelConfig, RunConfig
from launcher.models.architecture import flat_model
from launcher.models.arithmetic import parameters
from launcher.models.block_context import BlockContext
from launcher.parallel.initializer import Initializer
from launcher.parallel.mesh import ProcessMesh
from launcher.text import size as bytes_text

BATCH, LENGTH = 2, 64
FP32 = 4  # bytes
TOLERANCE = 1e-4  # of the largest logit, or of 1; both models compute in fp32


def write_certificate(exported: Path, target: Path, memory: int | None = None) -> None:
    """Compare logits and write certificate.json. Raises ConfigError, about `target`, if they differ.

    Both models are in memory one after the other. If this needs more than `memory`, in bytes, it says so and
    compares nothing: the system would kill the export.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        _write(exported, {"ok": None, "reason": "transformers is not installed"})
        return
    weights = weights_at(exported, "TARGET")
    needed = FP32 * parameters(weights.model)
    if memory is not None and needed > memory:
        sizes = f"{bytes_text(needed)} of memory in fp32, and this machine has {bytes_text(memory)}"
        _write(exported, {"ok": None, "reason": f"the model needs {sizes}"})
        return
    tokens = _tokens(weights.model)
    ours, theirs = our_logits(weights, tokens), their_logits(exported, tokens)
    difference, scale = float((ours - theirs).abs().max()), max(float(theirs.abs().max()), 1.0)
    ok = difference <= TOLERANCE * scale
    _write(exported, {
        "ok": ok,
        "transformers": found,
        "torch": torch.__version__,
        "computed_in": "float32",
        "tokens": tokens.tolist(),
        "largest_difference": difference,
        "largest_logit": scale,
        "allowed": TOLERANCE * scale,
    })  # fmt: skip
    if not ok:
        why = f"transformers {found} computes other logits from this export: they differ by {difference:.3g}"
        raise ConfigError(
            "export", target, why, "certificate=false, and report this as a bug of the launcher"
        )


def _write(folder: Path, content: dict[str, Any]) -> None:
    (folder / CERTIFICATE).write_text(json.dumps(content, indent=2) + "\n")


def _tokens(model: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, model.max_sequence_length)
    return torch.randint(model.vocab_size, (BATCH, length), generator=generator)


@torch.no_grad()
def our_logits(weights: WeightSource, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V) of the launcher's model in fp32."""
    mesh = ProcessMesh.single()
    run = RunConfig(model=weights.model)
    run.training.seed = 0
    context = BlockContext.create(run, mesh, Initializer(0, mesh.tensor, drawn=False))
    model = flat_model(weights.model, context).eval()
    fill_whole(model, HuggingFaceReader(weights))
    return model.logits(tokens)


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V) of transformers' model in fp32, by its eager attention.

    Its other kinds of attention leave out Gemma's soft cap.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    logits: Tensor = model.eval()(tokens).logits
    return logits
