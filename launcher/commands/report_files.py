"""Check the files that settings of a command name for its reports, before the command begins its work."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launcher.config.errors import ConfigError, value_of
from launcher.config.output_files import check_overwrites_no_report, is_device


def writable_report(text: str | None, field: str, key: str) -> Path | None:
    """Return the path of a report that can be written; None if `text` is. Raises ConfigError.

    An existing file must be a report of the launcher, whose object, or each of its list, has `key`.
    """
    if text is None:
        return None
    path = Path(text).expanduser()
    check_overwrites_no_report(path, field, key)
    try:
        path.touch()
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
        raise ConfigError(field, path, why, "a file you may write to") from None
    return path


def check_figure_is_writable(text: str | None, field: str) -> None:
    """Check, without making the file, that the user may write a picture. Raises ConfigError."""
    if text is None:
        return
    path = Path(os.path.expanduser(text))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        remedy = f"{field}=null, or a file you may write to"
        raise ConfigError(field, text, "you may not write to this file", remedy)


def check_files_differ(configs: Sequence[object], field: str) -> None:
    """Check that no two jobs of a sweep write the file that `field` names. Raises ConfigError."""
    texts = [text for config in configs if isinstance(text := value_of(config, field), str)]
    paths = {text: Path(os.path.expanduser(text)).absolute() for text in texts}
    jobs = Counter(paths[text] for text in texts)
    for text, path in paths.items():
        if jobs[path] > 1 and not is_device(path):
            why = f"{jobs[path]} jobs of the sweep would write this file, and only the last would remain"
            raise ConfigError(field, text, why, f"{field}=null, or one command per job")
