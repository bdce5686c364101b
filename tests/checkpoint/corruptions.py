"""Seeded corruptions of a checkpoint, or of a run's weights/: damage, forgeries, and wrong kinds of file.

A forgery has valid checksums: manifest and files agree with each other, and only their content is wrong.
"""

import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import MANIFEST
from launcher.checkpoint.sealed import sealed

ELSEWHERE = "elsewhere"  # a directory beside the corrupted one, to which links lead
# Values of a wrong type or size for each field of a manifest.
STRANGE: tuple[Any, ...] = (
    None, True, -1, -(2**70), 2**63, 10**300, 1.5, float("nan"), float("inf"), "", "..", "\ud800", "\x1b[2J",
    "a" * 10**5, [], {}, [[]], {"a": {}}, [None] * 50, [-1, 2**62], [2**40] * 4,
)  # fmt: skip
PATHS = (
    *("../elsewhere/file.safetensors", "/dev/zero", "/etc/passwd", "..", ".", "", "a/b.safetensors"),
    *("x.safetensors/", "\0.safetensors", "\ud800.safetensors", "a" * 300 + ".safetensors"),
    *("missing.safetensors", MANIFEST),
)  # fmt: skip


def corrupt(checkpoint: Path, rng: random.Random) -> str:
    """Corrupt the directory in one way; return what was done. It has a manifest and tensor files."""
    name = rng.choice(sorted(CORRUPTIONS))
    return f"{name}: {CORRUPTIONS[name](checkpoint, rng)}"


# Damage of bytes


def _any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def _tensor_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _flipped_bit(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name}"


def _truncated(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    length = rng.choice([0, 1, 7, 8, rng.randrange(path.stat().st_size)])
    path.write_bytes(path.read_bytes()[:length])
    return f"{path.name} to {length} bytes"


def _extended(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 5000)))
    return path.name


def _overwritten(folder: Path, rng: random.Random) -> str:
    """Fill a stretch with zeros or random bytes, as a lost block of a disk does."""
    path = _any_file(folder, rng)
    data = path.read_bytes()
    start = rng.randrange(len(data))
    stop = rng.randrange(start, len(data)) + 1
    filling = bytes(stop - start) if rng.random() < 0.5 else rng.randbytes(stop - start)
    path.write_bytes(data[:start] + filling + data[stop:])
    return f"{path.name} from {start} to {stop}"


def _sparse_giant(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    os.truncate(path, 2 ** rng.randrange(31, 40))
    return path.name


def _swapped(folder: Path, rng: random.Random) -> str:
    first, second = rng.sample(sorted(path for path in folder.iterdir() if path.is_file()), 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{first.name} with {second.name}"


def _pickled(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    size = path.stat().st_size
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch exploded'\ntR.".ljust(size, b"\0"))
    return path.name


# Other things than files


def _deleted(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    path.unlink()
    return path.name


def _emptied(folder: Path, _rng: random.Random) -> str:
    for path in folder.iterdir():
        path.unlink()
    return folder.name


def _renamed(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    path.rename(path.with_name(f"{path.name}.old"))
    return path.name


def _replaced(make: Callable[[Path], object]) -> Callable[[Path, random.Random], str]:
    def replace(folder: Path, rng: random.Random) -> str:
        path = _any_file(folder, rng)
        path.unlink()
        make(path)
        return path.name

    return replace


def _socket(path: Path) -> None:
    # A path of a socket has at most 107 bytes: bind it in its directory.
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _linked_outside(folder: Path, rng: random.Random) -> str:
    """Move a file out of the directory and leave a link to it: its content is right, its place is not."""
    path = _any_file(folder, rng)
    elsewhere = folder.parent / ELSEWHERE
    elsewhere.mkdir(exist_ok=True)
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return path.name


def _linked_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _full_directory(path: Path) -> None:
    path.mkdir()
    (path / "a").touch()


# Forgeries of the manifest


def _read(folder: Path) -> tuple[str, dict[str, Any]]:
    outer = json.loads((folder / MANIFEST).read_text())
    [kind] = outer.keys() - {"format", "sha256"}
    return kind, outer[kind]


def _write(folder: Path, kind: str, content: Any) -> None:
    (folder / MANIFEST).write_text(sealed(kind, content))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value in the manifest, but not of those within its config."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    places = [(*path, key) for key, _ in inner]
    for key, entry in inner:
        if key != "config":
            places += _places(entry, (*path, key))
    return places


def _at(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


def _strange_value(folder: Path, rng: random.Random) -> str:
    kind, content = _read(folder)
    *parents, last = place = rng.choice(_places(content))
    parent, value = _at(content, tuple(parents)), rng.choice(STRANGE)
    while _is_legal(place, parent[last], value):
        value = rng.choice(STRANGE)
    parent[last] = value
    _write(folder, kind, content)
    return f"{place} is {ascii(value)[:40]}"


def _is_legal(place: tuple[Any, ...], old: object, new: object) -> bool:
    """Return whether a manifest may have the new value there: then it describes another checkpoint."""
    if place[0] in ("launcher", "layout", "corpus") and len(place) == (2 if place[0] == "corpus" else 1):
        return isinstance(new, str) and new.isprintable() and len(new) < 1000
    if place[0] in ("scaler", "corpus", "config", "blends", "tensors", "files", "shapes"):
        return (
            new == {} or (place == ("blends",) and new == []) or (place == ("config",) and new == {"a": {}})
        )
    if place == ("finite",):
        return isinstance(new, bool)
    return (new is None and place == ("validation_loss",)) or (
        isinstance(new, float) and place[0] == "validation_loss"
    )


def _lacking_field(folder: Path, rng: random.Random) -> str:
    kind, content = _read(folder)
    *parents, last = place = rng.choice(
        [p for p in _places(content) if p[-1] != "finite" and p[0] not in ("blends", "corpus", "scaler")]
    )
    del _at(content, tuple(parents))[last]
    _write(folder, kind, content)
    return str(place)


def _unknown_field(folder: Path, rng: random.Random) -> str:
    kind, content = _read(folder)
    files = rng.choice([content, *content["files"].values()])
    files[name := rng.choice(["more", "__class__", "\ud800", "a" * 10**5])] = 1
    _write(folder, kind, content)
    return ascii(name)[:40]


def _foreign_path(folder: Path, rng: random.Random) -> str:
    """Give a file of the manifest another name, wherever the manifest names it."""
    kind, content = _read(folder)
    old, new = rng.choice(sorted(content["files"])), rng.choice(PATHS)
    forged = json.loads(json.dumps(content).replace(json.dumps(old), json.dumps(new)))
    _write(folder, kind, forged)
    return ascii(new)[:60]


def _nested(folder: Path, rng: random.Random) -> str:
    """Write a manifest with a value that is nested 50 to 100,000 levels deep."""
    kind, content = _read(folder)
    depth = rng.choice([50, 900, 20_000, 100_000])
    field = rng.choice(sorted(content))
    content[field] = "HERE"
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    middle = opening * depth + ("1" if closing == "}" else "") + closing * depth
    text = json.dumps(content, sort_keys=True).replace('"HERE"', middle)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(f'{{"format": 2, "sha256": "{digest}", "{kind}": {text}}}\n')
    return f"{field}, {depth} levels"


def _twice(folder: Path, _rng: random.Random) -> str:
    """Give a manifest a key twice. Programs differ in which of the two values they take."""
    kind, content = _read(folder)
    text = '{"step": 7, ' + json.dumps(content, sort_keys=True)[1:]
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(f'{{"format": 2, "sha256": "{digest}", "{kind}": {text}}}\n')
    return "step"


def _other_envelope(folder: Path, rng: random.Random) -> str:
    kind, content = _read(folder)
    text = rng.choice(
        [
            "", "{", "[]", "null", "1", "{}", '{"format": 2}', '{"format": 1}', '{"format": 9999999999}',
            "[" * 10**5, "9" * 10**5, sealed("weights" if kind == "checkpoint" else "checkpoint", content),
            sealed(kind, []), sealed(kind, content) * 2, sealed(kind, content)[:-2],
            "\ufeff" + sealed(kind, content),
        ]  # type: ignore[arg-type]
    )  # fmt: skip
    (folder / MANIFEST).write_text(text)
    return ascii(text)[:40]


def _moved_piece(folder: Path, rng: random.Random) -> str:
    """Let the pieces of a tensor overlap, leave a gap, or lie outside the tensor."""
    kind, content = _read(folder)
    if kind != "checkpoint":
        return _strange_value(folder, rng)
    tensor = rng.choice([t for by_name in content["tensors"].values() for t in by_name.values()])
    pieces, dimension = tensor["pieces"], rng.randrange(len(tensor["shape"]))
    piece = rng.choice(pieces)
    how = rng.choice(["repeated", "dropped", "moved", "grown", "flattened", "exchanged"])
    if how == "repeated":
        pieces.append(piece)
    elif how == "dropped":
        pieces.remove(piece)
    elif how == "moved":
        piece["offsets"][dimension] += rng.choice([-1, 1, 2**40])
    elif how == "grown":
        piece["sizes"][dimension] += rng.choice([-1, 1, 2**40])
    elif how == "flattened":
        piece["offsets"].pop()
    else:
        tensor["shape"][dimension] += 1
    _write(folder, kind, content)
    return how


# Forgeries of a tensor file, with the checksum and length that the manifest then records


def _forged_header(folder: Path, rng: random.Random) -> str:
    path = _tensor_file(folder, rng)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, how = (
        header[name],
        rng.choice(["dtype", "shape", "offsets", "lacking", "more", "renamed", "length"]),
    )
    if how == "dtype":
        entry["dtype"] = rng.choice(["I32", "U32", "F16", "BF16", "F64", "X", None, 3, []])
    elif how == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [], [-1], [2**63], None, [entry["shape"]], [1.5]])
        entry["shape"] = (
            [5, 7] if entry["shape"] == json.loads(data[8 : 8 + length])[name]["shape"] else entry["shape"]
        )
    elif how == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [
                [start + 4, end],
                [start, end + 4],
                [end, start],
                [-4, end],
                [0],
                None,
                [0, 2**70],
                [start + 4, end + 4],
            ]
        )
    elif how == "lacking":
        del header[name]
    elif how == "more":
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    elif how == "renamed":
        header[f"{name}x"] = header.pop(name)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    claimed = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]) if how == "length" else len(text)
    path.write_bytes(claimed.to_bytes(8, "little") + text + body)
    _record(folder, path)
    return f"{how} of {path.name}"


def _forged_body(folder: Path, rng: random.Random) -> str:
    path = _tensor_file(folder, rng)
    path.write_bytes(rng.choice([b"", b"\0" * 8, b"{}", rng.randbytes(100), path.read_bytes() + b"\0" * 4]))
    _record(folder, path)
    return path.name


def _record(folder: Path, path: Path) -> None:
    kind, content = _read(folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    _write(folder, kind, content)


# Harmless


def _stray(folder: Path, rng: random.Random) -> str:
    """Add what does not belong to the checkpoint, inside it and beside it."""
    how = rng.choice(["file", "hidden", "directory", "link", "FIFO", "bytes"])
    name = {"hidden": ".nfs0001", "bytes": os.fsdecode(b"stray-\xff")}.get(how, "stray.txt")
    for place in (folder, folder.parent):
        path = place / name
        with suppress(FileExistsError):
            if how == "directory":
                path.mkdir()
            elif how == "link":
                path.symlink_to("/dev/zero")
            elif how == "FIFO":
                os.mkfifo(path)
            else:
                path.write_bytes(b"x")
    return how


def _touched(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    path.touch()
    return path.name


CORRUPTIONS: dict[str, Callable[[Path, random.Random], str]] = {
    "flipped bit": _flipped_bit,
    "truncated": _truncated,
    "extended": _extended,
    "overwritten": _overwritten,
    "sparse giant": _sparse_giant,
    "swapped": _swapped,
    "pickle": _pickled,
    "deleted": _deleted,
    "emptied": _emptied,
    "renamed": _renamed,
    "directory": _replaced(Path.mkdir),
    "full directory": _replaced(_full_directory),
    "FIFO": _replaced(os.mkfifo),
    "socket": _replaced(_socket),
    "link to a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "link to nothing": _replaced(lambda path: path.symlink_to("nothing")),
    "link to itself": _replaced(_linked_to_itself),
    "link outside": _linked_outside,
    "strange value": _strange_value,
    "lacking field": _lacking_field,
    "unknown field": _unknown_field,
    "foreign path": _foreign_path,
    "nested": _nested,
    "key twice": _twice,
    "other envelope": _other_envelope,
    "moved piece": _moved_piece,
    "forged header": _forged_header,
    "forged body": _forged_body,
    "stray": _stray,
    "touched": _touched,
}
HARMLESS = {"stray", "touched"}
