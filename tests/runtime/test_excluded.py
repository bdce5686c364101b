"""excluded.json: a damaged file is refused by name, whatever lies there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.errors import ConfigError
from launcher.runtime.excluded import EXCLUDED, exclude, read_excluded

DAMAGED: dict[str, Callable[[Path], object]] = {
    **{
        text[:20]: lambda path, text=text: path.write_text(text)
        for text in (
            "",
            "1",
            "{}",
            "[1]",
            "[[5, 1]]",
            "[[0, 1, 2]]",
            '["ab"]',
            "[[0.5, 1]]",
            "[[0, 1e400]]",
            "[" * 10**5,
        )
    },
    "not text": lambda path: path.write_bytes(b"\xff"),
    "FIFO": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(EXCLUDED),
    "sparse giant": lambda path: (path.touch(), os.truncate(path, 2**35)),
}


def test_a_damaged_file_is_refused_by_name(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for number, (name, damage) in enumerate(DAMAGED.items()):
        with subtests.test(name):
            folder = tmp_path / str(number)
            folder.mkdir()
            damage(folder / EXCLUDED)
            with pytest.raises(ConfigError, match=f"{EXCLUDED} is damaged"):
                read_excluded(folder)


def test_ranges_are_kept_in_order(tmp_path: Path) -> None:
    assert read_excluded(tmp_path) == ()
    exclude(tmp_path, (3, 5))
    assert exclude(tmp_path, (9, 12)) == read_excluded(tmp_path) == ((3, 5), (9, 12))
    assert json.loads((tmp_path / EXCLUDED).read_text()) == [[3, 5], [9, 12]]
