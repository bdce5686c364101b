"""What `parallelism=auto` found, for people and for machines."""

from typing import TYPE_CHECKING, Any

from launcher.config.errors import as_typed
from launcher.planning.choose.search import Candidate, Search
from launcher.text import four_digits, plain_table, print_table, size

if TYPE_CHECKING:
    from rich.table import Table

BEST = 5


def print_search(found: Search) -> None:
    print(f"auto     {len(found.candidates)} legal layouts, {len(found.fitting)} fit")
    ranks, asked = found.fitting[0].layout.world_size if found.fitting else 0, found.world.ranks
    if 0 < ranks < asked:
        print(f"note     no layout of all {asked} ranks divides the batch: planned on {ranks}")
        print("         a larger training.global_batch_size keeps more of them busy")
    print()
    print_table(_best(found))
    print_table(_kinds(found))


def _best(found: Search) -> "Table":
    table = _columns("The best few")
    for one in found.fitting[:BEST]:
        table.add_row(*_row(one))
    return table


def _kinds(found: Search) -> "Table":
    table = _columns("The best of every other class, by axes, ZeRO stage and offload", "why it lost")
    best = found.fitting[0] if found.fitting else None
    for kind, one in found.best_of_kinds.items():
        if best is None or kind != best.kind:
            table.add_row(*_row(one), why_lost(one, best))
    return table


def _columns(title: str, *more: str) -> "Table":
    table = plain_table(title)
    words = ("recompute", "sequence", "on host", *more)
    for name in ("pipeline x data x tensor", "ZeRO", "micro-batch", *words[:3], "step, s", "memory", *more):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    return table


def _row(one: Candidate) -> list[str]:
    layout, p = one.layout, one.run.parallelism
    return [
        f"{layout.pipeline} x {layout.data} x {layout.tensor}",
        str(layout.zero_stage),
        str(one.run.training.micro_batch_size),
        p.activation_checkpointing.name,
        "split" if p.sequence_parallel else "",
        "all" if p.offload_parameters else "optimizer" if p.offload_optimizer else "",
        four_digits(one.seconds),
        size(one.peak),
    ]


def why_lost(one: Candidate, best: Candidate | None) -> str:
    if not one.fits:
        return f"does not fit in {size(one.budget or 0)}"
    assert best is not None
    if one.crosses_nodes and not best.crosses_nodes:
        return "its tensor groups would cross nodes"
    slower = one.seconds / best.seconds - 1
    return (
        f"{slower:.1%} slower"
        if slower > 0.0005
        else f"as fast, with {size(one.peak)} instead of {size(best.peak)}"
    )


def search_as_json(found: Search) -> dict[str, Any]:
    best = found.fitting[0] if found.fitting else None
    others = [one for kind, one in found.best_of_kinds.items() if best is None or kind != best.kind]
    return {
        "legal": len(found.candidates),
        "fitting": len(found.fitting),
        "ranks": found.world.ranks,
        "best": [_candidate_json(one) for one in found.fitting[:BEST]],
        "lost": [{"class": one.kind, **_candidate_json(one), "why": why_lost(one, best)} for one in others],
    }


def _candidate_json(one: Candidate) -> dict[str, Any]:
    settings = {
        name: as_typed(value) if not isinstance(value, (int, bool)) else value
        for name, value in one.settings.items()
    }
    return {"settings": settings, "time_s": one.seconds, "memory": one.peak, "fits": one.fits}
