"""The certificate of an export: transformers, or PEFT, and the launcher compute the same logits from it."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.adapters import MergedReader
from launcher.checkpoint.companions import CERTIFICATE
from launcher.checkpoint.read import (
    HuggingFaceReader,
    WeightReader,
    fill_whole,
    open_adapters,
    open_weights,
)
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
    weights = weights_at(exported, "TARGET")
    reason = _too_large(weights.model, memory)
    ours, theirs = partial(our_logits, weights), partial(their_logits, exported)
    _compare(exported, target, ["transformers"], reason, weights.model, ours, theirs)


def write_adapter_certificate(
    exported: Path, target: Path, weights: WeightSource, base: str | None, memory: int | None = None
) -> None:
    """Compare our logits with those of PEFT, as write_certificate does, for an export of adapters alone.

    Both models read the frozen weights at `base`, because a run in bf16 may hold them rounded.
    """
    reason, place = _too_large(weights.model, memory), Path(base or "")
    if base is None and weights.base is not None and weights.base.exists():
        reason = f"the adapter was trained for {weights.base}, which PEFT can load only once it is exported"
    elif base is None or not (place / "config.json").exists():
        where = "is not known" if base is None else f"is no longer at {base}"
        reason = f"the model that the adapter was trained for {where}"
    ours, theirs = partial(_adapted_logits, weights, place), partial(_logits_by_peft, exported, place)
    _compare(exported, target, ["transformers", "peft"], reason, weights.model, ours, theirs)


def _too_large(model: ModelConfig, memory: int | None) -> str | None:
    """Return why a model does not fit in memory; None if it does."""
    needed = FP32 * parameters(model)
    if memory is None or needed <= memory:
        return None
    sizes = f"{bytes_text(needed)} of memory in fp32, and this machine has {bytes_text(memory)}"
    return f"the model needs {sizes}"


def _compare(
    exported: Path,
    target: Path,
    packages: list[str],
    reason: str | None,
    model: ModelConfig,
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
) -> None:
    """Write certificate.json; with a `reason` not to compare, only the reason. Raises ConfigError."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            reason = f"{package} is not installed"
    if reason is not None:
        _write(exported, {"ok": None, "reason": reason})
        return
    tokens, other = _tokens(model), f"{packages[-1]} {versions[packages[-1]]}"
    our = ours(tokens)
    try:
        their = theirs(tokens)
    except Exception as error:  # transformers raises any
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise _failed(target, f"{other} cannot load this export: {message}") from error
    difference, scale = float((our - their).abs().max()), max(float(their.abs().max()), 1.0)
    ok = difference <= TOLERANCE * scale
    _write(exported, {
        "ok": ok,
        **versions,
        "torch": torch.__version__,
        "computed_in": "float32",
        "tokens": tokens.tolist(),
        "largest_difference": difference,
        "largest_logit": scale,
        "allowed": TOLERANCE * scale,
    })  # fmt: skip
    if not ok:
        why = f"{other} computes other logits from this export: they differ by {difference:.3g}"
        raise _failed(target, why)


def _failed(target: Path, why: str) -> ConfigError:
    return ConfigError("export", target, why, "certificate=false, and report this as a bug of the launcher")


def _write(folder: Path, content: dict[str, Any]) -> None:
    (folder / CERTIFICATE).write_text(json.dumps(content, indent=2) + "\n")


def _tokens(model: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, model.max_sequence_length)
    return torch.randint(model.vocab_size, (BATCH, length), generator=generator)


def our_logits(weights: WeightSource, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V) of the launcher's model in fp32."""
    return _logits_from(HuggingFaceReader(weights), weights.model, tokens)


def _adapted_logits(weights: WeightSource, base: Path, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V) of the launcher's model at `base` with adapters, in fp32."""
    frozen = open_weights(weights_at(base, "checkpoint.init_from"))
    return _logits_from(MergedReader(frozen, open_adapters(weights)), weights.model, tokens)


@torch.no_grad()
def _logits_from(reader: WeightReader, described: ModelConfig, tokens: Tensor) -> Tensor:
    mesh = ProcessMesh.single()
    run = RunConfig(model=described)
    run.training.seed = 0
    context = BlockContext.create(run, mesh, Initializer(0, mesh.tensor, drawn=False))
    model = flat_model(described, context).eval()
    fill_whole(model, reader)
    return model.logits(tokens)


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V) of transformers' model in fp32."""
    logits: Tensor = _their_model(folder)(tokens).logits
    return logits


@torch.no_grad()
def _logits_by_peft(folder: Path, base: Path, tokens: Tensor) -> Tensor:
    """Return the logits (B, T, V) of the model at `base` with the adapter in `folder`, in fp32."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT 0.21 uses names that transformers 5 has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = PeftModel.from_pretrained(_their_model(base), str(folder))
    logits: Tensor = adapted.eval()(tokens).logits
    return logits


def _their_model(folder: Path) -> Any:
    """Return transformers' model in fp32, with its eager attention.

    Its other kinds of attention leave out Gemma's soft cap.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()
