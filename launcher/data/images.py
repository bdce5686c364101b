"""Images and their classes, from scikit-learn's digits or from a directory per class.

Shapes: B micro-batch, N images, C channels, S height and width in pixels.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.schema import DataConfig, ModelConfig
from launcher.config.sequence_order import Part
from launcher.data.corpus import split_key
from launcher.data.input_files import LeftOut, files_below

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DIGITS = 1797  # images of 8 x 8 pixels
_CHECKED_FILES = 64  # files per part whose headers are read before ranks start

Images = npt.NDArray[np.uint8]  # (B, C, S, S)
Classes = npt.NDArray[np.int64]  # (B, 1)


@dataclass(frozen=True)
class ImageFile:
    """An image file and its class."""

    name: str  # POSIX path relative to the data directory
    path: Path
    label: int  # class number


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class ImageArray:
    """Images in memory, (N, C, S, S), and their classes (N,)."""

    images: Images
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def count_labels(self, places: npt.NDArray[np.int64]) -> int:
        return len(places)

    def read(self, places: npt.NDArray[np.int64], part: Part | None = None) -> tuple[Images, Classes]:
        """Return the images (B, C, S, S) and classes (B, 1) at indices `places` (B,)."""
        assert part is None, "validated with the config"
        return self.images[places], self.labels[places, None]


@dataclass(frozen=True)
class ImageFiles:
    """Image files that are decoded when they are read."""

    files: Sequence[ImageFile]
    size: int  # S: the shorter side is scaled to S pixels, and a square is cropped at the centre
    channels: int  # C: 1 is grey; 3 is red, green, blue
    field: str  # the config field that error messages name

    def __len__(self) -> int:
        return len(self.files)

    def count_labels(self, places: npt.NDArray[np.int64]) -> int:
        return len(places)

    def read(self, places: npt.NDArray[np.int64], part: Part | None = None) -> tuple[Images, Classes]:
        """Return the images (B, C, S, S) and classes (B, 1) at `places` (B,). Raises ConfigError."""
        assert part is None, "validated with the config"
        files = [self.files[place] for place in places.tolist()]
        images = np.stack([_decoded(file.path, self.size, self.channels, self.field) for file in files])
        return images, np.array([[file.label] for file in files], np.int64)


def digits(data: DataConfig) -> tuple[list[ImageArray], dict[str, str]]:
    """Return the training, validation and test part of the digits, and the digest of the training part."""
    from sklearn.datasets import load_digits

    dataset: Any = load_digits()
    assert len(dataset.images) == DIGITS
    # The pixel values 0 to 16 are scaled to 0 to 255 and stay distinct.
    images = np.rint(dataset.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = dataset.target.astype(np.int64)
    parts = [np.array(part, np.int64) for part in _parts([str(n) for n in range(DIGITS)], data)]
    arrays = [ImageArray(images[part], labels[part]) for part in parts]
    digest = hashlib.sha256(arrays[0].images.tobytes() + arrays[0].labels.tobytes()).hexdigest()[:16]
    return arrays, {"": digest}


def digit_counts(data: DataConfig) -> list[int]:
    """Return the number of images in the training, validation and test part of the digits."""
    return [len(part) for part in _parts([str(n) for n in range(DIGITS)], data)]


def image_folder(
    data: DataConfig, model: ModelConfig, left_out: LeftOut
) -> tuple[list[ImageFiles], dict[str, str]]:
    """Return the training, validation and test part of `data.train`, and digests.

    The digest of the training part has the name ""; "validation" and "test" have one if they have their own
    directory. Adds the number of files that are not used to `left_out`, by reason.

    `data.train` contains a directory per class. If `data.validation` or `data.test` is set, that part is read
    from a directory of the same structure instead. The digest covers the names and sizes of the files.
    Raises ConfigError for a missing directory, a directory without images, more classes than the model's, and
    a directory of another part that is that of the training images.
    """
    assert data.train is not None, "validated with the config"
    names = _class_names(data.train, "data.train")
    if len(names) > model.num_classes:
        why = f"the images in data.train={data.train} have {len(names)} classes"
        remedy = f"model.num_classes={len(names)} (or more)"
        raise ConfigError("model.num_classes", model.num_classes, why, remedy)
    files = _files(data.train, "data.train", names, left_out)
    parts = [[files[n] for n in part] for part in _parts([file.name for file in files], data)]
    fields = ["data.train", "data.validation", "data.test"]
    digests = {"": _digest(parts[0])}
    for number, directory in ((1, data.validation), (2, data.test)):
        if directory is not None:
            _check_not_trained_on(directory, fields[number], data.train)
            parts[number] = _files(directory, fields[number], names, left_out)
            digests[fields[number].removeprefix("data.")] = _digest(parts[number])
    size, channels = model.image_size, model.image_channels
    by_field = zip(fields, parts, strict=True)
    return [ImageFiles(part, size, channels, field) for field, part in by_field], digests


def _check_not_trained_on(directory: str, field: str, train: str) -> None:
    if os.path.realpath(Path(directory).expanduser()) == os.path.realpath(Path(train).expanduser()):
        why = "this is the directory of the training images"
        remedy = f"{field}=null {field}_fraction=0.1 (a share of them) or {field}=DIRECTORY of other images"
        raise ConfigError(field, directory, why, remedy)


def _digest(files: list[ImageFile]) -> str:
    text = "".join(f"{file.name}/{file.path.stat().st_size}\n" for file in files)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def check_images(images: ImageFiles) -> None:
    """Raise ConfigError if a file is not an image. Only 64 files are opened, evenly spaced in `images`."""
    if len(images) == 0:
        return
    for number in np.unique(np.linspace(0, len(images) - 1, _CHECKED_FILES).astype(int)).tolist():
        with _opened(images.files[number].path, images.field):
            pass


def _parts(names: list[str], data: DataConfig) -> list[list[int]]:
    """Return the indices of each part. A name's hash decides: an added file does not move other files."""
    validation = 0.0 if data.validation is not None else data.validation_fraction
    test = 0.0 if data.test is not None else data.test_fraction
    parts: list[list[int]] = [[], [], []]
    for number, name in enumerate(names):
        key = split_key(name)
        parts[1 if key < validation else 2 if key < validation + test else 0].append(number)
    return parts


def _class_names(root: str, field: str) -> list[str]:
    path = Path(root).expanduser()
    remedy = f"{field}=DIRECTORY with a subdirectory per class"
    if not path.is_dir():
        raise ConfigError(field, root, "this directory does not exist", remedy)
    names = [entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        why = "this directory has no subdirectories, and each class needs one"
        raise ConfigError(field, root, why, remedy)
    return sorted(names)


def _files(root: str, field: str, names: list[str], left_out: LeftOut) -> list[ImageFile]:
    if unknown := [name for name in _class_names(root, field) if name not in names]:
        why = f"this directory has a class {unknown[0]!r}, which data.train does not have"
        raise ConfigError(field, root, why, f"{field}=DIRECTORY with the classes of data.train only")
    path = Path(root).expanduser()
    files = []
    for label, name in enumerate(names):
        # Held-out files need not have every class.
        below = files_below(path / name, left_out, field) if (path / name).is_dir() else []
        images = [file for file in below if file.suffix.lower() in ENDINGS]
        left_out["not images"] += len(below) - len(images)
        files += [ImageFile(file.relative_to(path).as_posix(), file, label) for file in images]
    if not files:
        why = "the class directories contain no image files"
        raise ConfigError(field, root, why, f"{field}=DIRECTORY with files ending in {', '.join(ENDINGS)}")
    return files


def _decoded(path: Path, size: int, channels: int, field: str) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageOps

    with _opened(path, field) as image:
        converted = image.convert("L" if channels == 1 else "RGB")
        fitted = ImageOps.fit(converted, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(fitted, np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def _opened(path: Path, field: str) -> Iterator[Any]:
    """Yield the image; raise ConfigError if the file cannot be opened, or decoded in the context."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError) as error:
        reason = str(error).partition(str(path))[0].strip(" '") or str(error)
        why = f"this image cannot be decoded: {reason}"
        raise ConfigError(field, path, why, f"replace or delete {path}") from None
