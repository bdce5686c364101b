"""`launcher compare` on real ranks: measurements agree with plans, and a wrong layout is reported."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forked_commands import heavy
from tests.runtime.command import SMALL, environment, launcher, metrics, trained

FEW = [
    "model.hidden_size=128", "model.ffn_hidden_size=512", "compare.ranks=2", "compare.steps=2", "run.dir=r",
]  # fmt: skip
ALL = "single,dp,tp,pp,cp,zero1,zero2,zero3"

# One of the ranks' functions replaced, in every rank of the layout named.
BROKEN = """
import sys
import launcher.compare.rank_record as record
from launcher.command_line import run_command
step = record.optimizer_step
def broken(run, engine, loader, progress):
    if engine.mesh.tensor.size == 2:
        {fault}
    return step(run, engine, loader, progress)
record.optimizer_step = broken
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return the output and the working directory of a comparison."""
    folder = tmp_path_factory.mktemp("compare")
    done = launcher(
        "compare", *SMALL, *FEW, f"compare.layouts=[{ALL}]", "compare.report=report.json", "logging=wandb",
        "logging.wandb.mode=offline", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


def found_in(folder: Path) -> dict[str, Any]:
    return {one["layout"]: one for one in json.loads((folder / "report.json").read_text())}


@pytest.mark.slow
def test_memory_and_traffic_are_as_planned(compared: tuple[str, Path]) -> None:
    found = found_in(compared[1])
    assert list(found) == ALL.split(",")
    for one in found.values():
        measured, planned = one["measured"], one["planned"]
        assert measured["memory"] == pytest.approx(planned["memory"], rel=0.05)
        assert measured["sent"] == pytest.approx(planned["sent"])
        assert sum(measured["parts"].values()) == pytest.approx(measured["seconds"], rel=0.5)
        assert measured["parts"]["compute"] > 0
    assert found["tp"]["measured"]["parts"]["tensor"] > 0
    assert found["dp"]["measured"]["parts"]["data"] > 0
    assert found["pp"]["measured"]["parts"]["pipeline"] > 0
    assert found["cp"]["measured"]["parts"]["context"] > 0
    assert found["tp"]["measured"]["memory"] < found["dp"]["measured"]["memory"]


def test_the_losses_are_the_same(compared: tuple[str, Path]) -> None:
    out, folder = compared
    assert "losses   the same in every layout, within 0.1%" in out
    losses = [one["measured"]["losses"] for one in found_in(folder).values()]
    assert all(one == pytest.approx(losses[0], rel=1e-4) for one in losses)
    assert len(losses[0]) == 6


def test_table_picture_and_metrics(compared: tuple[str, Path]) -> None:
    out, folder = compared
    for name in ALL.split(","):
        assert f"\n{name}" in out
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    rows = metrics(folder / "r")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0].keys() == {"step", *(f"loss/{name}" for name in ALL.split(","))}
    assert rows[-1]["memory_bytes/tp"] == found_in(folder)["tp"]["measured"]["memory"]
    assert list((folder / "r").glob("wandb/offline-run-*/*.wandb"))


def test_a_comparison_is_no_run_to_continue_but_a_run_to_upload(compared: tuple[str, Path]) -> None:
    folder = compared[1]
    before = (folder / "r" / "metrics.jsonl").read_bytes()
    begun = launcher(*SMALL, "run.dir=r", "training.steps=1", cwd=folder)
    assert begun.returncode == 2
    assert begun.stderr.startswith("launcher: run.dir=r: holds a comparison, whose config and metrics ")
    assert (folder / "r" / "metrics.jsonl").read_bytes() == before
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    synced = launcher("sync", "r", cwd=folder, **nowhere)
    assert "sync=r: the W&B server http://127.0.0.1:9 does not answer" in synced.stderr


def test_a_training_run_keeps_its_metrics(tmp_path: Path) -> None:
    trained("training.steps=2", "run.dir=r", "checkpoint.enabled=false", cwd=tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "r").iterdir() if path.is_file()}
    done = launcher("compare", *SMALL, *FEW, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run.dir=r: holds a training run, whose config and metrics a comparison would" in done.stderr
    assert "\n  try: run.dir=r-2, or leave" in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir() if path.is_file()} == before


def test_every_layout_begins_with_the_weights_of_init_from(tmp_path: Path) -> None:
    trained("training.steps=6", "run.dir=a", "optimizer.lr=0.01", "model.hidden_size=128",
            "model.ffn_hidden_size=512", cwd=tmp_path)  # fmt: skip
    begun = ["checkpoint.init_from=a", "compare.layouts=[single,tp,zero3]", "compare.figure=null"]
    done = launcher("compare", *SMALL, *FEW, *begun, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = metrics(tmp_path / "r")[0], metrics(tmp_path / "a")[-1]["train/loss"]
    assert [first[f"loss/{name}"] for name in ("single", "tp", "zero3")] == pytest.approx([last] * 3, rel=0.1)
    assert metrics(tmp_path / "a")[0]["train/loss"] > 1.2 * last


@pytest.mark.slow
def test_distributed_experts_are_as_planned(tmp_path: Path) -> None:
    """Every token runs through every expert, which is an even router."""
    even = [
        "model=moe_tiny", "model.experts.count=16", "model.experts.top_k=16", "model.experts.shared=0",
        "model.experts.scaling=1", "model.experts.ffn_hidden_size=64",
    ]  # fmt: skip
    layouts = ["compare.layouts=[dp,ep]", "compare.report=report.json", "compare.figure=null"]
    done = launcher("compare", *even, *SMALL, *FEW, *layouts, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses   the same in every layout, within 0.1%" in done.stdout
    found = found_in(tmp_path)
    for name in ("dp", "ep"):
        measured, plan = found[name]["measured"], found[name]["planned"]
        assert measured["memory"] == pytest.approx(plan["memory"], rel=0.05)
        assert {group: plan["sent"][group] for group in measured["sent"]} == pytest.approx(measured["sent"])
    assert found["ep"]["measured"]["sent"]["expert"] > 0
    assert found["ep"]["measured"]["parts"]["expert"] > 0
    assert found["ep"]["measured"]["memory"] < found["dp"]["measured"]["memory"]


@pytest.mark.slow
def test_what_one_rank_cannot_hold_trains_split(tmp_path: Path) -> None:
    budget, layouts = "hardware.memory_bytes=8.5e6", "compare.layouts=[single,dp,tp,pp]"
    done = launcher("compare", *SMALL, *FEW, budget, layouts, "compare.report=report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = found_in(tmp_path)
    for name in ("single", "dp"):
        assert found[name]["measured"] is None
        assert "too much" in found[name]["refused"]
        assert f"skipped  {name}: " in done.stdout
    for name in ("tp", "pp"):
        assert found[name]["measured"]["memory"] <= 8.5e6


def broken(fault: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    layouts = "compare.layouts=[single,tp,dp]"
    arguments = ["compare", *SMALL, *FEW, layouts, "compare.figure=null"]
    program = BROKEN.format(fault=fault)
    return heavy().run(arguments, cwd=cwd, environment=environment(), program=program)


def test_a_layout_that_computes_something_else_is_told_of(tmp_path: Path) -> None:
    done = broken("next(iter(engine.module.parameters())).data.mul_(1.5)", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERS  tp: losses up to " in done.stdout
    assert "DIFFERS  dp" not in done.stdout


@pytest.mark.slow
def test_a_layout_that_fails_is_told_of_and_the_others_are_compared(tmp_path: Path) -> None:
    done = broken("raise RuntimeError('as the test wants it')", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed   tp: " in done.stdout
    assert "as the test wants it" in done.stdout
    assert "skipped  tp: " in done.stdout
    assert "losses   the same in every layout" in done.stdout


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "compare.layouts=[tpp]",
            "compare.layouts=tpp: unknown layout; with compare.ranks=4 there are: single, dp",
        ),
        ("compare.ranks=1", "compare.ranks=1: must be at least 2"),
        (
            "parallelism.tensor=2",
            "parallelism.tensor=2: `launcher compare` takes the layouts",
        ),
        ("compare.figure=x.gif", "compare.figure=x.gif: a picture is .png, .svg or .pdf"),
        ("compare.report=out/c.json", "compare.report=out/c.json: cannot be written: No such file"),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.9: not a setting of adamw\n  try: optimizer=sgd or"),
        pytest.param("hardware.memory_bytes=1e3", "compare.layouts=", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_refused_before_anything_starts(typed: str, said: str, tmp_path: Path) -> None:
    done = launcher("compare", typed, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"launcher: {said}")
    assert not (tmp_path / "runs").exists()
