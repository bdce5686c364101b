"""Image files for the whole run, and their pixels, read with seeks.

The files are PGM (grey) and PPM (red, green, blue): a header in text, then a byte per pixel and channel. They
have the size of the model's images, so that no pixel is scaled.
"""

import random
from functools import partial
from pathlib import Path

import torch

from launcher.config.schema import CorpusSource, ModelConfig, RunConfig
from launcher.parity.plain_source import PlainSource, Sample

CLASSES = 5  # largest number of class directories
IMAGES = 19  # of an epoch: a few steps go through several epochs


def use_images(run: RunConfig, folder: Path) -> None:
    """Let the run read the files of write_images. Modifies `run`."""
    run.data.source = CorpusSource.image_folder
    run.data.train, run.data.validation = str(folder / "images"), str(folder / "held-out-images")


def write_images(run: RunConfig, folder: Path) -> dict[str, PlainSource]:
    """Write a directory of images per class for each part; return the only source."""
    rng = random.Random(run.training.seed)
    held_out = run.training.global_batch_size + 1  # no whole number of global batches
    parts = (_written(run.model, rng, folder / "images", IMAGES),
             _written(run.model, rng, folder / "held-out-images", held_out))  # fmt: skip
    train, validation = (partial(_sample, run.model, files) for files in parts)
    return {"": PlainSource(train, IMAGES, validation, held_out)}


def _written(model: ModelConfig, rng: random.Random, folder: Path, count: int) -> list[tuple[Path, int]]:
    """Write `count` images of random pixels; return path and class of each, class by class."""
    size, classes = model.image_size, min(CLASSES, model.num_classes)
    ending = "pgm" if model.image_channels == 1 else "ppm"
    # Each class at least once, in unequal numbers.
    labels = sorted([*range(classes), *(rng.randrange(classes) for _ in range(count - classes))][:count])
    files = []
    for number, label in enumerate(labels):
        path = folder / f"class-{label}" / f"{number:04}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_header(model) + rng.randbytes(size * size * model.image_channels))
        files.append((path, label))
    return files


def _header(model: ModelConfig) -> bytes:
    kind = "P5" if model.image_channels == 1 else "P6"
    return f"{kind}\n{model.image_size} {model.image_size}\n255\n".encode()


def _sample(model: ModelConfig, files: list[tuple[Path, int]], place: int) -> Sample:
    """Return the pixels of an image (C, S, S) and its class (1,)."""
    path, label = files[place]
    size, channels = model.image_size, model.image_channels
    pixels = torch.zeros(channels, size, size, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(len(_header(model)))
        for row in range(size):
            for column in range(size):
                for channel, value in enumerate(file.read(channels)):
                    pixels[channel, row, column] = value
    return pixels, torch.tensor([label])
