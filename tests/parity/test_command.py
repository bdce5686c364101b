"""`launcher verify` from the command line: its output, its report and its exit code."""

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
from launcher.parity.verification import _rank
from tests.config.composing import run_of
from tests.parity.mutations import MUTATIONS
from tests.parity.running import VerifyPass, small_run, verify, write_report
from tests.runtime.command import launcher

EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
SMALL = ["verify", "model=gpt_tiny", "parallelism=tp2", "hardware=cpu", "verify.steps=1"]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault into the ranks that verify launches."""
    mutation = MUTATIONS["embedding mask left out"].inject
    monkeypatch.setattr("launcher.parity.verification.verify", partial(verify, mutation=mutation))


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setattr("sys.argv", ["launcher", *arguments])
    try:
        command_line.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.usefixtures("faulty")
def test_a_wrong_layout_exits_1_with_a_diagnosis(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert run_main(monkeypatch, *SMALL, f"verify.report={report}") == 1
    output = capfd.readouterr().out
    assert "First at step 1: the output of embedding" in output
    assert "usual cause: the look-up in a split vocabulary" in output
    assert "FAILED: the reduced layout computes something else than" in output
    written = json.loads(report.read_text())
    assert written["ok"] is False
    assert "mask" in written["passes"][0]["diagnosis"]["meaning"]


def test_a_correct_layout_exits_0_and_reports_every_difference(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert run_main(monkeypatch, *SMALL, f"verify.report={report}") == 0
    output = capfd.readouterr().out
    assert "model.hidden_size 128 -> " in output
    assert "measured / allowed" in output
    written = json.loads(report.read_text())
    assert set(written) == {"ok", "layout", "shrunk", "passes"}
    assert written["ok"] is True
    assert (written["layout"]["tensor"], written["layout"]["zero_stage"]) == (2, 0)
    assert any(line.startswith("model.hidden_size ") for line in written["shrunk"])
    titles = ["plain SGD, fp32", "adamw, fp32", "plain SGD, fp32, 128 positions", "whole run, adamw, fp32"]
    assert [result["title"] for result in written["passes"]] == titles
    for result in written["passes"]:
        assert set(result) == {"title", "engine", "ok", "diagnosis", "differences"}
        assert result["engine"].startswith("2 cpu ranks = 1 pipeline x 1 data x 2 tensor, ZeRO-0, ")
        assert (result["ok"], result["diagnosis"]) == (True, None)
        assert len(result["differences"]) > 30
        for difference in result["differences"]:
            assert set(difference) == {"step", "kind", "name", "measured", "allowed", "ok"}
    assert f"{sum(len(result['differences']) for result in written['passes'])} comparisons" in output


def test_an_unwritable_report_is_refused_before_ranks_launch(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, *SMALL, f"verify.report={tmp_path}/missing/report.json") == 2
    assert "verify.report=" in capfd.readouterr().err


def test_a_report_with_nan_and_infinity_is_valid_json(tmp_path: Path) -> None:
    differences = [Difference(1, "loss", "loss", measured, 1.0) for measured in (nan, inf, 0.5)]
    layout = Layout(pipeline=1, data=1, tensor=1, device="cpu", accumulation=1, zero_stage=0)
    write_report(tmp_path / "report.json", layout, [], [VerifyPass("plain SGD, fp32", differences, None)])
    [result] = json.loads((tmp_path / "report.json").read_text())["passes"]
    assert [(d["measured"], d["ok"]) for d in result["differences"]] == [
        (None, False),
        (None, False),
        (0.5, True),
    ]


@pytest.mark.parametrize(
    "arguments",
    [["parallelism.tensor=3"], ["parallelism=pp2", "parallelism.zero_stage=3"], ["verify.steps=0"]],
)
def test_an_impossible_layout_is_refused(arguments: list[str], tmp_path: Path) -> None:
    done = launcher("verify", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "try: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_shipped_experiment_agrees_with_the_reference(experiment: str, tmp_path: Path) -> None:
    done = launcher("verify", f"experiment={experiment}", "verify.steps=2", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "computes the same as one process of plain torch" in done.stdout


@pytest.mark.slow
def test_a_run_of_64_nodes_is_verified_on_cpu(tmp_path: Path) -> None:
    done = launcher(
        "verify", "model=llama3_70b", "hardware=h100_80gb", "hardware.nodes=64", "precision=bf16",
        "parallelism.tensor=8", "parallelism.pipeline=4", "parallelism.zero_stage=1", "verify.steps=2",
        "parallelism.sequence_parallel=true", "training.global_batch_size=1024",
        "training.micro_batch_size=1", cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "512 cuda ranks = 4 pipeline x 16 data x 8 tensor" in done.stdout


@pytest.mark.slow
def test_four_axes_are_verified_in_four_small_layouts(tmp_path: Path) -> None:
    axes = [f"parallelism.{axis}=2" for axis in ("data", "tensor", "pipeline", "context")]
    done = launcher(
        "verify", "model=llama_tiny", "hardware=h100_80gb", "hardware.nodes=2", *axes, "verify.steps=1",
        "parallelism.zero_stage=1", "training.global_batch_size=16", "training.micro_batch_size=1",
        "verify.report=report.json", cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nsmall    8 cpu ranks = ") == 4
    assert "PASSED: each of 4 reduced layouts computes the same" in done.stdout
    passes = {
        one["title"]: one["engine"] for one in json.loads((tmp_path / "report.json").read_text())["passes"]
    }
    for title, layout in {
        "plain SGD, fp32": "2 pipeline x 1 data x 2 context x 2 tensor",
        "plain SGD, fp32, pipeline x data x context": "2 pipeline x 2 data x 2 context x 1 tensor",
        "plain SGD, fp32, data x tensor x context": "1 pipeline x 2 data x 2 context x 2 tensor",
        "plain SGD, fp32, pipeline x data x tensor": "2 pipeline x 2 data x 2 tensor",
    }.items():
        assert passes[title].startswith(f"8 cpu ranks = {layout}, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpus_are_refused(tmp_path: Path) -> None:
    done = launcher(*SMALL, "verify.device=cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert "verify.device=cuda: this machine has no GPU" in done.stderr
    assert "try: verify.device=cpu" in done.stderr


def test_on_gpus_the_small_run_has_at_most_one_rank_per_gpu() -> None:
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


def test_the_arguments_of_a_rank_can_be_pickled() -> None:
    """On GPUs ranks are spawned, which pickles their arguments."""
    run = small_run("model=gpt_tiny", "parallelism=tp2")
    layout = resolve_layout(run, World("cpu", 2, 2))
    target = partial(_rank, record=record_rank, run=run, layout=layout, folder=Path("."), mutation=None)
    assert pickle.loads(pickle.dumps(target)).keywords["run"] == run
