"""What a verification found, for people and for machines."""

import json
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table

from launcher.config.layout import Layout
from launcher.parity.differences import Difference, Kind
from launcher.parity.verify import Pass

KINDS = get_args(Kind)
FILE_WIDTH = 120  # columns of a table that is not written to a terminal


def print_pass(one: Pass) -> None:
    """A row per step and kind of quantity: the worst of it, as measured / allowed."""
    table = Table(title=one.title, title_justify="left", box=None, pad_edge=False)
    for column in ("step", "quantity", "compared", "worst", "measured / allowed", ""):
        justify: Literal["right", "left"] = "right" if column in ("step", "compared") else "left"
        # Names are broken where they must be, numbers never.
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "worst")
    for worst, count in worst_differences(one.differences):
        table.add_row(
            str(worst.step),
            worst.kind,
            str(count),
            worst.name if worst.name != worst.kind else "",
            f"{worst.measured:.1e} / {worst.allowed:.1e}",
            "ok" if worst.ok else "[bold red]differs[/]",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table)
    if one.diagnosis:
        failed = [difference for difference in one.differences if not difference.ok]
        step = failed[0].step
        print(f"\nFirst at step {step}: {one.diagnosis.shape}\n  usually: {one.diagnosis.meaning}")
    print()


def worst_differences(differences: list[Difference]) -> list[tuple[Difference, int]]:
    """Of each step and kind: the difference furthest beyond its bound, and how many were compared."""
    found = []
    for step in sorted({difference.step for difference in differences}):
        for kind in KINDS:
            group = [d for d in differences if d.step == step and d.kind == kind]
            if group:
                found.append((max(group, key=lambda d: d.excess), len(group)))
    return found


def write_report(path: Path, layout: Layout, shrunk: list[str], passes: list[Pass]) -> None:
    """The verdict and every measured difference, as JSON."""
    report = {
        "ok": all(one.ok for one in passes),
        "layout": asdict(layout),
        "shrunk": shrunk,
        "passes": [
            {
                "title": one.title,
                "ok": one.ok,
                "diagnosis": asdict(one.diagnosis) if one.diagnosis else None,
                "differences": [
                    {**asdict(d), "measured": _finite(d.measured), "ok": d.ok} for d in one.differences
                ],
            }
            for one in passes
        ],
    }
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def _finite(measured: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return measured if isfinite(measured) else None
