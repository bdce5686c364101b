"""The results of a campaign as JSON lines, written as they come, so that an interruption loses none."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutants import PACKAGE

HEADER = "campaign"


class OtherCampaign(Exception):
    """Raised for a file whose results come from another seed or other code."""


@dataclass
class Journal:
    """The records of a campaign: those of earlier sessions, and those that this session adds."""

    path: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, path: Path, seed: int, *, clean: bool) -> "Journal":
        """Return the journal in `path`, which may have records. Raises OtherCampaign."""
        header = {"kind": HEADER, "seed": seed, "clean": clean, "code": digest_of_code()}
        journal = cls(path, list(_records(path)) if path.exists() else [])
        found = [record for record in journal.records if record["kind"] == HEADER]
        for other in found[:1]:
            for name, value in header.items():
                if other[name] != value:
                    raise OtherCampaign(
                        f"{path} has results of another campaign ({name} is {other[name]}, not {value}); "
                        "try: --results with another file"
                    )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as file:
                file.write("\n")  # a session was killed while it wrote
        journal.add(header)  # of each session
        return journal

    @property
    def session(self) -> int:
        return sum(record["kind"] == HEADER for record in self.records)

    @property
    def seconds(self) -> float:
        """The length of all sessions; of earlier ones up to their last record."""
        last: dict[int, float] = {}
        for record in self.records:
            last[record["session"]] = record["at"]
        last[self.session] = time.monotonic() - self._started
        return sum(last.values())

    def add(self, record: dict[str, Any]) -> None:
        session = self.session + (record["kind"] == HEADER)
        record = {**record, "session": session, "at": round(time.monotonic() - self._started, 1)}
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # see Journal.open


def digest_of_code() -> str:
    """Return a digest of the launcher, and of what is drawn: faults are numbered by their place in a file."""
    hashed = hashlib.sha256()
    here = Path(__file__).parent
    for path in [*sorted(PACKAGE.rglob("*.py")), here / "draws.py", here / "mutants.py"]:
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def as_ranges(numbers: set[int]) -> list[list[int]]:
    """Return the numbers as ranges [first, last]."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def from_ranges(ranges: list[list[int]]) -> set[int]:
    return {number for first, last in ranges for number in range(first, last + 1)}
