"""`profile=true`: traces and the table of a run, and what a run without it does not do."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from launcher.config.compose import compose_jobs
from launcher.config.schema import ProfileConfig, RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.stopwatch import Stopwatch
from launcher.engine.trace_parts import COLLECTIVE, KINDS, STEP, Overlap, StepParts, parts_of_trace
from launcher.runtime import profiling
from launcher.runtime.plan_check import MEASURED_STEP, PlanCheck
from launcher.runtime.profiling import Profiling, profiled_steps, table
from tests.config.composing import composed, run_of
from tests.ring_order import BACKWARD, FORWARD, order
from tests.runtime.command import metrics, trained


@pytest.mark.slow
def test_a_run_of_two_ranks_is_traced_and_its_losses_stay_the_same(tmp_path: Path) -> None:
    run = ["parallelism=tp2", "parallelism.data=1", "training.steps=4", "checkpoint.enabled=false"]
    plain = trained(*run, "run.dir=plain", cwd=tmp_path)
    out = trained(*run, "run.dir=traced", "profile=true", "profile.steps=2", cwd=tmp_path)
    assert "profile" not in plain
    assert not (tmp_path / "plain" / "profile").exists()
    for row, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "traced"), strict=True):
        assert row["train/loss"] == other["train/loss"]
        assert row["train/grad_norm"] == other["train/grad_norm"]

    folder = tmp_path / "traced" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "steps_3-4_rank_0.json", "steps_3-4_rank_1.json",
    ]  # fmt: skip
    step_seconds = {row["step"]: row["perf/step_time_s"] for row in metrics(tmp_path / "traced")}
    for path in folder.iterdir():
        parts = parts_of_trace(json.loads(path.read_text()))
        assert parts.steps == 2
        exposed = sum(overlap.exposed for overlap in parts.collectives.values())
        total = sum(parts.work.values()) + exposed + parts.idle
        assert total == pytest.approx(parts.seconds)
        # Rank 0's clock starts a little earlier and stops a little later than its trace. Rank 1 has its own.
        by_the_clock = (step_seconds[3] + step_seconds[4]) / 2
        assert by_the_clock / 2 < parts.seconds < 1.5 * by_the_clock
        assert all(parts.work[kind] > 0 for kind in KINDS)
        assert parts.collectives["all_reduce (tensor)"].exposed > 0
        assert set(parts.collectives) <= {"all_reduce (tensor)", "all_reduce (data)", "all_reduce (world)"}

    shown = out[out.index("profile  seconds per step on rank 0 (steps 3 to 4, mean)") :].splitlines()
    rows = [re.fullmatch(r" {9}(.+?) +(\d+\.\d{4}) +(\d+\.\d)%.*", line) for line in shown[1:]]
    shares = {match[1]: float(match[3]) for match in rows if match}
    assert [*KINDS, "all_reduce (tensor)", "idle", "step"] == [
        name for name in shares if name not in ("all_reduce (data)", "all_reduce (world)")
    ]
    assert shares.pop("step") == 100
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert f"profile  {folder}: a trace of each rank" in out


@pytest.mark.slow
def test_the_trace_of_a_run_shows_the_ring_sending_behind_attention(tmp_path: Path) -> None:
    """Two layers and four micro-batches; each layer exchanges once forward, and twice backward."""
    run = ["parallelism=cp2", "parallelism.data=1", "training.steps=3", "checkpoint.enabled=false"]
    trained(*run, "run.dir=r", "profile=true", "profile.first_step=3", "profile.steps=1", cwd=tmp_path)
    traces = sorted((tmp_path / "r" / "profile").iterdir())
    assert len(traces) == 2
    for path in traces:
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
        [step] = [e for e in events if e["name"].startswith(STEP) and e["cat"] == "user_annotation"]
        end = step["ts"] + step["dur"]
        spans = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if step["ts"] <= e["ts"] <= end]
        found = order(spans, f"{COLLECTIVE}send and recv (context)")
        assert found == 4 * (2 * FORWARD[2] + 2 * BACKWARD[2])


def test_the_steps_that_are_profiled() -> None:
    default, at_three = ProfileConfig(enabled=True), ProfileConfig(enabled=True, first_step=3, steps=2)
    assert profiled_steps(ProfileConfig(), 1, 100) == range(0)
    assert profiled_steps(default, 1, 100) == range(6, 9)
    assert profiled_steps(default, 51, 100) == range(56, 59)  # after a resume
    assert profiled_steps(default, 1, 4) == range(2, 5)
    assert profiled_steps(default, 100, 100) == range(100, 101)
    assert profiled_steps(at_three, 1, 100) == range(3, 5)
    assert profiled_steps(at_three, 4, 100) == range(4, 5)
    assert not profiled_steps(at_three, 5, 100)


def test_profile_true_is_a_whole_setting() -> None:
    assert composed("profile=true").profile == ProfileConfig(enabled=True)
    assert composed("profile=True", "profile.steps=1").profile == ProfileConfig(enabled=True, steps=1)
    assert not composed("profile=false").profile.enabled
    jobs = compose_jobs("config", RunConfig, ["--multirun", "profile=true,false"])
    assert [job.config.profile.enabled for job in jobs] == [True, False]


def test_the_table() -> None:
    work = dict.fromkeys(KINDS, 0.0) | {"matrix products": 0.5}
    collectives = {"all_reduce (data)": Overlap(0.25, 0.125), "all_gather (data)": Overlap(0.05)}
    assert table(StepParts(3, 1.0, work, collectives, idle=0.2), [6, 7, 8]) == [
        "profile  seconds per step on rank 0 (steps 6 to 8, mean)",
        "         matrix products               0.5000   50.0%",
        "         attention                     0.0000    0.0%",
        "         optimizer                     0.0000    0.0%",
        "         norms, elementwise and other  0.0000    0.0%",
        "         copies                        0.0000    0.0%",
        "         all_gather (data)             0.0500    5.0%",
        "         all_reduce (data)             0.2500   25.0%  and 0.1250 s hidden behind work",
        "         idle                          0.2000   20.0%",
        "         step                          1.0000  100.0%",
    ]
    assert table(StepParts(1, 1.0, work), [6])[0] == "profile  seconds per step on rank 0 (step 6)"


class FakeTrace:
    """Stands for the profiler; remembers what is asked of it."""

    calls: tuple[str, ...] = ()

    def __init__(self, *_: Any) -> None:
        FakeTrace.calls = ("made",)

    def start(self) -> None:
        FakeTrace.calls += ("start",)

    def step(self, number: int) -> Any:
        FakeTrace.calls += (f"step {number}",)
        return nullcontext()

    def stop(self) -> None:
        FakeTrace.calls += ("stop",)

    def write(self, path: Path) -> None:
        FakeTrace.calls += (f"write {path.name}",)
        raise OSError(28, "No space left on device")


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profiling:
    """Return the profiling of the steps 2 and 3, without a profiler."""
    monkeypatch.setattr(profiling, "ProfilerTrace", FakeTrace)
    FakeTrace.calls = ()
    engine = cast(Any, SimpleNamespace(mesh=SimpleNamespace(rank=0)))
    output = cast(Any, SimpleNamespace(say=lambda *lines: None))
    return Profiling(range(2, 4), engine, Stopwatch(lambda _: ""), output, tmp_path / "profile")


def test_nothing_is_made_before_the_first_profiled_step(profile: Profiling) -> None:
    with profile:
        context = profile.step(1)
        assert context is profile.step(4)
    assert FakeTrace.calls == ()


def test_a_run_that_stops_early_writes_the_steps_it_took(
    profile: Profiling, capsys: pytest.CaptureFixture[str]
) -> None:
    with profile, profile.step(2):
        pass
    assert FakeTrace.calls == ("made", "start", "step 2", "stop", "write steps_2-2_rank_0.json")
    # A trace that cannot be written is a note.
    assert "cannot be written (No space left on device); training continues" in capsys.readouterr().out


def test_a_run_that_fails_writes_nothing(profile: Profiling) -> None:
    with pytest.raises(ValueError, match="a failure"), profile, profile.step(2):
        raise ValueError("a failure")
    assert FakeTrace.calls == ("made", "start", "step 2", "stop")


def test_tensors_are_not_counted_in_a_profiled_step() -> None:
    """Counting slows the step down: the table would show it."""
    run = run_of("hardware=cpu", "parallelism=single")
    check = PlanCheck(run, validate(run, World("cpu", 1, 1)), torch.device("cpu"))
    contexts = [
        check.measuring([], profiled=step in (MEASURED_STEP, MEASURED_STEP + 1))
        for step in range(1, MEASURED_STEP + 5)
    ]
    measured = [
        step for step, context in enumerate(contexts, 1) if not isinstance(context, type(nullcontext()))
    ]
    assert measured == [MEASURED_STEP + 2]
