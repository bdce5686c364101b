"""Print the result of each pass as a table, and write all results as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

from launcher.config.layout import Layout
from launcher.parity.differences import Difference, DifferenceKind
from launcher.parity.verification import VerifyPass
from launcher.text import json_text, plain_table, print_table


def print_pass(result: VerifyPass) -> None:
    """Print a row per step and kind of quantity with its worst difference, then the diagnosis if any."""
    print(f"{result.title}\n{result.engine}")
    if result.lost_a_rank:
        assert result.diagnosis is not None
        print(f"{result.diagnosis.shape}\n  usual cause: {result.diagnosis.meaning}\n", flush=True)
        return
    table = plain_table("")
    for column in ("step", "quantity", "compared", "worst", "measured / allowed", ""):
        justify: Literal["right", "left"] = "right" if column in ("step", "compared") else "left"
        # Names may wrap, numbers may not.
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "worst")
    for worst, count in worst_differences(result.differences):
        name = worst.name if worst.name != worst.kind else ""
        numbers = f"{worst.measured:.1e} / {worst.allowed:.1e}"
        verdict = "ok" if worst.ok else "[bold red]differs[/]"
        table.add_row(str(worst.step), worst.kind, str(count), name, numbers, verdict)
    print_table(table)
    if diagnosis := result.diagnosis:
        step = next(difference.step for difference in result.differences if not difference.ok)
        print(f"First at step {step}: {diagnosis.shape}\n  usual cause: {diagnosis.meaning}\n")


def worst_differences(differences: list[Difference]) -> list[tuple[Difference, int]]:
    """Return the largest difference relative to its bound, and the number compared, per step and kind."""
    groups = [
        [d for d in differences if d.step == step and d.kind == kind]
        for step in sorted({difference.step for difference in differences})
        for kind in get_args(DifferenceKind)
    ]
    return [(max(group, key=lambda d: d.excess), len(group)) for group in groups if group]


def write_report(
    path: Path, layout: Layout, shrunk: list[str], passes: list[VerifyPass], *, finished: bool = True
) -> None:
    """Write the verdict and every difference of all passes as JSON; false unless `finished`."""
    report = {
        "ok": finished and all(result.ok for result in passes),
        "layout": asdict(layout),
        "shrunk": shrunk,
        "passes": [
            {
                "title": result.title,
                "engine": result.engine,
                "ok": result.ok,
                "diagnosis": asdict(result.diagnosis) if result.diagnosis else None,
                "differences": [{**asdict(d), "ok": d.ok} for d in result.differences],
            }
            for result in passes
        ],
    }
    path.write_text(json_text(report, indent=2) + "\n")
