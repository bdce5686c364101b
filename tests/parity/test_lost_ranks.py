"""A rank that fails or hangs is a verdict with the rank's place, and the report is written."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import SendGrad

import launcher.parallel.layers as layers
import launcher.parity.recording as recording
from launcher.config.schema import RunConfig
from launcher.parity.verification import Mutation
from tests.parity.running import passes, plain_sgd_pass, small_run, verify
from tests.parity.test_command import SMALL, run_main


def a_rank_fails() -> None:
    leave = layers.TensorParallel.leave

    def broken(self: layers.TensorParallel, partial_sum: object) -> object:
        if dist.get_rank() == 1:
            raise ValueError("the deliberate failure")
        return leave(self, partial_sum)  # type: ignore[arg-type]

    layers.TensorParallel.leave = broken  # type: ignore[method-assign,assignment]


def a_stage_returns_no_gradient() -> None:
    PipelineEngine._INSTRUCTION_MAP[SendGrad] = lambda *_, **__: None


def small(layout: str = "tp2") -> RunConfig:
    return small_run("model=gpt_tiny", f"parallelism={layout}", "parallelism.data=1", steps=1)


@pytest.fixture
def few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "HANG_MINUTES", 4 / 60)


def test_a_failed_rank_ends_verify_with_its_traceback() -> None:
    [result] = verify(small(), mutation=a_rank_fails)
    assert not result.ok
    assert result.diagnosis is not None
    assert "the deliberate failure" in result.diagnosis.shape
    assert "rank 1 of 2" in result.diagnosis.shape
    assert [(d.kind, d.name) for d in result.differences] == [("rank", "rank 1 of 2")]


@pytest.mark.usefixtures("few_seconds")
def test_a_hang_is_a_verdict_with_the_place_of_each_rank() -> None:
    result = plain_sgd_pass(small("pp2"), a_stage_returns_no_gradient)
    assert not result.ok
    assert result.diagnosis is not None
    assert "the run hangs" in result.diagnosis.shape
    assert "at step 1" in result.diagnosis.shape
    assert "collective" in result.diagnosis.meaning


@pytest.mark.parametrize("fault", [a_rank_fails])
def test_the_report_and_the_exit_code_name_the_lost_rank(
    fault: Mutation, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("launcher.parity.verification.verify", partial(verify, mutation=fault))
    report = tmp_path / "report.json"
    assert run_main(monkeypatch, *SMALL, f"verify.report={report}") == 1
    written = json.loads(report.read_text())
    assert written["ok"] is False
    assert "the deliberate failure" in written["passes"][0]["diagnosis"]["shape"]
    assert "FAILED" in capfd.readouterr().out


def test_every_pass_has_the_zero_stage_of_the_run_and_the_last_has_all_its_settings() -> None:
    run = small_run("model=gpt_tiny", "parallelism=tp2", "precision=bf16", "training.compile=true")
    plans = passes(run)
    assert {plan.run.parallelism.zero_stage for plan in plans} == {1}
    last = plans[-1].run
    assert (last.optimizer, last.precision, last.training) == (run.optimizer, run.precision, run.training)
    assert last.training.compile
