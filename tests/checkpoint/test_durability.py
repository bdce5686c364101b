"""Complete or absent: what a kill, a full disk or a damaged file leaves, and what the user is told."""

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
from launcher.checkpoint.boxes import Box
from launcher.checkpoint.manifest import (
    DIRECTORY,
    LATEST,
    MANIFEST,
    BrokenCheckpoint,
    checkpoints_in,
    damaged,
    read_manifest,
    step_name,
)
from launcher.checkpoint.read import Reader
from launcher.checkpoint.resume_choice import check_corpus_is, checkpoint_of
from launcher.commands.checkpoint import main as inspect
from launcher.config.errors import ConfigError
from launcher.config.schema import CheckpointConfig, RunConfig
from launcher.runtime.run_dir import config_as_dict
from tests.checkpoint.saving import EMPTY
from tests.config.composing import run_of

SHAPE = (6, 4)
FULL = torch.arange(24.0).view(SHAPE)


def begin(run_dir: Path, step: int) -> Path:
    partial = run_dir / DIRECTORY / f"{step_name(step)}.partial"
    partial.mkdir(parents=True)
    return partial


def write(run_dir: Path, step: int, run: RunConfig | None = None, loss: float | None = None) -> Path:
    """A checkpoint of one tensor, written by two ranks."""
    partial = begin(run_dir, step)
    for rank in range(2):
        box = Box((3 * rank, 0), (3, 4))
        part = write_files.Part("weight", "w", SHAPE, box, FULL[3 * rank : 3 * rank + 3].clone() + step)
        write_files.write_parts(partial, rank, [part], 10**9)
    config = config_as_dict(run or a_run())
    manifest = replace(
        EMPTY, step=step, samples=8 * step, config=config, validation_loss=loss, corpus={"": "c"}
    )
    return write_files.commit(partial, manifest, 2)


def a_run(*overrides: str) -> RunConfig:
    return run_of("training.steps=100", *overrides)


def content(path: Path) -> torch.Tensor:
    found = torch.full(SHAPE, -1.0)
    reader = Reader(path, read_manifest(path))
    reader.fill("weight", "w", Box((0, 0), SHAPE), found)
    return found


def refuse_unless_intact(path: Path) -> None:
    manifest = read_manifest(path)
    if bad := damaged(path, manifest, sorted(manifest.files)):
        raise BrokenCheckpoint(path, bad, "is damaged")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A run's directory with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        write(tmp_path, step)
    return tmp_path


class TestCompleteOrAbsent:
    def test_what_is_written_is_read(self, three: Path) -> None:
        assert [path.name for path in checkpoints_in(three)] == [step_name(step) for step in (30, 20, 10)]
        assert (three / DIRECTORY / LATEST).read_text() == "step-00000030\n"
        for path, step in zip(checkpoints_in(three), (30, 20, 10), strict=True):
            manifest = read_manifest(path)
            assert (manifest.step, manifest.samples) == (step, 8 * step)
            assert damaged(path, manifest, sorted(manifest.files)) is None
            assert torch.equal(content(path), FULL + step)

    def test_files_are_as_readable_as_other_new_files(self, three: Path) -> None:
        (three / "other").touch()
        modes = {path.stat().st_mode for path in (three / DIRECTORY / step_name(10)).iterdir()}
        assert modes == {(three / "other").stat().st_mode}

    def test_cut_short_at_any_call_it_leaves_the_one_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A kill between any two calls that change the disk."""

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

    def test_an_unusable_one_of_the_same_step_makes_room(self, three: Path) -> None:
        newest = checkpoints_in(three)[0]
        (newest / MANIFEST).write_text("{}")
        write(three, 30)
        assert torch.equal(content(newest), FULL + 30)

    def test_the_first_rank_does_not_wait_for_one_that_could_not_write(self, tmp_path: Path) -> None:
        import threading

        partial = begin(tmp_path, 10)
        ended = threading.Event()
        ended.set()
        assert not save._all_indexed(partial, 2, ended)


DAMAGE = {
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "is 127 bytes long and should be 128",
    ),
    "missing": (lambda file: file.unlink(), "is missing"),
}


class TestUnusable:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_a_damaged_file_is_named_with_the_newest_intact_step(self, kind: str, three: Path) -> None:
        newest, older, _ = checkpoints_in(three)
        damage, said = DAMAGE[kind]
        damage(newest / "00001-000.safetensors")
        with pytest.raises(ConfigError) as refused:
            checkpoint_of(a_run(), three)
        assert f"checkpoint.resume={newest}: 00001-000.safetensors {said}" in str(refused.value)
        assert f"checkpoint.fallback=true or checkpoint.resume={older}" in refused.value.remedy
        assert checkpoint_of(a_run("checkpoint.fallback=true"), three) == older
        assert checkpoint_of(a_run(f"checkpoint.resume={older}"), three) == older

    def test_a_flipped_bit_is_found_by_its_checksum(self, three: Path) -> None:
        newest = checkpoints_in(three)[0]
        file = newest / "00001-000.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        manifest = read_manifest(newest)
        assert damaged(newest, manifest, sorted(manifest.files)) == "00001-000.safetensors"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "is not one that the launcher wrote"),
            ("{", "is not one that the launcher wrote"),
            ("[]", "is not one that the launcher wrote"),
            ("{}", "is not one that the launcher wrote"),
            ('{"format": 1}', "is not one that the launcher wrote"),
            ('{"format": 2}', "is of a format other than 1"),
        ],
    )
    def test_a_foreign_manifest_is_refused(self, text: str, said: str, three: Path) -> None:
        newest = checkpoints_in(three)[0]
        (newest / MANIFEST).write_text(text)
        with pytest.raises(BrokenCheckpoint, match=said):
            read_manifest(newest)

    def test_two_hundred_random_corruptions_are_all_found(self, tmp_path: Path) -> None:
        chance = random.Random(0)
        found: Counter[str] = Counter()
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
                one, two = chance.sample(names, 2)
                (path / one).write_bytes(whole[two])
                (path / two).write_bytes(whole[one])
            elif kind == "deletion":
                (path / name).unlink()
            elif kind == "truncation":
                (path / name).write_bytes(whole[name][: chance.randrange(len(whole[name]) - 1)])
            else:
                data = bytearray(whole[name])
                data[chance.randrange(len(data) - 1)] ^= 1 << chance.randrange(8)
                (path / name).write_bytes(data)
            with pytest.raises(BrokenCheckpoint):
                refuse_unless_intact(path)
            found[kind] += 1
            for file, data in whole.items():
                (path / file).write_bytes(data)
        assert len(found) == 5
        assert min(found.values()) > 20
        assert torch.equal(content(path), FULL + 10)

    def test_pickles_are_not_read(self, three: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {three}/exploded",)

        newest = checkpoints_in(three)[0]
        for file in newest.iterdir():
            size = file.stat().st_size
            file.write_bytes(pickle.dumps(Bomb()).ljust(size, b"\0"))
        with pytest.raises(BrokenCheckpoint):
            read_manifest(newest)
        older = checkpoints_in(three)[1]
        file = older / "00000-000.safetensors"
        file.write_bytes(pickle.dumps(Bomb()).ljust(file.stat().st_size, b"\0"))
        with pytest.raises(BrokenCheckpoint, match="cannot be read"):
            content(older)
        assert not (three / "exploded").exists()

    def test_a_tensor_that_is_not_all_there_is_named(self, three: Path) -> None:
        newest = checkpoints_in(three)[0]
        reader = Reader(newest, read_manifest(newest))
        with pytest.raises(BrokenCheckpoint, match=r"has 0 of the 24 elements of exp_avg w at \(0, 0\)"):
            reader.fill("exp_avg", "w", Box((0, 0), SHAPE), torch.zeros(SHAPE))

    def test_without_an_intact_one_there_is_only_a_fresh_start(self, tmp_path: Path) -> None:
        newest = write(tmp_path, 10)
        (newest / MANIFEST).unlink()
        with pytest.raises(ConfigError) as refused:
            checkpoint_of(a_run("checkpoint.fallback=true"), tmp_path)
        assert refused.value.remedy == "checkpoint.resume=none (from the first step, in a fresh run.dir)"


class TestChoice:
    def test_of_an_empty_directory_auto_is_none(self, tmp_path: Path) -> None:
        assert checkpoint_of(a_run(), tmp_path) is None

    def test_none_is_none(self, three: Path) -> None:
        assert checkpoint_of(a_run("checkpoint.resume=none"), three) is None

    def test_of_weights_without_a_run_it_says_how_to_begin_with_them(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        with pytest.raises(ConfigError) as refused:
            checkpoint_of(a_run(f"checkpoint.resume={tmp_path}"), tmp_path)
        assert refused.value.remedy.startswith(f"checkpoint.init_from={tmp_path} checkpoint.resume=auto")

    def test_a_run_or_a_checkpoint_of_another_run(self, three: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        newest, older, _ = checkpoints_in(three)
        assert checkpoint_of(a_run(f"checkpoint.resume={three}"), elsewhere) == newest
        assert checkpoint_of(a_run(f"checkpoint.resume={older}"), elsewhere) == older
        with pytest.raises(ConfigError, match="neither a checkpoint nor a run's directory"):
            checkpoint_of(a_run(f"checkpoint.resume={elsewhere}"), three)

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("model.num_layers=3", "is of a run with model.num_layers=4"),
            ("training.seed=7", "is of a run with training.seed=1234"),
            ("optimizer=sgd", "is of a run with optimizer.name=adamw"),
            ("data.sequence_length=64", "is of a run with data.sequence_length=null"),
            ("training.steps=29", "is of step 30: nothing is left to train"),
        ],
    )
    def test_another_model_or_other_data_is_refused(self, override: str, said: str, three: Path) -> None:
        with pytest.raises(ConfigError) as refused:
            checkpoint_of(a_run(override), three)
        assert said in refused.value.why
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
    def test_all_else_may_change(self, override: str, three: Path) -> None:
        assert checkpoint_of(a_run(override), three) == checkpoints_in(three)[0]

    def test_other_text_is_refused(self, three: Path) -> None:
        newest = checkpoints_in(three)[0]
        check_corpus_is({"": "c"}, newest, read_manifest(newest))
        with pytest.raises(ConfigError, match="its digest is c, here it is d"):
            check_corpus_is({"": "d"}, newest, read_manifest(newest))

    def test_every_field_of_the_model_is_compared(self) -> None:
        assert "model.dropout" in resume_choice._FREE_OF_MODEL


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
    def test_keeps_the_last_each_nth_and_the_best(
        self, config: CheckpointConfig, kept: list[int], tmp_path: Path
    ) -> None:
        self.write_six(tmp_path)
        write_files.prune(tmp_path, config)
        assert self.kept(tmp_path) == kept

    def test_what_cannot_be_used_does_not_count(self, tmp_path: Path) -> None:
        self.write_six(tmp_path)
        (checkpoints_in(tmp_path)[0] / MANIFEST).unlink()
        write_files.prune(tmp_path, CheckpointConfig(keep_last=2, keep_best=False))
        assert [int(path.name[5:]) for path in checkpoints_in(tmp_path)] == [60, 50, 40]

    def test_cut_short_it_leaves_no_half_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write_six(tmp_path)

        def half(path: Path) -> None:
            next(path.glob("*.safetensors")).unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            write_files.prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=False))
        for path in checkpoints_in(tmp_path):
            assert content(path).numel() == 24


def test_files_are_of_a_bounded_size(tmp_path: Path) -> None:
    partial = begin(tmp_path, 1)
    parts = [write_files.Part("weight", f"w{n}", (10,), Box((0,), (10,)), torch.zeros(10)) for n in range(7)]
    write_files.write_parts(partial, 0, parts, max_bytes=100)
    names = sorted(path.name for path in partial.glob("*.safetensors"))
    assert names == [f"00000-00{n}.safetensors" for n in range(4)]
    index = json.loads((partial / "00000.json").read_text())
    assert [piece[1] for piece in index["pieces"]] == [f"w{n}" for n in range(7)]


def test_a_full_disk_is_an_error_of_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    partial = begin(tmp_path, 20)
    monkeypatch.setattr(tensor_file, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        write_files.write_parts(
            partial, 0, [write_files.Part("weight", "w", (1,), Box((0,), (1,)), torch.zeros(1))], 100
        )
    assert checkpoints_in(tmp_path) == []


class TestInspect:
    def test_lists_shows_and_checks(self, three: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert inspect(["ls", str(three)]) == 0
        listed = capsys.readouterr().out.splitlines()
        assert [line.split()[0][-8:] for line in listed] == ["00000010", "00000020", "00000030"]
        assert "240 samples" in listed[-1]
        assert inspect(["show", str(three)]) == 0
        shown = capsys.readouterr().out
        assert "step        30, 240 samples consumed" in shown
        assert "weight      1 tensors, 24 elements, fp32" in shown
        assert "on 1 rank" in shown
        assert inspect(["check", str(three)]) == 0
        assert capsys.readouterr().out.count("  intact, ") == 3

    def test_says_what_is_damaged(self, three: Path, capsys: pytest.CaptureFixture[str]) -> None:
        newest, older, _ = checkpoints_in(three)
        (newest / "00001-000.safetensors").unlink()
        file = older / "00000-000.safetensors"
        file.write_bytes(file.read_bytes()[::-1])
        assert inspect(["ls", str(three)]) == 1
        assert "00001-000.safetensors is missing" in capsys.readouterr().out
        assert inspect(["check", str(three)]) == 1
        assert "00000-000.safetensors is damaged" in capsys.readouterr().out
        assert inspect(["show", str(newest)]) == 1
        assert inspect(["check", str(older)]) == 1

    @pytest.mark.parametrize("arguments", [["sl", "x"], ["ls"], ["ls", "a", "b"]])
    def test_refuses_what_it_does_not_understand(self, arguments: list[str]) -> None:
        with pytest.raises(ConfigError, match=r"launcher checkpoint ls \| show \| check PATH"):
            inspect(arguments)

    def test_refuses_a_directory_without_any(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            inspect(["ls", str(tmp_path)])

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert inspect(["--help"]) == 0
        assert "launcher checkpoint check PATH" in capsys.readouterr().out
