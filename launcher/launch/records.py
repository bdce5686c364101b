"""How ranks ended, left in a directory for the job that started them: srun's exit code does not tell.

Where one task ends badly srun ends the others, and reports the highest of all their codes.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

# In memory, and of IPv4 and IPv6 with their ports.
_ADDRESS = re.compile(r"0x[0-9a-f]+|\[?\b\d{1,3}(\.\d{1,3}){3}\b\]?(:\d+)?|\[[\w.%]*:[\w.%:]*\](:\d+)?")
ENDS = "LAUNCHER_ENDS"  # the environment variable that names the directory; without it nothing is recorded


class Kind(Enum):
    """In the order in which they explain a job's end."""

    refused = "refused"
    failed = "failed"
    lost = "lost"  # a peer, whose end came first
    stopped = "stopped"


@dataclass(frozen=True)
class RankEnd:
    rank: int
    kind: Kind
    error: str = ""  # in one line


def record_end(rank: int, kind: Kind, error: BaseException | str = "") -> None:
    """Leave word, in a file of this rank's own, unless it has. Silent where it cannot: a full disk, say."""
    if ENDS not in os.environ:
        return
    end = RankEnd(rank, kind, one_line(error))
    with suppress(OSError), _file_of(rank).open("x") as file:
        file.write(json.dumps({**asdict(end), "kind": kind.name}) + "\n")


def has_recorded(ranks: Iterable[int]) -> bool:
    """Whether all of these have left word: an exit code then has nothing to add."""
    try:
        return ENDS in os.environ and all(_file_of(rank).stat().st_size > 0 for rank in ranks)
    except OSError:
        return False


def _file_of(rank: int) -> Path:
    return Path(os.environ[ENDS]) / f"rank_{rank}.json"


def one_line(error: BaseException | str) -> str:
    """The same for the same failure: addresses, which differ each time, are left out."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return _ADDRESS.sub("...", next(iter(text.strip().splitlines()), ""))


def ends_in(folder: Path) -> list[RankEnd]:
    """Those left there, what explains the end first."""
    order = list(Kind)
    found = []
    for path in folder.glob("rank_*.json"):
        try:
            left = json.loads(path.read_text())
            found.append(RankEnd(left["rank"], Kind[left["kind"]], left["error"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # its node died while it was written
    return sorted(found, key=lambda end: (order.index(end.kind), end.rank))
