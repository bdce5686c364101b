"""`launcher verify` as a user meets it: what it prints and writes, and how it exits."""

import json
import pickle
from functools import partial
from math import inf, nan
from pathlib import Path

import pytest
import torch

from launcher import __main__ as command_line
from launcher.commands.verify import gpus_to_use
from launcher.config.errors import ConfigError
from launcher.config.fields import config_directory
from launcher.config.layout import Layout, resolve_layout
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parity.differences import Difference
from launcher.parity.recording import record_rank
from launcher.parity.shrink import shrink
from launcher.parity.verify import _rank
from tests.config.composing import run_of
from tests.parity.mutations import MUTATIONS
from tests.parity.running import Pass, small_run, verify, write_report
from tests.runtime.command import launcher

EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
SMALL = ["verify", "model=gpt_tiny", "parallelism=tp2", "hardware=cpu", "verify.steps=1"]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verify runs has a fault."""
    mutation = MUTATIONS["embedding mask left out"].inject
    monkeypatch.setattr("launcher.parity.verify.verify", partial(verify, mutation=mutation))


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of this process, were it the command line's."""
    monkeypatch.setattr("sys.argv", ["launcher", *arguments])
    try:
        command_line.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.usefixtures("faulty")
def test_a_layout_that_differs_exits_1_and_says_how(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert run_main(monkeypatch, *SMALL, f"verify.report={report}") == 1
    said = capfd.readouterr().out
    assert "First at step 1: the output of embedding" in said
    assert "usually: the look-up in a split vocabulary" in said
    assert "is NOT the same run" in said
    found = json.loads(report.read_text())
    assert found["ok"] is False
    assert "mask" in found["passes"][0]["diagnosis"]["meaning"]


def test_the_same_run_exits_0_and_reports_every_number(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert run_main(monkeypatch, *SMALL, f"verify.report={report}") == 0
    said = capfd.readouterr().out
    assert "model.hidden_size 128 -> " in said
    assert "measured / allowed" in said
    found = json.loads(report.read_text())
    assert set(found) == {"ok", "layout", "shrunk", "passes"}
    assert found["ok"] is True
    assert (found["layout"]["tensor"], found["layout"]["zero_stage"]) == (2, 0)
    assert any(line.startswith("model.hidden_size ") for line in found["shrunk"])
    assert [one["title"] for one in found["passes"]] == ["plain SGD, fp32", "adamw, fp32"]
    for one in found["passes"]:
        assert set(one) == {"title", "ok", "diagnosis", "differences"}
        assert (one["ok"], one["diagnosis"]) == (True, None)
        assert len(one["differences"]) > 30
        for difference in one["differences"]:
            assert set(difference) == {"step", "kind", "name", "measured", "allowed", "ok"}
    assert f"{sum(len(one['differences']) for one in found['passes'])} comparisons" in said


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, *SMALL, f"verify.report={tmp_path}/missing/report.json") == 2
    assert "verify.report=" in capfd.readouterr().err


def test_a_report_is_json_whatever_was_measured(tmp_path: Path) -> None:
    differences = [Difference(1, "loss", "loss", measured, 1.0) for measured in (nan, inf, 0.5)]
    layout = Layout(pipeline=1, data=1, tensor=1, device="cpu", accumulation=1, zero_stage=0)
    write_report(tmp_path / "report.json", layout, [], [Pass("plain SGD, fp32", differences, None)])
    [found] = json.loads((tmp_path / "report.json").read_text())["passes"]
    assert [(d["measured"], d["ok"]) for d in found["differences"]] == [
        (None, False),
        (None, False),
        (0.5, True),
    ]


@pytest.mark.parametrize(
    "arguments",
    [["parallelism.tensor=3"], ["parallelism=pp2", "parallelism.zero_stage=3"], ["verify.steps=0"]],
)
def test_a_layout_that_cannot_be_is_refused(arguments: list[str], tmp_path: Path) -> None:
    done = launcher("verify", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "try: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_shipped_experiment_is_the_same_run(experiment: str, tmp_path: Path) -> None:
    done = launcher("verify", f"experiment={experiment}", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is the same run" in done.stdout


@pytest.mark.slow
def test_a_run_of_many_nodes_is_verified_here(tmp_path: Path) -> None:
    done = launcher(
        "verify", "model=llama3_70b", "hardware=h100_80gb", "hardware.nodes=64", "precision=bf16",
        "parallelism.tensor=8", "parallelism.pipeline=4", "parallelism.zero_stage=1", "verify.steps=2",
        "parallelism.sequence_parallel=true", "training.global_batch_size=1024",
        "training.micro_batch_size=1", cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "512 cuda ranks = 4 pipeline x 16 data x 8 tensor" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_are_refused(tmp_path: Path) -> None:
    done = launcher(*SMALL, "verify.device=cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert "verify.device=cuda: this machine has no GPU" in done.stderr
    assert "try: verify.device=cpu" in done.stderr


def test_on_gpus_there_are_no_more_ranks_than_gpus() -> None:
    run = run_of("model=gpt_tiny", "parallelism=hybrid_3d", "hardware=h100_80gb", "verify.device=cuda")
    layout = validate(run, World("cuda", 8, 8))
    small, _ = shrink(run, layout, gpus=8)
    assert validate(small, World("cuda", 8, 8)).world_size == 8
    assert validate(small, World("cuda", 8, 8)).device == "cuda"
    with pytest.raises(ConfigError, match="8 ranks, more than the 4 GPUs here"):
        validate(shrink(run, layout, gpus=4)[0], World("cuda", 4, 4))
    wide = run_of("model=gpt_tiny", "parallelism.data=4", "parallelism.tensor=2", "hardware=h100_80gb")
    small, _ = shrink(wide, validate(wide, World("cuda", 8, 8)), gpus=4)
    assert (small.parallelism.data, small.parallelism.tensor) == (2, 2)
    assert gpus_to_use(run, 4) == 4
    assert gpus_to_use(wide, 4) == 0


def test_ranks_can_be_spawned_too() -> None:
    """As they must be on GPUs: what a rank is given survives pickling."""
    run = small_run("model=gpt_tiny", "parallelism=tp2")
    layout = resolve_layout(run, World("cpu", 2, 2))
    target = partial(_rank, record=record_rank, run=run, layout=layout, folder=Path("."), mutation=None)
    assert pickle.loads(pickle.dumps(target)).keywords["run"] == run
