"""Images and their classes: reading, splitting, and the checks before ranks start."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig
from launcher.data.images import DIGITS, ImageFiles
from launcher.data.open import ONLY, check_data, open_data
from launcher.data.sampler import Samples
from tests.config.composing import run_of


def digits(*overrides: str) -> RunConfig:
    return run_of("model=vit_tiny", "data=digits", *overrides)


def all_of(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    taken = samples.take(np.arange(len(samples)))
    assert isinstance(taken, tuple)
    return taken


class TestDigits:
    def test_equal_scikit_learn_s_and_each_is_in_one_part(self) -> None:
        from sklearn.datasets import load_digits

        data = open_data(digits("data.test_fraction=0.1"))
        parts = [all_of(part[ONLY]) for part in (data.train, data.validation, data.test)]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        assert images.shape == (DIGITS, 1, 8, 8)
        dataset: Any = load_digits()
        # The values 0 to 16 stay distinct when they are scaled to 0 to 255.
        counts = Counter(
            (np.rint(i * (16 / 255)).astype(int).tobytes(), int(n))
            for i, n in zip(images, labels[:, 0], strict=True)
        )
        assert counts == Counter(
            (i.astype(int).tobytes(), int(n))
            for i, n in zip(dataset.images[:, None], dataset.target, strict=True)
        )
        shares = [len(part) / DIGITS for part, _ in parts]
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)

    def test_the_parts_do_not_depend_on_the_seed(self) -> None:
        first, second = (open_data(digits(f"training.seed={seed}")) for seed in (1, 2))
        assert first.digests == second.digests
        for a, b in zip(all_of(first.validation[ONLY]), all_of(second.validation[ONLY]), strict=True):
            assert (a == b).all()
        assert (all_of(first.train[ONLY])[0] != all_of(second.train[ONLY])[0]).any()

    def test_other_parts_have_another_digest(self) -> None:
        assert open_data(digits()).digests != open_data(digits("data.validation_fraction=0.3")).digests

    def test_are_checked_without_being_read(self) -> None:
        check_data(digits())
        with pytest.raises(ConfigError, match="the validation part has none of the 1797 images"):
            check_data(digits("data.validation_fraction=0.00001"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 20 single-colour images, with various sizes, modes and endings."""
    for label, name in enumerate(("ant", "bee", "cow")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(20):
            size = (30 + number, 50 - number)
            mode, ending = (("RGB", "png"), ("L", "jpg"), ("RGBA", "PNG"), ("P", "gif"))[number % 4]
            image = Image.new("RGB", size, (51 * label, 51 * label, 51 * label)).convert(mode)
            image.save(tmp_path / "in" / name / f"{number}.{ending}")
        (tmp_path / "in" / name / "notes.txt").write_text("not an image")
    (tmp_path / "in" / ".hidden").mkdir()
    return tmp_path / "in"


def run_on(folder: Path, *overrides: str, channels: int = 3) -> RunConfig:
    return run_of(
        "model=vit_b16", "data=image_folder", f"data.train={folder}", "model.image_size=32",
        "model.patch_size=8", f"model.image_channels={channels}", "model.num_classes=3",
        "data.validation_fraction=0.2", *overrides,
    )  # fmt: skip


class TestFolder:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_reads_every_mode_and_format(self, channels: int, folder: Path) -> None:
        data = open_data(run_on(folder, channels=channels))
        check_data(run_on(folder, channels=channels))
        total = 0
        for part in (data.train, data.validation):
            images, labels = all_of(part[ONLY])
            assert images.shape[1:] == (channels, 32, 32)
            assert images.dtype == np.uint8
            assert np.abs(images.astype(int) - 51 * labels[:, :, None, None]).max() <= 2
            total += len(images)
        assert total == 60

    def test_images_are_scaled_to_the_shorter_side_and_cropped_at_the_centre(self, tmp_path: Path) -> None:
        pixels = np.zeros((20, 60), np.uint8)
        pixels[:, 20:40] = 200
        Image.fromarray(pixels).save(tmp_path / "wide.png")
        from launcher.data.images import ImageFile

        file = ImageFile("wide.png", tmp_path / "wide.png", 0)
        images, _ = ImageFiles([file], 20, 1, "data.train").read(np.array([0]))
        assert (images == 200).mean() > 0.99

    def test_an_added_file_moves_no_other_file(self, folder: Path) -> None:
        def names(part: dict[str, Samples]) -> set[str]:
            items = part[ONLY].items
            assert isinstance(items, ImageFiles)
            return {file.name for file in items.files}

        before = open_data(run_on(folder))
        Image.new("RGB", (32, 32)).save(folder / "ant" / "new.png")
        after = open_data(run_on(folder))
        assert names(before.train) <= names(after.train)
        assert names(before.validation) <= names(after.validation)
        assert (before.digests != after.digests) == ("ant/new.png" in names(after.train))

    def test_a_separate_validation_directory(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "held" / "cow").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "held" / "cow" / "1.png")
        data = open_data(run_on(folder, f"data.validation={tmp_path / 'held'}"))
        assert len(data.train[ONLY]) == 60
        assert all_of(data.validation[ONLY])[1].tolist() == [[2]]

    def test_copies_and_files_by_two_names_are_left_out_and_counted(self, folder: Path) -> None:
        (folder / "ant" / "._0.png").write_bytes(b"\0\5\x16\7")
        (folder / "ant" / ".ipynb_checkpoints").mkdir()
        shutil.copy(folder / "ant" / "0.png", folder / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png")
        (folder / "ant" / "again.png").symlink_to("0.png")
        (folder / "bee" / "0.png~").touch()
        (folder.parent / "more").mkdir()
        Image.new("RGB", (32, 32)).save(folder.parent / "more" / "new.png")
        (folder / "cow" / "linked").symlink_to(folder.parent / "more")
        run = run_on(folder)
        left_out = {reason: count for reason, count in check_data(run).items() if count}
        assert left_out == {
            "hidden": 2, "not images": 3, "the same file by another name": 1, "backup copies": 1,
        }  # fmt: skip
        data = open_data(run)
        assert len(data.train[ONLY]) + len(data.validation[ONLY]) == 61  # a link to a directory is followed


class TestRefused:
    def refused(self, run: RunConfig) -> ConfigError:
        with pytest.raises(ConfigError) as raised:
            check_data(run)
        assert raised.value.remedy
        return raised.value

    def test_a_missing_directory(self, tmp_path: Path) -> None:
        error = self.refused(run_on(tmp_path / "none"))
        assert (error.field, error.why) == ("data.train", "this directory does not exist")

    def test_a_directory_without_classes_or_images(self, tmp_path: Path) -> None:
        assert "each class needs one" in self.refused(run_on(tmp_path)).why
        (tmp_path / "ant").mkdir()
        assert "contain no image files" in self.refused(run_on(tmp_path)).why

    def test_more_classes_than_the_model(self, folder: Path) -> None:
        error = self.refused(run_on(folder, "model.num_classes=2"))
        assert (error.field, error.remedy) == ("model.num_classes", "model.num_classes=3 (or more)")

    @pytest.mark.parametrize("part", ["validation", "test"])
    def test_the_training_directory_as_another_part(self, part: str, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(folder)
        error = self.refused(run_on(folder, f"data.{part}={tmp_path / 'link'}"))
        assert (error.field, error.why) == (f"data.{part}", "this is the directory of the training images")
        mended = error.remedy.split(" (")[0].split()
        assert mended == [f"data.{part}=null", f"data.{part}_fraction=0.1"]
        check_data(run_on(folder, *mended))

    def test_a_validation_class_that_is_not_a_training_class(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "held" / "dog").mkdir(parents=True)
        error = self.refused(run_on(folder, f"data.validation={tmp_path / 'held'}"))
        assert error.field == "data.validation"
        assert error.why == "this directory has a class 'dog', which data.train does not have"

    @pytest.mark.parametrize("content", [b"", b"not an image"])
    def test_a_file_that_is_not_an_image(self, content: bytes, folder: Path) -> None:
        for number in range(0, 20, 4):
            (folder / "bee" / f"{number}.png").write_bytes(content)
        error = self.refused(run_on(folder))
        assert "bee" in str(error.value)
        assert error.why == "this image cannot be decoded: cannot identify image file"

    def test_a_truncated_image_is_refused_when_it_is_decoded(self, folder: Path) -> None:
        path = folder / "bee" / "0.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:5000])
        run = run_on(folder)
        check_data(run)
        data = open_data(run)
        items = [part[ONLY].items for part in (data.train, data.validation)]
        files = [item for item in items if isinstance(item, ImageFiles)]
        [(part, place)] = [
            (part, n) for part in files for n, file in enumerate(part.files) if file.path == path
        ]
        with pytest.raises(
            ConfigError, match=r"bee/0.png: this image cannot be decoded: image file is truncated"
        ):
            part.read(np.array([place]))
