"""Metrics of routers: the same in every layout, over all tokens of the steps between two rows."""

from pathlib import Path

import pytest

from tests.runtime.command import metrics, trained

MOE = ["model=moe_tiny", "model.experts.ffn_hidden_size=16", "training.steps=3", "logging.interval=2"]
LAYOUTS = {
    "expert 2": ["parallelism=ep2", "parallelism.data=2"],
    "data 2, context 2, experts over 4": [
        "parallelism.data=2", "parallelism.context=2", "parallelism.expert=4",
    ],
    "tensor 2, pipeline 2, recomputed": [
        "parallelism=tp2_pp2", "parallelism.data=1", "parallelism.sequence_parallel=true",
        "parallelism.activation_checkpointing=full",
    ],
}  # fmt: skip
NAMES = ("load_max_over_mean", "router_entropy", "balance_loss", "z_loss", "dropped_tokens")


@pytest.mark.parametrize(
    "layout", ["expert 2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[1:])]
)
def test_metrics_of_routers_are_those_of_one_process(layout: str, tmp_path: Path) -> None:
    trained(*MOE, "parallelism=single", "run.dir=one", cwd=tmp_path)
    trained(*MOE, *LAYOUTS[layout], "run.dir=many", cwd=tmp_path)
    right, found = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert [row["step"] for row in right] == [row["step"] for row in found]
    for row, other in zip(right, found, strict=True):
        for name in (f"experts/{name}" for name in NAMES):
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-9), name
        assert row["experts/load_max_over_mean"] >= 1.0
        assert 0 < row["experts/router_entropy"] < 2.78  # the logarithm of 16 experts
        assert row["experts/dropped_tokens"] == 0


def test_a_dense_model_has_no_metrics_of_routers(tmp_path: Path) -> None:
    trained("model=llama_tiny", "parallelism=single", "training.steps=1", "run.dir=r", cwd=tmp_path)
    assert not [name for name in metrics(tmp_path / "r")[0] if name.startswith("experts/")]
