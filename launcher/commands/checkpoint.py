"""`launcher checkpoint ls | show | check PATH`: list, describe and verify checkpoints. Imports no torch."""

from collections.abc import Callable
from math import prod
from pathlib import Path

from launcher.checkpoint.manifest import (
    Manifest,
    UnusableCheckpoint,
    checkpoints_at,
    read_intact_manifest,
    read_manifest,
)
from launcher.config.errors import ConfigError
from launcher.text import size, whole

USAGE = """\
launcher checkpoint ls PATH      list the checkpoints of a run
launcher checkpoint show PATH    describe one checkpoint; for a run, its newest
launcher checkpoint check PATH   read every file and compare its SHA-256; for a run, of all its checkpoints

PATH is a run's directory or a checkpoint's directory. The exit code is 1 if a checkpoint cannot be used."""


def main(arguments: list[str]) -> int:
    """Run `ls`, `show` or `check`; return the exit code. Raises ConfigError for wrong arguments."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    verb, *rest = arguments
    if verb not in VERBS or len(rest) != 1:
        given = " ".join(["checkpoint", *arguments])
        why = "the command needs `ls`, `show` or `check`, and one path"
        remedy = f"launcher checkpoint {verb if verb in VERBS else 'ls'} runs/NAME"
        raise ConfigError(given, None, why, remedy)
    return VERBS[verb](checkpoints_at(Path(rest[0]).expanduser()))


def ls(paths: list[Path]) -> int:
    """Print one line per checkpoint, oldest first; return 1 if a checkpoint is not complete."""
    return _print_each(paths, read_manifest, lambda m: f"{_size(m)}  {whole(m.samples)} samples{_loss(m)}")


def show(paths: list[Path]) -> int:
    """Print the contents of the first checkpoint; return 1 if it is not complete."""
    try:
        manifest = read_manifest(paths[0])
    except UnusableCheckpoint as unusable:
        print(f"{paths[0]}  cannot be used: {unusable}")
        return 1
    print(f"checkpoint  {paths[0]}")
    print(f"step        {manifest.step}, {whole(manifest.samples)} samples consumed{_loss(manifest)}")
    print(f"written     by launcher {manifest.launcher} on {manifest.layout}")
    for kind, tensors in manifest.tensors.items():
        numel = sum(prod(stored.shape) for stored in tensors.values())
        print(f"{kind:<11} {len(tensors)} tensors, {whole(numel)} elements, fp32")
    print(f"files       {len(manifest.files)}, {_size(manifest)}")
    return 0


def check(paths: list[Path]) -> int:
    """Print for each checkpoint, oldest first, whether it is intact; return 1 if a checkpoint is not."""
    return _print_each(paths, read_intact_manifest, lambda manifest: f"intact, {_size(manifest)}")


def _print_each(
    paths: list[Path], read: Callable[[Path], Manifest], describe: Callable[[Manifest], str]
) -> int:
    exit_code = 0
    for path in reversed(paths):
        try:
            print(f"{path}  {describe(read(path))}")
        except UnusableCheckpoint as unusable:
            exit_code = 1
            print(f"{path}  cannot be used: {unusable}")
    return exit_code


VERBS = {"ls": ls, "show": show, "check": check}


def _size(manifest: Manifest) -> str:
    return size(sum(file.bytes for file in manifest.files.values()))


def _loss(manifest: Manifest) -> str:
    loss = "" if manifest.validation_loss is None else f", validation loss {manifest.validation_loss:.4f}"
    return loss if manifest.finite else f"{loss}, with NaN or infinite values"
