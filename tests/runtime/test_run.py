"""A run started from the command line: its files, its output, and equal results in every layout."""

import json
import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.forked_commands import LAUNCHER
from tests.runtime.command import SMALL, launcher, metrics, started, trained

NAMES = {
    "step", "train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/samples", "perf/step_time_s",
    "perf/tokens_per_s", "perf/flops_per_s", "perf/data_wait", "data/epochs", "memory/peak_bytes",
    "memory/peak_rank", "memory/predicted_bytes", "guard/skipped", "perf/slowest_rank",
    "perf/slowest_over_median",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run of two ranks."""
    folder = tmp_path_factory.mktemp("run")
    out = trained(
        "run.dir=one", "parallelism.data=2", "training.steps=6", "training.validation_interval=3", cwd=folder
    )
    assert "2 cpu ranks = 1 pipeline x 2 data x 1 tensor" in out
    return folder / "one"


def test_the_run_directory_holds_config_identity_metrics_logs_and_weights(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["hidden_size"] == 32
    identity = json.loads((finished / "run.json").read_text())
    assert identity["layout"]["data"] == 2
    assert len(identity["id"]) == 8
    assert (finished / "logs" / "rank_1.log").exists()
    names = sorted(path.name for path in (finished / "weights").iterdir())
    assert names == ["manifest.json", "model-00001-of-00001.safetensors"]


def test_every_step_has_a_row_with_the_documented_names(finished: Path) -> None:
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() - {"val/loss"} == NAMES for row in rows)
    assert [row["step"] for row in rows if "val/loss" in row] == [1, 3, 6]
    assert rows[-1]["train/samples"] == 6 * 8
    assert rows[-1]["train/tokens"] == 6 * 8 * 32
    assert rows[-1]["perf/tokens_per_s"] == pytest.approx(8 * 32 / rows[-1]["perf/step_time_s"])
    assert rows[-1]["memory/peak_bytes"] > 50e6
    assert rows[-1]["memory/peak_rank"] in (0, 1)


def test_mfu_is_reported_only_if_the_peak_flops_are_known(finished: Path, tmp_path: Path) -> None:
    assert not any("perf/mfu" in row for row in metrics(finished))
    trained(
        "run.dir=peak",
        "parallelism.data=1",
        "hardware.peak_flops.fp32=1e11",
        "training.steps=1",
        cwd=tmp_path,
    )
    row = metrics(tmp_path / "peak")[0]
    assert row["perf/mfu"] == pytest.approx(row["perf/flops_per_s"] / 1e11)


def test_validations_are_logged_at_any_logging_interval(tmp_path: Path) -> None:
    trained(
        "run.dir=r", "parallelism.data=1", "training.steps=7", "logging.interval=4",
        "training.validation_interval=3", cwd=tmp_path,
    )  # fmt: skip
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 3, 4, 6, 7]


def test_stop_at_ends_early_with_the_same_learning_rates(tmp_path: Path) -> None:
    for name, extra in (("whole", []), ("part", ["training.stop_at=3"])):
        trained(f"run.dir={name}", "parallelism.data=1", "training.steps=6", *extra, cwd=tmp_path)
    whole, part = metrics(tmp_path / "whole"), metrics(tmp_path / "part")
    assert [row["step"] for row in part] == [1, 2, 3]
    for name in ("train/loss", "train/lr", "train/grad_norm"):
        assert [row[name] for row in part] == [row[name] for row in whole[:3]]


def test_the_default_run_directory_is_new_and_printed(tmp_path: Path) -> None:
    printed = set()
    for _ in range(2):
        out = trained("parallelism.data=1", "training.steps=1", cwd=tmp_path)
        printed.add(next(line.split()[1] for line in out.splitlines() if line.startswith("run ")))
    assert {Path(path) for path in printed} == set((tmp_path / "runs").iterdir())
    assert len(printed) == 2


def test_a_directory_that_contains_a_run_is_refused(finished: Path) -> None:
    done = launcher("run.dir=one", "checkpoint.resume=none", cwd=finished.parent)
    assert done.returncode == 2
    assert "run.dir=one: already holds a run" in done.stderr
    assert "run.dir=one-2" in done.stderr


def test_a_sweep_gives_each_job_a_directory(tmp_path: Path) -> None:
    out = trained(
        "--multirun", "run.dir=sweep", "parallelism.data=1", "training.steps=1", "optimizer.lr=1e-3,1e-4",
        "scheduler=constant", "scheduler.warmup_steps=0", cwd=tmp_path,
    )  # fmt: skip
    rates = [metrics(tmp_path / "sweep" / index)[0]["train/lr"] for index in ("0", "1")]
    assert rates == [1e-3, 1e-4]
    jobs = [line for line in out.splitlines() if re.match(r"job +\d+:", line)]
    assert [job.split()[1] for job in jobs] == ["0:", "1:"]
    assert "optimizer.lr=0.001" in jobs[0]
    assert "optimizer.lr=0.0001" in jobs[1]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


# Each splits something else: the weights of a layer, the sequence, the layers, the samples and all states.
LAYOUTS = ["tp2", "cp2"]
MORE_LAYOUTS = ["pp2", "zero3", "single", "dp", "zero1", "zero2", "tp2_pp2", "hybrid_3d", "zero3_offload"]
SAME_DATA_ON_ALL_RANKS = f"""
import launcher.runtime.batches as batches
indices = batches.sample_indices
batches.sample_indices = lambda **where: indices(**where | {{"data_rank": 0}})
{LAUNCHER}
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    trained("parallelism=single", "run.dir=r", "training.steps=20", cwd=folder)
    return folder / "r"


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)]
)
def test_twenty_steps_agree_with_single(layout: str, single: Path, tmp_path: Path) -> None:
    """tests/parity/test_matrix.py compares layouts; here the command line adds its data, rows and files."""
    trained(f"parallelism={layout}", "run.dir=r", "training.steps=20", cwd=tmp_path)
    assert_same_run(tmp_path / "r", single)


def test_samples_that_two_ranks_share_are_seen(single: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "parallelism=dp", "parallelism.data=2", "run.dir=r", "training.steps=20"]
    assert started(*arguments, cwd=tmp_path, program=SAME_DATA_ON_ALL_RANKS).wait() == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "r", single)


def assert_same_run(run: Path, single: Path) -> None:
    rows, expected = metrics(run), metrics(single)
    assert len(rows) == 20
    assert min(row["train/grad_norm"] for row in expected) > 1.0, "clipping at 1.0 must be active"
    for row, other in zip(rows, expected, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)
        assert row["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-5)
        # Ranks that share a sequence count it once.
        for name in ("train/samples", "train/tokens"):
            assert row[name] == other[name]
        for name in ("perf/tokens_per_s", "perf/flops_per_s"):
            per_step = [each[name] * each["perf/step_time_s"] for each in (row, other)]
            assert per_step[0] == pytest.approx(per_step[1])
    assert rows[-1]["val/loss"] == pytest.approx(expected[-1]["val/loss"], abs=1e-5)
    assert_same_weights(run, single)


def test_dualpipev_agrees_with_single(tmp_path: Path) -> None:
    # Four layers, two on each of two ranks; four micro-batches.
    dualpipev = ["parallelism=pp2", "parallelism.data=1", "parallelism.pipeline_schedule=dualpipev"]
    deeper = trained(*dualpipev, "run.dir=deep", "model.num_layers=4", "training.steps=2", cwd=tmp_path)
    assert "2 pipeline (DualPipeV) x 1 data x 1 tensor" in deeper
    trained("parallelism=single", "run.dir=one", "model.num_layers=4", "training.steps=2", cwd=tmp_path)
    for row, other in zip(metrics(tmp_path / "deep"), metrics(tmp_path / "one"), strict=True):
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-5)
    assert_same_weights(tmp_path / "deep", tmp_path / "one")


def assert_same_weights(run: Path, other: Path) -> None:
    weights, expected = read_weights(run), read_weights(other)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # Adam divides by the gradient's size: where that is near zero its sign is rounding.
        assert weight.shape == expected[name].shape
        assert float((weight - expected[name]).abs().max()) < 1e-4, name


def read_weights(run: Path) -> dict:
    files = sorted((run / "weights").glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}
