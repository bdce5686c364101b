"""Seeded corruptions of a checkpoint and of final weights are refused by name, or are harmless."""

import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher.checkpoint.final import FinalWeights, read_final_weights, stage_file
from launcher.checkpoint.integrity import check_files, read_intact_manifest, sha256_of
from launcher.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    Manifest,
    Piece,
    StoredFile,
    StoredTensor,
    UnusableCheckpoint,
    step_name,
)
from launcher.checkpoint.resume_choice import checkpoint_to_resume
from launcher.commands.checkpoint import main as inspect
from launcher.config.errors import ConfigError
from launcher.runtime.run_dir import config_as_dict
from tests.checkpoint.corruptions import CORRUPTIONS, HARMLESS, corrupt
from tests.config.composing import run_of

COUNT = 250
RUN, FALLBACK = run_of("training.steps=100"), run_of("training.steps=100", "checkpoint.fallback=true")


FULL = np.arange(24, dtype=np.float32).reshape(6, 4)


def write(run_dir: Path, step: int) -> Manifest:
    """Write a checkpoint of two tensors in two files; return its manifest."""
    folder = run_dir / CHECKPOINTS / step_name(step)
    folder.mkdir(parents=True)
    files, pieces = {}, {"w": [], "b": []}
    for rank in range(2):
        path = folder / f"{rank:05d}-000.safetensors"
        rows, bias = FULL[3 * rank : 3 * rank + 3], FULL[0, 2 * rank : 2 * rank + 2]
        save_file({f"weight/w/{3 * rank}_0": rows, f"weight/b/{2 * rank}": bias}, path)
        files[path.name] = StoredFile(path.stat().st_size, sha256_of(path))
        pieces["w"].append(Piece(path.name, (3 * rank, 0), (3, 4)))
        pieces["b"].append(Piece(path.name, (2 * rank,), (2,)))
    tensors = {"w": StoredTensor((6, 4), tuple(pieces["w"])), "b": StoredTensor((4,), tuple(pieces["b"]))}
    manifest = Manifest(
        step=step, samples=8 * step, updates=step, scaler={"cur_scale": 2.0}, corpus={"": "c"}, launcher="0",
        layout="1 rank", config=config_as_dict(RUN), validation_loss=2.0, tensors={"weight": tensors},
        files=files, blends=[{"start": 0, "weights": {"": 1.0}}],
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run's directory with checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("intact")
    for step in (10, 20):
        manifest = write(folder, step)
        assert read_intact_manifest(folder / CHECKPOINTS / step_name(step)) == manifest
    return folder


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Check that the block takes less than 5 s of a processor and 1 GB more memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < 5, what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, what


def test_every_corruption_of_a_checkpoint_is_refused_or_harmless(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter()
    for seed in range(COUNT):
        run_dir = shutil.copytree(intact, tmp_path / str(seed))
        checkpoint = run_dir / CHECKPOINTS / step_name(20)
        what = f"seed {seed}, {corrupt(checkpoint, random.Random(seed))}"
        family = what.partition(", ")[2].partition(":")[0]
        counts[family] += 1
        with bounded(what):
            refused = is_refused(checkpoint)
            assert refused != (family in HARMLESS), what
            code = inspect(["check", str(run_dir)])
            assert (code != 0) == refused, what
            inspect(["ls", str(run_dir)])
            inspect(["show", str(run_dir)])
            resumed_from_one_of(run_dir, what)
        output = capsys.readouterr().out
        assert "Traceback" not in output
        assert output.isprintable() or all(line.isprintable() for line in output.splitlines()), what
        shutil.rmtree(run_dir)
    assert counts.keys() == CORRUPTIONS.keys()


def is_refused(checkpoint: Path) -> bool:
    try:
        read_intact_manifest(checkpoint)
    except UnusableCheckpoint:
        return True
    return False


def resumed_from_one_of(run_dir: Path, what: str) -> None:
    """Choose a checkpoint as `launcher` does, with and without fallback."""
    newest, older = (run_dir / CHECKPOINTS / step_name(step) for step in (20, 10))
    try:
        chosen = checkpoint_to_resume(RUN, run_dir)
    except ConfigError as error:
        message = str(error)
    else:
        message = str(chosen)  # damage that only a checksum shows is found later, in the ranks
        assert chosen == newest, what
    assert str(newest) in message, what
    assert checkpoint_to_resume(FALLBACK, run_dir) in (newest, older), what


@pytest.fixture
def final_weights(tmp_path: Path) -> Path:
    """Return a run's directory with final weights of two stages."""
    files, shapes = {}, {}
    for stage in range(2):
        path = stage_file(tmp_path / "r", stage, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"w{stage}": FULL + stage, f"b{stage}": FULL[0]}, path)
        files[path.name] = StoredFile(path.stat().st_size, sha256_of(path))
        shapes[path.name] = {f"w{stage}": (6, 4), f"b{stage}": (4,)}
    (path.parent / MANIFEST).write_text(FinalWeights(7, "0", {"a": 1}, files, shapes).to_json())
    return tmp_path / "r"


def test_every_corruption_of_final_weights_is_refused_or_harmless(
    final_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(run_dir: Path) -> None:
        weights = read_final_weights(run_dir)
        assert weights.step == 7
        check_files(weights.stored(run_dir), sorted(weights.files))

    check(final_weights)
    assert inspect(["check", str(final_weights)]) == 0
    assert "weights  intact, of step 7" in capsys.readouterr().out
    for seed in range(COUNT):
        run_dir = shutil.copytree(final_weights, tmp_path / str(seed))
        what = f"seed {seed}, {corrupt(run_dir / 'weights', random.Random(seed))}"
        family = what.partition(", ")[2].partition(":")[0]
        with bounded(what):
            try:
                check(run_dir)
                refused = False
            except UnusableCheckpoint:
                refused = True
            assert refused != (family in HARMLESS), what
            assert inspect(["check", str(run_dir)]) == int(refused), what
        shutil.rmtree(run_dir)
