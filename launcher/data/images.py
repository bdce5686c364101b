"""Images and their classes: scikit-learn's digits, or a directory per class."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.schema import DataConfig, ModelConfig
from launcher.data.corpus import split_key

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DIGITS = 1797  # scans of 8 x 8 pixels
_PROBES = 64  # files whose headers are read before ranks start

Images = npt.NDArray[np.uint8]  # (B, C, S, S)
Classes = npt.NDArray[np.int64]  # (B, 1)


@dataclass(frozen=True)
class ImageFile:
    """A file, its path below the directory that was named, and the number of its class."""

    name: str
    path: Path
    label: int


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class ImageArray:
    """Images in memory, (N, C, S, S), and their classes (N,)."""

    images: Images
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, places: npt.NDArray[np.int64]) -> tuple[Images, Classes]:
        return self.images[places], self.labels[places, None]


@dataclass(frozen=True)
class ImageFiles:
    """Images decoded as they are read: scaled until the shorter side fits, cut to a square at the centre."""

    files: Sequence[ImageFile]
    size: int
    channels: int  # 1: grey, 3: red, green, blue
    field: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, places: npt.NDArray[np.int64]) -> tuple[Images, Classes]:
        """Raises ConfigError for a file that cannot be decoded."""
        files = [self.files[place] for place in places.tolist()]
        images = np.stack([_decoded(file.path, self.size, self.channels, self.field) for file in files])
        return images, np.array([[file.label] for file in files], np.int64)


def digits(data: DataConfig) -> tuple[list[ImageArray], str]:
    """Training, validation and test part, by a hash of each scan's number; and a digest of the first."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    assert len(found.images) == DIGITS
    # 0 to 16 as bytes: apart as before.
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = found.target.astype(np.int64)
    parts = [np.array(part) for part in _parts([str(n) for n in range(DIGITS)], data)]
    arrays = [
        ImageArray(images[part], labels[part]) if len(part) else ImageArray(images[:0], labels[:0])
        for part in parts
    ]
    digest = hashlib.sha256(arrays[0].images.tobytes() + arrays[0].labels.tobytes()).hexdigest()[:16]
    return arrays, digest


def digit_counts(data: DataConfig) -> list[int]:
    """The scans of each part."""
    return [len(part) for part in _parts([str(n) for n in range(DIGITS)], data)]


def image_folder(data: DataConfig, model: ModelConfig) -> tuple[list[ImageFiles], str]:
    """As digits, of a directory per class; or of `data.validation` and `data.test`, directories like it.

    The digest is of names and sizes. Raises ConfigError for directories that are not there, hold no images,
    or more classes than the model.
    """
    assert data.train is not None, "validated with the config"
    names = _class_names(data.train, "data.train")
    if len(names) > model.num_classes:
        why = f"data.train={data.train} has {len(names)} classes"
        raise ConfigError(
            "model.num_classes", model.num_classes, why, f"model.num_classes={len(names)} (or more)"
        )
    files = _files(data.train, "data.train", names)
    parts = [[files[n] for n in part] for part in _parts([file.name for file in files], data)]
    fields = ["data.train", "data.validation", "data.test"]
    for number, named in ((1, data.validation), (2, data.test)):
        if named is not None:
            parts[number] = _files(named, fields[number], names)
    text = "".join(f"{file.name}/{file.path.stat().st_size}\n" for file in parts[0])
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return [
        ImageFiles(part, model.image_size, model.image_channels, field)
        for part, field in zip(parts, fields, strict=True)
    ], digest


def check_images(images: ImageFiles) -> None:
    """Raise ConfigError for a file that is no image, among some of them, evenly spread."""
    from PIL import Image, UnidentifiedImageError

    for number in (
        np.unique(np.linspace(0, len(images) - 1, _PROBES).astype(int)).tolist() if len(images) else []
    ):
        path = images.files[number].path
        try:
            with Image.open(path):
                pass
        except (UnidentifiedImageError, OSError) as error:
            raise _no_image(path, images.field, error) from None


def _parts(names: list[str], data: DataConfig) -> list[list[int]]:
    """The numbers of each part, each by its name alone: a file added later moves none of the others."""
    validation = 0.0 if data.validation is not None else data.validation_fraction
    test = 0.0 if data.test is not None else data.test_fraction
    parts: list[list[int]] = [[], [], []]
    for number, name in enumerate(names):
        key = split_key(name)
        parts[1 if key < validation else 2 if key < validation + test else 0].append(number)
    return parts


def _class_names(root: str, field: str) -> list[str]:
    path = Path(root).expanduser()
    if not path.is_dir():
        raise ConfigError(
            field, root, "there is no such directory", f"{field}=DIRECTORY with one per class in it"
        )
    names = sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        why = "has no directories in it, and each is a class"
        raise ConfigError(field, root, why, f"{field}=DIRECTORY with one per class in it")
    return names


def _files(root: str, field: str, names: list[str]) -> list[ImageFile]:
    if strange := [name for name in _class_names(root, field) if name not in names]:
        why = f"has a class {strange[0]!r}, which data.train has not"
        raise ConfigError(field, root, why, "the classes of data.train")
    path = Path(root).expanduser()
    found = [
        ImageFile(file.relative_to(path).as_posix(), file, label)
        for label, name in enumerate(names)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in ENDINGS
    ]
    if not found:
        raise ConfigError(field, root, "holds no images", f"files of {', '.join(ENDINGS)}")
    return found


def _decoded(path: Path, size: int, channels: int, field: str) -> npt.NDArray[np.uint8]:
    """(C, S, S)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            whole = image.convert("L" if channels == 1 else "RGB")
            fitted = ImageOps.fit(whole, (size, size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise _no_image(path, field, error) from None
    pixels = np.asarray(fitted, np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _no_image(path: Path, field: str, error: Exception) -> ConfigError:
    why = str(error).partition(str(path))[0].strip(" '") or str(error)
    return ConfigError(field, path, f"cannot be decoded: {why}", "an intact image in its place, or none")
