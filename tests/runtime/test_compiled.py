"""Runs with compiled blocks: compile time beside step time, resuming, a failed compiler, repeated steps."""

from pathlib import Path

import pytest

from tests.runtime.command import SMALL, metrics, started

TRACED = """
from tests.compiling import trace_only
trace_only()
from launcher.__main__ import main
main()
"""
FAILING = """
import torch._inductor.graph
import torch._inductor.config
def run(self, *_):
    raise RuntimeError("no space left for kernels")
torch._inductor.graph.GraphLowering.run = run
torch._inductor.config.force_disable_caches = True
from launcher.__main__ import main
main()
"""
COMPILED = ["training.compile=true", "model.dropout=0.1", "run.dir=r"]


def ended(folder: Path, program: str, *arguments: str) -> str:
    """Run to the end; return standard output."""
    run = started(*SMALL, *COMPILED, *arguments, cwd=folder, program=program)
    out, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    return out


@pytest.mark.slow
def test_compile_time_is_reported_apart_from_step_time_and_a_run_resumes(tmp_path: Path) -> None:
    arguments = ["training.steps=6", "training.validation_interval=3", "parallelism.data=1"]
    first = ended(tmp_path, TRACED, *arguments, "training.stop_at=4")
    assert first.count("compile  ") == 1, first  # the first step compiled both graphs: it is validated too
    second = ended(tmp_path, TRACED, *arguments)
    assert second.count("compile  ") == 2, second  # step 5 compiles for training, step 6 for validation
    rows = metrics(tmp_path / "r")
    compiling = {row["step"]: row["perf/compile_time_s"] for row in rows if "perf/compile_time_s" in row}
    assert compiling.keys() == {1, 5, 6}
    timed = {row["step"]: row["perf/step_time_s"] for row in rows if "perf/step_time_s" in row}
    assert timed.keys() == {2, 3, 4, 6}
    assert max(timed.values()) < compiling[1]
    eager = tmp_path / "eager"
    eager.mkdir()
    ended(eager, TRACED, *arguments, "training.compile=false")
    for row, expected in zip(rows, metrics(eager / "r"), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
        assert "perf/compile_time_s" not in expected


def test_a_failed_compiler_is_one_warning(tmp_path: Path) -> None:
    out = ended(tmp_path, FAILING, "training.steps=3", "parallelism.data=2")
    assert out.count("warning  transformer blocks run eager: RuntimeError: no space left for kernels") == 1
    assert out.count("try: training.compile=false") == 1
    assert "compile  " not in out


SPOILED = """
import launcher.runtime.training as training
right_build, right_step, at = training.build_engine, training.optimizer_step, [0]

def build_engine(*arguments, **options):
    engine = right_build(*arguments, **options)
    for name, parameter in engine.module.named_parameters():
        if name.endswith("layers.3.mlp.up.weight"):
            parameter.register_hook(lambda gradient: gradient + (float("nan") if at[0] == 3 else 0.0))
    return engine

def optimizer_step(run, engine, loader, progress):
    at[0] = progress.step + 1
    return right_step(run, engine, loader, progress)

training.build_engine, training.optimizer_step = build_engine, optimizer_step
"""


@pytest.mark.slow
def test_a_skipped_step_is_repeated_eager_and_its_layer_named(tmp_path: Path) -> None:
    out = ended(tmp_path, SPOILED + TRACED, "training.steps=4", "parallelism.data=1")
    assert "step 3 was skipped" in out
    assert "The first bad value is the gradient of blocks.1.mlp.up.weight" in out
    assert [row["guard/skipped"] for row in metrics(tmp_path / "r")] == [0, 0, 1, 1]
