"""Checkpoints under kills, full disks and damaged files: complete or absent, and refused with a remedy."""

import errno
import json
import os
import pickle
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.checkpoint import resume_choice, save, tensor_file
from launcher.checkpoint import write as write_files
from launcher.checkpoint.integrity import read_intact_manifest
from launcher.checkpoint.manifest import (
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    UnusableCheckpoint,
    checkpoints_in,
    read_manifest,
    step_name,
)
from launcher.checkpoint.read import CheckpointReader
from launcher.checkpoint.resume_choice import check_same_corpus, checkpoint_to_resume
from launcher.commands.checkpoint import main as inspect
from launcher.config.errors import ConfigError
from launcher.config.schema import CheckpointConfig, RunConfig
from launcher.parallel.boxes import Box
from launcher.runtime.run_dir import config_as_dict
from tests.checkpoint.saving import EMPTY
from tests.config.composing import run_of

SHAPE = (6, 4)
FULL = torch.arange(24.0).view(SHAPE)


def begin(run_dir: Path, step: int) -> Path:
    partial = run_dir / CHECKPOINTS / f"{step_name(step)}.partial"
    partial.mkdir(parents=True)
    return partial


def write(
    run_dir: Path, step: int, run: RunConfig | None = None, loss: float | None = None, bad: float = 0.0
) -> Path:
    """Write a checkpoint of one tensor with two ranks; `bad` is added to a value. Return its directory."""
    partial = begin(run_dir, step)
    for rank in range(2):
        box = Box((3 * rank, 0), (3, 4))
        values = FULL[3 * rank : 3 * rank + 3].clone() + step
        values[0, rank] += bad * rank  # on the second rank only
        piece = write_files.HostPiece("weight", "w", SHAPE, box, values)
        write_files.write_pieces(partial, rank, [piece], 10**9)
    config = config_as_dict(run or default_run())
    manifest = replace(
        EMPTY, step=step, samples=8 * step, config=config, validation_loss=loss, corpus={"": "c"}
    )
    return write_files.commit(partial, manifest, 2)


def default_run(*overrides: str) -> RunConfig:
    return run_of("training.steps=100", *overrides)


def content(path: Path) -> torch.Tensor:
    tensor = torch.full(SHAPE, -1.0)
    reader = CheckpointReader(path, read_manifest(path))
    reader.fill("weight", "w", Box((0, 0), SHAPE), tensor)
    return tensor


@pytest.fixture
def three_checkpoints(tmp_path: Path) -> Path:
    """Return a run's directory with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        write(tmp_path, step)
    return tmp_path


class TestCompleteOrAbsent:
    def test_a_written_checkpoint_is_read_back(self, three_checkpoints: Path) -> None:
        assert [path.name for path in checkpoints_in(three_checkpoints)] == [
            step_name(step) for step in (30, 20, 10)
        ]
        assert (three_checkpoints / CHECKPOINTS / LATEST).read_text() == "step-00000030\n"
        for path, step in zip(checkpoints_in(three_checkpoints), (30, 20, 10), strict=True):
            manifest = read_intact_manifest(path)
            assert (manifest.step, manifest.samples) == (step, 8 * step)
            assert torch.equal(content(path), FULL + step)

    def test_files_have_the_permissions_of_other_new_files(self, three_checkpoints: Path) -> None:
        (three_checkpoints / "other").touch()
        modes = {path.stat().st_mode for path in (three_checkpoints / CHECKPOINTS / step_name(10)).iterdir()}
        assert modes == {(three_checkpoints / "other").stat().st_mode}

    def test_a_save_killed_at_any_call_leaves_the_previous_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Kill the save before each call that changes the disk."""

        class Killed(BaseException):
            pass

        calls = {"left": 10**9, "made": 0}

        def counted(module: object, name: str) -> None:
            original = getattr(module, name)

            def call(*arguments: object, **options: object) -> object:
                if calls["left"] == 0:
                    raise Killed
                calls["left"] -= 1
                calls["made"] += 1
                return original(*arguments, **options)

            monkeypatch.setattr(module, name, call)

        for module, name in (
            (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "touch"),
            (Path, "chmod"), (os, "fsync"), (tensor_file, "save_file"),
        ):  # fmt: skip
            counted(module, name)
        write(tmp_path / "try", 10)
        calls["made"] = 0
        write(tmp_path / "try", 20)
        total = calls["made"]
        assert total > 15
        for survived in range(total):
            run_dir = tmp_path / str(survived)
            calls["left"] = 10**9
            write(run_dir, 10)
            calls["left"] = survived
            with pytest.raises(Killed):
                write(run_dir, 20)
            newest = checkpoints_in(run_dir)[0]
            step = read_manifest(newest).step
            assert torch.equal(content(newest), FULL + step)
            assert step == 10 or survived > total // 2

    def test_an_unusable_checkpoint_of_the_same_step_is_replaced(self, three_checkpoints: Path) -> None:
        newest = checkpoints_in(three_checkpoints)[0]
        (newest / MANIFEST).write_text("{}")
        write(three_checkpoints, 30)
        assert torch.equal(content(newest), FULL + 30)

    def test_rank_0_does_not_wait_for_a_rank_that_could_not_write(self, tmp_path: Path) -> None:
        import threading

        partial = begin(tmp_path, 10)
        ended = threading.Event()
        ended.set()
        assert not save._all_indices_written(partial, 2, ended)


DAMAGE = {
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "is 127 bytes long instead of 128",
    ),
    "missing": (lambda file: file.unlink(), "is missing"),
}


class TestUnusable:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_a_missing_or_short_file_is_named_and_an_older_checkpoint_suggested(
        self, kind: str, three_checkpoints: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        newest, older, _ = checkpoints_in(three_checkpoints)
        damage, message = DAMAGE[kind]
        damage(newest / "00001-000.safetensors")
        with pytest.raises(ConfigError) as refused:
            checkpoint_to_resume(default_run(), three_checkpoints)
        assert f"checkpoint.resume={newest}: 00001-000.safetensors {message}" in str(refused.value)
        assert f"checkpoint.fallback=true or checkpoint.resume={older}" in refused.value.remedy
        assert f"{older} (in a fresh run.dir)" in refused.value.remedy
        assert checkpoint_to_resume(default_run("checkpoint.fallback=true"), three_checkpoints) == older
        note = capsys.readouterr().out
        assert note.startswith(f"note     {newest} cannot be used: 00001-000.safetensors {message}")
        assert note.endswith(f"trying {older.name} instead\n")
        assert checkpoint_to_resume(default_run(f"checkpoint.resume={older}"), three_checkpoints) == older

    def test_a_flipped_bit_is_detected_by_the_checksum(self, three_checkpoints: Path) -> None:
        newest = checkpoints_in(three_checkpoints)[0]
        file = newest / "00001-000.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        read_manifest(newest)
        with pytest.raises(UnusableCheckpoint, match=r"00001-000\.safetensors is damaged: its SHA-256"):
            read_intact_manifest(newest)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "cannot be read: it is damaged or was written by another program"),
            ("{", "cannot be read: it is damaged or was written by another program"),
            ("[]", "cannot be read: it is damaged or was written by another program"),
            ("{}", "cannot be read: it is damaged or was written by another program"),
            ('{"format": 2}', "cannot be read: it is damaged or was written by another program"),
            ('{"format": 1}', "has format 1; this launcher reads format 2"),
        ],
    )
    def test_a_foreign_manifest_is_refused(self, text: str, message: str, three_checkpoints: Path) -> None:
        newest = checkpoints_in(three_checkpoints)[0]
        (newest / MANIFEST).write_text(text)
        with pytest.raises(UnusableCheckpoint, match=message):
            read_manifest(newest)

    def test_two_hundred_random_corruptions_are_all_detected(self, tmp_path: Path) -> None:
        chance = random.Random(0)
        detected: Counter[str] = Counter()
        path = write(tmp_path, 10)
        whole = {file.name: file.read_bytes() for file in path.iterdir()}
        names = sorted(whole)
        for _ in range(200):
            kind = chance.choice(["bit flip", "truncation", "deletion", "swapped files", "altered manifest"])
            name = chance.choice(names)
            if kind == "altered manifest":
                text = whole[MANIFEST].decode()
                digits = [place for place, letter in enumerate(text) if letter.isdigit()]
                place = chance.choice(digits)
                other = chance.choice([d for d in "0123456789" if d != text[place]])
                (path / MANIFEST).write_text(text[:place] + other + text[place + 1 :])
            elif kind == "swapped files":
                first, second = chance.sample(names, 2)
                (path / first).write_bytes(whole[second])
                (path / second).write_bytes(whole[first])
            elif kind == "deletion":
                (path / name).unlink()
            elif kind == "truncation":
                (path / name).write_bytes(whole[name][: chance.randrange(len(whole[name]) - 1)])
            else:
                data = bytearray(whole[name])
                data[chance.randrange(len(data) - 1)] ^= 1 << chance.randrange(8)
                (path / name).write_bytes(data)
            with pytest.raises(UnusableCheckpoint):
                read_intact_manifest(path)
            detected[kind] += 1
            for file, data in whole.items():
                (path / file).write_bytes(data)
        assert len(detected) == 5
        assert min(detected.values()) > 20
        assert torch.equal(content(path), FULL + 10)

    def test_pickles_are_never_loaded(self, three_checkpoints: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {three_checkpoints}/exploded",)

        newest = checkpoints_in(three_checkpoints)[0]
        for file in newest.iterdir():
            size = file.stat().st_size
            file.write_bytes(pickle.dumps(Bomb()).ljust(size, b"\0"))
        with pytest.raises(UnusableCheckpoint):
            read_manifest(newest)
        older = checkpoints_in(three_checkpoints)[1]
        file = older / "00000-000.safetensors"
        file.write_bytes(pickle.dumps(Bomb()).ljust(file.stat().st_size, b"\0"))
        with pytest.raises(UnusableCheckpoint, match="cannot be read"):
            content(older)
        assert not (three_checkpoints / "exploded").exists()

    def test_an_incomplete_tensor_is_named(self, three_checkpoints: Path) -> None:
        newest = checkpoints_in(three_checkpoints)[0]
        reader = CheckpointReader(newest, read_manifest(newest))
        with pytest.raises(
            UnusableCheckpoint, match=r"has only 0 of the 24 elements of exp_avg w at \(0, 0\)"
        ):
            reader.fill("exp_avg", "w", Box((0, 0), SHAPE), torch.zeros(SHAPE))

    def test_without_a_usable_checkpoint_the_remedy_is_a_fresh_start(self, tmp_path: Path) -> None:
        newest = write(tmp_path, 10)
        (newest / MANIFEST).unlink()
        with pytest.raises(ConfigError) as refused:
            checkpoint_to_resume(default_run("checkpoint.fallback=true"), tmp_path)
        assert refused.value.remedy == "checkpoint.resume=none (from the first step, in a fresh run.dir)"


class TestChoice:
    def test_auto_starts_at_step_0_in_an_empty_directory(self, tmp_path: Path) -> None:
        assert checkpoint_to_resume(default_run(), tmp_path) is None

    def test_none_starts_at_step_0(self, three_checkpoints: Path) -> None:
        assert checkpoint_to_resume(default_run("checkpoint.resume=none"), three_checkpoints) is None

    def test_resume_from_a_hugging_face_directory_suggests_init_from(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        with pytest.raises(ConfigError) as refused:
            checkpoint_to_resume(default_run(f"checkpoint.resume={tmp_path}"), tmp_path)
        assert refused.value.remedy.startswith(f"checkpoint.init_from={tmp_path} checkpoint.resume=auto")

    def test_resume_accepts_another_run_or_its_checkpoint(
        self, three_checkpoints: Path, tmp_path: Path
    ) -> None:
        elsewhere = tmp_path / "elsewhere"
        newest, older, _ = checkpoints_in(three_checkpoints)
        assert (
            checkpoint_to_resume(default_run(f"checkpoint.resume={three_checkpoints}"), elsewhere) == newest
        )
        assert checkpoint_to_resume(default_run(f"checkpoint.resume={older}"), elsewhere) == older
        with pytest.raises(ConfigError, match="no checkpoint was found in"):
            checkpoint_to_resume(default_run(f"checkpoint.resume={elsewhere}"), three_checkpoints)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("model.num_layers=3", "has model.num_layers=4, which cannot change on resume"),
            ("training.seed=7", "has training.seed=1234"),
            ("optimizer=sgd", "has optimizer.name=adamw"),
            ("data.sequence_length=64", "has data.sequence_length=null"),
            ("training.steps=29", "is already at step 30: no step is left to train"),
        ],
    )
    def test_a_changed_model_or_changed_data_is_refused(
        self, override: str, message: str, three_checkpoints: Path
    ) -> None:
        with pytest.raises(ConfigError) as refused:
            checkpoint_to_resume(default_run(override), three_checkpoints)
        assert message in refused.value.why
        assert refused.value.field == {"optimizer=sgd": "optimizer.name"}.get(
            override, override.split("=")[0]
        )

    @pytest.mark.parametrize(
        "override",
        [
            "parallelism=zero3",
            "training.global_batch_size=32",
            "precision=bf16",
            "optimizer.lr=1",
            "model.dropout=0.5",
        ],
    )
    def test_every_other_field_may_change(self, override: str, three_checkpoints: Path) -> None:
        assert (
            checkpoint_to_resume(default_run(override), three_checkpoints)
            == checkpoints_in(three_checkpoints)[0]
        )

    def test_changed_training_data_is_refused(self, three_checkpoints: Path) -> None:
        newest = checkpoints_in(three_checkpoints)[0]
        check_same_corpus({"": "c"}, newest, read_manifest(newest))
        with pytest.raises(ConfigError, match="its digest was c and is now d"):
            check_same_corpus({"": "d"}, newest, read_manifest(newest))

    def test_dropout_is_the_only_model_field_that_may_change(self) -> None:
        assert resume_choice._MAY_CHANGE_IN_MODEL == ("model.dropout",)


class TestPrune:
    def kept(self, run_dir: Path) -> list[int]:
        return sorted(read_manifest(path).step for path in checkpoints_in(run_dir))

    def write_six(self, run_dir: Path) -> None:
        for step, loss in zip(range(10, 70, 10), (5.0, 2.0, None, 4.0, 3.0, 3.5), strict=True):
            write(run_dir, step, loss=loss)

    @pytest.mark.parametrize(
        ("config", "kept"),
        [
            (CheckpointConfig(keep_last=2, keep_best=False), [50, 60]),
            (CheckpointConfig(keep_last=1, keep_best=True), [20, 60]),
            (CheckpointConfig(keep_last=1, keep_best=False, keep_every_steps=30), [30, 60]),
            (CheckpointConfig(keep_last=3, keep_best=True, keep_every_steps=40), [20, 40, 50, 60]),
            (CheckpointConfig(keep_last=9), [10, 20, 30, 40, 50, 60]),
        ],
    )
    def test_keeps_the_last_every_nth_and_the_best(
        self, config: CheckpointConfig, kept: list[int], tmp_path: Path
    ) -> None:
        self.write_six(tmp_path)
        write_files.prune(tmp_path, config, 60)
        assert self.kept(tmp_path) == kept

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_checkpoint_with_values_that_are_not_finite_displaces_no_finite_one(
        self, bad: float, tmp_path: Path
    ) -> None:
        for step in (10, 20, 30):
            write(tmp_path, step, loss=float(step))
        for step in (40, 50, 60):
            write(tmp_path, step, loss=bad if step == 40 else 1.0, bad=bad)
        assert [read_manifest(path).finite for path in checkpoints_in(tmp_path)] == [False] * 3 + [True] * 3
        write_files.prune(tmp_path, CheckpointConfig(keep_last=2, keep_best=True), 60)
        assert self.kept(tmp_path) == [10, 20, 30, 50, 60]

    def test_a_validation_loss_that_is_not_finite_is_never_the_best(self, tmp_path: Path) -> None:
        for step, loss in ((10, 3.0), (20, -float("inf")), (30, float("nan")), (40, 4.0)):
            write(tmp_path, step, loss=loss)
        write_files.prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=True), 40)
        assert self.kept(tmp_path) == [10, 40]

    def test_later_checkpoints_are_neither_counted_nor_deleted(self, tmp_path: Path) -> None:
        """As after checkpoint.fallback: those of steps 30 and 40 are damaged, and 25 was written last."""
        for step, loss in ((10, None), (20, 3.0), (25, None), (30, 1.0), (40, None)):
            write(tmp_path, step, loss=loss)
        write_files.prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=True), 25)
        assert self.kept(tmp_path) == [20, 25, 30, 40]

    def test_an_incomplete_checkpoint_is_not_counted(self, tmp_path: Path) -> None:
        self.write_six(tmp_path)
        (checkpoints_in(tmp_path)[0] / MANIFEST).unlink()
        write_files.prune(tmp_path, CheckpointConfig(keep_last=2, keep_best=False), 60)
        assert [int(path.name[5:]) for path in checkpoints_in(tmp_path)] == [60, 50, 40]

    def test_a_kill_while_pruning_leaves_no_partly_deleted_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write_six(tmp_path)

        def delete_one_file_then_stop(path: Path) -> None:
            next(path.glob("*.safetensors")).unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", delete_one_file_then_stop)
        with pytest.raises(KeyboardInterrupt):
            write_files.prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=False), 60)
        for path in checkpoints_in(tmp_path):
            assert content(path).numel() == 24


def test_file_size_is_bounded(tmp_path: Path) -> None:
    partial = begin(tmp_path, 1)
    pieces = [
        write_files.HostPiece("weight", f"w{n}", (10,), Box((0,), (10,)), torch.zeros(10)) for n in range(7)
    ]
    write_files.write_pieces(partial, 0, pieces, max_bytes=100)
    names = sorted(path.name for path in partial.glob("*.safetensors"))
    assert names == [f"00000-00{n}.safetensors" for n in range(4)]
    index = json.loads((partial / "00000.json").read_text())
    assert [piece[1] for piece in index["pieces"]] == [f"w{n}" for n in range(7)]


def test_a_stray_entry_does_not_stop_a_save(
    three_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each name that a save writes may be taken by something else, which is renamed and not deleted."""
    run_dir = three_checkpoints
    folder = run_dir / CHECKPOINTS
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    (folder / "latest.tmp").mkdir()
    (folder / step_name(40)).write_text("mine")
    (folder / "step-00000099").symlink_to(tmp_path_factory.mktemp("x"))
    (folder / "notes.partial").write_text("mine")
    (folder / "elsewhere").mkdir()
    write(run_dir, 40)
    assert torch.equal(content(folder / step_name(40)), FULL + 40)
    assert (folder / "latest").read_text() == "step-00000040\n"
    assert (folder / "step-00000040-1.stray").read_text() == "mine"
    assert (folder / "notes.partial").read_text() == "mine"
    assert [path.name for path in checkpoints_in(run_dir)][1:4] == [step_name(n) for n in (40, 30, 20)]


def test_a_full_disk_raises_os_error_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    partial = begin(tmp_path, 20)
    monkeypatch.setattr(tensor_file, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        write_files.write_pieces(
            partial, 0, [write_files.HostPiece("weight", "w", (1,), Box((0,), (1,)), torch.zeros(1))], 100
        )
    assert checkpoints_in(tmp_path) == []


class TestInspect:
    def test_lists_shows_and_checks(
        self, three_checkpoints: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert inspect(["ls", str(three_checkpoints)]) == 0
        listed = capsys.readouterr().out.splitlines()
        assert [line.split()[0][-8:] for line in listed] == ["00000010", "00000020", "00000030"]
        assert "240 samples" in listed[-1]
        assert inspect(["show", str(three_checkpoints)]) == 0
        shown = capsys.readouterr().out
        assert "step        30, 240 samples consumed" in shown
        assert "weight      1 tensors, 24 elements, fp32" in shown
        assert "on 1 rank" in shown
        assert inspect(["check", str(three_checkpoints)]) == 0
        assert capsys.readouterr().out.count("  intact, ") == 3

    def test_names_the_damaged_file(
        self, three_checkpoints: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        newest, older, _ = checkpoints_in(three_checkpoints)
        (newest / "00001-000.safetensors").unlink()
        file = older / "00000-000.safetensors"
        file.write_bytes(file.read_bytes()[::-1])
        assert inspect(["ls", str(three_checkpoints)]) == 1
        assert "00001-000.safetensors is missing" in capsys.readouterr().out
        assert inspect(["check", str(three_checkpoints)]) == 1
        assert "00000-000.safetensors is damaged" in capsys.readouterr().out
        assert inspect(["show", str(newest)]) == 1
        assert inspect(["check", str(older)]) == 1

    @pytest.mark.parametrize("arguments", [["sl", "x"], ["ls"], ["ls", "a", "b"]])
    def test_refuses_wrong_arguments(self, arguments: list[str]) -> None:
        with pytest.raises(ConfigError, match=r"launcher checkpoint (ls|show|check) runs/NAME"):
            inspect(arguments)

    def test_refuses_a_directory_without_checkpoints(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="contains no checkpoint"):
            inspect(["ls", str(tmp_path)])

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert inspect(["--help"]) == 0
        assert "launcher checkpoint check PATH" in capsys.readouterr().out
