"""`launcher checkpoint ls | show | check PATH`: list, describe and verify checkpoints. Imports no torch."""

from collections.abc import Callable
from math import isfinite, prod
from pathlib import Path

from launcher.checkpoint.final import FINAL_WEIGHTS, read_final_weights
from launcher.checkpoint.integrity import check_files, read_intact_manifest
from launcher.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredFile,
    UnusableCheckpoint,
    checkpoints_at,
    checkpoints_in,
    read_manifest,
)
from launcher.config.errors import ConfigError
from launcher.config.paths import path_argument
from launcher.text import printable, size, whole

USAGE = """\
launcher checkpoint ls PATH      list the checkpoints of a run
launcher checkpoint show PATH    describe one checkpoint; for a run, its newest
launcher checkpoint check PATH   read every file and compare its SHA-256; for a run, of all its checkpoints
                                 and its final weights

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
    path = path_argument("checkpoint", rest[0])
    try:
        return VERBS[verb](path)
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
        raise ConfigError(printable(path), None, why, "a directory that you may read") from None


def ls(path: Path) -> int:
    """Print one line per checkpoint, oldest first; return 1 if a checkpoint is not complete."""
    paths = checkpoints_at(path)
    return _print_each(
        paths, read_manifest, lambda m: f"{_size(m.files)}  {whole(m.samples)} samples{_loss(m)}"
    )


def show(path: Path) -> int:
    """Print the contents of the first checkpoint; return 1 if it is not complete."""
    newest = checkpoints_at(path)[0]
    try:
        manifest = read_manifest(newest)
    except UnusableCheckpoint as unusable:
        print(f"{printable(newest)}  cannot be used: {unusable}")
        return 1
    print(f"checkpoint  {printable(newest)}")
    print(f"step        {manifest.step}, {whole(manifest.samples)} samples consumed{_loss(manifest)}")
    print(f"written     by launcher {manifest.launcher} on {manifest.layout}")
    for kind, tensors in manifest.tensors.items():
        numel = sum(prod(stored.shape) for stored in tensors.values())
        print(f"{kind:<11} {len(tensors)} tensors, {whole(numel)} elements, fp32")
    print(f"files       {len(manifest.files)}, {_size(manifest.files)}")
    return 0


def check(path: Path) -> int:
    """Print for each checkpoint, oldest first, and the final weights whether it is intact; else return 1."""
    run_dir = path.parent if path.name == FINAL_WEIGHTS else path
    has_weights = (run_dir / FINAL_WEIGHTS).is_dir() and not (run_dir / MANIFEST).exists()
    paths = checkpoints_in(path) if has_weights else checkpoints_at(path)
    exit_code = _print_each(paths, read_intact_manifest, lambda manifest: f"intact, {_size(manifest.files)}")
    return max(exit_code, _check_final_weights(run_dir) if has_weights else 0)


def _check_final_weights(run_dir: Path) -> int:
    folder = printable(run_dir / FINAL_WEIGHTS)
    try:
        weights = read_final_weights(run_dir)
        check_files(weights.stored(run_dir), sorted(weights.files))
    except UnusableCheckpoint as unusable:
        print(f"{folder}  cannot be used: {unusable}")
        return 1
    print(f"{folder}  intact, of step {weights.step}, {_size(weights.files)}")
    return 0


def _print_each(
    paths: list[Path], read: Callable[[Path], Manifest], describe: Callable[[Manifest], str]
) -> int:
    exit_code = 0
    for path in reversed(paths):
        try:
            print(f"{printable(path)}  {describe(read(path))}")
        except UnusableCheckpoint as unusable:
            exit_code = 1
            print(f"{printable(path)}  cannot be used: {unusable}")
    return exit_code


VERBS = {"ls": ls, "show": show, "check": check}


def _size(files: dict[str, StoredFile]) -> str:
    return size(sum(file.bytes for file in files.values()))


def _loss(manifest: Manifest) -> str:
    value = manifest.validation_loss
    loss = "" if value is None else f", validation loss {value:.4f}"
    if value is not None and not isfinite(value):
        loss += " (not finite: never the best)"
    return loss if manifest.finite else f"{loss}, with NaN or infinite values"
