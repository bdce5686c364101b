"""Faults that survive a campaign for a reason that was looked into: (file, function, change) -> reason.

They change numbers without being errors, such as another order of a sum, or a size that only changes speed. A
survivor that is not listed here makes `python -m tests.fuzz` end with exit code 1.
"""

EXPLAINED: dict[tuple[str, str, str], str] = {}
