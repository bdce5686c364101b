"""Record how each rank ended: the exit code of srun does not say which rank failed first."""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from launcher.config.secrets import without_values

# Memory addresses, and IPv4 and IPv6 addresses with or without a port.
_ADDRESS = re.compile(r"0x[0-9a-f]+|\[?\b\d{1,3}(\.\d{1,3}){3}\b\]?(:\d+)?|\[[\w.%]*:[\w.%:]*\](:\d+)?")
# The environment variable that holds the path of the directory. Without it no rank records its end.
ENDS_VARIABLE = "LAUNCHER_ENDS"


class RankEndKind(Enum):
    """Ways in which a rank ends. The first in this list explains the end of a job best."""

    refused = "refused"
    halted = "halted"  # by a guard of the run
    failed = "failed"
    lost = "lost"  # lost the connection to a rank that ended before
    stopped = "stopped"


@dataclass(frozen=True)
class RankEnd:
    rank: int
    kind: RankEndKind
    error: str = ""  # one line


def record_end(rank: int, kind: RankEndKind, error: BaseException | str = "") -> None:
    """Write the end of `rank` to its file; do nothing if the file exists or cannot be written (full disk)."""
    if ENDS_VARIABLE not in os.environ:
        return
    end = RankEnd(rank, kind, without_values(error_summary(error)))
    with suppress(OSError), _file_of(rank).open("x") as file:
        file.write(json.dumps({**asdict(end), "kind": kind.name}) + "\n")


def all_recorded(ranks: Iterable[int]) -> bool:
    """Return whether all of `ranks` have recorded their ends; their exit codes are not needed then."""
    try:
        return ENDS_VARIABLE in os.environ and all(_file_of(rank).stat().st_size > 0 for rank in ranks)
    except OSError:
        return False


def _file_of(rank: int) -> Path:
    return Path(os.environ[ENDS_VARIABLE]) / f"rank_{rank}.json"


def error_summary(error: BaseException | str) -> str:
    """Return the error's first line without memory and network addresses, which differ each time."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return _ADDRESS.sub("...", next(iter(text.strip().splitlines()), ""))


def read_rank_ends(folder: Path) -> list[RankEnd]:
    """Return how the ranks ended, from the files in `folder`, sorted by kind (see RankEndKind) and rank."""
    order = list(RankEndKind)
    ends = []
    for path in folder.glob("rank_*.json"):
        try:
            record = json.loads(path.read_text())
            ends.append(RankEnd(record["rank"], RankEndKind[record["kind"]], record["error"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the node died while it wrote the file
    return sorted(ends, key=lambda end: (order.index(end.kind), end.rank))
