"""Runs on conversations: losses are those of a plain loop over the same samples, in every layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launcher.config.compose import load_typed
from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.data.open import blend_of, open_data
from launcher.parity.reference import documents, forward, initial_weights
from tests.runtime.command import launcher, metrics

SHORT = [
    "experiment=finetune_chat", "logging=local", "run.dir=r", "model.hidden_size=32", "model.num_layers=2",
    "model.ffn_hidden_size=64", "training.steps=3", "scheduler=constant", "scheduler.warmup_steps=0",
    "optimizer=sgd", "optimizer.lr=0.1", "optimizer.gradient_clipping=null",
    "training.validation_interval=1", "checkpoint.interval_steps=null",
]  # fmt: skip
LAYOUTS = {
    "dp": ["parallelism=dp", "parallelism.data=2"],
    "tp2": ["parallelism=tp2", "parallelism.data=1"],
    "pp2": ["parallelism=pp2", "parallelism.data=1"],
    "cp2": ["parallelism=cp2", "parallelism.data=1"],
    "zero1": ["parallelism=zero1", "parallelism.data=2"],
    "zero2": ["parallelism=zero2", "parallelism.data=2"],
    "zero3": ["parallelism=zero3", "parallelism.data=2"],
}


def mean_loss(run: RunConfig, weights: dict[str, torch.Tensor], batch: Any) -> tuple[torch.Tensor, int]:
    inputs, labels = (torch.from_numpy(np.ascontiguousarray(array)) for array in batch)
    logits = forward(weights, run.model, inputs, {}, documents(run, inputs)).flatten(0, 1)
    counted = int((labels != IGNORED_LABEL).sum())
    assert 0 < counted < labels.numel()
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / counted, counted


def plain_loop(run: RunConfig) -> list[dict[str, float]]:
    """Return the loss of three steps, and of validation after each, on all samples in one piece."""
    data, size = open_data(run), run.training.global_batch_size
    weights = {name: weight.requires_grad_() for name, weight in initial_weights(run).items()}
    rows = []
    for step in range(3):
        batch = data.blend([blend_of(run)]).take(np.arange(step * size, (step + 1) * size))
        loss, counted = mean_loss(run, weights, batch)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight -= run.optimizer.lr * gradient
            [held_out] = data.validation.values()
            validation, _ = mean_loss(run, weights, held_out.take(np.arange(len(held_out))))
        rows.append({"train/loss": loss.item(), "train/labels": counted, "val/loss": validation.item()})
    return rows


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "pp2"]


@pytest.mark.parametrize("layout", ["pp2", *SLOW])
def test_a_run_on_conversations_is_a_plain_loop(layout: str, tmp_path: Path) -> None:
    done = launcher(*SHORT, *LAYOUTS[layout], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = load_typed(tmp_path / "r" / "config.yaml", RunConfig)
    for row, expected in zip(metrics(tmp_path / "r"), plain_loop(run), strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=1e-5), (row["step"], name)


def test_prepared_conversations_resume_in_another_layout(tmp_path: Path) -> None:
    """The second half of a run on prepared conversations is that of an uninterrupted run."""
    rows = [json.dumps({"prompt": f"{n} + {n} is ", "completion": "." * (1 + n % 7)}) for n in range(400)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    assert launcher("prepare", "pairs.jsonl", "pairs", "chat=true", cwd=tmp_path).returncode == 0
    run = [*SHORT[:2], *SHORT[3:], "data.train=pairs", "model.max_sequence_length=64"]
    whole = launcher(*run, *LAYOUTS["dp"], "run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for layout, stop in (("dp", ["training.stop_at=2"]), ("tp2", [])):
        part = launcher(*run, *LAYOUTS[layout], "run.dir=parts", *stop, cwd=tmp_path)
        assert part.returncode == 0, part.stderr
    pairs = zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True)
    for row, other in pairs:
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)
        assert row["train/labels"] == other["train/labels"]
