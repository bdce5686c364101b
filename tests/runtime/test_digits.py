"""A Vision Transformer on handwritten digits: loss and accuracy agree in every layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.runtime.command import launcher, metrics

LAYOUTS = {
    "dp": ["parallelism=dp", "parallelism.data=2"],
    "tp2": ["parallelism=tp2", "parallelism.data=1"],
    "pp2": ["parallelism=pp2", "parallelism.data=1"],
    "zero3": ["parallelism=zero3", "parallelism.data=2"],
    "tp2 sp": ["parallelism=tp2", "parallelism.data=1", "parallelism.sequence_parallel=true"],
    "dualpipev": [
        "parallelism=pp2", "parallelism.data=1", "parallelism.pipeline_schedule=dualpipev",
        "training.micro_batch_size=16",
    ],
}  # fmt: skip


def trained(folder: Path, layout: list[str], *overrides: str) -> list[dict[str, Any]]:
    arguments = ["experiment=digits_dp", "logging=local", "run.dir=r", *layout, *overrides]
    done = launcher(*arguments, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    return metrics(folder / "r")


SHORT = ["training.steps=4", "training.validation_interval=2", "scheduler.warmup_steps=0"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the metrics of four steps of one process."""
    return trained(tmp_path_factory.mktemp("alone"), ["parallelism=single"], *SHORT)


@pytest.mark.parametrize(
    "layout", ["dp", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("tp2 sp", "pp2"))]
)
def test_four_steps_agree_with_one_process(layout: str, alone: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = trained(tmp_path, LAYOUTS[layout], *SHORT)
    for row, expected in zip(rows, alone, strict=True):
        for name in ("train/loss", "train/grad_norm", *(["val/loss"] if "val/loss" in expected else [])):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), (row["step"], name)
    accuracy = [(row["step"], row["val/accuracy"]) for row in rows if "val/accuracy" in row]
    assert accuracy == [(row["step"], row["val/accuracy"]) for row in alone if "val/accuracy" in row]
    assert [step for step, _ in accuracy] == [1, 2, 4]
    assert 0.0 < accuracy[-1][1] < 1.0


@pytest.mark.slow
def test_the_shipped_experiment_reaches_its_accuracy_in_every_layout(tmp_path: Path) -> None:
    """After 300 steps the accuracy is above 95%, and accuracy and loss agree between layouts."""
    found = {}
    for name in ("dp", "tp2", "pp2", "zero3"):
        (tmp_path / name).mkdir()
        last = trained(tmp_path / name, LAYOUTS[name])[-1]
        found[name] = last["val/accuracy"], last["val/loss"]
    accuracies, losses = zip(*found.values(), strict=True)
    assert min(accuracies) > 0.95, found
    assert len(set(accuracies)) == 1, found
    assert max(losses) == pytest.approx(min(losses), rel=1e-3), found


@pytest.mark.slow
def test_generate_and_export_refuse_a_classifier(tmp_path: Path) -> None:
    trained(tmp_path, ["parallelism=single"], "training.steps=1")
    for command, said in (
        (["generate", "run.dir=r"], "holds an image classifier, which writes no text"),
        (["export", "r", "hf"], "models can be exported; this model has model.inputs=patches"),
    ):
        done = launcher(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr
    assert not (tmp_path / "hf").exists()
