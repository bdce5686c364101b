"""Guards against numbers that would harm a run, and the command that repeats a step."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import checkpoints_in, read_manifest
from launcher.runtime.replay import as_first_taken
from launcher.runtime.resume import Progress
from launcher.runtime.spikes import SpikeDetector
from tests.runtime.command import SMALL, launcher, metrics, started, trained

# Adds numbers to the gradient of one weight on one rank: {step: number}.
FAULTY = """
import torch.distributed as dist
import launcher.runtime.training as training
from launcher.parallel.sharding import logical_of

right_build, right_step, at = training.build_engine, training.optimizer_step, [0]

def build_engine(*arguments, **options):
    engine = right_build(*arguments, **options)
    for parameter in engine.module.parameters():
        if logical_of(parameter).name == "blocks.1.mlp.up.weight" and engine.mesh.data.rank == 1:
            parameter.register_hook(lambda gradient: gradient + FAULTS.get(at[0], 0.0))
    return engine

def optimizer_step(run, engine, loader, progress):
    at[0] = progress.step + 1
    return right_step(run, engine, loader, progress)

training.build_engine, training.optimizer_step = build_engine, optimizer_step
from launcher.__main__ import main
main()
"""
QUICK = ["run.dir=r", "training.steps=8", "parallelism.data=2"]


def faulty(folder: Path, faults: str, *arguments: str, patch: str = "") -> tuple[int, str, str]:
    """Return exit code, output and error of a run whose data rank 1 adds `faults` to a gradient."""
    program = f"nan, inf = float('nan'), float('inf')\nFAULTS = {faults}\n{patch}\n{FAULTY}"
    run = started(*SMALL, *QUICK, *arguments, cwd=folder, program=program)
    out, error = run.communicate(timeout=120)
    return run.returncode, out, error


@pytest.mark.parametrize("layout", ["parallelism=dp", "parallelism=zero2"])
def test_a_skipped_step_is_counted_and_says_where_it_went_wrong(layout: str, tmp_path: Path) -> None:
    code, out, error = faulty(tmp_path, "{3: nan, 4: inf, 6: 1e30}", layout)
    assert code == 0, error
    rows = metrics(tmp_path / "r")
    assert [row["guard/skipped"] for row in rows] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert "step 3 was skipped: its gradients have NaN, infinite or huge values" in out
    place = "the gradient of blocks.1.mlp.up.weight, on rank 1, micro-batch 0 (samples 18, 19)"
    assert f"The first bad value is {place}" in out


@pytest.mark.parametrize(
    "layout", ["parallelism=zero1", pytest.param("parallelism=zero3", marks=pytest.mark.slow)]
)
def test_a_first_step_that_is_skipped_can_be_saved_and_resumed(layout: str, tmp_path: Path) -> None:
    code, _, error = faulty(tmp_path, "{1: nan}", layout, "training.stop_at=1")
    assert code == 0, error
    out = trained(*QUICK, "parallelism.data=1", cwd=tmp_path)
    assert "at step 1" in out
    assert metrics(tmp_path / "r")[-1]["guard/skipped"] == 1


# Makes the logits of one micro-batch on data rank 1 infinite. The tied embedding gives them in a second call.
BAD_LOGITS = """
import torch
import launcher.runtime.training as training

right_build, right_step, at, calls = training.build_engine, training.optimizer_step, [0], [0]

def spoil(module, inputs, options, output):
    is_head = "labels" in options
    calls[0] += is_head
    return output * float("inf") if at[0] == 3 and is_head and calls[0] % 2 == 0 else None

def build_engine(*arguments, **options):
    engine = right_build(*arguments, **options)
    if engine.mesh.data.rank == 1:
        engine.module.get_submodule("layers.0").register_forward_hook(spoil, with_kwargs=True)
    return engine

def optimizer_step(run, engine, loader, progress):
    at[0], calls[0] = progress.step + 1, 0
    return right_step(run, engine, loader, progress)

training.build_engine, training.optimizer_step = build_engine, optimizer_step
from launcher.__main__ import main
main()
"""


def test_a_bad_value_of_a_layer_that_runs_twice_is_in_its_micro_batch(tmp_path: Path) -> None:
    run = started(*SMALL, *QUICK, "training.validation_interval=0", cwd=tmp_path, program=BAD_LOGITS)
    out, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    assert "The first bad value is the output of head, on rank 1, micro-batch 1 (samples 22, 23)" in out


def test_a_skip_between_logged_steps_is_found_too(tmp_path: Path) -> None:
    code, out, error = faulty(tmp_path, "{3: nan}", "logging.interval=4")
    assert code == 0, error
    assert "step 3 was skipped" in out
    assert metrics(tmp_path / "r")[-1]["guard/skipped"] == 1


def test_stop_ends_the_run_at_once(tmp_path: Path) -> None:
    code, out, error = faulty(tmp_path, "{3: nan}", "guard.nonfinite=stop")
    assert code == 1
    assert "stopped the run: step 3 was skipped" in error
    assert "try: guard.nonfinite=skip" in error
    assert "Traceback" not in out + error


def test_too_many_skips_in_a_row_end_the_run(tmp_path: Path) -> None:
    code, out, error = faulty(tmp_path, "{n: nan for n in range(2, 9)}", "guard.max_skips=4")
    assert code == 1
    assert "4 steps in a row were skipped, the last is step 5" in error
    assert "Traceback" not in out + error


# The save of a step is still being written when the next step ends the run.
SLOW_SAVE = """
import time
import launcher.checkpoint.save as save
right_write = save.write_pieces
def write_pieces(*arguments):
    time.sleep(3)
    {then}
save.write_pieces = write_pieces
"""
SAVE_BEFORE = ["checkpoint.interval_steps=2", "checkpoint.stop_on_error=true"]


@pytest.mark.parametrize(
    ("faults", "end"),
    [
        ("{3: nan}", "guard.nonfinite=stop"),
        pytest.param("{3: nan, 4: nan}", "guard.max_skips=1", marks=pytest.mark.slow),
    ],
)
def test_a_guard_that_ends_the_run_lets_the_pending_save_be_completed(
    faults: str, end: str, tmp_path: Path
) -> None:
    patch = SLOW_SAVE.format(then="right_write(*arguments)")
    code, out, error = faulty(tmp_path, faults, end, *SAVE_BEFORE, patch=patch)
    assert code == 1, out + error
    assert "the last is step 3" in error or "step 3 was skipped" in error
    assert [path.name for path in checkpoints_in(tmp_path / "r")] == ["step-00000002"]


def test_a_failed_pending_save_does_not_hide_why_the_run_ends(tmp_path: Path) -> None:
    """Even with checkpoint.stop_on_error."""
    patch = SLOW_SAVE.format(then="raise OSError('the disk is full')")
    code, out, error = faulty(tmp_path, "{3: nan}", "guard.nonfinite=stop", *SAVE_BEFORE, patch=patch)
    assert code == 1
    assert "stopped the run: step 3 was skipped" in error
    assert "note     a checkpoint could not be written" in out
    assert "the disk is full" in out
    assert "Traceback" not in out + error


def test_a_skip_before_samples_that_are_left_out_is_examined_with_its_own_samples(tmp_path: Path) -> None:
    trained(*QUICK, "training.stop_at=2", cwd=tmp_path)
    # Step 3 takes the samples 16 to 23. Step 4 begins at sample 32.
    (tmp_path / "r/excluded.json").write_text("[[24, 32]]")
    code, out, error = faulty(tmp_path, "{3: nan}", "training.stop_at=4")
    assert code == 0, error
    assert "on rank 1, micro-batch 0 (samples 18, 19)" in out
    assert [row["train/samples"] for row in metrics(tmp_path / "r")] == [8, 16, 32, 40]


@pytest.mark.slow
def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    code, _, error = faulty(tmp_path, "{3: nan}", "training.stop_at=5")
    assert code == 0, error
    trained(*QUICK, cwd=tmp_path)
    assert metrics(tmp_path / "r")[-1]["guard/skipped"] == 1


# The fault of a step happens once, and not again after a rollback.
ONCE = "type('Once', (dict,), {'get': dict.pop})({6: 1e6})"


def test_a_rollback_leaves_samples_out_and_replay_shows_them(tmp_path: Path) -> None:
    """Two steps per logged step: the spike of step 6 leaves out the samples of steps 5 and 6."""
    every_second = ["logging.interval=2", "training.validation_interval=0", "checkpoint.interval_steps=4"]
    back = ["guard.spike=rollback", "guard.spike_window=2"]
    code, out, error = faulty(tmp_path, ONCE, *back, *every_second)
    assert code == 0, error
    assert "rollback step 6: the gradient norm is" in out
    assert "back to step-00000004, without the samples since the last logged step" in out
    assert json.loads((tmp_path / "r/excluded.json").read_text()) == [[32, 48]]
    assert [row["train/samples"] for row in metrics(tmp_path / "r")] == [16, 32, 64, 80]
    shown = launcher("replay", "run.dir=r", "step=6", "samples=8", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    samples = re.findall(r"^ +(\d+) +\d+\.\d{4}  ", shown.stdout, re.MULTILINE)
    assert sorted(map(int, samples)) == list(range(40, 48))


def test_the_last_step_is_saved_if_there_is_no_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    code, out, error = faulty(tmp_path, "{8: 1e6}", "guard.spike=rollback", "guard.spike_window=4")
    assert code == 0, error
    assert re.search("warning  step 8: .*: there is no checkpoint before it to go back to", out)
    assert [path.name for path in checkpoints_in(tmp_path / "r")] == ["step-00000008"]


def test_replay_takes_the_samples_that_the_step_took_first(subtests: pytest.Subtests) -> None:
    """Steps 4 and 5 were taken three times: the samples of the first and of the second time are left out."""
    ranges = ((24, 40), (40, 56))
    at_2, at_3 = Progress(step=2, samples=16), Progress(step=3, samples=24)
    for progress, step, first in (
        (at_2, 3, 16), (at_2, 4, 24), (at_2, 5, 32), (at_2, 6, 72),
        (at_3, 4, 24), (at_3, 5, 32), (at_3, 6, 72),
    ):  # fmt: skip
        with subtests.test(step=step, begun=progress.step):
            assert as_first_taken(progress, ranges, step, 8).at_step(step - 1, 8).samples == first


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dull text, and noise in one place."""
    generator, folder = random.Random(1), tmp_path_factory.mktemp("text")
    lines = ["the quick brown fox jumps over the lazy dog. " * 4] * 400
    lines[200] = "".join(chr(generator.randrange(33, 126)) for _ in range(120))
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


SPIKING = [
    "data=text",
    "data.train=text.txt",
    "optimizer.lr=3e-3",
    "training.steps=200",
    "parallelism.data=2",
]
# The gradient norm of so small a model varies: at the default score, steps without noise spike too.
ROLLBACK = ["guard.spike=rollback", "guard.spike_score=16", "checkpoint.interval_steps=20"]
NUMBERS = ("step", "train/loss", "train/grad_norm", "train/samples")


def numbers(run_dir: Path) -> list[list[float]]:
    return [[row[name] for name in NUMBERS] for row in metrics(run_dir)]


@pytest.mark.slow
def test_a_rollback_leaves_the_samples_out_and_a_resume_does_the_same(text: Path) -> None:
    out = trained(*SPIKING, *ROLLBACK, "run.dir=rolled", cwd=text)
    first, *_ = re.findall(r"rollback step (\d+): ", out)
    back = re.search(r"back to step-0*(\d+), without the samples", out)
    assert back
    assert int(back[1]) < int(first)
    assert json.loads((text / "rolled/excluded.json").read_text())
    steps = [row["step"] for row in metrics(text / "rolled")]
    assert steps == list(range(1, 201))
    # As if killed on the way back, then resumed in another layout.
    shutil.copytree(text / "rolled", text / "killed")
    shutil.rmtree(text / "killed/weights")
    for path in checkpoints_in(text / "killed"):
        if read_manifest(path).step > int(back[1]):
            shutil.rmtree(path)
    trained(*SPIKING, *ROLLBACK, "run.dir=killed", "parallelism.data=1", cwd=text)
    for row, other in zip(numbers(text / "rolled"), numbers(text / "killed"), strict=True):
        assert row == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
def test_replay_finds_the_sample_in_any_layout(text: Path) -> None:
    out = trained(*SPIKING, "run.dir=warned", "checkpoint.interval_steps=50", cwd=text)
    spikes = [int(step) for step in re.findall(r"warning  step (\d+): the (?:loss|gradient norm) is", out)]
    losses = [row["train/loss"] for row in metrics(text / "warned")]
    # Early steps of a new model may spike without the sample.
    step = max(spikes, key=lambda step: losses[step - 1] - losses[step - 2])
    tops = set()
    shared = "parallelism=cp2 parallelism.data=2 parallelism.context_method=ulysses"
    for layout in ["parallelism=single", "parallelism=pp2", "parallelism=cp2", shared]:
        words = ["run.dir=warned", f"step={step}", *layout.split(), "samples=2"]
        shown = launcher("replay", *words, cwd=text)
        assert shown.returncode == 0, shown.stderr
        mean = re.search(r"loss +([\d.]+) over 8 samples", shown.stdout)
        assert mean
        assert float(mean[1]) == pytest.approx(losses[step - 1], abs=2e-4)
        top = shown.stdout.splitlines()[-2].split()
        assert "quick" not in shown.stdout.splitlines()[-2]
        tops.add(top[0])
    assert len(tops) == 1


def test_replay_refuses_a_step_that_the_run_has_not_taken(text: Path) -> None:
    """A run that was stopped at step 2 of 9, and whose last row is of step 2."""
    trained("run.dir=short", "training.steps=9", "training.stop_at=2", cwd=text)
    for step in (3, 99):
        done = launcher("replay", "run.dir=short", f"step={step}", cwd=text)
        assert done.returncode == 2
        assert f"step={step}: the run in short has taken no such step\n  try: step=2 " in done.stderr


def test_a_leap_is_judged_by_the_spread_before_it() -> None:
    detector = SpikeDetector(window=32, score=8.0, history={})
    calm = [2.0 + 0.01 * (-1) ** n for n in range(40)]
    assert not any(detector.spikes({"train/loss": loss, "train/grad_norm": 1.0}) for loss in calm)
    assert detector.spikes({"train/loss": 2.2, "train/grad_norm": 1.0}) == []
    [words] = detector.spikes({"train/loss": 2.4, "train/grad_norm": 1.0})
    assert words == "the loss is 2.4, the median of the 32 logged steps before is 2"
    assert detector.spikes({"train/loss": float("nan"), "train/grad_norm": 1.7}) == []
    resumed = SpikeDetector(window=32, score=8.0, history=detector.history)
    row = {"train/loss": 2.0, "train/grad_norm": 1.9}
    assert resumed.spikes(row) == detector.spikes(row) != []


def test_steps_that_were_skipped_are_no_spikes() -> None:
    """An fp16 loss scale that grows overflows now and then; neither value is remembered."""
    calm = {"train/loss": [2.0] * 32, "train/grad_norm": [1.0] * 32}
    detector = SpikeDetector(window=32, score=8.0, history=calm)
    for norm in (math.inf, math.nan, 1e30):
        assert detector.spikes({"train/loss": 2.0, "train/grad_norm": norm}) == []
    assert detector.spikes({"train/loss": math.inf, "train/grad_norm": math.nan}) == []
    assert detector.history == calm
