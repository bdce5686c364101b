"""Differences from the checkpoint are listed on resume, and a schedule that does not fit is a warning."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import __version__
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.resume_changes import changes_since
from launcher.config.compose import compose_jobs
from launcher.config.schedule import schedule_warnings
from launcher.config.schema import RunConfig
from launcher.config.secrets import as_written
from launcher.runtime.resume import rate_change
from tests.config.composing import run_of
from tests.config.test_cli import launcher as light_launcher
from tests.runtime.command import trained


def checkpoint_of(run: RunConfig, step: int = 20, layout: str = "1 rank") -> Manifest:
    config = json.loads(json.dumps(as_written(run)))
    return Manifest(step, 16 * step, step, {}, {}, __version__, layout, config, None, {}, {})


def test_a_resume_with_other_settings_lists_them_in_one_block(tmp_path: Path) -> None:
    trained("training.steps=6", "training.stop_at=3", "scheduler.warmup_steps=1", "run.dir=r", cwd=tmp_path)
    out = trained(
        "training.steps=12", "parallelism=tp2", "optimizer.lr=1e-4", "scheduler.warmup_steps=1",
        "run.dir=r", cwd=tmp_path,
    )  # fmt: skip
    block = out.partition("changed  since the checkpoint:\n")[2].splitlines()
    lines = [line.strip() for line in block if line.startswith("         ")]
    assert [line.split(":")[0] for line in lines] == [
        "layout", "parallelism.tensor", "optimizer.lr", "training.steps", "learning rate of step 4",
    ]  # fmt: skip
    assert "1 tensor" in lines[0].partition(" -> ")[0]
    assert "2 tensor" in lines[0].partition(" -> ")[2]
    assert lines[3] == "training.steps: 6 -> 12"


def test_the_same_command_lists_nothing(tmp_path: Path) -> None:
    run = ["training.steps=4", "scheduler.warmup_steps=1", "run.dir=r"]
    trained(*run, "training.stop_at=2", cwd=tmp_path)
    out = trained(*run, cwd=tmp_path)
    assert "resumed  " in out
    assert "changed  " not in out


def test_every_section_is_compared(subtests: pytest.Subtests) -> None:
    run = run_of()
    for setting in (
        "precision=bf16", "training.global_batch_size=32", "training.micro_batch_size=2", "optimizer.lr=1e-4",
        "scheduler=linear", "scheduler.warmup_steps=7", "hardware.nodes=2", "guard.max_skips=3",
        "data.num_workers=2", "parallelism.zero_stage=1", "deepspeed.zero_optimization.overlap_comm=false",
        "logging.interval=5", "checkpoint.keep_last=9",
    ):  # fmt: skip
        with subtests.test(setting):
            lines = changes_since(checkpoint_of(run), run_of(setting), "1 rank")
            field = setting.partition("=")[0]
            assert lines
            assert all(line.startswith(field) for line in lines)
            assert changes_since(checkpoint_of(run_of(setting)), run_of(setting), "1 rank") == []


def test_settings_that_do_not_train_are_left_out_and_new_fields_too() -> None:
    run = run_of("run.dir=a", "slurm.partition=x", "checkpoint.resume=none", "training.stop_at=3")
    checkpoint = checkpoint_of(run)
    assert changes_since(checkpoint, run_of(), "1 rank") == []
    del checkpoint.config["guard"]
    assert changes_since(checkpoint, run_of(), "1 rank") == []
    assert changes_since(replace(checkpoint, launcher="0.0.1"), run_of(), "1 rank") == [
        f"launcher: 0.0.1 -> {__version__}"
    ]


def test_a_decay_that_had_begun_is_a_warning() -> None:
    old = run_of("training.steps=40", "scheduler.warmup_steps=5")
    assert rate_change(old, checkpoint_of(old)) == []
    longer = run_of("training.steps=400", "scheduler.warmup_steps=5")
    [line, warning] = rate_change(longer, checkpoint_of(old, 38))
    assert line.startswith("learning rate of step 39: ")
    assert "had begun its decay, and the rate rises again" in warning
    finished = checkpoint_of(old, 40)
    assert len(rate_change(longer, finished)) == 2
    lower = run_of("training.steps=40", "scheduler.warmup_steps=5", "optimizer.lr=1e-6")
    assert len(rate_change(lower, checkpoint_of(old))) == 1
    foreign = checkpoint_of(old)
    foreign.config["scheduler"]["name"] = "polynomial"
    assert rate_change(lower, foreign) == []


OWN = {"scheduler.warmup_steps": "the command line"}


def test_a_warm_up_that_is_not_shorter_than_the_run() -> None:
    assert schedule_warnings(run_of("training.steps=21"), OWN) == []
    assert schedule_warnings(run_of("training.steps=0"), OWN) == []
    [all_of_it] = schedule_warnings(run_of("training.steps=20"), OWN)
    [longer] = schedule_warnings(run_of("training.steps=10"), OWN)
    assert "the warm-up takes all of training.steps=20" in all_of_it
    assert "the warm-up lasts longer than training.steps=10" in longer
    for warning in (all_of_it, longer):
        remedy = warning.rpartition("try: ")[2]
        steps = warning.partition("training.steps=")[2].partition(":")[0]
        assert schedule_warnings(run_of(f"training.steps={steps}", *shlex.split(remedy)), OWN) == []


def test_a_warm_up_that_somebody_chose_is_a_warning_and_a_default_is_a_note(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "mine.yaml").write_text("defaults: [linear]\nwarmup_steps: 20\n")
    for typed, kind in (
        ("training.steps=10", "note"),
        ("scheduler=linear", "note"),
        ("scheduler.min_lr_ratio=0", "note"),
        ("scheduler.warmup_steps=20", "warning"),
        ("experiment=gpt2_small", "warning"),
        ("scheduler=mine", "warning"),
    ):
        with subtests.test(typed):
            arguments = [f"--config-dir={tmp_path}", typed, "training.steps=10"]
            [job] = compose_jobs("config", RunConfig, arguments)
            [line] = schedule_warnings(job.config, job.origins)
            assert line.startswith(f"{kind:<9}")
            assert ("\n  try: " in line) == (kind == "warning")


def test_plan_and_submit_warn_on_standard_error_and_train_on_its_output(tmp_path: Path) -> None:
    short = ["training.steps=10", "scheduler.warmup_steps=20", "parallelism=single", "hardware=cpu"]
    plan, submit = light_launcher(
        tmp_path,
        ["plan", *short, "format=json"],
        ["submit", *short, "hardware.accelerators_per_node=1", "hardware.nodes=1", "submit.dry_run=true"],
    )
    for ended in (plan, submit):
        assert ended.code == 0, ended.err
        assert "warning  scheduler.warmup_steps=20: the warm-up lasts longer than" in ended.err
    json.loads(plan.out)
    assert submit.out.startswith("#!/usr/bin/env bash\n")
    out = trained("training.steps=1", cwd=tmp_path)
    assert out.startswith("note     the run ends during the warm-up (scheduler.warmup_steps=20): ")
