"""`launcher checkpoint ls | show | check PATH`: what is there, and whether it is intact. Imports no torch."""

from math import prod
from pathlib import Path

from launcher.checkpoint.manifest import (
    MANIFEST,
    BrokenCheckpoint,
    Manifest,
    checkpoints_in,
    damaged,
    read_manifest,
)
from launcher.config.errors import ConfigError
from launcher.text import size, whole

USAGE = """\
launcher checkpoint ls PATH      the checkpoints of a run
launcher checkpoint show PATH    what is in one; of a run, in its newest
launcher checkpoint check PATH   read every file and compare its checksum; of a run, of all its checkpoints

PATH is a run's directory, or one checkpoint. Exit code 1 if one cannot be used."""


def main(arguments: list[str]) -> int:
    """Run one of the three; returns the exit code. Raises ConfigError for arguments that make no sense."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    verb, *rest = arguments
    if verb not in VERBS or len(rest) != 1:
        given = " ".join(["checkpoint", *arguments])
        raise ConfigError(given, None, "not understood", f"launcher checkpoint {' | '.join(VERBS)} PATH")
    paths = found_at(Path(rest[0]).expanduser())
    return VERBS[verb](paths)


def found_at(path: Path) -> list[Path]:
    """The checkpoint `path`, or those of the run `path`, newest first. Raises ConfigError without any."""
    found = [path] if (path / MANIFEST).exists() else checkpoints_in(path)
    if not found:
        raise ConfigError(
            str(path), None, "holds no checkpoint", "a run's directory, or one of its checkpoints"
        )
    return found


def ls(paths: list[Path]) -> int:
    problems = 0
    for path in reversed(paths):
        try:
            manifest = read_manifest(path)
            print(f"{path}  {_size(manifest)}  {whole(manifest.samples)} samples{_loss(manifest)}")
        except BrokenCheckpoint as broken:
            problems += 1
            print(f"{path}  cannot be used: {broken}")
    return 1 if problems else 0


def show(paths: list[Path]) -> int:
    try:
        manifest = read_manifest(paths[0])
    except BrokenCheckpoint as broken:
        print(f"{paths[0]}  cannot be used: {broken}")
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
    problems = 0
    for path in reversed(paths):
        try:
            manifest = read_manifest(path)
            if name := damaged(path, manifest, sorted(manifest.files)):
                raise BrokenCheckpoint(path, name, "is damaged: its checksum is another")
            print(f"{path}  intact, {_size(manifest)}")
        except BrokenCheckpoint as broken:
            problems += 1
            print(f"{path}  cannot be used: {broken}")
    return 1 if problems else 0


VERBS = {"ls": ls, "show": show, "check": check}


def _size(manifest: Manifest) -> str:
    return size(sum(file.bytes for file in manifest.files.values()))


def _loss(manifest: Manifest) -> str:
    return "" if manifest.validation_loss is None else f", validation loss {manifest.validation_loss:.4f}"
